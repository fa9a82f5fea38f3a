"""Tests of the distance between two networks' outputs, against float64 and finite differences."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from lrc_cli.execution.divergence import ROWS_AT_ONCE, divergence
from lrc_cli.execution.losses import UNSCORED, Loss

KINDS = ["next_token", "masked_token", "sampled", "output"]


def outputs(kind: str, *, rows: int = 5, seed: int = 0, scale: float = 1.0) -> SimpleNamespace:
    torch.manual_seed(seed)
    tensor = scale * torch.randn(2, rows, 7)
    return SimpleNamespace(**{"hidden" if kind == "output" else "logits": tensor})


def number(kind: str, found: SimpleNamespace) -> Tensor:
    tensor = found.hidden if kind == "output" else found.logits
    assert isinstance(tensor, Tensor)
    return tensor


def as_output(found: SimpleNamespace) -> object:
    """A mapping of tensors where there are no logits, as networks return it."""
    return vars(found) if hasattr(found, "hidden") else found


def reference(kind: str, wanted: Tensor, given: Tensor, chosen: Tensor) -> Tensor:
    p, q = wanted.double()[chosen], given.double()[chosen]
    if kind == "output":
        return 0.5 * (p - q).square().sum()
    log_p, log_q = p.log_softmax(-1), q.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum()


def case(kind: str, rows: int) -> tuple[Tensor | None, tuple[Tensor, ...], Tensor]:
    """Labels, masks and the positions that count."""
    chosen = torch.ones(2, rows, dtype=torch.bool)
    if kind == "masked_token":
        chosen[:, ::2] = False
        return torch.where(chosen, 3, UNSCORED), (), chosen
    chosen[1, -2:] = False
    return None, (chosen.long(),), chosen


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [2, 5, ROWS_AT_ONCE])
def test_value_and_gradient_are_those_of_float64(kind: str, rows: int) -> None:
    wanted, given = outputs(kind, rows=rows), outputs(kind, rows=rows, seed=1)
    labels, masks, chosen = case(kind, rows)
    exact = number(kind, given).double().requires_grad_()
    expected = reference(kind, number(kind, wanted).clone(), exact, chosen)
    expected.backward()
    number(kind, given).requires_grad_()
    found = divergence(Loss(kind=kind), as_output(wanted), as_output(given), labels, masks)
    (3 * found).backward()
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    gradient = number(kind, given).grad
    assert gradient is not None and exact.grad is not None
    torch.testing.assert_close(gradient.double(), 3 * exact.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_equal_outputs_have_no_distance(kind: str) -> None:
    labels, masks, _ = case(kind, 5)
    pair = [as_output(outputs(kind)) for _ in range(2)]
    found = divergence(Loss(kind=kind), *pair, labels, masks)
    assert found.item() == pytest.approx(0.0, abs=1e-6)


def test_extreme_logits_stay_finite() -> None:
    wanted, given = (outputs("next_token", seed=x, scale=1e4) for x in (0, 1))
    given.logits.requires_grad_()
    found = divergence(Loss(kind="next_token"), wanted, given, None, ())
    found.backward()
    assert bool(found.isfinite()) and bool(given.logits.grad.isfinite().all())
