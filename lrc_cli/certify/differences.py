"""What differs beside the weights is said here, and what makes outputs incomparable is refused."""

from collections.abc import Iterator
from typing import Any

import torch

from lrc_cli.certify.sides import Side
from lrc_cli.data.draw import Sequences
from lrc_cli.errors import InputError
from lrc_cli.execution.glance import glance
from lrc_cli.execution.network import Network, NetworkError
from lrc_cli.execution.outputs import floating_outputs
from lrc_cli.text import count, some_of

NOT_THE_NETWORK = frozenset(
    {"_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache",
     "quantization_config"}
)  # fmt: skip
"""The keys of config.json that do not change what a network computes."""
MOST_DIFFERENCES = 20
"""The most keys of config.json whose difference is said."""
READ_AGAIN = 4
"""The number of sequences that both tokenizers read."""


def differences(original: Side, copy: Side, sequences: Sequences) -> tuple[str, ...]:
    """Returns the differences of two networks and their tokenizers, in sentences.

    Args:
        original: the original.
        copy: the copy.
        sequences: sequences that the original's tokenizer has made.

    Raises:
        InputError: a token has two numbers, so that the outputs are about different things.
    """
    tokenizers = _of_tokenizers(original, copy, sequences)
    return (*copy.notes, *_of_modules(original, copy), *tokenizers)


def _of_modules(original: Side, copy: Side) -> Iterator[str]:
    names = [type(side.module).__name__ for side in (original, copy)]
    if names[0] != names[1]:
        yield f"The original is run as {names[0]}, the copy as {names[1]}."
    first, second = (_scalars(side) for side in (original, copy))
    keys = [key for key in first | second if first.get(key) != second.get(key)]
    for key in keys[:MOST_DIFFERENCES]:
        old, new = (str(side.get(key, "nothing"))[:80] for side in (first, second))
        yield f"config.json has {key}: {old} in the original, {new} in the copy."
    if len(keys) > MOST_DIFFERENCES:
        yield f"config.json differs in {count(len(keys) - MOST_DIFFERENCES)} more keys."


def _scalars(side: Side) -> dict[str, Any]:
    """Returns the numbers, words and truth values at the top of config.json."""
    found = side.source.config or {}
    scalars = (str, int, float, bool, type(None))
    return {
        key: value
        for key, value in found.items()
        if key not in NOT_THE_NETWORK and isinstance(value, scalars) and value is not None
    }


def _of_tokenizers(original: Side, copy: Side, sequences: Sequences) -> Iterator[str]:
    one, other = original.tokenizer, copy.tokenizer
    if "input_ids" not in sequences.inputs or one is None:
        return
    if other is None:
        yield "The copy has no tokenizer: the original's was used for both."
        return
    first, second = one.get_vocab(), other.get_vocab()
    moved = [token for token, number in first.items() if second.get(token, number) != number]
    if moved:
        token = min(moved)
        raise InputError(
            f"{original.path} and {copy.path} have different tokenizers:"
            f" {token!r:.40} is number {first[token]} in one and {second[token]} in the other",
            "compare a copy that has the original's tokenizer: outputs of others are about other"
            " tokens",
        )
    for side, more in (("original", set(first) - set(second)), ("copy", set(second) - set(first))):
        if more:
            yield f"Only the {side}'s tokenizer has {some_of(more)}."
    texts = [
        one.decode(ids, skip_special_tokens=True)
        for ids in sequences.inputs["input_ids"][:READ_AGAIN]
    ]
    differing = sum(one(text)["input_ids"] != other(text)["input_ids"] for text in texts)
    if differing:
        yield (
            f"The two tokenizers read {differing} of {len(texts)} sequences differently: both"
            " networks were given the tokens of the original's."
        )


@torch.no_grad()
def check_outputs(before: Network, after: Network, sequences: Sequences, name: str) -> None:
    """Raises InputError unless both networks' outputs on a sequence can be compared.

    Args:
        before: the original, which has been tried out on the sequences.
        after: the copy.
        sequences: sequences of the population.
        name: the path of the copy.
    """
    batch = next(sequences.batches(1))
    try:
        outputs = glance(before, batch), glance(after, batch)
    except NetworkError as error:
        raise InputError(
            f"{name}: the copy fails on a sequence that the original takes: {error.reason}",
            "check that it is a copy of this original",
        ) from error
    found = [floating_outputs(x) for x in outputs]
    shapes = [str(tuple(x[0].shape)) if x else "no numbers" for x in found]
    kinds = [getattr(x, "logits", None) is not None for x in outputs]
    if shapes[0] != shapes[1] or kinds[0] != kinds[1]:
        words = [
            f"{shape}{' (logits)' if is_logits else ''}"
            for shape, is_logits in zip(shapes, kinds, strict=True)
        ]
        raise InputError(
            f"{name}: the outputs cannot be compared: the original returns {words[0]} on a"
            f" sequence, the copy {words[1]}",
            "compare a copy with the same head and the same vocabulary",
        )
