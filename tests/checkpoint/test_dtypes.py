"""These tests compress a checkpoint of every floating dtype: what is stored, and what is said."""

from collections import defaultdict
from pathlib import Path
from typing import Any

import pico
import pytest
import torch
from pico import Models
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from lrc_cli.config import load_config
from lrc_cli.job.plan import make_plan

STORED = {"llama": torch.bfloat16, "llama-fp16": torch.float16, "llama-long": torch.float32}
"""One architecture, saved in three dtypes, by the pico model's name."""


class Made:
    """A finished output, its report, its original, and the dtype of both on disk."""

    def __init__(self, original: Path, output: Path, report: Any, dtype: torch.dtype) -> None:
        self.original, self.output, self.report, self.dtype = original, output, report, dtype


@pytest.fixture(scope="module", params=list(STORED))
def made(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    checkpoint: Models,
    text: Path,
) -> Made:
    changes = {"model.path": str(checkpoint(request.param)), "calibration.path": str(text)}
    changes["compression.method"] = "frobenius"  # its optimum minimises the output error
    output, report = pico.compressed(tmp_path_factory.mktemp(request.param), changes)
    return Made(checkpoint(request.param), output, report, STORED[request.param])


def test_everything_is_stored_in_the_checkpoints_dtype(made: Made) -> None:
    state = pico.read_state(made.output)
    assert pico.factorised_keys(state)
    numbers = {key: tensor for key, tensor in state.items() if not key.endswith(".perm")}
    assert {tensor.dtype for tensor in numbers.values()} == {made.dtype}
    assert all(torch.isfinite(tensor).all() for tensor in numbers.values())
    named = {layer["dtype"] for layer in made.report["layers"]}
    assert named == {str(made.dtype).removeprefix("torch.")}


def test_it_loads_in_that_dtype_and_computes(made: Made) -> None:
    model = AutoModelForCausalLM.from_pretrained(made.output).eval()
    assert model.dtype == made.dtype
    with torch.no_grad():
        logits = model(input_ids=torch.arange(5, 37)[None]).logits
    assert logits.dtype == made.dtype and bool(torch.isfinite(logits).all())
    assert logits.std() > 0


def squared_outputs(
    made: Made, weights: dict[str, dict[str, Tensor]]
) -> dict[str, dict[str, float]]:
    """Returns each matrix's squared outputs on the dense network's inputs, by layer and name."""
    plan = make_plan(load_config(made.output / "lrc.yaml"), force=True)
    model = AutoModelForCausalLM.from_pretrained(made.original, dtype=torch.float32).eval()
    sums: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))

    def watch(layer: str) -> Any:
        def add(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            rows = inputs[0].flatten(0, -2).double()
            for name, matrix in weights[layer].items():
                sums[layer][name] += (rows @ matrix.T).square().sum().item()

        return add

    for layer in weights:
        model.get_submodule(layer).register_forward_pre_hook(watch(layer))
    with torch.no_grad():
        model(**plan.sequences["calibration"].inputs)
    return sums


def test_reported_errors_are_those_of_the_rounded_factors(made: Made) -> None:
    before, after = (pico.read_state(path) for path in (made.original, made.output))
    stored = pico.rebuilt(after)
    weights = {}
    for layer in pico.factorised_keys(after):
        weight = before[f"{layer}.weight"].double()
        weights[layer] = {"dense": weight, "off": weight - stored[f"{layer}.weight"].double()}
    sums = squared_outputs(made, weights)
    factorised = [layer for layer in made.report["layers"] if layer["storage"] != "dense"]
    reported = {layer["name"]: layer["errors"]["output"] for layer in factorised}
    errors = {layer: (sums[layer]["off"] / sums[layer]["dense"]) ** 0.5 for layer in weights}
    for layer, error in errors.items():
        assert reported[layer]["stored"] == pytest.approx(error, rel=1.5e-6)
    # The factors reach the optimum only before they are rounded to the stored dtype.
    if made.dtype != torch.float32:
        excess = [error / reported[layer]["optimum"] - 1 for layer, error in errors.items()]
        assert max(excess) > 2e-6


def test_verify_holds_against_the_original(made: Made) -> None:
    ended = pico.call("verify", made.output, "--against", made.original, "-q")
    assert ended.code == 0, ended.out + ended.err
