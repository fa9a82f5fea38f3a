"""The commands as a user meets them: options, output, exit codes, and one sentence per mistake."""

import contextlib
import errno
import io
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pico
import pytest
import torch
from pico import Models
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from lrc_cli import __version__
from lrc_cli.cli import lrc, run_command

Changes = dict[str, Any]


def assert_one_sentence(ended: pico.Ended, code: int, *pieces: str) -> None:
    """One line on standard error, with its cause and remedy, nothing on standard output."""
    assert ended.code == code, ended.err
    assert ended.out == ""
    assert ended.err.startswith("error: ") and ended.err.count("\n") == 1, ended.err
    assert "; " in ended.err, "no remedy"
    for piece in pieces:
        assert piece in ended.err


def assert_nothing_left(directory: Path) -> None:
    names = {path.name for path in directory.iterdir()}
    assert not names & {"out", "out.partial", "out.lrc-old"}


# ---------------------------------------------------------------- the surface


def test_commands_and_options_are_frozen() -> None:
    """Scripts rely on these: add, never rename."""
    surface = {
        name: sorted(max(parameter.opts, key=len) for parameter in command.params)
        for name, command in lrc.commands.items()
    }
    assert surface == {
        "compress": sorted(
            [
                *("config", "--set", "--output", "--force", "--restart", "--strict", "--junit"),
                *("--sizes", "--dry-run", "--json", "--quiet", "--verbose"),
            ]
        ),
        "plan": sorted(
            [*("config", "--set", "--output", "--sizes"), *("--json", "--quiet", "--verbose")]
        ),
        "inspect": sorted(["checkpoint", "--factory", "--trust-remote-code", "--json"]),
        "eval": sorted(
            [
                *("directory", "--against", "--data", "--part", "--num-sequences"),
                *("--sequence-length", "--factory", "--trust-remote-code", "--json", "--quiet"),
            ]
        ),
        "schema": [],
        "verify": sorted(
            [
                *("directory", "--against", "--data", "--manifest-sha256"),
                *("--factory", "--trust-remote-code", "--json", "--quiet"),
            ]
        ),
    }


