"""Which numbers and which words a report may hold, so that no free text passes into a page.

A value is named by its path, with [] for every entry of a list and * for every key that is a name.
Numbers that are no sizes have an entry in `NUMBERS`. A text must have an entry in `WORDS`, or be
compared in full by another check. The keys of objects that have no fixed ones have an entry in
`KEYS`.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lrc_cli import __version__
from lrc_cli.checkpoint.side_files import COPY, EXPORT, TRAINING, UNREAD, WEIGHTS
from lrc_cli.execution.divergence import OBJECTIVES
from lrc_cli.execution.losses import Loss
from lrc_cli.execution.precision import DTYPES
from lrc_cli.report.record import parse_record
from lrc_cli.verify.files.presence import presence_problems
from lrc_cli.verify.files.written import Written
from lrc_cli.verify.methods import KNOWN
from lrc_cli.verify.statements import Findings

LOSSES = ("next_token", "masked_token", "sampled", "output")
"""The kinds of losses."""
SCORES = ("kl", "loss_difference", "top1_disagreement", "relative_output_error", "all_layers")
"""The quantities of which a certificate lists values, besides single layers' errors."""


@dataclass(frozen=True, kw_only=True)
class Range:
    """Holds the smallest and the largest number that can stand at a path."""

    least: float = 0.0
    most: float = math.inf
    infinite: bool = False
    """Whether infinity can stand there."""

    def problem(self, value: float) -> str | None:
        """Returns why a number cannot stand there; None where it can."""
        if math.isnan(value) or (math.isinf(value) and not (self.infinite and value > 0)):
            return "is no number"
        return None if self.least <= value <= self.most else "cannot be"


ANY, SHARE, COUNTED = Range(least=-math.inf), Range(most=1.0), Range(least=1.0)
NUMBERS: dict[str, Range] = {
    "quality[].perplexity_before": Range(infinite=True),
    "quality[].perplexity_after": Range(infinite=True),
    "quality[].kl": Range(least=-1e-3),
    "quality[].top1_agreement": SHARE,
    **dict.fromkeys(("recovery.before", "recovery.after", "recovery.trials.*"), Range(least=-1e-3)),
    **dict.fromkeys(("recovery.num_sequences", "recovery.num_held_out"), COUNTED),
    **dict.fromkeys(("recovery.planned_steps", "recovery.planned_tokens"), COUNTED),
    "recovery.windows[].planned_steps": COUNTED,
    "quality[].num_sequences": COUNTED,
    "quality[].one_in": Range(least=2.0),
    "provenance.sequences.*.one_in": Range(least=2.0),
    "provenance.data.*.unread": SHARE,
    "quality[].num_scored": COUNTED,
    "layers[].correction": SHARE,
    "layers[].rank": COUNTED,
    "layers[].block": COUNTED,
    "layers[].shape[]": COUNTED,
    "layers[].bytes_before": COUNTED,
    "layers[].bytes_after": COUNTED,
    "skipped[].share": SHARE,
    "certificate.values.loss_difference[]": ANY,
    "certificate.statements[].bound": ANY,  # follows from the values, as the next three do
    "certificate.statements[].observed": ANY,
    "certificate.statements[].worst": ANY,
    "certificate.statements[].clip[]": ANY,
    "provenance.seed": ANY,  # compared with the config
    "gates[].measured": Range(least=-1.0, infinite=True),
}
"""The numbers that are no sizes. At every other path a finite number from 0 up must stand."""

Words = re.Pattern[str] | None
"""What a text must be; None: another check compares the text in full."""

HEX = re.compile("[0-9a-f]{64}")
NAME = re.compile(r"[^\s\x00-\x1f\x7f]{1,1000}")
"""The name of a module or a tensor: one word."""
CLASS = re.compile(r"[A-Za-z_]\w{0,63}")
VERSION = re.compile(
    r"\d{1,4}(\.\d{1,8}){0,3}((a|b|rc|\.post|\.dev)\d{1,8}){0,2}(\+[a-z0-9]+(\.[a-z0-9]+){0,3})?"
)
GPU = re.compile(
    r"(NVIDIA|AMD|Intel|Tesla|Quadro|GeForce|Radeon|Instinct|GRID|TITAN|Titan|Graphics)"
    r"( (GeForce|Quadro|Radeon|Instinct|Tesla|TITAN|Titan|GRID|Jetson|Orin|Thor|AGX|RTX|GTX|GT"
    r"|Ada|Generation|Laptop|GPU|Graphics|Super|SUPER|Ti|Max-Q|Design|with|PCIe|NVL|MIG|Pro|PRO"
    r"|XT|XTX|XP|Xp|X|V|Black|Grace|Hopper|Blackwell|Workstation|Server|Edition|Superchip|OEM|D"
    r"|Arc|Max|Data|Center|[A-Z]{0,4}\d[0-9A-Za-z.\-]{0,15})){1,8}"
)
"""What drivers call GPUs: a maker and words of this list, or numbers of models."""


