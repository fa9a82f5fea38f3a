"""`lrc certify` on one page: open both, draw, compare weights, measure, state, write."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import transformers
from torch import nn

from lrc_cli import __version__
from lrc_cli.certify.copy_side import open_copy
from lrc_cli.certify.differences import check_outputs, differences
from lrc_cli.certify.flags import find_flags
from lrc_cli.certify.gates import check_gates
from lrc_cli.certify.pages import write_certificate
from lrc_cli.certify.places import check_places
from lrc_cli.certify.record import (
    DIRECTION,
    Arithmetic,
    CheckpointFacts,
    CopyRecord,
    TensorFacts,
    Weights,
)
from lrc_cli.certify.sentences import arithmetic_sentences, worst_sequences
from lrc_cli.certify.sides import DenseTensors, Side, network_names, open_side
from lrc_cli.certify.weights import compare_all
from lrc_cli.checkpoint.output_directory import check_output, output_directory
from lrc_cli.checkpoint.side_files import MOST_SIDE_FILES
from lrc_cli.config import CertifyConfig, Compression, certify_yaml
from lrc_cli.data.draw import Purpose, Sequences, draw
from lrc_cli.data.folders import visible_files
from lrc_cli.data.processors import open_processors
from lrc_cli.data.purposes import CERTIFICATION
from lrc_cli.errors import InputError
from lrc_cli.execution.chain import find_chain
from lrc_cli.execution.input_checks import check_sequences, check_unused, probe
from lrc_cli.execution.losses import Loss
from lrc_cli.execution.network import Network, make_network
from lrc_cli.execution.precision import DTYPES
from lrc_cli.network.candidates.find import find_layers
from lrc_cli.network.layer import Layer
from lrc_cli.network.layouts import linear_shape
from lrc_cli.network.low_rank.stored import StoredLayer
from lrc_cli.quality.certificate import Values, clips_of, make_certificate
from lrc_cli.quality.certificate_record import Certificate, NoCertificate
from lrc_cli.quality.compare import scoring
from lrc_cli.quality.drawn import NUM_SELECTION, certificate_data, first_sequences
from lrc_cli.quality.held_out import NotFinite, measure
from lrc_cli.reading import files_below
from lrc_cli.runtime.devices import resolve_device
from lrc_cli.runtime.file_states import States, check_state, state_of, states_of
from lrc_cli.runtime.files import hash_path
from lrc_cli.runtime.progress import Progress
from lrc_cli.runtime.spill import HostMemory

SELECTION = "selection"


def certify(
    config: CertifyConfig,
    *,
    config_file: Path | None = None,
    junit: Path | None = None,
    force: bool = False,
    progress: Progress,
) -> CopyRecord:
    """Compares a copy with its original and writes the certificate's directory, whole or not.

    Args:
        config: what to compare, on which data, in which arithmetic.
        config_file: the file that the config was read from; None: no file.
        junit: a JUnit file that the caller will write; only its place is checked.
        force: replace a certificate that is there.

    Raises:
        InputError: something cannot be opened, or the two cannot be compared.
        RunError: the run fails, or an input has changed meanwhile.
    """
    output = check_places(config, config_file, junit)
    before = _states(config)
    check_output(output, force=force)
    original = open_side(config.original, factorised=False)
    copy = open_copy(config.other, original)
    for note in (*original.source.notes, *(() if copy.notes else copy.source.notes)):
        progress.note(note)
    layers, _ = find_layers(original.module, original.source, Compression(size=0.5))
    with output_directory(output, force=force) as directory:
        weights = _compare_weights(original, copy, layers, progress)
        names = network_names(original.module, (x.keys.weight for x in layers))
        pair = _networks(config, original, copy)
        measured = _measure(config, pair, layers, directory, progress)
        record = _record(config, pair, weights, measured, names)
        record = replace(record, gates=check_gates(config.gates, record))
        _check_unchanged(config, before)
        write_certificate(directory, record)
    return record


@dataclass(frozen=True, kw_only=True)
class NetworkPair:
    """Both networks ready to run, with what was drawn for them."""

    original: Side
    copy: Side
    before: Network
    after: Network
    purpose: Purpose
    drawn: Sequences
    """The certification sequences."""
    chosen: Sequences
    """The sequences that limits are chosen on."""
    chosen_sha256: str
    loss: Loss
    alike: bool
    """Whether both have the same blocks."""
    differences: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class MeasuredPair:
    """What running both networks came to."""

    certificate: Certificate | NoCertificate
    input_errors: dict[str, float]
    """The errors of layers on the selection data, by the key of the layer's weight."""


