"""Fitted layers are put into the compressed network here, with float32 numbers to train."""

from collections.abc import Sequence

from torch import nn
from torch.nn.utils import parametrize

from lrc_cli.engine.training import Trainee
from lrc_cli.forms import PERM, UP, WEIGHT
from lrc_cli.job.factors.two_networks import TwoNetworks
from lrc_cli.job.recover.scope import Start
from lrc_cli.network.keys import BIAS
from lrc_cli.network.layer import Layer
from lrc_cli.network.low_rank.modules import LowRankModule


def install(networks: TwoNetworks, start: Start) -> None:
    """Puts the fitted layers into the compressed network, with float32 numbers."""
    for unit, layers in start.plan.units.items():
        tensors, facts = start.fitted(unit)
        for layer in layers:
            own = {key: tensors[key] for key in keys_of(layer) if key in tensors}
            wide = {k: x.float() if x.is_floating_point() else x for k, x in own.items()}
            networks.install(layer, wide, facts[layer.name])


def trainees_of(networks: TwoNetworks, layers: Sequence[Layer], start: Start) -> list[Trainee]:
    """Returns the tensors of layers that are trained, and turns their gradients on."""
    trainees = []
    for layer in layers:
        for key, parameter in _parameters(networks, layer).items():
            parameter.data = parameter.data.to(start.plan.device)
            parameter.requires_grad_(True)
            dtype = start.plan.of(layer).dtype
            trainees.append(Trainee(name=key, parameter=parameter, dtype=dtype))
    return trainees


def keys_of(layer: Layer) -> list[str]:
    """Returns the disk names of what may be stored of a layer."""
    return [layer.keys.key(name) for name in (WEIGHT, UP, PERM, BIAS)]


def _parameters(networks: TwoNetworks, layer: Layer) -> dict[str, nn.Parameter]:
    """Returns the parameters of a layer that are trained, by disk name: both factors."""
    module = networks.compressed.network.module.get_submodule(layer.tied_to or layer.name)
    if not isinstance(module, LowRankModule):
        return {}
    parts = {WEIGHT: module.down, UP: module.up}
    return {layer.keys.key(name): _own_weight(part) for name, part in parts.items()}


def _own_weight(part: nn.Module) -> nn.Parameter:
    """Returns the weight that a module holds, which it may read in another dtype."""
    if parametrize.is_parametrized(part, "weight"):
        return part.get_parameter("parametrizations.weight.original")
    return part.get_parameter("weight")
