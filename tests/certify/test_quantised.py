"""A copy that another package has quantised is multiplied out by running its layers.

The package here is a toy, registered with transformers as real ones are. docs/certify.md says which
real ones were tried.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pico
import pytest
import torch
from command_helpers import assert_one_sentence
from copies import FAST, certified, copy_of
from pico import Models
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin


class ToyLinear(nn.Module):
    """A layer of whole numbers with a scale a row."""

    def __init__(self, dense: nn.Linear) -> None:
        super().__init__()
        self.register_buffer("qweight", torch.zeros(dense.weight.shape, dtype=torch.int8))
        self.scale = nn.Parameter(torch.zeros(len(dense.weight)), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        assert isinstance(self.qweight, Tensor)
        return (x @ self.qweight.to(x.dtype).T) * self.scale.to(x.dtype)


class ToyConfig(QuantizationConfigMixin):
    def __init__(self, quant_method: str = "toy", **_: Any) -> None:
        self.quant_method = quant_method


class ToyQuantizer(HfQuantizer):
    requires_calibration = False
    is_trainable = False

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        return True

    def _process_model_before_weight_loading(self, model: nn.Module, **_: Any) -> None:
        for name, part in list(model.named_modules()):
            if isinstance(part, nn.Linear) and "layers" in name:
                parent, _, leaf = name.rpartition(".")
                setattr(model.get_submodule(parent), leaf, ToyLinear(part))

    def _process_model_after_weight_loading(self, model: nn.Module, **_: Any) -> None:
        return None


@pytest.fixture
def toy() -> Iterator[None]:
    register_quantization_config("toy")(ToyConfig)
    register_quantizer("toy")(ToyQuantizer)
    yield
    del AUTO_QUANTIZER_MAPPING["toy"], AUTO_QUANTIZATION_CONFIG_MAPPING["toy"]


def quantised(original: Path, target: Path, method: str = "toy") -> Path:
    """Writes a checkpoint of whole numbers."""
    copy_of(original, target)
    state: dict[str, Tensor] = {}
    for name, tensor in pico.read_state(original).items():
        if tensor.ndim == 2 and "layers" in name:
            scale = tensor.float().abs().amax(1) / 127
            layer = name.removesuffix(".weight")
            state[f"{layer}.qweight"] = (tensor.float() / scale[:, None]).round().to(torch.int8)
            state[f"{layer}.scale"] = scale
        else:
            state[name] = tensor
    save_file(state, target / "model.safetensors", metadata={"format": "pt"})
    file = target / "config.json"
    config = json.loads(file.read_text()) | {"quantization_config": {"quant_method": method}}
    file.write_text(json.dumps(config))
    return target


@pytest.mark.usefixtures("toy")
def test_a_quantised_copy_is_multiplied_out_and_verified(
    tmp_path: Path, checkpoint: Models, text: Path
) -> None:
    original = checkpoint("llama")
    copy = quantised(original, tmp_path / "copy")
    record = certified(original, copy, text, tmp_path / "out")
    assert record.other.form == "quantised, toy" and not record.weights.flags
    assert record.other.num_bytes < record.original.num_bytes
    errors = {x.name: x.error for x in record.weights.tensors}
    assert len(errors) == 20 and errors["model.embed_tokens.weight"] == 0
    assert 0.001 < errors["model.layers.1.mlp.up_proj.weight"] < 0.01  # type: ignore[operator]
    assert any("multiplied out before the run" in x for x in record.arithmetic.sentences)
    ended = pico.call("verify", tmp_path / "out", "--against", original, "--other", copy, "-q")
    assert ended.code == 0, ended.out


def test_a_method_that_nothing_reads_is_refused(
    tmp_path: Path, checkpoint: Models, text: Path
) -> None:
    original = checkpoint("llama")
    copy = quantised(original, tmp_path / "copy", "nobody's")
    arguments = ("--against", original, "--data", text, "--output", tmp_path / "out", *FAST)
    ended = pico.call("certify", copy, *arguments)
    assert_one_sentence(ended, 2, "quantised (nobody's), and transformers cannot load it here")
    assert not (tmp_path / "out").exists()
    (copy / "model.safetensors").unlink()
    torch.save({"x": torch.ones(3, 3)}, copy / "pytorch_model.bin")
    ended = pico.call("certify", copy, *arguments)
    assert_one_sentence(ended, 2, "other forms may hold code")
