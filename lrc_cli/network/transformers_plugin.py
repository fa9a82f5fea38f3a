"""`import lrc_cli.hf` runs this plugin, with which `from_pretrained` loads factorised checkpoints.

The plugin registers the quantization method "lrc", because transformers has no entry point for such
plugins. The safetensors headers tell which layers are factorised, and their ranks. While a
checkpoint is loaded, each such layer is a slot that owns the tensors under their disk names.
Afterwards the layer has plain `nn.Linear` parts.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.quantizers.auto import (
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from lrc_cli.checkpoint.fused import is_mark
from lrc_cli.checkpoint.headers import FORMAT_VERSION, check_table_form, check_version, read_headers
from lrc_cli.errors import InputError
from lrc_cli.network.disk_names import converted, module_names
from lrc_cli.network.experts import has_experts, unfuse, without_merging
from lrc_cli.network.fused_experts import put_together, take_apart
from lrc_cli.network.low_rank.adapters import register_lora
from lrc_cli.network.low_rank.modules import LowRankLayer, LowRankSlot
from lrc_cli.network.low_rank.shapes import damaged
from lrc_cli.network.low_rank.slots import (
    check_table,
    find_stored,
    finish_slots,
    insert_slots,
    stored_weights,
)
from lrc_cli.network.low_rank.stored import (
    FormLayer,
    StoredLayer,
    dense_module,
    dense_weight,
    replace_modules,
    stored_layers,
)
from lrc_cli.network.low_rank.tied import Tied

METHOD = "lrc"
"""The `quant_method` of a factorised checkpoint's config.json."""


WHERE = "the checkpoint's quantization_config"


class LrcConfig(QuantizationConfigMixin):
    """The `quantization_config` of a factorised checkpoint.

    Args:
        format_version: the version of the files' format, see docs/format.md.
        layers: disk name -> storage, rank, block. For people and for checks; shapes decide.
        quant_method: always "lrc".
        extra: anything else that config.json says, carried over when the model is saved.

    Raises:
        InputError: this lrc does not read the format version.
    """

    def __init__(
        self,
        format_version: int = FORMAT_VERSION,
        layers: Mapping[str, Mapping[str, Any]] | None = None,
        quant_method: str = METHOD,
        **extra: Any,
    ) -> None:
        check_version(format_version, WHERE)
        check_table_form({} if layers is None else layers, WHERE)
        self.quant_method = METHOD
        self.format_version = format_version
        self.layers = _checked_table({} if layers is None else layers)
        for key, value in extra.items():
            setattr(self, key, value)


def _checked_table(layers: Any) -> dict[str, dict[str, Any]]:
    if not isinstance(layers, Mapping) or not all(isinstance(x, Mapping) for x in layers.values()):
        raise InputError(
            "the checkpoint's quantization_config has layers that are no table of tables",
            "restore config.json as lrc wrote it",
        )
    return {name: dict(entry) for name, entry in layers.items()}