def purposes_of_data(config: CertifyConfig) -> list[Purpose]:
    """Returns the draws of a config in order: the limits' first, as nothing may be chosen later."""
    data = config.data
    wanted = Purpose(
        name=CERTIFICATION,
        path=Path(data.path),
        part=data.part or (0.0, 1.0),
        sequence_length=data.sequence_length,
        num_sequences=data.num_sequences,
        required=not data.num_sequences_is_default,
        text_field=data.text_field,
        chat_template=data.chat_template,
        own_draw=True,
    )
    selection = replace(
        wanted, name=SELECTION, num_sequences=NUM_SELECTION, required=False, own_draw=False
    )
    return [selection, wanted]


def _networks(config: CertifyConfig, original: Side, copy: Side) -> NetworkPair:
    processors = open_processors(
        original.source,
        original.module,
        trust_remote_code=config.original.trust_remote_code,
    )
    purposes = purposes_of_data(config)
    sequences = draw(purposes, processors=processors, seed=config.data.seed)
    if CERTIFICATION not in sequences:
        raise InputError(
            f"data.path: {config.data.path} has no more than {NUM_SELECTION} sequences in its part,"
            " and limits are chosen on so many before anything is certified",
            "give more data, widen the part, or lower sequence_length",
        )
    # The data must fit both networks, and both run in one data type.
    check_sequences(sequences, original.module, original.source)
    of_copy = {f"{name}, for the copy": drawn for name, drawn in sequences.items()}
    check_sequences(of_copy, copy.module, copy.source)
    differing = differences(original, copy, sequences[SELECTION])
    device = resolve_device(config.runtime.device)
    dtype = DTYPES.get(config.runtime.dtype)
    before = make_network(original.module, device=device, dtype=dtype)
    check_unused(before, sequences, original.source)
    probe(before, sequences)
    after = make_network(copy.module, device=device, dtype=before.dtype)
    check_unused(after, of_copy, copy.source)
    check_outputs(before, after, sequences[CERTIFICATION], config.other.path)
    one = next(sequences[SELECTION].batches(1))
    return NetworkPair(
        original=original,
        copy=copy,
        before=before,
        after=after,
        purpose=purposes[1],
        drawn=sequences[CERTIFICATION],
        chosen=first_sequences(sequences[SELECTION], sequences[CERTIFICATION]),
        chosen_sha256=sequences[SELECTION].sha256,
        loss=scoring(before, one, processors.tokenizer),
        alike=find_chain(before, one).names == find_chain(after, one).names,
        differences=differing,
    )


def _compare_weights(
    original: Side, copy: Side, layers: list[Layer], progress: Progress
) -> Weights:
    """Returns the comparison tensor by tensor."""
    keys = {layer.name: layer.keys.weight for layer in layers}
    old, new = (DenseTensors(side, original.module, keys) for side in (original, copy))
    with progress.phase("weights", len(old)) as phase, torch.no_grad():
        compared = compare_all(old, new, phase.advance)
        flags = find_flags(old, new, compared)
    tensors = (
        TensorFacts(name=x.name, shape=x.shape, error=x.error, scale=x.scale, grid=x.grid)
        for x in compared
    )
    return Weights(tensors=tuple(tensors), flags=flags)


