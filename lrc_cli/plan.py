"""What a config will do: every check that needs no forward pass, and the two fingerprints."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from lrc_cli import __version__
from lrc_cli.calibration import Purpose, Sequences, draw
from lrc_cli.checkpoint.headers import read_json
from lrc_cli.checkpoint.manifest import MANIFEST_NAME
from lrc_cli.checkpoint.source import Source, hash_file, open_source
from lrc_cli.checkpoint.writer import canonical_json, check_writable, tidy
from lrc_cli.config import Calibration, Certification, Config, config_hash, matches, to_dict
from lrc_cli.engine import SOLVERS, Solver
from lrc_cli.errors import InputError
from lrc_cli.models import (
    Layer,
    Network,
    Skipped,
    check_inputs,
    find_layers,
    make_network,
    open_module,
    resolve_device,
)

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
CALIBRATION, CERTIFICATION = "calibration", "certification"
HELD_BACK = "held back"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A checked job, ready to run."""

    config: Config
    source: Source
    network: Network
    """The dense network; on the CPU its parameters are views of the files."""
    tokenizer: Any
    layers: list[Layer]
    skipped: list[Skipped]
    solvers: Mapping[str, Solver]
    """By layer name."""
    sequences: dict[str, Sequences]
    """Blocks by purpose: "calibration", "certification" and the names of the evaluation texts."""
    statistics_fingerprint: dict[str, Any]
    factors_fingerprint: str
    work_dir: Path
    output: Path
    """The directory to write."""

    @property
    def units(self) -> dict[str, list[Layer]]:
        """Layers by unit, in the network's order."""
        units: dict[str, list[Layer]] = {}
        for layer in self.layers:
            units.setdefault(layer.unit, []).append(layer)
        return units

    @property
    def device(self) -> torch.device:
        """Where everything is computed."""
        return self.network.device

    def stored_dtype(self, layer: Layer) -> torch.dtype:
        """What the layer's factors are written in."""
        return DTYPES.get(self.config.output.dtype, layer.dtype)

    @property
    def compressible_bytes(self) -> int:
        """Bytes of the layers' dense weights in the source."""
        return sum(layer.num_bytes for layer in self.layers)

    @property
    def evaluation_names(self) -> list[str]:
        """Names of the texts quality is measured on, in order."""
        return [name for name in self.sequences if name not in (CALIBRATION, CERTIFICATION)]


def make_plan(config: Config, *, force: bool = False) -> Plan:
    """Open the checkpoint and the data and check everything that a forward pass is not needed for.

    Raises:
        InputError: whatever is wrong, with the remedy.
    """
    output = Path(config.output.path)
    source = open_source(Path(config.model.path))
    check_output(output, source, force=force)
    source.check_finite()
    module = open_module(
        source, factory=config.model.factory, trust_remote_code=config.model.trust_remote_code
    )
    layers, skipped = find_layers(module, source, config.compression)
    check_layers(config, layers)
    tokenizer = open_tokenizer(source)
    sequences = draw(purposes_of(config), tokenizer=tokenizer, seed=config.calibration.seed)
    if CALIBRATION not in sequences:
        raise InputError(
            "calibration: the data has not one whole sequence in its part",
            "give more data, widen the part, or lower sequence_length",
        )
    check_sequences(sequences, module, source)
    solvers = {
        layer.name: SOLVERS[
            config.compression.override(layer.name).method or config.compression.method
        ]
        for layer in layers
    }
    device = resolve_device(config.runtime.device)
    statistics = _statistics_fingerprint(config, source, sequences, solvers, device)
    identity = hashlib.sha256(canonical_json(statistics).encode()).hexdigest()
    work_dir = config.runtime.work_dir
    return Plan(
        config=config,
        source=source,
        network=make_network(module, device=device, dtype=DTYPES.get(config.runtime.dtype)),
        tokenizer=tokenizer,
        layers=layers,
        skipped=skipped,
        solvers=solvers,
        sequences=sequences,
        statistics_fingerprint=statistics,
        factors_fingerprint=_factors_fingerprint(config, identity),
        work_dir=Path(work_dir)
        if work_dir
        else output.absolute().parent / ".lrc-work" / identity[:16],
        output=output,
    )


def check_output(output: Path, source: Source, *, force: bool) -> None:
    """Raise InputError unless the output may be made, or replaced with `force`."""
    tidy(output)
    check_writable(output)
    if output.resolve() == source.path.resolve():
        raise InputError(
            f"{output}: output.path is the checkpoint itself", "choose another output.path"
        )
    if not output.exists():
        return
    if not force:
        raise InputError(
            f"{output}: the output exists", "give --force to replace it, or another output.path"
        )
    if not (output / MANIFEST_NAME).exists():
        raise InputError(
            f"{output}: exists and was not written by lrc", "choose another output.path"
        )


def already_done(config: Config) -> bool:
    """Whether the output is there and is what the config asks for."""
    output = Path(config.output.path)
    tidy(output)
    report = output / "report.json"
    if not report.exists() or not (output / MANIFEST_NAME).exists():
        return False
    provenance = read_json(report).get("provenance", {})
    source = open_source(Path(config.model.path))
    wanted = (config_hash(config), to_dict(config)["evaluation"], source.hashes, __version__)
    keys = ("config_sha256", "evaluation", "checkpoint_sha256", "lrc_version")
    if any(provenance.get(key) != value for key, value in zip(keys, wanted, strict=True)):
        return False
    data: dict[str, str] = provenance.get("data_files_sha256", {})
    return bool(data) and data == data_hashes(config)


