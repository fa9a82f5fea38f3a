"""`lrc verify` without the original: what is checked, and files that are no report at all."""

from pathlib import Path
from typing import Any

import damage
import pico
import pytest
from verify_helpers import Made, failed, unchecked

from lrc_cli.verify import verify_directory


def test_without_the_original_measured_figures_are_not_checked(made: Made) -> None:
    found = verify_directory(made.output)
    assert failed(found) == []
    wanted = {"manifest.pinned", "report.run", "original", "c1", "quality", "c2"}
    assert unchecked(found) == wanted


@pytest.mark.parametrize("name", ["report.json", "lrc.yaml", "config.json", "manifest.json"])
def test_a_damaged_file_is_never_a_traceback(made: Made, tmp_path: Path, name: str) -> None:
    output = damage.copied(made.output, tmp_path)
    for content in ("", "{}", "[1, 2]", '{"files": 3}', "\x00\xff"):
        (output / name).write_text(content, encoding="latin-1")
        assert pico.call("verify", output, "-q").code in (2, 3), content


@pytest.mark.parametrize("key", ["size", "layers", "provenance", "certificate", "quality"])
def test_a_report_of_another_form_is_a_failed_statement(
    made: Made, tmp_path: Path, key: str
) -> None:
    output = damage.copied(made.output, tmp_path)
    for value in (None, {}, [{}], "text", {"statements": [{}]}):
        damage.edit_report(output, lambda report, value=value: report.update({key: value}))
        assert pico.call("verify", output, "-q").code == 3, value
    ended = pico.call("verify", output, "--against", made.original, "-q")
    assert ended.code == 3, ended.err


@pytest.mark.parametrize("change", ["delete", "text", "negative"])
def test_a_figure_that_is_no_figure_is_a_failed_statement(
    made: Made, tmp_path: Path, change: str
) -> None:
    output = damage.copied(made.output, tmp_path)

    def spoil(report: dict[str, Any]) -> None:
        errors = damage.first_factorised(report)["errors"]
        if change == "delete":
            del errors["metric"]
        errors["output"]["stored"] = "small" if change == "text" else -1

    damage.edit_report(output, spoil)
    damage.rewrite_manifest(output)
    assert pico.call("verify", output, "--against", made.original, "-q").code == 3


@pytest.mark.parametrize("key", ["purpose", "note", "not_covered", "unit"])
def test_words_that_no_figure_has_are_checked(made: Made, tmp_path: Path, key: str) -> None:
    output = damage.copied(made.output, tmp_path)

    def change(report: dict[str, Any]) -> None:
        certificate = report["certificate"]
        place = {"purpose": certificate["selection"], "unit": certificate["statements"][0]}
        place.get(key, certificate)[key] = ["x"] if key == "not_covered" else "x"
        damage.restate(certificate)

    damage.edit(change)(output)
    damage.rewrite_manifest(output)
    assert {s.split(":")[0] for s in failed(verify_directory(output))} & {
        "certificate.header",
        "certificate.statement",
    }


def test_deep_or_dangling_or_unreadable_things_are_said(made: Made, tmp_path: Path) -> None:
    output = damage.copied(made.output, tmp_path)
    (output / "link").symlink_to("nowhere")
    assert any("link" in line for line in failed(verify_directory(output)))
    (output / "link").unlink()
    damage.edit_report(output, lambda report: report["provenance"].update(config="a: b: ["))
    assert verify_directory(output).findings.failed
    (output / "manifest.json").write_text("[" * 100_000)
    ended = pico.call("verify", output)
    assert ended.code == 2 and "is not JSON" in ended.err