def _one_of(*words: str) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, words)))


DTYPE = _one_of(*DTYPES)
WORDS: dict[str, Words] = {
    "model": None,
    "architecture": None,
    "method": None,
    "allocation": None,
    "loss.kind": _one_of(*LOSSES),
    "loss.description": None,
    "loss.unit": None,
    "target.name": None,
    "target.of": None,
    "sequential.reason": None,
    "recovery.scope": _one_of("model", "block"),
    "recovery.reason": None,
    "recovery.objective": _one_of(*OBJECTIVES.values()),
    "recovery.norms[]": NAME,
    "recovery.windows[].blocks[]": NAME,
    "recovery.windows[].layers[]": NAME,
    "quality[].text": None,
    "quality[].sha256": HEX,
    "quality[].scored": _one_of(*(Loss(kind=kind).description for kind in LOSSES[:2])),
    "layers[].name": NAME,
    "layers[].kind": CLASS,
    "layers[].tied_to": NAME,
    "layers[].method": None,
    "layers[].method_reason": None,
    "layers[].dtype": DTYPE,
    "layers[].reason": None,
    "layers[].sequential_reason": None,
    "layers[].storage": None,
    "layers[].errors.metric.unit": None,
    "layers[].errors.output.inputs": _one_of("calibration", "white", "compressed"),
    "layers[].relu[].start": _one_of("convex", "frobenius", "frobenius as it is"),
    "skipped[].name": None,
    "skipped[].reason": None,
    "copies.*": NAME,
    "fused.*.experts": NAME,
    "fused.*.part": NAME,
    "certificate.unit": None,
    "certificate.sampling": None,
    "certificate.population.description": None,
    "certificate.population.file": None,
    "certificate.population.file_sha256": None,
    "certificate.data_sha256": None,
    "certificate.selection.purpose": None,
    "certificate.selection.sha256": None,
    "certificate.predictions": _one_of(
        "predictions", "next-token predictions", "predictions of masked tokens"
    ),
    "certificate.activation_dtype": None,
    "certificate.not_covered[]": None,
    "certificate.note": None,
    "certificate.assumptions[]": None,
    "certificate.statements[].id": None,
    "certificate.statements[].quantity": _one_of(*SCORES, "layer_error"),
    "certificate.statements[].kind": _one_of("mean", "quantile"),
    "certificate.statements[].layer": NAME,
    "certificate.statements[].status": _one_of("certified", "cannot certify"),
    "certificate.statements[].unit": None,
    "certificate.statements[].text": None,
    "worst_case.label": _one_of("worst case"),
    "worst_case.inputs": _one_of("calibration"),
    "provenance.lrc_version": VERSION,
    "provenance.code_sha256": HEX,
    "provenance.python": VERSION,
    "provenance.packages.*": VERSION,
    "provenance.platform": re.compile(r"[A-Za-z]\w{2,11}"),
    "provenance.device": re.compile(r"cpu|cuda(:\d{1,3})?|mps(:\d{1,3})?"),
    "provenance.device_name": None,
    "provenance.activation_dtype": DTYPE,
    "provenance.config_sha256": None,
    "provenance.config": None,
    "provenance.checkpoint_sha256.*": HEX,
    "provenance.data_files_sha256.*": re.compile(f"{HEX.pattern}|built in"),
    "provenance.sequences.*.sha256": HEX,
    "provenance.left_out.*": _one_of(COPY, WEIGHTS, EXPORT, TRAINING, UNREAD),
    "gates[].name": None,
    "gates[].where": None,
    "gates[].reason": None,
}
"""What every text in a report must be. A text at another path is none that lrc writes."""

KEYS: dict[str, Words] = {
    "copies": NAME,
    "fused": NAME,
    **dict.fromkeys(
        ("recovery.trials", "recovery.windows[].trials"),
        re.compile(r"\d(\.\d)?e-\d\d|0\.\d{1,6}"),
    ),
    "certificate.tolerances": NAME,
    "certificate.clips": _one_of(*SCORES),
    "certificate.values": _one_of(*SCORES, "layers"),
    "certificate.values.layers": NAME,
    "timing": _one_of(
        *("checks", "statistics", "spectra", "forms", "factors", "recover", "writing"),
        *("verification", "evaluation", "selection", "certification"),
    ),
    "memory": _one_of("host_resident", "gpu_allocated"),
    "provenance.packages": _one_of("torch", "transformers", "safetensors"),
    "provenance.checkpoint_sha256": None,
    "provenance.data_files_sha256": None,
    "provenance.sequences": _one_of("calibration", "certification", "recover"),
    "provenance.data": None,
    "provenance.left_out": None,
}
"""What the keys of an object must be, where they are no fields of the record."""
ENUMERATED = ("certificate.values",)
"""Objects whose keys are of a closed set, so that each value has a path of its own."""
OPAQUE = ("provenance.evaluation", "layers[].parameters")
"""Values whose parts are not looked at: the first one is compared in full with the config."""

