"""Values become statements: how many, at which risk, with which words; no network is needed."""

import json
import math
import random
from dataclasses import replace
from decimal import Decimal
from typing import Any

import pytest

from lrc_cli.engine.bounds import mean_bound, sequences_needed
from lrc_cli.quality.certificate import (
    LEAST_TOLERANCE,
    clips_of,
    make_certificate,
    tolerances_of,
)
from lrc_cli.quality.certificate_record import (
    Certificate,
    CertificateData,
    Population,
    Selection,
    Statement,
)
from lrc_cli.quality.sentences import (
    assumptions,
    main_statements,
    not_promised,
    rounded_up,
    share,
    statement_text,
)

LANGUAGE = ("kl", "top1_disagreement", "loss_difference")


def drawn_data(size: int = 2000, *, text: bool = True) -> CertificateData:
    """Returns what `certify` says of the draw."""
    members = "blocks of 32 tokens" if text else "rows"
    return CertificateData(
        sequence_length=32 if text else None,
        unit="sequence of 32 tokens" if text else "row",
        sampling="uniformly at random without replacement",
        population=Population(
            description=f"the {size:,} {members} of words.txt that calibration left free",
            file="words.txt",
            part=(0.0, 1.0),
            size=size,
            file_sha256="ab" * 32,
        ),
        data_sha256="cd" * 32,
        selection=Selection(
            purpose="calibration", num_sequences=16, num_tokens=512, sha256="ef" * 32
        ),
        predictions="next-token predictions" if text else "predictions",
        activation_dtype="float32",
        not_covered=(),
    )


def drawn(number: int, seed: int = 0, scale: float = 1.0) -> list[float]:
    chance = random.Random(seed)
    return [scale * chance.random() for _ in range(number)]


def certify(number: int, num_layers: int = 3, **changes: Any) -> Certificate:
    """Returns a language model's certificate from made-up values; `changes` are keywords."""
    values = {name: drawn(number, seed) for seed, name in enumerate(LANGUAGE)}
    layers = {f"layers.{i}.w": drawn(number, 10 + i, 0.3) for i in range(num_layers)}
    given: dict[str, Any] = {
        "clips": {"kl": 4.0, "loss_difference": 4.0},
        "tolerances": dict.fromkeys(layers, 0.2),
        "confidence": 0.95,
        "quantile": 0.95,
        "data": drawn_data(),
    }
    return make_certificate(values, layers, **(given | changes))


def named(certificate: Certificate) -> dict[str, Statement]:
    return {statement.id: statement for statement in certificate.statements}


def test_a_language_model_gets_seven_statements_that_share_the_risk() -> None:
    certificate = certify(97, num_layers=210)
    claims = [s for s in certificate.statements if s.status == "certified"]
    assert [s.id for s in claims] == [
        *(f"{name}.{kind}" for name in LANGUAGE for kind in ("mean", "quantile")),
        "all_layers.quantile",
    ]
    assert certificate.num_statements == 7 and certificate.num_sequences == 97
    assert sum(s.delta for s in claims) == pytest.approx(0.05)


def test_one_sequence_too_few_is_said() -> None:
    statements = named(certify(96))
    for name in ("kl.quantile", "loss_difference.quantile", "all_layers.quantile"):
        assert statements[name].status == "cannot certify"
        assert statements[name].bound is None
        assert statements[name].text == "cannot certify: N = 96 < 97 needed"
    assert statements["kl.mean"].status == "certified", "a mean has a bound of any number"


@pytest.mark.parametrize(("number", "num_needed"), [(20, 59), (1, 59)])
def test_a_single_statement_needs_59(number: int, num_needed: int) -> None:
    layers = {"w": drawn(number)}
    certificate = make_certificate(
        {},
        layers,
        clips={},
        tolerances={"w": 0.2},
        confidence=0.95,
        quantile=0.95,
        data=drawn_data(),
    )
    (statement, _) = certificate.statements
    assert statement.text == f"cannot certify: N = {number} < {num_needed} needed"


