"""Every kind of leaf of a report is attacked, and whole attacks are made that hide themselves."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attacks
import damage
import pico
import pytest
from attack_jobs import PREPARE, Target, make_target
from attack_levels import level_of
from verify_helpers import failed

from lrc_cli.verify import verify_directory
from lrc_cli.verify.files.written import open_written
from lrc_cli.verify.statements import Findings

PER_KIND = 40
"""The attacks on leaves in each kind of output, spread over all leaves that no other kind has."""

Targets = Callable[[str], Target]
Change = Callable[[dict[str, Any]], None]


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Targets:
    """Finished outputs by kind, each made once."""
    root, made = tmp_path_factory.mktemp("attacked"), {}

    def get(kind: str) -> Target:
        if kind not in made:
            folder = root / kind
            folder.mkdir()
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(folder)
                patch.syspath_prepend(str(folder))
                made[kind] = make_target(kind, folder, text)
                sys.modules.pop("pico_factories", None)
        return made[kind]

    return get


@pytest.mark.parametrize("kind", PREPARE)
def test_what_the_files_alone_do_not_catch_is_listed(target: Targets, kind: str) -> None:
    output = target(kind).output
    report, written = damage.read_report(output), open_written(output, Findings())
    assert not attacks.findings_on(written, report).failed
    every = attacks.sampled(attacks.attacks_on(report))
    step = max(1, len(every) // PER_KIND)
    for attack in every[list(PREPARE).index(kind) % step :: step]:
        found = attacks.findings_on(written, attack.apply(report))
        assert found.failed or level_of(attack.name) is not None, attack.name


def drop_the_worse_text(report: dict[str, Any]) -> None:
    """Drops a row of two."""
    report["quality"] = report["quality"][:1]


def add_a_text(report: dict[str, Any]) -> None:
    """Adds a row with figures that nobody measured."""
    report["quality"].append({**report["quality"][0], "text": "code"})


def forge_a_gate(report: dict[str, Any]) -> None:
    """Says that a gate has another limit."""
    report["gates"][0]["limit"] = 99.0


def drop_the_certificate(report: dict[str, Any]) -> None:
    """Puts a claim in the certificate's place."""
    report["certificate"] = {"statements": [], "note": "provably lossless"}
    for row in report["layers"]:
        row.get("errors", {}).pop("held_out", None)


def say_that_nobody_asked(report: dict[str, Any]) -> None:
    """Says that no certificate was asked for."""
    drop_the_certificate(report)
    note = "none was asked for: the configuration has no certification section"
    report["certificate"]["note"] = note


def fewer_promised(report: dict[str, Any]) -> None:
    """Raises the confidence, in the sentences too."""
    report["certificate"]["confidence"] = 0.999
    damage.restate(report["certificate"])


def no_optima(report: dict[str, Any]) -> None:
    """Takes all optima away."""
    for row in report["layers"]:
        if "errors" in row:
            row["errors"]["metric"]["optimum"] = row["errors"]["output"]["optimum"] = None


def no_held_out(report: dict[str, Any]) -> None:
    """Takes the held-out errors away."""
    for row in report["layers"]:
        row.get("errors", {}).pop("held_out", None)


def other_reason(report: dict[str, Any]) -> None:
    """Puts a claim where a reason belongs."""
    report["layers"][0]["reason"] = "provably lossless"


def other_class(report: dict[str, Any]) -> None:
    """Makes the card ask for a stranger's code."""
    report["architecture"] = "Not A Class"


def hide_a_layer(report: dict[str, Any]) -> None:
    """Lists a dense layer among the tensors that are not compressible."""
    row = next(row for row in report["layers"] if row["storage"] == "dense")
    report["layers"].remove(row)
    share = row["bytes_before"] / report["size"]["checkpoint_bytes"]["before"]
    key = f"{row['name']}.weight"
    report["skipped"].append(
        {"name": key, "reason": "a vector", "bytes": row["bytes_before"], "share": share}
    )


WHOLE: dict[str, Change] = {
    change.__name__: change
    for change in (
        drop_the_worse_text,
        add_a_text,
        forge_a_gate,
        drop_the_certificate,
        say_that_nobody_asked,
        fewer_promised,
        no_optima,
        no_held_out,
        other_reason,
        other_class,
        hide_a_layer,
    )
}


@pytest.mark.parametrize("name", WHOLE)
def test_an_attack_that_hides_itself_is_found(target: Targets, tmp_path: Path, name: str) -> None:
    output = damage.copied(target("curvature").output, tmp_path)
    report = damage.read_report(output)
    WHOLE[name](report)
    attacks.hide(output, report)
    assert failed(verify_directory(output)), name


def test_side_files_that_are_dropped_or_added_are_found(target: Targets, tmp_path: Path) -> None:
    made = target("curvature")
    for name, change in (("dropped", "unlink"), ("added", "write")):
        output = damage.copied(made.output, tmp_path / name)
        report = damage.read_report(output)
        hashes = report["provenance"]["checkpoint_sha256"]
        if change == "unlink":
            (output / "LICENSE").unlink()
            del hashes["LICENSE"]
        else:
            (output / "NOTICE").write_bytes((output / "LICENSE").read_bytes())
            hashes["NOTICE"] = hashes["LICENSE"]
        attacks.hide(output, report)
        found = failed(verify_directory(output, against=made.original))
        assert any(line.startswith("original.") for line in found), name


def test_a_fallback_that_is_hidden_is_found_on_the_data(target: Targets, tmp_path: Path) -> None:
    made = target("experts")
    output = damage.copied(made.output, tmp_path)
    report = damage.read_report(output)
    fallen = [row for row in report["layers"] if row["fallback"]]
    for row in fallen:
        row |= {"fallback": False, "reason": "dense pays better at this size"}
    attacks.hide(output, report)
    found = failed(verify_directory(output, against=made.original))
    assert fallen and any(line.startswith("c1.dense") for line in found)


def test_pages_of_another_version_are_left_open_and_strict_minds(
    target: Targets, tmp_path: Path
) -> None:
    output = damage.copied(target("svd").output, tmp_path)
    fine = pico.call("verify", output, "-q", "--strict")
    assert fine.code == 0 and "LEFT OPEN" not in fine.out
    report = damage.read_report(output)
    report["provenance"]["lrc_version"] = "0.0.9"
    for file in output.glob("*.safetensors"):
        damage.edit_metadata(file, '"tool_version":"0.1.0"', '"tool_version":"0.0.9"')
    attacks.hide(output, report)
    (output / "README.md").write_text("# provably lossless\n")
    damage.rewrite_manifest(output)
    plain = pico.call("verify", output, "-q")
    assert plain.code == 0, plain.out
    assert "PAGES OF ANOTHER VERSION" in plain.out and "LEFT OPEN: " in plain.out
    strict = pico.call("verify", output, "-q", "--strict")
    assert strict.code == 3 and "not everything could be checked" in strict.err


def test_a_comment_in_the_config_is_found(target: Targets, tmp_path: Path) -> None:
    output = damage.copied(target("svd").output, tmp_path)
    report = damage.read_report(output)
    report["provenance"]["config"] += "# provably lossless\n"
    (output / "lrc.yaml").write_text(report["provenance"]["config"])
    attacks.hide(output, report)
    assert any("comments" in line for line in failed(verify_directory(output)))


def test_the_table_of_the_documentation_is_the_list_of_the_tests() -> None:
    script = Path(__file__).parents[2] / "scripts" / "verify_table.py"
    assert subprocess.run([sys.executable, script, "--check"], check=False).returncode == 0
