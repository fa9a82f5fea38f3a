"""A network in another dtype than stored has the same numbers, and no second copy of its table."""

import platform
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from lrc_cli.execution.precision import cast_on_read, fast_dtype

VOCABULARY, WIDTH = 50, 8
IDS = torch.tensor([[3, 49, 0]])


class Tied(nn.Module):
    """A network whose table is an embedding, the head's weight, and is read directly once more."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH, padding_idx=0)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(ids)
        return self.head(x) + functional.linear(x, self.embedding.weight)


class Scaled(nn.Embedding):
    """An embedding with a forward of its own, as in Gemma."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) * 3.3


class Largest(TorchDispatchMode):
    """Remembers the largest float32 tensor that any operation made."""

    def __init__(self) -> None:
        super().__init__()
        self.num_elements = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.dtype == torch.float32:
            self.num_elements = max(self.num_elements, result.numel())
        return result


def test_an_embedding_converts_the_rows_it_looks_up() -> None:
    embedding = nn.Embedding(VOCABULARY, WIDTH).to(torch.bfloat16).requires_grad_(False)
    wanted = embedding.weight.float()[IDS]
    cast_on_read(embedding, torch.float32)
    with Largest() as largest:
        found = embedding(IDS)
    assert torch.equal(found, wanted) and found.dtype == torch.float32
    assert largest.num_elements == IDS.numel() * WIDTH
    assert torch.equal(embedding(input=IDS), wanted)


def test_a_tied_table_stays_one_tensor_and_reads_as_converted() -> None:
    model = Tied().to(torch.bfloat16).requires_grad_(False)
    table = model.embedding.weight
    whole = Tied().requires_grad_(False)
    whole.embedding.weight.copy_(table)
    cast_on_read(model, torch.float32)
    assert torch.equal(model(IDS), whole(IDS))
    assert model.embedding.weight.dtype == model.head.weight.dtype == torch.float32
    assert [p.data_ptr() for p in model.parameters()] == [table.data_ptr()]
    assert table.dtype == torch.bfloat16


def test_an_embedding_with_its_own_forward_computes_in_the_dtype() -> None:
    embedding = Scaled(VOCABULARY, WIDTH).to(torch.bfloat16).requires_grad_(False)
    wanted = embedding.weight.float()[IDS] * 3.3
    cast_on_read(embedding, torch.float32)
    assert torch.equal(embedding(IDS), wanted)


@pytest.mark.parametrize(
    ("machine", "onednn", "instructions", "matrices", "fast"),
    [
        ("x86_64", True, True, False, True),  # Zen 4
        ("x86_64", True, False, True, True),
        ("AMD64", True, False, False, False),  # Cascade Lake: AVX-512, bfloat16 emulated
        ("x86_64", False, False, False, False),  # AVX2
        ("aarch64", True, False, False, True),
        ("aarch64", False, False, False, False),
    ],
)
def test_bfloat16_is_for_processors_that_multiply_it(
    machine: str,
    onednn: bool,
    instructions: bool,
    matrices: bool,
    fast: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: onednn)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: instructions)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: matrices)
    cpu = torch.device("cpu")
    assert fast_dtype(cpu, torch.bfloat16) == (torch.bfloat16 if fast else torch.float32)
    assert fast_dtype(cpu, torch.float16) == fast_dtype(cpu, torch.float32) == torch.float32
