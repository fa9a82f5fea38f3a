"""A config that a stranger wrote is read in seconds and in bounded memory, or refused in a line."""

import os
from pathlib import Path

import pytest

from lrc_cli.config import CONFIG_BYTES, load_config, parse_config, plain_values
from lrc_cli.errors import InputError

MINIMAL = "model: {path: m}\ncalibration: {path: c}\ncompression: {size: 0.8}\noutput: {path: o}\n"
LAUGHS = "\n".join(
    ["a0: &a0 [x, x]", *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 40))]
)
MERGES = "\n".join(
    [
        "m0: &m0 {k: 1}",
        *(f"m{i}: &m{i} {{<<: [{', '.join([f'*m{i - 1}'] * 9)}]}}" for i in range(1, 40)),
    ]
)

TEXTS = {
    "billion laughs": (MINIMAL + LAUGHS, "unknown key"),
    "laughs in merges": (MINIMAL + MERGES, "unknown key"),
    "laughs as data": (MINIMAL.replace("path: c", "path: *a39") + LAUGHS, "undefined alias"),
    "laughs for a list": (LAUGHS + "\n" + MINIMAL + "evaluation: *a39\n", "unknown key"),
    "a merge": (MINIMAL + "runtime: {<<: {seed: 3}}\n", "runtime.<<: unknown key"),
    "a python tag": (MINIMAL + "runtime: !!python/object/apply:os.system [ls]\n", "the tag"),
    "an own tag": (MINIMAL + "runtime: !x {seed: 1}\n", "the tag '!x' is not allowed"),
    "a set": (MINIMAL + "runtime: !!set {a}\n", "the tag"),
    "binary": (MINIMAL + "runtime: {device: !!binary aGVsbG8=}\n", "the tag"),
    "5000 digits": (MINIMAL + f"runtime: {{seed: {'9' * 5000}}}\n", "cannot be read as a value"),
    "1001 digits": (MINIMAL + f"runtime: {{seed: {'9' * 900}}}\n", "more than 100 digits"),
    "hexadecimal": (MINIMAL + f"runtime: {{seed: 0x{'f' * 900}}}\n", "more than 100 digits"),
    "base 60": (MINIMAL + f"runtime: {{seed: {'1:' * 100_000}1}}\n", "cannot be read as a value"),
    "half a character": (MINIMAL + 'runtime: {device: "\\uD800"}\n', "half of a character"),
    "half in a key": (MINIMAL + 'runtime: {"\\uDFFF": 1}\n', "half of a character"),
    "half in a pattern": (
        MINIMAL.replace("size: 0.8", 'size: 0.8, include: ["re:\\uD800"]'),
        "compression.include.0: holds half of a character",
    ),
    "half in a path": (MINIMAL.replace("path: m", 'path: "m\\uD800"'), "model.path: holds half"),
    "no character": (MINIMAL + 'runtime: {device: "\\UFFFFFFFF"}\n', "not valid YAML"),
    "a null": (MINIMAL + "runtime: {device: '\0'}\n", "U+0000"),
    "a null, escaped": (MINIMAL.replace("path: m", 'path: "a\\0b"'), "model.path: expected"),
    "a directive": ("%YAML 1." + "9" * 5000 + "\n---\n" + MINIMAL, "not valid YAML"),
    "11 000 entries": (MINIMAL + "evaluation: [" + "a," * 11_000 + "]\n", "has 11,000 entries"),
    "11 000 keys": (
        MINIMAL + "runtime: {" + ",".join(f"a{i}: 1" for i in range(11_000)) + "}\n",
        "has 11,000 entries",
    ),
    "too long": (MINIMAL + "# " + "x" * CONFIG_BYTES, "at most 500,000 are read"),
    "deep": (MINIMAL + "runtime: " + "{a: " * 3000, "nested too deeply"),
    "deep lists": (MINIMAL + "runtime: " + "[" * 100_000, "nested too deeply"),
    "deep in blocks": (MINIMAL + "runtime:\n" + "- " * 3000 + "a", "nested too deeply"),
    "a huge scalar": (MINIMAL + "runtime: {device: " + "x" * 400_000 + "}\n", "runtime.device"),
    "infinite": (MINIMAL.replace("0.8", ".inf"), "compression.size"),
    "not a number": (MINIMAL.replace("0.8", ".nan"), "compression.size"),
    "two documents": (MINIMAL + "---\n" + MINIMAL, "single document"),
    "a key of a list": (MINIMAL + "? [a]\n: b\n", "a key must be a text"),
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", TEXTS)
def test_a_text_that_asks_for_too_much(kind: str) -> None:
    text, piece = TEXTS[kind]
    with pytest.raises(InputError) as caught:
        parse_config(text, "demo.yaml")
    assert any(piece in line for line in str(caught.value).splitlines()), str(caught.value)[:500]
    assert all(line.startswith(("demo.yaml", "and ")) for line in str(caught.value).splitlines())
    assert len(str(caught.value)) < 10_000
    str(caught.value).encode()


FILES = {
    "a pipe": (lambda file: os.mkfifo(file), "is a pipe"),
    "a device": (lambda file: file.symlink_to("/dev/zero"), "is a device"),
    "a directory": (lambda file: file.mkdir(), "is a directory"),
    "100 MB": (lambda file: os.truncate(file, 10**8) or None, "at most 500,000 are read"),
    "utf-16": (lambda file: file.write_bytes(MINIMAL.encode("utf-16")), "1: not UTF-8"),
    "binary": (lambda file: file.write_bytes(bytes(range(256))), "not UTF-8"),
}


@pytest.mark.timeout(20)
@pytest.mark.parametrize("kind", FILES)
def test_a_file_that_is_no_config(kind: str, tmp_path: Path) -> None:
    make, piece = FILES[kind]
    file = tmp_path / "job.yaml"
    if kind == "100 MB":
        file.touch()
    make(file)
    with pytest.raises(InputError, match=piece) as caught:
        load_config(file)
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.timeout(20)
def test_plain_values_share_aliases_and_merge_nothing() -> None:
    assert plain_values("a: &x [1, 2.5]\nb: *x\nc: {d: null}", "x") == {
        "a": [1, 2.5],
        "b": [1, 2.5],
        "c": {"d": None},
    }
    deep = plain_values(LAUGHS, "x")
    for i in range(39, 0, -1):
        assert len(deep[f"a{i}"]) == 9 and deep[f"a{i}"][0] is deep[f"a{i}"][8]
    assert list(plain_values(MERGES, "x")["m39"]) == ["<<"]
    with pytest.raises(InputError, match="contains itself"):
        plain_values("a: &x [*x]", "x")
