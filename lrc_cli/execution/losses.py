"""This module chooses and computes the loss whose second-order estimate `curvature` minimises.

The model's outputs decide (docs/theory.md). Language models get the negative log-likelihood of the
next token or of masked tokens. Classifiers get the negative log-likelihood of a label that is drawn
from the model's own softmax (true Fisher). All other networks get half the squared change of the
output (Gauss-Newton, with random +-1 probes).
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from lrc_cli.data.decoder import scored
from lrc_cli.data.kinds import Batch
from lrc_cli.data.padding import Masks, unpadded
from lrc_cli.errors import InputError
from lrc_cli.execution.glance import glance, looked_at
from lrc_cli.execution.network import Network
from lrc_cli.execution.outputs import floating_outputs

NUM_PROBES = 4
MASKED_SHARE = 0.15
CAUSAL_LEAK = 1e-5
"""The relative change of earlier logits up to which the change is rounding, not a look ahead."""


UNSCORED = -100
"""The label of a position that is not scored."""


@dataclass(frozen=True, kw_only=True)
class Loss:
    """A loss, with the tokenizer's mask token where the loss needs it."""

    kind: str
    """next_token | masked_token | sampled | output."""
    mask_token: int | None = None

    @property
    def unit(self) -> str:
        """The unit of the layers' estimates, see `count_tokens`."""
        return {
            "next_token": "nats per token",
            "masked_token": "nats per input token, of which 15 % are scored",
            "sampled": "nats per token, or per sequence of data without tokens",
            "output": "half the squared output change per token, or per sequence of data without",
        }[self.kind]

    def facts(self) -> dict[str, str]:
        """Returns what the work directory and the report record of the loss."""
        return {"kind": self.kind, "unit": self.unit, "description": self.description}

    @property
    def description(self) -> str:
        """The loss in the report's words."""
        return {
            "next_token": "negative log-likelihood of the next token",
            "masked_token": "negative log-likelihood of masked tokens",
            "sampled": "negative log-likelihood of labels drawn from the model's own softmax",
            "output": "half the squared change of the model's outputs (random probes)",
        }[self.kind]


def choose_loss(requested: str, network: Network, batch: Batch, tokenizer: Any) -> Loss:
    """Chooses the loss for `compression.loss` by what the network returns for one micro-batch.

    Args:
        requested: the value of `compression.loss`.
        network: the network.
        batch: a micro-batch.
        tokenizer: the checkpoint's tokenizer, or None.

    Raises:
        InputError: the requested loss needs logits, or a mask token, that are not there.
    """
    with torch.no_grad():
        outputs = glance(network, batch)
    logits = getattr(outputs, "logits", None)
    is_language_model = _is_language_model(logits, batch, network)
    if requested == "auto":
        labels = logits is not None and logits.ndim >= 2 and logits.shape[-1] > 1
        requested = "nll" if is_language_model else "sampled" if labels else "output"
    if requested == "output":
        return Loss(kind="output")
    if requested == "sampled":
        return Loss(kind="sampled")
    if not is_language_model:
        raise InputError(
            "compression.loss: nll needs logits over the vocabulary for every token",
            "use auto, sampled or output",
        )
    if _is_causal(network, batch):
        return Loss(kind="next_token")
    mask_token = getattr(tokenizer, "mask_token_id", None)
    if mask_token is None:
        raise InputError(
            "compression.loss: nll of a bidirectional model needs the tokenizer's mask token",
            "use output, or add the tokenizer's files to the checkpoint",
        )
    return Loss(kind="masked_token", mask_token=mask_token)


def _is_language_model(logits: torch.Tensor | None, batch: Batch, network: Network) -> bool:
    ids = batch.get(scored(batch)[0])
    if logits is None or ids is None or logits.ndim != 3 or ids.ndim != 2:
        return False
    if logits.shape[:2] != ids[:, looked_at(network, batch) or slice(None)].shape:
        return False
    if ids.shape[1] < 2:  # there is no next token
        return False
    return bool(logits.shape[-1] == network.vocabulary)


def count_tokens(batch: Batch) -> int:
    """Returns the number of tokens that the loss is about, by which the loss is divided.

    Padding does not count. Without tokens, sequences count (images, recordings, rows).
    """
    ids_name, mask_name = scored(batch)
    if ids_name not in batch:
        return len(next(iter(batch.values())))
    mask = batch.get(mask_name)
    return batch[ids_name].numel() if mask is None else int(mask.bool().sum())