UNITS: dict[str, str] = {
    "svd": "squared error of the weights",
    "frobenius": "mean squared output error per token",
    "nuclear": "half the squared output error + l x nuclear norm of the outputs, per token",
    "relu": "mean squared error behind the ReLU per token",
    "curvature": "estimated increase of the loss per token",
}
"""The unit of what each method minimises."""
ON_BOTH = ", on the compressed network's inputs, with ridge"


def check_fields(written: Written, findings: Findings) -> None:
    """Every value of report.json must be one that lrc can have written there."""
    report = written.report
    assert report is not None
    what = "report.json holds what its record may hold, and nothing else"
    if not is_ours(report):
        parse_record(report)
        reason = f"it was written by {version_of(report)}, and this is lrc {__version__}"
        findings.not_checked("report.form", what, reason)
    else:
        same = parse_record(report).to_json() == report
        problem = None if same else "keys are missing, or are none of a record, or a number is NaN"
        findings.judge("report.form", what, problem)
    architecture = architecture_of(written)
    _judge_all(
        findings, "report.present", "every figure is there", presence_problems(report, architecture)
    )
    _judge_all(findings, "report.numbers", "every number can be", _number_problems(report))
    _judge_all(
        findings, "report.words", "every text is one that lrc writes", _word_problems(report)
    )
    _check_gpu(report, findings)
    _check_units(report, findings)


def is_ours(report: Mapping[str, Any]) -> bool:
    """Returns whether this version of lrc wrote a report, so that its words are known."""
    return bool(report["provenance"]["lrc_version"] == __version__)


def version_of(report: Mapping[str, Any]) -> str:
    """Returns the version in a report, in words that hold nothing else."""
    stated = report["provenance"]["lrc_version"]
    known = isinstance(stated, str) and VERSION.fullmatch(stated)
    return f"lrc {stated}" if known else "no version of lrc"


def architecture_of(written: Written) -> str | None:
    """Returns the class that config.json names first; None where it names none."""
    config = (written.source.config if written.source else None) or {}
    return next(iter(config.get("architectures") or ()), None)


def _judge_all(findings: Findings, id: str, what: str, problems: Iterator[str]) -> None:
    found = list(problems)
    more = f" and {len(found) - 3} more" if len(found) > 3 else ""
    findings.judge(id, what, "; ".join(found[:3]) + more if found else None)


def _number_problems(report: Mapping[str, Any]) -> Iterator[str]:
    for path, place, value in leaves(report):
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        problem = NUMBERS.get(path, Range()).problem(value)
        if problem is not None:
            yield f"{place}: {value} {problem}"


def _word_problems(report: Mapping[str, Any]) -> Iterator[str]:
    for path, place, value in leaves(report):
        if isinstance(value, dict):
            rule = KEYS.get(path)
            if rule is not None:
                yield from (f"{place}: a key" for key in value if not rule.fullmatch(key))
        elif isinstance(value, str):
            rule = WORDS.get(path)
            if path not in WORDS or (rule is not None and not rule.fullmatch(value)):
                yield f"{place}: {value[:60]!r}"


def leaves(value: Any, path: str = "", place: str = "") -> Iterator[tuple[str, str, Any]]:
    """Yields every value below one with its path and its place; objects and lists come first."""
    if path in OPAQUE:
        return
    yield path, place, value
    if isinstance(value, dict):
        for key, item in value.items():
            below = "*" if path in KEYS and path not in ENUMERATED else key
            yield from leaves(item, _joined(path, below), _joined(place, key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from leaves(item, f"{path}[]", f"{place}[{index}]")


def _joined(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def _check_gpu(report: Mapping[str, Any], findings: Findings) -> None:
    name = report["provenance"].get("device_name")
    if name is not None and not GPU.fullmatch(name):
        what = "the GPU's name is one"
        findings.not_checked("report.words", what, "lrc verify knows no GPU of such a name")


def _check_units(report: Mapping[str, Any], findings: Findings) -> None:
    """Loss and layers' errors must be in the units of their kind and of their method."""
    loss = report["loss"]
    if loss is not None:
        with findings.guard("loss", "the loss is described"):
            wanted = Loss(kind=loss["kind"]).facts()
            findings.equal("loss", "the loss is described as its kind is", loss, wanted)
    for row in report["layers"]:
        if row["method"] in KNOWN and row.get("errors") is not None:
            unit = UNITS[row["method"]] + (ON_BOTH if row.get("sequential") is True else "")
            what = f"the errors of {row['name']} are in their method's unit"
            findings.equal("errors.unit", what, row["errors"]["metric"]["unit"], unit)
