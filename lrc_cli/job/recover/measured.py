"""Layers are measured again after their factors were trained, on their own inputs."""

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch

from lrc_cli.engine import Approximation
from lrc_cli.forms import FORMS, Packed, dense
from lrc_cli.job.factors.fit import errors_of, read_facts
from lrc_cli.job.work import Tensors, WorkDirectory
from lrc_cli.network.layer import Layer
from lrc_cli.report.record import LayerFacts


def measured_again(
    problems: Sequence[Approximation],
    layer: Layer,
    tensors: Tensors,
    facts: LayerFacts,
    bias: torch.Tensor | None,
    *,
    trained: bool = True,
) -> LayerFacts:
    """Returns the facts of a layer whose factors were trained after they were fitted.

    A layer that was fitted to inputs in the compressed network has others once layers before it
    were trained, so it is measured again too.

    Args:
        problems: the layer's problems on its inputs in the dense network, in one unit.
        layer: the layer.
        tensors: the tensors as they will be written, by disk name.
        facts: the facts of the layer as it was fitted.
        bias: the dense layer's bias (m,); None for a layer without a bias.
        trained: whether the layer's own factors were trained.
    """
    form = FORMS[facts.storage]
    found = {name: tensors[layer.keys.key(name)] for name in form.tensors}
    packed = Packed(
        form=form.name,
        shape=layer.shape,
        tensors={name: x.flatten(1) if x.ndim > 2 else x for name, x in found.items()},
        parameters=facts.stated,
    )
    assert facts.rank is not None
    problem = problems[0].at(facts.rank)
    matrix = dense(packed).to(problem.weight.device)
    errors, shift = problem.errors(matrix), problem.shift(matrix)
    if shift is not None:
        exact = shift if bias is None else bias.to(shift) + shift
        errors = problem.offset(errors, tensors[layer.keys.bias].to(exact) - exact)
    measured = replace(
        facts,
        trained=True if trained else None,
        errors=errors_of(problem, packed, errors),
        max_coefficient=form.largest_coefficient(packed),
    )
    if facts.sequential is None:
        return measured
    reason = facts.sequential_reason or (
        "its factors were trained afterwards"
        if trained
        else "layers before it were trained afterwards"
    )
    return replace(
        measured,
        sequential=False,
        sequential_reason=reason,
        sequential_failed=bool(facts.sequential_failed),
        correction=None,
    )


def has_factors(work: WorkDirectory, stage: str, names: Iterable[str]) -> bool:
    """Returns whether a layer of the named units is factorised in a finished stage."""
    units = (read_facts(work, stage, name) for name in names)
    return any(not facts.is_dense for unit in units for facts in unit.values())
