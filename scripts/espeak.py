"""Synthetic speech by eSpeak NG, whose library and data scripts/fetch_demo.py brings."""

import ctypes
import wave
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

FOLDER = Path(__file__).resolve().parents[1] / ".cache" / "tools" / "espeak"
SYNCHRONOUS, UTF8 = 2, 1
"""Numbers of espeak-ng's speak_lib.h: how samples come back, and what a text is."""
SEED = 0
Receive = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p
)


@cache
def _library() -> tuple[Any, int]:
    """The library, made ready, and how many samples a second it gives."""
    try:
        library = ctypes.CDLL(str(FOLDER / "libespeak-ng.so"))
    except OSError as error:
        raise RuntimeError(f"eSpeak NG cannot be loaded ({error}); use Linux on x86-64") from error
    rate = library.espeak_Initialize(SYNCHRONOUS, 0, str(FOLDER).encode(), 0)
    if rate <= 0:
        raise RuntimeError(f"eSpeak NG finds no data in {FOLDER}; run scripts/fetch_demo.py espeak")
    return library, rate


def speak(text: str, voice: str, rate: int) -> np.ndarray:
    """A text spoken by a voice such as "en-us+m1": samples (time,) in [-1, 1], `rate` a second."""
    library, own_rate = _library()
    received = bytearray()

    @Receive
    def receive(samples: Any, count: int, _: Any) -> int:
        if samples and count > 0:
            received.extend(ctypes.string_at(samples, 2 * count))
        return 0

    if library.espeak_SetVoiceByName(voice.encode()) != 0:
        raise RuntimeError(f"eSpeak NG has no voice {voice}; it knows those in {FOLDER}")
    library.espeak_SetSynthCallback(receive)
    # Else every process hears another voice: eSpeak NG varies it at random.
    library.espeak_ng_SetRandSeed(ctypes.c_long(SEED))
    data = text.encode() + b"\0"
    library.espeak_Synth(data, len(data), 0, 0, 0, UTF8, None, None)
    library.espeak_Synchronize()
    return resample(np.frombuffer(bytes(received), "<i2") / 2.0**15, own_rate, rate)


def resample(samples: np.ndarray, rate: int, new_rate: int) -> np.ndarray:
    """The same sound at a lower rate: frequencies above its half are cut off."""
    count = round(len(samples) * new_rate / rate)
    spectrum = np.fft.rfft(samples)[: count // 2 + 1]
    return np.fft.irfft(spectrum, count) * count / len(samples)


def write_wave(path: Path, samples: np.ndarray, rate: int) -> None:
    """Write a .wav file of 16 bits."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((samples.clip(-1, 1) * (2**15 - 1)).astype("<i2").tobytes())
