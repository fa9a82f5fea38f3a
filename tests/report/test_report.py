"""The model card and the page: complete, escaped, well-formed, and made from report.json alone."""

import copy
import json
import math
import re
from typing import Any

import pytest
import yaml
from report_helpers import (
    Page,
    certify,
    dense_layer,
    factorised_layer,
    render_card,
    render_html,
    small_report,
    text_row,
)

from lrc_cli.text import (
    byte_size,
    duration,
    error_gap,
    factor,
    percent,
    perplexity,
    small,
)

HOSTILE = "<script>alert(1)</script>|`x` \"q\" 'a' & [b](c)"


@pytest.fixture
def report() -> dict[str, Any]:
    return small_report()


def front_matter(card: str) -> dict[str, Any]:
    _, matter, _ = card.split("---\n", 2)
    return yaml.safe_load(matter)


def test_card_front_matter_is_yaml(report: dict[str, Any]) -> None:
    matter = front_matter(render_card(report))
    assert matter["base_model"] == "small"
    assert matter["library_name"] == "transformers"
    assert {"lrc", "low-rank", "curvature"} <= set(matter["tags"])


@pytest.mark.parametrize("name", ["a: b", "- x", "---", "yes", HOSTILE])
def test_card_front_matter_survives_any_model_name(report: dict[str, Any], name: str) -> None:
    report["model"] = name
    assert front_matter(render_card(report))["base_model"] == name


@pytest.mark.parametrize("render", [render_card, render_html])
def test_figures_appear(report: dict[str, Any], render: Any) -> None:
    text = render(report)
    figures = ["79.7%", "99.6%", "19,584", "1,229,575", "614,755", "1,230,001"]
    figures += ["20.40", "25.50", "1.250x", "0.219", "81.2%", "wikipedia", "news", "64 of 2,821"]
    figures += ["kept_compressible", "kept_checkpoint", "kept_parameters"]
    figures += ["0.1.0", "2.13.0+cpu", "4272" * 16, "5303" * 16, "5d78" * 16, "711e" * 16]
    assert [figure for figure in figures if figure not in text] == []
    assert report["provenance"]["config"].strip() in text
    assert "activations computed in float32" in text
    assert "curvature of the negative log-likelihood of the next token" in text
    assert "no certificate" in text
    assert "There is none: none was asked for" in text


def test_card_tells_how_to_load_a_transformers_model(report: dict[str, Any]) -> None:
    card = render_card(report)
    assert "import lrc_cli.hf" in card
    assert "from transformers import LlamaForCausalLM" in card
    assert "LlamaForCausalLM.from_pretrained(" in card
    assert "ignore_mismatched_sizes=True" in card


def test_card_tells_how_to_load_a_plain_module(report: dict[str, Any]) -> None:
    report["architecture"] = None
    report["provenance"]["config"] = yaml.safe_dump({"model": {"factory": "nets:build"}})
    card = render_card(report)
    assert "library_name" not in front_matter(card)
    assert 'lrc_cli.load("path/to/this/directory", factory="nets:build")' in card
    assert "import lrc_cli.hf" not in card


def test_code_that_comes_with_a_checkpoint_is_loaded_by_lrc(report: dict[str, Any]) -> None:
    report["provenance"]["config"] = yaml.safe_dump({"model": {"trust_remote_code": True}})
    assert "trust_remote_code=True)" in render_card(report)


def test_card_counts_what_is_not_factorised_by_reason(report: dict[str, Any]) -> None:
    card = render_card(report)
    assert "| a vector | 2 | 256 B | <0.1% |" in card
    assert "| dense pays better | 1 | 6.14 kB |" in card
    assert "No layer fell back." in card


def test_fallbacks_stand_out(report: dict[str, Any]) -> None:
    assert "fell back to dense; the first" not in render_html(report)
    report["layers"].append(
        dense_layer("model.layers.1.v_proj", fallback=True, reason="could not be solved: NaN")
    )
    assert "- model.layers.1.v_proj: could not be solved: NaN" in render_card(report)
    page = Page(render_html(report))
    assert "1 layer fell back to dense; the first is model.layers.1.v_proj." in page.text
    assert page.marked("tr", "fallback") == 1
    assert page.marked("rect", "fallback") == 1


def test_page_marks_every_layer_once(report: dict[str, Any]) -> None:
    page = Page(render_html(report))
    bars = page.marked("rect", "bar") - len(report["timing"])
    assert bars == len(report["layers"])
    assert page.marked("rect", "dense") == 1
    assert page.marked("g", "point") == 3
    titles = [text for text in page.texts if text.startswith("model.layers.1.q_proj, rank 8:")]
    assert titles == [
        "model.layers.1.q_proj, rank 8: plain SVD of that rank 0.346,"
        " stored 0.251, optimum of that rank 0.234"
    ]


