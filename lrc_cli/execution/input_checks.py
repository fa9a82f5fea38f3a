"""These checks tell before the work begins whether a network can take its sequences."""

import inspect
import math
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from lrc_cli.checkpoint.source import Source
from lrc_cli.data.decoder import INPUT as DECODER_INPUT
from lrc_cli.data.decoder import MASK as DECODER_MASK
from lrc_cli.data.decoder import is_given, takes
from lrc_cli.data.draw import Batch, Sequences
from lrc_cli.data.padding import MASKS
from lrc_cli.errors import InputError
from lrc_cli.execution.glance import glance
from lrc_cli.execution.hooks import around_calls
from lrc_cli.execution.network import Network, NetworkError
from lrc_cli.execution.outputs import all_finite, floating_outputs
from lrc_cli.execution.precision import DTYPES
from lrc_cli.execution.weight_use import Use, observe
from lrc_cli.network.layer import Layer
from lrc_cli.network.missing import lacks, unfilled
from lrc_cli.network.opening import vocabulary_of
from lrc_cli.text import told

FILLINGS = 8
"""How often parameters that the files lack are filled with other noise: a comparison of which
nothing else is known comes out the same each time in one case of 128."""
OF_DTYPES = re.compile(
    r"scalar type|same d(ata)?.?type|mixed dtype|have the same type|should be the same$"
    r"|'(Half|BFloat16)'"
)
"""What torch says where an operation meets two data types, or one that it does not know."""


def check_sequences(sequences: dict[str, Sequences], module: nn.Module, source: Source) -> None:
    """Raises InputError if the module cannot take the sequences of a purpose."""
    known = vocabulary_of(module)
    for name, drawn in sequences.items():
        check_inputs(module, name, drawn.inputs)
        _check_main_input(module, name, drawn.inputs)
        longest = (source.config or {}).get("max_position_embeddings")
        for ids, mask in (("input_ids", "attention_mask"), (DECODER_INPUT, DECODER_MASK)):
            if ids in drawn.inputs:
                _check_tokens(name, drawn.inputs, ids, mask, longest=longest, known=known)
        for mask in MASKS:
            if mask in drawn.inputs and drawn.inputs[mask].ndim == 2:
                _check_mask(f"{name}: {mask}", drawn.inputs[mask])


def _check_mask(name: str, mask: torch.Tensor) -> None:
    """Raises InputError unless a mask (sequences, tokens) has 1 for real tokens and 0 for padding.

    A mask that is added to scores has 0 for real tokens, and would be taken the wrong way round.
    Layers are measured on the tokens with a 1, and what a network makes of a share is its own.
    """
    remedy = (
        "give 1 for real tokens and 0 for padding, or give masks that are something else another"
        " name"
    )
    if not bool(mask.bool().any()):
        raise InputError(f"{name} is 0 everywhere: there is no real token in it", remedy)
    others = mask[(mask != 0) & (mask != 1)]
    if len(others):
        what = f"{name} holds {others[0].item():g}, and a mask of tokens has 0 and 1 only"
        raise InputError(what, remedy)


def _check_main_input(module: nn.Module, name: str, inputs: Batch) -> None:
    """Raises InputError if the main input is missing: transformers would fail on its default."""
    main = _main_input(module)
    if main in takes(module) and not {main, "inputs_embeds"} & set(inputs):
        raise _lacks(name, str(main), inputs)


def _main_input(part: nn.Module) -> str | None:
    """Returns the name of the main input of a transformers model; None of other modules."""
    # Who has such a model has imported its class; other networks are spared the import.
    modeling = sys.modules.get("transformers.modeling_utils")
    if modeling is None or not isinstance(part, modeling.PreTrainedModel):
        return None
    return str(part.main_input_name)


def _lacks(name: str, needed: str, inputs: Batch) -> InputError:
    return InputError(
        f"{name}: the model needs the input {needed!r}, and the data offers {', '.join(inputs)}",
        "give data of the kind that the model takes: see docs/inputs.md",
    )


@torch.no_grad()
def _first_not_finite(network: Network, batch: Batch) -> str | None:
    """Returns the first module without submodules that makes NaN or infinity of finite inputs."""
    found: list[str] = []

    def look(name: str, args: Any, kwargs: Any, output: Any) -> None:
        if not found and all_finite((args, kwargs)) and not all_finite(output):
            found.append(name)

    parts = network.module.named_modules()
    names = [name for name, part in parts if not list(part.children())]
    with around_calls(network.module, names, after=look):
        glance(network, batch)
    return found[0] if found else None


