"""A `Placement` copies parameters to the GPU that a network runs on, one block at a time.

Everything outside the blocks (embeddings, norms, heads) and every buffer stays on the GPU. A
block's parameters are copied to the GPU when the block runs. The copies are dropped when the next
block runs, and the originals stay views of the mapped files. On a CPU nothing is ever copied.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from lrc_cli.network.parts import part_of


def block_lists(module: nn.Module) -> list[tuple[str, ...]]:
    """Returns the names in every outermost module list, the list with the most parameters first."""
    lists = {name: part for name, part in module.named_modules() if isinstance(part, nn.ModuleList)}
    outermost = {
        name: part
        for name, part in lists.items()
        if not any(name.startswith(f"{other}.") for other in lists)
    }
    sizes = {name: sum(p.numel() for p in part.parameters()) for name, part in outermost.items()}
    by_size = sorted(sizes, key=lambda name: -sizes[name])
    return [tuple(f"{name}.{i}" for i in range(len(outermost[name]))) for name in by_size]


def block_names(module: nn.Module) -> tuple[str, ...]:
    """Returns the names in the outermost module list with the most parameters; may be empty."""
    return next(iter(block_lists(module)), ())


class Placement:
    """A `Placement` decides which parameters of a module are on the device.

    Args:
        module: on the CPU, with views of mapped files as parameters. The buffers, and copies of the
            parameters outside the blocks, are put on `device` at once.
        device: the device that the module runs on.
    """

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self.module, self.device = module, device
        self.blocks: tuple[str, ...] = ()
        self._copied: list[tuple[nn.Module, str, nn.Parameter]] = []
        """The parameters that are copies now: the module, the name and the original of each."""
        if device.type == "cpu":
            return
        self.blocks = block_names(module)
        inside = {id(part) for block in self._parts() for part in block.modules()}
        outside = [part for part in module.modules() if id(part) not in inside]
        self._copy(outside)
        self._copied.clear()  # these copies stay
        _move_buffers(module, device)
        for block in self._parts():
            block.register_forward_pre_hook(self._before_block)

    def _parts(self) -> Iterator[nn.Module]:
        return (part_of(self.module, name) for name in self.blocks)

    def _before_block(self, block: nn.Module, _: Any) -> None:
        # A block whose forward is replaced only hands on its input, and needs no parameters.
        if "forward" not in vars(block):
            self._occupy(block)

    def occupy(self, name: str) -> None:
        """Copies a block's parameters to the device, and drops the copies of the block before.

        A block that runs does the same by itself; a caller that runs only a part of a block calls
        this method first.

        Args:
            name: the name of a block or of a part of a block; nothing happens for other names.
        """
        for block in self.blocks:
            if f"{name}.".startswith(f"{block}."):
                self._occupy(part_of(self.module, block))

    def _occupy(self, block: nn.Module) -> None:
        own = {id(part) for part in block.modules()}
        if any(id(part) not in own for part, _, _ in self._copied):
            self.release()
        self._copy(block.modules())

    def release(self) -> None:
        """Drops the copies of the block that ran last: modules hold their own parameters again."""
        for part, name, original in self._copied:
            part._parameters[name] = original
        self._copied.clear()

    def _copy(self, parts: Any) -> None:
        """Puts copies on the device in the place of parameters that are elsewhere."""
        copies: dict[int, nn.Parameter] = {}
        for part in parts:
            for name, original in list(part._parameters.items()):
                if original is None or original.device == self.device:
                    continue
                if id(original) not in copies:  # modules may share it
                    copy = original.detach().to(self.device)
                    copies[id(original)] = nn.Parameter(copy, requires_grad=False)
                part._parameters[name] = copies[id(original)]
                self._copied.append((part, name, original))

    def adopt(self, part: nn.Module, name: str) -> None:
        """Moves a new part of the network, which will have this module name, to the device.

        In a block, only the part's buffers move at once.
        """
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
