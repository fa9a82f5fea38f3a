"""Reasons in a report are sentences of a closed set, whose facts must agree with the files.

A sentence that is not in the set fails, so no free text passes into a page as a reason. The numbers
in a sentence are compared with the report where the report has them.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

from lrc_cli.checkpoint.headers import TensorInfo
from lrc_cli.config import Compression, Config
from lrc_cli.config.compression import METHODS
from lrc_cli.execution.weight_use import CALLED, COARSE, OTHER, READ
from lrc_cli.verify.files.fields import is_ours
from lrc_cli.verify.files.forms import is_read, unread
from lrc_cli.verify.files.written import Written
from lrc_cli.verify.methods import KNOWN, unknown_method
from lrc_cli.verify.statements import Findings

NUMBER = r"(?:0|\d+(?:\.\d+)?(?:e[+-]\d\d)?|\d\.?\d*e[+-]\d\d)"
NAME = r"[A-Za-z_]\w{0,63}"
"""The name of a class, which the checkpoint's own code may choose."""
SOLVE = re.compile(
    r"could not be solved: (?:its directions cannot be told apart"
    r"|the (?:weight does|factors do) not fit torch\.\w{1,16}"
    r"|the eigen(?:values|vectors) did not converge|the eigenvalues are not finite"
    r"|the (?:curvature|regularised Gram) matrix is not positive definite"
    r"|the sizes of its weights differ by more than float64 resolves)"
)
"""The ways in which a solver may give up."""
UNREACHED = "no calibration input reached it"
UNGRADED = "the loss does not depend on it"
ENDS = tuple(
    f", and each of them was {what} in the end" for what in ("fitted plainly", "trained afterwards")
)
TRAINED = "its factors were trained afterwards"
TRAINED_BEFORE = "layers before it were trained afterwards"
EMBEDDING = "an embedding, and compression.embeddings is false"
CHOSEN = "left out by include and exclude"
FEW = re.compile(r"; fitted to (?P<tokens>\d+) tokens, fewer than its (?P<inputs>\d+) inputs")
STORED = re.compile(
    rf"(?P<form>factors|interpolative): (?P<own>{NUMBER}) against (?P<least>at least )?"
    rf"(?P<other>{NUMBER}) for (?P<against>factors|interpolative) of rank (?P<rank>\d+)"
    r" in the same bytes"
)
DECIDED = re.compile(
    r"(?P<why>asked for|auto: (?P<kept>\d+\.\d)% of the bytes are kept);"
    r" (?P<able>\d+) of (?P<all>\d+) factorised layers run once, have one of the methods"
    rf" (?:{'|'.join(METHODS)})(?: and (?:{'|'.join(METHODS)}))* and at least \d+ tokens for each"
    r" input(?:; (?P<few>\d+) have fewer tokens, more than \d+% of the weights)?"
)
OFF = re.compile(r"auto: (?P<kept>\d+\.\d)% of the bytes are kept, and it is on from \d+% down")
NOT_ENOUGH = re.compile(
    r"(?P<tokens>\d+) tokens to fit to are fewer than (?P<each>\d+) for each of its"
    r" (?P<inputs>\d+) inputs"
)
A_MATRIX = re.compile(rf"a matrix of {NAME}(?: with proj_size)?; not in this version")
A_CLASS = re.compile(rf"{NAME}; not in this version|a parameter of {NAME}, no layer's weight")
COARSER = re.compile(COARSE.format(y=r"b?float\d\d", w=r"b?float\d\d"))
STORED_TOLERANCE = 0.02
"""The relative tolerance of the three digits in which a reason states the stored error."""


def check_reasons(written: Written, config: Config, findings: Findings) -> None:
    """Every reason in the report must be a sentence of lrc's that fits the layer and the config."""
    report, compression = written.report, config.compression
    assert report is not None
    problems: list[tuple[str, str | None]] = []
    for row in report["layers"]:
        unknown = unknown_method(row) or (
            None if is_read(row["storage"]) else unread(row["storage"])
        )
        what = f"why {row['name']} is stored as it is"
        if unknown is not None:
            findings.not_checked("reasons", what, unknown)
            continue
        problems.append((what, layer_problem(row, compression)))
        if row["method_reason"] is not None:
            problems.append((f"why {row['name']} has its method", method_problem(row)))
        if row.get("sequential_reason") is not None:
            problems.append((f"why {row['name']} was fitted plainly", plain_problem(row)))
    what = "why layers are fitted sequentially, or not"
    problems.append((what, decision_problem(report, compression)))
    tensors = {} if written.source is None else written.source.tensors
    for entry in report["skipped"]:
        if entry["name"] in tensors:
            what = f"why {entry['name']} is not compressible"
            info = tensors[entry["name"]]
            problems.append((what, skipped_problem(entry, info, compression)))
    for what, problem in problems:
        if problem is None or is_ours(report):
            findings.judge("reasons", f"the report says {what}", problem)
        else:  # another version may have had other sentences
            findings.not_checked("reasons", f"the report says {what}", problem)


