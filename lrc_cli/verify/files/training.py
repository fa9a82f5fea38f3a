"""What a report says of training the factors must be what the config asks for, and fit together."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from lrc_cli.config import Config
from lrc_cli.data.purposes import CALIBRATION, RECOVER
from lrc_cli.text import BYTE_UNITS, byte_size
from lrc_cli.verify.files.reasons import TRAINED_BEFORE

SIZE = rf"\d+(?:\.\d+)? (?:{'|'.join(BYTE_UNITS)})"
CHOSEN = re.compile(
    rf"training all layers together takes about (?P<needed>{SIZE}), and"
    r" (?P<where>runtime\.memory_limit|the memory of (?:cpu|mps|cuda(?::\d{1,3})?)) is"
    rf" (?P<limit>{SIZE})(?P<whole>, but its blocks are no chain)?"
)
"""Why `auto` takes a scope."""


def training_problem(report: Mapping[str, Any], config: Config) -> str | None:
    """Returns what is wrong with what the report says of training the factors; None: nothing."""
    found, asked = report.get("recovery"), config.recover
    factorised = any(row["storage"] != "dense" for row in report["layers"])
    if not asked.is_used or not factorised:
        return None if found is None else "nothing was to be trained, and the report has an outcome"
    if found is None:
        return "the report has no outcome"
    drawn = report["provenance"]["sequences"]
    data = drawn[RECOVER if asked.has_own_data and RECOVER in drawn else CALIBRATION]
    number = found["num_sequences"] + found["num_held_out"]
    problem = _scope_problem(found, config)
    if problem is not None:
        return problem
    if number + found["num_left_out"] != data["num_sequences"]:
        return f"{number} sequences, drawn were {data['num_sequences']}"
    if not found["num_left_out"] and found["num_held_out"] != max(1, min(number // 8, 16)):
        return f"{found['num_held_out']} of {number} sequences are held out"
    if found.get("norms") is not None and not (found["after"] < found["before"] and asked.norms):
        return "norms were trained, and none were to be, or nothing was gained"
    if not found["tokens"] <= found["planned_tokens"]:
        return "it takes more tokens than were asked for"
    if found["after"] < found["before"] and any(x.get("sequential") for x in report["layers"]):
        return "a layer is fitted to inputs that layers before it gave before they were trained"
    windows = found.get("windows")
    return _course_problem(found) if windows is None else _windows_problem(report, windows)


def _scope_problem(found: Mapping[str, Any], config: Config) -> str | None:
    """Returns what is wrong with what was trained at a time, or with the reason for that."""
    asked, reason = config.recover.scope, found.get("reason")
    if asked != "auto":
        same = found["scope"] == asked and reason is None
        return None if same else f"stated for {found['scope']}, asked for was {asked}"
    sizes = CHOSEN.fullmatch(reason or "")
    if sizes is None:
        return f"{reason!r} is no reason of lrc"
    limit = config.runtime.memory_bytes
    by_config = sizes["where"] == "runtime.memory_limit"
    if by_config is not (limit is not None) or (by_config and byte_size(limit) != sizes["limit"]):
        return f"{reason!r} does not state the config's limit"
    needed, most = (_bytes_of(sizes[name]) for name in ("needed", "limit"))
    fits = needed < most or (needed == most and found["scope"] == "model")
    wanted = "model" if fits or sizes["whole"] else "block"
    if found["scope"] != wanted or (needed < most and sizes["whole"]):
        return f"{reason!r} is not why {found['scope']} was taken"
    return None


def _bytes_of(size: str) -> float:
    """Returns the number that `byte_size` has put into words."""
    number, unit = size.split()
    return float(number) * 1000.0 ** BYTE_UNITS.index(unit)


def _windows_problem(report: Mapping[str, Any], windows: Sequence[Mapping[str, Any]]) -> str | None:
    """Returns what is wrong with the windows that were trained one after the other."""
    found = report["recovery"]
    if not found["after"] <= found["before"] or (not windows and found["steps"]):
        return "it ends higher than it began, or takes steps without a window"
    if found["rate"] is not None or found["trials"]:
        return "windows have rates and trials of their own"
    for key in ("steps", "planned_steps") if windows else ():
        if found[key] != max(window[key] for window in windows):
            return f"its {key} are no window's"
    blocks = [block for window in windows for block in window["blocks"]]
    layers = [layer for window in windows for layer in window["layers"]]
    rows = {row["name"] for row in report["layers"] if row["storage"] != "dense"}
    if len({*blocks}) < len(blocks) or len({*layers}) < len(layers) or not {*layers} <= rows:
        return "a block or a layer is in two windows, or a layer is not factorised"
    later = any(x.get("sequential_reason") == TRAINED_BEFORE for x in report["layers"])
    if later and not found["after"] < found["before"]:
        return "a layer is measured as after a training, and nothing was gained"
    for window in windows:
        problem = _window_problem(window)
        if problem is not None:
            return f"{', '.join(window['blocks'])}: {problem}"
    return None


def _window_problem(window: Mapping[str, Any]) -> str | None:
    if not window["blocks"] or not window["layers"]:
        return "it has no block or no layer"
    for layer in window["layers"]:
        if not any(f"{layer}.".startswith(f"{block}.") for block in window["blocks"]):
            return f"{layer} does not lie in its blocks"
    return _course_problem(window)


def _course_problem(found: Mapping[str, Any]) -> str | None:
    """Returns what is wrong with the course of one training."""
    if not found["after"] <= found["before"] or not found["steps"] <= found["planned_steps"]:
        return "it ends higher than it began, or with more steps than were asked for"
    tried = {rate: value for rate, value in found["trials"].items() if value is not None}
    if found["after"] > min([found["before"], *tried.values()]):
        return "a trial is better than what was kept"
    if (found["rate"] is None) is not (found["steps"] == 0):
        return "a rate belongs to steps that were taken"
    if found["rate"] is not None and tried:
        best = min(tried, key=lambda rate: (tried[rate], float(rate)))
        if f"{found['rate']:.2g}" != best:
            return f"the rate is {found['rate']}, and {best} had the best trial"
    return None
