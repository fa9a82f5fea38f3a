"""A network that changes from pass to pass is refused, and a network that only looks so is not.

Each case is a network of three blocks, with some code in its forward and some in the forward of
its blocks. The blocks are a chain, or the network runs whole.
"""

import importlib
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pico
import pytest
import torch
from safetensors.torch import save_file

from lrc_cli.execution.constancy import sketch

NUMBERS = itertools.count()
SOURCE = """
import itertools, random, time
import torch
from torch import nn
from torch.nn import functional as F

STATE = {"calls": 0, "last": None, "inside": False}


class Block(nn.Module):
    calls = 0

    def __init__(self, number):
        super().__init__()
        self.number, self.count, self.store = number, 0, []
        self.up, self.down = nn.Linear(24, 40), nn.Linear(40, 24)
        self.norm, self.drop = nn.BatchNorm1d(24), nn.Dropout(0.5)
        self.register_buffer("seen", torch.zeros(()), persistent=False)
        self.register_buffer("table", torch.ones(24), persistent=False)

    def forward(self, x):
        BLOCK
        return x + self.down(torch.relu(self.up(x)))


class Net(nn.Module):
    calls = 0

    def __init__(self):
        super().__init__()
        self.count, self.store, self.numbers = 0, [], itertools.count()
        self.first, self.head = nn.Linear(24, 24), nn.Linear(24, 8)
        self.blocks = BLOCKS
        self.register_buffer("seen", torch.zeros(()), persistent=False)

    def whole(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)

    def forward(self, x):
        NET
        return self.whole(x)
"""
KINDS = {
    "chain": "nn.ModuleList(Block(i) for i in range(3))",
    "whole": "nn.Sequential(*(Block(i) for i in range(3)))",
}