class LrcQuantizer(HfQuantizer):
    """The class that transformers calls to load, save and multiply out factorised checkpoints."""

    requires_calibration = True  # refuses to factorise a dense checkpoint while loading
    quantization_config: LrcConfig

    @property
    def is_trainable(self) -> bool:
        """True: the factors are ordinary parameters."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """True: the factors can be trained without adapters."""
        return True

    @property
    def is_compileable(self) -> bool:
        """True: torch.compile can trace the layers."""
        return True

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """Returns True: `save_pretrained` writes the disk names again."""
        return True

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        """Checks the headers, and puts slots in the place of the factorised layers."""
        headers = read_headers(checkpoint_files or ())
        table = self.quantization_config.layers
        if converted(model, stored_weights(headers, table)):
            unfuse(model)
        take_apart(model, {key: info for key, info in headers.items() if is_mark(info)})
        found = find_stored(model, headers, table)
        insert_slots(model, found, {*module_names(model, headers).values()})
        check_table(model, table)
        if not found:
            raise InputError(
                f"no factorised layer of {type(model).__name__} is in the checkpoint's files",
                "remove quantization_config from config.json if the checkpoint is dense",
            )

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any) -> list[Any]:
        """Leaves experts' matrices apart where lists have taken the place of fused experts."""
        if has_experts(model):
            weight_conversions = without_merging(weight_conversions)
        return list(super().update_weight_conversions(weight_conversions, model))

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        """Checks that every tensor came from the files, then makes the run-time modules."""
        for name, layer in stored_layers(model):
            if isinstance(layer, LowRankSlot | FormLayer):
                _check_loaded(name, layer)
        finish_slots(model)
        register_lora()
        for name, module in model.named_modules():
            if type(module) is nn.Linear:
                _check_dense(name, module)

    def _dequantize(
        self, model: PreTrainedModel, dtype: torch.dtype | str | None = None
    ) -> PreTrainedModel:
        """Multiplies every layer's factors out, in place."""
        asked = _dtype_of(dtype)
        new: dict[nn.Module, nn.Module] = {
            layer: _dense(layer, asked or _own_dtype(layer, model))
            for _, layer in stored_layers(model)
        }
        replace_modules(model, new)
        put_together(model)
        tied = [part for part in model.modules() if isinstance(part, Tied)]
        replace_modules(model, {part: part.dense(new[part.table]) for part in tied})
        return model

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[None, dict[str, str]]:
        """Writes the layers' disk names into config.json; the tensors need no change.

        A model whose layers have all become dense, as merged adapters may make them, is saved as a
        dense model.

        Raises:
            InputError: adapters are around layers, whose names on disk would be unknown.
        """
        adapted = any(name.endswith(".base_layer") for name, _ in model.named_modules())
        if adapted and not getattr(model, "_hf_peft_config_loaded", False):
            raise InputError(
                f"{type(model).__name__} has adapters of PEFT around its layers",
                "call save_pretrained on the PeftModel, or merge_and_unload() first",
            )
        layers = {f"{name}.weight": layer for name, layer in stored_layers(model)}
        if not layers:
            put_together(model)
            self.remove_quantization_config(model)
            return None, {}
        keys = {key: torch.empty(0, device="meta") for key in layers}
        disk = {id(tensor): key for key, tensor in revert_weight_conversion(model, keys).items()}
        self.quantization_config.layers = {
            disk.get(id(tensor), key).removesuffix(".weight"): layers[key].table_entry()
            for key, tensor in keys.items()
        }
        return None, {}


def _check_loaded(name: str, layer: StoredLayer) -> None:
    """Raises an error for a missing tensor: transformers only warns and leaves random memory."""
    missing = [
        key
        for key, tensor in layer.state_dict(keep_vars=True).items()
        if not tensor.is_meta and not getattr(tensor, "_is_hf_initialized", False)
    ]
    if missing:
        raise damaged(f"layer {name}: {', '.join(missing)} missing from the checkpoint's files")


def _check_dense(name: str, linear: nn.Linear) -> None:
    """Raises an error for a dense weight of another shape, such as an unread factor's.

    With `ignore_mismatched_sizes` transformers would accept the factor as the weight.
    """
    shape = (linear.out_features, linear.in_features)
    if tuple(linear.weight.shape) != shape:
        raise damaged(
            f"layer {name}: weight of shape {tuple(linear.weight.shape)} instead of {shape}"
        )


def _dtype_of(asked: torch.dtype | str | None) -> torch.dtype | None:
    """Returns a data type of dense weights. A saved model's config has the data type's name.

    Raises:
        InputError: the data type is unknown, or holds no fractions.
    """
    dtype = getattr(torch, asked, asked) if isinstance(asked, str) else asked
    if dtype is None or (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        return dtype
    raise InputError(
        f"dequantize: {asked} is no floating-point dtype", "give one such as torch.bfloat16"
    )


def _own_dtype(layer: StoredLayer, model: PreTrainedModel) -> torch.dtype:
    """Returns the dtype of a layer's dense weight: the factors' dtype, or for forms the model's."""
    return layer.dtype if isinstance(layer, LowRankLayer) else model.dtype


def _dense(layer: StoredLayer, dtype: torch.dtype) -> nn.Module:
    """Returns a dense module of the kind that was replaced."""
    weight = dense_weight(layer).to(dtype)
    bias = None if layer.bias is None else layer.bias.detach().to(dtype)
    return dense_module(layer.layout, weight, bias, training=layer.training)


if METHOD not in AUTO_QUANTIZER_MAPPING:
    register_quantization_config(METHOD)(LrcConfig)
    register_quantizer(METHOD)(LrcQuantizer)
