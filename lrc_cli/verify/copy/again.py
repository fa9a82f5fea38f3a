"""With both checkpoints and the data at hand, a copy's certificate is measured once more."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch

from lrc_cli.certify.copy_side import open_copy
from lrc_cli.certify.differences import differences
from lrc_cli.certify.record import CheckpointFacts
from lrc_cli.certify.sides import Side, network_names, open_side
from lrc_cli.config import Compression
from lrc_cli.config.certify import Checkpoint
from lrc_cli.data.draw import Purpose, Sequences, draw
from lrc_cli.data.named_by_others import why_not_opened
from lrc_cli.data.processors import open_processors
from lrc_cli.data.purposes import CERTIFICATION
from lrc_cli.errors import InputError
from lrc_cli.execution.losses import Loss, choose_loss
from lrc_cli.execution.network import Network, make_network
from lrc_cli.execution.precision import DTYPES
from lrc_cli.network.candidates.find import find_layers
from lrc_cli.network.layer import Layer
from lrc_cli.quality.certificate_record import Certificate, NoCertificate
from lrc_cli.runtime.devices import resolve_device
from lrc_cli.runtime.progress import Progress
from lrc_cli.verify.again.held_out import HeldOut, measure_held_out
from lrc_cli.verify.again.quality import PREDICTIONS
from lrc_cli.verify.again.tolerances import is_near, judge_table, series_problem
from lrc_cli.verify.copy.files import SELECTION, WrittenCopy
from lrc_cli.verify.copy.weights import Tensors, check_weights
from lrc_cli.verify.files.certificate import SELECTED
from lrc_cli.verify.files.manifest import data_sha256, is_inside, sha256_of
from lrc_cli.verify.statements import Findings

LEAST_CLIP, CLIP_FACTOR = 1e-6, 4.0
"""A clipping limit is so many times the largest selection value, and at least the first number."""


def check_copy_against(
    written: WrittenCopy,
    against: Path,
    other: Path,
    *,
    data: Path | None,
    factory: str | None,
    trust_remote_code: bool,
    findings: Findings,
    progress: Progress,
) -> None:
    """Checks hashes, weights and values of a copy's certificate.

    Args:
        against: the original.
        other: the copy.
        data: the data, where it is not where the config says.
        factory: builds the module of checkpoints that are not transformers'.

    Raises:
        InputError: a checkpoint or `data` cannot be opened.
    """
    record, config = written.record, written.config
    built = {"factory": factory, "trust_remote_code": trust_remote_code}
    first, second = (
        Checkpoint(path=str(path), state_dict=section.state_dict, **built)  # type: ignore[arg-type]
        for path, section in ((against, config.original), (other, config.other))
    )
    original = open_side(first, factorised=False)
    copy = open_copy(second, original)
    sides = (original, copy)
    same = True
    for name, side, facts in zip(
        ("original", "copy"), sides, (record.original, record.other), strict=True
    ):
        same &= _check_side(name, side, facts, findings)
    if not same:
        for id, what in (("weights", "the weights' figures"), ("values", "the measured values")):
            findings.not_checked(id, what, "the checkpoints are not the recorded ones")
        return
    with progress.phase("weights", 1), findings.guard("weights", "the weights can be compared"):
        dense, other_dense = (Tensors(side, original.module) for side in sides)
        check_weights(record.weights, dense, other_dense, findings)
    with findings.guard("values", "the values can be measured", passing=(InputError,)):
        _check_values(written, original, copy, data, findings, progress)


def _check_side(name: str, side: Side, facts: CheckpointFacts, findings: Findings) -> bool:
    """Every recorded file must have its hash, and no other may make the network."""
    same, path = True, side.path
    for file_name, sha256 in facts.sha256.items():
        what = f"the {name}'s {file_name} has the hash in the certificate"
        file = path if path.is_file() and len(facts.sha256) == 1 else path / file_name
        problem: str | None = "the file is missing"
        if is_inside(file_name) and file.is_file():
            found = sha256_of(file)
            problem = None if found == sha256 else f"stated {sha256}, found {found}"
        same &= findings.judge("checkpoints.hash", what, problem)
    there = {side.name_of(file) for file in side.files}
    strange = sorted(there - set(facts.sha256)) if not path.is_file() else []
    what = f"the certificate has the hash of every file of the {name} that makes the network"
    problem = f"not of {', '.join(strange[:3])}" if strange else None
    same &= findings.judge("checkpoints.hash", what, problem)
    stated = (facts.form, facts.architecture, facts.num_parameters, facts.num_bytes)
    found_facts = (
        side.form,
        type(side.module).__name__,
        sum(info.num_elements for info in side.source.tensors.values()),
        side.num_bytes,
    )
    what = f"the {name} is described by what its files hold"
    return findings.equal("checkpoints.facts", what, stated, found_facts) and same


def _check_values(
    written: WrittenCopy,
    original: Side,
    copy: Side,
    data: Path | None,
    findings: Findings,
    progress: Progress,
) -> None:
    drawn = _draw_again(written, original, data, findings)
    if drawn is None:
        return
    record = written.record
    chosen, certified = drawn
    found = differences(original, copy, chosen)
    what = "the differences are what both checkpoints give"
    findings.equal("differences", what, record.differences, found)
    layers, _ = find_layers(original.module, original.source, Compression(size=0.5))
    names = network_names(original.module, (layer.keys.weight for layer in layers))
    dtype = DTYPES[record.arithmetic.activation_dtype]
    device = _device(record.arithmetic.device)
    before = make_network(original.module, device=device, dtype=dtype)
    after = make_network(copy.module, device=device, dtype=dtype)
    loss = _scoring(before, chosen, original)
    stated = {x.name: x.input_error for x in record.weights.tensors if x.input_error is not None}
    watched = [layer for layer in layers if names[layer.keys.weight] in stated]
    with progress.phase(SELECTION, len(chosen)) as phase:
        limits = _measured(before, after, chosen, watched, loss, written, phase.advance)
    with progress.phase(CERTIFICATION, len(certified)) as phase:
        values = _measured(before, after, certified, [], loss, written, phase.advance)
    assert dtype is not None
    _judge(written, loss, limits, values, dtype, findings)
    for layer in watched:
        name = names[layer.keys.weight]
        what = f"the error of {name} on inputs is what both networks give"
        known = layer.name in limits.squares
        value = limits.overall(layer.name, "same_input") if known else None
        near = value is not None and is_near(stated[name] or 0.0, value, dtype)
        problem = None if near else f"stated {stated[name]}, found {value}"
        findings.judge("weights.inputs", what, problem)


def _draw_again(
    written: WrittenCopy, original: Side, data: Path | None, findings: Findings
) -> tuple[Sequences, Sequences] | None:
    """Returns the selection sequences and the certified ones, drawn again; None if they cannot."""
    certificate, section = written.record.certificate, written.config.data
    named = Path(section.path)
    place = named if data is None else data
    what = "the data has the hash in the certificate"
    problem = why_not_opened(named) if data is None else None
    if problem is not None:
        findings.not_checked("data.hash", what, f"{problem}: give it with --data")
        return None
    if isinstance(certificate, Certificate):
        sha256 = certificate.data.population.file_sha256
        if not findings.equal("data.hash", what, sha256, data_sha256(place)):
            return None
    wanted = Purpose(
        name=CERTIFICATION,
        path=place,
        part=section.part or (0.0, 1.0),
        sequence_length=section.sequence_length,
        num_sequences=section.num_sequences,
        required=not section.num_sequences_is_default,
        text_field=section.text_field,
        chat_template=section.chat_template,
        own_draw=True,
    )
    first = replace(wanted, name=SELECTION, num_sequences=SELECTED, required=False, own_draw=False)
    processors = open_processors(original.source, original.module)
    drawn = draw([first, wanted], processors=processors, seed=section.seed)
    if CERTIFICATION not in drawn:
        findings.judge("data.drawn", "the sequences can be drawn again", "there are none")
        return None
    chosen, certified = drawn[SELECTION], drawn[CERTIFICATION]
    if set(chosen.inputs) == set(certified.inputs) == {"input_ids"}:
        length = certified.inputs["input_ids"].shape[1]
        chosen = replace(chosen, inputs={"input_ids": chosen.inputs["input_ids"][:, :length]})
    if isinstance(certificate, NoCertificate):
        return chosen, certified
    facts = certificate.data
    stated = {
        "population": facts.population.size,
        "passages": facts.population.description.partition("one passage in ")[2].partition(" ")[0],
        "drawn": [certificate.num_sequences, facts.data_sha256],
        "selection": [facts.selection.num_sequences, facts.selection.num_tokens],
        "selection's hash": facts.selection.sha256,
    }
    found = {
        "population": certified.population,
        "passages": "" if certified.one_in is None else str(certified.one_in),
        "drawn": [len(certified), certified.sha256],
        "selection": [len(chosen), chosen.num_tokens],
        "selection's hash": drawn[SELECTION].sha256,
    }
    what = "population and draw are the recorded ones"
    return (chosen, certified) if findings.equal("data.drawn", what, stated, found) else None


def _device(name: str) -> torch.device:
    """Returns the recorded device, or the device that there is here."""
    try:
        return resolve_device(name)
    except (InputError, RuntimeError):
        return resolve_device("auto")


def _scoring(before: Network, chosen: Sequences, original: Side) -> Loss:
    """Returns how outputs are scored: by the likelihood of tokens, else by their change."""
    try:
        return choose_loss("nll", before, next(chosen.batches(1)), original.tokenizer)
    except InputError:
        return Loss(kind="output")


def _measured(
    before: Network,
    after: Network,
    sequences: Sequences,
    layers: list[Layer],
    loss: Loss,
    written: WrittenCopy,
    advance: Callable[[float], None],
) -> HeldOut:
    seed = written.config.data.seed
    return measure_held_out(
        before, after, sequences, layers, loss=loss, seed=seed, parts=False, advance=advance
    )


def _judge(
    written: WrittenCopy,
    loss: Loss,
    limits: HeldOut,
    values: HeldOut,
    dtype: torch.dtype,
    findings: Findings,
) -> None:
    """Judges clipping limits and values; without a certificate no value may be finite."""
    certificate = written.record.certificate
    if isinstance(certificate, NoCertificate):
        series = [*limits.values.values(), *values.values.values()]
        finite = bool(series) and all(bool(torch.tensor(x).isfinite().all()) for x in series)
        problem = f"{len(values.values)} quantities can be measured" if finite else None
        findings.judge("values", "nothing could be certified", problem)
        return
    what = "the predictions are of the network's kind"
    words = PREDICTIONS.get(loss.kind, "predictions")
    findings.equal("values.predictions", what, certificate.data.predictions, words)
    clips = {
        name: max(LEAST_CLIP, CLIP_FACTOR * max(map(abs, found)))
        for name, found in limits.values.items()
        if name != "top1_disagreement"
    }
    stated: Mapping[str, float] = certificate.clips
    judge_table(findings, "values.clips", "the clipping limit of", stated, clips, dtype)
    listed = certificate.values.quantities
    what = "the quantities are what such networks give"
    findings.equal("values", what, sorted(listed), sorted(values.values))
    for name, found in listed.items():
        what = f"the values of {name} are what both networks give"
        problem = series_problem(name, found, values.values.get(name), dtype, 0.0)
        findings.judge("values", what, problem)