Y = "y = self.whole(x); "
CHANGING: dict[str, tuple[str, str]] = {
    # Code of the network, what the sentence names.
    "noise": (Y + "return y + 0.3 * torch.randn_like(y)", "differ by"),
    "a little noise": (Y + "return y + 0.01 * torch.randn_like(y)", "differ by"),
    "noise in one row": (Y + "y[..., 0] += torch.randn(()); return y", "differ by"),
    "dropout that stays on": ("x = F.dropout(x, 0.5, training=True)", "differ by"),
    "random numbers of Python": ("return self.whole(x) * (1 + random.random())", "differ by"),
    "the time": ("return self.whole(x) * (1 + time.perf_counter() % 1)", "differ by"),
    "training mode": ("self.train(); x = F.dropout(x, 0.5, self.training)", "differ by"),
    "every other call": (
        "Net.calls += 1\n        if Net.calls % 2 == 0: return 1.5 * self.whole(x)", "differ by"),
    "every third call": (
        "Net.calls += 1\n        if Net.calls % 3 == 0: return 1.5 * self.whole(x)", "differ by"),
    "every seventh call": (
        "Net.calls += 1\n        if Net.calls % 7 == 0: return 1.5 * self.whole(x)", "differ by"),
    "from the second call": (
        "Net.calls += 1\n        if Net.calls >= 2: return 1.5 * self.whole(x)", "differ by"),
    "from the ninth call": (
        "Net.calls += 1\n        if Net.calls >= 9: return 1.5 * self.whole(x)", "differ by"),
    "a counter in a file": (
        "STATE['calls'] += 1\n        if STATE['calls'] % 4 == 0: return 2 * self.whole(x)",
        "differ by"),
    "a counter of itertools": (
        "return self.whole(x) * (1 + next(self.numbers) % 5)", "differ by"),
    "a counter in a buffer": ("self.seen += 1; return self.whole(x) * self.seen", "buffer seen"),
    "a slow counter": (
        "self.seen += 1; return self.whole(x) * (1 + 0.001 * self.seen)", "buffer seen"),
    "another shape": (
        Y + "self.count += 1; return y[..., :4] if self.count > 1 else y", "its outputs are"),
    "another dtype": (
        Y + "Net.calls += 1; return y.double() if Net.calls > 1 else y", "its outputs are"),
    "one output more": (
        Y + "Net.calls += 1; return (y, y) if Net.calls > 1 else y", "its outputs are"),
    "a layer twice": (
        "Net.calls += 1\n        if Net.calls % 2: self.first(2 * x)", "layer first is called"),
    "a layer on more rows": (
        "Net.calls += 1\n        if Net.calls % 2: self.first(torch.cat([x, x]))", "layer first"),
    "a weight that grows": ("self.head.weight.data.mul_(1.01)", "parameter head.weight"),
    "a weight that hardly grows": ("self.head.weight.data.mul_(1.0001)", "parameter head.weight"),
    "a row of a weight": (
        "with torch.no_grad(): self.head.weight[0].mul_(1.1)", "parameter head.weight"),
    "a bias that drifts": (
        "with torch.no_grad(): self.head.bias.add_(0.01)", "parameter head.bias"),
    "a new weight": (
        "self.first.weight = nn.Parameter(1.1 * self.first.weight, False)", "first"),
    "a cache that grows": (
        Y + "self.store.append(y); return y + 0.1 * len(self.store)", "differ by"),
    "what the last pass left": (
        Y + "z, STATE['last'] = STATE['last'], y\n        return y if z is None else y + z[:1]",
        "differ by"),
    "a hook more in every pass": (
        "self.head.register_forward_hook(lambda m, x, y: 1.1 * y)", "differ by"),
    "a block less from the second call": (
        "self.count += 1\n        if self.count == 2: del self.blocks[1]", " "),
    "a block less from the sixth call": (
        "self.count += 1\n        if self.count == 6: del self.blocks[1]", "network"),
    "no blocks from the fourth call": (
        "self.count += 1\n        if self.count == 4: self.blocks = nn.ModuleList()", "network"),
    "no layer from the fifth call": (
        "self.count += 1\n        if self.count < 5: return self.whole(x)\n"
        "        self.first = nn.Identity(); del self.head; self.head = nn.Linear(24, 8)",
        "network"),
    "blocks in turn": (
        "self.blocks[0], self.blocks[1] = self.blocks[1], self.blocks[0]", "network"),
}  # fmt: skip
CHANGING_BLOCKS: dict[str, tuple[str, str]] = {
    # Code of the blocks, what the sentence names.
    "noise": ("x = x + 0.1 * torch.randn_like(x)", "module blocks.0"),
    "dropout that stays on": ("x = F.dropout(x, 0.5, training=True)", "module blocks.0"),
    "a counter": ("Block.calls += 1\n        if Block.calls % 2: x = 1.5 * x", "differ by"),
    "a later counter": ("self.count += 1\n        if self.count > 4: x = 1.5 * x", "differ by"),
    "a counter in a buffer": ("self.seen += 1; x = x * self.seen", "seen"),
    "a running mean": (
        "self.table.mul_(0.9).add_(0.1 * x.abs().mean(0)); x = x / self.table", "table"),
    "a weight that grows": ("self.up.weight.data.mul_(1.01)", "up.weight"),
    "a layer twice": ("self.count += 1\n        if self.count % 2: self.up(2 * x)", "up is called"),
    "gradients": ("x = x * (1.5 if torch.is_grad_enabled() else 1)", "gradients are recorded"),
}  # fmt: skip
FINE: dict[str, tuple[str, str]] = {
    # Code of the network, code of the blocks.
    "nothing": ("pass", "pass"),
    "dropout in evaluation mode": ("pass", "x = self.drop(x)"),
    "batch norm in evaluation mode": ("pass", "x = self.norm(x)"),
    "a counter that nobody reads": ("Net.calls += 1; self.count += 1", "self.count += 1"),
    "a counter in a buffer that nobody reads": ("self.seen += 1", "self.seen.add_(1)"),
    "a list that grows and that nobody reads": ("self.store.append(x.mean())", "pass"),
    "a table that is built in the first pass": (
        "pass",
        "self.cached = self.cached if hasattr(self, 'cached') else torch.arange(24.0).cos();"
        " x = x + self.cached"),
    "a buffer that is as long as the batch": (
        "pass",
        "if len(self.store) != len(x): self.store[:] = [1.0] * len(x)\n"
        "        x = x * torch.tensor(self.store)[:, None]"),
    "its own noise with a seed": (
        "pass", "x = x + torch.randn(24, generator=torch.Generator().manual_seed(self.number))"),
    "an input that it changes in place": ("x.mul_(1.1)", "pass"),
    "a block's input that it changes in place": ("pass", "x.mul_(1.1)"),
    "a context around the blocks": (
        "STATE['inside'] = True\n        try: return self.whole(x)\n"
        "        finally: STATE['inside'] = False",
        "x = x if STATE['inside'] else 2 * x"),
    "what the block before has left": (
        "pass", "z, STATE['last'] = STATE['last'], x\n        if self.number: x = x + z"),
}  # fmt: skip


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.syspath_prepend(tmp_path)
    rng = torch.get_rng_state()
    namespace: dict[str, Any] = {}
    exec(source("chain"), namespace)
    net = namespace["Net"]()
    pico.randomise(net)
    save_file(net.state_dict(), tmp_path / "net.safetensors")
    noise = torch.Generator().manual_seed(5)
    rows = torch.randn(64, 24, generator=noise) @ torch.randn(24, 24, generator=noise) / 3
    save_file({"x": rows}, tmp_path / "rows.safetensors")
    yield tmp_path
    torch.set_rng_state(rng)


