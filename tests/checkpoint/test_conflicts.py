"""Hostile and odd checkpoints are refused with both places named, or read as the plain one.

Every case writes a directory (or a file) of one tiny network. The outcome is the plain network's
tensors, or exit code 2 with the words that the message must have.
"""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pico
import pytest
import torch
from pico import Models, State
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed import checkpoint as dcp

from lrc_cli import load
from lrc_cli.checkpoint.source import open_source
from lrc_cli.errors import InputError
from lrc_cli.network.opening import open_module

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
OLD, OLD_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
OLD_SHARDS = ("pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin")


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4))


def tensors(seed: int = 0) -> State:
    generator = torch.Generator().manual_seed(seed)
    return {k: torch.randn(x.shape, generator=generator) for k, x in net().state_dict().items()}


STATE, OTHER = tensors(), tensors(1)
MAP = {key: SHARDS[key[0] == "2"] for key in STATE}


def save(file: Path, state: State) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix.lower() == ".safetensors":
        save_file({key: x.clone() for key, x in state.items()}, file)
    else:
        torch.save(state, file)


def index(file: Path, weight_map: Any) -> None:
    file.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def shards(
    path: Path,
    state: State = STATE,
    *,
    names: tuple[str, str] = SHARDS,
    name: str = INDEX,
    **changes: str,
) -> None:
    """Writes two shards with an index; `changes` are entries of the index."""
    weight_map = {key: names[key[0] == "2"] for key in state}
    for file in names:
        save(path / file, {key: x for key, x in state.items() if weight_map[key] == file})
    index(path / name, weight_map | changes)


def distributed(path: Path, state: State) -> None:
    dcp.save({key: x.clone() for key, x in state.items()}, checkpoint_id=path, no_dist=True)


def renamed(change: Callable[[str], str], state: State = STATE) -> State:
    return {change(key): x for key, x in state.items()}


Case = tuple[Callable[[Path], Any], tuple[str, ...] | None]
CASES: dict[str, Case] = {}


def case(name: str, *named: str) -> Callable[[Callable[[Path], Any]], Callable[[Path], Any]]:
    """Adds a case; without words for the message, the plain network must be read."""

    def add(write: Callable[[Path], Any]) -> Callable[[Path], Any]:
        CASES[name] = (write, named or None)
        return write

    return add


Write = Callable[[Path], Any]


def both(name: str, first: Write, second: Write, *named: str) -> None:
    """Adds a case of two things in one directory."""
    case(name, *named)(lambda path: (first(path), second(path)))


def single(state: State, name: str = SINGLE) -> Callable[[Path], Any]:
    return lambda path: save(path / name, state)


def sharded(state: State, **options: Any) -> Callable[[Path], Any]:
    return lambda path: shards(path, state, **options)


old_shards = {"names": OLD_SHARDS, "name": OLD_INDEX}

# ---------------------------------------------------------------- two forms side by side

both("single and shards, equal", single(STATE), sharded(STATE))
both("single over older shards", single(STATE), sharded(OTHER), SINGLE, INDEX, "numbers differ")
both("single and bin, equal", single(STATE), single(STATE, OLD))
both("single and another bin", single(STATE), single(OTHER, OLD), SINGLE, OLD)
both("single and bin shards, equal", single(STATE), sharded(STATE, **old_shards))
both("single and other bin shards", single(STATE), sharded(OTHER, **old_shards), SINGLE, OLD_INDEX)
both("shards and another bin", sharded(STATE), single(OTHER, OLD), INDEX, OLD)
both("shards and other bin shards", sharded(STATE), sharded(OTHER, **old_shards), INDEX, OLD_INDEX)
both("bin over older bin shards", single(STATE, OLD), sharded(OTHER, **old_shards), OLD, OLD_INDEX)
both("distributed beside, equal", single(STATE), lambda path: distributed(path, STATE))
both(
    "distributed beside, other",
    single(STATE),
    lambda path: distributed(path, OTHER),
    SINGLE,
    ".metadata",
)
both("twin .pt, equal", single(STATE, "net.safetensors"), single(STATE, "net.pt"))
both(
    "twin .pt, other",
    single(STATE, "net.safetensors"),
    single(OTHER, "net.pt"),
    "net.safetensors",
    "net.pt",
)
both("one number differs", single(STATE), single(STATE | {"0.bias": STATE["0.bias"] + 1}, OLD), OLD)
both("another dtype", single(STATE), single({k: x.double() for k, x in STATE.items()}, OLD), OLD)
HALVES = {key: x.bfloat16() for key, x in STATE.items()}
PRECISIONS = (SINGLE, OLD, "two precisions", "float32", "bfloat16", "move the precision")
both("rounded", single(STATE), single(HALVES, OLD), *PRECISIONS)
both("rounded, the other way", single(HALVES), single(STATE, OLD), *PRECISIONS)
both(
    "one number is not rounded",
    single(STATE),
    single(HALVES | {"2.bias": HALVES["2.bias"] + 1}, OLD),
    "numbers differ in 2.bias",
)
case("large letters")(single(STATE, "net.SafeTensors"))
case("large letters, torch")(single(STATE, "net.PT"))