def _measure(
    config: CertifyConfig,
    pair: NetworkPair,
    layers: list[Layer],
    directory: Path,
    progress: Progress,
) -> MeasuredPair:
    """Runs both networks: first on the selection data, which fix limits, then on the drawn."""
    memory = HostMemory(config.runtime.memory_bytes, directory)
    parts = dict(pair.after.module.named_modules())
    same = [layer for layer in layers if _shape(parts.get(layer.name)) == layer.shape]
    seed, keep = config.data.seed, memory.keep
    try:
        with progress.phase(SELECTION, len(pair.chosen)) as phase:
            chosen = measure(
                pair.before,
                pair.after,
                pair.chosen,
                same if pair.alike else [],
                loss=pair.loss,
                seed=seed,
                decompose=False,
                alike=pair.alike,
                advance=phase.advance,
                keep=keep,
            )
        with progress.phase(CERTIFICATION, len(pair.drawn)) as phase:
            found = measure(
                pair.before,
                pair.after,
                pair.drawn,
                [],
                loss=pair.loss,
                seed=seed,
                decompose=False,
                alike=pair.alike,
                advance=phase.advance,
                keep=keep,
            )
    except NotFinite as error:
        note = f"none could be issued: {error.message}"
        return MeasuredPair(certificate=NoCertificate(note=note), input_errors={})
    if not found.values:
        note = "none could be issued: the outputs have no dimension for the sequences"
        return MeasuredPair(certificate=NoCertificate(note=note), input_errors={})
    keys = {layer.name: layer.keys.weight for layer in same}
    return MeasuredPair(
        certificate=_certificate(config, pair, chosen.values, found.values),
        input_errors={keys[n]: x.overall("same_input") for n, x in chosen.layers.items()},
    )


def _shape(part: nn.Module | None) -> tuple[int, int] | None:
    """Returns (m, n) of a layer of the copy; None where it has no such layer."""
    if isinstance(part, StoredLayer):
        return part.shape
    return None if part is None else linear_shape(part)


def _certificate(
    config: CertifyConfig, pair: NetworkPair, selection: Values, values: Values
) -> Certificate:
    data = certificate_data(
        pair.purpose,
        pair.drawn,
        pair.chosen,
        chosen_sha256=pair.chosen_sha256,
        file_sha256=hash_path(pair.purpose.path),
        loss=pair.loss,
        dtype=pair.before.dtype,
    )
    return make_certificate(
        values,
        {},
        clips=clips_of(selection),
        tolerances={},
        confidence=config.confidence,
        quantile=config.quantile,
        data=data,
        direction=DIRECTION,
    )


def _record(
    config: CertifyConfig,
    pair: NetworkPair,
    weights: Weights,
    measured: MeasuredPair,
    names: Mapping[str, str],
) -> CopyRecord:
    errors = {names[key]: error for key, error in measured.input_errors.items()}
    tensors = tuple(replace(x, input_error=errors.get(x.name)) for x in weights.tensors)
    return CopyRecord(
        lrc_version=__version__,
        original=_facts(pair.original),
        other=_facts(pair.copy),
        arithmetic=_arithmetic(pair),
        differences=pair.differences,
        certificate=measured.certificate,
        worst=worst_sequences(measured.certificate),
        weights=replace(weights, tensors=tensors),
        gates=(),
        config=certify_yaml(config),
    )


def _facts(side: Side) -> CheckpointFacts:
    return CheckpointFacts(
        name=side.path.name,
        form=side.form,
        architecture=type(side.module).__name__,
        num_parameters=side.num_parameters,
        num_bytes=side.num_bytes,
        sha256=side.hashes(),
    )


def _arithmetic(pair: NetworkPair) -> Arithmetic:
    device = pair.before.device.type
    dtype = str(pair.before.dtype).removeprefix("torch.")
    return Arithmetic(
        device=device,
        activation_dtype=dtype,
        torch_version=torch.__version__,
        transformers_version=transformers.__version__,
        sentences=arithmetic_sentences(device, dtype, pair.copy.form),
    )


def _states(config: CertifyConfig) -> States:
    """Returns the states of all files that are read, before any of them is read."""
    found: list[Path] = []
    for path in map(Path, (config.original.path, config.other.path)):
        found += files_below(path, MOST_SIDE_FILES) if path.is_dir() else [path]
    data = Path(config.data.path)
    found += visible_files(data) if data.is_dir() else [data]
    return states_of(found)


def _check_unchanged(config: CertifyConfig, before: States) -> None:
    """Raises ChangedInput if a file that was there has changed."""
    for file, state in before.items():
        check_state(file, state, state_of(file))
