"""Folders of images and recordings, and encoder-decoders, get their inputs from processors."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import media_helpers
import numpy as np
import pico
import pytest
import soundfile
import torch
from data_helpers import drawn, write_records
from pico import Models
from PIL import Image
from safetensors.torch import save_file

from lrc_cli.checkpoint.source import open_source
from lrc_cli.data.folders import read_audio
from lrc_cli.data.processors import Processors, open_processors
from lrc_cli.errors import InputError
from lrc_cli.network.loading import load
from lrc_cli.runtime.files import hash_path
from lrc_cli.verify.files.manifest import data_sha256


@pytest.fixture(scope="module")
def media_model(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """Returns the directory of a model of media_helpers."""
    root = tmp_path_factory.mktemp("media-models")
    return lambda name: (
        root / name if (root / name).exists() else media_helpers.write_model(root / name, name)
    )


def processors_of(path: Path) -> Processors:
    return open_processors(open_source(path), load(path))


# ---------------------------------------------------------------- encoder-decoders


def test_a_decoder_goes_on_where_the_encoder_ends(media_model: Models, text: Path) -> None:
    own = processors_of(media_model("t5"))
    inputs = drawn(text, own, sequence_length=17).inputs
    assert inputs["input_ids"].shape == (6, 9) and inputs["decoder_input_ids"].shape == (6, 8)
    words = text.read_text()
    for ids, decoded in zip(*inputs.values(), strict=True):
        assert ids[-1] == 3 and decoded[0] == 0, "the end of a text, and the decoder's start"
        both = own.tokenizer.decode([*ids[:-1].tolist(), *decoded[1:].tolist()])
        assert both in words
    body = processors_of(media_model("t5-body"))
    inputs = drawn(text, body, sequence_length=17).inputs
    assert torch.equal(inputs["input_ids"][:, :-1], inputs["decoder_input_ids"][:, 1:])


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
    # So few recordings make some Gram matrices nearly singular, and the plain optimum on the
    # compressed network's inputs is then a matter of rounding.
    changes |= {"compression.sequential": False}
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


# ---------------------------------------------------------------- files that say nothing


def shorter(write: Callable[[Path], None], share: float = 0.5) -> Callable[[Path], None]:
    def cut(file: Path) -> None:
        write(file)
        data = file.read_bytes()
        file.write_bytes(data[: int(share * len(data))])

    return cut


def wave_of(sound: np.ndarray) -> Callable[[Path], None]:
    return lambda file: media_helpers.write_wave(file, sound)


def sound_of(sound: np.ndarray, subtype: str | None = None) -> Callable[[Path], None]:
    return lambda file: soundfile.write(file, sound, media_helpers.RATE, subtype=subtype)


def image_of(pixels: np.ndarray) -> Callable[[Path], None]:
    return lambda file: Image.fromarray(pixels).save(file)


TONE = np.sin(np.arange(8000) / 9)
NOISE = np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8)
DEEP = np.arange(600, dtype=np.uint16).reshape(20, 30)
INFINITE = np.where(np.arange(8000) == 77, np.inf, TONE)
NAN = np.where(np.arange(8000) == 77, np.nan, TONE)
SAYS_NOTHING: dict[str, tuple[str, str, Callable[[Path], None], str]] = {
    "no sample": ("wav2vec2", "a.wav", wave_of(TONE[:0]), "the recording is empty"),
    "no sample, flac": ("wav2vec2", "a.flac", sound_of(TONE[:0]), "empty|cannot be read"),
    "a header alone": ("wav2vec2", "a.wav", shorter(wave_of(TONE), 0.00275), "cut short: 0 of"),
    "cut short": ("wav2vec2", "a.wav", shorter(wave_of(TONE)), "is cut short: 79.. of the 16000"),
    "cut short, flac": ("wav2vec2", "a.flac", shorter(sound_of(TONE)), "cut short|cannot be read"),
    "cut short, floats": (
        "wav2vec2", "a.wav", shorter(sound_of(TONE, "FLOAT")), "cut short",
    ),
    "no bytes": ("wav2vec2", "a.wav", lambda file: file.write_bytes(b""), "cannot be read"),
    "no recording": ("wav2vec2", "a.ogg", lambda file: file.write_text("w1"), "cannot be read"),
    "silence": ("wav2vec2", "a.wav", wave_of(0 * TONE), "the recording is silent"),
    "silence, stereo": ("wav2vec2", "a.wav", wave_of(np.zeros((800, 2))), "recording is silent"),
    "one value": ("wav2vec2", "a.wav", wave_of(0 * TONE + 0.3), "the recording is silent"),
    "NaN": ("wav2vec2", "a.wav", sound_of(NAN, "FLOAT"), "holds NaN or infinity"),
    "infinity": ("wav2vec2", "a.wav", sound_of(INFINITE, "FLOAT"), "NaN or inf"),
    "one pixel": ("vit", "a.png", image_of(NOISE[:1, :1]), "has 1 x 1 pixels"),
    "a line": ("vit", "a.png", image_of(NOISE[:, :1]), "has 1 x 40 pixels"),
    "a PNG cut short": ("vit", "a.png", shorter(image_of(NOISE)), "cannot be read as an image"),
    "a JPEG cut short": ("vit", "a.jpg", shorter(image_of(NOISE)), "cannot be read as an image"),
    "a TIFF cut short": ("vit", "a.tif", shorter(image_of(NOISE)), "cannot be read as an image"),
    "no bytes, image": ("vit", "a.png", lambda file: file.write_bytes(b""), "cannot be read"),
    "no image": ("vit", "a.webp", lambda file: file.write_text("w1"), "cannot be read"),
    "16 bits": ("vit", "a.png", image_of(DEEP), "pixels lie between 0 and 599, .* 8 bits"),
    "floats": ("vit", "a.tif", image_of(DEEP.astype(np.float32)), "lie between 0 and 599"),
    "below zero": ("vit", "a.tif", image_of(-1.0 * DEEP.astype(np.float32)), "lie between -599"),
}  # fmt: skip


@pytest.mark.parametrize("kind", SAYS_NOTHING)
def test_a_file_that_says_nothing_is_named(kind: str, media_model: Models, tmp_path: Path) -> None:
    name, file, write, cause = SAYS_NOTHING[kind]
    write(tmp_path / file)
    with pytest.raises(InputError, match=cause) as caught:
        drawn(tmp_path, processors_of(media_model(name)), num_sequences=1)
    assert file in str(caught.value) and caught.value.remedy


def test_a_recording_written_into_a_pipe_has_no_stated_length(tmp_path: Path) -> None:
    file = tmp_path / "a.wav"
    media_helpers.write_wave(file, TONE)
    data = bytearray(file.read_bytes())
    data[40:44] = (0xFFFFFFFF).to_bytes(4, "little")
    file.write_bytes(data)
    assert len(read_audio(file)[0]) == 8000


def test_links_to_folders_are_named(media_model: Models, tmp_path: Path) -> None:
    media_helpers.write_images(tmp_path / "images", 6)
    (tmp_path / "images/deep").mkdir()
    media_helpers.write_images(tmp_path / "elsewhere", 3)
    for link in ("more", "deep/up", ".hidden"):
        (tmp_path / "images" / link).symlink_to(tmp_path / "elsewhere")
    found = drawn(tmp_path / "images", processors_of(media_model("vit")), num_sequences=6)
    assert found.population == 6 and found.findings.linked_folders == ["deep/up", "more"]


def test_a_file_that_is_there_twice_is_counted(media_model: Models, tmp_path: Path) -> None:
    folder = media_helpers.write_images(tmp_path / "images", 6)
    (folder / "odd/copy.png").write_bytes((folder / "odd/000.png").read_bytes())
    found = drawn(folder, processors_of(media_model("vit")), num_sequences=7)
    assert found.repeated == 1
