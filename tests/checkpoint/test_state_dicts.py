"""A file of a training loop may hold several state dicts, and the config chooses one."""

import re
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pico
import pytest
import torch
from safetensors.torch import save_file
from torch.distributed import checkpoint as dcp

from lrc_cli import load
from lrc_cli.checkpoint.source import open_source
from lrc_cli.errors import InputError


def state(value: float, **more: Any) -> dict[str, Any]:
    """Returns a small state dict whose numbers are all `value`, and other entries."""
    return {
        "weight": torch.full((4, 4), float(value)),
        "bias": torch.full((4,), float(value)),
        **more,
    }


ADAM = {"state": {0: {"exp_avg": torch.zeros(4, 4)}}, "param_groups": [{"lr": 0.1}]}
NAMED_ADAM = {"state": {"weight": {"exp_avg": torch.zeros(4, 4)}}}
ITSELF: dict[Any, Any] = {"model": state(1), "ema": state(2)}
ITSELF["again"] = ITSELF

CHOSEN: dict[str, tuple[Any, str, float]] = {
    "model": ({"model": state(1), "ema": state(2)}, "model", 1),
    "ema": ({"model": state(1), "ema": state(2)}, "ema", 2),
    "averaged model": ({"model": state(1), "averaged_model": state(2)}, "averaged_model", 2),
    "ema state dict": ({"state_dict": state(1), "ema_state_dict": state(2)}, "ema_state_dict", 2),
    "teacher": ({"student": state(1), "teacher": state(2)}, "teacher", 2),
    "discriminator": ({"generator": state(1), "discriminator": state(2)}, "generator", 1),
    "beside an optimizer": ({"model": state(1), "optimizer": ADAM, "ema": state(2)}, "ema", 2),
    "one step deeper": ({"states": {"a": state(1), "b": state(2)}}, "states.b", 2),
    "deep": ({"a": {"b": {"c": {"d": state(3)}}}}, "a.b.c.d", 3),
    "deep beside one": ({"model": state(1), "callbacks": {"EMA": {"ema": state(2)}}},
                        "callbacks.EMA.ema", 2),
    "a key with dots": ({"model": state(1), "callbacks": {"ema.v2": state(2)}},
                        "callbacks.ema.v2", 2),
    "a number as key": ({"models": {0: state(1), 1: state(2)}}, "models.1", 2),
    "the only one": ({"model": state(1)}, "model", 1),
    "the top": (state(1, ema=state(2)), ".", 1),
    "below the top": (state(1, ema=state(2)), "ema", 2),
    "beside a matrix": ({"model": state(1), "queue": torch.zeros(3, 3)}, "model", 1),
    "with a number in it": ({"model": state(1), "ema": state(2, decay=0.9)}, "ema", 2),
    "itself": (ITSELF, "again.ema", 2),
    "an ordered one": ({"model": OrderedDict(state(1)), "ema": OrderedDict(state(2))}, "ema", 2),
}  # fmt: skip


@pytest.mark.parametrize("kind", CHOSEN)
def test_the_chosen_state_dict_is_read(kind: str, tmp_path: Path) -> None:
    content, chosen, value = CHOSEN[kind]
    torch.save(content, tmp_path / "all.pt")
    source = open_source(tmp_path / "all.pt", state_dict=chosen)
    assert source.tensors.keys() == state(0).keys()
    assert all(bool((source.read(key) == value).all()) for key in source.tensors)


ONE: dict[str, Any] = {
    "the same": {"model": (same := state(1)), "ema": same},
    "equal": {"model": state(1), "ema": state(1)},
    "three": {"model": state(1), "ema": state(1), "best": state(1)},
    "equal, deeper": {"states": {"a": state(1), "b": state(1)}},
    "NaN": {"model": state(float("nan")), "ema": state(float("nan"))},
}


@pytest.mark.parametrize("kind", ONE)
def test_equal_copies_count_as_one(kind: str, tmp_path: Path) -> None:
    torch.save(ONE[kind], tmp_path / "all.pt")
    assert open_source(tmp_path / "all.pt").tensors.keys() == state(0).keys()