def layer_problem(row: Mapping[str, Any], compression: Compression) -> str | None:
    """Returns what is wrong with the reason of a layer's storage; None where nothing is."""
    reason = row["reason"]
    if row["storage"] == "dense":
        return _dense_problem(row, reason)
    few = FEW.search(reason)
    if few is not None:
        if int(few["inputs"]) != row["shape"][1] or not 0 < int(few["tokens"]) < row["shape"][1]:
            return f"{reason!r} does not belong to {row['shape'][1]} inputs"
        reason = reason[: few.start()] + reason[few.end() :]
    wanted = compression.override(row["name"]).storage or compression.storage
    if wanted != "auto":
        same = reason == f"{row['storage']} as asked for"
        return None if same else f"{reason!r} is not why {row['storage']} was asked for"
    if reason == "interpolative: two factors do not fit these bytes":
        return None if row["storage"] == "interpolative" else f"stored as {row['storage']}"
    found = STORED.fullmatch(reason)
    if found is None:
        return f"{reason!r} is no reason of lrc"
    return _stored_problem(row, found, compression)


def _dense_problem(row: Mapping[str, Any], reason: str) -> str | None:
    chosen = ("dense pays better at this size", "no smaller form meets max_layer_error")
    fell = reason in (UNREACHED, UNGRADED) or SOLVE.fullmatch(reason) is not None
    if not fell and reason not in chosen:
        return f"{reason!r} is no reason of lrc"
    if reason == UNGRADED and row["method"] in KNOWN - {"curvature"}:
        return f"{row['method']} asks for no gradient"
    if reason == UNREACHED and row["method"] == "svd":
        return "svd asks for no calibration input"
    return None if row["fallback"] == fell else f"fallback is {row['fallback']} with {reason!r}"


def _stored_problem(
    row: Mapping[str, Any], found: re.Match[str], compression: Compression
) -> str | None:
    own, other = float(found["own"]), float(found["other"])
    if {found["form"], found["against"]} != {"factors", "interpolative"}:
        return f"{found[0]!r} compares a form with itself"
    if found["form"] != row["storage"] or own > other:
        return f"{found[0]!r} is not why it is stored as {row['storage']}"
    if found["least"] and found["against"] != "factors":
        return f"{found[0]!r} is no reason of lrc"
    stored = row["errors"]["metric"]["stored"]
    # A new bias is rounded too, and factors are trained, after the forms have been compared.
    measured_again = row.get("trained") is True or row.get("sequential_reason") == TRAINED_BEFORE
    later = compression.center or measured_again
    if not later and not math.isclose(own, stored, rel_tol=STORED_TOLERANCE):
        return f"{found[0]!r} states {own}, the metric {stored}"
    return None


def method_problem(row: Mapping[str, Any]) -> str | None:
    """Returns what is wrong with the reason for another method; None where nothing is."""
    wanted = f"not followed by ReLU: fitted with {row['method']}"
    reason = row["method_reason"]
    return None if reason == wanted else f"{reason!r} is no reason of lrc"


def plain_problem(row: Mapping[str, Any]) -> str | None:
    """Returns what is wrong with the reason for a plain fit in a sequential run; None: nothing."""
    reason, n = row["sequential_reason"], row["shape"][1]
    gave_up = SOLVE.fullmatch(reason) is not None
    if row["sequential_failed"] != gave_up:
        return f"sequential_failed is {row['sequential_failed']} with {reason!r}"
    tied = "its factors are an embedding's too, which comes first"
    found = NOT_ENOUGH.fullmatch(reason)
    if found is not None:
        right = int(found["inputs"]) == n and int(found["tokens"]) < int(found["each"]) * n
        return None if right else f"{reason!r} does not belong to {n} inputs"
    wrong = {
        "it stays dense": row["storage"] != "dense",
        TRAINED: row.get("trained") is not True,
        TRAINED_BEFORE: row.get("trained") is True,  # compared with the windows elsewhere
        tied: row["tied_to"] is None,
        f"not with method {row['method']}": row["method"] in ("frobenius", "curvature"),
        "it runs several times in a pass, on several inputs": False,
        "the first calibration sequences do not reach it": False,
        "the tokens that reach it depend on the layers before it": False,
    }
    if not gave_up and wrong.get(reason, True):
        return f"{reason!r} is not why it was fitted plainly"
    return None


