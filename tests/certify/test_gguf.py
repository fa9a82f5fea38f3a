"""GGUF files are certified against the checkpoint that they were converted from."""

import struct
from pathlib import Path

import pico
import pytest
import torch
from command_helpers import assert_one_sentence
from copies import FAST, certified
from gguf_helpers import write_gguf
from pico import Models

from lrc_cli.checkpoint.gguf import GgufFile
from lrc_cli.errors import InputError
from lrc_cli.quality.certificate_record import Certificate


@pytest.mark.parametrize(
    ("kind", "least", "most"),
    [("F32", 0.0, 1e-9), ("F16", 0.0, 1e-3), ("Q8_0", 1e-6, 0.01), ("Q4_0", 0.01, 0.9)],
)
def test_a_converted_file_is_as_far_as_its_rounding(
    kind: str, least: float, most: float, tmp_path: Path, checkpoint: Models, text: Path
) -> None:
    original = checkpoint("llama")
    file = write_gguf(tmp_path / "llama.gguf", original, kind)
    record = certified(original, file, text, tmp_path / "out")
    assert isinstance(record.certificate, Certificate)
    kl = record.certificate.values.quantities["kl"]
    assert least <= max(kl) <= most, max(kl)
    assert record.other.form.startswith("GGUF (") and f"{kind}: " in record.other.form
    assert not record.weights.flags and record.other.num_bytes < file.stat().st_size
    assert len(record.weights.tensors) == 20
    grids = [x.grid for x in record.weights.tensors if x.grid is not None]
    assert bool(grids) == kind.startswith("Q")
    assert all(grid.group == 32 and grid.levels <= 256 for grid in grids)
    assert any("Pairs of rows of model.layers.*.self_attn.q_proj" in x for x in record.differences)
    assert any("multiplied out before the run" in x for x in record.arithmetic.sentences)
    if kind == "Q8_0":
        options = ("--against", original, "--other", file, "-q")
        ended = pico.call("verify", tmp_path / "out", *options)
        assert ended.code == 0, ended.out


def test_rows_that_were_not_put_in_pairs_need_not_be_put_back(
    tmp_path: Path, checkpoint: Models, text: Path
) -> None:
    original = checkpoint("llama")
    file = write_gguf(tmp_path / "llama.gguf", original, turned=False)
    record = certified(original, file, text, tmp_path / "out")
    assert not record.weights.flags and {x.error for x in record.weights.tensors} == {0.0}
    assert not any("put back" in x for x in record.differences)


def test_a_bad_tensor_of_a_file_is_flagged(tmp_path: Path, checkpoint: Models, text: Path) -> None:
    original = checkpoint("llama")
    bad = {"blk_1_ffn_up_weight": torch.full((96, 64), 0.25)}
    file = write_gguf(tmp_path / "llama.gguf", original, "Q8_0", **bad)
    record = certified(original, file, text, tmp_path / "out")
    flagged = {(flag.tensor, flag.kind) for flag in record.weights.flags}
    assert flagged == {("model.layers.1.mlp.up_proj.weight", "constant")}


def test_a_file_of_another_network_is_refused(
    tmp_path: Path, checkpoint: Models, text: Path
) -> None:
    file = write_gguf(tmp_path / "llama.gguf", checkpoint("llama"))
    arguments = ("--data", text, "--output", tmp_path / "out", *FAST)
    ended = pico.call("certify", file, "--against", checkpoint("bert"), *arguments)
    assert_one_sentence(ended, 2, "compare it with the checkpoint that it was converted from")
    assert not (tmp_path / "out").exists()


def header(
    *, version: int = 3, tensors: int = 1, keys: int = 0, after: bytes = b"", magic: bytes = b"GGUF"
) -> bytes:
    return magic + struct.pack("<IQQ", version, tensors, keys) + after