def source(kind: str, net: str = "pass", block: str = "pass") -> str:
    blocks = SOURCE.replace("BLOCKS", KINDS[kind])
    return blocks.replace("BLOCK", block).replace("NET", net)


def run(place: Path, code: str, method: str = "frobenius", **changes: Any) -> tuple[str, Any]:
    """Returns the factory's module, and how the job ended."""
    module = f"constant_{next(NUMBERS)}"
    (place / f"{module}.py").write_text(code)
    importlib.invalidate_caches()
    values = {
        "model.path": str(place / "net.safetensors"),
        "model.factory": f"{module}:Net",
        "calibration.path": str(place / "rows.safetensors"),
        "calibration.num_sequences": 40,
        "compression.method": method,
        "compression.sequential": False,
        "evaluation": [
            {"name": "rest", "path": str(place / "rows.safetensors"), "num_sequences": 4}
        ],
        **changes,
    }
    return module, pico.call("compress", pico.job(place, values), "-q")


def assert_refused(ended: Any, place: Path, named: str) -> None:
    assert ended.code in (1, 2) and "Traceback" not in ended.err, ended.err
    (last,) = [x for x in ended.err.splitlines() if x.startswith("error: ")]
    assert named in last and "; " in last and "has no attribute" not in last, last
    assert not (place / "out").exists()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CHANGING)
def test_a_network_that_changes_is_refused(name: str, kind: str, place: Path) -> None:
    code, named = CHANGING[name]
    _, ended = run(place, source(kind, net=code))
    assert_refused(ended, place, named)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CHANGING_BLOCKS)
def test_a_block_that_changes_is_refused(name: str, kind: str, place: Path) -> None:
    code, named = CHANGING_BLOCKS[name]
    _, ended = run(place, source(kind, block=code), "curvature")
    assert_refused(ended, place, named)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FINE)
def test_a_network_that_only_looks_so_goes_on_to_work(name: str, kind: str, place: Path) -> None:
    net, block = FINE[name]
    module, ended = run(place, source(kind, net, block))
    assert ended.code == 0, ended.err
    sys.modules.pop(module)
    found = pico.call("verify", place / "out", "--against", place / "net.safetensors",
                      "--factory", f"{module}:Net")  # fmt: skip
    assert found.code == 0, [x for x in found.out.splitlines() if x.startswith("fails")]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("code", ["x = x - x.mean(0)", "x = x * len(x)"])
def test_a_certificate_needs_sequences_that_do_not_see_each_other(
    code: str, kind: str, place: Path
) -> None:
    certification = {"num_sequences": 20, "confidence": 0.5, "quantile": 0.5}
    _, ended = run(place, source(kind, block=code), certification=certification)
    assert_refused(ended, place, "alone than in a batch")
    _, ended = run(place, source(kind, block=code))
    assert ended.code == 0, ended.err


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "code",
    [
        "y = self.whole(x); return y, y @ y.T",
        "y = self.whole(x); return y, x[:, : int((x[:, 0] > 0).sum()) + 4]",
    ],
    ids=["every sequence with every other", "padded by the batch"],
)
def test_outputs_may_grow_with_the_batch(code: str, dtype: str, place: Path) -> None:
    certification = {"num_sequences": 20, "confidence": 0.5, "quantile": 0.5}
    changes = {"certification": certification, "runtime.dtype": dtype}
    _, ended = run(place, source("chain", net=code), **changes)
    assert "alone than in a batch" not in ended.err, ended.err


def test_a_few_rows_that_are_far_off_count_little() -> None:
    x = torch.randn(100, 7, generator=torch.Generator().manual_seed(1))
    other = x.clone()
    other[3] *= -1
    middle, share = sketch(x).distance_of_most(sketch(other))
    assert middle == 0 and 0.05 < share < 0.5 < sketch(x).distance(sketch(other))


def test_lrc_eval_refuses_a_network_that_changes(place: Path) -> None:
    module, ended = run(place, source("chain"))
    assert ended.code == 0, ended.err
    (place / f"{module}_noisy.py").write_text(source("chain", net=CHANGING["noise"][0]))
    importlib.invalidate_caches()
    ended = pico.call("eval", place / "out", "--factory", f"{module}_noisy:Net")
    assert ended.code == 1 and "changes from pass to pass" in ended.err


@pytest.mark.parametrize("shape", [(), (3,), (2, 3, 5), (5000, 7), (0, 4)])
def test_a_sketch_tells_how_far_a_row_is(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    assert sketch(x).distance(sketch(x.clone())) == 0
    assert sketch(x).distance(sketch(x.double())) == torch.inf
    if x.numel():
        assert 0.05 < sketch(x).distance(sketch(1.1 * x)) < 0.15
        other = x.clone()
        other.view(-1)[0] = torch.nan
        assert not sketch(x).distance(sketch(other)) <= 1