# ---------------------------------------------------------------- names that readers pass over

TWINS = {
    SINGLE: (
        *("Model.SafeTensors", "MODEL.safetensors", "model.SAFETENSORS", "model.pt", "model.PTH"),
        *("MODEL.BIN", "model.ckpt", "pytorch_model.BIN", "PyTorch_Model.bin", "pytorch_model.pt"),
        *("pytorch_model.pth", "pytorch_model.ckpt", "pytorch_model.safetensors"),
    ),
    OLD: ("PYTORCH_MODEL.BIN", "pytorch_model.pt", "model.bin", "Model.PT"),
    "net.safetensors": ("NET.safetensors", "net.SafeTensors", "Net.pt", "net.CKPT", "model.PT"),
    "net.pt": ("NET.PT", "net.bin", "Net.Ckpt"),
}
"""Files beside the file that is read, which may hold another network."""
for _first, _seconds in TWINS.items():
    for _second in _seconds:
        both(f"{_first} and {_second}, equal", single(STATE, _first), single(STATE, _second))
        both(
            f"{_first} and {_second}, other",
            single(STATE, _first),
            single(OTHER, _second),
            _first,
            _second,
            "numbers differ",
        )
for _second in ("Model.safetensors", "pytorch_model.pt", "MODEL.bin", "model.ckpt"):
    both(f"shards and {_second}, equal", sharded(STATE), single(STATE, _second))
    both(f"shards and {_second}, other", sharded(STATE), single(OTHER, _second), INDEX, _second)
LARGE_SHARDS = ("MODEL-00001-OF-00002.SAFETENSORS", "MODEL-00002-OF-00002.SAFETENSORS")
large_shards = {"names": LARGE_SHARDS, "name": "MODEL.SAFETENSORS.INDEX.JSON"}
case("shards in large letters")(sharded(STATE, **large_shards))
both("shards in large letters beside", single(STATE), sharded(STATE, **large_shards))
both(
    "other shards in large letters beside",
    single(STATE),
    sharded(OTHER, **large_shards),
    SINGLE,
    "MODEL.SAFETENSORS.INDEX.JSON",
)
both(
    "one shard in large letters beside",
    single(STATE),
    single(OTHER, LARGE_SHARDS[0]),
    SINGLE,
    LARGE_SHARDS[0],
)
both("no checkpoint in large letters", single(STATE), lambda p: (p / "MODEL.PT").write_text("x"))
both("another network's suffix", single(STATE), single({"lr": torch.ones(2, 2)}, "model.PT"))
both("two names", single(STATE, "a.safetensors"), single(STATE, "B.safetensors"), "several")

