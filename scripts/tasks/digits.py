"""An MLP and a CNN trained on MNIST's digits: right answers, each digit held out once."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import mnist
import torch
from safetensors.torch import save_file
from torch import nn

from tasks.common import (
    DENSE,
    OURS,
    Check,
    Results,
    Scores,
    Setting,
    Task,
    beats,
    compare,
    needed,
    sparing,
)

FOLDS = 5
DROP = 0.005
"""The largest loss of accuracy that the target allows."""
ACCURACY = "accuracy"


def run(folder: Path, size: float, *, name: str, epochs: int, last: str) -> Results:
    """FOLDS times: train and calibrate on all other digits, score on 1000; means over the folds."""
    needed(mnist.DIGITS)
    images, labels = mnist.read_digits()
    parts = torch.arange(len(images)).chunk(FOLDS)
    results = Results()
    for fold, held_out in enumerate(parts):
        trained = torch.cat([part for i, part in enumerate(parts) if i != fold])
        place = folder / str(fold)
        place.mkdir(exist_ok=True)
        torch.manual_seed(fold)
        dense: nn.Module = getattr(mnist, name)()
        mnist.train(dense, images[trained], labels[trained], epochs)
        model, calibration = place / f"{name}.safetensors", place / "calibration.safetensors"
        save_file(dense.state_dict(), model)
        save_file({"x": images[trained]}, calibration)

        def score(module: nn.Module, held_out: torch.Tensor = held_out) -> Scores:
            with torch.no_grad():
                found = mnist.accuracy(module, images[held_out], labels[held_out])
            return {ACCURACY: found}

        overrides = [f"calibration.path={calibration}", f"calibration.num_sequences={len(trained)}"]
        setting = Setting(
            config="plain.yaml",
            overrides=overrides,
            score=score,
            model=model,
            factory=f"mnist:{name}",
        )
        own = compare(setting, place, size, sparing(last))
        for row, scores in own.scores.items():
            mean = results.scores.setdefault(row, {ACCURACY: 0.0})
            mean[ACCURACY] += scores[ACCURACY] / FOLDS
        results.reports = own.reports
    results.notes.append(f"{FOLDS} networks; each of the {len(images)} digits is held out once.")
    return results


def checks(scores: Mapping[str, Scores], *, has_target: bool) -> list[Check]:
    """The targets; the drop is one for the MLP only."""
    drop = scores[DENSE][ACCURACY] - scores[OURS][ACCURACY]
    own = [Check(f"accuracy drops by {drop:.4f} <= {DROP}", drop <= DROP)]
    return [*(own if has_target else ()), *beats(scores, ACCURACY, higher=True)]


MLP = Task(
    title="MNIST, an MLP",
    size=0.2,
    run=partial(run, name="mlp", epochs=15, last="4"),
    checks=partial(checks, has_target=True),
)
CNN = Task(
    title="MNIST, a CNN",
    size=0.2,
    run=partial(run, name="cnn", epochs=5, last="12"),
    checks=partial(checks, has_target=False),
)
