"""These tests show hooks' order, what hooks see and change, and when hooks are gone."""

from typing import Any

import pytest
import torch
from torch import nn

from lrc_cli.errors import RunError
from lrc_cli.execution.hooks import around_calls


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(2, 2)
        self.second = nn.Linear(2, 2)

    def forward(self, x: torch.Tensor) -> Any:
        return self.second(input=self.first(x))


def hooks_of(module: nn.Module) -> int:
    parts = module.modules()
    return sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in parts)


def test_functions_see_names_arguments_and_outputs_of_every_call() -> None:
    module, x, seen = Pair(), torch.ones(2), []

    def before(name: str, args: Any, kwargs: Any) -> None:
        seen.append((name, len(args), [*kwargs]))

    def after(name: str, args: Any, kwargs: Any, output: Any) -> None:
        seen.append((name, len(args), [*kwargs], output))

    with around_calls(module, ["first", "second"], before=before, after=after):
        y = module(x)
    assert [entry[:3] for entry in seen] == [
        ("first", 1, []),
        ("first", 1, []),
        ("second", 0, ["input"]),
        ("second", 0, ["input"]),
    ]
    assert seen[3][3] is y and not hooks_of(module)


def test_what_a_function_returns_replaces_the_output() -> None:
    module, x = Pair(), torch.ones(2)
    with around_calls(module, ["first"], after=lambda *_: torch.zeros(2)):
        assert torch.equal(module(x), module.second.bias)
    assert not torch.equal(module(x), module.second.bias)


def test_outer_functions_run_first() -> None:
    module, order = Pair(), []
    with (
        around_calls(module, ["first"], after=lambda *_: order.append("outer")),
        around_calls(module, ["first"], after=lambda *_: order.append("inner")),
    ):
        module(torch.ones(2))
    assert order == ["outer", "inner"]


def test_hooks_go_when_the_block_raises_or_a_name_is_wrong() -> None:
    module = Pair()

    def stop(*_: Any) -> None:
        raise StopIteration

    with pytest.raises(StopIteration), around_calls(module, ["second"], before=stop):
        module(torch.ones(2))
    assert not hooks_of(module)
    gone = pytest.raises(RunError, match="Pair has no module third any more")
    with gone, around_calls(module, ["first", "third"], before=stop):
        raise AssertionError("the block does not begin")
    assert not hooks_of(module)