LIGHT = """
import sys
from lrc_cli.cli import lrc, run_command
sys.argv = ["lrc", *sys.argv[1:]]
code = run_command(lrc)
heavy = {"torch", "transformers", "numpy", "safetensors"} & set(sys.modules)
assert not heavy, heavy
sys.exit(code)
"""


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--help"], 0),
        (["-h"], 0),
        (["compress", "--help"], 0),
        (["eval", "--help"], 0),
        (["plan", "--help"], 0),
        (["plan", "absent.yaml", "--sizes", "0.9,0.8"], 2),
        (["--version"], 0),
        (["schema"], 0),
        (["compress", "absent.yaml"], 2),
        (["compres"], 2),
    ],
)
def test_light_commands_import_nothing_heavy(arguments: list[str], code: int) -> None:
    command = [sys.executable, "-c", LIGHT, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr


def test_every_command_is_in_the_help() -> None:
    ended = pico.call("--help")
    assert ended.code == 0 and all(name in ended.out for name in lrc.commands)
    for name in lrc.commands:
        assert pico.call(name, "--help").out.startswith("Usage: ")
    assert __version__ in pico.call("--version").out


def test_the_schema_is_json() -> None:
    schema = json.loads(pico.call("schema").out)
    assert set(schema["required"]) == {"model", "calibration", "compression", "output"}


@pytest.mark.parametrize(
    "arguments", [["compress", "--sizes"], ["unknown"], ["compress"], ["eval"]]
)
def test_bad_usage_is_exit_two(arguments: list[str]) -> None:
    ended = pico.call(*arguments)
    assert ended.code == 2 and "Error" in ended.err and "Traceback" not in ended.err


# ---------------------------------------------------------------- configs


@pytest.mark.parametrize(
    ("options", "pieces"),
    [
        (["--set", "compression.size=1.7"], ["compression.size", "1.7"]),
        (["--set", "compression.sizes=0.5"], ["compression.sizes", "size"]),
        (["--set", "compression.size"], ["--set"]),
        (["--set", "nothing.at.all=1"], ["nothing"]),
        (["--set", "recover.scope=block"], ["recover.scope", "not in this version"]),
    ],
)
def test_wrong_settings_name_the_key(
    options: list[str], pieces: list[str], tmp_path: Path, llama_job: Changes
) -> None:
    ended = pico.call("compress", pico.job(tmp_path, llama_job), *options)
    assert ended.code == 2 and ended.out == "" and "Traceback" not in ended.err
    assert ended.err.startswith("error: ") and all(piece in ended.err for piece in pieces)
    assert_nothing_left(tmp_path)


def test_a_wrong_key_is_pointed_at(tmp_path: Path, llama_job: Changes) -> None:
    config = pico.job(tmp_path, llama_job | {"compression.metod": "svd", "compression.size": 1.7})
    ended = pico.call("compress", config)
    assert ended.code == 2
    assert "job.yaml:" in ended.err and "metod" in ended.err and "method" in ended.err
    assert "size" in ended.err


def test_a_missing_config_through_the_installed_command(tmp_path: Path) -> None:
    command = [Path(sys.executable).with_name("lrc"), "compress", "absent.yaml"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    ended = pico.Ended(code=done.returncode, out=done.stdout, err=done.stderr)
    assert ended.code == 2 and ended.out == ""
    assert ended.err.startswith("error: ") and "absent.yaml" in ended.err
    assert ended.err.count("\n") == 1 and not list(tmp_path.iterdir())


def test_set_and_output_override_the_config(tmp_path: Path, llama_job: Changes) -> None:
    ended = pico.call(
        "compress",
        pico.job(tmp_path, llama_job),
        "--set",
        "compression.size=0.5",
        "--set",
        "compression.method=svd",
        "--output",
        tmp_path / "else where",
        "-q",
    )
    assert (ended.code, ended.out, ended.err) == (0, f"{tmp_path / 'else where'}\n", "")
    report = json.loads((tmp_path / "else where" / "report.json").read_text())
    assert report["method"] == "svd" and report["size"]["kept_compressible"] <= 0.5
    assert not any("tokens" in layer["reason"] for layer in report["layers"])
    assert_nothing_left(tmp_path)


def test_results_go_to_standard_output_and_the_rest_elsewhere(
    tmp_path: Path, llama_job: Changes
) -> None:
    ended = pico.call("compress", pico.job(tmp_path, llama_job), "--json")
    report = json.loads(ended.out)
    assert report == json.loads((tmp_path / "out" / "report.json").read_text())
    assert all(f"{phase}: " in ended.err for phase in report["timing"])
    assert report["schema_version"] == 1


# ---------------------------------------------------------------- bad input


def damaged(directory: Path, source: Path, damage: Callable[[Path], None]) -> Path:
    """A copy of a checkpoint with something wrong."""
    shutil.copytree(source, directory / "model")
    damage(directory / "model")
    return directory / "model"


def edit_config(**changes: Any) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(config | changes))

    return edit


def edit_state(edit: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        state = pico.read_state(path)
        edit(state)
        save_file(state, path / "model.safetensors", {"format": "pt"})

    return write


def put_nan(state: dict[str, torch.Tensor]) -> None:
    weight = state["model.layers.1.mlp.up_proj.weight"].clone()
    weight[3, 5] = math.nan
    state["model.layers.1.mlp.up_proj.weight"] = weight


def truncate(path: Path) -> None:
    file = path / "model.safetensors"
    os.truncate(file, file.stat().st_size - 1000)


def remove_tokenizer(path: Path) -> None:
    for file in path.glob("tokenizer*"):
        file.unlink()


DAMAGES: dict[str, tuple[Callable[[Path], None], list[str]]] = {
    "nan": (edit_state(put_nan), ["model.layers.1.mlp.up_proj.weight", "NaN"]),
    "missing-tensor": (
        edit_state(lambda state: state.pop("model.layers.1.mlp.up_proj.weight")),  # type: ignore
        ["model.layers.1.mlp.up_proj.weight"],
    ),
    "quantised": (
        edit_config(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}),
        ["bitsandbytes", "dequantise"],
    ),
    "unnamed-quantisation": (edit_config(quantization_config={"bits": 4}), ["quantised"]),
    "truncated": (truncate, ["model.safetensors"]),
    "no-tokenizer": (remove_tokenizer, ["no tokenizer", "beside the weights"]),
    "broken-tokenizer": (
        lambda path: (path / "tokenizer.json").write_text("{"),
        ["tokenizer", "restore its files"],
    ),
    "no-weights": (lambda path: (path / "model.safetensors").unlink(), ["has no weight file"]),
    "config-not-json": (lambda path: (path / "config.json").write_text("{"), ["config.json"]),
    "unknown-architecture": (
        edit_config(model_type="unheard_of", architectures=["UnheardOf"]),
        ["UnheardOf", "upgrade transformers"],
    ),
    "unknown-class": (
        edit_config(architectures=["LlamaForTelepathy"]),
        ["no class LlamaForTelepathy", "upgrade transformers", "factory"],
    ),
    "own-class": (
        edit_config(
            architectures=["OwnLlama"], auto_map={"AutoModelForCausalLM": "modeling_own.OwnLlama"}
        ),
        ["OwnLlama", "trust_remote_code"],
    ),
    "class-no-list": (
        edit_config(architectures="LlamaForCausalLM"),
        ["architectures", '["LlamaForCausalLM"]'],
    ),
    "no-heads": (edit_config(num_attention_heads=0, num_key_value_heads=0), ["cannot be loaded"]),
    "text-for-number": (edit_config(hidden_size="wide"), ["cannot be loaded", "hidden_size"]),
    "quantisation-no-object": (
        edit_config(quantization_config="gptq"),
        ["quantization_config is not an object"],
    ),
    "other-tokenizer": (pico.write_large_tokenizer, ["token", "96", "own tokenizer"]),
    "wrong-shape": (edit_config(intermediate_size=80), ["cannot be loaded"]),
}


@pytest.mark.parametrize("kind", list(DAMAGES))
def test_a_checkpoint_that_cannot_be_compressed(
    kind: str, tmp_path: Path, llama_job: Changes
) -> None:
    damage, pieces = DAMAGES[kind]
    model = damaged(tmp_path, Path(llama_job["model.path"]), damage)
    ended = pico.call("compress", pico.job(tmp_path, llama_job | {"model.path": str(model)}), "-q")
    assert_one_sentence(ended, 2, *pieces)
    assert_nothing_left(tmp_path)


def test_a_missing_shard_is_named(tmp_path: Path, checkpoint: Models, text: Path) -> None:
    shard = "model-00002-of-00003.safetensors"
    model = damaged(tmp_path, checkpoint("qwen2"), lambda path: (path / shard).unlink())
    changes = {"model.path": str(model), "calibration.path": str(text)}
    ended = pico.call("compress", pico.job(tmp_path, changes), "-q")
    assert_one_sentence(ended, 2, shard, "copy all shards")


def test_our_own_output_is_not_compressed_again(tmp_path: Path, llama_job: Changes) -> None:
    output, _ = pico.compressed(tmp_path, llama_job)
    changes = llama_job | {"model.path": str(output), "output.path": str(tmp_path / "twice")}
    ended = pico.call("compress", pico.job(tmp_path, changes), "-q")
    assert_one_sentence(ended, 2, "already", "lrc", "dense checkpoint")
    assert not (tmp_path / "twice").exists()


BAD: dict[str, tuple[Changes, list[str]]] = {
    "no-model": ({"model.path": "absent/model"}, ["absent/model", "check the path"]),
    "no-text": ({"calibration.path": "absent.txt"}, ["absent.txt", "no such file"]),
    "too-few": ({"calibration.num_sequences": 5000}, ["5000 were asked for", "fewer"]),
    "too-long": (
        {"calibration.sequence_length": 65, "evaluation": []},
        ["sequence_length 65", "64 positions", "64 or less"],
    ),
    "no-layer": ({"compression.include": ["*.nothing"]}, ["no layer is selected", "lrc inspect"]),
    "unused-pattern": (
        {"compression.layers": {"*.q_prj": {"rank": 4}}},
        ["*.q_prj", "matches no selected layer"],
    ),
    "mixed-units": (
        {"compression.layers": {"*.q_proj": {"method": "svd"}}},
        ["allocation", "relative or uniform"],
    ),
    "loss-of-another-method": (
        {
            "compression.max_loss_increase": 0.1,
            "compression.allocation": "uniform",
            "compression.layers": {"*.q_proj": {"method": "frobenius"}},
        },
        ["max_loss_increase", "q_proj has frobenius"],
    ),
    "error-without-data": (
        {"compression.max_layer_error": 0.5, "compression.method": "svd"},
        ["max_layer_error: svd looks at no data", "use frobenius or curvature"],
    ),
    "root": ({"output.path": "/"}, ["output.path", "'/'"]),
    "here": ({"output.path": "."}, ["exists", "another output.path"]),
    "no-factory": ({"model.factory": "absent_module:build"}, ["absent_module:build"]),
}


@pytest.mark.parametrize("kind", list(BAD))
def test_jobs_that_cannot_be_done(kind: str, tmp_path: Path, llama_job: Changes) -> None:
    changes, pieces = BAD[kind]
    ended = pico.call("compress", pico.job(tmp_path, llama_job | changes), "-q")
    assert_one_sentence(ended, 2, *pieces)
    assert_nothing_left(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"compression.size": 0.01},
        {"compression.size": 0.01, "compression.allocation": "uniform"},
        {"compression.size": 0.1, "compression.size_of": "checkpoint"},
        {"compression.layers": {"*.q_proj": {"rank": 64}}},
    ],
)
def test_a_target_that_cannot_be_reached(
    changes: Changes, tmp_path: Path, llama_job: Changes
) -> None:
    ended = pico.call("compress", pico.job(tmp_path, llama_job | changes), "-q")
    assert_one_sentence(ended, 2)
    assert "compression." in ended.err
    assert_nothing_left(tmp_path)


