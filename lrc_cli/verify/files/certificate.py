"""These checks need the files only: the certificate follows from the values that it lists."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lrc_cli.data.kinds import member
from lrc_cli.data.purposes import CALIBRATION, CERTIFICATION, RECOVER, purposes_of
from lrc_cli.quality.certificate_record import Certificate, Statement
from lrc_cli.quality.sentences import assumptions, statement_text
from lrc_cli.report.record import REPORT
from lrc_cli.verify.files.confidence_bounds import exact, is_needed, mean_problem, smallest_order
from lrc_cli.verify.files.figures import close
from lrc_cli.verify.files.written import Written
from lrc_cli.verify.statements import Findings

SELECTED = 16
"""The largest number of calibration sequences that tolerances and clipping limits come from."""

UNITS = {
    "kl": "nats",
    "loss_difference": "nats per token",
    "top1_disagreement": "share of predictions",
    "relative_output_error": "relative",
    "all_layers": "times the layer's tolerance",
    "layer_error": "relative",
}
"""The unit of each quantity; a divergence of next or masked tokens is per token."""


def check_certificate(written: Written, findings: Findings) -> None:
    """Checks the figures and the sentences of report["certificate"]."""
    report = written.report
    if report is None:
        findings.not_checked("certificate", "the certificate", "report.json cannot be read")
        return
    with findings.guard("certificate", "the certificate can be read"):
        certificate = report["certificate"]
        if not certificate["statements"]:  # `check_asked` says whether there should be some
            return
        _check_header(written, certificate, findings)
        check_listed_values(certificate, findings)
        with findings.guard("certificate.held_out", "held-out errors agree with the certificate"):
            _check_held_out(written, certificate, findings)
        for statement in certificate["statements"]:
            what = f"the statement {statement['id']} follows from the values"
            with findings.guard("certificate.statement", what):
                problem = statement_problem(statement, certificate)
                findings.judge("certificate.statement", what, problem)
            what = f"the sentence of {statement['id']} says what its figures say"
            with findings.guard("certificate.sentence", what):
                told = Statement.from_json(statement, REPORT, "certificate.statements")
                same = statement["text"] == statement_text(told, _header(certificate))
                findings.judge("certificate.sentence", what, None if same else "it does not")
        same = certificate["assumptions"] == list(assumptions(_header(certificate)))
        what = "the assumptions are those of such a certificate"
        findings.judge("certificate.sentence", what, None if same else "they are not")


def _header(certificate: Mapping[str, Any]) -> Certificate:
    """Returns the certificate without statements, so that a damaged one spoils no other."""
    bare = {**certificate, "statements": [], "assumptions": []}
    return Certificate.from_json(bare, REPORT, "certificate")


def _check_header(written: Written, certificate: Mapping[str, Any], findings: Findings) -> None:
    """Checks what the certificate says of its data against the config and the report."""
    assert written.report is not None
    facts = written.report["provenance"]["sequences"]
    data, chosen = facts["certification"], facts["calibration"]
    section = written.config.certification if written.config else None
    if section is None:
        findings.judge("certificate.header", "a certificate was asked for", "the config has none")
        return
    population, selection = certificate["population"], certificate["selection"]
    factorised = [row["name"] for row in written.factorised]
    stated = {
        "confidence": certificate["confidence"],
        "quantile": certificate["quantile"],
        "num_sequences": certificate["num_sequences"],
        "population": population["size"],
        "data": certificate["data_sha256"],
        "selection": [selection[key] for key in ("purpose", "num_sequences", "sha256")],
        "not_covered": certificate["not_covered"],
        "note": certificate["note"],
    }
    found = {
        "confidence": section.confidence,
        "quantile": section.quantile,
        "num_sequences": data["num_sequences"],
        "population": data["population"],
        "data": data["sha256"],
        "selection": [CALIBRATION, min(SELECTED, _held_back(written)), chosen["sha256"]],
        "not_covered": [name for name in factorised if name not in certificate["tolerances"]],
        "note": None,
    }
    what = "the certificate's header agrees with the config and the provenance"
    findings.equal("certificate.header", what, stated, found)
    _check_population(written, certificate, findings)


def _held_back(written: Written) -> int:
    """Returns the number of calibration sequences that nothing was trained on."""
    assert written.report is not None
    drawn, recovery = written.report["provenance"]["sequences"], written.report.get("recovery")
    if recovery is None or RECOVER in drawn or not recovery["after"] < recovery["before"]:
        return int(drawn[CALIBRATION]["num_sequences"])
    return int(recovery["num_held_out"])


def _check_population(written: Written, certificate: Mapping[str, Any], findings: Findings) -> None:
    """Unit, sampling and population are as in the config's certification section."""
    assert written.report is not None and written.config is not None
    purpose = next(p for p in purposes_of(written.config) if p.name == CERTIFICATION)
    unit, population = member(purpose.path), certificate["population"]
    length = purpose.sequence_length if unit == "block" else None
    first, last = purpose.part
    place, size = purpose.path.name, population["size"]
    facts = written.report["provenance"]
    one_in = facts["sequences"][CERTIFICATION].get("one_in")
    if one_in is not None:
        place = f"one passage in {one_in} of {place}"
    if (first, last) != (0.0, 1.0):
        place += f" (part {first:g} to {last:g})"
    many = f"{unit}s" if length is None else f"blocks of {length} tokens"
    hashes = {str(Path(name)): value for name, value in facts["data_files_sha256"].items()}
    stated = {
        "unit": certificate["unit"],
        "sequence_length": certificate["sequence_length"],
        "sampling": certificate["sampling"],
        "activations": certificate["activation_dtype"],
        "description": population["description"],
        "file": [population["file"], population["part"], population["file_sha256"]],
    }
    found = {
        "unit": unit if length is None else f"sequence of {length} tokens",
        "sequence_length": length,
        "sampling": "uniformly at random without replacement",
        "activations": facts["activation_dtype"],
        "description": f"the {size:,} {many} of {place} that calibration left free",
        "file": [purpose.path.name, list(purpose.part), hashes.get(str(purpose.path))],
    }
    what = "the certificate's unit and population are those of the config"
    findings.equal("certificate.header", what, stated, found)