MANY = {"model": state(1), "ema": state(2)}
REFUSED: dict[str, tuple[Any, str | None, str]] = {
    "none is chosen": (
        MANY,
        None,
        "several state dicts: 'model' of 2 tensors with 20 numbers; 'ema' of 2 tensors with 20",
    ),
    "other names": ({"a": state(1), "b": {"w": torch.ones(4, 4)}}, None, "'a' of 2.*'b' of 1 "),
    "fewer names": ({"a": state(1), "b": {"bias": state(1)["bias"], "weight": torch.ones(2, 4)}},
                    None, "several"),
    "0 and -0": ({"a": state(0.0), "b": state(-0.0)}, None, "several"),
    "another dtype": ({"a": state(1), "b": {k: x.double() for k, x in state(1).items()}}, None,
                      "several"),
    "sparse copies": ({"a": {"w": torch.eye(4).to_sparse()}, "b": {"w": torch.eye(4).to_sparse()}},
                      None, "several"),
    "meta copies": ({"a": {"w": torch.ones(4, 4, device="meta")},
                     "b": {"w": torch.ones(4, 4, device="meta")}}, None, "several"),
    "a matrix beside": ({"model": state(1), "queue": torch.zeros(3, 3)}, None,
                        r"'model' of 2.*'\.' \(the top\) of 1 tensor with 9"),
    "too deep to guess": ({"a": {"b": {"c": state(1)}}}, None, "only deep inside: 'a.b.c' of 2"),
    "one letter wrong": (MANY, "emma", "'emma'.*names no state dict.*'model' of 2.*'ema' of 2"),
    "case": (MANY, "EMA", "names no state dict"),
    "a tensor": (MANY, "ema.weight", "names no state dict"),
    "half a path": ({"a": {"b": state(1)}}, "a", "names no state dict.*'a.b' of 2"),
    "a path too far": (MANY, "ema.ema", "names no state dict"),
    "the empty top": (MANY, ".", "names no state dict"),
    "a dot in front": (MANY, ".ema", "names no state dict"),
    "a dot behind": (MANY, "ema.", "names no state dict"),
    "an optimizer": ({"model": state(1), "optimizer": ADAM}, "optimizer", "names no state dict"),
    "a number": ({"model": state(1), "epoch": 3}, "epoch", "names no state dict"),
    "two of one name": ({"a": {"b": state(1)}, "a.b": state(2)}, "a.b", "names several"),
    "two numbers": ({1: state(1), "1": state(2)}, None, "several"),
    "nothing": ({"epoch": 3}, "model", "no state dict, only 'epoch'"),
    "many": ({f"m{i}": state(i) for i in range(9)}, None, "3 more"),
    "named optimizer": ({"a": state(1), "b": state(2), "optimizer": NAMED_ADAM}, "c",
                        "'optimizer.state.weight' of 1 tensor with 16"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_a_choice_that_is_not_clear_is_refused_with_the_names(kind: str, tmp_path: Path) -> None:
    content, chosen, cause = REFUSED[kind]
    torch.save(content, tmp_path / "all.pt")
    with pytest.raises(InputError, match=cause) as caught:
        open_source(tmp_path / "all.pt", state_dict=chosen)
    assert str(tmp_path / "all.pt") in str(caught.value)
    option = [] if chosen is None else ["--state-dict", chosen]
    ended = pico.call("inspect", tmp_path / "all.pt", "--factory", "torch.nn:Identity", *option)
    assert ended.code == 2 and ended.err.count("\n") == 1


def test_safetensors_hold_nothing_to_choose_from(tmp_path: Path) -> None:
    save_file(state(1), tmp_path / "model.safetensors")
    for path in (tmp_path, tmp_path / "model.safetensors"):
        with pytest.raises(InputError, match="no state dicts to choose from"):
            open_source(path, state_dict="model")


def test_shards_of_processes_can_be_chosen_from(tmp_path: Path) -> None:
    dcp.save({"model": state(1), "ema": state(2)}, checkpoint_id=tmp_path, no_dist=True)
    with pytest.raises(InputError, match="several state dicts: 'model'"):
        open_source(tmp_path)
    source = open_source(tmp_path, state_dict="ema")
    assert bool((source.read("weight") == 2).all())


def test_a_job_takes_the_chosen_network_and_says_so(
    plain_folder: pico.PlainFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(plain_folder.path)
    own = pico.read_state(plain_folder.path / "mlp.safetensors")
    other = {key: -2 * tensor for key, tensor in own.items()}
    file, factory = tmp_path / "last.pt", ("--factory", "pico_factories:mlp")
    torch.save({"ema": own, "model": other}, file)
    job = plain_folder.model("mlp")
    wanted, _ = pico.compressed(tmp_path, job)
    changes = job | {"model.path": str(file), "output.path": str(tmp_path / "chosen")}
    ended = pico.call("compress", pico.job(tmp_path, changes))
    assert ended.code == 2 and "choose one with model.state_dict" in ended.err
    output, _ = pico.compressed(tmp_path, changes | {"model.state_dict": "ema"})
    first, second = pico.read_state(wanted), pico.read_state(output)
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert "state_dict: ema" in (output / "lrc.yaml").read_text()
    # The choice is known to verify and eval; another choice is another checkpoint.
    for command in ("verify", "eval"):
        ended = pico.call(command, output, "--against", file, *factory)
        assert ended.code == 0, ended.out + ended.err
    ended = pico.call("verify", output, "--against", file, *factory, "--state-dict", "model")
    assert ended.code == 3 and re.search("original.state_dict.*stated 'ema'", ended.out)
    assert pico.call("verify", output, "--state-dict", "ema").code == 2
    # Another choice is another job: the output is not taken for done, nor the statistics.
    changed = pico.job(tmp_path, changes | {"model.state_dict": "model"})
    assert pico.call("compress", changed, "--force").code == 0
    third = pico.read_state(output)
    assert not all(torch.equal(second[key], third[key]) for key in second if key in third)
    module = load(file, factory="pico_factories:mlp", state_dict="model")
    assert torch.equal(module.state_dict()["0.weight"], other["0.weight"])
    shown = pico.call("inspect", file, *factory, "--state-dict", "model")
    assert shown.code == 0 and "compressible: 3 layers" in shown.out
