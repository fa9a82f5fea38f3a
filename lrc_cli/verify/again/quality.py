"""Quality and C2 are judged once more: evaluation texts, and certification sequence by sequence."""

from dataclasses import replace

from lrc_cli.data.draw import Sequences
from lrc_cli.data.purposes import CALIBRATION, CERTIFICATION
from lrc_cli.errors import InputError
from lrc_cli.execution.losses import Loss, choose_loss
from lrc_cli.verify.again.held_out import HeldOut, measure_held_out, measure_quality
from lrc_cli.verify.again.networks import Bench
from lrc_cli.verify.again.tolerances import judge_certificate, judge_quality
from lrc_cli.verify.files.certificate import SELECTED

PREDICTIONS = {
    "next_token": "next-token predictions",
    "masked_token": "predictions of masked tokens",
}
"""The words for predictions in a sentence, by the kind of loss."""


def _scoring(bench: Bench, sequences: Sequences) -> Loss:
    """Returns how outputs are scored: by the likelihood of tokens, else by their change."""
    try:
        return choose_loss("nll", bench.before, next(sequences.batches(1)), bench.tokenizer)
    except InputError:
        return Loss(kind="output")


def check_quality(bench: Bench) -> None:
    """Checks every row of report["quality"]."""
    assert bench.written.report is not None
    rows = bench.written.report["quality"]
    there = [row for row in rows if row["text"] in bench.sequences]
    for row in rows:
        if row not in there:
            what = f"the quality on {row['text']} is what it is"
            bench.findings.not_checked("quality.measured", what, "its data is not there")
    if not there:
        return
    loss = _scoring(bench, bench.sequences[there[0]["text"]])
    with bench.progress.phase("quality", sum(row["num_sequences"] for row in there)) as phase:
        for row in there:
            sequences = bench.sequences[row["text"]]
            found = measure_quality(
                bench.before, bench.after, sequences, loss, bench.seed, phase.advance
            )
            judge_quality(bench.findings, row, found, loss, bench.before.dtype)


def check_certificate_values(bench: Bench) -> None:
    """Checks tolerances and limits on selection data, then the values on certification data."""
    assert bench.written.report is not None
    certificate, what = bench.written.report["certificate"], "the certificate's values"
    if not certificate["statements"]:
        bench.findings.not_checked("c2", what, "there is no certificate")
        return
    missing = [name for name in (CALIBRATION, CERTIFICATION) if name not in bench.sequences]
    if missing:
        bench.findings.not_checked("c2", what, f"the {missing[0]} data is not there")
        return
    whole = bench.sequences[CALIBRATION]
    loss = _scoring(bench, whole)
    first = {name: tensor[:SELECTED] for name, tensor in whole.inputs.items()}
    drawn = bench.sequences[CERTIFICATION].inputs
    if set(first) == set(drawn) == {"input_ids"}:  # texts are cut to sequences of one length
        first["input_ids"] = first["input_ids"][:, : drawn["input_ids"].shape[1]]
    chosen = replace(whole, inputs=first)
    stated = [certificate["selection"]["num_tokens"], certificate["predictions"]]
    counted = [chosen.num_tokens, PREDICTIONS.get(loss.kind, "predictions")]
    header = "the certificate counts the selection's tokens and names the predictions"
    bench.findings.equal("c2.header", header, stated, counted)
    selection = _held_out(bench, chosen, loss, "selection")
    found = _held_out(bench, bench.sequences[CERTIFICATION], loss, CERTIFICATION)
    judge_certificate(bench.findings, bench.written, selection, found, bench.before.dtype)


def _held_out(bench: Bench, sequences: Sequences, loss: Loss, name: str) -> HeldOut:
    with bench.progress.phase(name, len(sequences)) as phase:
        return measure_held_out(
            bench.before,
            bench.after,
            sequences,
            [checked.layer for checked in bench.checked],
            loss=loss,
            seed=bench.seed,
            parts=name == CERTIFICATION,
            advance=phase.advance,
        )
