"""A network is a module ready to run, whose parameters are views of the checkpoint's files."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lrc_cli.data.draw import Batch
from lrc_cli.execution.placement import Placement
from lrc_cli.execution.precision import LiveCasts, cast_on_read, fast_dtype
from lrc_cli.network.fast_paths import without_fast_paths
from lrc_cli.network.opening import vocabulary_of
from lrc_cli.network.recurrent import observed


@dataclass(frozen=True, kw_only=True)
class Network:
    """A module in evaluation mode whose parameters are views of the checkpoint's files."""

    module: nn.Module
    device: torch.device
    dtype: torch.dtype
    """The dtype of activations."""
    stored: frozenset[torch.dtype]
    """The floating dtypes of the parameters as they are stored."""
    casts: LiveCasts
    placement: Placement

    @property
    def vocabulary(self) -> int:
        """The number of token ids that the network knows; 0 where the network takes no tokens."""
        return vocabulary_of(self.module)

    def __call__(self, batch: Batch) -> Any:
        """Runs a micro-batch; floating-point inputs are converted to the network's dtype."""
        inputs = {
            name: tensor.to(self.device, self.dtype if tensor.is_floating_point() else None)
            for name, tensor in batch.items()
        }
        with observed(self.module, batch), without_fast_paths():
            if not hasattr(self.module, "config") and len(inputs) == 1:
                return self.module(*inputs.values())
            return self.module(**inputs)


def make_network(module: nn.Module, *, device: torch.device, dtype: torch.dtype | None) -> Network:
    """Prepares a module to run: frozen, in evaluation mode, on its device, in its dtype.

    Args:
        module: the module; changed in place.
        device: the device to run on.
        dtype: the dtype of activations; None: the stored dtype where the device multiplies it
            natively, else float32.
    """
    module.requires_grad_(False).eval()
    if hasattr(module, "config") and hasattr(module.config, "use_cache"):
        module.config.use_cache = False
    stored = [p.dtype for p in module.parameters() if p.is_floating_point()]
    dtype = dtype or fast_dtype(device, next(iter(stored), torch.float32))
    casts = cast_on_read(module, dtype)
    placement = Placement(module, device)
    return Network(
        module=module,
        device=device,
        dtype=dtype,
        stored=frozenset(stored),
        casts=casts,
        placement=placement,
    )
