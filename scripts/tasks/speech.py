"""whisper-tiny.en on synthetic speech: word error rate on other sentences by other voices."""

import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import espeak
import numpy as np
import torch
from torch import nn
from transformers import AutoFeatureExtractor, AutoTokenizer

from tasks.common import (
    DATA,
    DENSE,
    MODELS,
    OURS,
    ROOT,
    Check,
    ErrorRate,
    Results,
    Scores,
    Setting,
    Task,
    beats,
    compare,
    needed,
    sentences,
    split_articles,
)

SHARE = 0.7
"""The share of Wikipedia's text, whole articles, whose sentences are calibrated on."""
RATE = 16000
RECORDINGS, SECONDS = 128, 26
"""Recordings to calibrate on have several sentences each, together shorter than SECONDS."""
VOICES = {"calibration": ("en-us+m1", "en-us+f1"), "test": ("en-us+m3", "en-us+f2")}
RISE = 0.03
RATE_NAME = "word error rate"


def run(folder: Path, size: float, num_sentences: int | None = None) -> Results:
    """Compare the rows at one size; `num_sentences` as in `prepare`."""
    setting, rate = prepare(folder, num_sentences)
    results = compare(setting, folder, size)
    results.notes.append(
        f"{len(rate.wanted)} sentences of {rate.total} words; standard error of our rise"
        f" {rate.standard_error():.4f}."
    )
    return results


def prepare(folder: Path, num_sentences: int | None = None) -> tuple[Setting, ErrorRate]:
    """Recordings of Wikipedia's first articles to calibrate on, of its last ones to score on.

    Args:
        folder: where the recordings to calibrate on are written.
        num_sentences: to score on, evenly spread; None: all.
    """
    model = needed(MODELS / "whisper-tiny.en")
    needed(espeak.FOLDER)
    first, last = split_articles(needed(DATA / "wikipedia.txt").read_text("utf-8"), SHARE)
    calibration = folder / "calibration"
    write_recordings(calibration, spoken_sentences(first))
    found = spread(spoken_sentences(last), num_sentences)
    voices = VOICES["test"]
    sounds = [espeak.speak(x, voices[i % len(voices)], RATE) for i, x in enumerate(found)]
    extractor, tokenizer = (
        kind.from_pretrained(model) for kind in (AutoFeatureExtractor, AutoTokenizer)
    )
    features = extractor(sounds, sampling_rate=RATE, return_tensors="pt").input_features
    rate = ErrorRate([words(text) for text in found])

    @torch.no_grad()
    def score(module: nn.Module) -> Scores:
        texts: list[str] = []
        for batch in features.split(32):
            tokens = module.generate(input_features=batch, max_new_tokens=64, do_sample=False)
            texts += tokenizer.batch_decode(tokens, skip_special_tokens=True)
        return {RATE_NAME: rate.of(list(map(words, texts)))}

    overrides = [
        f"calibration.path={calibration.relative_to(ROOT)}",
        "calibration.part=null",
        f"calibration.num_sequences={RECORDINGS}",
    ]
    setting = Setting(config="speech.yaml", overrides=overrides, score=score, model=model)
    return setting, rate


def spoken_sentences(articles: Sequence[str]) -> list[str]:
    """Sentences that can only be written in one way: no names, no numbers, no signs."""
    paragraphs = (line for article in articles for line in article.split("\n"))
    each = (text for paragraph in paragraphs for text in sentences(paragraph))
    return [x for x in each if re.fullmatch(r"[A-Z][a-z']*(,? [a-z']+){7,15}\.", x)]


def spread(items: Sequence[str], count: int | None) -> Sequence[str]:
    """`count` of the items, evenly spread; None, or more than there are: all."""
    count = min(count or len(items), len(items))
    return [items[i * len(items) // count] for i in range(count)]


def write_recordings(folder: Path, texts: Sequence[str]) -> None:
    """RECORDINGS files of several sentences each, with their texts beside them."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for i, (sound, text) in enumerate(_recordings(texts)):
        espeak.write_wave(folder / f"{i:03}.wav", sound, RATE)
        (folder / f"{i:03}.txt").write_text(text + "\n", encoding="utf-8")


def _recordings(texts: Sequence[str]) -> Iterator[tuple[np.ndarray, str]]:
    voices = VOICES["calibration"]
    waiting = iter(texts)
    for i in range(RECORDINGS):
        sounds: list[np.ndarray] = []
        spoken: list[str] = []
        # A sentence that is too long for the rest of the time is left out.
        while sum(map(len, sounds)) < (SECONDS - 8) * RATE:
            text = next(waiting)
            sound = espeak.speak(text, voices[i % len(voices)], RATE)
            if sum(map(len, sounds)) + len(sound) <= SECONDS * RATE:
                sounds.append(sound)
                spoken.append(text)
        yield np.concatenate(sounds), " ".join(spoken)


def words(text: str) -> list[str]:
    """Lower-case words without signs."""
    return re.findall(r"[a-z0-9']+", text.lower())


def checks(scores: Mapping[str, Scores]) -> list[Check]:
    """The targets."""
    rise = scores[OURS][RATE_NAME] - scores[DENSE][RATE_NAME]
    own = Check(f"{RATE_NAME} rises by {rise:.4f} <= {RISE}", rise <= RISE)
    return [own, *beats(scores, RATE_NAME)]


TASK = Task(title="whisper-tiny.en, speech", size=0.7, run=run, checks=checks)
