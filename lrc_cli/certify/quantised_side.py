"""A copy that another tool has quantised is multiplied out through the package that reads it.

transformers loads the copy with the original's class. A layer's matrix is what the layer makes of
the identity, so no format is known here: the package's own code runs. The matrices go into a mapped
temporary file under the original's names, and the original's class runs with them.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lrc_cli.certify.sides import Side, network_names
from lrc_cli.checkpoint.choice import NAMED
from lrc_cli.checkpoint.headers import FLOAT_DTYPES, TensorInfo
from lrc_cli.checkpoint.read_by_others import MODEL_FILES, check_read_by_others
from lrc_cli.checkpoint.source import Source
from lrc_cli.checkpoint.weights import SafetensorsFiles, open_weights
from lrc_cli.data.processors import open_tokenizer
from lrc_cli.errors import InputError, LrcError
from lrc_cli.network.opening import open_module
from lrc_cli.network.size_guard import bounded_building
from lrc_cli.reading import read_json
from lrc_cli.runtime.spill import Spool
from lrc_cli.runtime.strangers import contained
from lrc_cli.text import named

METHOD = "lrc"
"""The method of lrc's own outputs, which are read as they are."""
ROWS = 256
"""The number of rows of the identity that a layer is given at a time."""


class MultipliedOut:
    """A quantised copy's tensors under the original's names, in float32.

    Args:
        weights: the files as they are stored.
        tensors: the tensors, in a mapped file.
    """

    def __init__(self, weights: SafetensorsFiles, tensors: Mapping[str, Tensor]) -> None:
        self.files, self.place = weights.files, weights.place
        self._tensors = tensors
        self.tensors = {
            key: TensorInfo(file=self.place, shape=tuple(x.shape), dtype=x.dtype)
            for key, x in tensors.items()
        }

    def read(self, key: str) -> Tensor:
        """Returns the tensor `key`."""
        return self._tensors[key]


def method_of(path: Path) -> str | None:
    """Returns the method with which another tool has quantised a directory; None: with none.

    Raises:
        InputError: config.json cannot be read.
    """
    file = path / "config.json"
    if not file.is_file():
        return None
    stated = read_json(file).get("quantization_config")
    if not isinstance(stated, dict):
        return None
    method = str(stated.get("quant_method", "an unknown method"))[:80]
    return None if method == METHOD else method


def open_quantised(path: Path, method: str, original: Side) -> Side:
    """Opens a copy that another tool has quantised, for the original's class.

    Raises:
        InputError: the package that reads it is missing or fails here, or the copy is none of this
            original.
    """
    config = read_json(path / "config.json")
    weights = open_weights(path, config.get(NAMED))
    if not isinstance(weights, SafetensorsFiles):
        raise InputError(
            f"{path}: is quantised ({method}) and no safetensors",
            "save it as safetensors: other forms may hold code",
        )
    check_read_by_others(path, MODEL_FILES)
    stored = Source(path=path, config=config, weights=weights)
    model = _loaded(stored, method, original)
    tensors = _dense(model, original, path)
    view = replace(
        original.source,
        weights=MultipliedOut(weights, tensors),
        copies={},
        fused={},
        unwrapped={},
        lacking=(),
    )
    del model
    module, view = open_module(view, factory=None)
    tokenizer = open_tokenizer(stored)
    beside = tuple(sorted(file for file in path.glob("*.json") if file not in stored.decisive))
    return Side(
        module=module,
        source=view,
        tokenizer=tokenizer,
        form=f"quantised, {method}",
        path=path,
        files=(*stored.decisive, *beside),
        num_bytes=sum(info.num_bytes for info in weights.tensors.values()),
        notes=(f"The copy was loaded by transformers through the package that reads {method}.",),
    )


def _loaded(stored: Source, method: str, original: Side) -> nn.Module:
    """Returns the copy as transformers loads it."""
    model_class: Any = type(original.module)
    try:
        with contained(), bounded_building(stored):
            model = model_class.from_pretrained(
                stored.path,
                dtype=torch.float32,
                local_files_only=True,
                use_safetensors=True,
                **_dense_option(stored),
            )
    except LrcError:
        raise
    except Exception as error:  # the packages raise anything
        raise InputError(
            f"{stored.path}: is quantised ({method}), and transformers cannot load it here:"
            f" {named(error)[:300]}",
            "install the package that reads it, see docs/certify.md for what runs on a CPU",
        ) from error
    found: nn.Module = model.eval()
    return found


def _dense_option(stored: Source) -> dict[str, Any]:
    """Returns the option that lets a package multiply out by itself, where the package can."""
    from transformers.quantizers.auto import AutoQuantizationConfig

    config = AutoQuantizationConfig.from_dict((stored.config or {})["quantization_config"])
    if not hasattr(config, "dequantize"):
        return {}
    config.dequantize = True
    return {"quantization_config": config}


@torch.no_grad()
def _dense(model: nn.Module, original: Side, path: Path) -> dict[str, Tensor]:
    """Returns the copy's tensors by the original's keys, each multiplied out."""
    spool, found = Spool(), {}
    state: dict[str, Any] = model.state_dict()
    for key, name in network_names(original.module, original.source.tensors).items():
        wanted = original.source.tensors[key]
        own: Any = state.get(name)
        # Some packages keep packed numbers in a class of tensors of their own.
        if type(own) not in (Tensor, nn.Parameter) or not _has(own, wanted.shape):
            own = _matrix(model, name, wanted.shape, path)
        found[key] = spool.empty(wanted.shape, torch.float32)
        found[key].copy_(own)
    return found


def _has(own: Tensor, shape: tuple[int, ...]) -> bool:
    return own.dtype in FLOAT_DTYPES and tuple(own.shape) == shape


def _matrix(model: nn.Module, name: str, shape: tuple[int, ...], path: Path) -> Tensor:
    """Returns what a layer makes of the identity."""
    layer = dict(model.named_modules()).get(name.removesuffix(".weight"))
    if layer is None or not name.endswith(".weight") or len(shape) != 2:
        raise InputError(
            f"{path}: the copy has no tensor {name} of shape {shape}",
            "compare it with the checkpoint that it was made from",
        )
    try:
        with contained():
            offset = layer(torch.zeros(1, shape[1]))
            parts = [layer(rows) - offset for rows in torch.eye(shape[1]).split(ROWS)]
    except LrcError:
        raise
    except Exception as error:  # the package's kernel may not run on this machine
        raise InputError(
            f"{path}: the layer {name} does not run here: {named(error)[:300]}",
            "see docs/certify.md for what runs on a CPU",
        ) from error
    return torch.cat(parts).float().T
