"""A network that fails or returns no finite tensors in a later pass ends the job in a sentence.

Each case is a network of three layers whose forward changes from its N-th call on. The job ends
with a sentence that names the network or a module, or else `lrc verify --against` finds that all
statements hold.
"""

import importlib
import itertools
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pico
import pytest

NUMBERS = itertools.count()
SOURCE = """
import random
import torch
from torch import nn


class Net(nn.Module):
    calls = 0

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(24, 48), nn.Linear(48, 32), nn.Linear(32, 8)

    def whole(self, x):
        return self.c(torch.relu(self.b(torch.relu(self.a(x)))))

    def later(self, x):
        LATER

    def forward(self, x):
        Net.calls += 1
        return self.later(x) if WHEN else self.whole(x)
"""

LATER = {
    "None": "return None",
    "a number": "return 7",
    "a text": "return 'done'",
    "an empty tuple": "return ()",
    "an empty dict": "return {}",
    "itself": "return self",
    "whole numbers": "return self.whole(x).long()",
    "complex numbers": "return self.whole(x) + 1j",
    "NaN": "return self.whole(x) * float('nan')",
    "infinity": "return self.whole(x) / 0",
    "one NaN": "y = self.whole(x); y = y.clone(); y[0, 0] = float('nan'); return y",
    "NaN before a layer": "return self.c(torch.relu(self.b(self.a(x) * float('nan'))))",
    "weights of NaN": "self.a.weight.data.fill_(float('nan')); return self.whole(x)",
    "a new weight": "self.a.weight = nn.Parameter(torch.ones(48, 24)); return self.whole(x)",
    "in inference mode": "\n        with torch.inference_mode():\n            return self.whole(x)",
    "another class": "self.__class__ = nn.Identity; return self.whole(x)",
}
"""What a later call does."""

MOMENTS = {
    "from the 4th call": "Net.calls >= 4",
    "from the 8th call": "Net.calls >= 8",
    "at every other call": "Net.calls % 2 == 0",
}
"""When a call is a later one."""


@pytest.fixture
def place(
    tmp_path: Path, plain_folder: pico.PlainFolder, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Path]:
    import torch
    from safetensors.torch import save_file

    monkeypatch.syspath_prepend(tmp_path)
    state = pico.read_state(plain_folder.path / "mlp.safetensors")
    names = {"0": "a", "2": "b", "4": "c"}
    renamed = {f"{names[k[0]]}{k[1:]}": x for k, x in state.items()}
    save_file(renamed, tmp_path / "net.safetensors")
    rng = torch.get_rng_state()
    yield tmp_path
    torch.set_rng_state(rng)


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("kind", LATER)
def test_a_network_that_changes(
    kind: str, moment: str, place: Path, plain_folder: pico.PlainFolder
) -> None:
    module = f"later_{next(NUMBERS)}"
    text = SOURCE.replace("LATER", LATER[kind]).replace("WHEN", MOMENTS[moment])
    (place / f"{module}.py").write_text(text)
    importlib.invalidate_caches()
    changes = plain_folder.model("mlp") | {
        "model.path": str(place / "net.safetensors"),
        "model.factory": f"{module}:Net",
        "certification": {"num_sequences": 20, "confidence": 0.5, "quantile": 0.5},
    }
    ended = pico.call("compress", pico.job(place, changes), "-q")
    assert "Traceback" not in ended.err and ended.err.count("error: ") <= 1
    if ended.code:
        assert ended.code in (1, 2), ended.err
        last = ended.err.splitlines()[-1]
        assert last.startswith("error: ") and "; " in last, last
        assert re.search(r"network|outputs|layers|: [abc]: ", last), last
        assert "raised in" not in last, last
        assert not (place / "out").exists()
        return
    # The network is what it says when it is asked from the start.
    sys.modules[module].Net.calls = 0
    options = ("--against", place / "net.safetensors", "--factory", f"{module}:Net")
    found = pico.call("verify", place / "out", *options)
    assert found.code == 0, [x for x in found.out.splitlines() if x.startswith("fails")]