def test_an_empty_text(tmp_path: Path, llama_job: Changes) -> None:
    (tmp_path / "empty.txt").write_text("\n\n")
    changes = llama_job | {"calibration.path": str(tmp_path / "empty.txt")}
    ended = pico.call("compress", pico.job(tmp_path, changes), "-q")
    assert_one_sentence(ended, 2, "the text is empty", "empty.txt")


def test_tensors_the_model_does_not_take(
    tmp_path: Path, plain_folder: pico.PlainFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(plain_folder.path)
    rows = str(plain_folder.path / "rows.safetensors")
    changes = plain_folder.model("attention") | {"calibration.path": rows}
    ended = pico.call("compress", pico.job(tmp_path, changes), "-q")
    assert_one_sentence(ended, 2, "calibration: the model needs the input 'attention_mask'")
    changes = plain_folder.model("mlp") | {"model.factory": None}
    ended = pico.call("compress", pico.job(tmp_path, changes), "-q")
    assert_one_sentence(ended, 2, "model.factory")


IDS = torch.arange(5, 69).reshape(8, 8)


@pytest.mark.parametrize(
    ("tensors", "pieces"),
    [
        ({"input_ids": IDS.float()}, ["torch.float32", "integers of shape (sequences, tokens)"]),
        ({"input_ids": IDS[0]}, ["shape (8,)", "(sequences, tokens)"]),
        ({"input_ids": IDS - 6}, ["token -1 is negative"]),
        ({"input_ids": IDS + 40}, ["token 108 is not one of the 96"]),
        ({"input_ids": IDS, "attention_mask": torch.ones(8, 7)}, ["(8, 7)", "(8, 8)"]),
        ({"inputs_embeds": torch.ones(8, 3, 5)}, ["fails on inputs_embeds (1, 3, 5)", "check"]),
    ],
)
def test_model_inputs_that_the_network_cannot_take(
    tensors: dict[str, torch.Tensor], pieces: list[str], tmp_path: Path, llama_job: Changes
) -> None:
    save_file(tensors, tmp_path / "data.safetensors")
    changes = llama_job | {"calibration.path": str(tmp_path / "data.safetensors")}
    config = pico.job(tmp_path, changes | {"calibration.num_sequences": 8, "evaluation": []})
    assert_one_sentence(pico.call("compress", config, "-q"), 2, "calibration: ", *pieces)
    assert_nothing_left(tmp_path)


def test_a_forward_that_does_not_fit_the_data(
    tmp_path: Path, plain_folder: pico.PlainFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(plain_folder.path)
    save_file({"x": torch.ones(50, 7)}, tmp_path / "narrow.safetensors")
    data = {"calibration.path": str(tmp_path / "narrow.safetensors")}
    ended = pico.call("compress", pico.job(tmp_path, plain_folder.model("mlp") | data), "-q")
    assert_one_sentence(ended, 2, "calibration: the network fails on x (1, 7): RuntimeError")


def test_an_output_in_the_checkpoint_or_around_it(tmp_path: Path, llama_job: Changes) -> None:
    model = tmp_path / "outer" / "model"
    shutil.copytree(llama_job["model.path"], model)
    for output in (model / "small", tmp_path / "outer"):
        changes = llama_job | {"model.path": str(model), "output.path": str(output)}
        ended = pico.call("compress", pico.job(tmp_path, changes), "-q", "--force")
        assert_one_sentence(ended, 2, "lie in one another")


def test_force_through_a_link_replaces_what_it_leads_to(tmp_path: Path, llama_job: Changes) -> None:
    real, _ = pico.compressed(tmp_path, llama_job | {"compression.method": "svd"})
    (tmp_path / "link").symlink_to("out")
    changes = {"compression.size": 0.5, "compression.method": "svd"}
    changes["output.path"] = str(tmp_path / "link")
    _, report = pico.compressed(tmp_path, llama_job | changes, "--force")
    assert (tmp_path / "link").is_symlink()
    assert json.loads((real / "report.json").read_text()) == report
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {".lrc-work", "job.yaml", "link", "out"}


def test_numbers_too_large_for_the_output_dtype(tmp_path: Path, llama_job: Changes) -> None:
    def enlarge(state: dict[str, torch.Tensor]) -> None:
        state["model.norm.weight"] = state["model.norm.weight"] * 1e6

    model = damaged(tmp_path, Path(llama_job["model.path"]), edit_state(enlarge))
    changes = {"model.path": str(model), "output.dtype": "float16", "compression.method": "svd"}
    ended = pico.call("compress", pico.job(tmp_path, llama_job | changes), "-q")
    assert_one_sentence(ended, 1, "output.dtype: float16 cannot hold", "model.norm.weight")
    assert_nothing_left(tmp_path)


# ---------------------------------------------------------------- what counts as done


def add_line(file: Path) -> None:
    file.write_text(file.read_text() + "\n")


@pytest.mark.parametrize("name", ["tokenizer_config.json", "LICENSE", "modeling_own.py"])
def test_another_file_of_the_checkpoint_is_another_job(
    name: str, tmp_path: Path, llama_job: Changes
) -> None:
    model = tmp_path / "model"
    shutil.copytree(llama_job["model.path"], model)
    (model / "modeling_own.py").write_text("x = 1\n")
    changes = llama_job | {"model.path": str(model), "compression.method": "svd"}
    output, _ = pico.compressed(tmp_path, changes)
    assert "already" in pico.call("compress", tmp_path / "job.yaml").err
    add_line(model / name)
    assert_one_sentence(pico.call("compress", tmp_path / "job.yaml", "-q"), 2, "--force")
    pico.compressed(tmp_path, changes, "--force")
    assert (output / name).read_bytes() == (model / name).read_bytes()
    assert len(list((tmp_path / ".lrc-work").iterdir())) == 2, "stale statistics were used"


def test_another_factory_is_another_job(
    tmp_path: Path, plain_folder: pico.PlainFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "folder"
    shutil.copytree(plain_folder.path, folder)
    (folder / "pico_factories.py").rename(folder / "moved_factories.py")
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)
    changes = plain_folder.model("mlp") | {"model.factory": "moved_factories:mlp"}
    pico.compressed(tmp_path, changes)
    assert "already" in pico.call("compress", tmp_path / "job.yaml").err
    add_line(folder / "moved_factories.py")
    assert_one_sentence(pico.call("compress", tmp_path / "job.yaml", "-q"), 2, "--force")
    pico.compressed(tmp_path, changes, "--force")
    assert len(list((tmp_path / ".lrc-work").iterdir())) == 2, "stale statistics were used"


@pytest.mark.parametrize("damage", ["missing", "changed"])
def test_a_damaged_output_is_not_done(damage: str, tmp_path: Path, llama_job: Changes) -> None:
    output, _ = pico.compressed(tmp_path, llama_job | {"compression.method": "svd"})
    file = output / "model.safetensors"
    data = file.read_bytes()
    file.unlink()
    if damage == "changed":
        file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    ended = pico.call("compress", tmp_path / "job.yaml", "-q")
    assert_one_sentence(ended, 2, "the output exists", "--force")


# ---------------------------------------------------------------- what the system refuses


@pytest.mark.parametrize(
    ("number", "goes_on"), [(errno.EACCES, False), (errno.ENOENT, False), (errno.ENOSPC, True)]
)
def test_only_a_full_disk_promises_to_go_on(number: int, goes_on: bool) -> None:
    def fail(**_: Any) -> None:
        raise OSError(number, os.strerror(number), "some/file")

    err = io.StringIO()
    with contextlib.redirect_stderr(err):
        assert run_command(fail) == 1
    line = err.getvalue()
    assert line.startswith(f"error: some/file: {os.strerror(number)}; ") and line.count("\n") == 1
    assert ("goes on where it stopped" in line) == goes_on


def test_a_closed_pipe_is_no_traceback() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [Path(sys.executable).with_name("lrc"), "schema"]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert done.stderr == "" and done.returncode == 1


REFUSING = {
    "proc": "/proc/x",
    "deep-in-proc": "/proc/x/y/z",
    "sys": "/sys/x",
    "below-a-file": f"{__file__}/x",
    "read-only": "{tmp}/read-only/x",
}
"""Places in which not even root can make anything."""


@pytest.mark.parametrize("command", ["compress", "plan"])
@pytest.mark.parametrize("key", ["output.path", "runtime.work_dir"])
@pytest.mark.parametrize("kind", list(REFUSING))
def test_a_place_that_cannot_be_written(
    kind: str,
    key: str,
    command: str,
    tmp_path: Path,
    llama_job: Changes,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "read-only").mkdir()
    make = os.mkdir

    def refuse(path: Any, *rest: Any, **more: Any) -> None:
        # As a read-only disk does: file modes do not keep root out.
        if "read-only" in str(path):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), path)
        make(path, *rest, **more)

    monkeypatch.setattr(os, "mkdir", refuse)
    place = REFUSING[kind].format(tmp=tmp_path)
    ended = pico.call(command, pico.job(tmp_path, llama_job | {key: place}), "-q")
    assert_one_sentence(ended, 2, f"error: {key}: ", "not a writable", f"; choose another {key}")
    names = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*"))
    assert names == ["job.yaml", "read-only"]