both("another shape", single(STATE), single(STATE | {"0.bias": torch.zeros(7)}, OLD), SINGLE, OLD)
both("a bias more", single(STATE), single(STATE | {"position_ids": torch.arange(4)}, OLD))
both(
    "a layer more",
    single(STATE),
    single(STATE | {"4.weight": torch.ones(4, 4)}, OLD),
    SINGLE,
    OLD,
    "4.weight",
)
both("a tied weight more", single(STATE), single(STATE | {"tied.weight": STATE["2.weight"]}, OLD))
both("no name in common", single(STATE), single({"x.weight": torch.ones(2, 2)}, OLD), SINGLE, OLD)
both("a wrapped copy", single(STATE), single(renamed("module.{}".format), OLD))
both("another form is damaged", single(STATE), lambda p: (p / OLD).write_text("x"), SINGLE, OLD)
both(
    "older shards without an index",
    single(STATE),
    lambda path: [save(path / name, OTHER) for name in SHARDS],
    SINGLE,
    SHARDS[0],
)
both(
    "equal shards without an index",
    single(STATE),
    lambda path: save(path / SHARDS[0], {"0.bias": STATE["0.bias"]}),
)
both(
    "shards of an older count",
    sharded(STATE),
    single(OTHER, "model-00001-of-00003.safetensors"),
    INDEX,
    "model-00001-of-00003.safetensors",
)
both("a file of the trainer", single(STATE), single({"lr": torch.ones(2)}, "training_args.bin"))
both("an optimizer", single(STATE), single({"lr": torch.ones(2, 2)}, "optimizer.pt"))
both("a stray file of metadata", single(STATE), lambda p: (p / ".metadata").write_text("x"))

# ---------------------------------------------------------------- one name twice


@case("one key in two shards, equal")
def _(path: Path) -> None:
    shards(path)
    save(path / SHARDS[1], {k: x for k, x in STATE.items() if k[0] == "2" or k == "0.weight"})


@case("one key in two shards, zeros", *SHARDS, "0.weight")
def _(path: Path) -> None:
    shards(path)
    part = {key: x for key, x in STATE.items() if key[0] == "2"}
    save(path / SHARDS[1], part | {"0.weight": torch.zeros(6, 8)})


@case("one key in two bin shards, zeros", *OLD_SHARDS, "0.weight")
def _(path: Path) -> None:
    shards(path, names=OLD_SHARDS, name=OLD_INDEX)
    part = {key: x for key, x in STATE.items() if key[0] == "2"}
    save(path / OLD_SHARDS[1], part | {"0.weight": torch.zeros(6, 8)})


@case("one key in two bin shards, equal")
def _(path: Path) -> None:
    shards(path, names=OLD_SHARDS, name=OLD_INDEX)
    part = {key: x for key, x in STATE.items() if key[0] == "2"}
    save(path / OLD_SHARDS[1], part | {"0.weight": STATE["0.weight"].clone()})


@case("one key twice in the index", INDEX, "0.weight twice", *SHARDS)
def _(path: Path) -> None:
    shards(path)
    text = json.dumps(MAP)[:-1] + f', "0.weight": "{SHARDS[1]}"}}'
    (path / INDEX).write_text(f'{{"weight_map": {text}}}')


case("wrapped and plain, equal")(single(STATE | renamed("_orig_mod.{}".format)))
case("wrapped and plain, other", "_orig_mod.0.bias", "0.bias in", SINGLE)(
    single(STATE | renamed("_orig_mod.{}".format, OTHER))
)
case("wrapped twice, other", "_orig_mod.0.bias", "module.0.bias")(
    single(renamed("module.{}".format) | renamed("_orig_mod.{}".format, OTHER))
)

# ---------------------------------------------------------------- an index and its files

