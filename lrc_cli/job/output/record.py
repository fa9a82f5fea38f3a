"""The record of a finished run, which becomes report.json, is filled in here."""

import platform
import sys
from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import version

import torch

from lrc_cli import __version__
from lrc_cli.checkpoint.source import Source
from lrc_cli.config import config_hash, to_dict, to_yaml
from lrc_cli.data.purposes import CALIBRATION, CERTIFICATION, RECOVER
from lrc_cli.forms import FORMS
from lrc_cli.job.data_found import data_found
from lrc_cli.job.fingerprints import report_code_hash
from lrc_cli.job.plan import Plan
from lrc_cli.network.layer import Layer
from lrc_cli.quality.certificate_record import Certificate, NoCertificate
from lrc_cli.quality.records import QualityRow, WorstCase
from lrc_cli.report.record import (
    SCHEMA_VERSION,
    BeforeAfter,
    DrawnSequences,
    HeldOutErrors,
    LayerFacts,
    LayerRecord,
    LossRecord,
    Provenance,
    Record,
    Recovery,
    SequentialDecision,
    Size,
    SkippedTensor,
    Target,
)

PACKAGES = ("torch", "transformers", "safetensors")


def build_record(
    plan: Plan,
    *,
    layers: Mapping[str, LayerFacts],
    held_out: Mapping[str, HeldOutErrors],
    loss: LossRecord | None,
    sequential: SequentialDecision,
    recovery: Recovery | None,
    written: Source,
    quality: list[QualityRow],
    certificate: Certificate | NoCertificate,
    worst_case: WorstCase | None,
    seconds: Mapping[str, float],
    memory: Mapping[str, int],
) -> Record:
    """Returns the record of a run, without gates.

    Args:
        layers: the facts of every layer, by name.
        held_out: errors on certification data, by layer name.
        loss: the loss whose gradients were measured; None where no method needs gradients.
        sequential: whether layers were fitted to the compressed network's inputs, and why.
        recovery: what training the factors gave; None where nothing was trained.
        written: the output, opened.
        quality: one row for each evaluation text.
        certificate: the statements of `certify`.
        worst_case: the worst-case bound; None for networks without such a bound.
        seconds: wall time by phase.
        memory: peak bytes.
    """
    compression = plan.config.compression
    target, value = compression.target
    size = _size(plan, layers, written)
    return Record(
        schema_version=SCHEMA_VERSION,
        model=plan.source.path.name,
        architecture=next(iter((plan.source.config or {}).get("architectures") or ()), None),
        method=compression.method,
        loss=loss,
        target=Target(
            name=target,
            value=value,
            of=compression.size_of if target == "size" else None,
            met=_target_met(plan, layers, size),
        ),
        allocation=compression.allocation,
        sequential=_what_became_of(sequential, layers),
        recovery=recovery,
        size=size,
        quality=tuple(quality),
        layers=tuple(
            _layer(plan, written, layer, _with_held_out(layers[layer.name], held_out, layer.name))
            for layer in plan.layers
        ),
        skipped=tuple(
            SkippedTensor(
                name=skipped.name,
                reason=skipped.reason,
                bytes=skipped.num_bytes,
                share=skipped.num_bytes / plan.source.num_bytes,
            )
            for skipped in plan.skipped
        ),
        copies=plan.source.copies,
        fused=plan.source.fused,
        certificate=certificate,
        worst_case=worst_case,
        timing={name: round(value, 3) for name, value in seconds.items()},
        memory=dict(memory),
        provenance=_provenance(plan),
    )


def _with_held_out(
    facts: LayerFacts, held_out: Mapping[str, HeldOutErrors], name: str
) -> LayerFacts:
    if name not in held_out:
        return facts
    assert facts.errors is not None
    return replace(facts, errors=replace(facts.errors, held_out=held_out[name]))


def _what_became_of(
    sequential: SequentialDecision, layers: Mapping[str, LayerFacts]
) -> SequentialDecision:
    """Returns the decision to fit sequentially, as it turned out."""
    if not sequential.used or any(facts.sequential for facts in layers.values()):
        return sequential
    trained = any(facts.trained for facts in layers.values())
    became = "trained afterwards" if trained else "fitted plainly"
    reason = f"{sequential.reason}, and each of them was {became} in the end"
    return SequentialDecision(used=False, reason=reason, held_back=0)


