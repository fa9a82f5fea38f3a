"""Folders of images or recordings are read here: a sequence is a file.

The checkpoint's processor prepares the file. A text beside a file (dog.txt for dog.png) is its
caption or transcript, for networks that take a text.
"""

import os
import warnings
import wave
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lrc_cli.data.decoder import INPUT, MASK
from lrc_cli.data.kinds import NO_FINDINGS, Batch, Findings
from lrc_cli.data.processors import Processors
from lrc_cli.data.records import read_text
from lrc_cli.data.special_tokens import token_ids
from lrc_cli.errors import InputError
from lrc_cli.reading import check_file_name, file_size, open_regular, walk
from lrc_cli.runtime.strangers import blaming_input
from lrc_cli.text import named

IMAGES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp"})
AUDIO = frozenset({".wav", ".flac", ".ogg", ".mp3"})

SUFFIXES = IMAGES | AUDIO | {".txt"}

DECODERS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")
"""The kinds of images that are decoded, whatever a file is called. Pillow runs other programs on
some kinds."""
MOST_PIXELS = 89_478_485
"""The most pixels of an image, from which on Pillow speaks of a bomb."""
MOST_SAMPLES = 1 << 28
"""The most samples of a recording, of all channels together: four hours of 16,000 a second."""
MOST_OTHERS, OTHERS_TIMES = 100_000, 10
"""A folder has more files of other kinds than the first number, and than the second number times
its images and recordings, only if it is the wrong one."""
UNKNOWN_LENGTH = 0x7FFF0000
"""From so many bytes on, a header states that nobody knows how many there are."""
REPLACE = "remove or replace it"
FIT = "write texts that the tokenizer takes, or restore the tokenizer's files"

Prepare = Callable[[Sequence[Path]], Batch]


@dataclass(frozen=True, kw_only=True)
class Files:
    """The images or recordings of a folder, sorted by name; a file is decoded when it is taken."""

    paths: list[Path]
    prepare: Prepare
    processors: Processors
    findings: Findings = NO_FINDINGS

    @property
    def length(self) -> int:
        """The number of files."""
        return len(self.paths)

    @property
    def stretches(self) -> Sequence[tuple[int, int]]:
        """One: any files may be drawn."""
        return [(0, self.length)]

    @property
    def one_in(self) -> None:
        """None: all files are there."""
        return None

    def width(self, sequence_length: int) -> int:
        """One: a sequence is a file of any length."""
        return 1

    def take(self, starts: Sequence[int], width: int) -> Batch:
        """The network's inputs, from the files at `starts` and from the texts beside them."""
        paths = [self.paths[start] for start in starts]
        return _taken(self.prepare(paths), self.processors) | _texts(paths, self.processors)


def read_folder(path: Path, processors: Processors) -> Files:
    """The images or the recordings in a folder and the folders in it.

    Raises:
        InputError: there are neither, or both; or the checkpoint has no processor for them.
    """
    visible = list(visible_files(path))
    findings = Findings(linked_folders=_linked_folders(path))
    for file in visible:
        check_file_name(file)
    images, audio = (
        sorted(file for file in visible if file.suffix.lower() in kind and not file.is_dir())
        for kind in (IMAGES, AUDIO)
    )
    for file in (*images, *audio):
        file_size(file)
    if images and audio:
        cause = f"{path}: holds images ({images[0].name}) and recordings ({audio[0].name})"
        raise InputError(cause, "give folders of one kind")
    if images:
        return Files(
            paths=images, prepare=_images(processors), processors=processors, findings=findings
        )
    if audio:
        return Files(
            paths=audio, prepare=_recordings(processors), processors=processors, findings=findings
        )
    known = ", ".join(sorted(IMAGES | AUDIO))
    raise InputError(f"{path}: the folder has no image and no recording", f"use {known}")


def visible_files(path: Path) -> Iterator[Path]:
    """Yields the files in a folder and below of which no part of the name begins with a dot.

    Raises:
        InputError: far more of them are of other kinds than images and recordings, or as `walk`.
    """
    kept = others = 0
    for folder, folders, names in walk(path):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            if name.startswith("."):
                continue
            is_kept = os.path.splitext(name)[1].lower() in SUFFIXES
            kept, others = kept + is_kept, others + (not is_kept)
            yield Path(folder, name)
        if others > MOST_OTHERS and others > OTHERS_TIMES * kept:
            cause = f"{path}: holds more than {MOST_OTHERS:,} files that are no data"
            raise InputError(cause, "give the folder that holds the images or the recordings alone")


def _linked_folders(path: Path) -> list[str]:
    """Returns the names of links to folders, in a folder and below, that `visible_files` passes."""
    linked = []
    for folder, folders, _ in walk(path):
        folders[:] = [name for name in folders if not name.startswith(".")]
        links = (Path(folder, name) for name in folders if Path(folder, name).is_symlink())
        linked += [str(link.relative_to(path)) for link in links]
    return sorted(linked)


