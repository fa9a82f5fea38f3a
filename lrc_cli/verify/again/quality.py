"""Quality and C2 are judged once more: evaluation texts, and certification sequence by sequence."""

from dataclasses import replace

from lrc_cli.data.draw import Sequences
from lrc_cli.data.purposes import CALIBRATION, CERTIFICATION, RECOVER
from lrc_cli.errors import InputError
from lrc_cli.execution.losses import Loss, choose_loss
from lrc_cli.verify.again.held_out import HeldOut, measure_held_out, measure_quality
from lrc_cli.verify.again.networks import OpenedRun
from lrc_cli.verify.again.recovery import split, training_data
from lrc_cli.verify.again.tolerances import judge_certificate, judge_quality
from lrc_cli.verify.files.certificate import SELECTED
from lrc_cli.verify.original.unchanged import is_trained

PREDICTIONS = {
    "next_token": "next-token predictions",
    "masked_token": "predictions of masked tokens",
}
"""The words for predictions in a sentence, by the kind of loss."""


def _scoring(run: OpenedRun, sequences: Sequences) -> Loss:
    """Returns how outputs are scored: by the likelihood of tokens, else by their change."""
    try:
        return choose_loss("nll", run.before, next(sequences.batches(1)), run.tokenizer)
    except InputError:
        return Loss(kind="output")


def check_quality(run: OpenedRun) -> None:
    """Checks every row of report["quality"]."""
    assert run.written.report is not None
    rows = run.written.report["quality"]
    there = [row for row in rows if row["text"] in run.sequences]
    for row in rows:
        if row not in there:
            what = f"the quality on {row['text']} is what it is"
            run.findings.not_checked("quality.measured", what, "its data is not there")
    if not there:
        return
    loss = _scoring(run, run.sequences[there[0]["text"]])
    with run.progress.phase("quality", sum(row["num_sequences"] for row in there)) as phase:
        for row in there:
            sequences = run.sequences[row["text"]]
            found = measure_quality(run.before, run.after, sequences, loss, run.seed, phase.advance)
            judge_quality(run.findings, row, found, loss, run.before.dtype)


def check_certificate_values(run: OpenedRun) -> None:
    """Checks tolerances and limits on selection data, then the values on certification data."""
    assert run.written.report is not None
    certificate, what = run.written.report["certificate"], "the certificate's values"
    if not certificate["statements"]:
        _check_none_possible(run)
        return
    missing = [name for name in (CALIBRATION, CERTIFICATION) if name not in run.sequences]
    if missing:
        run.findings.not_checked("c2", what, f"the {missing[0]} data is not there")
        return
    whole = _selected_from(run)
    if isinstance(whole, str):
        run.findings.not_checked("c2", what, whole)
        return
    loss = _scoring(run, whole)
    first = {name: tensor[:SELECTED] for name, tensor in whole.inputs.items()}
    drawn = run.sequences[CERTIFICATION].inputs
    if set(first) == set(drawn) == {"input_ids"}:  # texts are cut to sequences of one length
        first["input_ids"] = first["input_ids"][:, : drawn["input_ids"].shape[1]]
    chosen = replace(whole, inputs=first)
    stated = [certificate["selection"]["num_tokens"], certificate["predictions"]]
    counted = [chosen.num_tokens, PREDICTIONS.get(loss.kind, "predictions")]
    header = "the certificate counts the selection's tokens and names the predictions"
    run.findings.equal("c2.header", header, stated, counted)
    selection = _held_out(run, chosen, loss, "selection")
    found = _held_out(run, run.sequences[CERTIFICATION], loss, CERTIFICATION)
    judge_certificate(run.findings, run.written, selection, found, run.before.dtype)


def _selected_from(run: OpenedRun) -> Sequences | str:
    """Returns the calibration sequences that limits come from, or why they cannot be had.

    They are sequences that nothing was trained on.
    """
    if not is_trained(run.written) or RECOVER in run.sequences:
        return run.sequences[CALIBRATION]
    data = training_data(run)
    return data if isinstance(data, str) else split(data)[1]


def _check_none_possible(run: OpenedRun) -> None:
    """Where the report has no certificate, none may have been asked for that could be made."""
    what = "no certificate could be made"
    asked = run.written.config is not None and run.written.config.certification is not None
    if not asked:
        reason = "there is no certificate"
        run.findings.not_checked("c2", "the certificate's values", reason, by_design=True)
        return
    if CALIBRATION not in run.sequences:
        run.findings.not_checked("c2", what, "the calibration data is not there")
        return
    if CERTIFICATION not in run.sequences:
        run.findings.judge("c2", what, None)
        return
    loss = _scoring(run, run.sequences[CALIBRATION])
    found = _held_out(run, run.sequences[CERTIFICATION], loss, CERTIFICATION)
    problem = None
    if found.values or found.squares:
        problem = f"{len(found.values)} quantities can be measured by sequence"
    run.findings.judge("c2", what, problem)


def _held_out(run: OpenedRun, sequences: Sequences, loss: Loss, name: str) -> HeldOut:
    with run.progress.phase(name, len(sequences)) as phase:
        return measure_held_out(
            run.before,
            run.after,
            sequences,
            [checked.layer for checked in run.checked],
            loss=loss,
            seed=run.seed,
            parts=name == CERTIFICATION,
            advance=phase.advance,
        )
