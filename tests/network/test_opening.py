"""A checkpoint opens as a module and a view of the files, and the source stays as it is."""

import dataclasses
from pathlib import Path

import pytest
import torch
from families import FAMILIES
from safetensors.torch import save_file
from source_helpers import FORMS
from torch import Tensor, nn

from lrc_cli.checkpoint.fused import Fused
from lrc_cli.checkpoint.source import Source, open_source
from lrc_cli.errors import InputError
from lrc_cli.network.opening import open_module


class Apart(nn.Module):
    """Two layers with a weight each."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6, bias=False)
        self.second = nn.Linear(6, 6, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(self.first(x))
        return y


class Tied(Apart):
    """The same layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.second.weight = self.first.weight


def both_weights(folder: Path) -> Source:
    """Writes a file that holds one weight under two keys."""
    weight = torch.randn(6, 6, generator=torch.Generator().manual_seed(0))
    file = folder / "layers.safetensors"
    save_file({"first.weight": weight, "second.weight": weight.clone()}, file)
    return open_source(file)


@pytest.mark.parametrize("order", [(Tied, Apart), (Apart, Tied)])
def test_two_modules_see_one_source_each_in_its_own_way(
    order: tuple[type[Apart], type[Apart]], tmp_path: Path
) -> None:
    source = both_weights(tmp_path)
    name = f"{__name__}:{{}}"
    views = {kind: open_module(source, factory=name.format(kind.__name__)) for kind in order}
    tied, apart = views[Tied].source, views[Apart].source
    assert dict(tied.copies) == {"second.weight": "first.weight"} and not apart.copies
    assert list(tied.tensors) == ["first.weight"]
    assert list(apart.tensors) == list(source.tensors) == ["first.weight", "second.weight"]
    assert apart.num_bytes == source.num_bytes == 2 * tied.num_bytes
    assert not source.copies
    assert torch.equal(apart.read("second.weight"), tied.read("first.weight"))


def test_fused_experts_are_apart_in_the_view_alone(tmp_path: Path) -> None:
    FAMILIES["gpt-oss"].build().save_pretrained(tmp_path)
    source = open_source(tmp_path)
    before = dict(source.tensors)
    views = [open_module(source, factory=None).source for _ in range(2)]
    assert source.tensors == before and not source.parts and source.mark_bytes == 0
    for view in views:
        assert list(view.fused) == [key for key in source.tensors if key in view.fused]
        assert view.fused and view.mark_bytes and view.num_bytes == source.num_bytes
        part, (whole, index) = next(iter(view.parts.items()))
        assert whole in source.tensors and whole not in view.tensors
        taken = view.fused[whole].take(source.read(whole), index)
        assert torch.equal(view.read(part), taken) and view.tensors[part].shape == taken.shape
    assert views[0].tensors == views[1].tensors


def test_a_view_opens_again_as_it_is(tmp_path: Path) -> None:
    FAMILIES["gpt-oss"].build().save_pretrained(tmp_path)
    once = open_module(open_source(tmp_path), factory=None).source
    again = open_module(once, factory=None).source
    assert again.tensors == once.tensors and again.parts == once.parts


def test_a_copy_is_no_part_either(tmp_path: Path) -> None:
    FAMILIES["gpt-oss"].build().save_pretrained(tmp_path)
    view = open_module(open_source(tmp_path), factory=None).source
    stored = open_source(tmp_path)
    key = next(iter(view.fused))
    passed = stored.without_copies({key: "another"}).apart(view.fused)
    assert key not in passed.tensors and key not in passed.fused
    assert all(whole != key for whole, _ in passed.parts.values())


def test_a_vector_is_not_taken_apart(tmp_path: Path) -> None:
    save_file({"bias": torch.zeros(3)}, tmp_path / "vector.safetensors")
    source = open_source(tmp_path / "vector.safetensors")
    with pytest.raises(InputError, match=r"bias has shape \(3,\), which holds no experts"):
        source.apart({"bias": Fused(experts="experts", part="down_proj.weight")})


def test_a_source_is_frozen(tmp_path: Path) -> None:
    source = both_weights(tmp_path)
    with pytest.raises(dataclasses.FrozenInstanceError):
        source.copies = {"second.weight": "first.weight"}  # type: ignore[misc]


@pytest.mark.parametrize("form", ["safetensors", "bin", "training save"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_view_of_a_checkpoint_opens_as_the_checkpoint_does(
    name: str, form: str, tmp_path: Path
) -> None:
    """The compressed network is opened from the view that the dense network's opening gave."""
    folder = tmp_path / "safetensors"
    model = FAMILIES[name].build().half()
    model.save_pretrained(folder)
    if form != "safetensors":
        FORMS[form](folder, tmp_path / form)
    first = open_module(open_source(tmp_path / form), factory=None)
    second = open_module(first.source, factory=None)
    wanted, found = (dict(x.module.state_dict()) for x in (first, second))
    assert {*second.source.tensors} == {*first.source.tensors}
    assert {*found} == {*wanted}
    assert all(torch.equal(found[key], tensor) for key, tensor in wanted.items())
