"""Real models on real tasks, size against score: tables of docs/benchmarks.md.

    .venv/bin/python scripts/fetch_demo.py --tasks
    .venv/bin/python scripts/bench_tasks.py                         every task
    .venv/bin/python scripts/bench_tasks.py minilm                  some of them
    .venv/bin/python scripts/bench_tasks.py crnn --size 0.6 --layers   at another size, by layer
    .venv/bin/python scripts/bench_tasks.py whisper --sentences 64     on fewer than all

Every row is `lrc compress` with a config of configs/; `svd` and `frobenius` have equal shares in
all layers, two factors, and inputs of the dense network. All rows of a task have the same size and
calibration data, and all networks are scored on the same data, which nothing was fitted to or
chosen on. The script prints a table of each task and whether its targets are met. It exits with 1
if a target is missed.
"""

import argparse
import json
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from functools import partial

from tasks.common import DENSE, OURS, ROOT, Missing, Results, Task
from transformers.utils import logging

from lrc_cli.errors import LrcError

OUT = ROOT / "out" / "tasks"
TASKS = ("minilm", "mlp", "cnn", "whisper", "crnn")


def main() -> int:
    """Run the tasks that are named; 0 when every target is met."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="TASK", help=f"of {', '.join(TASKS)}")
    parser.add_argument("--size", type=float, help="in place of the size of the targets")
    parser.add_argument("--layers", action="store_true", help="print the errors of our layers")
    parser.add_argument("--sentences", type=int, help="that whisper is scored on; default: all")
    arguments = parser.parse_args()
    if unknown := [name for name in arguments.names if name not in TASKS]:
        parser.error(f"unknown task {unknown[0]!r}; choose from {', '.join(TASKS)}")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        met = [
            run_task(
                find_task(name, arguments.sentences), name, arguments.size, layers=arguments.layers
            )
            for name in arguments.names or TASKS
        ]
    except (LrcError, Missing) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0 if all(met) else 1


def find_task(name: str, num_sentences: int | None = None) -> Task:
    """The task of a name; imported late, so that each needs only what it uses."""
    from tasks import digits, encoder, lines, speech

    speaking = partial(speech.run, num_sentences=num_sentences)
    return {
        "minilm": encoder.TASK,
        "mlp": digits.MLP,
        "cnn": digits.CNN,
        "whisper": replace(speech.TASK, run=speaking),
        "crnn": lines.TASK,
    }[name]


def run_task(task: Task, name: str, size: float | None, *, layers: bool) -> bool:
    """Measure one task and print what was found; whether every target is met."""
    start = time.perf_counter()
    size = size or task.size
    folder = OUT / name
    folder.mkdir(parents=True, exist_ok=True)
    results = task.run(folder, size)
    print(f"### {task.title}, at {size:g}\n\n{table(results)}\n")
    if layers:
        print(f"{layer_table(results)}\n")
    for note in results.notes:
        print(note)
    verdicts = task.checks(results.scores)
    for verdict in verdicts:
        print(f"{'met   ' if verdict.holds else 'MISSED'} {verdict.words}")
    print(f"({time.perf_counter() - start:.0f} s)\n", flush=True)
    text = json.dumps({"size": size, "scores": results.scores}, indent=2)
    (folder / f"scores-{size:g}.json").write_text(text + "\n", encoding="utf-8")
    return all(verdict.holds for verdict in verdicts)


def table(results: Results) -> str:
    """Markdown: the shares of bytes that are kept, and every score, by row."""
    names = list(results.scores[DENSE])
    lines = [
        "| | kept, compressible | kept, checkpoint | " + " | ".join(names) + " |",
        "| --- | --- | --- |" + " --- |" * len(names),
    ]
    for row, scores in results.scores.items():
        kept = _kept(results.reports.get(row))
        cells = " | ".join(f"{scores[name]:.4f}" for name in names)
        lines.append(f"| {row} | {kept} | {cells} |")
    return "\n".join(lines)


def _kept(report: Mapping[str, Mapping[str, float]] | None) -> str:
    if report is None:
        return "1 | 1"
    size = report["size"]
    return f"{size['kept_compressible']:.4f} | {size['kept_checkpoint']:.4f}"


def layer_table(results: Results) -> str:
    """Markdown: rank and relative output error of our layers on calibration data."""
    lines = ["| layer | shape | rank | storage | output error |", "| --- | --- | --- | --- | --- |"]
    for layer in results.reports[OURS]["layers"]:
        shape = " x ".join(map(str, layer["shape"]))
        last = " | dense | "  # a layer that stays dense has no errors
        if "errors" in layer:
            error = layer["errors"]["output"]["stored"]
            last = f"{layer['rank']} | {layer['storage']} | {error:.3f}"
        lines.append(f"| {layer['name']} | {shape} | {last} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
