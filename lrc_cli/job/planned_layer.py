"""A plan says of every layer how the layer is fitted and stored, and what the config fixes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from lrc_cli.checkpoint.source import Source
from lrc_cli.config import Compression, Config
from lrc_cli.engine import SOLVERS, Solver, default_rank_multiple
from lrc_cli.execution.precision import DTYPES
from lrc_cli.network.candidates.new_bias import gained_bytes
from lrc_cli.network.layer import Layer


@dataclass(frozen=True, kw_only=True)
class PlannedLayer:
    """A layer with everything that the config and the checkpoint settle before any work."""

    layer: Layer
    solver: Solver
    """How the layer is fitted."""
    method_reason: str | None = None
    """Why the solver is not the config's; None where it is."""
    storage: str
    """The form of storage that is asked for: a key of `STORAGES`."""
    dtype: torch.dtype
    """The dtype that the factors are written in."""
    rank_multiple: int
    """The number that the rank is a multiple of; 1 where the user wrote the rank."""
    gained_bytes: int
    """Bytes of the bias that factorising the layer adds to the checkpoint."""
    fixed_rank: int | None = None
    """The rank that `compression.layers` gives the layer."""
    fixed_size: float | None = None
    """The fraction of its bytes that `compression.layers` gives the layer; 1 leaves it dense."""
    max_layer_error: float | None = None
    """A bound on the plain relative output error that the stored factors must meet."""
    threshold: float | None = None
    """Singular values to cut, as a fraction of the largest; None where it does not set the rank."""


def asked_solvers(compression: Compression, layers: Sequence[Layer]) -> dict[str, Solver]:
    """Returns the solvers that the config names, by layer name."""
    methods = {x.name: compression.override(x.name).method or compression.method for x in layers}
    return {name: SOLVERS[method] for name, method in methods.items()}


def plan_layers(
    config: Config,
    layers: Sequence[Layer],
    source: Source,
    solvers: Mapping[str, Solver],
    reasons: Mapping[str, str],
) -> dict[str, PlannedLayer]:
    """Returns what is planned for every layer, by name and in the order of `layers`.

    Args:
        source: the checkpoint, which tells where a layer would gain a bias.
        solvers: the solver of every layer, by name.
        reasons: why a layer's solver is not the config's, by name.
    """
    return {
        layer.name: _planned(config, layer, source, solvers[layer.name], reasons.get(layer.name))
        for layer in layers
    }


def _planned(
    config: Config, layer: Layer, source: Source, solver: Solver, reason: str | None
) -> PlannedLayer:
    compression = config.compression
    own = compression.override(layer.name)
    dtype = DTYPES.get(config.output.dtype, layer.dtype)
    is_fixed = own.rank is not None or own.size is not None
    return PlannedLayer(
        layer=layer,
        solver=solver,
        method_reason=reason,
        storage=own.storage or compression.storage,
        dtype=dtype,
        rank_multiple=_rank_multiple(compression, layer, own.rank),
        gained_bytes=gained_bytes(layer, source, dtype) if compression.center else 0,
        fixed_rank=own.rank,
        fixed_size=own.size,
        max_layer_error=None if own.rank is not None else compression.max_layer_error,
        threshold=None if is_fixed else compression.threshold,
    )


def _rank_multiple(compression: Compression, layer: Layer, fixed_rank: int | None) -> int:
    asked = compression.rank_multiple
    if fixed_rank is not None or compression.threshold is not None:
        return 1
    return default_rank_multiple(*layer.shape) if asked == "auto" else int(asked)
