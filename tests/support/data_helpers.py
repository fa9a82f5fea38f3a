"""These helpers write records and draw sequences of any kind of data."""

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow
from pyarrow import parquet

from lrc_cli.data.draw import Purpose, Sequences, draw
from lrc_cli.data.processors import Processors


def drawn(path: Path, processors: Processors, **changes: Any) -> Sequences:
    """Returns six sequences, unless changed, of one purpose."""
    values = {"sequence_length": 16, "num_sequences": 6, "required": True, **changes}
    purpose = Purpose(name="calibration", path=path, **values)
    return draw([purpose], processors=processors, seed=0)["calibration"]


def write_records(file: Path, field: str, values: list[Any]) -> Path:
    """Writes records with a number and one field, in the form that the file's name says."""
    rows = [{"number": i, field: value} for i, value in enumerate(values)]
    if file.suffix == ".jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif file.suffix == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), file, row_group_size=3)
    else:
        with file.open("w", newline="", encoding="utf-8-sig") as handle:
            writer = csv.DictWriter(handle, ["number", field])
            writer.writeheader()
            writer.writerows(rows)
    return file