def test_layers_get_statements_of_their_own_where_the_sequences_suffice() -> None:
    needed = sequences_needed(0.95, 0.05 / 17)
    few, enough = certify(needed - 1, num_layers=10), certify(needed, num_layers=10)
    assert few.num_statements == 7 and few.values.layers is None
    assert named(few)["layer_error.quantile"].text == (
        f"cannot certify: N = {needed - 1} < {needed} needed for a statement on each of the"
        " 10 layers as well"
    )
    assert enough.num_statements == 17 and len(enough.values.layers or {}) == 10
    own = [s for s in enough.statements if s.layer is not None]
    assert {s.layer for s in own} == set(enough.tolerances)
    assert sum(s.delta for s in enough.statements) == pytest.approx(0.05)
    assert all(s.status == "certified" for s in enough.statements)


def test_all_layers_at_once_is_the_largest_error_by_tolerance() -> None:
    layers = {"a": [0.1, 0.4], "b": [0.3, 0.1]}
    certificate = make_certificate(
        {},
        layers,
        clips={},
        tolerances={"a": 0.1, "b": 0.2},
        confidence=0.5,
        quantile=0.5,
        data=drawn_data(),
    )
    assert certificate.values.quantities["all_layers"] == pytest.approx([1.5, 4.0])
    assert named(certificate)["all_layers.quantile"].worst == pytest.approx(4.0)


def test_a_quantile_bound_is_a_value_of_the_sample_and_covers_the_population() -> None:
    chance, misses = random.Random(3), 0
    population = [chance.lognormvariate(0, 2) for _ in range(300)]
    quantile = sorted(population)[math.ceil(0.9 * 300) - 1]
    for _ in range(200):
        values = chance.sample(population, 60)
        certificate = make_certificate(
            {"relative_output_error": values},
            {},
            clips={"relative_output_error": 5.0},
            tolerances={},
            confidence=0.8,
            quantile=0.9,
            data=drawn_data(300, text=False),
        )
        bound = named(certificate)["relative_output_error.quantile"].bound
        assert bound in values
        misses += bound < quantile
    assert misses <= 0.1 * 200 + 3 * math.sqrt(0.1 * 0.9 * 200)


def test_means_are_of_clipped_values_and_say_so() -> None:
    loss = [-9.0, 0.5, 9.0, *[0.1] * 97]
    kl = [7.0, *[0.2] * 99]
    certificate = make_certificate(
        {"kl": kl, "loss_difference": loss},
        {},
        clips={"kl": 1.0, "loss_difference": 2.0},
        tolerances={},
        confidence=0.95,
        quantile=0.9,
        data=drawn_data(),
    )
    statements = named(certificate)
    mean = statements["loss_difference.mean"]
    assert mean.clip == (-2.0, 2.0) and mean.num_clipped == 2 and mean.worst == 9.0
    assert mean.observed == pytest.approx((0.5 + 9.7) / 100)
    assert "values above 2 count as 2 and below -2 as -2, 2 of them did" in mean.text
    assert statements["kl.mean"].num_clipped == 1
    assert "values above 1 count as 1, 1 of them did" in statements["kl.mean"].text
    expected = mean_bound([1.0, *kl[1:]], lower=0.0, upper=1.0, delta=mean.delta, population=2000)
    assert statements["kl.mean"].bound == expected
    assert statements["kl.quantile"].clip is None
    assert statements["kl.quantile"].worst == 7.0


def test_more_confidence_never_lowers_a_bound() -> None:
    certificates = [certify(150, confidence=c) for c in (0.5, 0.8, 0.95)]
    for name in ("kl.mean", "kl.quantile", "top1_disagreement.mean", "all_layers.quantile"):
        bounds = [named(certificate)[name].bound for certificate in certificates]
        assert bounds == sorted(bounds) and bounds[0] < bounds[-1], name


def test_every_bound_is_at_or_above_what_was_observed() -> None:
    for statement in certify(150).statements:
        assert statement.bound >= statement.observed
        assert statement.worst >= statement.observed


def test_a_certificate_is_json_and_its_sentences_follow_from_it() -> None:
    for number in (20, 97, 150):
        certificate = certify(number)
        text = json.dumps(certificate.to_json())
        read = Certificate.from_json(json.loads(text), "report.json")
        assert read == certificate
        for statement in read.statements:
            assert statement.text == statement_text(replace(statement, text=""), read)
            assert "\n" not in statement.text
        assert read.assumptions == assumptions(read)


