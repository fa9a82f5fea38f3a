"""Networks that cast, norm or quantise weights have true statements, or keep the layers dense."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pico
import pytest
import torch
from safetensors.torch import save_file

from lrc_cli.execution.weight_use import OTHER, READ

SOURCE = """
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune


class Half(nn.Linear):
    def forward(self, x):
        return (x.half() @ self.weight.half().T).float() + self.bias


class Quantised(nn.Linear):
    def forward(self, x):
        step = self.weight.abs().amax(1, keepdim=True) / 7
        return F.linear(x, (self.weight / step).round() * step, self.bias)


class Normed(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight / self.weight.norm(dim=1, keepdim=True), self.bias)


class Larger(nn.Linear):
    def forward(self, x):
        return F.linear(x, 1.02 * self.weight, self.bias)


class Net(nn.Module):
    def __init__(self, how="plain", kind=nn.Linear, around=None):
        super().__init__()
        self.how, self.first, self.head = how, nn.Linear(24, 32), nn.Linear(32, 16)
        self.mid = kind(32, 32) if around is None else around(kind(32, 32))

    def forward(self, x):
        x = self.first(x)
        if self.how == "past":
            x = (x.half() @ self.mid.weight.half().T).float() + self.mid.bias
        elif self.how == "no_grad":
            with torch.no_grad():
                x = self.mid(x)
        elif self.how == "enable_grad":
            with torch.enable_grad():
                x = self.mid(x)
        elif self.how == "inference":
            with torch.inference_mode():
                x = self.mid(x)
        elif self.how == "autocast":
            with torch.autocast("cpu", torch.bfloat16):
                x = self.mid(x)
            x = x.float()
        elif self.how == "cast":
            x = self.mid(x.half().float())
        else:
            x = self.mid(x)
        x = self.head(x)
        return x.bfloat16() if self.how == "bfloat16" else x


def pruned(part):
    return prune.l1_unstructured(part, "weight", 0.3)


NETS = {
    "half": lambda: Net(kind=Half),
    "quantised": lambda: Net(kind=Quantised),
    "normed": lambda: Net(kind=Normed),
    "larger": lambda: Net(kind=Larger),
    "weight_norm": lambda: Net(around=parametrizations.weight_norm),
    "older_weight_norm": lambda: Net(around=nn.utils.weight_norm),
    "spectral_norm": lambda: Net(around=parametrizations.spectral_norm),
    "older_spectral_norm": lambda: Net(around=nn.utils.spectral_norm),
    "pruned": lambda: Net(around=pruned),
}


def __getattr__(name):
    if name.startswith("net_"):
        name = name[len("net_"):]
        return NETS[name] if name in NETS else lambda: Net(name)
    raise AttributeError(name)
"""
COARSE = "computes in bfloat16, coarser than its weight in float32, as under torch.autocast"
NO_LAYER = "a parameter of {}, no layer's weight"
CASES: dict[str, str | None] = {
    # The reason why the layer `mid` stays dense; None: it is compressed.
    "half": None, "cast": None, "bfloat16": None, "no_grad": None, "enable_grad": None,
    "quantised": OTHER, "normed": OTHER, "larger": OTHER, "past": READ, "autocast": COARSE,
    "weight_norm": NO_LAYER.format("ParametrizationList"),
    "spectral_norm": NO_LAYER.format("ParametrizationList"),
    "older_weight_norm": NO_LAYER.format("Linear"),
    "older_spectral_norm": NO_LAYER.format("Linear"), "pruned": NO_LAYER.format("Linear"),
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def nets(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    directory = tmp_path_factory.mktemp("nets")
    (directory / "odd_nets.py").write_text(SOURCE)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(directory)
        yield


def job_of(name: str, directory: Path) -> dict[str, Any]:
    import odd_nets  # type: ignore[import-not-found]

    torch.manual_seed(3)
    save_file(getattr(odd_nets, f"net_{name}")().state_dict(), directory / "net.safetensors")
    save_file({"x": torch.randn(200, 24)}, directory / "rows.safetensors")
    return {
        "model.path": str(directory / "net.safetensors"),
        "model.factory": f"odd_nets:net_{name}",
        "calibration.path": str(directory / "rows.safetensors"),
        "calibration.num_sequences": 200,
        "compression.method": "frobenius",
        "compression.size": 0.7,
        "compression.sequential": False,
        "evaluation": None,
    }


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CASES)
def test_a_layer_is_compressed_or_has_its_reason(name: str, tmp_path: Path) -> None:
    output, report = pico.compressed(tmp_path, job_of(name, tmp_path))
    names = {row["name"] for row in report["layers"]}
    reasons = [x["reason"] for x in report["skipped"] if x["name"].startswith("mid.")]
    if CASES[name] is None:
        assert names == {"first", "mid", "head"}
    else:
        assert names == {"first", "head"} and CASES[name] in reasons
    ended = pico.call("verify", output, "--against", tmp_path / "net.safetensors",
                      "--factory", f"odd_nets:net_{name}")  # fmt: skip
    assert ended.code == 0, ended.out


def test_inference_mode_ends_in_one_sentence(tmp_path: Path) -> None:
    ended = pico.call("compress", pico.job(tmp_path, job_of("inference", tmp_path)))
    assert ended.code == 1 and "use torch.no_grad in its code in place of" in ended.err


MASKED = """
from torch import nn
class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(24, 32), nn.Linear(32, 16)
    def forward(self, x, attention_mask):
        return self.head(self.first(x))
"""
ONES = torch.ones(12, 5)
MASKS: dict[str, tuple[torch.Tensor, str | None]] = {
    "zeros": (0 * ONES.long(), "no real token"), "zeros-float": (0 * ONES, "no real token"),
    "zeros-bool": (ONES != 1, "no real token"), "added": (-1e9 * ONES.triu(3), "0 and 1 only"),
    "ones": (ONES, None), "bool": (ONES.tril(2).bool(), None),
    "halves": (ONES.tril(2) / 2, "0 and 1 only"),
    "pairs": (torch.zeros(12, 1, 5, 5), None), "by-sequence": (torch.zeros(12), None),
}  # fmt: skip


@pytest.mark.parametrize("name", MASKS)
def test_masks_tell_of_tokens_or_are_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "masked_net.py").write_text(MASKED)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "masked_net", raising=False)
    changes = job_of("plain", tmp_path) | {"model.factory": "masked_net:Masked"}
    state = pico.read_state(tmp_path / "net.safetensors")
    state = {key: tensor for key, tensor in state.items() if "mid" not in key}
    save_file(state, tmp_path / "net.safetensors")
    mask, said = MASKS[name]
    data = {"x": torch.randn(12, 5, 24), "attention_mask": mask.contiguous()}
    save_file(data, tmp_path / "rows.safetensors")
    ended = pico.call("compress", pico.job(tmp_path, changes | {"calibration.num_sequences": 12}))
    if said is not None:
        assert ended.code == 2 and said in ended.err and "calibration: attention_mask" in ended.err
        return
    assert ended.code == 0, ended.err
    assert json.loads((tmp_path / "out" / "report.json").read_text())["layers"]
    ended = pico.call("verify", tmp_path / "out", "--against", tmp_path / "net.safetensors",
                      "--factory", "masked_net:Masked")  # fmt: skip
    assert ended.code == 0, ended.out