def _taken(inputs: Batch, processors: Processors) -> Batch:
    """The inputs that the network takes. If it takes none, all: a later check names them."""
    return {name: x for name, x in inputs.items() if name in processors.takes} or inputs


# ---------------------------------------------------------------- images


def _images(processors: Processors) -> Prepare:
    processor = processors.images()

    def prepare(paths: Sequence[Path]) -> Batch:
        rows = [_tensors(path, processor, _open_image(path)) for path in paths]
        odd = _odd(rows)
        if odd is not None:
            shapes = [tuple(next(iter(row.values())).shape[1:]) for row in (rows[0], rows[odd])]
            cause = (
                f"{paths[odd]}: the processor gives it the shape {shapes[1]}, others {shapes[0]}"
            )
            raise InputError(cause, "bring the images to one size")
        return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}

    return prepare


def _open_image(path: Path) -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise InputError(
            f"{path}: Pillow is needed to read images", "pip install 'lrc-cli[images]'"
        ) from error
    try:
        with (
            warnings.catch_warnings(action="ignore", category=Image.DecompressionBombWarning),
            open_regular(path) as file,
            Image.open(file, formats=DECODERS) as image,
        ):
            _check_pixels(path, image)
            return image.convert("RGB")
    except InputError:
        raise
    except Image.DecompressionBombError as error:
        raise _too_many_pixels(path) from error
    # Decoders of damaged files raise many kinds of errors beside OSError.
    except Exception as error:
        cause = f"{path}: cannot be read as an image ({named(error)})"
        raise InputError(cause, REPLACE) from error


def _check_pixels(path: Path, image: Any) -> None:
    """Raises InputError for an image that shows nothing, or that 8 bits a colour cannot hold."""
    width, height = image.size
    if width * height > MOST_PIXELS:
        raise _too_many_pixels(path)
    if min(width, height) < 2:
        raise InputError(f"{path}: has {width} x {height} pixels", REPLACE)
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        lowest, highest = image.getextrema()
        if not (lowest >= 0 and highest <= 255):
            raise InputError(
                f"{path}: its pixels lie between {lowest:g} and {highest:g}, and images are read"
                " with 8 bits a colour",
                "scale it to 0 ... 255 and write it again, or give model inputs as .npz",
            )


def _too_many_pixels(path: Path) -> InputError:
    return InputError(f"{path}: has more than {MOST_PIXELS:,} pixels", "make it smaller")


# ---------------------------------------------------------------- recordings


def _recordings(processors: Processors) -> Prepare:
    extractor = processors.audio()
    rate = getattr(extractor, "sampling_rate", None)

    def prepare(paths: Sequence[Path]) -> Batch:
        sounds = []
        for path in paths:
            sound, own_rate = read_audio(path)
            if rate is not None and own_rate != rate:
                raise InputError(
                    f"{path}: has {own_rate} samples a second, and the checkpoint takes {rate}",
                    f"resample it, for instance with: ffmpeg -i {path.name} -ar {rate} new.wav",
                )
            sounds.append(_checked(path, sound))
        options = {} if rate is None else {"sampling_rate": rate}
        rows = [
            _tensors(path, extractor, sound, **options)
            for path, sound in zip(paths, sounds, strict=True)
        ]
        if _odd(rows) is None:
            return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
        return _tensors(paths[0].parent, extractor, sounds, padding=True, **options)

    return prepare


def read_audio(path: Path) -> tuple[np.ndarray, int]:
    """The samples (time,) as float32 in [-1, 1], channels averaged, and the samples per second.

    Raises:
        InputError: the file cannot be read, or needs soundfile, which is not installed.
    """
    if path.suffix.lower() == ".wav":
        _check_whole(path)
    plain = _read_wave(path) if path.suffix.lower() == ".wav" else None
    if plain is not None:
        return plain
    try:
        import soundfile
    except ImportError as error:
        raise InputError(
            f"{path}: soundfile is needed to read it", "pip install 'lrc-cli[audio]'"
        ) from error
    try:
        with open_regular(path), soundfile.SoundFile(path) as file:
            _check_length(path, file.frames * file.channels)
            samples, rate = file.read(dtype="float32", always_2d=True), file.samplerate
    except InputError:
        raise
    except (soundfile.LibsndfileError, OSError) as error:
        cause = f"{path}: cannot be read as a recording ({named(error)})"
        raise InputError(cause, REPLACE) from error
    return samples.mean(axis=1), int(rate)


def _check_length(path: Path, samples: int) -> None:
    if samples > MOST_SAMPLES:
        cause = f"{path}: has {samples:,} samples, and at most {MOST_SAMPLES:,} are read"
        raise InputError(cause, "cut the recording into shorter ones")


