"""These tests change a config by `--set` and `--output`, and see where results are printed."""

import json
import subprocess
import sys
from pathlib import Path

import pico
import pytest
from command_helpers import Changes, assert_nothing_left


@pytest.mark.parametrize(
    ("options", "pieces"),
    [
        (["--set", "compression.size=1.7"], ["compression.size", "1.7"]),
        (["--set", "compression.sizes=0.5"], ["compression.sizes", "size"]),
        (["--set", "compression.size"], ["--set"]),
        (["--set", "nothing.at.all=1"], ["nothing"]),
        (["--set", "recover.scope=layer"], ["recover.scope", "'layer'"]),
        (["--set", "output.remote_code=true"], ["output.remote_code", "not in this version"]),
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
