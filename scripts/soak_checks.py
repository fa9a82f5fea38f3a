"""Outputs of lrc are rebuilt in float64 by plain code, for scripts/soak.py.

Nothing here imports lrc but `lrc_cli.load`, whose network is compared. The files are read by the
words of docs/format.md: an eight-byte length, a JSON header, the bytes of every tensor.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pico
import torch
import transformers
from numpy.typing import NDArray
from safetensors.torch import save_file
from soak_cases import FACTORIES, ORIGINAL, Batch, Case
from torch import Tensor, nn

import lrc_cli.hf

Arrays = dict[str, NDArray[Any]]

_NUMPY = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I16": "<i2",
          "I8": "i1", "U8": "u1", "BOOL": "?"}  # fmt: skip
UP, PERM, WEIGHT = ".up.weight", ".perm", ".weight"

ROUNDING = 1e-5
"""The largest relative difference of two float64 networks: some of their steps are in float32."""
STEPS = 64
"""As many roundings to the stored dtype add up, in the worst way, on the way to an output."""


class Different(AssertionError):
    """The output of lrc is not what its files, its config or its source say."""


# ---------------------------------------------------------------- files


def hashes(folder: Path, ignored: tuple[str, ...] = ()) -> dict[str, str]:
    """Returns the sha256 of every file below a folder.

    Args:
        ignored: names at the top of the folder that do not count.
    """
    found = {}
    for directory, names, files in os.walk(folder):
        if Path(directory) == folder:
            names[:] = [name for name in names if name not in ignored]
        for name in files:
            file = Path(directory) / name
            if file.parent != folder or name not in ignored:
                digest = hashlib.sha256(file.read_bytes()).hexdigest()
                found[file.relative_to(folder).as_posix()] = digest
    return found


def tensors(path: Path) -> Arrays:
    """Returns all tensors of a .safetensors file or a directory's, floating ones in float64."""
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    return {name: array for file in files for name, array in _tensors_of(file)}


def _tensors_of(file: Path) -> Iterator[tuple[str, NDArray[Any]]]:
    data = file.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    for name, entry in json.loads(data[8:start]).items():
        if name == "__metadata__":
            continue
        first, last = entry["data_offsets"]
        yield name, _decoded(data[start + first : start + last], entry).reshape(entry["shape"])


def _decoded(data: bytes, entry: Mapping[str, Any]) -> NDArray[Any]:
    if entry["dtype"] == "BF16":  # the upper half of a float32
        wide = np.frombuffer(data, "<u2").astype(np.uint32) << 16
        return wide.view(np.float32).astype(np.float64)
    array = np.frombuffer(data, _NUMPY[entry["dtype"]])
    return array.astype(np.float64) if array.dtype.kind == "f" else array.copy()


# ---------------------------------------------------------------- matrices


def rebuilt(output: Path, original: Path) -> Arrays:
    """Returns the dense tensors, float64, that an output stands for, shaped as in the original."""
    state, before = tensors(output), tensors(original)
    for up in [key for key in state if key.endswith(UP)]:
        layer = up.removesuffix(UP)
        # The matrix of a recurrent module keeps a name of its own.
        weight = layer + WEIGHT if layer + WEIGHT in state else layer
        parts = state.pop(weight), state.pop(up), state.pop(layer + PERM, None)
        state[weight] = _matrix(*parts)
    for key, entry in json.loads((output / "report.json").read_text())["fused"].items():
        names = [f"{entry['experts']}.{i}.{entry['part']}" for i in range(len(before[key]))]
        if names[0] in state:  # else none of the module's experts is factorised
            state[key] = np.stack([state.pop(name) for name in names])
    return {key: _shaped(array, before.get(key)) for key, array in state.items()}


def _matrix(inner: NDArray[Any], outer: NDArray[Any], order: NDArray[Any] | None) -> NDArray[Any]:
    """Returns the matrix of both factors; a convolution's keeps its kernel's dimensions."""
    kernel = inner.shape[2:]
    inner, outer = inner.reshape(len(inner), -1), outer.reshape(len(outer), -1)
    product = outer @ inner
    if order is not None:
        groups = np.concatenate([inner, product]).reshape(len(order), -1, inner.shape[1])
        product = groups[order].reshape(-1, inner.shape[1])
    return product.reshape(len(product), -1, *kernel) if kernel else product


def _shaped(array: NDArray[Any], before: NDArray[Any] | None) -> NDArray[Any]:
    """Returns a matrix as the original has it: GPT-2's layers, embeddings, experts are turned."""
    if before is None or array.ndim not in (2, 3):
        return array
    turned = array.swapaxes(-1, -2)
    if array.shape != before.shape:
        return turned
    if array.shape != turned.shape:
        return array
    # A square matrix: the approximation is the nearer of the two.
    return min(array, turned, key=lambda x: float(np.linalg.norm(x - before)))


