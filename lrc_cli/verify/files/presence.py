"""One table says when a value that may be missing from report.json must be there.

A value is named by its path, with [] for every entry of a list. Every other value must be there,
because the record's types allow no null for it.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lrc_cli.verify.files.forms import is_read
from lrc_cli.verify.methods import KNOWN


@dataclass(frozen=True, kw_only=True)
class Context:
    """Holds what a condition may look at."""

    report: Mapping[str, Any]
    row: Mapping[str, Any]
    """The entry of the innermost list around the value; the report where there is none."""
    architecture: str | None
    """The class that config.json names; None where it names none."""


Condition = Callable[[Context], bool | None]
"""Returns whether a value must be there; None: the files do not tell, or another check says it."""

LIKELIHOODS = ("scored", "loss_before", "loss_after", "perplexity_before", "perplexity_after")
"""The figures of a row of `quality` that come together."""


def _always(context: Context) -> bool:
    return True


def _elsewhere(context: Context) -> None:
    return None


def _factorised(context: Context) -> bool | None:
    storage = context.row["storage"]
    return storage != "dense" if is_read(storage) else None


def _permuted(context: Context) -> bool | None:
    storage = context.row["storage"]
    return storage == "interpolative" if is_read(storage) else None


def _unread(context: Context) -> bool | None:
    return False if is_read(context.row["storage"]) else None


def _factorised_by(method: str) -> Condition:
    def condition(context: Context) -> bool | None:
        known = context.row["method"] in KNOWN
        return _factorised(context) and context.row["method"] == method if known else None

    return condition


def _with_optimum(context: Context) -> bool | None:
    """Returns whether an optimum can be proved, which it cannot for relu."""
    method = context.row["method"]
    return _factorised(context) and method != "relu" if method in KNOWN else None


def _trained(context: Context) -> bool | None:
    """Returns whether a layer's factors are trained ones, which all are if training gained.

    Where windows were trained, the layers of a window are if the window gained too.
    """
    recovery = context.report.get("recovery")
    if recovery is None or not recovery["after"] < recovery["before"]:
        return False
    windows = recovery.get("windows")
    name = context.row["name"]
    return _factorised(context) and (
        windows is None or any(name in x["layers"] for x in windows if x["after"] < x["before"])
    )


def _sequential(value: bool) -> Condition:
    return lambda context: context.row.get("sequential") is value


def _in_a_sequential_run(context: Context) -> bool | None:
    rows = context.report["layers"]
    return any("sequential" in row for row in rows) or context.report["sequential"]["used"]


def _certified(context: Context) -> bool:
    return context.row["name"] in context.report["certificate"].get("tolerances", {})


def _graded(context: Context) -> bool | None:
    methods = {row["method"] for row in context.report["layers"]}
    return "curvature" in methods if methods <= KNOWN else None


def _scored(context: Context) -> bool:
    return "relative_output_error" not in context.row


def _unscored(context: Context) -> bool:
    return not any(name in context.row for name in LIKELIHOODS)


def _with_predictions(context: Context) -> bool | None:
    return True if any(name in context.row for name in LIKELIHOODS) else None


def _of_values(statement: Mapping[str, Any]) -> bool:
    """Returns whether a statement is about values, and not a note that there are too few."""
    return statement["quantity"] != "layer_error" or statement.get("layer") is not None


def _stated(*, kind: str | None = None, certified: bool = False, values: bool = False) -> Condition:
    """Returns whether a statement of a kind has a figure.

    Args:
        certified: whether only certified statements have it.
        values: whether only statements about values have it.
    """

    def condition(context: Context) -> bool:
        row = context.row
        return (
            (kind is None or row["kind"] == kind)
            and (not certified or row["status"] == "certified")
            and (not values or _of_values(row))
        )

    return condition


PRESENT: dict[str, Condition] = {
    "architecture": lambda c: c.architecture is not None,
    "loss": _graded,
    "recovery": _elsewhere,  # compared with the config
    "recovery.reason": _elsewhere,
    "recovery.rate": _elsewhere,
    "recovery.trials.*": _elsewhere,
    "recovery.norms": _elsewhere,
    "recovery.windows": lambda c: bool(c.report["recovery"]["scope"] == "block"),
    "recovery.windows[].rate": _elsewhere,
    "recovery.windows[].trials.*": _elsewhere,
    "target.of": lambda c: bool(c.report["target"]["name"] == "size"),
    "worst_case": _elsewhere,  # --against tells whether the network has such a bound
    "provenance.device_name": lambda c: c.report["provenance"]["device"].startswith("cuda"),
    "provenance.evaluation": _elsewhere,  # compared with the config
    **{f"quality[].{name}": _scored for name in LIKELIHOODS},
    **dict.fromkeys(("quality[].kl", "quality[].top1_agreement"), _with_predictions),
    "quality[].relative_output_error": _unscored,
    "quality[].population": _always,
    "quality[].one_in": _elsewhere,  # the data tells, which --against draws again
    "provenance.sequences.*.one_in": _elsewhere,
    "provenance.data.*.unread": _elsewhere,
    "layers[].tied_to": _elsewhere,  # --against tells which weights are tied
    "layers[].method_reason": _elsewhere,  # compared with the config
    "layers[].reason": _always,
    "layers[].rank": _factorised,
    "layers[].block": _factorised,
    "layers[].parameters": _unread,
    "layers[].max_coefficient": _permuted,
    "layers[].errors": _factorised,
    "layers[].relu": _factorised_by("relu"),
    "layers[].threshold": _factorised_by("nuclear"),
    "layers[].threshold_share": _factorised_by("nuclear"),
    "layers[].trained": _trained,
    "layers[].sequential": _in_a_sequential_run,
    "layers[].sequential_failed": _sequential(False),
    "layers[].sequential_reason": _sequential(False),
    "layers[].correction": _sequential(True),
    "layers[].errors.metric.inherited": _sequential(True),
    "layers[].errors.metric.optimum": _with_optimum,
    "layers[].errors.metric.svd": _factorised,
    "layers[].errors.output.optimum": _factorised,
    "layers[].errors.output.svd": _factorised,
    "layers[].errors.held_out": _certified,
    "certificate.sequence_length": _elsewhere,  # compared with the config
    "certificate.note": lambda c: not c.report["certificate"]["statements"],
    "certificate.values.layers": _elsewhere,  # must have its statements
    "certificate.statements[].layer": lambda c: bool(
        c.row["quantity"] == "layer_error" and c.row.get("worst") is not None
    ),
    "certificate.statements[].bound": _stated(certified=True),
    "certificate.statements[].observed": _stated(values=True),
    "certificate.statements[].worst": _stated(values=True),
    "certificate.statements[].clip": _stated(kind="mean"),
    "certificate.statements[].order": _stated(kind="quantile", certified=True),
    "certificate.statements[].num_needed": _stated(kind="quantile"),
    "gates[].measured": _elsewhere,  # found again
    "gates[].where": _elsewhere,
    "gates[].reason": _elsewhere,
}
"""When a value must be there; else it must be null, or its key absent."""


def presence_problems(report: Mapping[str, Any], architecture: str | None) -> Iterator[str]:
    """Yields what is missing from a report, or is there without cause.

    Args:
        report: a report whose values have the record's types.
        architecture: the class that config.json names.
    """
    for path, condition in PRESENT.items():
        *parents, name = path.split(".")
        for owner, row, place in _owners(report, report, parents, ""):
            context = Context(report=report, row=row, architecture=architecture)
            wanted, there = condition(context), owner.get(name) is not None
            if wanted is not None and bool(wanted) != there:
                why = "null or missing, and belongs there" if wanted else "there without cause"
                yield f"{place}{name} is {why}"


def _owners(
    value: Any, row: Mapping[str, Any], parents: list[str], place: str
) -> Iterator[tuple[Mapping[str, Any], Mapping[str, Any], str]]:
    """Yields the objects that may have a value, each with its row and its place."""
    if not parents:
        yield value, row, place
        return
    name, rest = parents[0], parents[1:]
    if name.endswith("[]"):
        for index, item in enumerate(value.get(name[:-2]) or ()):
            yield from _owners(item, item, rest, f"{place}{name[:-2]}[{index}].")
    elif name == "*":
        for key, item in value.items():
            yield from _owners(item, row, rest, f"{place}{key}.")
    elif value.get(name) is not None:
        yield from _owners(value[name], row, rest, f"{place}{name}.")