def check_listed_values(certificate: Mapping[str, Any], findings: Findings) -> None:
    """Each quantity must have N values, and each statement must be counted and have its place."""
    values, statements = certificate["values"], certificate["statements"]
    series = {name: found for name, found in values.items() if name != "layers"}
    series |= {f"layers.{name}": found for name, found in values.get("layers", {}).items()}
    wrong = [
        name
        for name, found in series.items()
        if len(found) != certificate["num_sequences"] or not all(map(math.isfinite, found))
    ]
    problem = f"not so: {', '.join(wrong[:3])}" if wrong else None
    what = "every quantity has one finite value per sequence"
    findings.judge("certificate.values", what, problem)
    wanted: list[tuple[str | None, str]] = [
        (name, kind)
        for name in series
        for kind in ("mean", "quantile")
        if kind == "quantile" or not name.startswith(("all_", "layers."))
    ]
    claims = len(wanted)
    if certificate["tolerances"] and not values.get("layers"):
        wanted.append((None, "quantile"))  # why there are none on single layers
    made = [(_series_name(s), s["kind"]) for s in statements]
    problem = None if made == wanted else f"{len(made)} statements for {len(wanted)}, or others"
    findings.judge("certificate.values", "every quantity has its statements, in order", problem)
    what = "the number of statements is right"
    findings.equal("certificate.values", what, certificate["num_statements"], claims)
    layers, worst = values.get("layers", {}), values.get("all_layers", [])
    what = "the layers with a tolerance are the ones with values"
    if layers:
        findings.equal("certificate.values", what, list(layers), list(certificate["tolerances"]))
    if layers and worst:
        ratios = [
            max(found[i] / certificate["tolerances"][name] for name, found in layers.items())
            for i in range(len(worst))
        ]
        same = all(close(a, b) for a, b in zip(worst, ratios, strict=True))
        problem = None if same else "they are not the largest error / tolerance"
        findings.judge("certificate.values", "the worst layers' values are right", problem)


def _check_held_out(written: Written, certificate: Mapping[str, Any], findings: Findings) -> None:
    """The layers' held-out errors must agree with the certificate's tolerances and values."""
    tolerances, by_layer = certificate["tolerances"], certificate["values"].get("layers", {})
    ratios = []
    for row in written.factorised:
        name, held_out = row["name"], row["errors"].get("held_out")
        if held_out is None or name not in tolerances:  # see `PRESENT`
            continue
        stated = [held_out["tolerance"], held_out["num_sequences"]]
        found = [tolerances[name], certificate["num_sequences"]]
        if name in by_layer:
            stated, found = [*stated, held_out["worst_sequence"]], [*found, max(by_layer[name])]
        what = f"the held-out errors of {name} agree with the certificate"
        findings.equal("certificate.held_out", what, stated, found)
        ratios.append(held_out["worst_sequence"] / tolerances[name])
    worst = certificate["values"].get("all_layers")
    if worst and ratios and not written.unread:
        what = "the largest held-out error of any layer, in its tolerance, is the certificate's"
        same = close(max(worst), max(ratios))
        problem = None if same else f"stated {max(ratios)}, found {max(worst)}"
        findings.judge("certificate.held_out", what, problem)


