"""The run's data files are found by their hashes, and their sequences are drawn again."""

import dataclasses
import os
from collections import deque
from pathlib import Path
from typing import Any

from lrc_cli.data.draw import Purpose, Sequences, draw
from lrc_cli.data.folders import visible_files
from lrc_cli.data.named_by_others import why_not_opened
from lrc_cli.data.processors import Processors
from lrc_cli.data.purposes import CALIBRATION, CERTIFICATION, RECOVER, purposes_of
from lrc_cli.errors import InputError
from lrc_cli.reading import file_size
from lrc_cli.verify.files.manifest import data_sha256
from lrc_cli.verify.files.written import Written
from lrc_cli.verify.statements import Findings


def draw_again(
    written: Written, processors: Processors, data: Path | None, findings: Findings
) -> dict[str, Sequences]:
    """Draws again the sequences of every purpose whose file is there; the others are left out.

    Sequences that differ from the recorded ones are left out too.

    Args:
        data: a file of the run that is not where the config says.

    Raises:
        InputError: `data` is given and there is no such file.
    """
    assert written.report is not None and written.config is not None
    if data is not None and not os.path.exists(data):
        raise InputError(f"--data {data}: there is no such file", "check the path")
    if data is not None:
        # A folder that cannot be data is refused before all of it is hashed.
        file_size(data) if not data.is_dir() else deque(visible_files(data), maxlen=0)
    recorded = written.report["provenance"]["data_files_sha256"]
    wanted = purposes_of(written.config)
    paths = {str(purpose.path): purpose.path for purpose in wanted}
    stated = {str(Path(name)): sha256 for name, sha256 in recorded.items()}
    given = None if data is None else data_sha256(data)
    if data is not None and given not in {stated.get(name) for name in paths}:
        what = f"--data {data} is a file of the run"
        findings.not_checked("data.hash", what, "it has another hash than any of them")
    places: dict[str, Path] = {}
    for name, path in paths.items():
        place, reason = _place(path, stated.get(name), data, given)
        what = f"the data of {name} has the hash in the report"
        if place is None:
            findings.not_checked("data.hash", what, reason)
        else:
            findings.judge("data.hash", what, None)
            places[name] = place
    found = [
        dataclasses.replace(purpose, path=places[str(purpose.path)])
        for purpose in wanted
        if str(purpose.path) in places
    ]
    try:
        drawn = draw(found, processors=processors, seed=written.config.calibration.seed)
    except InputError as error:
        findings.not_checked("data.drawn", "the run's sequences", str(error))
        return {}
    return {
        purpose.name: same
        for purpose in wanted
        for same in _same(written, purpose, drawn, findings)
    }


def _place(
    path: Path, sha256: str | None, data: Path | None, given: str | None
) -> tuple[Path | None, str]:
    """Returns where a data file lies, or why it cannot be used."""
    if sha256 is None:
        return None, "the report has no hash of it"
    if data is not None and given == sha256:
        return data, ""
    problem = why_not_opened(path)
    if problem is not None:
        return None, f"{problem}: give it with --data"
    try:
        is_same = data_sha256(path) == sha256
    except InputError as error:  # it has changed since then
        return None, error.message
    return (path, "") if is_same else (None, "the file has another hash")


def _same(
    written: Written, purpose: Purpose, drawn: dict[str, Sequences], findings: Findings
) -> list[Sequences]:
    """Returns the purpose's sequences if they are the report's; else nothing."""
    assert written.report is not None
    facts = recorded_draw(written, purpose.name)
    again, what = drawn.get(purpose.name), f"the {purpose.name} sequences are the recorded ones"
    if again is None and facts is None:
        return []
    if again is None:
        findings.not_checked("data.drawn", what, "their file is not there")
        return []
    if facts is None:
        problem = f"the report has none, and the data has {len(again)}"
        findings.judge("data.drawn", what, problem)
        return [again]
    found = {
        "num_sequences": len(again),
        "population": again.population,
        "one_in": again.one_in,
        "sha256": again.sha256,
        "num_tokens": again.num_tokens,
    }
    found = {key: value for key, value in found.items() if key in facts}
    return [again] if findings.equal("data.drawn", what, facts, found) else []


def recorded_draw(written: Written, name: str) -> dict[str, Any] | None:
    """Returns what the report says was drawn for a purpose, or None."""
    assert written.report is not None
    if name in (CALIBRATION, CERTIFICATION, RECOVER):
        facts = written.report["provenance"]["sequences"].get(name)
    else:
        facts = next((row for row in written.report["quality"] if row["text"] == name), None)
    if facts is None:
        return None
    keys = ("num_sequences", "population", "sha256", "num_tokens")
    drawn = {key: facts[key] for key in keys if key in facts}
    return {**drawn, "one_in": facts.get("one_in")}
