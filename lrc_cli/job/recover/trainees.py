"""Fitted layers are put into the compressed network here, with float32 numbers to train."""

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.utils import parametrize

from lrc_cli.engine.training import Trainee
from lrc_cli.execution.precision import DTYPES, cast_on_read
from lrc_cli.forms import PERM, UP, WEIGHT
from lrc_cli.job.factors.two_networks import TwoNetworks
from lrc_cli.job.plan import Plan
from lrc_cli.job.recover.scope import Start
from lrc_cli.network.keys import BIAS
from lrc_cli.network.layer import Layer
from lrc_cli.network.low_rank.modules import LowRankModule
from lrc_cli.network.parts import part_of


def install(networks: TwoNetworks, start: Start) -> None:
    """Puts the fitted layers into the compressed network, with float32 numbers."""
    for unit, layers in start.plan.units.items():
        tensors, facts = start.fitted(unit)
        for layer in layers:
            own = {key: tensors[key] for key in keys_of(layer) if key in tensors}
            bias = _bias(layer, start.plan)
            own |= {layer.keys.bias: bias} if own and bias is not None else {}
            wide = {k: x.float() if x.is_floating_point() else x for k, x in own.items()}
            networks.install(layer, wide, facts[layer.name])


def _bias(layer: Layer, plan: Plan) -> torch.Tensor | None:
    """Returns a layer's bias (m,) as it is written; None without one."""
    bias = layer.bias(plan.source)
    return None if bias is None else bias.to(DTYPES.get(plan.config.output.dtype, bias.dtype))


def trainees_of(networks: TwoNetworks, layers: Sequence[Layer], start: Start) -> list[Trainee]:
    """Returns the tensors of layers that are trained, and turns their gradients on."""
    trainees = []
    for layer in layers:
        bias = _bias(layer, start.plan)
        parameters = _parameters(networks, layer)
        for key, parameter in parameters.items():
            is_bias = bias is not None and key == layer.keys.bias
            dtype = bias.dtype if is_bias and bias is not None else start.plan.of(layer).dtype
            like = parameters[layer.keys.key(UP)]
            trainees.append(_trainee(key, parameter, dtype, like, start.plan))
    return trainees


def norm_trainees(networks: TwoNetworks, plan: Plan) -> dict[str, list[Trainee]]:
    """Returns the tensors of norms that are trained, by the unit that they are stored with.

    A norm outside all units is stored with the first one.
    """
    network, found = networks.compressed.network, dict[str, list[Trainee]]()
    for key, name in networks.norms.items():
        place, _, leaf = name.rpartition(".")
        part = part_of(network.module, place)
        parameter, like = _own(part, leaf), next(part.parameters())
        inside = (x for x in plan.units if x and f"{name}.".startswith(f"{x}."))
        unit = next(inside, next(iter(plan.units)))
        trainee = _trainee(key, parameter, parameter.dtype, like, plan)
        found.setdefault(unit, []).append(trainee)
        parameter.data = parameter.data.float()
        # A norm whose numbers had the network's dtype goes on being read in this dtype.
        if not parametrize.is_parametrized(part, leaf):
            cast_on_read(part, network.dtype, network.casts)
    return found


def _trainee(
    key: str, parameter: nn.Parameter, dtype: torch.dtype, like: torch.Tensor, plan: Plan
) -> Trainee:
    parameter.data = parameter.data.to(plan.device)
    parameter.requires_grad_(True)
    return Trainee(name=key, parameter=parameter, dtype=dtype, like=like)


def is_factorised(networks: TwoNetworks, layer: Layer) -> bool:
    """Returns whether the compressed network has factors in the place of a layer."""
    return bool(_parameters(networks, layer))


def keys_of(layer: Layer) -> list[str]:
    """Returns the disk names of what may be stored of a layer."""
    return [layer.keys.key(name) for name in (WEIGHT, UP, PERM, BIAS)]


def _parameters(networks: TwoNetworks, layer: Layer) -> dict[str, nn.Parameter]:
    """Returns the parameters of a layer that are trained, by disk name: factors and bias."""
    module = networks.compressed.network.module
    part = part_of(module, layer.tied_to or layer.name)
    if not isinstance(part, LowRankModule):
        return {}
    found = {WEIGHT: _own(part.down, WEIGHT), UP: _own(part.up, WEIGHT)}
    own = part_of(module, layer.name)
    if getattr(own, BIAS, None) is not None:
        found[BIAS] = _own(own, BIAS)
    return {layer.keys.key(name): parameter for name, parameter in found.items()}


def _own(part: nn.Module, name: str) -> nn.Parameter:
    """Returns a parameter that a module holds, which it may read in another dtype."""
    if parametrize.is_parametrized(part, name):
        return part.get_parameter(f"parametrizations.{name}.original")
    return part.get_parameter(name)