def _other_inputs(module: nn.Module) -> list[str]:
    """Returns the inputs that the parts of a transformers model read; some may be optional."""
    parts = filter(None, map(_main_input, module.modules()))
    return [name for name in dict.fromkeys([*parts, DECODER_INPUT]) if name in takes(module)]


def _check_tokens(
    name: str, inputs: Batch, ids_name: str, mask_name: str, *, longest: Any, known: int
) -> None:
    """Raises InputError unless ids (sequences, tokens) are known tokens, with a mask that fits."""
    ids, mask = inputs[ids_name], inputs.get(mask_name)
    if ids.is_floating_point() or ids.dtype == torch.bool or ids.ndim != 2 or not ids.shape[1]:
        raise InputError(
            f"{name}: {ids_name} are {ids.dtype} of shape {tuple(ids.shape)}",
            "give integers of shape (sequences, tokens)",
        )
    if mask is not None and mask.shape != ids.shape:
        raise InputError(
            f"{name}: {mask_name} has shape {tuple(mask.shape)}, {ids_name} {tuple(ids.shape)}",
            "give one entry of the mask for every token",
        )
    if mask is not None and not bool(mask.bool().any(dim=1).all()):
        empty = int((~mask.bool().any(dim=1)).nonzero()[0])
        raise InputError(
            f"{name}: {mask_name} leaves nothing of sequence {empty}", "leave that sequence out"
        )
    if isinstance(longest, int) and ids.shape[1] == longest + 1 and is_given(inputs, ids_name):
        raise InputError(
            f"{name}: encoder and decoder both have {longest} tokens, which is all the model's "
            "positions, and other padding, so that their layers' rows cannot be told apart",
            "leave out the last token of either, or give both the same padding",
        )
    if isinstance(longest, int) and ids.shape[1] > longest:
        raise InputError(
            f"{name}: sequence_length {ids.shape[1]} exceeds the model's {longest} positions",
            f"set it to {longest} or less",
        )
    lowest, highest = int(ids.min()), int(ids.max())
    if lowest < 0 or 0 < known <= highest:
        wrong = lowest if lowest < 0 else highest
        why = "is negative" if wrong < 0 else f"is not one of the {known} that the model knows"
        raise InputError(f"{name}: token {wrong} {why}", "give the checkpoint its own tokenizer")


def _kinds(sequences: Mapping[str, Sequences]) -> dict[str, tuple[str, Batch]]:
    """Returns a purpose and its first sequence for each kind of inputs: names and shapes."""
    kinds: dict[str, tuple[str, Batch]] = {}
    for name, drawn in sequences.items():
        batch = next(drawn.batches(1))
        shapes = ", ".join(f"{key} {tuple(x.shape)}" for key, x in batch.items())
        kinds.setdefault(shapes, (name, batch))
    return kinds


def check_unused(network: Network, sequences: Mapping[str, Sequences], source: Source) -> None:
    """Raises InputError if the outputs depend on parameters that the files lack.

    Different noise in the parameters' place, and NaN, must give the very same finite outputs: a
    comparison or a maximum passes NaN on as a number. The parameters are NaN again in the end.
    """
    if not source.lacking:
        return
    tensors = list(unfilled(network.module, source.lacking))
    for name, batch in _kinds(sequences).values():
        runs = (_outputs_with(network, batch, tensors, seed) for seed in (*range(FILLINGS), None))
        first, *others = runs
        same = first is not None and all(_is_same(first, other) for other in others)
        if not same or not all_finite(first):
            why = f", and the network's outputs on {name} depend on it"
            raise lacks(network.module, source, source.lacking, why=why)


@torch.no_grad()
def _outputs_with(
    network: Network, batch: Batch, tensors: Sequence[torch.Tensor], seed: int | None
) -> list[torch.Tensor] | None:
    """Returns the outputs with tensors that hold noise, or NaN; None where the code fails."""
    noise = torch.Generator().manual_seed(seed or 0)
    for tensor in tensors:
        tensor.copy_(torch.randn(tensor.shape, generator=noise) * (math.nan if seed is None else 1))
    try:
        return floating_outputs(glance(network, batch))
    except NetworkError:
        return None


def _is_same(first: list[torch.Tensor], second: list[torch.Tensor] | None) -> bool:
    if second is None or len(first) != len(second):
        return False
    return all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@torch.no_grad()
