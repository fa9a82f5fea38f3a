"""This module makes the inputs of an encoder-decoder's decoder, from texts or recordings."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lrc_cli.data.kinds import Batch

INPUT, MASK = "decoder_input_ids", "decoder_attention_mask"
ENCODER_MASK = "attention_mask"


def scored(batch: Batch) -> tuple[str, str]:
    """The names of two inputs: the tokens that logits are about, and the tokens' mask."""
    return (INPUT, MASK) if INPUT in batch else ("input_ids", ENCODER_MASK)


def takes(module: nn.Module) -> frozenset[str]:
    """The names of the inputs of the module's forward."""
    return frozenset(inspect.signature(module.forward).parameters)


@dataclass(frozen=True, kw_only=True)
class Decoder:
    """The decoder of a network: how it begins and what it is for."""

    start: int
    """The token that stands before the first one."""
    pad: int
    """The token that stands behind the last one of a shorter sequence."""
    generates: bool
    """Whether the network writes texts; false: it only reads texts (classifiers, bare bodies)."""

    def shifted(self, ids: torch.Tensor) -> torch.Tensor:
        """The decoder's input to predict `ids` (sequences, tokens): the ids, one step later."""
        return torch.cat([torch.full_like(ids[:, :1], self.start), ids[:, :-1]], dim=1)

    def padded(self, texts: Sequence[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """The decoder's input to predict texts of several lengths, and the mask of real tokens.

        Args:
            texts: token ids with the special ones that the tokenizer adds.
        """
        # Some tokenizers begin a text with the decoder's start, which is not predicted.
        own = [ids[1:] if ids[:1] == [self.start] else ids for ids in texts]
        rows = [[self.start, *ids[:-1]] for ids in own]
        longest = max(map(len, rows))
        ids = [row + [self.pad] * (longest - len(row)) for row in rows]
        mask = [[1] * len(row) + [0] * (longest - len(row)) for row in rows]
        return torch.tensor(ids), torch.tensor(mask)


def told_apart(inputs: Batch) -> Batch:
    """The inputs with different numbers of tokens for encoder and decoder, if padding differs.

    The number of a layer's rows tells whether they are the encoder's tokens or the decoder's. So
    where both have as many tokens, the decoder loses its last column, if this column is padding.
    Otherwise the encoder loses its last column, if this column is padding. If neither column is
    padding, the decoder is given a column of padding.
    """
    ids, own = inputs.get("input_ids"), inputs.get(INPUT)
    if ids is None or own is None or ids.shape != own.shape:
        return inputs
    masks = [inputs.get(name, torch.ones_like(ids)) for name in (ENCODER_MASK, MASK)]
    if torch.equal(masks[0].bool(), masks[1].bool()):
        return inputs
    names = [(INPUT, MASK), ("input_ids", ENCODER_MASK)]
    others = inputs.keys() - {name for pair in names for name in pair}
    if any(inputs[name].shape[:2] == ids.shape for name in others):
        names.pop()  # the encoder's other inputs, which have a value for every token, would not fit
    for (name, mask_name), mask in zip(names, reversed(masks), strict=False):
        if not bool(mask[:, -1].any()):
            shorter = {name: inputs[name][:, :-1].clone(), mask_name: mask[:, :-1].clone()}
            return {**inputs, **shorter}
    longer = torch.cat([own, own[:, -1:]], dim=1)
    mask = torch.cat([masks[1], torch.zeros_like(masks[1][:, :1])], dim=1)
    return {**inputs, INPUT: longer, MASK: mask}


def is_given(inputs: Batch, name: str) -> bool:
    """Whether the input is a decoder's that `told_apart` gave a column of padding."""
    ids, own, mask = (inputs.get(x) for x in ("input_ids", INPUT, MASK))
    if name != INPUT or ids is None or own is None or mask is None:
        return False
    return own.shape[1] == ids.shape[1] + 1 and not bool(mask[:, -1].any())


def find_decoder(module: nn.Module) -> Decoder | None:
    """The decoder of a transformers model that has one beside its encoder, else None."""
    config: Any = getattr(module, "config", None)
    if config is None or INPUT not in takes(module):
        return None
    # Some models keep these tokens with the settings of generation; T5 begins with padding.
    places = [config, getattr(module, "generation_config", None)]
    start, pad, end = (
        next((found for place in places if (found := getattr(place, name, None)) is not None), None)
        for name in ("decoder_start_token_id", "pad_token_id", "eos_token_id")
    )
    start = pad if start is None else start
    if not isinstance(start, int):
        return None
    pad = pad if isinstance(pad, int) else end if isinstance(end, int) else start
    can_generate = getattr(module, "can_generate", None)
    return Decoder(start=start, pad=pad, generates=can_generate is not None and can_generate())