def test_a_work_directory_that_is_a_file_or_takes_nothing(
    tmp_path: Path, llama_job: Changes
) -> None:
    (tmp_path / "file").write_text("x")
    for place in (tmp_path / "file", Path("/proc")):
        changes = llama_job | {"runtime.work_dir": str(place)}
        ended = pico.call("compress", pico.job(tmp_path, changes), "-q")
        assert_one_sentence(ended, 2, f"error: runtime.work_dir: {place} is not a writable")
    assert (tmp_path / "file").read_text() == "x"


def test_an_output_that_cannot_be_made(tmp_path: Path, llama_job: Changes) -> None:
    (tmp_path / "file").write_text("x")
    model = tmp_path / "model"
    shutil.copytree(llama_job["model.path"], model)
    for output, piece in (
        (tmp_path / "file" / "out", "not a writable directory"),
        (tmp_path / "file", "exists"),
        (model, "is the checkpoint itself"),
    ):
        changes = llama_job | {"model.path": str(model), "output.path": str(output)}
        for options in ((), ("--force",)):
            ended = pico.call("compress", pico.job(tmp_path, changes), "-q", *options)
            assert_one_sentence(ended, 2, piece)
    assert (tmp_path / "file").read_text() == "x" and not (model / "report.json").exists()


# ---------------------------------------------------------------- inspect