case("a shard is missing", INDEX, SHARDS[1], "missing")(
    lambda path: (shards(path), (path / SHARDS[1]).unlink())
)
case("a shard is a folder", INDEX, SHARDS[1], "missing")(
    lambda path: (shards(path), (path / SHARDS[1]).unlink(), (path / SHARDS[1]).mkdir())
)
case("a key that no shard has", INDEX, "9.weight", SHARDS[0], "no other file")(
    sharded(STATE, **{"9.weight": SHARDS[0]})
)
case("a key in the other shard", INDEX, "0.weight", *SHARDS)(
    sharded(STATE, **{"0.weight": SHARDS[1]})
)
case("a key of a bin shard in the other", OLD_INDEX, "0.weight", *OLD_SHARDS)(
    sharded(STATE, **old_shards, **{"0.weight": OLD_SHARDS[1]})
)
case("a key that the index lacks", INDEX, "0.bias", SHARDS[0])(
    lambda path: (
        shards(path),
        index(path / INDEX, {key: name for key, name in MAP.items() if key != "0.bias"}),
    )
)
case("a name of another folder", INDEX, "../elsewhere.safetensors", "outside")(
    lambda path: (
        sharded(STATE, **{"0.weight": "../elsewhere.safetensors"})(path),
        save(path.parent / "elsewhere.safetensors", STATE),
    )
)
case("a name that leads out and in", INDEX, "outside")(
    lambda path: shards(path, **{"0.weight": f"../{path.name}/{SHARDS[0]}"})
)
case("an absolute name", INDEX, "outside")(
    lambda path: shards(path, **{"0.weight": str(path / SHARDS[0])})
)
case("an absolute name of Windows", INDEX, "outside")(
    sharded(STATE, **{"0.weight": "C:\\model.safetensors"})
)
case("an empty name", INDEX, "outside")(sharded(STATE, **{"0.weight": ""}))
case("a name that is too long", INDEX, "missing")(sharded(STATE, **{"0.weight": "x" * 999}))
case("a name with a zero", INDEX, "missing")(sharded(STATE, **{"0.weight": "x\0.safetensors"}))
case("a name of a device", INDEX, "outside")(sharded(STATE, **{"0.weight": "/dev/zero"}))
case("an empty map", INDEX, "weight_map")(lambda path: index(path / INDEX, {}))
case("a list for a map", INDEX, "weight_map")(lambda path: index(path / INDEX, list(STATE)))
case("a number for a name", INDEX, "weight_map")(sharded(STATE, **{"0.weight": 3}))  # type: ignore[arg-type]
case("no JSON", INDEX, "not JSON")(lambda path: (shards(path), (path / INDEX).write_text("{")))
case("a leftover index", INDEX, SHARDS[0], "missing")(
    lambda path: (save(path / SINGLE, STATE), index(path / INDEX, MAP))
)
case("formats in one index", INDEX, "kinds")(
    lambda path: (shards(path, **{"0.weight": OLD}), save(path / OLD, STATE))
)
case("an index of the single file")(
    lambda path: (save(path / SINGLE, STATE), index(path / INDEX, dict.fromkeys(STATE, SINGLE)))
)
case("a dot before the names")(
    lambda path: (shards(path), index(path / INDEX, {k: f"./{x}" for k, x in MAP.items()}))
)
case("links into a cache")(
    lambda path: (
        shards(path),
        [
            ((path / x).rename(path.parent / f"blob-{x}"), (path / x).symlink_to(f"../blob-{x}"))
            for x in SHARDS
        ],
    )
)
DIFFUSERS = "diffusion_pytorch_model.safetensors.index.json"
PARTS = ("diffusion_pytorch_model-1.safetensors", "diffusion_pytorch_model-2.safetensors")
case("diffusers' index")(sharded(STATE, names=PARTS, name=DIFFUSERS))
case("an index of any name")(sharded(STATE, names=("a.bin", "b.bin"), name="weights.index.json"))
both(
    "diffusers' index beside another single",
    sharded(STATE, names=PARTS, name=DIFFUSERS),
    single(OTHER),
    DIFFUSERS,
    SINGLE,
)
both(
    "two indexes that differ",
    sharded(STATE),
    sharded(OTHER, names=PARTS, name=DIFFUSERS),
    INDEX,
    DIFFUSERS,
)
both("another program's index", single(STATE), lambda p: (p / "search.index.json").write_text("{}"))

# ---------------------------------------------------------------- names that wrappers changed

WRAPPED: dict[str, Callable[[str], str]] = {
    "data parallel": "module.{}".format,
    "compile": "_orig_mod.{}".format,
    "both": "module._orig_mod.{}".format,
    "FSDP": "_fsdp_wrapped_module.{}".format,
    "FSDP in the middle": lambda key: key.replace(".", "._fsdp_wrapped_module."),
    "checkpointing": lambda key: key.replace(".", "._checkpoint_wrapped_module."),
    "data parallel in the middle": lambda key: key.replace(".", ".module."),
    "a part of the network": lambda key: f"_orig_mod.{key}" if key[0] == "2" else key,
    "Lightning": "model.{}".format,
    "Lightning and compile": "model._orig_mod.{}".format,
    "all": lambda key: "module._forward_module.model._orig_mod." + key.replace(".", ".module."),
}
for _name, _change in WRAPPED.items():
    for _file in (SINGLE, OLD, "net.pt"):
        case(f"{_name}, {_file}")(single(renamed(_change), _file))
    case(f"{_name}, distributed")(lambda path, how=_change: distributed(path, renamed(how)))  # type: ignore[misc]
    case(f"{_name}, shards")(
        lambda path, how=_change: (  # type: ignore[misc]
            shards(path),
            [save(path / name, renamed(how, load_file(path / name))) for name in SHARDS],
            index(path / INDEX, {how(key): name for key, name in MAP.items()}),
        )
    )
