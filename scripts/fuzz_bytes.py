"""Try bytes on the readers, guided by the lines they reach: FUZZ_SECONDS, or 600, in equal shares.

    .venv/bin/python scripts/fuzz_bytes.py              every reader, in processes of their own
    .venv/bin/python scripts/fuzz_bytes.py npz 60       one reader, and its seconds

A reader takes its input, or refuses it in a few words. The first input that does something else
ends its reader's share, and is kept in .cache/fuzz/. The extra `fuzz` brings atheris, which makes
the bytes.
"""

import hashlib
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests/support"))

FOUND = ROOT / ".cache/fuzz"
LIMITS = ("-timeout=60", "-rss_limit_mb=4096")
"""The most seconds for one input, and the most memory of the process."""
RUNS = re.compile(r"^(?:#|Done )(\d+)", re.M)


def fuzz(name: str, seconds: str) -> None:
    """Tries one reader, starting from good files; atheris ends the process."""
    import atheris

    with atheris.instrument_imports(include=["lrc_cli"]):
        from hostile.readers import READERS

    FOUND.mkdir(parents=True, exist_ok=True)

    def holds(raw: bytes) -> None:
        try:
            READERS[name].holds(raw)
        except BaseException:  # libFuzzer itself keeps only what takes too long or too much
            (FOUND / f"{name}-{hashlib.sha256(raw).hexdigest()[:16]}").write_bytes(raw)
            raise

    corpus = Path(tempfile.mkdtemp())
    for number, good in enumerate(READERS[name].good()):
        (corpus / str(number)).write_bytes(good)
    options = [f"-max_total_time={seconds}", f"-artifact_prefix={FOUND}/{name}-", *LIMITS]
    atheris.Setup([sys.argv[0], str(corpus), *options], holds)
    atheris.Fuzz()


def tried(name: str, seconds: int) -> bool:
    """Tries one reader in a process of its own, says what came of it, and returns if all held."""
    with tempfile.TemporaryDirectory() as folder:  # atheris ends the process and deletes nothing
        ended = subprocess.run(
            [sys.executable, __file__, name, str(seconds)],
            env=os.environ | {"TMPDIR": folder},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
    runs = RUNS.findall(ended.stdout)
    print(f"{name}: {runs[-1] if runs else 0} inputs", flush=True)
    if ended.returncode:
        print(ended.stdout[-4000:], flush=True)
    return ended.returncode == 0


def main() -> int:
    """Returns 1 if an input was found on which a reader fails."""
    if len(sys.argv) == 3:
        fuzz(*sys.argv[1:])
    if importlib.util.find_spec("atheris") is None:
        print("bytes: not tried, for atheris is not installed: pip install 'lrc-cli[fuzz]'")
        return 0
    from hostile.readers import READERS

    seconds = int(os.environ.get("FUZZ_SECONDS", "600")) // len(READERS)
    return int(not all([tried(name, max(1, seconds)) for name in READERS]))


if __name__ == "__main__":
    sys.exit(main())
