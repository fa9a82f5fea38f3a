"""A written directory is scored beside its original: quality, speed and memory."""

import time
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch

from lrc_cli.checkpoint.source import open_source
from lrc_cli.config import Calibration, load_config
from lrc_cli.config.constraints import part_of
from lrc_cli.data.draw import Purpose, Sequences, draw
from lrc_cli.data.named_by_others import why_not_opened
from lrc_cli.data.processors import open_processors
from lrc_cli.data.purposes import CALIBRATION, CERTIFICATION, RECOVER, purposes_of
from lrc_cli.errors import InputError
from lrc_cli.execution.constancy import check_again
from lrc_cli.execution.input_checks import check_sequences, check_unused, ignored_inputs, probe
from lrc_cli.execution.network import Network, make_network
from lrc_cli.execution.precision import DTYPES
from lrc_cli.network.factories import ask_for_factory
from lrc_cli.network.opening import open_module
from lrc_cli.quality.compare import compare, scoring
from lrc_cli.quality.records import QualityRow
from lrc_cli.runtime.devices import resolve_device
from lrc_cli.runtime.memory import peak_memory
from lrc_cli.runtime.progress import Progress

REPEATS = 3


def score_directory(
    directory: Path,
    *,
    against: Path | None,
    data: tuple[Path, ...],
    part: tuple[str, ...],
    num_sequences: int,
    sequence_length: int | None,
    factory: str | None,
    trust_remote_code: bool,
    state_dict: str | None = None,
    progress: Progress,
) -> dict[str, Any]:
    """Runs both checkpoints over the same sequences.

    Device and dtype come from the output's lrc.yaml. The factory and trust_remote_code do not,
    because the directory may be somebody else's.

    Args:
        directory: a finished output of `lrc compress`.
        against: the original; None: the checkpoint that the output's lrc.yaml names.
        data: files to score on; empty: the evaluation texts of lrc.yaml, drawn as they were then.
        part: "A:B" for each of `data`, in order; a file without a part is taken whole.
        sequence_length: tokens of a sequence of `data`; None: as in the output's calibration.
        factory: builds the module of checkpoints that are not transformers'.
        trust_remote_code: whether code that comes with the checkpoints may run.
        state_dict: the original's state dict in a file with several; None: as lrc.yaml says.

    Raises:
        InputError: something cannot be opened, or there is nothing to score on.
    """
    config = load_config(directory / "lrc.yaml")
    if not (data or part):
        _check_named(directory, purposes_of(config))
    # The output and its original are opened.
    written = open_source(directory, factorised=True)
    chosen = config.model.state_dict if state_dict is None else state_dict
    original = open_source(against or Path(config.model.path), state_dict=chosen)
    if factory is None and original.config is None:
        raise ask_for_factory(original.path, config.model.factory)
    device = resolve_device(config.runtime.device)
    (module, original), (compressed, written) = (
        open_module(source, factory=factory, trust_remote_code=trust_remote_code)
        for source in (original, written)
    )
    for note in original.notes:
        progress.note(note)
    processors = open_processors(original, module, trust_remote_code=trust_remote_code)
    # The texts are the user's files, or the evaluation texts drawn as in the run.
    if data or part:
        length = sequence_length or config.calibration.sequence_length
        wanted = _purposes(data, part, num_sequences, length, config.calibration)
        texts = draw(wanted, processors=processors, seed=config.calibration.seed)
    else:
        drawn = draw(purposes_of(config), processors=processors, seed=config.calibration.seed)
        texts = {
            name: s
            for name, s in drawn.items()
            if name not in (CALIBRATION, CERTIFICATION, RECOVER)
        }
    if not texts:
        raise InputError("eval: there is no text to score on", "give one with --data")
    # Both networks get one dtype, and what both are scored by.
    check_sequences(texts, module, original)
    before = make_network(module, device=device, dtype=DTYPES.get(config.runtime.dtype))
    check_unused(before, texts, original)
    trace = probe(before, texts)[0].trace
    for note in ignored_inputs(before, texts):
        progress.note(note)
    after = make_network(compressed, device=device, dtype=before.dtype)
    first = next(iter(texts.values()))
    loss = scoring(before, next(first.batches(1)), processors.tokenizer)
    # Each text gives a row; speed is measured on the first text.
    rows = []
    with progress.phase("evaluation", sum(len(s) for s in texts.values())) as phase:
        for name, sequences in texts.items():
            scores = compare(
                before, after, sequences, loss=loss, seed=config.runtime.seed, advance=phase.advance
            )
            row = QualityRow(text=name, scores=scores, sha256=sequences.sha256)
            rows.append(row.to_json())
    check_again(before, trace)
    return {
        "directory": str(directory),
        "against": str(original.path),
        "activation_dtype": str(before.dtype).removeprefix("torch."),
        "bytes": {"before": original.num_bytes, "after": written.num_bytes},
        "seconds_per_sequence": {"before": _time(before, first), "after": _time(after, first)},
        "memory": peak_memory(device),
        "quality": rows,
    }


def _check_named(directory: Path, purposes: Sequence[Purpose]) -> None:
    """Raises InputError for data that may not be opened because only the output names them."""
    for purpose in purposes:
        problem = why_not_opened(purpose.path)
        if problem is not None:
            raise InputError(
                f"{directory}/lrc.yaml: the data of {purpose.name}, {purpose.path}: {problem}",
                "give data to score on with --data",
            )


def _purposes(
    data: tuple[Path, ...],
    part: tuple[str, ...],
    num_sequences: int,
    sequence_length: int,
    calibration: Calibration,
) -> list[Purpose]:
    if len(part) > len(data):
        raise InputError(
            "eval: more --part than --data", "give one --part for each --data, in order"
        )
    shares = [part_of(text) for text in part] + [(0.0, 1.0)] * (len(data) - len(part))
    names = [" ".join(map(str, pair)) for pair in zip_longest(data, part, fillvalue="")]
    return [
        Purpose(
            name=name.strip() if names.count(name) == 1 else f"{name.strip()} #{i}",
            path=path,
            part=share,
            sequence_length=sequence_length,
            num_sequences=num_sequences,
            required=False,
            text_field=calibration.text_field,
            chat_template=calibration.chat_template,
        )
        for i, (name, path, share) in enumerate(zip(names, data, shares, strict=True), start=1)
    ]


def _time(network: Network, sequences: Sequences) -> float:
    """Returns seconds for one sequence, the best of a few."""
    batch = next(sequences.batches(1))
    best = float("inf")
    for _ in range(REPEATS):
        start = time.perf_counter()
        with torch.no_grad():
            network(batch)
        if network.device.type == "cuda":
            torch.cuda.synchronize(network.device)
        best = min(best, time.perf_counter() - start)
    return best