def test_a_sentence_names_the_bound_the_share_and_the_population() -> None:
    certificate = certify(128, num_layers=210)
    text = named(certificate)["kl.quantile"].text
    for piece in (
        "at 95 % confidence",
        "for at least 95 % of the 2,000 blocks of 32 tokens of words.txt",
        f"is at most {rounded_up(named(certificate)['kl.quantile'].bound)} nats per token",
        "128 blocks drawn without replacement",
        "largest value",
    ):
        assert piece in text
    assert any("nothing else" in line for line in not_promised(certificate))
    assert main_statements(certificate)[0] == named(certificate)["kl.mean"].text


def test_an_edited_figure_changes_the_sentence() -> None:
    certificate = certify(128)
    for statement in certificate.statements:
        if statement.status == "certified":
            assert statement.bound is not None
            edited = replace(statement, bound=0.5 * statement.bound)
            assert statement_text(edited, certificate) != statement.text


def test_layers_that_were_not_followed_are_named() -> None:
    names = tuple(f"e.{i}" for i in range(5))
    certificate = certify(128, data=replace(drawn_data(), not_covered=names))
    assert any("e.0, e.1, e.2 and 2 more" in line for line in certificate.assumptions)


def test_limits_come_from_selection_data() -> None:
    selection = {"kl": [0.1, 0.5], "top1_disagreement": [0.2], "loss_difference": [-1.0, 0.5]}
    assert clips_of(selection) == {"kl": 2.0, "loss_difference": 4.0}
    assert clips_of({"kl": [0.0]})["kl"] > 0
    assert tolerances_of({"a": [0.1, 0.3], "b": [0.0]}) == {"a": 0.3, "b": LEAST_TOLERANCE}


@pytest.mark.parametrize("tightness", [0.01, 0.1, 0.5, 1.0])
def test_limits_that_are_too_tight_never_cost_coverage(tightness: float) -> None:
    """Training on the selection data makes limits tight; bounds are of what they clip and scale."""
    chance = random.Random(5)
    layers = {name: [chance.lognormvariate(0, 1) for _ in range(300)] for name in "ab"}
    kl = [a * b for a, b in zip(*layers.values(), strict=True)]
    clip = tightness * max(kl)
    tolerances = {name: tightness * max(values) for name, values in layers.items()}
    clipped = math.fsum(min(value, clip) for value in kl) / 300
    worst = [max(layers[x][i] / tolerances[x] for x in layers) for i in range(300)]
    quantiles = {"kl.quantile": kl, "all_layers.quantile": worst}
    truth = {name: sorted(x)[math.ceil(0.9 * 300) - 1] for name, x in quantiles.items()}
    truth["kl.mean"] = clipped
    misses = 0
    for _ in range(100):
        rows = chance.sample(range(300), 80)
        certificate = make_certificate(
            {"kl": [kl[i] for i in rows]},
            {name: [values[i] for i in rows] for name, values in layers.items()},
            clips={"kl": clip},
            tolerances=tolerances,
            confidence=0.8,
            quantile=0.9,
            data=drawn_data(300, text=False),
        )
        found = named(certificate)
        misses += any((found[name].bound or 0.0) < true for name, true in truth.items())
    assert misses <= 0.2 * 100 + 3 * math.sqrt(0.2 * 0.8 * 100)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0.123412, "0.1235"),
        (0.1234, "0.1234"),
        (1.0, "1"),
        (0.0, "0"),
        (99.999, "100"),
        (1.000001e-7, "1.001e-07"),
        (-0.123456, "-0.1234"),
        (12345.0, "1.235e+04"),
        (math.inf, "infinite"),
    ],
)
def test_bounds_are_rounded_up(value: float, expected: str) -> None:
    assert rounded_up(value) == expected
    if math.isfinite(value):
        assert Decimal(expected) >= Decimal(repr(value))


@pytest.mark.parametrize(
    ("value", "expected"),
    [(0.95, "95 %"), (0.5, "50 %"), (0.999, "99.9 %"), (0.9999999, "99.99999 %")],
)
def test_a_share_is_never_rounded_up(value: float, expected: str) -> None:
    assert share(value) == expected
