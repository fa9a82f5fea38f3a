"""Forms are tested: the matrix of their tensors, its place on the disk, what a table says."""

import pytest
import torch
from torch import Tensor, nn

from lrc_cli.forms import FORMS, Packed, dense
from lrc_cli.network.layouts import LINEAR, layout_of


def numbers(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def packed(form: str) -> Packed:
    """Returns a layer (12, 10) in a form; if it has a rank, of rank 4 in row groups of 2 rows."""
    perm = torch.tensor([3, 0, 5, 1, 4, 2], dtype=torch.int32)
    tensors = {
        "dense": {"weight": numbers(12, 10)},
        "factors": {"weight": numbers(4, 10), "up.weight": numbers(12, 4)},
        "interpolative": {"weight": numbers(4, 10), "up.weight": numbers(8, 4), "perm": perm},
    }[form]
    parameters = {} if form == "dense" else {"rank": 4, "block": 2}
    return Packed(form=form, shape=(12, 10), tensors=tensors, parameters=parameters)


@pytest.mark.parametrize("form", FORMS)
def test_tensors_have_the_names_of_their_form_and_make_its_matrix(form: str) -> None:
    layer = packed(form)
    assert tuple(layer.tensors) == FORMS[form].tensors
    matrix = dense(layer)
    assert matrix.shape == layer.shape and matrix.dtype == torch.float64
    assert layer.num_bytes == sum(tensor.nbytes for tensor in layer.tensors.values())
    assert layer.rank == layer.parameters.get("rank")


def test_a_matrix_is_what_format_md_says() -> None:
    two, rows = packed("factors"), packed("interpolative")
    weight, up = two.tensors["weight"].double(), two.tensors["up.weight"].double()
    assert torch.equal(dense(two), up @ weight)
    chosen, mixed = rows.tensors["weight"].double(), rows.tensors["up.weight"].double()
    c = [*chosen, *(mixed @ chosen)]
    wanted = [c[2 * block + i] for block in rows.tensors["perm"].tolist() for i in range(2)]
    torch.testing.assert_close(dense(rows), torch.stack(wanted))


def test_a_table_states_what_shapes_do_not_say_at_a_glance() -> None:
    entries = {name: FORMS[name].table_entry(packed(name).parameters) for name in FORMS}
    assert entries["factors"] == {"storage": "factors", "rank": 4}
    assert entries["interpolative"] == {"storage": "interpolative", "rank": 4, "block": 2}


@pytest.mark.parametrize("form", ["factors", "interpolative"])
def test_factors_lie_as_the_layers_kind_asks(form: str) -> None:
    layer = packed(form)
    plain = FORMS[form].on_disk(layer, LINEAR)
    assert all(torch.equal(plain[name], tensor) for name, tensor in layer.tensors.items())
    layout = layout_of(nn.Conv2d(5, 12, (1, 2)))
    assert layout is not None
    unrolled = FORMS[form].on_disk(layer, layout)
    assert unrolled["weight"].shape == (4, 5, 1, 2)
    assert unrolled["up.weight"].shape == (*layer.tensors["up.weight"].shape, 1, 1)