AVERAGED = renamed("module.{}".format) | {"n_averaged": torch.tensor(7)}
case("averaged")(single(AVERAGED))
case("averaged in torch.save")(single({"state_dict": AVERAGED}, "swa.pt"))  # type: ignore[dict-item]
case("class weights beside")(single({"model": STATE, "w": torch.ones(4)}, "a.pt"))  # type: ignore[dict-item]
case("another network's prefix", "encoder.0.weight")(single(renamed("encoder.{}".format)))


def content(path: Path) -> dict[str, str]:
    files = (file for file in sorted(path.rglob("*")) if file.is_file())
    return {str(file): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def check_refused(path: Path, named: tuple[str, ...], **options: Any) -> None:
    with pytest.raises(InputError) as caught:
        open_module(open_source(path), **options)
    assert caught.value.exit_code == 2 and caught.value.remedy
    assert all(word in str(caught.value) for word in named), str(caught.value)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CASES)
def test_a_checkpoint_is_read_as_one_network_or_refused(name: str, tmp_path: Path) -> None:
    write, named = CASES[name]
    path = tmp_path / "source"
    path.mkdir()
    write(path)
    before = content(tmp_path)
    if named is not None:
        check_refused(path, named, factory=f"{__name__}:net")
    else:
        module, source = open_module(open_source(path), factory=f"{__name__}:net")
        assert set(source.tensors) == set(STATE)
        assert all(torch.equal(source.read(key), STATE[key]) for key in STATE)
        assert all(torch.equal(x, STATE[key]) for key, x in module.state_dict().items())
        assert {source.name_of(file) for file in source.decisive} <= source.hashes.keys()
    assert content(tmp_path) == before


def test_a_name_that_could_be_two_of_the_modules_is_refused(tmp_path: Path) -> None:
    module = nn.ModuleDict({"module": nn.Linear(2, 2), "a": nn.Linear(2, 2)})
    deep = nn.ModuleDict({"a": nn.ModuleDict({"module": nn.Linear(2, 2)}), "x": module})
    deep["module"] = nn.ModuleDict({"a": nn.Linear(2, 2)})
    state = deep.state_dict()
    state["module.a.module.weight"] = state.pop("a.module.weight")
    save(tmp_path / SINGLE, state)
    with pytest.raises(InputError, match=r"module.a.module.weight is the module's .* or its"):
        load(tmp_path, factory=lambda: deep)


def test_a_modules_own_names_stay(tmp_path: Path) -> None:
    for wrapped in (nn.DataParallel(net()), torch.compile(net())):
        save(tmp_path / "net.pt", wrapped.state_dict())
        kept = load(tmp_path / "net.pt", factory=lambda wrapped=wrapped: wrapped)
        assert kept.state_dict().keys() == wrapped.state_dict().keys()


# ---------------------------------------------------------------- transformers


def llama(path: Path, change: Callable[[Path, State], None]) -> State:
    state = load_file(path / SINGLE)
    change(path, state)
    return state


def config(path: Path, **changes: Any) -> None:
    file = path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def moved(path: Path, state: State, name: str, change: Callable[[str], str] = str) -> None:
    """Writes the network to another file than transformers looks for, or under other names."""
    (path / SINGLE).unlink()
    save_file(renamed(change, state), path / name, {"format": "pt"})


def zeros(state: State) -> State:
    return {key: torch.zeros_like(x) for key, x in state.items()}


