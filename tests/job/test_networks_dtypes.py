"""Networks in any floating dtype, and in several at once, run and keep their dtypes."""

from pathlib import Path
from typing import Any

import pico
import pytest
import torch
from command_helpers import assert_one_sentence
from safetensors.torch import save_file
from torch import nn

import lrc_cli

SOURCE = '''
import torch
from torch import nn


class Net(nn.Module):
    """Two layers, a norm between them, and a buffer that is added."""

    def __init__(self, norm=None, hard=None):
        super().__init__()
        self.a, self.b, self.norm = nn.Linear(24, 40), nn.Linear(40, 24), norm or nn.Identity()
        self.hard = hard
        self.register_buffer("shift", torch.ones(40))

    def forward(self, x):
        x = x if self.hard is None else x.to(self.hard)
        x = torch.relu(self.norm(self.a(x))) + self.shift
        return self.b(x.to(self.b.weight.dtype))


class Along(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv1d(1, 32, 9), nn.Linear(32, 24)
        self.norm = nn.InstanceNorm1d(32, affine=True, track_running_stats=True)

    def forward(self, x):
        return self.last(torch.relu(self.norm(self.first(x[:, None]))).mean(-1))


def plain(): return Net()
def batch(): return Net(nn.BatchNorm1d(40))
def bare(): return Net(nn.BatchNorm1d(40, affine=False))
def layer(): return Net(nn.LayerNorm(40))
def along(): return Along()
def hard(): return Net(hard=torch.float64)
def hard_batch(): return Net(nn.BatchNorm1d(40), hard=torch.float64)
def halved(): return Net(hard=torch.bfloat16)


def wide(name): return globals()[name]().double()
def half(name): return globals()[name]().half()
def brain(name): return globals()[name]().bfloat16()


def plain64(): return wide("plain")
def batch64(): return wide("batch")
def bare64(): return wide("bare")
def layer64(): return wide("layer")
def along64(): return wide("along")
def hard64(): return wide("hard")
def hard_batch64(): return wide("hard_batch")
def batch16(): return half("batch")
def batch_b16(): return brain("batch")
def halved_b16(): return brain("halved")


def head64():
    model = batch()
    model.b.double()
    return model


def buffer64():
    model = plain()
    model.shift = model.shift.double()
    return model


def norm32():
    model = brain("batch")
    model.norm.float()
    model.shift = model.shift.float()
    return model
'''
WORK = [
    *(f"{name} auto" for name in ("plain64", "batch64", "bare64", "layer64", "along64")),
    *(f"{name} auto" for name in ("head64", "buffer64", "batch16", "batch_b16", "norm32")),
    *(f"{name} float64" for name in ("plain64", "batch64", "bare64", "hard64", "hard_batch64")),
    *(f"{name} float64" for name in ("head64", "buffer64", "batch16", "batch", "bare", "along64")),
    *(f"{name} float16" for name in ("batch", "batch64", "batch16", "norm32")),
    *(f"{name} bfloat16" for name in ("batch", "batch64", "halved_b16", "norm32", "along64")),
]
CLOSE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 0.05, torch.bfloat16: 0.3}


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Returns the changes that make a config compress a network of SOURCE."""
    (tmp_path / "dtypes.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    rows = torch.randn(80, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    save_file({"x": rows}, tmp_path / "rows.safetensors")

    def changes(name: str, dtype: str, method: str = "frobenius") -> dict[str, Any]:
        model = built(name)
        pico.randomise(model)
        save_file(model.state_dict(), tmp_path / "net.safetensors")
        return {
            "model.path": str(tmp_path / "net.safetensors"),
            "model.factory": f"dtypes:{name}",
            "calibration.path": str(tmp_path / "rows.safetensors"),
            "calibration.num_sequences": 60,
            "compression.method": method,
            "compression.size": 0.8,
            "runtime.dtype": dtype,
        }

    return changes


def built(name: str) -> nn.Module:
    namespace: dict[str, Any] = {}
    exec(SOURCE, namespace)
    model: nn.Module = namespace[name]()
    return model.eval()


@pytest.mark.parametrize("case", WORK)
def test_a_network_runs_and_its_output_has_its_dtypes(case: str, tmp_path: Path, job: Any) -> None:
    name, dtype = case.split()
    output, report = pico.compressed(tmp_path, job(name, dtype))
    assert any(layer.get("rank") for layer in report["layers"])
    state, dense = pico.read_state(output), built(name)
    wanted = {key: tensor.dtype for key, tensor in dense.state_dict().items()}
    assert {key: state[key].dtype for key in wanted} == wanted
    dense.load_state_dict(pico.rebuilt(state))
    loaded = lrc_cli.load(output, factory=f"dtypes:{name}")
    x = torch.randn(5, 24).to(next(dense.parameters()).dtype)
    with torch.no_grad():
        gap = (loaded(x) - dense(x)).abs().max().item()
    assert gap < max(CLOSE[tensor.dtype] for tensor in dense.parameters())


@pytest.mark.parametrize("case", ["batch64 auto", "hard64 float64", "batch float16"])
def test_gradients_and_verification_in_such_networks(case: str, tmp_path: Path, job: Any) -> None:
    name, dtype = case.split()
    output, _ = pico.compressed(tmp_path, job(name, dtype, "curvature"))
    against = ("--against", tmp_path / "net.safetensors", "--factory", f"dtypes:{name}")
    ended = pico.call("verify", output, *against)
    assert ended.code == 0, ended.out + ended.err


@pytest.mark.parametrize(
    "case, words",
    {
        "hard64 auto": ["runtime.dtype: float64"],
        "hard_batch64 float32": ["runtime.dtype: float64"],
        "halved_b16 float32": ["runtime.dtype: bfloat16"],
        "hard float32": ["inputs and weights are float32"],
    }.items(),
)
def test_a_forward_with_a_dtype_of_its_own_is_told_the_key(
    case: str, words: list[str], tmp_path: Path, job: Any
) -> None:
    name, dtype = case.split()
    ended = pico.call("compress", pico.job(tmp_path, job(name, dtype)), "-q")
    assert_one_sentence(ended, 2, "the network fails", "data type", *words)
