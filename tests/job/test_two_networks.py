"""These tests check the compressed network of sequential fits: moments, modules, memory."""

from pathlib import Path
from typing import Any

import pico
import pytest
import torch

from lrc_cli.config import load_config
from lrc_cli.execution.chain import find_chain
from lrc_cli.job.factors import sequential as fitting
from lrc_cli.job.factors.two_networks import DriftSum, TwoNetworks
from lrc_cli.job.plan import make_plan
from lrc_cli.network.low_rank.modules import LowRankModule
from lrc_cli.network.low_rank.stored import stored_layers
from lrc_cli.report.record import LayerFacts


@pytest.mark.parametrize("center", [False, True])
def test_streamed_moments_are_those_of_all_tokens(center: bool) -> None:
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(300, 20, generator=generator) + 1
    compressed = x + 0.1 * torch.randn(300, 20, generator=generator)
    sums = DriftSum(20, torch.device("cpu"), center=center)
    for start in range(0, 300, 70):
        sums.add(x[start : start + 70], compressed[start : start + 70])
    drift, (a, b) = sums.mean(), (x.double(), compressed.double())
    means = [t.mean(dim=0) if center else torch.zeros(20) for t in (a, b)]
    a, b = a - means[0], b - means[1]
    for found, expected in (
        (drift.compressed, b.T @ b / 300),
        (drift.cross, (a - b).T @ b / 300),
        (drift.drift, (a - b).T @ (a - b) / 300),
        (drift.gram, a.T @ a / 300),
    ):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert drift.num_tokens == 300 and (drift.mean is not None) is center
    if drift.mean is not None and drift.mean_compressed is not None:
        torch.testing.assert_close(
            torch.stack([drift.mean, drift.mean_compressed]),
            torch.stack(means),
            rtol=1e-6,
            atol=1e-6,
        )


def test_streamed_moments_around_a_far_mean_keep_their_digits() -> None:
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(300, 20, generator=generator) + 1e3
    compressed = x + 0.1 * torch.randn(300, 20, generator=generator) + 10
    sums = DriftSum(20, torch.device("cpu"), center=True)
    for start in range(0, 300, 70):
        sums.add(x[start : start + 70], compressed[start : start + 70])
    drift = sums.mean()
    a, b = (t.double() - t.double().mean(dim=0) for t in (x, compressed))
    for found, expected in (
        (drift.compressed, b.T @ b / 300),
        (drift.cross, (a - b).T @ b / 300),
        (drift.drift, (a - b).T @ (a - b) / 300),
    ):
        assert (found - expected).norm() < 1e-5 * expected.norm()


def _facts(storage: str) -> LayerFacts:
    return LayerFacts(storage=storage, reason=None, fallback=False)


def test_the_second_network_holds_low_rank_layers(tmp_path: Path, sequential_job: Any) -> None:
    """Factors take the place of their layer, and no other layer changes."""
    config = load_config(pico.job(tmp_path, sequential_job("llama", sequential=True)))
    plan = make_plan(config)
    batches = list(plan.sequences["calibration"].batches(4))
    networks = TwoNetworks(plan, find_chain(plan.network, batches[0]), batches)
    layer = plan.layers[0]
    weight = layer.weight(plan.source)
    tensors = {layer.keys.weight: weight[:8], layer.keys.key("up.weight"): weight[:, :8]}
    networks.install(layer, tensors, _facts("factors"))
    modules = networks.compressed.network.module
    assert isinstance(modules.get_submodule(layer.name), LowRankModule)
    assert not any(isinstance(m, LowRankModule) for m in plan.network.module.modules())
    other = plan.layers[1]
    networks.install(other, {layer.keys.weight: weight[:8]}, _facts("dense"))
    assert not isinstance(modules.get_submodule(other.name), LowRankModule)


def test_factors_of_finished_layers_are_not_in_private_memory(
    tmp_path: Path, sequential_job: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The factors of a deep network would take as much memory as its checkpoint."""
    networks: list[TwoNetworks] = []

    def opened(*arguments: Any) -> TwoNetworks:
        networks.append(TwoNetworks(*arguments))
        return networks[-1]

    monkeypatch.setattr(fitting.SequentialStage, "networks_type", staticmethod(opened))
    pico.compressed(tmp_path, sequential_job("llama", size=0.4))
    modules = dict(stored_layers(networks[0].compressed.network.module))
    tensors = [tensor for part in modules.values() for tensor in part.state_dict().values()]
    mapped = Path("/proc/self/maps").read_text().splitlines()
    files = [line.split() for line in mapped if str(tmp_path) in line]
    spans = [tuple(int(x, 16) for x in span.split("-")) for span, *_ in files]
    assert len(modules) >= 13
    for tensor in tensors:
        assert any(first <= tensor.data_ptr() < last for first, last in spans)