def _series_name(statement: Mapping[str, Any]) -> str | None:
    """Returns the name of the values that a statement is about; None where there are none."""
    if statement["quantity"] != "layer_error":
        return str(statement["quantity"])
    return None if statement["layer"] is None else f"layers.{statement['layer']}"


def statement_problem(statement: Mapping[str, Any], certificate: Mapping[str, Any]) -> str | None:
    """Returns what in a statement does not follow from the listed values; None where all does."""
    quantile = certificate["quantile"]
    name = _series_name(statement)
    stem = statement["quantity"] + ("" if not statement["layer"] else f".{statement['layer']}")
    if statement["id"] != f"{stem}.{statement['kind']}":
        return f"its name is not {stem}.{statement['kind']}"
    if statement["kind"] != "mean" and statement["num_clipped"]:
        return "values are clipped for means only"
    delta = (1 - certificate["confidence"]) / certificate["num_statements"]
    if name is None:
        delta = (1 - certificate["confidence"]) / (
            certificate["num_statements"] + len(certificate["tolerances"])
        )
    if not close(statement["delta"], delta):
        return f"delta {statement['delta']} is not {delta}"
    unit = UNITS[statement["quantity"]]
    if statement["quantity"] == "kl" and "loss_difference" in certificate["values"]:
        unit += " per token"
    if statement["unit"] != unit:
        return f"its unit is {unit}, not {statement['unit']}"
    needed = statement["num_needed"]
    if statement["kind"] == "quantile" and not is_needed(needed, quantile, statement["delta"]):
        return f"{needed} sequences are not the least that serve"
    if name is None:
        return _too_many_problem(statement, certificate)
    parts = name.split(".", 1)
    table = certificate["values"]
    values = table["layers"][parts[1]] if parts[0] == "layers" else table[name]
    if not close(statement["worst"], max(values)):
        return f"the largest value is {max(values)}, not {statement['worst']}"
    problem_of = _mean_problem if statement["kind"] == "mean" else _quantile_problem
    return problem_of(statement, certificate, values)


def _too_many_problem(statement: Mapping[str, Any], certificate: Mapping[str, Any]) -> str | None:
    """Checks the entry that says why there are no statements on single layers."""
    if statement["status"] == "certified" or statement["bound"] is not None:
        return "it certifies a bound of no layer"
    drawn, size = certificate["num_sequences"], certificate["population"]["size"]
    order = smallest_order(drawn, certificate["quantile"], statement["delta"], size)
    return None if order is None else f"{drawn} sequences do suffice"


def _quantile_problem(
    statement: Mapping[str, Any], certificate: Mapping[str, Any], values: Sequence[float]
) -> str | None:
    quantile, size = certificate["quantile"], certificate["population"]["size"]
    order = smallest_order(len(values), quantile, statement["delta"], size)
    ordered = sorted(values)
    middle = ordered[math.ceil(exact(quantile) * len(values)) - 1]
    stated = [statement[key] for key in ("status", "order", "bound", "observed")]
    found: list[Any] = ["cannot certify", None, None, middle]
    if order is not None:
        found = ["certified", order, ordered[order - 1], middle]
    return None if stated == found else f"stated {stated}, found {found}"


def _mean_problem(
    statement: Mapping[str, Any], certificate: Mapping[str, Any], values: Sequence[float]
) -> str | None:
    quantity = statement["quantity"]
    limit = certificate["clips"].get(quantity, 1.0)
    lower = -limit if quantity == "loss_difference" else 0.0
    if statement["clip"] != [lower, limit] or statement["status"] != "certified":
        return f"stated {statement['status']} with clip {statement['clip']}, not {[lower, limit]}"
    clipped = [sorted((lower, value, limit))[1] for value in values]
    beyond = sum(value < lower or value > limit for value in values)
    if statement["num_clipped"] != beyond:
        return f"{beyond} values are beyond the limits, not {statement['num_clipped']}"
    average = math.fsum(clipped) / len(clipped)
    if not math.isclose(statement["observed"], average, rel_tol=1e-9, abs_tol=1e-12 * limit):
        return f"the mean is {average}, not {statement['observed']}"
    return mean_problem(
        clipped,
        statement["bound"],
        lower=lower,
        upper=limit,
        delta=statement["delta"],
        population=certificate["population"]["size"],
    )
