"""Assemble report.json: the one record that the card, the page and scripts are made from."""

import platform
import sys
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import torch

from lrc_cli import __version__
from lrc_cli.checkpoint.source import Source
from lrc_cli.config import config_hash, to_dict, to_yaml
from lrc_cli.data.purposes import CALIBRATION, CERTIFICATION
from lrc_cli.job.fingerprints import data_hashes, report_code_hash
from lrc_cli.job.plan import Plan

SCHEMA_VERSION = 1
PACKAGES = ("torch", "transformers", "safetensors")


def build_report(
    plan: Plan,
    *,
    layers: Mapping[str, dict[str, Any]],
    loss: dict[str, Any] | None,
    sequential: dict[str, Any],
    written: Source,
    quality: list[dict[str, Any]],
    certificate: dict[str, Any],
    worst_case: dict[str, Any] | None,
    seconds: Mapping[str, float],
    memory: Mapping[str, int],
) -> dict[str, Any]:
    """The report as plain values.

    Args:
        layers: the facts of every layer, by name (see `fit.fit_layer`).
        loss: the loss whose gradients were measured; None where no method needs them.
        sequential: whether layers were fitted to the compressed network's inputs, and why.
        written: the output, opened.
        quality: one row per evaluation text.
        certificate: of `guarantee.certify`.
        worst_case: of `feedforward.worst_case`; None for other networks.
        seconds: wall time by phase.
        memory: peak bytes.
    """
    compression = plan.config.compression
    target, value = compression.target
    size = _size(plan, written)
    return {
        "schema_version": SCHEMA_VERSION,
        "model": plan.source.path.name,
        "architecture": next(iter((plan.source.config or {}).get("architectures") or ()), None),
        "method": compression.method,
        "loss": loss,
        "target": {
            "name": target,
            "value": value,
            "of": compression.size_of if target == "size" else None,
            "met": _target_met(plan, layers, size),
        },
        "allocation": compression.allocation,
        "sequential": _what_became_of(sequential, layers),
        "size": size,
        "quality": quality,
        "layers": [_layer(plan, written, layer, layers[layer.name]) for layer in plan.layers],
        "skipped": [
            {
                "name": skipped.name,
                "reason": skipped.reason,
                "bytes": skipped.num_bytes,
                "share": skipped.num_bytes / plan.source.num_bytes,
            }
            for skipped in plan.skipped
        ],
        "copies": plan.source.copies,
        "fused": {key: fused.record() for key, fused in plan.source.fused.items()},
        "certificate": certificate,
        "worst_case": worst_case,
        "timing": {name: round(value, 3) for name, value in seconds.items()},
        "memory": dict(memory),
        "provenance": _provenance(plan),
    }


def _what_became_of(
    sequential: dict[str, Any], layers: Mapping[str, dict[str, Any]]
) -> dict[str, Any]:
    """The decision to fit sequentially, as it turned out."""
    if not sequential["used"] or any(x.get("sequential") is True for x in layers.values()):
        return sequential
    reason = f"{sequential['reason']}, and each of them was fitted plainly in the end"
    return {"used": False, "reason": reason, "held_back": 0}


def _target_met(plan: Plan, layers: Mapping[str, dict[str, Any]], size: Mapping[str, Any]) -> bool:
    """Whether what was written meets the target; a layer that fell back may have spoilt it."""
    compression = plan.config.compression
    errors = [facts["errors"] for facts in layers.values() if "errors" in facts]
    if compression.size is not None:
        return bool(size[f"kept_{compression.size_of}"] <= compression.size)
    if compression.max_layer_error is not None:
        return all(e["output"]["stored"] <= compression.max_layer_error for e in errors)
    if compression.threshold is not None:
        return not any(facts["fallback"] for facts in layers.values())
    assert compression.max_loss_increase is not None
    # What a sequential fit inherits is predicted with the layers that it comes from.
    own = (e["metric"]["stored"] - e["metric"].get("inherited", 0.0) for e in errors)
    return sum(own) <= compression.max_loss_increase


def _size(plan: Plan, written: Source) -> dict[str, Any]:
    compressible = {layer.keys.weight for layer in plan.layers}
    rest = sum(i.num_bytes for k, i in plan.source.tensors.items() if k not in compressible)
    # Tensors that are not compressible keep their bytes unless output.dtype converts them.
    kept = {k for k in plan.source.tensors if k not in compressible}
    # So do marks, which are for loaders.
    kept |= {key for key in plan.source.fused if key in written.tensors}
    after = written.num_bytes - sum(written.tensors[key].num_bytes for key in kept)
    parameters = sum(info.num_elements for info in plan.source.tensors.values())
    parameters_after = sum(
        i.num_elements for k, i in written.tensors.items() if not k.endswith(".perm")
    )
    return {
        "compressible_bytes": {"before": plan.source.num_bytes - rest, "after": after},
        "checkpoint_bytes": {"before": plan.source.num_bytes, "after": written.num_bytes},
        "parameters": {"before": parameters, "after": parameters_after},
        "kept_compressible": after / (plan.source.num_bytes - rest),
        "kept_checkpoint": written.num_bytes / plan.source.num_bytes,
        "kept_parameters": parameters_after / parameters,
        "file_bytes": sum(file.stat().st_size for file in written.files),
    }


def _layer(plan: Plan, written: Source, layer: Any, facts: dict[str, Any]) -> dict[str, Any]:
    keys = [*layer.keys.factors.values()]
    if layer.keys.bias not in plan.source.tensors:
        keys.append(layer.keys.bias)  # the layer has gained it
    return {
        "name": layer.name,
        "kind": layer.kind,
        "tied_to": layer.tied_to,
        "shape": list(layer.shape),
        "method": plan.of(layer).solver.name,
        "method_reason": plan.of(layer).method_reason,
        "bytes_before": layer.num_bytes,
        "bytes_after": sum(
            written.tensors[key].num_bytes for key in keys if key in written.tensors
        ),
        "dtype": str(plan.of(layer).dtype).removeprefix("torch."),
        **facts,
    }


def _provenance(plan: Plan) -> dict[str, Any]:
    sequences = {
        name: {
            "num_sequences": len(blocks),
            "num_tokens": blocks.num_tokens,
            "population": blocks.population,
            "sha256": blocks.sha256,
        }
        for name, blocks in plan.sequences.items()
        if name in (CALIBRATION, CERTIFICATION)
    }
    return {
        "lrc_version": __version__,
        "code_sha256": report_code_hash(),
        "python": sys.version.split()[0],
        "packages": {name: version(name) for name in PACKAGES},
        "platform": platform.machine(),
        "device": str(plan.device),
        "device_name": torch.cuda.get_device_name(plan.device)
        if plan.device.type == "cuda"
        else None,
        "activation_dtype": str(plan.network.dtype).removeprefix("torch."),
        "seed": plan.config.runtime.seed,
        "config_sha256": config_hash(plan.config),
        "config": to_yaml(plan.config),
        "evaluation": to_dict(plan.config)["evaluation"],
        "checkpoint_sha256": plan.source.hashes,
        "data_files_sha256": data_hashes(plan.config),
        "sequences": sequences,
    }
