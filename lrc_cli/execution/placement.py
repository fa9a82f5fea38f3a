"""Which parameters are on the device that a network runs on: on a GPU, one block at a time.

Everything outside the blocks (embeddings, norms, heads) and every buffer stays there. A block's
parameters are copied there when it runs, and the copies are dropped when the next block does: the
originals stay views of the mapped files. On a CPU nothing is ever copied.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn


def block_names(module: nn.Module) -> tuple[str, ...]:
    """Entries of the outermost module list with the most parameters; empty where there is none."""
    lists = {name: part for name, part in module.named_modules() if isinstance(part, nn.ModuleList)}
    outermost = {
        name: part
        for name, part in lists.items()
        if not any(name.startswith(f"{other}.") for other in lists)
    }
    if not outermost:
        return ()
    sizes = {name: sum(p.numel() for p in part.parameters()) for name, part in outermost.items()}
    largest = max(sizes, key=lambda name: sizes[name])
    return tuple(f"{largest}.{i}" for i in range(len(outermost[largest])))


class Placement:
    """Where the parameters of a module are.

    Args:
        module: on the CPU, its parameters views of mapped files; its buffers, and the parameters
            of everything but its blocks, are moved to `device`.
    """

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self.module, self.device = module, device
        self.blocks: tuple[str, ...] = ()
        self._copied: list[tuple[nn.Module, str, nn.Parameter]] = []
        """Whose parameter of which name is a copy now, and its original."""
        if device.type == "cpu":
            return
        self.blocks = block_names(module)
        inside = {id(part) for block in self._parts() for part in block.modules()}
        outside = [part for part in module.modules() if id(part) not in inside]
        self._copy(outside)
        self._copied.clear()  # they stay
        _move_buffers(module, device)
        for block in self._parts():
            block.register_forward_pre_hook(self._before_block)

    def _parts(self) -> Iterator[nn.Module]:
        return (self.module.get_submodule(name) for name in self.blocks)

    def _before_block(self, block: nn.Module, _: Any) -> None:
        # A block whose forward is replaced hands its input on, and needs no parameters.
        if "forward" not in vars(block):
            self._occupy(block)

    def occupy(self, name: str) -> None:
        """Copy a block's parameters to the device, and drop those of the block before.

        It happens by itself when a block runs; this is for calls of a part of it.

        Args:
            name: of a block or of a part of one; nothing happens for anything else.
        """
        for block in self.blocks:
            if f"{name}.".startswith(f"{block}."):
                self._occupy(self.module.get_submodule(block))

    def _occupy(self, block: nn.Module) -> None:
        own = {id(part) for part in block.modules()}
        if any(id(part) not in own for part, _, _ in self._copied):
            for part, name, original in self._copied:
                part._parameters[name] = original
            self._copied.clear()
        self._copy(block.modules())

    def _copy(self, parts: Any) -> None:
        """Put copies on the device in the place of parameters that are elsewhere."""
        copies: dict[int, nn.Parameter] = {}
        for part in parts:
            for name, original in list(part._parameters.items()):
                if original is None or original.device == self.device:
                    continue
                if id(original) not in copies:  # several modules may share one
                    copy = original.detach().to(self.device)
                    copies[id(original)] = nn.Parameter(copy, requires_grad=False)
                part._parameters[name] = copies[id(original)]
                self._copied.append((part, name, original))

    def adopt(self, part: nn.Module, name: str) -> None:
        """Make room for a new part of the network that will have this module name."""
        if self.device.type == "cpu":
            return
        if any(name.startswith(f"{block}.") for block in self.blocks):
            _move_buffers(part, self.device)
        else:
            part.to(self.device)


def _move_buffers(module: nn.Module, device: torch.device) -> None:
    for part in module.modules():
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = buffer.to(device)
