"""A network is a module ready to run, whose parameters are views of the checkpoint's files."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from lrc_cli.data.draw import Batch
from lrc_cli.errors import LrcError, RunError, is_out_of_memory
from lrc_cli.execution.placement import Placement
from lrc_cli.execution.precision import LiveCasts, cast_on_read, fast_dtype
from lrc_cli.network.fast_paths import without_fast_paths
from lrc_cli.network.opening import vocabulary_of
from lrc_cli.network.parts import part_of
from lrc_cli.network.recurrent import observed
from lrc_cli.runtime.strangers import is_interrupt
from lrc_cli.text import named, told


class StopForward(Exception):
    """A hook raises this error when it has seen enough: the rest of the segment is not run."""


class NetworkError(RunError):
    """A network's own code failed, which may be the user's.

    Args:
        cause: the error that the code raised.
        where: the name of the innermost module that was running.
    """

    has_trace = True

    def __init__(self, cause: BaseException, where: str) -> None:
        self.cause = cause
        self.reason = f"{named(cause)}, in module {where}"
        remedy = "its code must take every sequence of the data, in every pass"
        if "nference tensor" in told(cause):
            remedy = "use torch.no_grad in its code in place of torch.inference_mode"
        super().__init__(f"the network fails: {self.reason}", remedy)


@contextmanager
def blaming(module: nn.Module) -> Iterator[None]:
    """A context in which a network's code runs: every failure of the code is a NetworkError.

    Failures of lrc, of the system and of memory, and signals, stay what they are.
    """
    try:
        yield
    except (LrcError, OSError, StopForward):
        raise
    except BaseException as error:
        if is_out_of_memory(error) or is_interrupt(error):
            raise
        raise NetworkError(error, _place_of(error, module)) from error


class OutputsDiffer(RunError):
    """What a network returned cannot be read, or not together with what it returned before.

    Args:
        cause: the error of the first operation that failed on the outputs.
        network: the network.
    """

    has_trace = True

    def __init__(self, cause: Exception, network: nn.Module) -> None:
        why = cause.message if isinstance(cause, LrcError) else named(cause)
        super().__init__(
            f"the outputs of the network {type(network).__name__} cannot be compared with earlier"
            f" ones: {why}",
            "its forward must return the same kind of tensors in every pass",
        )


@contextmanager
def reading_outputs(network: "Network") -> Iterator[None]:
    """A context in which outputs of a network are read, whose code may return anything.

    Raises:
        OutputsDiffer: an operation on the outputs failed.
    """
    try:
        yield
    except (RunError, OSError):
        raise
    except Exception as error:  # also an InputError, because the first pass has been long ago
        if is_out_of_memory(error):
            raise
        raise OutputsDiffer(error, network.module) from error


def _place_of(error: BaseException, network: nn.Module) -> str:
    """Returns the name of the innermost module in an error's trace; the network has its class's."""
    whole = type(network).__name__
    names = {id(module): name or whole for name, module in network.named_modules()}
    found, step = whole, error.__traceback__
    while step is not None:
        # The first argument of a module's forward is the module, whatever it is called.
        code, variables = step.tb_frame.f_code, step.tb_frame.f_locals
        if code.co_argcount and id(variables.get(code.co_varnames[0])) in names:
            found = names[id(variables[code.co_varnames[0]])]
        step = step.tb_next
    return found


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
    apart: dict[tuple[str, ...], bool] = field(default_factory=dict)
    """Whether blocks, by their names, do by themselves what they do in a whole pass."""
    glances: dict[tuple[Any, ...], bool] = field(default_factory=dict)
    """Whether it makes outputs for some positions only, by names and shapes of inputs: what
    `glance` has tried out."""

    @property
    def vocabulary(self) -> int:
        """The number of token ids that the network knows; 0 where the network takes no tokens."""
        return vocabulary_of(self.module)

    def __call__(self, batch: Batch) -> Any:
        """Runs a micro-batch; floating-point inputs are converted to the network's dtype.

        The network gets copies, because its code may change its inputs in place.
        """
        inputs = {
            name: tensor.to(
                self.device, self.dtype if tensor.is_floating_point() else None, copy=True
            )
            for name, tensor in batch.items()
        }
        with blaming(self.module), observed(self.module, batch), without_fast_paths():
            if not hasattr(self.module, "config") and len(inputs) == 1:
                return self.module(*inputs.values())
            return self.module(**inputs)

    def run_block(self, name: str, batch: Batch, args: Any, kwargs: Any) -> Any:
        """Runs one block on the arguments that the network gives the block for a micro-batch."""
        block = part_of(self.module, name)
        with blaming(self.module), observed(block, batch), without_fast_paths():
            return block(*args, **kwargs)


def make_network(module: nn.Module, *, device: torch.device, dtype: torch.dtype | None) -> Network:
    """Prepares a module to run: frozen, in evaluation mode, on its device, in its dtype.

    Args:
        module: the module; changed in place.
        device: the device to run on.
        dtype: the dtype of activations; None: the stored dtype where the device multiplies it
            natively, else float32.
    """
    with blaming(module):
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