def data_hashes(config: Config) -> dict[str, str]:
    """sha256 of every data file that the config names, by path as written."""
    paths = {purpose.path for purpose in purposes_of(config)}
    return {str(path): hash_file(path) for path in sorted(paths) if path.is_file()}


def check_layers(config: Config, layers: list[Layer]) -> None:
    """Raise InputError if nothing is left to compress, or the allocation cannot compare methods."""
    if not layers:
        raise InputError(
            "compression: no layer is selected",
            "see `lrc inspect`, and check compression.include and exclude",
        )
    compression = config.compression
    methods = {compression.override(layer.name).method or compression.method for layer in layers}
    if len(methods) > 1 and compression.allocation == "global":
        raise InputError(
            "compression.allocation: global compares errors in one unit, and"
            f" {' and '.join(sorted(methods))} have different ones",
            "set allocation: relative or uniform",
        )
    unused = [p for p in compression.layers if not any(matches(p, layer.name) for layer in layers)]
    if unused:
        raise InputError(
            f"compression.layers: {unused[0]!r} matches no selected layer", "see `lrc inspect`"
        )


def open_tokenizer(source: Source) -> Any:
    """The checkpoint's own tokenizer, or None where it has none."""
    if source.config is None:
        return None
    names = (
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.txt",
        "tokenizer.model",
        "vocab.json",
    )
    if not any((source.path / name).exists() for name in names):
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source.path)
    except (OSError, ValueError, TypeError, KeyError) as error:
        cause = str(error).splitlines()[0]
        raise InputError(
            f"{source.path}: the tokenizer cannot be opened ({cause})", "restore its files"
        ) from error


def purposes_of(config: Config) -> list[Purpose]:
    """What blocks the config asks for, in the order in which purposes take them."""
    calibration = config.calibration
    purposes = [_purpose(CALIBRATION, calibration, calibration)]
    if config.certification is not None:
        purposes.append(_purpose(CERTIFICATION, config.certification, calibration))
    if config.evaluation is None:
        held_back = Purpose(
            name=HELD_BACK,
            path=Path(calibration.path),
            sequence_length=calibration.sequence_length,
            num_sequences=64,
            required=False,
            text_field=calibration.text_field,
        )
        return [*purposes, held_back]
    return [*purposes, *(_purpose(text.name, text, calibration) for text in config.evaluation)]


def _purpose(name: str, section: Any, calibration: Calibration) -> Purpose:
    own_field = calibration.text_field if isinstance(section, Certification) else section.text_field
    return Purpose(
        name=name,
        path=Path(section.path or calibration.path),
        part=section.part or (0.0, 1.0),
        sequence_length=section.sequence_length or calibration.sequence_length,
        num_sequences=section.num_sequences,
        required=not section.num_sequences_is_default,
        text_field=own_field,
    )


def check_sequences(sequences: dict[str, Sequences], module: nn.Module, source: Source) -> None:
    """Raise InputError if the module cannot take the blocks of some purpose."""
    longest = (source.config or {}).get("max_position_embeddings")
    embeddings = module.get_input_embeddings() if isinstance(module, PreTrainedModel) else None
    known = getattr(embeddings, "num_embeddings", None)
    for name, blocks in sequences.items():
        check_inputs(module, name, blocks.inputs)
        ids = blocks.inputs.get("input_ids")
        if ids is None:
            continue
        if longest is not None and ids.ndim == 2 and ids.shape[1] > longest:
            raise InputError(
                f"{name}: sequence_length {ids.shape[1]} exceeds the model's {longest} positions",
                f"set it to {longest} or less",
            )
        if known is not None and int(ids.max()) >= known:
            raise InputError(
                f"{name}: token {int(ids.max())} is not one of the {known} that the model knows",
                "give the checkpoint its own tokenizer",
            )


def _statistics_fingerprint(
    config: Config,
    source: Source,
    sequences: dict[str, Sequences],
    solvers: Mapping[str, Solver],
    device: torch.device,
) -> dict[str, Any]:
    compression = config.compression
    return {
        "checkpoint": source.hashes,
        "calibration data": sequences[CALIBRATION].sha256,
        "methods": {name: solver.name for name, solver in solvers.items()},
        "loss": compression.loss,
        "center": compression.center,
        "seed": config.runtime.seed,
        "dtype": config.runtime.dtype,
        "device": device.type,
        "factory": config.model.factory,
        "lrc version": __version__,
    }


def _factors_fingerprint(config: Config, statistics: str) -> str:
    resolved = to_dict(config)
    # As a list: the order of `layers` counts, the last pattern that matches wins.
    layers = list(resolved["compression"].pop("layers").items())
    fields = [
        statistics,
        resolved["compression"],
        layers,
        resolved["output"]["dtype"],
        resolved["recover"],
    ]
    return hashlib.sha256(canonical_json(fields).encode()).hexdigest()[:16]