def test_inspect_accounts_for_every_byte(checkpoint: Models) -> None:
    path = checkpoint("llama")
    found = json.loads(pico.call("inspect", path, "--json").out)
    state = pico.read_state(path)
    assert found["architecture"] == "LlamaForCausalLM" and len(found["layers"]) == 14
    assert found["bytes"] == sum(tensor.nbytes for tensor in state.values())
    assert found["bytes"] == found["compressible_bytes"] + sum(s["bytes"] for s in found["skipped"])
    for layer in found["layers"]:
        assert layer["shape"] == list(state[f"{layer['name']}.weight"].shape)
        assert layer["dtype"] == "bfloat16"
    reasons = {entry["name"]: entry["reason"] for entry in found["skipped"]}
    assert "embeddings is false" in reasons["model.embed_tokens.weight"]
    assert reasons["model.norm.weight"] == "a vector"


def test_inspect_for_people(checkpoint: Models) -> None:
    ended = pico.call("inspect", checkpoint("qwen2"))
    assert ended.code == 0 and ended.err == ""
    assert "Qwen2ForCausalLM" in ended.out and "3 file(s)" in ended.out
    assert "2 x q_proj" in ended.out and "64 x 64" in ended.out
    assert "left out by include and exclude" in ended.out  # lm_head


