"""Gram matrices are collected by a pass over the data, and by hooks and autograd to compare."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pico
import torch
from torch import Tensor, nn

from lrc_cli.checkpoint.source import open_source
from lrc_cli.config import Compression
from lrc_cli.data.draw import Batch, Sequences
from lrc_cli.data.padding import unpadded
from lrc_cli.execution.chain import WHOLE, Chain, Segment
from lrc_cli.execution.hooks import grouping
from lrc_cli.execution.losses import Loss, backward_scalars, drawing, prepare
from lrc_cli.execution.network import Network
from lrc_cli.execution.segments import find_segments
from lrc_cli.job.statistics import moments
from lrc_cli.job.statistics.sweep import Measurement, Sweep
from lrc_cli.job.work import PASSING, WorkDirectory
from lrc_cli.network.candidates.find import find_layers
from lrc_cli.network.layer import Layer
from lrc_cli.network.opening import open_module

SEED = 4
Moments = dict[str, Tensor]


def padded_tokens(rows: int = 6, length: int = 10) -> dict[str, Tensor]:
    """Returns token ids and a right-padded mask; the first row is whole."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, len(pico.VOCABULARY), (rows, length), generator=generator)
    lengths = torch.tensor([length, *range(3, 2 + rows)])
    mask = (torch.arange(length)[None] < lengths[:, None]).long()
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}


def sequences(inputs: dict[str, Tensor]) -> Sequences:
    return Sequences(name="test", inputs=inputs, population=0, sha256="")


def opened(
    path: Path, factory: str | None = None, exclude: tuple[str, ...] = ("lm_head",)
) -> tuple[nn.Module, list[Layer]]:
    source = open_source(path)
    module, source = open_module(source, factory=factory)
    return module, find_layers(module, source, Compression(size=0.5, exclude=exclude))[0]


def measured(
    network: Network,
    layers: list[Layer],
    inputs: dict[str, Tensor],
    loss: Loss | None,
    batch: int,
    *,
    whole: bool = False,
) -> tuple[Moments, Moments]:
    """Returns the Gram matrices of every layer's input and, given a loss, of its output gradients.

    Args:
        whole: whether the network runs as one segment.
    """
    given = sequences(inputs)
    graded = {layer.name for layer in layers} if loss else set()
    segmentation = find_segments(network, layers, graded, next(given.batches(1)))
    assert {x.name for s in segmentation.segments for x in s.layers} == {x.name for x in layers}
    chain, segments = segmentation.chain, segmentation.segments
    if whole:
        chain, segments = Chain(), [Segment(name=WHOLE, layers=layers)]
    measurement = Measurement(
        network=network,
        chain=chain,
        segments=segments,
        batches=list(given.batches(batch)),
        leaders={layer.name: layer.name for layer in layers},
        graded=graded,
        loss=loss,
        seed=SEED,
        center=False,
    )
    found: dict[str, moments.Moments] = {}

    with TemporaryDirectory() as root, WorkDirectory(Path(root), {}) as work:
        sweep = Sweep(measurement, work, finished=lambda s: s.name in found)
        for segment, measured in sweep.run(lambda _: None):
            found[segment.name] = measured
        left = [file for stage in PASSING for file in (Path(root) / stage).rglob("*.safetensors")]
        assert not left, "what was on the way is still there"
    grams = {name: gram.mean() for part in found.values() for name, gram in part.grams.items()}
    fishers = {name: gram.mean() for part in found.values() for name, gram in part.fishers.items()}
    return grams, fishers


def by_autograd(
    network: Network, layers: list[Layer], inputs: dict[str, Tensor], loss: Loss, batch: int
) -> tuple[Moments, Moments]:
    """Returns the same by hooks and autograd on the network as it is, all of it at once."""
    rows: dict[str, list[Tensor]] = {layer.name: [] for layer in layers}
    gradients: dict[str, list[Tensor]] = {layer.name: [] for layer in layers}
    masking = torch.Generator().manual_seed(SEED)
    prepared = [prepare(loss, b, masking) for b in sequences(inputs).batches(batch)]
    for index, (given, labels) in enumerate(prepared):
        generator = drawing(SEED, index)
        mask = given.get("attention_mask")
        masks = () if mask is None else (mask,)
        outputs: list[tuple[Layer, Tensor]] = []

        def watch(layer: Layer, masks: Any, outputs: list[tuple[Layer, Tensor]]) -> Any:
            def hook(_: nn.Module, arguments: tuple[Tensor], output: Tensor) -> Tensor:
                x = layer.layout.inputs(arguments[0].detach())
                rows[layer.name].append(unpadded(x, masks).reshape(-1, x.shape[-1]))
                outputs.append((layer, output.requires_grad_().clone()))
                return outputs[-1][1]

            return network.module.get_submodule(layer.name).register_forward_hook(hook)

        handles = [watch(layer, masks, outputs) for layer in layers]
        found = network(given)
        for handle in handles:
            handle.remove()
        for scalar in backward_scalars(loss, found, labels, generator, masks):
            wanted = torch.autograd.grad(scalar, [y for _, y in outputs], retain_graph=True)
            for (layer, _), gradient in zip(outputs, wanted, strict=True):
                g = unpadded(layer.layout.outputs(gradient), masks)
                gradients[layer.name].append(g.reshape(-1, g.shape[-1]))
    return {n: outer(x) for n, x in rows.items()}, {n: outer(x) for n, x in gradients.items()}


def outer(rows: list[Tensor]) -> Tensor:
    every = torch.cat(rows).double()
    return every.T @ every / len(every)


def assert_close(found: Moments, expected: Moments, tolerance: float = 1e-5) -> None:
    assert set(found) == set(expected)
    for name, matrix in expected.items():
        assert found[name].dtype == torch.float64
        assert (found[name] - matrix).norm() < tolerance * matrix.norm(), name


def input_groups(network: Network, layers: list[Layer], batch: Batch) -> dict[str, str]:
    """Returns what `grouping` sees in one forward pass."""
    with torch.no_grad(), grouping(network, layers) as groups:
        network(batch)
    return groups
