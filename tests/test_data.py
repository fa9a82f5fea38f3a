"""Every kind of calibration data: what is read of it, and what is said where it cannot be."""

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import media_helpers
import numpy as np
import pico
import pyarrow
import pytest
import soundfile
import torch
from conftest import Models
from PIL import Image
from pyarrow import parquet
from safetensors.torch import save_file
from transformers import AutoTokenizer

from lrc_cli.calibration import Purpose, Sequences, draw
from lrc_cli.checkpoint.source import hash_path, open_source
from lrc_cli.data.folders import read_audio
from lrc_cli.data.processors import Processors, open_processors
from lrc_cli.errors import InputError
from lrc_cli.loading import load
from lrc_cli.verify.files import data_sha256

TEXTS = [pico.words(40, seed=i) for i in range(8)]
TEMPLATE = (
    "{% for m in messages %}{{ 'w1' if m.role == 'user' else 'w2' }} {{ m.content }} {% endfor %}"
)
CHATS = [
    [{"role": "user", "content": text}, {"role": "assistant", "content": pico.words(9, seed=i)}]
    for i, text in enumerate(TEXTS)
]


@pytest.fixture(scope="module")
def media_model(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """The directory of a model of media_helpers."""
    root = tmp_path_factory.mktemp("media-models")
    return lambda name: (
        root / name if (root / name).exists() else media_helpers.write_model(root / name, name)
    )


@pytest.fixture(scope="module")
def tokenizer(checkpoint: Models) -> Any:
    """The pico Llama's, with a chat template."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint("llama"))
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def processors_of(path: Path) -> Processors:
    return open_processors(open_source(path), load(path))


def drawn(path: Path, processors: Processors, **changes: Any) -> Sequences:
    values = {"sequence_length": 16, "num_sequences": 6, "required": True, **changes}
    purpose = Purpose(name="calibration", path=path, **values)
    return draw([purpose], processors=processors, seed=0)["calibration"]


def write_records(file: Path, field: str, values: list[Any]) -> Path:
    """Records with a number and one field, in the form that the file's name says."""
    rows = [{"number": i, field: value} for i, value in enumerate(values)]
    if file.suffix == ".jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif file.suffix == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), file, row_group_size=3)
    else:
        with file.open("w", newline="", encoding="utf-8-sig") as handle:
            writer = csv.DictWriter(handle, ["number", field])
            writer.writeheader()
            writer.writerows(rows)
    return file


# ---------------------------------------------------------------- records


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_texts_of_records_are_those_of_one_file(
    suffix: str, tokenizer: Any, tmp_path: Path
) -> None:
    texts = [*TEXTS, 'w1 "w2", w3\nw4', pico.words(200_000 if suffix == ".csv" else 10)]
    (tmp_path / "all.txt").write_text("\n\n".join(texts))
    file = write_records(tmp_path / f"data{suffix}", "body", texts)
    own = Processors(tokenizer=tokenizer)
    found = drawn(file, own, text_field="body")
    assert found.sha256 == drawn(tmp_path / "all.txt", own).sha256
    with pytest.raises(
        InputError, match=r"no text under the key 'text'; .* \(there are 'n.*'body'"
    ):
        drawn(file, own)


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_token_ids_are_taken_as_they_are(suffix: str, tmp_path: Path) -> None:
    ids = [list(range(100 * i, 100 * i + 7 + i)) for i in range(1, 12)]
    file = write_records(tmp_path / f"ids{suffix}", "tokens", ids)
    stream = [token for row in ids for token in row]
    found = drawn(file, Processors(), text_field="tokens", sequence_length=8)
    blocks = [stream[i : i + 8] for i in range(0, len(stream) - 7, 8)]
    assert all(row in blocks for row in found.inputs["input_ids"].tolist())
    assert found.population == len(blocks)


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_conversations_are_rendered_by_the_chat_template(
    suffix: str, tokenizer: Any, tmp_path: Path
) -> None:
    file = write_records(tmp_path / f"chats{suffix}", "messages", CHATS)
    found = drawn(file, Processors(tokenizer=tokenizer), chat_template=True)
    stream = [
        token
        for chat in CHATS
        for token in tokenizer.apply_chat_template(chat, tokenize=True, return_dict=False)
    ]
    blocks = [stream[i : i + 16] for i in range(0, len(stream) - 15, 16)]
    assert all(row in blocks for row in found.inputs["input_ids"].tolist())
    assert pico.VOCABULARY.index("w2") in stream and found.population == len(blocks)


RECORDS: dict[str, tuple[str, list[Any], dict[str, Any], str]] = {
    "mixed": (".jsonl", ["w1", [1, 2]], {}, r"jsonl:2: 'text' holds token ids, and text before"),
    "numbers": (".jsonl", [1.5], {}, "jsonl:1: no text under the key 'text', nor token ids"),
    "null": (".parquet", ["w1", None], {}, "record 2: no text under the key 'text'"),
    "chats": (".jsonl", CHATS, {}, "nor token ids; .* chat_template: true for conversations"),
    "no chats": (".jsonl", ["w1"], {"chat_template": True}, "no text under the key 'messages'"),
    "wrong chats": (
        ".jsonl",
        [[3]],
        {"chat_template": True, "text_field": "text"},
        "no text under the key 'messages'",
    ),
}


@pytest.mark.parametrize("kind", RECORDS)
def test_records_that_cannot_be_read(kind: str, tokenizer: Any, tmp_path: Path) -> None:
    suffix, values, changes, cause = RECORDS[kind]
    file = write_records(tmp_path / f"data{suffix}", "text", values)
    with pytest.raises(InputError, match=cause) as caught:
        drawn(file, Processors(tokenizer=tokenizer), **changes)
    assert str(file) in str(caught.value) and caught.value.remedy


def test_chat_templates_that_cannot_be_used(
    tokenizer: Any, checkpoint: Models, tmp_path: Path
) -> None:
    plain = AutoTokenizer.from_pretrained(checkpoint("llama"))
    file = write_records(tmp_path / "data.jsonl", "messages", CHATS)
    with pytest.raises(InputError, match="tokenizer has no chat template; put its chat_template"):
        drawn(file, Processors(tokenizer=plain), chat_template=True)
    write_records(file, "messages", [[{"role": "user"}], "nothing"])
    with pytest.raises(InputError, match=r"data.jsonl:2: the chat template fails"):
        drawn(file, Processors(tokenizer=tokenizer), chat_template=True)
    (tmp_path / "a.txt").write_text("w1")
    with pytest.raises(InputError, match=r"a .txt holds no conversations"):
        drawn(tmp_path / "a.txt", Processors(tokenizer=tokenizer), chat_template=True)
    wanted = [
        Purpose(name=str(way), path=file, sequence_length=4, num_sequences=1, required=False,
                text_field="messages", chat_template=way)
        for way in (True, False)
    ]  # fmt: skip
    write_records(file, "messages", CHATS)
    with pytest.raises(InputError, match="read with chat_template: true already"):
        draw(wanted, processors=Processors(tokenizer=tokenizer), seed=0)


@pytest.mark.parametrize(
    ("name", "content", "cause"),
    [
        ("a.csv", 'text\n"w1', r"a.csv:\d: not valid CSV"),
        ("a.csv", "text,other\nw1,w2\n\nw3", None),
        ("a.parquet", "nothing", "cannot be read as parquet"),
        ("a.npz", "nothing", r"cannot be read as \.npz"),
    ],
)
def test_damaged_tables(
    name: str, content: str, cause: str | None, tokenizer: Any, tmp_path: Path
) -> None:
    (tmp_path / name).write_text(content)
    own = Processors(tokenizer=tokenizer)
    if cause is None:
        assert drawn(tmp_path / name, own, sequence_length=2, num_sequences=1).population == 1
        return
    with pytest.raises(InputError, match=cause):
        drawn(tmp_path / name, own)


RECORDED: dict[str, tuple[str, str, Callable[[Any], list[Any]], dict[str, Any]]] = {
    "csv": ("a.csv", "body", lambda _: TEXTS, {"text_field": "body"}),
    "parquet": ("a.parquet", "text", lambda _: TEXTS, {}),
    "conversations": ("a.jsonl", "messages", lambda _: CHATS, {"chat_template": True}),
    "token ids": (
        "a.jsonl",
        "ids",
        lambda tokenizer: [tokenizer(text)["input_ids"] for text in TEXTS],
        {"text_field": "ids"},
    ),
}


@pytest.mark.parametrize("kind", RECORDED)
def test_records_are_compressed_with(
    kind: str, tokenizer: Any, checkpoint: Models, tmp_path: Path
) -> None:
    name, field, values, settings = RECORDED[kind]
    model = shutil.copytree(checkpoint("llama"), tmp_path / "model")
    tokenizer.save_pretrained(model)
    file = write_records(tmp_path / name, field, values(tokenizer))
    text = {"name": "rest", "path": str(file), "part": [0.6, 1.0], "num_sequences": 3, **settings}
    changes = {"model.path": str(model), "calibration.path": str(file), "evaluation": [text]}
    changes |= {f"calibration.{key}": value for key, value in settings.items()}
    changes |= {"calibration.num_sequences": 5, "calibration.sequence_length": 16}
    output, report = pico.compressed(tmp_path, changes)
    assert report["quality"][0]["num_sequences"] == 3 and "perplexity_after" in report["quality"][0]
    assert pico.factorised_keys(pico.read_state(output))
    ended = pico.call("verify", output, "--against", model)
    assert ended.code == 0 and "data.drawn: 2 hold" in ended.out, ended.out


# ---------------------------------------------------------------- tensors


def test_npz_and_safetensors_are_the_same(tmp_path: Path) -> None:
    x = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
    tensors = {"x": x, "attention_mask": torch.arange(60).reshape(20, 3)}
    save_file(tensors, tmp_path / "a.safetensors")
    np.savez(tmp_path / "a.npz", **{name: t.numpy() for name, t in tensors.items()})
    np.savez_compressed(tmp_path / "b.npz", x=x.numpy().astype(">f4"),
                        attention_mask=np.arange(60, dtype=np.uint16).reshape(20, 3))  # fmt: skip
    hashes = {drawn(tmp_path / name, Processors()).sha256 for name in
              ("a.safetensors", "a.npz", "b.npz")}  # fmt: skip
    assert len(hashes) == 1
    np.savez(tmp_path / "c.npz", x=np.array(["a", "b"]))
    with pytest.raises(InputError, match="x holds <U1, no numbers"):
        drawn(tmp_path / "c.npz", Processors())
    np.savez(tmp_path / "d.npz", x=np.array([{}]))
    with pytest.raises(InputError, match=r"cannot be read as \.npz"):
        drawn(tmp_path / "d.npz", Processors())


def test_masked_inputs_in_npz(
    plain_folder: pico.PlainFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(plain_folder.path)
    state = pico.read_state(plain_folder.path / "masked.safetensors")
    np.savez(tmp_path / "masked.npz", **{name: t.numpy() for name, t in state.items()})
    changes = plain_folder.model("attention") | {"calibration.part": None}
    first, _ = pico.compressed(tmp_path, changes)
    changes |= {
        "calibration.path": str(tmp_path / "masked.npz"),
        "output.path": str(tmp_path / "b"),
    }
    second, _ = pico.compressed(tmp_path, changes)
    wanted, found = pico.read_state(first), pico.read_state(second)
    assert all(torch.equal(wanted[key], found[key]) for key in wanted)


# ---------------------------------------------------------------- encoder-decoders


def test_a_decoder_goes_on_where_the_encoder_ends(media_model: Models, text: Path) -> None:
    own = processors_of(media_model("t5"))
    blocks = drawn(text, own, sequence_length=17).inputs
    assert blocks["input_ids"].shape == (6, 9) and blocks["decoder_input_ids"].shape == (6, 8)
    words = text.read_text()
    for ids, decoded in zip(*blocks.values(), strict=True):
        assert ids[-1] == 3 and decoded[0] == 0, "the end of a text, and the decoder's start"
        both = own.tokenizer.decode([*ids[:-1].tolist(), *decoded[1:].tolist()])
        assert both in words
    body = processors_of(media_model("t5-body"))
    blocks = drawn(text, body, sequence_length=17).inputs
    assert torch.equal(blocks["input_ids"][:, :-1], blocks["decoder_input_ids"][:, 1:])


def test_a_decoder_writes_the_transcript(media_model: Models, tmp_path: Path) -> None:
    folder = media_helpers.write_recordings(tmp_path / "speech", 6, transcripts=True)
    own = processors_of(media_model("whisper"))
    found = drawn(folder, own).inputs
    assert found["input_features"].shape == (6, 16, 100)
    words = {own.tokenizer.decode(x[1:], skip_special_tokens=True) for x in
             found["decoder_input_ids"].tolist()}  # fmt: skip
    assert words == {(folder / f"{i:03}.txt").read_text() for i in range(6)}
    assert bool((found["decoder_input_ids"][:, 0] == media_helpers.START).all())
    assert bool((found["decoder_input_ids"][:, 1] != media_helpers.START).all())
    assert torch.equal(found["decoder_attention_mask"] == 1, found["decoder_input_ids"] != 0)
    (folder / "003.txt").unlink()
    with pytest.raises(InputError, match=r"003.txt: is missing, and others have a text"):
        drawn(folder, own)


# ---------------------------------------------------------------- folders, end to end

DATA: dict[str, tuple[str, Callable[[Path], Path], str]] = {
    "images": ("vit", media_helpers.write_images, "sampled"),
    "captions": ("clip", lambda d: media_helpers.write_images(d, captions=True), "output"),
    "recordings": ("wav2vec2", media_helpers.write_recordings, "sampled"),
    "speech": (
        "whisper",
        lambda d: media_helpers.write_recordings(d, transcripts=True),
        "next_token",
    ),
    "speech without texts": ("whisper", media_helpers.write_recordings, "sampled"),
}


@pytest.mark.parametrize("kind", DATA)
def test_folders_are_compressed_with(kind: str, media_model: Models, tmp_path: Path) -> None:
    name, write, loss = DATA[kind]
    folder, model = write(tmp_path / "data"), media_model(name)
    changes = {"model.path": str(model), "calibration.path": str(folder), "evaluation": None}
    output, report = pico.compressed(tmp_path, changes)
    assert report["loss"]["kind"] == loss and report["quality"][0]["num_sequences"] == 12
    assert report["provenance"]["data_files_sha256"] == {str(folder): hash_path(folder)}
    assert sum(layer["storage"] != "dense" for layer in report["layers"]) > 3
    before, after = load(model), load(output)
    inputs = drawn(folder, processors_of(model), num_sequences=2).inputs
    with torch.no_grad():
        first, second = before(**inputs), after(**inputs)
    for key in (key for key in first if isinstance(first[key], torch.Tensor)):
        assert first[key].shape == second[key].shape and not torch.equal(first[key], second[key])
    moved = folder.rename(tmp_path / "moved")
    ended = pico.call("verify", output, "--against", model, "--data", moved)
    assert ended.code == 0 and "quality.measured: 1 hold" in ended.out, ended.out
    assert pico.call("eval", output, "--data", moved).code == 0


def test_texts_for_an_encoder_decoder(media_model: Models, text: Path, tmp_path: Path) -> None:
    changes = {"model.path": str(media_model("t5")), "calibration.path": str(text)}
    output, report = pico.compressed(tmp_path, changes)
    assert report["loss"]["kind"] == "next_token" and "perplexity_after" in report["quality"][0]
    ended = pico.call("verify", output, "--against", media_model("t5"))
    assert ended.code == 0, ended.out


@pytest.mark.parametrize(
    ("name", "kind", "cause"),
    [
        ("vit", "text", "the checkpoint has no tokenizer for a text"),
        ("clip", "images", "the model needs the input 'input_ids', and the data offers pixel_val"),
        ("clip", "text", "the model needs the input 'pixel_values', and the data offers input_ids"),
        ("vit", "recordings", "the processor for audio cannot be opened"),
        ("t5", "images", "has no processor for images; put its preprocessor_config.json"),
        ("vit", "tensors", "needs the input 'pixel_values', and the data offers x"),
        ("t5", "ids", "needs the input 'decoder_input_ids', and the data offers input_ids"),
    ],
)
def test_an_input_that_the_data_does_not_offer_is_named(
    name: str, kind: str, cause: str, media_model: Models, text: Path, tmp_path: Path
) -> None:
    data = {
        "text": lambda: text,
        "images": lambda: media_helpers.write_images(tmp_path / "images", 4),
        "recordings": lambda: media_helpers.write_recordings(tmp_path / "audio", 4),
    }
    save_file({"x": torch.zeros(8, 4)}, tmp_path / "tensors.safetensors")
    save_file({"input_ids": torch.ones(8, 4, dtype=torch.int64)}, tmp_path / "ids.safetensors")
    path = data[kind]() if kind in data else tmp_path / f"{kind}.safetensors"
    changes = {"model.path": str(media_model(name)), "calibration.path": str(path)}
    changes |= {"calibration.num_sequences": 1, "calibration.part": None, "evaluation": None}
    ended = pico.call("compress", pico.job(tmp_path, changes), "-q")
    assert ended.code == 2 and ended.err.count("\n") == 1 and cause in ended.err, ended.err
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------- folders, what they hold


def test_wav_of_every_width_is_the_same_sound(tmp_path: Path) -> None:
    time = np.arange(800) / 8000
    sound = np.stack([np.sin(500 * time), 0.5 * np.cos(900 * time)], axis=1)
    for width in (1, 2, 3, 4):
        media_helpers.write_wave(tmp_path / "a.wav", sound, width=width, rate=8000)
        found, rate = read_audio(tmp_path / "a.wav")
        assert rate == 8000 and found.dtype == np.float32 and found.shape == (800,)
        np.testing.assert_allclose(found, sound.mean(axis=1), atol=2.0 ** (3 - 8 * width) + 1e-6)
    for name, subtype in (("b.wav", "FLOAT"), ("b.flac", "PCM_24")):
        soundfile.write(tmp_path / name, sound, 8000, subtype=subtype)
        found, rate = read_audio(tmp_path / name)
        np.testing.assert_allclose(found, sound.mean(axis=1), atol=1e-5)


def test_folders_that_cannot_be_read(media_model: Models, tmp_path: Path) -> None:
    images = processors_of(media_model("vit"))
    sounds = processors_of(media_model("whisper"))

    def refused(folder: str, processors: Processors, cause: str) -> None:
        with pytest.raises(InputError, match=cause) as caught:
            drawn(tmp_path / folder, processors, num_sequences=1)
        assert caught.value.remedy

    (tmp_path / "none" / ".hidden").mkdir(parents=True)
    (tmp_path / "none" / ".hidden" / "a.png").write_bytes(b"")
    (tmp_path / "none" / "notes.txt").write_text("no image")
    refused("none", images, "has no image and no recording; use .*png")
    media_helpers.write_images(tmp_path / "both", 1)
    media_helpers.write_recordings(tmp_path / "both", 1)
    refused("both", images, "holds images .* and recordings")
    for name in ("bad.png", "bad.wav", "slow.wav"):
        (tmp_path / name.replace(".", "-")).mkdir()
    (tmp_path / "bad-png" / "a.png").write_bytes(b"no image")
    refused("bad-png", images, r"a.png: cannot be read as an image")
    (tmp_path / "bad-wav" / "a.wav").write_bytes(b"no sound")
    refused("bad-wav", sounds, r"a.wav: cannot be read as a recording")
    media_helpers.write_wave(tmp_path / "slow-wav" / "a.wav", np.zeros(900), rate=8000)
    refused("slow-wav", sounds, "has 8000 samples a second, and the checkpoint takes 16000; resam")
    (tmp_path / "table.csv").mkdir()
    refused("table.csv", images, "not a kind of data this version reads")


def test_images_of_one_folder_have_one_shape(media_model: Models, tmp_path: Path) -> None:
    class Keeping:
        """A processor that keeps every image's size."""

        def __call__(self, image: Image.Image, **_: Any) -> dict[str, torch.Tensor]:
            return {"pixel_values": torch.zeros(1, 3, *image.size)}

    class Own(Processors):
        def images(self) -> Any:
            return Keeping()

    media_helpers.write_images(tmp_path / "images", 2)
    own = Own(takes=frozenset({"pixel_values"}))
    with pytest.raises(InputError, match=r"png: the processor .* bring the images to one size"):
        drawn(tmp_path / "images", own, num_sequences=2)


@pytest.mark.parametrize(
    ("package", "extra", "name"),
    [
        ("pyarrow", "parquet", "a.parquet"),
        ("PIL", "images", "images"),
        ("soundfile", "audio", "sounds"),
    ],
)
def test_packages_that_are_missing_are_named(
    package: str,
    extra: str,
    name: str,
    media_model: Models,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write_records(tmp_path / "a.parquet", "text", ["w1"])
    media_helpers.write_images(tmp_path / "images", 1)
    (tmp_path / "sounds").mkdir()
    (tmp_path / "sounds" / "a.flac").write_bytes(b"fLaC")
    own = processors_of(media_model("whisper" if extra == "audio" else "vit"))
    own.images() if extra == "images" else None
    monkeypatch.setitem(__import__("sys").modules, package, None)
    with pytest.raises(InputError, match=rf"needed to read .*'lrc-cli\[{extra}\]'"):
        drawn(tmp_path / name, own, num_sequences=1)


def test_the_hash_of_a_folder_is_that_of_its_files_and_names(tmp_path: Path) -> None:
    folder = media_helpers.write_images(tmp_path / "images", 3)
    hashes = [hash_path(folder)]
    (folder / ".thumbnails").write_bytes(b"hidden")
    assert hash_path(folder) == hashes[0] == data_sha256(folder)
    (folder / "odd" / "000.png").rename(folder / "odd" / "z.png")
    hashes.append(hash_path(folder))
    (folder / "odd" / "z.txt").write_text("a caption")
    hashes.append(hash_path(folder))
    assert len(set(hashes)) == 3 and hashes[-1] == data_sha256(folder)