def _check_whole(path: Path) -> None:
    """Raises InputError if a .wav has fewer bytes of samples than its header states.

    A program that writes into a pipe states the largest number, because it knows none.
    """
    size = file_size(path)
    with open_regular(path) as file:
        if file.read(4) != b"RIFF":
            return
        file.seek(12)
        while len(chunk := file.read(8)) == 8:
            stated, there = int.from_bytes(chunk[4:], "little"), size - file.tell()
            if chunk[:4] == b"data" and there < stated < UNKNOWN_LENGTH:
                raise InputError(
                    f"{path}: is cut short: {max(there, 0)} of the {stated} bytes of samples that"
                    " its header states",
                    REPLACE,
                )
            file.seek(stated + stated % 2, 1)


def _checked(path: Path, samples: np.ndarray) -> np.ndarray:
    """Returns samples; raises InputError if there are none, or if they say nothing."""
    if not len(samples):
        raise InputError(f"{path}: the recording is empty", REPLACE)
    if not np.isfinite(samples).all():
        raise InputError(f"{path}: the recording holds NaN or infinity", REPLACE)
    if samples.min() == samples.max():
        raise InputError(f"{path}: the recording is silent: all samples are equal", REPLACE)
    return samples


def _read_wave(path: Path) -> tuple[np.ndarray, int] | None:
    """The samples of PCM of 8 to 32 bits, little-endian (8 bits are unsigned); None: not PCM."""
    try:
        with wave.open(str(path), "rb") as file:
            width, channels, rate = file.getsampwidth(), file.getnchannels(), file.getframerate()
            # Some headers state more than there is, because their writers did not know.
            frames = min(file.getnframes(), file_size(path) // (width * channels))
            _check_length(path, frames * channels)
            data = np.frombuffer(file.readframes(frames), dtype=np.uint8)
    except (wave.Error, EOFError):
        return None
    whole = data[: len(data) // (width * channels) * width * channels].reshape(-1, width)
    # Samples of any width are moved to the top of 32 bits.
    wide = np.zeros((len(whole), 4), dtype=np.uint8)
    wide[:, 4 - width :] = whole ^ 0x80 if width == 1 else whole
    samples = wide.view("<i4")[:, 0].astype(np.float32) / 2.0**31
    return samples.reshape(-1, channels).mean(axis=1), rate


# ---------------------------------------------------------------- texts beside them


def _texts(paths: Sequence[Path], processors: Processors) -> Batch:
    """The transcripts for a decoder, or the captions for a network that takes texts too."""
    decoder, tokenizer = processors.decoder, processors.tokenizer
    if decoder is not None:
        texts = _beside(paths) or [""] * len(paths)
        rows = [
            token_ids(tokenizer, text, path, special=True) if tokenizer else [decoder.pad]
            for path, text in zip(paths, texts, strict=True)
        ]
        ids, mask = decoder.padded(rows)
        return {INPUT: ids} if bool(mask.all()) else _taken({INPUT: ids, MASK: mask}, processors)
    captions = _beside(paths) if tokenizer and "input_ids" in processors.takes else None
    if captions is None:
        return {}
    with blaming_input(
        f"{paths[0].parent}: the tokenizer fails on the texts beside the files", FIT
    ):
        encoded = dict(tokenizer(captions, padding=True, truncation=True, return_tensors="pt"))
    return _taken(encoded, processors)


def _beside(paths: Sequence[Path]) -> list[str] | None:
    """The texts beside the files, or None where no file has a text.

    Raises:
        InputError: some files have a text and some have none.
    """
    texts = [path.with_suffix(".txt") for path in paths]
    missing = [text for text in texts if not text.is_file()]
    if len(missing) == len(texts):
        return None
    if missing:
        raise InputError(f"{missing[0]}: is missing, and others have a text", "write it")
    return [read_text(text).strip() for text in texts]


# ---------------------------------------------------------------- processors' outputs


def _tensors(path: Path, processor: Any, content: Any, **options: Any) -> Batch:
    with blaming_input(f"{path}: the checkpoint's processor fails on it", "replace the file"):
        found = processor(content, return_tensors="pt", **options)
        tensors = {name: x for name, x in found.items() if isinstance(x, torch.Tensor)}
    if not tensors:
        raise InputError(
            f"{path}: the checkpoint's processor makes no tensor of it",
            "restore the processor's files, or give model inputs as .npz",
        )
    for name, x in tensors.items():
        if x.is_floating_point() and not bool(torch.isfinite(x).all()):
            raise InputError(
                f"{path}: the checkpoint's processor makes NaN or infinity of it ({name})", REPLACE
            )
    return tensors


def _odd(rows: Sequence[Batch]) -> int | None:
    """The index of the first row with other shapes than row 0, or None."""
    shapes = [{name: x.shape for name, x in row.items()} for row in rows]
    return next((i for i, shape in enumerate(shapes) if shape != shapes[0]), None)