def decision_problem(report: Mapping[str, Any], compression: Compression) -> str | None:
    """Returns what is wrong with the reason for fitting sequentially or not; None: nothing."""
    decision, asked = report["sequential"], compression.sequential
    reason, used = decision["reason"], decision["used"]
    target, _ = compression.target
    simple = {
        "compression.sequential is false": asked is False,
        f"auto: {target} is about the dense network's inputs": asked == "auto" and target != "size",
    }
    off = OFF.fullmatch(reason)
    if reason in simple or off is not None:
        right = simple[reason] if off is None else asked == "auto"
        return None if right and not used else f"used is {used} with {reason!r}"
    ended = reason.endswith(ENDS)
    for end in ENDS:
        reason = reason.removesuffix(end)
    found = DECIDED.fullmatch(reason)
    if found is None or (found["why"] == "asked for") != (asked is True) or asked is False:
        return f"{reason!r} is no reason of lrc for sequential: {asked}"
    able, every = int(found["able"]), int(found["all"])
    factorised = sum(row["storage"] != "dense" for row in report["layers"])
    if not able <= every <= len(report["layers"]) or factorised > every:
        return f"{reason!r} does not belong to {factorised} of {len(report['layers'])} layers"
    wanted = able > 0 and found["few"] is None and (asked is True or 2 * able >= every)
    if ended and not wanted:
        return f"{reason!r} says that layers were fitted sequentially at first"
    return None if used == (wanted and not ended) else f"used is {used} with {reason!r}"


def skipped_problem(
    entry: Mapping[str, Any], info: TensorInfo, compression: Compression
) -> str | None:
    """Returns what is wrong with the reason for a tensor that is not compressible; None: nothing.

    Args:
        entry: the report's entry.
        info: the tensor as it is stored.
    """
    reason, shape = entry["reason"], info.shape
    matrix = len(shape) == 2 and 1 not in shape
    fits: dict[str, bool] = {
        "a vector": math.prod(shape) == max(shape, default=1),
        EMBEDDING: not compression.embeddings and len(shape) == 2,
        CHOSEN: len(shape) >= 2 and may_be_left_out(entry["name"], compression),
        "an embedding; not in this version": len(shape) == 2,
        "a grouped convolution: its kernels are small already": len(shape) >= 3,
        "experts that the checkpoint holds as one tensor; not in this version": len(shape) == 3,
        "shared by several modules; not in this version": True,
        "the network has no place for it": True,
        "transformers merges or splits it as it loads the model; not in this version": True,
        **dict.fromkeys((CALLED, OTHER, READ), len(shape) >= 2),
    }
    if reason in fits:
        return None if fits[reason] else f"{reason!r} does not belong to shape {shape}"
    for sentence, fitting in ((A_MATRIX, matrix), (A_CLASS, True), (COARSER, len(shape) >= 2)):
        if sentence.fullmatch(reason):
            return None if fitting else f"{reason!r} does not belong to shape {shape}"
    return f"{reason!r} is no reason of lrc"


def is_of_use(reason: str | None) -> bool:
    """Returns whether a reason says how the network uses a layer, which is seen when it runs."""
    return reason is not None and (
        reason in (CALLED, OTHER, READ) or COARSER.fullmatch(reason) is not None
    )


def may_be_left_out(key: str, compression: Compression) -> bool:
    """Returns whether include and exclude may leave out the layer with this tensor.

    Modules may have more or fewer names before the layer's name than tensors on the disk. A pattern
    for `lm_head` means the head, which has no number in its name and may go by any name.
    """
    stem = key.removesuffix(".weight")
    parts = stem.split(".")
    names = {".".join(parts[start:]) for start in range(len(parts))}
    if not compression.selects(f"model.{stem}") or not all(map(compression.selects, names)):
        return True
    head = not compression.selects("lm_head")
    return head and not any(part.isdigit() for part in parts)