TIED = "model.embed_tokens.weight"
LLAMA: dict[str, tuple[Callable[[Path, State], Any], tuple[str, ...] | None]] = {
    "plain": (lambda path, state: None, None),
    "compile": (lambda path, state: moved(path, state, SINGLE, "_orig_mod.{}".format), None),
    "data parallel": (lambda path, state: moved(path, state, SINGLE, "module.{}".format), None),
    "FSDP": (
        lambda path, state: moved(
            path, state, SINGLE, lambda k: k.replace("layers.0.", "layers.0._fsdp_wrapped_module.")
        ),
        None,
    ),
    "both, in a file of another name": (
        lambda path, state: moved(
            path, state, OLD.replace(".bin", ".safetensors"), "module._orig_mod.{}".format
        ),
        None,
    ),
    "a merged adapter's prefix": (
        lambda path, state: moved(path, state, SINGLE, "base_model.model.{}".format),
        ("begin with 'base_model.model.'",),
    ),
    "an average": (
        lambda path, state: moved(path, state, SINGLE, "ema_model.{}".format),
        ("begin with 'ema_model.'", "rename"),
    ),
    "another file's name": (lambda path, state: moved(path, state, "net.safetensors"), None),
    "a named file": (
        lambda path, state: (
            moved(path, state, "net.safetensors"),
            config(path, transformers_weights="net.safetensors"),
        ),
        None,
    ),
    "a named file beside another": (
        lambda path, state: (
            save_file(zeros(state), path / "net.safetensors"),
            config(path, transformers_weights="net.safetensors"),
        ),
        ("net.safetensors", SINGLE),
    ),
    "a named file that is missing": (
        lambda path, state: config(path, transformers_weights="net.safetensors"),
        ("transformers_weights", "net.safetensors", "missing"),
    ),
    "a named file outside": (
        lambda path, state: config(path, transformers_weights="../net.safetensors"),
        ("config.json", "../net.safetensors", "outside"),
    ),
    "a named list": (
        lambda path, state: config(path, transformers_weights=["net.safetensors"]),
        ("transformers_weights",),
    ),
    "shards beside": (
        lambda path, state: (
            save_file(zeros(state), path / "old.safetensors"),
            index(path / INDEX, dict.fromkeys(state, "old.safetensors")),
        ),
        (SINGLE, INDEX),
    ),
    "one parameter under two names": (
        lambda path, state: save_file(
            state | {TIED.removeprefix("model."): state[TIED] + 1}, path / SINGLE, {"format": "pt"}
        ),
        (TIED, "embed_tokens.weight", "differ"),
    ),
    "one parameter under two names, equal": (
        lambda path, state: save_file(
            state | {TIED.removeprefix("model."): state[TIED].clone()},
            path / SINGLE,
            {"format": "pt"},
        ),
        None,
    ),
    "compiled and plain": (
        lambda path, state: save_file(
            state | renamed("_orig_mod.{}".format, zeros(state)), path / SINGLE, {"format": "pt"}
        ),
        (SINGLE, "_orig_mod.", "differ"),
    ),
}


@pytest.mark.parametrize("name", LLAMA)
def test_transformers_runs_what_is_read(name: str, checkpoint: Models, tmp_path: Path) -> None:
    path = tmp_path / "source"
    shutil.copytree(checkpoint("llama"), path)
    change, named = LLAMA[name]
    state = load_file(path / SINGLE)
    change(path, {key: x.clone() for key, x in state.items()})
    before = content(path)
    if named is not None:
        check_refused(path, named, factory=None)
    else:
        module, source = open_module(open_source(path), factory=None)
        found = module.state_dict()
        assert all(torch.equal(found[key], x) for key, x in state.items())
        assert len(state) == len(source.tensors)
        assert {source.name_of(file) for file in source.decisive} <= source.hashes.keys()
    assert content(path) == before


@pytest.mark.parametrize("name", ["compile", "a named file"])
def test_what_wrappers_changed_is_said_and_verified(
    name: str, checkpoint: Models, text: Path, tmp_path: Path
) -> None:
    path = tmp_path / "source"
    shutil.copytree(checkpoint("llama"), path)
    LLAMA[name][0](path, load_file(path / SINGLE))
    changes: dict[str, Any] = {"model.path": str(path), "calibration.path": str(text)}
    changes |= {
        "evaluation": None,
        "compression.method": "frobenius",
        "calibration.num_sequences": 4,
    }
    output, _ = pico.compressed(tmp_path, changes)
    assert "transformers_weights" not in json.loads((output / "config.json").read_text())
    assert type(load(output)).__name__ == "LlamaForCausalLM"
    for command in ("verify", "eval"):
        ended = pico.call(command, output, "--against", path)
        assert ended.code == 0, ended.out + ended.err
    said = pico.call("inspect", path).out
    assert ("came off" in said) == (name == "compile")
