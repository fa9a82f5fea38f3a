"""Time and private memory of drawing sequences from a long text: the table of docs/benchmarks.md.

    .venv/bin/python scripts/fetch_demo.py      the tokenizer and the text that is repeated
    .venv/bin/python scripts/bench_text.py      540 MB as .txt, as one line, as .jsonl, as .parquet

Each row is a process of its own that draws 64 sequences. Private memory is RssAnon, as everywhere
in docs/benchmarks.md: the pages of libraries and of other mapped files are not in it. "In all" is
the peak while sequences are drawn, imports and tokenizer included, and "above" is the draw's part.
CPU seconds are the draw's, of all threads, in user and system mode. The script exits with 1 if a
draw takes more than 300 MB above, or more than a minute.
"""

import argparse
import json
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

CACHE = Path(__file__).parents[1] / ".cache"
LIMIT_BYTES, LIMIT_SECONDS = 300_000_000, 60.0
SAMPLE_SECONDS = 0.02
ROWS = 1000
"""Records of a row group of the .parquet."""


def paragraphs(text: Path, size: int) -> Iterator[str]:
    """The paragraphs of a text again and again, each time in another order, up to `size` bytes."""
    own = [line for line in text.read_text().split("\n") if len(line) > 200]
    chance, written = random.Random(0), 0
    while True:
        chance.shuffle(own)
        for paragraph in own:
            numbered = f"{chance.randrange(10**6)} {paragraph}"
            written += len(numbered.encode()) + 2
            if written > size:
                return
            yield numbered


def write_text(file: Path, source: Iterator[str], end: str = "\n\n") -> None:
    """Writes the paragraphs one after the other."""
    with file.open("w") as handle:
        for paragraph in source:
            handle.write(paragraph.replace("\n", " ") + end)


def write_line(file: Path, source: Iterator[str]) -> None:
    """Writes all paragraphs on one line."""
    write_text(file, source, end=" ")


def write_jsonl(file: Path, source: Iterator[str]) -> None:
    """Writes a record for each paragraph."""
    with file.open("w") as handle:
        for paragraph in source:
            handle.write(json.dumps({"text": paragraph}) + "\n")


def write_parquet(file: Path, source: Iterator[str]) -> None:
    """Writes a record for each paragraph."""
    import pyarrow
    from pyarrow import parquet

    schema = pyarrow.schema([("text", pyarrow.string())])
    with parquet.ParquetWriter(file, schema) as writer:
        rows: list[str] = []
        for paragraph in source:
            rows.append(paragraph)
            if len(rows) == ROWS:
                writer.write_table(pyarrow.table([rows], schema=schema))
                rows = []
        writer.write_table(pyarrow.table([rows], schema=schema))


FORMS: dict[str, tuple[str, Callable[[Path, Iterator[str]], None]]] = {
    "text": ("text.txt", write_text),
    "one line": ("line.txt", write_line),
    "jsonl": ("text.jsonl", write_jsonl),
    "parquet": ("text.parquet", write_parquet),
}


def private_bytes() -> int:
    """The anonymous resident memory of the process."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.findall(r"RssAnon:\s+(\d+) kB", status)[0])


class Peak:
    """The largest private memory while the context is open."""

    def __init__(self) -> None:
        self.bytes = private_bytes()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def _watch(self) -> None:
        while not self._ended.wait(SAMPLE_SECONDS):
            self.bytes = max(self.bytes, private_bytes())

    def __enter__(self) -> "Peak":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()


def measure(file: Path, tokenizer: Path, sequences: int, length: int) -> dict[str, Any]:
    """Draws sequences and returns the seconds, the bytes and what was drawn."""
    import torch  # noqa: F401  imported alone, to be measured alone

    after_torch = private_bytes()
    from transformers import AutoTokenizer

    from lrc_cli.data.draw import Purpose, draw
    from lrc_cli.data.processors import Processors
    from lrc_cli.runtime.memory import give_back_freed_memory

    if file.suffix == ".parquet":
        from pyarrow import parquet  # noqa: F401  an import is no memory of the draw
    own = Processors(tokenizer=AutoTokenizer.from_pretrained(tokenizer))
    own.tokenizer("A tokenizer makes its tables with its first text.")
    after_opening = private_bytes()
    give_back_freed_memory()
    purpose = Purpose(
        name="calibration",
        path=file,
        sequence_length=length,
        num_sequences=sequences,
        required=True,
    )
    before, began, cpu = private_bytes(), time.perf_counter(), time.process_time()
    with Peak() as peak:
        drawn = draw([purpose], processors=own, seed=0)["calibration"]
    return {
        "seconds": time.perf_counter() - began,
        "cpu": time.process_time() - cpu,
        "above": peak.bytes - before,
        "total": peak.bytes,
        "torch": after_torch,
        "opening": after_opening,
        "population": drawn.population,
        "one_in": drawn.one_in,
    }


def main() -> None:
    """Prints a row for each form of the text."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=540)
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--forms", nargs="*", default=list(FORMS), choices=list(FORMS))
    parser.add_argument("--text", type=Path, default=CACHE / "data/wikipedia.txt")
    parser.add_argument("--tokenizer", type=Path, default=CACHE / "models/smollm2-135m")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        own = measure(options.measure, options.tokenizer, options.sequences, options.length)
        print(json.dumps(own))
        return
    missed = False
    names = ["form", "MB", "seconds", "CPU seconds", "private MB: torch", "tokenizer opened"]
    names += ["draw, in all", "above", "population", "one passage in"]
    print(f"| {' | '.join(names)} |\n|{' --- |' * len(names)}")
    for form in options.forms:
        name, write = FORMS[form]
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / name
            write(file, paragraphs(options.text, options.megabytes * 1_000_000))
            found = _in_a_process(file, options)
            size = file.stat().st_size
        missed |= found["above"] > LIMIT_BYTES or found["seconds"] > LIMIT_SECONDS
        cells = [
            form,
            f"{size / 1e6:.0f}",
            f"{found['seconds']:.1f}",
            f"{found['cpu']:.1f}",
            f"{found['torch'] / 1e6:.0f}",
            f"{found['opening'] / 1e6:.0f}",
            f"{found['total'] / 1e6:.0f}",
            f"{found['above'] / 1e6:.0f}",
            f"{found['population']:,}",
            str(found["one_in"] or 1),
        ]
        print(f"| {' | '.join(cells)} |", flush=True)
    sys.exit(1 if missed else 0)


def _in_a_process(file: Path, options: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, __file__, "--measure", file, "--tokenizer", options.tokenizer]
    command += ["--sequences", options.sequences, "--length", options.length]
    ended = subprocess.run(list(map(str, command)), check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(ended.stdout)
    return found


if __name__ == "__main__":
    main()