# ---------------------------------------------------------------- networks


def compare(case: Case, folder: Path, output: Path) -> None:
    """Runs the loaded output beside the dense network with the rebuilt matrices.

    In float64 both networks are the same function. As it is stored, the output's own rounding
    counts as well. (There, a rounding may send a token to other experts, so mixtures are compared
    in float64 alone.)

    Raises:
        Different: the outputs differ by more than rounding, or not at all from the dense network's.
    """
    dense = _dense(case, folder, rebuilt(output, folder / ORIGINAL))
    wanted = _outputs(dense, case)
    _assert_close(_outputs(_loaded(case, output, torch.float64), case), wanted, ROUNDING)
    if not case.network.has_experts:
        stored = _loaded(case, output, None)
        tolerance = max(STEPS * _coarsest(stored), ROUNDING)
        _assert_close(_outputs(stored, case), wanted, tolerance)


def _coarsest(model: nn.Module) -> float:
    floating = {p.dtype for p in model.parameters() if p.dtype.is_floating_point}
    return max(torch.finfo(dtype).eps for dtype in floating)


def _dense(case: Case, folder: Path, state: Arrays) -> nn.Module:
    """Returns the original network in float64 with other numbers in it."""
    known = tensors(folder / ORIGINAL)
    own = {key: torch.from_numpy(x.copy()) for key, x in state.items()}
    added = {key: own.pop(key) for key in set(own) - set(known)}
    if case.network.factory:
        model: nn.Module = _factory(case)().double()
        model.load_state_dict(own)
    else:
        place = folder / "float64"
        place.mkdir()
        (place / "config.json").write_bytes((folder / ORIGINAL / "config.json").read_bytes())
        save_file(own, place / "model.safetensors", {"format": "pt"})
        model = _model_class(folder / ORIGINAL).from_pretrained(place, dtype=torch.float64)
    for key, tensor in added.items():
        _add_bias(model, key, tensor)
    # transformers keeps some modules in float32 whatever it is asked for.
    return _computing_plainly(model.double().eval())


def _add_bias(model: nn.Module, key: str, bias: Tensor) -> None:
    """Gives a layer the bias that `compression.center` made for it."""
    layer, _, name = key.rpartition(".")
    if name != "bias":
        raise Different(f"the output holds {key}, which the source does not have")
    model.get_submodule(layer).register_parameter("bias", nn.Parameter(bias))


def _loaded(case: Case, output: Path, dtype: torch.dtype | None) -> nn.Module:
    if case.by_transformers:
        model = _model_class(output).from_pretrained(output, dtype=dtype or "auto")
        return _computing_plainly((model if dtype is None else model.to(dtype)).eval())
    return _computing_plainly(lrc_cli.load(output, dtype=dtype, factory=case.network.factory))


def _computing_plainly(model: nn.Module) -> nn.Module:
    """Turns the fused kernels of experts off, which take no float64."""
    if isinstance(model, transformers.PreTrainedModel) and hasattr(model.config, "num_experts"):
        model.set_experts_implementation("eager")
    return model


def _model_class(directory: Path) -> Any:
    (name,) = json.loads((directory / "config.json").read_text())["architectures"]
    return getattr(transformers, name)


def _factory(case: Case) -> Any:
    namespace: dict[str, Any] = {}
    exec(pico.FACTORY_SOURCE, namespace)
    return namespace[str(case.network.factory).removeprefix(f"{FACTORIES}:")]


@torch.no_grad()
def _outputs(model: nn.Module, case: Case) -> list[Tensor]:
    dtype = next(p.dtype for p in model.parameters() if p.dtype.is_floating_point)
    inputs: Batch = {
        name: x.to(dtype) if x.is_floating_point() else x for name, x in case.network.inputs.items()
    }
    found = model(*inputs.values()) if case.network.factory else model(**inputs)
    values = [found] if isinstance(found, Tensor) else found.values()
    return [x.double() for x in values if isinstance(x, Tensor) and x.is_floating_point()]


def _assert_close(got: list[Tensor], wanted: list[Tensor], tolerance: float) -> None:
    for number, (one, other) in enumerate(zip(got, wanted, strict=True)):
        error = float((one - other).norm() / other.norm())
        if not error <= tolerance or math.isnan(error):
            raise Different(
                f"output {number} of the loaded network is {error:.2g} off the float64"
                f" reconstruction, more than {tolerance:.2g}"
            )


def bits(output: Path) -> dict[str, str]:
    """Returns the hashes of the files whose bytes are promised: weights, index, config.json."""
    names = [*output.glob("*.safetensors"), *output.glob("*.index.json"), output / "config.json"]
    return {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in names if file.exists()
    }