def _is_causal(network: Network, batch: Batch) -> bool:
    """Returns whether the logits before the last real token ignore this token.

    The network is tried out: no name decides. A bidirectional network may hardly look at a distant
    token. So the change one position before the token is compared with the change at the token.
    """
    row = {name: tensor[:1].clone() for name, tensor in batch.items()}
    other = {name: tensor.clone() for name, tensor in row.items()}
    ids_name, mask_name = scored(batch)
    ids, mask = other[ids_name], row.get(mask_name)
    last = ids.shape[1] - 1 if mask is None else int(mask[0].nonzero().max())
    ids[0, last] = (ids[0, last] + 1) % network.vocabulary
    tokens = looked_at(network, row)
    last -= 0 if tokens is None else tokens.start
    with torch.no_grad():
        change = (glance(network, row).logits[0] - glance(network, other).logits[0]).float().abs()
    return bool(change[last - 1].max() <= CAUSAL_LEAK * change[last].max())


def drawing(seed: int, index: int) -> torch.Generator:
    """Returns the generator that draws a micro-batch's labels or probes.

    The draws depend on neither the process nor the micro-batches that ran before.

    Args:
        seed: the seed of the job.
        index: the micro-batch's number in the whole pass.
    """
    # torch takes 32 bits of a seed for its CPU generator.
    own = hashlib.sha256(f"{seed}/{index}".encode()).digest()[:4]
    return torch.Generator().manual_seed(int.from_bytes(own))


def prepare(
    loss: Loss, batch: Batch, generator: torch.Generator
) -> tuple[Batch, torch.Tensor | None]:
    """Returns the inputs to run and the labels to score, or None where the loss has no labels.

    A position without a label has the label UNSCORED.

    Args:
        loss: the loss.
        batch: a micro-batch.
        generator: a generator on the CPU that draws which tokens are masked.
    """
    if loss.kind == "next_token":
        ids_name, mask_name = scored(batch)
        labels = batch[ids_name].roll(-1, dims=1)
        labels[:, -1] = UNSCORED
        if mask_name in batch:
            mask = batch[mask_name].bool()
            labels = labels.masked_fill(~(mask & mask.roll(-1, dims=1)), UNSCORED)
        return batch, labels
    if loss.kind == "masked_token":
        ids = batch["input_ids"]
        chosen = torch.rand(ids.shape, generator=generator) < MASKED_SHARE
        if "attention_mask" in batch:
            chosen &= batch["attention_mask"].bool()
        labels = ids.masked_fill(~chosen, UNSCORED)
        assert loss.mask_token is not None
        return {**batch, "input_ids": ids.masked_fill(chosen, loss.mask_token)}, labels
    return batch, None


def backward_scalars(
    loss: Loss,
    outputs: Any,
    labels: torch.Tensor | None,
    generator: torch.Generator,
    masks: Masks = (),
) -> Iterator[torch.Tensor]:
    """Yields scalars whose gradients g have E[g g^T] = the wanted curvature, one scalar a probe.

    For a likelihood, the only scalar is the summed loss. For the output loss, the NUM_PROBES
    scalars are <v, f(x)> with random signs v, so E[v v^T] = I. Outputs of padded positions do not
    count.

    Args:
        loss: the loss.
        outputs: what the network returned.
        labels: the labels from `prepare`.
        generator: a generator on the CPU that draws labels or signs.
        masks: the masks from `masks_of`.
    """
    if labels is not None:
        # Indexing the scored rows would copy the logits, and their gradient, once more.
        logits = outputs.logits.flatten(0, -2).float()
        labels = labels.flatten().to(logits.device)
        yield functional.cross_entropy(logits, labels, reduction="sum", ignore_index=UNSCORED)
    elif loss.kind == "sampled":
        logits = unpadded(floating_outputs(outputs)[0].float(), masks)
        flat = logits.reshape(-1, logits.shape[-1])
        drawn = torch.multinomial(flat.detach().softmax(-1).cpu(), 1, generator=generator)
        yield functional.cross_entropy(flat, drawn[:, 0].to(flat.device), reduction="sum")
    else:
        tensors = [unpadded(tensor, masks) for tensor in floating_outputs(outputs)]
        for _ in range(NUM_PROBES):
            yield sum(
                ((tensor * _signs(tensor, generator)).sum() for tensor in tensors),
                start=torch.zeros(()),
            )


def num_scalars(loss: Loss) -> int:
    """Returns the number of scalars that `backward_scalars` yields."""
    return NUM_PROBES if loss.kind == "output" else 1


def _signs(tensor: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    signs = torch.randint(0, 2, tensor.shape, generator=generator) * 2 - 1
    return signs.to(tensor.device, tensor.dtype)