def _target_met(plan: Plan, layers: Mapping[str, LayerFacts], size: Size) -> bool:
    """Returns whether the output meets the target. A layer that fell back may have missed it."""
    compression = plan.config.compression
    errors = [facts.errors for facts in layers.values() if facts.errors is not None]
    if compression.size is not None:
        kept = {"compressible": size.kept_compressible, "checkpoint": size.kept_checkpoint}
        return kept[compression.size_of] <= compression.size
    if compression.max_layer_error is not None:
        return all(e.output.stored <= compression.max_layer_error for e in errors)
    if compression.threshold is not None:
        return not any(facts.fallback for facts in layers.values())
    assert compression.max_loss_increase is not None
    # An error that a sequential fit inherits is predicted with the layers that cause it.
    own = (e.metric.stored - (e.metric.inherited or 0.0) for e in errors)
    return sum(own) <= compression.max_loss_increase


def _size(plan: Plan, layers: Mapping[str, LayerFacts], written: Source) -> Size:
    compressible = {layer.keys.weight for layer in plan.layers}
    rest = sum(i.num_bytes for k, i in plan.source.tensors.items() if k not in compressible)
    # Tensors that are not compressible do not count among the compressed bytes.
    kept = {k for k in plan.source.tensors if k not in compressible}
    # Neither do the marks of fused experts, which are for loaders.
    kept |= {key for key in plan.source.fused if key in written.tensors}
    after = written.num_bytes - sum(written.tensors[key].num_bytes for key in kept)
    parameters = sum(info.num_elements for info in plan.source.tensors.values())
    uncounted = {
        layer.keys.key(name)
        for layer in plan.layers
        for name in FORMS[layers[layer.name].storage].uncounted
    }
    counted = (info for key, info in written.tensors.items() if key not in uncounted)
    parameters_after = sum(info.num_elements for info in counted)
    return Size(
        compressible_bytes=BeforeAfter(before=plan.source.num_bytes - rest, after=after),
        checkpoint_bytes=BeforeAfter(before=plan.source.num_bytes, after=written.num_bytes),
        parameters=BeforeAfter(before=parameters, after=parameters_after),
        kept_compressible=after / (plan.source.num_bytes - rest),
        kept_checkpoint=written.num_bytes / plan.source.num_bytes,
        kept_parameters=parameters_after / parameters,
        file_bytes=sum(file.stat().st_size for file in written.files),
    )


def _layer(plan: Plan, written: Source, layer: Layer, facts: LayerFacts) -> LayerRecord:
    keys = [layer.keys.key(name) for name in FORMS[facts.storage].tensors]
    if layer.keys.bias not in plan.source.tensors:
        keys.append(layer.keys.bias)  # the layer has gained it
    return LayerRecord(
        name=layer.name,
        kind=layer.kind,
        tied_to=layer.tied_to,
        shape=layer.shape,
        method=plan.of(layer).solver.name,
        method_reason=plan.of(layer).method_reason,
        bytes_before=layer.num_bytes,
        bytes_after=sum(written.tensors[key].num_bytes for key in keys if key in written.tensors),
        dtype=str(plan.of(layer).dtype).removeprefix("torch."),
        facts=facts,
    )


def _provenance(plan: Plan) -> Provenance:
    sequences = {
        name: DrawnSequences(
            num_sequences=len(drawn),
            num_tokens=drawn.num_tokens,
            population=drawn.population,
            one_in=drawn.one_in,
            sha256=drawn.sha256,
        )
        for name, drawn in plan.sequences.items()
        if name in (CALIBRATION, CERTIFICATION, RECOVER)
    }
    return Provenance(
        lrc_version=__version__,
        code_sha256=report_code_hash(),
        python=sys.version.split()[0],
        packages={name: version(name) for name in PACKAGES},
        platform=platform.machine(),
        device=str(plan.device),
        device_name=torch.cuda.get_device_name(plan.device) if plan.device.type == "cuda" else None,
        activation_dtype=str(plan.network.dtype).removeprefix("torch."),
        seed=plan.config.runtime.seed,
        config_sha256=config_hash(plan.config),
        config=to_yaml(plan.config),
        evaluation=to_dict(plan.config)["evaluation"],
        checkpoint_sha256=plan.source.hashes,
        data_files_sha256=dict(plan.data_hashes),
        sequences=sequences,
        data=data_found(plan),
        left_out=plan.source.left_out,
    )