def test_inspect_of_a_plain_module(
    plain_folder: pico.PlainFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(plain_folder.path)
    found = pico.call("inspect", "mlp.safetensors", "--factory", "pico_factories:mlp", "--json")
    assert [layer["name"] for layer in json.loads(found.out)["layers"]] == ["0", "2", "4"]
    assert_one_sentence(pico.call("inspect", "mlp.safetensors"), 2, "give --factory")
    assert_one_sentence(pico.call("inspect", "absent"), 2, "absent")


# ---------------------------------------------------------------- eval


def test_eval_repeats_the_reports_figures(tmp_path: Path, llama_job: Changes) -> None:
    output, report = pico.compressed(tmp_path, llama_job)
    found = json.loads(pico.call("eval", output, "--json", "-q").out)
    (row,), (told,) = found["quality"], report["quality"]
    assert row["text"] == told["text"] and row["sha256"] == told["sha256"]
    for key in ("perplexity_before", "perplexity_after", "kl", "top1_agreement"):
        assert row[key] == pytest.approx(told[key], rel=1e-4)
    assert found["bytes"] == report["size"]["checkpoint_bytes"]
    assert min(found["seconds_per_sequence"].values()) > 0
    people = pico.call("eval", output, "-q")
    assert people.code == 0 and "perplexity" in people.out and "top-1 agreement" in people.out


def test_eval_on_other_data_against_another_checkpoint(
    tmp_path: Path, llama_job: Changes, text: Path
) -> None:
    output, _ = pico.compressed(tmp_path, llama_job)
    moved = tmp_path / "moved"
    shutil.copytree(llama_job["model.path"], moved)
    options = ["--num-sequences", 3, "--sequence-length", 16, "--json", "-q"]
    ended = pico.call(
        "eval", output, "--against", moved, "--data", text, "--part", "0.9:1", *options
    )
    found = json.loads(ended.out)
    (row,) = found["quality"]
    assert found["against"] == str(moved) and row["num_sequences"] == 3
    assert row["num_scored"] == 3 * 15
    words = text.read_text().split()
    blocks = torch.tensor([pico.VOCABULARY.index(word) for word in words[5400:]]).split(16)
    model = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32).eval()
    with torch.no_grad():
        losses = {model(input_ids=b[None], labels=b[None]).loss.item() for b in blocks}
    assert min(losses) <= row["loss_after"] <= max(losses)
    both = pico.call("eval", output, "--data", text, "--data", text, "--part", "0:0.5", *options)
    rows = json.loads(both.out)["quality"]
    assert [r["num_sequences"] for r in rows] == [3, 3]
    assert [r["text"] for r in rows] == [f"{text} 0:0.5", str(text)]
    assert rows[0]["sha256"] != rows[1]["sha256"]


