"""Masks tell which positions of a micro-batch are real tokens and which are padding."""

import torch

from lrc_cli.data.decoder import MASK
from lrc_cli.data.kinds import Batch

MASKS = ("attention_mask", MASK)
"""The names of inputs that are masks."""
Masks = tuple[torch.Tensor, ...]


def masks_of(batch: Batch) -> Masks:
    """The masks of real tokens: the mask of the encoder or only network, and a decoder's mask.

    Each has the shape (sequences, tokens). A mask of another shape tells of pairs of tokens, say,
    and no token by itself is padding.
    """
    given = (batch[name] for name in MASKS if name in batch)
    return tuple(mask for mask in given if mask.ndim == 2)


def unpadded(tensor: torch.Tensor, masks: Masks) -> torch.Tensor:
    """The entries of real tokens, (rows, ...), of a tensor that has an entry for every token.

    Any other tensor, with one entry per sequence for instance, is returned as it is.

    Args:
        tensor: (sequences, tokens, ...) or, flattened by the model, (sequences * tokens, ...).
        masks: (sequences, tokens) each, true where a token is real; the first that fits counts.
    """
    for mask in masks:
        if tensor.ndim > 2 and tensor.shape[:2] == mask.shape:
            return tensor[mask.to(tensor.device, torch.bool)]
        if tensor.ndim == 2 and len(tensor) == mask.numel() and mask.shape[1] > 1:
            return tensor[mask.to(tensor.device, torch.bool).flatten()]
    return tensor
