"""These tests check scripts/curve.py: names of methods, the file of rows, tables and picture."""

import argparse
import json
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import curve
import pico
import pytest
from curve_figure import Panel, draw
from curve_results import DENSE, Results, Row, Subject, grouped, picture, table
from tasks.common import Setting
from torch import nn

SUBJECT = Subject(
    title="pico",
    figures={"loss": "loss on words"},
    relative=True,
    targets={("ours+recover", 0.6, "loss"): 1.5},
)


def row(method: str, share: float, loss: float, **changes: Any) -> Row:
    tokens = 64 if "+" in method else 0
    values = {
        **{"model": "pico", "seed": 0, "method": method, "share": share, "tokens": tokens},
        **{"scored": 0, "scores": {"loss": loss}, "kept": share, "seconds": 1.0, "phases": {}},
        **{"commit": "abc1234"},
    }
    return Row(**{**values, **changes})


ROWS = [
    row(DENSE, 1.0, 2.0),
    row("svd", 0.6, 4000.0),
    row("ours", 0.6, 8.0),
    row("ours", 0.4, 32.0),
    row("ours+recover", 0.6, 4.0),
    row("ours+recover", 0.4, 8.0),
    row("ours+recover", 0.4, 2.0, tokens=128),
]


@pytest.mark.parametrize(
    "name", [*curve.METHODS, "ours/factors+recover", "ours/sequential+block", "ours/plain/factors"]
)
def test_a_method_says_what_lrc_compress_is_told(name: str) -> None:
    assert curve.method(name) == name
    settings = curve.settings_of(name, lambda: ["recover.tokens=64"])
    assert ("recover.tokens=64" in settings) == ("+" in name)
    assert ("compression.allocation=uniform" in settings) == (not name.startswith("ours"))


@pytest.mark.parametrize("name", ["", "mine", "ours/fast", "ours+more", "+recover", "ours/"])
def test_an_unknown_method_is_refused(name: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="is none of"):
        curve.method(name)


def test_half_a_line_of_a_killed_run_is_measured_again(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    for found in ROWS[:3]:
        Results(file).add(found)
    text = file.read_text()
    file.write_text(text[:-9])
    again = Results(file)
    assert list(again.rows.values()) == ROWS[:2]
    again.add(ROWS[2])
    assert list(Results(file).rows.values()) == ROWS[:3]


def test_a_table_has_ratios_gains_and_targets_of_one_budget() -> None:
    methods = ["ours", "svd", "ours+recover"]
    (group,) = grouped(ROWS, {"pico": SUBJECT}, methods, 64)
    lines = table(group, {"ours": "lrc"}).splitlines()
    assert "| | 0.6 | 0.4 |" in lines
    assert "| lrc | 4.000 | 16.000 |" in lines
    assert "| svd | 2e+03 | - |" in lines
    assert "ours+recover leaves, of the logarithm of the ratio: 0.6: 0.50; 0.4: 0.50." in lines
    assert "MISSED ours+recover at 0.6, loss: 2.000 <= 1.5" in lines
    (longer,) = grouped(ROWS, {"pico": SUBJECT}, methods, 128)
    assert longer.figure("ours+recover", 0.4, "loss") == 1.0


def test_the_picture_is_an_svg_with_a_mark_for_every_row_and_both_pages() -> None:
    groups = grouped(ROWS, {"pico": SUBJECT}, ["svd", "ours", "ours+recover"], 64)
    text = picture(groups, {"ours": "lrc <best>"})
    root = ElementTree.fromstring(text)
    titles = [found.text for found in root.iter() if found.tag.endswith("title")]
    assert titles == [
        "svd at 0.6: 2000",
        "ours at 0.4: 16",
        "ours at 0.6: 4",
        "ours+recover at 0.4: 4",
        "ours+recover at 0.6: 2",
    ]
    assert "prefers-color-scheme:dark" in text and "lrc &lt;best&gt;" in text


@pytest.mark.parametrize(
    "lines",
    [
        {"ours": [(0.6, 0.3)]},
        {"ours": [(0.4, 0.9), (0.6, 1.7)], "ours/factors+block": [(0.4, 0.2)]},
        {f"ours/{i}": [(0.5, 0.1)] for i in range(9)},
    ],
    ids=["one point", "above the frame", "more methods than colours"],
)
@pytest.mark.parametrize("logarithmic", [False, True])
def test_any_panel_is_drawn_inside_its_picture(
    lines: dict[str, Sequence[tuple[float, float]]], logarithmic: bool
) -> None:
    shifted = {name: [(x, y + logarithmic) for x, y in spots] for name, spots in lines.items()}
    panel = Panel(title="t", lines=shifted, logarithmic=logarithmic, dense=None)
    root = ElementTree.fromstring(draw([panel], {}))
    for circle in (x for x in root.iter() if x.tag.endswith("circle")):
        assert 0 < float(circle.attrib["cx"]) < 800
    assert panel.ticks and max(panel.ticks) <= panel.top


def test_a_method_that_leaves_the_frame_is_named() -> None:
    lines = {"svd": [(0.4, 1e6), (0.6, 1e4)], "ours": [(0.4, 500.0), (0.6, 2.0)]}
    panel = Panel(title="t", lines=lines, logarithmic=True)
    assert panel.above == ["svd"]
    assert "above the frame: plain SVD<" in draw([panel], curve.LABELS)


def test_a_run_goes_on_leaves_out_what_cannot_be_and_draws(
    tmp_path: Path, checkpoint: pico.Models, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = pico.job(tmp_path, {"calibration.path": str(text), "compression.size": 0.5})
    scored: list[nn.Module] = []

    def score(module: nn.Module) -> dict[str, float]:
        scored.append(module)
        return {"loss": 1.0 + len(scored)}

    setting = Setting(
        config=str(job), overrides=(), score=score, model=checkpoint("llama"), dtype=None
    )
    model = curve.Model(
        subject=SUBJECT,
        shares=(0.6, 0.4),
        prepare=lambda *_: setting,
        training=lambda _, tokens: [f"recover.tokens={tokens}"],
    )
    monkeypatch.setattr(curve, "MODELS", {"pico": model})
    monkeypatch.setattr(curve, "OUT", tmp_path / "out")
    monkeypatch.setattr(curve, "commit", lambda: "abc1234")
    results, figure = tmp_path / "rows.jsonl", tmp_path / "curve.svg"
    given = ["--results", str(results), "--figure", str(figure), "--tokens", "256"]
    # Plain SVD cannot be fitted to the compressed network's inputs, which the config says.
    methods = ["--methods", "ours", "svd/sequential"]
    assert curve.main([*given, *methods, "--shares", "0.6"]) == 1
    assert [json.loads(line)["method"] for line in results.read_text().splitlines()] == [
        DENSE,
        "ours",
    ]
    assert curve.main([*given, "--methods", "ours", "ours+recover"]) == 0
    rows = list(Results(results).rows.values())
    assert [(x.method, x.share) for x in rows] == [
        (DENSE, 1.0),
        ("ours", 0.6),
        ("ours", 0.4),
        ("ours+recover", 0.6),
        ("ours+recover", 0.4),
    ]
    assert "statistics" in rows[1].phases and "recover" in rows[3].phases
    # Statistics are collected once, and a second size or a training uses them again.
    assert not any("statistics" in x.phases for x in rows[2:])
    assert "factors" not in rows[3].phases
    number = len(scored)
    assert curve.main([*given, "--methods", "ours", "--draw"]) == 0
    assert len(scored) == number
    assert ElementTree.parse(figure).getroot().tag.endswith("svg")
