"""Fingerprints tell which earlier statistics, factors and outputs a job may use again.

Whatever can change a number counts: weights, tokenizers, code, data, dtypes and versions.
"""

import hashlib
from collections.abc import Mapping
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lrc_cli import __version__
from lrc_cli.checkpoint.manifest import MANIFEST_NAME, matches_manifest
from lrc_cli.checkpoint.output_directory import resolve_output, tidy
from lrc_cli.checkpoint.source import Source, open_source
from lrc_cli.config import Config, config_hash, parse_config, to_dict
from lrc_cli.data.draw import Sequences
from lrc_cli.engine import Solver
from lrc_cli.errors import InputError
from lrc_cli.execution.network import Network
from lrc_cli.job.calibration_rows import with_number
from lrc_cli.network.factories import source_file
from lrc_cli.reading import read_json
from lrc_cli.runtime.files import canonical_json, hash_file, hash_path

PACKAGE = Path(__file__).parents[1]
NUMBERS = (
    "forms",
    "engine",
    "config",
    "runtime",
    "checkpoint",
    "network",
    "data",
    "execution",
    "job",
    "report/record.py",
)
"""The folders and files of the package whose code can change a number of a work directory.

`config` is one of them: it decides which layers a pattern covers, and what an override sets. So is
the file of `LayerFacts`, which units of the work directory hold and which say what is written.
"""
FIGURES = ("quality",)
"""The folders that can change a figure of a report, but nothing in a work directory."""
NO_NUMBERS = (
    *("errors.py", "text.py", "reading.py", "report", "certify", "verify", "forecast", "commands"),
    *("cli.py", "hf.py", "__init__.py", "__main__.py"),
)
"""Everything else. Its code estimates, checks, prints, reads arguments or gives an address.

A file of such a folder may be listed above all the same.
"""


def statistics_fingerprint(
    config: Config,
    source: Source,
    calibration: Sequences,
    solvers: Mapping[str, Solver],
    network: Network,
    tokenizer: Any,
) -> dict[str, Any]:
    """Returns what the Gram matrices and the spectra depend on, by names for people."""
    compression = config.compression
    return {
        "checkpoint": source.hashes,
        "calibration data": calibration.sha256,
        "mask token": getattr(tokenizer, "mask_token_id", None),
        "methods": {name: solver.name for name, solver in solvers.items()},
        "loss": compression.loss,
        "center": compression.center,
        "seed": config.runtime.seed,
        "dtype": str(network.dtype).removeprefix("torch."),
        "device": network.device.type,
        "factory": factory_hashes(config),
        "trust_remote_code": config.model.trust_remote_code,
        "state dict": config.model.state_dict,
        "lrc version": __version__,
        "lrc code": code_hash(),
        "torch version": version("torch"),
        "transformers version": version("transformers"),
    }


@cache
def code_hash(parts: tuple[str, ...] = NUMBERS, root: Path = PACKAGE) -> str:
    """Returns the sha256 of the package's sources in some of its folders and files.

    The version alone does not do: a copy may differ from its release.

    Args:
        parts: folders and files of the package, relative to its own folder.
        root: the package's own folder.
    """
    files = sorted({file for part in parts for file in sources_of(root / part)})
    return digest({file.relative_to(root).as_posix(): hash_file(file) for file in files})


def sources_of(part: Path) -> list[Path]:
    """Returns the sources in a folder, or the file itself.

    Raises:
        FileNotFoundError: there is no source, so nothing would be counted.
    """
    found = sorted(part.rglob("*.py")) if part.is_dir() else [part]
    if not found or not found[0].is_file():
        raise FileNotFoundError(f"{part}: there are no sources")
    return found


def report_code_hash() -> str:
    """Returns the sha256 of the sources that can change a number of an output or its report."""
    return code_hash((*NUMBERS, *FIGURES))


def digest(value: Any) -> str:
    """Returns the sha256 of a value's canonical JSON, in hexadecimal."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def factors_fingerprint(config: Config, statistics: str) -> str:
    """Returns the digest of what the factors depend on: the statistics and the rest of the config.

    Args:
        statistics: the digest of the statistics' fingerprint.
    """
    resolved = to_dict(config)
    # A list keeps the order of `layers`, which counts: the last pattern that matches wins.
    layers = list(resolved["compression"].pop("layers").items())
    fields = [
        statistics,
        resolved["compression"],
        layers,
        resolved["output"]["dtype"],
    ]
    return digest(fields)[:16]


def already_done(config: Config) -> bool:
    """Returns whether the output is there, is whole, and is what the config asks for.

    Raises:
        InputError: the checkpoint, the factory or the output's JSON cannot be read.
        RunError: another run is writing the output.
    """
    output = resolve_output(config.output.path)
    tidy(output)
    report = output / "report.json"
    if not report.is_file() or not (output / MANIFEST_NAME).is_file():
        return False
    provenance = read_json(report).get("provenance", {})
    wanted = {
        "config_sha256": config_hash(_as_drawn(config, provenance)),
        "evaluation": to_dict(config)["evaluation"],
        "lrc_version": __version__,
        "code_sha256": report_code_hash(),
    }
    if any(provenance.get(key) != value for key, value in wanted.items()):
        return False
    # Hashing comes last: it reads every file.
    source = open_source(Path(config.model.path), state_dict=config.model.state_dict)
    return (
        provenance.get("data_files_sha256") == data_hashes(config)
        and provenance.get("checkpoint_sha256") == source.hashes
        and matches_manifest(output)
    )


def _as_drawn(config: Config, provenance: Mapping[str, Any]) -> Config:
    """Returns the config with the default number of sequences that an earlier run chose for it."""
    try:
        written = parse_config(provenance["config"], "lrc.yaml").calibration
    except (InputError, KeyError, TypeError, AttributeError):
        return config
    if not config.calibration.num_sequences_is_default or written.num_sequences_is_default:
        return config
    return with_number(config, written.num_sequences)


def data_hashes(config: Config) -> dict[str, str]:
    """Returns the sha256 of every data file or folder and of the factory's code, by name."""
    recover = config.recover if config.recover.is_used else None
    texts = (config.calibration, config.certification, recover, *(config.evaluation or ()))
    paths = {text.path for text in texts if text is not None and text.path is not None}
    data = {path: hash_path(Path(path)) for path in sorted(paths) if Path(path).exists()}
    return {**data, **factory_hashes(config)}


def factory_hashes(config: Config) -> dict[str, str]:
    """Returns the sha256 of the file that defines the factory, by the factory's name.

    Imports of the file are not followed. The result is empty where the config names no factory.
    """
    if config.model.factory is None:
        return {}
    file = source_file(config.model.factory)
    return {config.model.factory: hash_file(file) if file else "built in"}
