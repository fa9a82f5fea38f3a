"""A compressed network's quality is measured beside the dense network's, on unseen text."""

import math
from collections.abc import Callable, Collection
from dataclasses import astuple, dataclass, replace
from typing import Any

import torch
from torch.nn import functional

from lrc_cli.data.draw import Batch, Sequences, micro_batch
from lrc_cli.data.padding import Masks, masks_of, unpadded
from lrc_cli.errors import InputError, RunError
from lrc_cli.execution.chain import Segment, find_chain
from lrc_cli.execution.losses import UNSCORED, Loss, choose_loss, prepare
from lrc_cli.execution.network import Network, reading_outputs
from lrc_cli.execution.outputs import floating_outputs
from lrc_cli.execution.walk import Keep, Pair
from lrc_cli.quality.records import Scores
from lrc_cli.runtime.processes import ALONE, Processes

MICRO_BATCH_TOKENS = 1024
LARGEST_RATIO = 2.0**24
"""The largest relative error: larger ones, and errors relative to 0, count as this."""
OUTPUT_ONLY = Loss(kind="output")


@dataclass
class _Sums:
    """Holds the running totals of one text."""

    tokens: int = 0
    nll_before: float = 0.0
    nll_after: float = 0.0
    kl: float = 0.0
    agree: int = 0
    difference: float = 0.0
    energy: float = 0.0


def scoring(network: Network, batch: Batch, tokenizer: Any) -> Loss:
    """Returns how outputs are scored: a language model's by likelihood, others by their change."""
    try:
        loss = choose_loss("nll", network, batch, tokenizer)
    except InputError:
        return OUTPUT_ONLY
    return loss


def compare(
    before: Network,
    after: Network,
    sequences: Sequences,
    *,
    loss: Loss,
    seed: int,
    advance: Callable[[float], None] = lambda _: None,
    keep: Keep = torch.Tensor.detach,
    only: Collection[str] | None = None,
    processes: Processes = ALONE,
) -> Scores:
    """Runs both networks over the same sequences, segment by segment.

    Args:
        loss: what `scoring` returns.
        seed: the seed of masked tokens, where the network predicts masked tokens.
        advance: called with the number of sequences done.
        keep: what becomes of hidden states between segments; see `HostMemory.keep`.
        only: names of segments to run in place of all, to see how long they take.
        processes: the processes that share the sequences; each of them calls this function.

    Returns:
        For a language model: mean loss (nats per scored token) and perplexity of both, KL
        divergence of the predictions (nats, dense to compressed) and top-1 agreement. For any other
        network: `relative_output_error` = ||f~(x) - f(x)|| / ||f(x)|| over the first output, and
        KL and agreement where that output is called logits.

    Raises:
        RunError: a network's outputs are not finite.
    """
    sums = _Sums()
    generator = torch.Generator().manual_seed(seed)
    batches = sequences.batches(micro_batch(sequences, MICRO_BATCH_TOKENS))
    prepared = [prepare(loss, batch, generator) for batch in batches]
    chain = find_chain(before, next(sequences.batches(1)))
    pair = Pair(before, after, chain, [inputs for inputs, _ in prepared], keep)
    names = [name for name in chain.segments if only is None or name in only]
    own = processes.share(len(prepared))
    for segment in (Segment(name=name, layers=[]) for name in names):
        for index in own:
            inputs, labels = prepared[index]
            for part in pair.parts(segment, index):
                outputs = pair.run(segment, index, part=part)
                if outputs is not None:
                    wanted, masks = None if labels is None else part.of(labels), part.cut(inputs)
                    with reading_outputs(after):
                        _add(sums, *outputs, wanted, masks_of(masks))
            advance(len(sequences) / len(own) / len(names))
    parts = map(astuple, processes.gather(sums))
    total = _Sums(*map(sum, zip(*parts, strict=True)))
    return _scores(total, loss, len(sequences))


def _add(sums: _Sums, old: Any, new: Any, labels: torch.Tensor | None, masks: Masks) -> None:
    if labels is None:
        first, second = (unpadded(floating_outputs(x)[0].float(), masks) for x in (old, new))
        sums.difference += (second - first).double().square().sum().item()
        sums.energy += first.double().square().sum().item()
        if getattr(old, "logits", None) is not None and first.shape[-1] > 1:
            _add_predictions(sums, first.flatten(0, -2), second.flatten(0, -2))
        else:
            sums.tokens += first[..., 0].numel() if first.ndim else 1
        return
    scored = (labels != UNSCORED).to(old.logits.device)
    first, second = old.logits[scored].float(), new.logits[scored].float()
    wanted = labels.to(scored.device)[scored]
    sums.nll_before += functional.cross_entropy(first, wanted, reduction="sum").item()
    sums.nll_after += functional.cross_entropy(second, wanted, reduction="sum").item()
    _add_predictions(sums, first, second)


def _add_predictions(sums: _Sums, old: torch.Tensor, new: torch.Tensor) -> None:
    sums.tokens += len(old)
    log_old, log_new = old.log_softmax(-1), new.log_softmax(-1)
    sums.kl += functional.kl_div(log_new, log_old, reduction="sum", log_target=True).item()
    sums.agree += int((old.argmax(-1) == new.argmax(-1)).sum())


def _scores(sums: _Sums, loss: Loss, num_sequences: int) -> Scores:
    scores = Scores(num_sequences=num_sequences, num_scored=sums.tokens)
    if loss.kind == "output":
        if not math.isfinite(sums.difference + sums.energy):
            raise RunError("evaluation: the outputs are not finite", "set runtime.dtype: float32")
        error = (
            math.sqrt(sums.difference / max(sums.energy, sums.difference / LARGEST_RATIO**2))
            if sums.difference
            else 0.0
        )
        scores = replace(scores, relative_output_error=error)
        if not sums.kl and not sums.agree:
            return scores
    else:
        before, after = sums.nll_before / sums.tokens, sums.nll_after / sums.tokens
        if not math.isfinite(before + after):
            raise RunError("evaluation: the loss is not finite", "set runtime.dtype: float32")
        scores = replace(
            scores,
            scored=loss.description,
            loss_before=before,
            loss_after=after,
            perplexity_before=_exp(before),
            perplexity_after=_exp(after),
        )
    return replace(scores, kl=sums.kl / sums.tokens, top1_agreement=sums.agree / sums.tokens)


def _exp(value: float) -> float:
    # A ruined network may lose more nats than a float can exponentiate.
    return math.exp(value) if value < 700 else math.inf