def ignored_inputs(network: Network, sequences: Mapping[str, Sequences]) -> list[str]:
    """Returns a sentence for every input that a forward takes only by **kwargs and does not use.

    The outputs on a sequence are the same numbers without such an input.
    """
    named = inspect.signature(network.module.forward).parameters
    notes = []
    for name, batch in _kinds(sequences).values():
        extra = [key for key in batch if key not in named] if len(batch) > 1 else []
        for key in extra:
            rest = {other: tensor for other, tensor in batch.items() if other != key}
            try:
                both = [floating_outputs(glance(network, inputs)) for inputs in (batch, rest)]
            except NetworkError:  # the code looks for the input
                continue
            if _is_same(*both):
                notes.append(
                    f"{name}: the network takes the input {key!r} and does not use it: its"
                    " outputs are the same without"
                )
    return notes


def probe(
    network: Network, sequences: dict[str, Sequences], layers: Sequence[Layer] = ()
) -> list[Use]:
    """Runs the network on the first sequence of every kind of inputs.

    The sequences are the user's, and the network's code may be the user's, so both may be wrong.

    Returns:
        How each run has used the layers.

    Raises:
        InputError: the forward pass fails, or its result is not finite; the message names the
            shapes.
    """
    uses = list[Use]()
    for shapes, (name, batch) in _kinds(sequences).items():
        # An error of the network's code may come from an input that is missing.
        try:
            with torch.no_grad():
                outputs, use = observe(network, layers, batch)
        except NetworkError as error:
            for needed in _other_inputs(network.module):
                if not {needed, "inputs_embeds"} & set(batch):
                    raise _lacks(name, needed, batch) from error
            raise InputError(
                f"{name}: the network fails on {shapes}: {error.reason}",
                _remedy_for_failure(network, error.cause),
            ) from error
        uses.append(use)
        # The errors that are certified need outputs that are finite numbers.
        found = floating_outputs(outputs)
        if not found:
            raise InputError(
                f"{name}: the network returns no floating-point tensor on {shapes}",
                "give a model.factory whose forward returns what it computes",
            )
        if not any(tensor.numel() for tensor in found):
            returned = ", ".join(str(tuple(tensor.shape)) for tensor in found[:4])
            raise InputError(
                f"{name}: the network {type(network.module).__name__} returns nothing but tensors"
                f" without entries ({returned}) on {shapes}",
                "give a model.factory whose forward returns what it computes",
            )
        if not all_finite(found):
            part = _first_not_finite(network, batch)
            first = f", first behind {part}" if part else ""
            raise InputError(
                f"{name}: the network's outputs are NaN or infinite on {shapes}{first}",
                "set runtime.dtype: float32, look for a damaged weight, or exclude the layers from"
                " whose weights the network makes something that it keeps",
            )
    return uses


def _remedy_for_failure(network: Network, error: BaseException) -> str:
    """Returns what may help against an error of the network's code on the user's data."""
    if not OF_DTYPES.search(told(error)):
        return "check the data against what its forward takes"
    name = str(network.dtype).removeprefix("torch.")
    others = [n for n, dtype in DTYPES.items() if dtype in network.stored and n != name]
    if not others:
        return f"let its forward compute in one data type: here, inputs and weights are {name}"
    return (
        f"inputs and weights are {name} here, and the checkpoint has {others[0]}: set"
        f" runtime.dtype: {others[0]}, or let its forward compute in the data type of its input"
    )


def check_inputs(module: nn.Module, purpose: str, batch: Batch) -> None:
    """Raises InputError if the data does not offer what the module's forward needs."""
    parameters = inspect.signature(module.forward).parameters
    if len(batch) == 1 and not hasattr(module, "config"):
        # A single input is handed over by position, so its name does not matter.
        batch = dict(zip(parameters, batch.values(), strict=False))
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    unknown = sorted(set(batch) - set(parameters))
    if unknown and not takes_any:
        raise InputError(
            f"{purpose}: the data offers {unknown[0]!r}, which the model does not take",
            f"name the tensors after its inputs: {', '.join(parameters)}",
        )
    needed = [
        name
        for name, p in parameters.items()
        if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    ]
    missing = sorted(set(needed) - set(batch))
    if missing:
        raise InputError(
            f"{purpose}: the model needs the input {missing[0]!r}", "add it to the data"
        )