def text_of(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def tensor(
    name: bytes = b"x", shape: tuple[int, ...] = (32,), kind: int = 0, offset: int = 0
) -> bytes:
    sizes = b"".join(struct.pack("<Q", size) for size in shape)
    return text_of(name) + struct.pack("<I", len(shape)) + sizes + struct.pack("<IQ", kind, offset)


KEY = text_of(b"k")
HUGE = 2**63
HOSTILE: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "no GGUF file"),
    "another magic": (header(magic=b"GGML") + bytes(64), "no GGUF file"),
    "version 1": (header(version=1), "versions 2 and 3"),
    "swapped bytes": (b"GGUF" + struct.pack(">IQQ", 3, 1, 0) + bytes(64), "versions 2 and 3"),
    "half a header": (header()[:20] + b"ab", "no GGUF file"),
    "countless tensors": (header(tensors=HUGE), "tensors, and at most"),
    "countless keys": (header(keys=HUGE), "keys, and at most"),
    "a long text": (header(keys=1, after=struct.pack("<Q", HUGE)), "bytes of a text"),
    "a text beyond the end": (header(keys=1, after=struct.pack("<Q", 10**6)), "not so many"),
    "a key twice": (
        header(tensors=0, keys=2, after=2 * (KEY + struct.pack("<IB", 0, 1))),
        "twice",
    ),
    "an unknown type": (header(keys=1, after=KEY + struct.pack("<I", 77)), "unknown type 77"),
    "a countless list": (
        header(keys=1, after=KEY + struct.pack("<IIQ", 9, 4, HUGE)),
        "entries of a list",
    ),
    "a list of lists": (
        header(keys=1, after=KEY + struct.pack("<IIQ", 9, 9, 1000) + bytes(64)),
        "a list holds lists",
    ),
    "a long list": (header(keys=1, after=KEY + struct.pack("<IIQ", 9, 4, 10**6)), "not so many"),
    "no tensor": (header(tensors=0) + bytes(64), "no tensor"),
    "no dimension": (header(after=tensor(shape=())), "0 dimensions"),
    "many dimensions": (header(after=tensor(shape=(1,) * 9)), "9 dimensions"),
    "a huge shape": (header(after=tensor(shape=(HUGE,))), "entries, and at most"),
    "a huge product": (header(after=tensor(shape=(2000,) * 4)), "has shape"),
    "an empty tensor": (header(after=tensor(shape=(0,))), "has shape"),
    "half a block": (header(after=tensor(shape=(33,), kind=2)), "has shape"),
    "an unknown kind": (header(after=tensor(kind=999)), "type 999"),
    "beyond the end": (header(after=tensor(offset=64)) + bytes(140), "beyond the end"),
    "a tensor twice": (header(tensors=2, after=2 * tensor()) + bytes(400), "twice"),
    "a name of controls": (header(after=tensor(b"\x1b[2J")) + bytes(400), "no text"),
    "alignment 0": (
        header(
            keys=1,
            after=text_of(b"general.alignment") + struct.pack("<II", 4, 0) + tensor(),
        )
        + bytes(400),
        "alignment is 0",
    ),
    "alignment in words": (
        header(
            keys=1,
            after=text_of(b"general.alignment") + struct.pack("<I", 8) + text_of(b"x") + tensor(),
        )
        + bytes(400),
        "alignment is 'x'",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_header_is_refused_at_once(name: str, tmp_path: Path) -> None:
    content, words = HOSTILE[name]
    file = tmp_path / "hostile.gguf"
    file.write_bytes(content)
    with pytest.raises(InputError) as raised:
        GgufFile(file)
    assert words in str(raised.value) and "hostile.gguf" in str(raised.value)


def test_a_truncated_file_is_refused_wherever_it_ends(tmp_path: Path, checkpoint: Models) -> None:
    whole = write_gguf(tmp_path / "whole.gguf", checkpoint("llama"), "Q8_0").read_bytes()
    file = tmp_path / "part.gguf"
    for end in (*range(0, 3000, 97), len(whole) // 2, len(whole) - 40):
        file.write_bytes(whole[:end])
        with pytest.raises(InputError):
            GgufFile(file)
