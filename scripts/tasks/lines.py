"""EasyOCR's recogniser on rendered lines: character error rate on other texts.

Convolutions, linear layers and the LSTMs' matrices, 55 % of the weights, share one budget.
"""

import random
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import crnn
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from safetensors.torch import save_file
from torch import Tensor, nn

from tasks.common import (
    DATA,
    DENSE,
    MODELS,
    OURS,
    Check,
    ErrorRate,
    Results,
    Scores,
    Setting,
    Task,
    beats,
    compare,
    needed,
    split_articles,
)

SHARE = 0.7
"""The share of Wikipedia's text, whole articles, whose lines are calibrated on."""
CALIBRATED, TESTED = 128, 2500
CHARACTERS = 24
"""The largest number of characters in a line."""
WIDTH = 640
LOSS = "output"
"""The loss was chosen over `sampled` on 700 other lines of the first articles. Most places along a
line are certainly blank, and labels drawn from a certain network say nothing about its errors."""
RISE = 0.01
RATE_NAME = "character error rate"


def run(folder: Path, size: float) -> Results:
    """Lines of Wikipedia's first articles to calibrate on, of its last ones to score on."""
    model = needed(MODELS / "crnn.safetensors")
    first, last = split_articles(needed(DATA / "wikipedia.txt").read_text("utf-8"), SHARE)
    calibration = folder / "calibration.safetensors"
    save_file({"images": render(cut_lines(first, CALIBRATED), seed=0)}, calibration)
    wanted = cut_lines(last, TESTED)
    images, rate = render(wanted, seed=1), ErrorRate(wanted)

    @torch.no_grad()
    def score(module: nn.Module) -> Scores:
        found = [text for x in images.split(20) for text in crnn.read_lines(module(x))]
        return {RATE_NAME: rate.of(found)}

    overrides = [
        f"calibration.path={calibration}",
        f"calibration.num_sequences={CALIBRATED}",
        f"compression.loss={LOSS}",
    ]
    setting = Setting(
        config="plain.yaml", overrides=overrides, score=score, model=model, factory="crnn:english"
    )
    results = compare(setting, folder, size)
    results.notes.append(
        f"{TESTED} lines of {rate.total} characters; standard error of our rise"
        f" {rate.standard_error():.4f}."
    )
    return results


def cut_lines(articles: Sequence[str], count: int) -> list[str]:
    """`count` lines of whole words that the recogniser has characters for, evenly spread."""
    lines: list[str] = []
    line = ""
    for word in " ".join(articles).split():
        if not set(word) <= set(crnn.CHARACTERS):
            line = ""
        elif len(line) + 1 + len(word) <= CHARACTERS:
            line = f"{line} {word}".strip()
        else:
            lines.append(line)
            line = word if len(word) <= CHARACTERS else ""
    long = [x for x in lines if len(x) > CHARACTERS // 2 and re.search("[a-z]", x)]
    return [long[i * len(long) // count] for i in range(count)]


def render(texts: Sequence[str], seed: int) -> Tensor:
    """Images (lines, 1, 64, WIDTH) in -1..1 of several sizes, greys, blurs and noises."""
    chance, noise = random.Random(seed), np.random.default_rng(seed)
    return torch.stack([_image(text, chance, noise) for text in texts])


def _image(text: str, chance: random.Random, noise: np.random.Generator) -> Tensor:
    paper, ink = chance.randint(170, 255), chance.randint(0, 90)
    image = Image.new("L", (WIDTH, crnn.HEIGHT), paper)
    font = ImageFont.load_default(chance.uniform(28, 42))
    place = chance.uniform(4, 20), crnn.HEIGHT / 2 + chance.uniform(-3, 3)
    ImageDraw.Draw(image).text(place, text, fill=ink, font=font, anchor="lm")
    image = image.filter(ImageFilter.GaussianBlur(chance.uniform(0, 1.2)))
    values = np.asarray(image, np.float32)
    values = values + noise.normal(0, chance.uniform(0, 12), values.shape).astype(np.float32)
    return torch.from_numpy(values.clip(0, 255) / 127.5 - 1)[None]


def checks(scores: Mapping[str, Scores]) -> list[Check]:
    """The targets."""
    rise = scores[OURS][RATE_NAME] - scores[DENSE][RATE_NAME]
    own = Check(f"{RATE_NAME} rises by {rise:.4f} <= {RISE}", rise <= RISE)
    return [own, *beats(scores, RATE_NAME)]


TASK = Task(title="EasyOCR's recogniser of lines", size=0.5, run=run, checks=checks)
