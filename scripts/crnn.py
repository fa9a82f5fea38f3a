"""EasyOCR's recogniser of English lines (english_g2): its architecture, its checkpoint, its use.

`crnn:english` is the factory that configs name.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

HEIGHT = 64
"""Pixels of a line."""
BLANK = 0
"""The class of CTC that stands for no character; the others are CHARACTERS, from 1 on."""
CHARACTERS = (
    "0123456789!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~ €"
    "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
)


class Features(nn.Module):
    """Seven convolutions: (lines, 1, 64, width) -> (lines, 256, 3, about width / 4)."""

    def __init__(self) -> None:
        super().__init__()
        self.ConvNet = nn.Sequential(
            *(nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(64, 128, 3, padding=1), nn.ReLU()),
            *(nn.Conv2d(128, 128, 3, padding=1), nn.ReLU(), nn.MaxPool2d((2, 1))),
            *(nn.Conv2d(128, 256, 3, padding=1, bias=False), nn.BatchNorm2d(256), nn.ReLU()),
            *(nn.Conv2d(256, 256, 3, padding=1, bias=False), nn.BatchNorm2d(256), nn.ReLU()),
            *(nn.MaxPool2d((2, 1)), nn.Conv2d(256, 256, 2), nn.ReLU()),
        )

    def forward(self, images: Tensor) -> Tensor:
        """The features of every place."""
        return self.ConvNet(images)


class Context(nn.Module):
    """A bidirectional LSTM and a linear layer: (lines, places, 256) -> the same."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(256, 256, bidirectional=True, batch_first=True)
        self.linear = nn.Linear(512, 256)

    def forward(self, x: Tensor) -> Tensor:
        """The features of each place, given the other places."""
        return self.linear(self.rnn(x)[0])


class Crnn(nn.Module):
    """Images of lines (lines, 1, 64, width) in -1..1 -> logits (lines, places, classes).

    The names of its modules are the checkpoint's.
    """

    def __init__(self) -> None:
        super().__init__()
        self.FeatureExtraction = Features()
        self.SequenceModeling = nn.Sequential(Context(), Context())
        self.Prediction = nn.Linear(256, 1 + len(CHARACTERS))

    def forward(self, images: Tensor) -> Tensor:
        """The logits of every place along the line."""
        places = self.FeatureExtraction(images).mean(dim=2).mT
        return self.Prediction(self.SequenceModeling(places))


def english() -> nn.Module:
    """The network without weights."""
    return Crnn()


def convert(file: Path, target: Path) -> None:
    """The state dict of EasyOCR's `.pth` as a safetensors file that fits `english()`."""
    found = torch.load(file, map_location="cpu", weights_only=True)
    state = {key.removeprefix("module."): x.contiguous() for key, x in found.items()}
    english().load_state_dict(state, strict=True)
    save_file(state, target)


def read_lines(logits: Tensor) -> list[str]:
    """The texts that the likeliest class of every place spells, as CTC reads them."""
    return [_spelt(line.tolist()) for line in logits.argmax(dim=-1)]


def _spelt(classes: Sequence[int]) -> str:
    before = [BLANK, *classes[:-1]]
    new = (now for now, last in zip(classes, before, strict=True) if now not in (BLANK, last))
    return "".join(CHARACTERS[number - 1] for number in new)