def test_worse_layers_are_drawn_higher(report: dict[str, Any]) -> None:
    report["layers"] = [
        factorised_layer("layers.0.w", stored=0.01),
        factorised_layer("layers.1.w", stored=0.1),
        factorised_layer("layers.2.w", stored=1.0),
    ]
    dots = [a for tag, a in Page(render_html(report)).elements if a.get("class") == "stored"]
    heights = [float(dot["cy"] or "nan") for dot in dots[1:]]  # the first one is the legend's
    assert heights[0] > heights[1] > heights[2]
    assert heights[0] - heights[1] == pytest.approx(heights[1] - heights[2], abs=0.02)


def test_larger_shares_are_taller_bars(report: dict[str, Any]) -> None:
    report["timing"] = {}
    elements = Page(render_html(report)).elements
    bars = [a for tag, a in elements if "bar" in (a.get("class") or "").split()]
    heights = {bar["class"]: float(bar["height"] or "nan") for bar in bars}
    assert heights["bar"] / heights["bar dense"] == pytest.approx(1696 / 6144, abs=0.01)


def test_page_fetches_nothing(report: dict[str, Any]) -> None:
    text = render_html(report)
    elements = Page(text).elements
    names = {tag for tag, _ in elements}
    assert names.isdisjoint({"script", "link", "img", "iframe", "object", "base", "form"})
    attributes = {key for _, found in elements for key in found}
    assert attributes.isdisjoint({"src", "href", "srcset", "style", "onload", "onclick"})
    assert not re.search(r"url\(|@import|https?:", text)


@pytest.mark.parametrize("state", ["factorised", "fallback"])
def test_hostile_names_are_text(report: dict[str, Any], state: str) -> None:
    report["model"] = report["quality"][0]["text"] = report["skipped"][0]["name"] = HOSTILE
    report["layers"][0]["name"] = report["skipped"][0]["reason"] = HOSTILE
    report["architecture"] = HOSTILE
    report["provenance"]["data_files_sha256"] = {HOSTILE: "00"}
    report["provenance"]["config"] += f"note: {json.dumps(HOSTILE + '```')}\n"
    if state == "fallback":
        report["layers"][0] = dense_layer(HOSTILE, fallback=True, reason=HOSTILE)
    page = Page(render_html(report))
    assert "script" not in {tag for tag, _ in page.elements}
    assert page.texts.count(HOSTILE) >= 3
    card = render_card(report)
    body = card.split("---\n", 2)[2]
    outside, fenced, _ = re.split(r"^````.*$", body, flags=re.MULTILINE)
    assert "<script>" in fenced
    assert "<script>" not in outside
    assert r"\[b\](c)" in outside


def test_table_rows_keep_their_columns(report: dict[str, Any]) -> None:
    report["quality"][0]["text"] = HOSTILE + "\nsecond line"
    card = render_card(report)
    lines = card.split("## Quality")[1].split("\n\n")[1].splitlines()
    assert len(lines) == 4
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1


def test_a_network_without_perplexity(report: dict[str, Any]) -> None:
    row = {"text": "images", "num_sequences": 32, "num_scored": 32, "population": 40}
    report["quality"] = [{**row, "relative_output_error": 0.03456, "sha256": "00"}]
    card, page = render_card(report), Page(render_html(report))
    assert "| images | 0.0346 | 32 of 40 | 32 |" in card
    for text in (card, page.text):
        assert "perplexity before" not in text
    assert "relative output error, images" in page.text


def test_everything_left_dense(report: dict[str, Any]) -> None:
    report["layers"] = [dense_layer(f"layers.{index}.fc") for index in range(3)]
    card, page = render_card(report), Page(render_html(report))
    assert "0 of 3 compressible layers" in card
    assert "loads like the original, without lrc" in card
    assert "import lrc_cli" not in card
    assert page.marked("rect", "dense") == 3
    assert page.marked("g", "point") == 0
    assert "No layer is factorised" in page.text


def test_nothing_evaluated_skipped_or_timed(report: dict[str, Any]) -> None:
    report |= {"quality": [], "skipped": [], "timing": {}, "memory": {}}
    assert "Not measured" in render_card(report)
    assert "Not measured" in Page(render_html(report)).text


def test_a_ruined_network_is_said_to_be_ruined(report: dict[str, Any]) -> None:
    ruined = {"loss_after": 900.0, "perplexity_after": math.inf}
    report["quality"] = [text_row("wikipedia") | ruined]
    assert "| wikipedia | 20.40 | infinite | infinite |" in render_card(report)
    assert "20.40 → infinite" in Page(render_html(report)).text


def test_exact_layers_have_a_place_on_the_chart(report: dict[str, Any]) -> None:
    for layer in report["layers"]:
        for errors in layer.get("errors", {}).values():
            errors |= {"stored": 0.0, "optimum": 0.0, "svd": 0.0}
    assert Page(render_html(report)).marked("g", "point") == 3