def test_eval_takes_the_dtype_of_the_run(tmp_path: Path, llama_job: Changes) -> None:
    changes = {"runtime.dtype": "bfloat16", "compression.method": "svd"}
    output, report = pico.compressed(tmp_path, llama_job | changes)
    found = json.loads(pico.call("eval", output, "--json", "-q").out)
    assert found["activation_dtype"] == "bfloat16"
    loss = found["quality"][0]["loss_after"]
    assert loss == pytest.approx(report["quality"][0]["loss_after"], rel=1e-4)


def test_eval_of_a_dense_copy_is_lossless(tmp_path: Path, llama_job: Changes) -> None:
    output, _ = pico.compressed(tmp_path, llama_job | {"compression.size": 1.0})
    (row,) = json.loads(pico.call("eval", output, "--json", "-q").out)["quality"]
    assert row["perplexity_after"] == row["perplexity_before"]
    assert row["kl"] == pytest.approx(0, abs=1e-6) and row["top1_agreement"] == 1


def test_eval_of_an_encoder_and_of_a_plain_module(
    tmp_path: Path,
    checkpoint: Models,
    text: Path,
    plain_folder: pico.PlainFolder,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, changes, options in (
        ("bert", {"model.path": str(checkpoint("bert")), "calibration.path": str(text)}, []),
        ("mlp", plain_folder.model("mlp"), ["--factory", "pico_factories:mlp"]),
    ):
        monkeypatch.chdir(plain_folder.path)
        folder = tmp_path / name
        folder.mkdir()
        output, report = pico.compressed(folder, changes)
        if options:
            told = pico.call("eval", output, "-q")
            assert_one_sentence(told, 2, "give --factory pico_factories:mlp")
        ended = pico.call("eval", output, "--json", "-q", *options)
        (row,) = json.loads(ended.out)["quality"]
        told = report["quality"][0]["relative_output_error"]
        assert row["relative_output_error"] == pytest.approx(told, rel=1e-3) and told > 0


@pytest.mark.parametrize(
    ("options", "piece"),
    [
        (["--part", "0:1"], "more --part than --data"),
        (["--data", "{text}", "--part", "0.5"], "not A:B"),
        (["--data", "{text}", "--part", "0.5:0.2"], "0 <= A < B <= 1"),
        (["--data", "absent.txt"], "no such file"),
        (["--against", "absent"], "absent"),
        (["--data", "{text}", "--sequence-length", "65"], "64 positions"),
    ],
)
def test_eval_with_wrong_options(
    options: list[str], piece: str, tmp_path: Path, llama_job: Changes, text: Path
) -> None:
    output, _ = pico.compressed(tmp_path, llama_job | {"compression.method": "svd"})
    filled = [option.replace("{text}", str(text)) for option in options]
    assert_one_sentence(pico.call("eval", output, "-q", *filled), 2, piece)


@pytest.mark.parametrize("command", ["eval", "verify"])
def test_what_lrc_did_not_write(command: str, tmp_path: Path, checkpoint: Models) -> None:
    (tmp_path / "file").write_text("x")
    finished = "the directory that `lrc compress` printed"
    for place, pieces in (
        (
            checkpoint("llama"),
            ["is not a finished output of lrc: it has no manifest.json", finished],
        ),
        (tmp_path, ["is not a finished output of lrc: it has no manifest.json", finished]),
        (tmp_path / "absent", ["absent does not exist", "check the path"]),
        (tmp_path / "file", ["is not a directory", "give the directory that lrc wrote"]),
    ):
        assert_one_sentence(pico.call(command, place, "-q"), 2, f"error: {place} ", *pieces)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried 2 GiB.\nMore."),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory"
        ),
    ],
)
def test_no_memory_left_is_one_sentence_with_the_lever(
    error: Exception, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(**_: Any) -> None:
        raise error

    assert run_command(fails) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: out of memory (") and said.count("\n") == 1
    assert "ask `lrc plan` what it takes" in said


def test_an_error_of_ours_is_not_taken_for_want_of_memory() -> None:
    def fails(**_: Any) -> None:
        raise RuntimeError("a mistake in the code")

    with pytest.raises(RuntimeError, match="a mistake"):
        run_command(fails)