def test_svd_without_data_is_named_as_such(report: dict[str, Any]) -> None:
    for layer in report["layers"]:
        if "errors" in layer:
            layer["errors"]["output"]["inputs"] = "white"
            layer["errors"]["metric"]["unit"] = "squared error of the weights"
            layer["method"] = "svd"
    text = Page(render_html(report)).text
    assert "white inputs (no calibration data was used)" in text
    assert "estimated loss increases" not in text


def test_estimated_loss_increase_stands_beside_the_measured(report: dict[str, Any]) -> None:
    text = Page(render_html(report)).text
    assert "add up to 0.0369 nats per token; measured: +0.223 on wikipedia" in text


def test_only_nats_of_the_next_token_are_added_up(report: dict[str, Any]) -> None:
    report["loss"] = {"kind": "output", "description": "half the squared change", "unit": "none"}
    assert "estimated loss increases" not in Page(render_html(report)).text


def test_an_error_below_the_numerical_floor_never_reads_as_zero(report: dict[str, Any]) -> None:
    layer = next(layer for layer in report["layers"] if "errors" in layer)
    layer["errors"]["metric"] |= {"stored": 0.0, "floor": 3e-9}
    assert "< 3e-09" in Page(render_html(report)).text


@pytest.mark.parametrize("per_layer", [False, True])
def test_the_certificate_is_told_in_words(report: dict[str, Any], per_layer: bool) -> None:
    certify(report, per_layer=per_layer)
    card, page = render_card(report), Page(render_html(report)).text
    for statement in report["certificate"]["statements"]:
        assert statement["text"] in page
        assert (statement["text"] in card) == (statement["layer"] is None)
    own = [s for s in report["certificate"]["statements"] if s["layer"] is not None]
    assert len(own) == (3 if per_layer else 0)
    for text in (card, page):
        assert ("needed for a statement on each of the 3 layers" in text) != per_layer
        assert "What this rests on" in text and "922e" * 16 in text
        assert "is over the random draw of the certification data" in text
        assert "no certificate" not in text
        assert "that calibration left free and of nothing else" in text


def test_what_too_few_sequences_cannot_certify_is_said(report: dict[str, Any]) -> None:
    certify(report)
    report["certificate"]["statements"][0] |= {
        "status": "cannot certify",
        "bound": None,
        "num_needed": 97,
        "text": "cannot certify: N = 20 < 97 needed",
    }
    assert "- KL divergence, mean: cannot certify: N = 20 < 97 needed" in render_card(report)
    assert "cannot certify: 97 needed" in Page(render_html(report)).text


def test_inherited_and_new_errors_are_in_the_page(report: dict[str, Any]) -> None:
    assert "inherited" not in Page(render_html(report)).text
    certify(report)
    text = Page(render_html(report)).text
    for figure in ("0.136", "0.247", "0.346", "0.234", "0.457", "0.333", "Over 120 certification"):
        assert figure in text


def test_a_hostile_data_file_is_text(report: dict[str, Any]) -> None:
    certify(report, file=HOSTILE)
    page = Page(render_html(report))
    assert "script" not in {tag for tag, _ in page.elements}
    assert "<script>" not in render_card(report)


def test_the_gap_to_the_optimum_is_in_the_page(report: dict[str, Any]) -> None:
    text = Page(render_html(report)).text
    assert "0.0002 (+1.7%)" in text and "0.0155 (+6.6%)" in text


def test_rendering_leaves_the_report_alone(report: dict[str, Any]) -> None:
    before = copy.deepcopy(report)
    assert render_card(report) == render_card(json.loads(json.dumps(report)))
    assert render_html(report) == render_html(json.loads(json.dumps(report)))
    assert report == before


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (byte_size(128), "128 B"),
        (byte_size(999_999), "1.00 MB"),
        (byte_size(1534705664), "1.53 GB"),
        (byte_size(215_000_000), "215 MB"),
        (percent(0.0), "0.0%"),
        (percent(2e-5), "<0.1%"),
        (percent(0.98074), "98.1%"),
        (perplexity(20.4371), "20.44"),
        (perplexity(48905.97), "48,906"),
        (perplexity(1.7e7), "1.7e+07"),
        (perplexity(math.inf), "infinite"),
        (factor(1.18), "1.180x"),
        (small(1.147e-5), "1.15e-05"),
        (error_gap(0.0123, 0.0121), "0.0002 (+1.7%)"),
        (error_gap(0.5, None), small(None)),
        (error_gap(2e-9, 1e-9, floor=3e-9), "< 3e-09"),
        (error_gap(0.1, 0.0, floor=3e-9), "0.1"),
        (duration(0.111), "0.11 s"),
        (duration(59.96), "60.0 s"),
        (duration(371), "6 min 11 s"),
        (duration(7300), "2 h 1 min"),
    ],
)
def test_numbers_are_readable(text: str, expected: str) -> None:
    assert text == expected
