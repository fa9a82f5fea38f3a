"""The model card is README.md of an output directory."""

from typing import Any

import yaml

from lrc_cli.quality.certificate_record import NoCertificate
from lrc_cli.quality.sentences import main_statements
from lrc_cli.report.facts import (
    layers_fell_back,
    limits,
    measured_in,
    missed_gates,
    recovery_note,
    settings,
    summary,
)
from lrc_cli.report.markdown import escaped, fenced, markdown_table
from lrc_cli.report.record import Record
from lrc_cli.report.shortfalls import shortfalls
from lrc_cli.report.tables import (
    gates_table,
    left_dense_table,
    provenance_table,
    quality_table,
    size_table,
    skipped_table,
)
from lrc_cli.report.worst_case import worst_case_note
from lrc_cli.text import count, visible

VERIFYING = (
    "`lrc verify path/to/this/directory --against path/to/the/original` checks these files and"
    " measures errors, quality and certificate again."
)
"""The way to check an output, for its card."""
MAX_FALLBACKS = 20
"""The number of fallen layers that are listed by name."""


def render_card(record: Record) -> str:
    """Returns README.md of the output.

    Args:
        record: the content of report.json.

    Returns:
        Markdown with YAML front matter. Names that come from the checkpoint, the data or the
        config are escaped.
    """
    sections = [
        _front_matter(record),
        f"# {escaped(record.model)}, low-rank compressed\n\n{escaped(summary(record))}",
        *_gates(record),
        *_shortfalls(record),
        _size(record),
        _quality(record),
        _loading(record),
        _layers(record),
        _certificate(record),
        _limits(record),
        f"## Configuration\n\n{fenced('yaml', record.provenance.config)}",
        f"## Versions and hashes\n\n{VERIFYING}\n\n{markdown_table(provenance_table(record))}",
    ]
    return visible("\n\n".join(sections), keep="\n\t") + "\n"


def _front_matter(record: Record) -> str:
    values: dict[str, Any] = {"base_model": record.model}
    if record.architecture is not None:
        values["library_name"] = "transformers"
    values["tags"] = ["lrc", "low-rank", "compression", record.method]
    return f"---\n{yaml.safe_dump(values, sort_keys=False, allow_unicode=True)}---"


def _gates(record: Record) -> list[str]:
    missed = [f"**Gate missed: {escaped(text)}.**" for text in missed_gates(record)]
    return [*missed, f"## Gates\n\n{markdown_table(gates_table(record))}"] if record.gates else []


def _shortfalls(record: Record) -> list[str]:
    lines = [f"- {escaped(line)}" for line in shortfalls(record)]
    return ["## Less than asked\n\n" + "\n".join(lines)] if lines else []


def _size(record: Record) -> str:
    files = count(record.size.file_bytes)
    note = f"The weight files take {files} bytes, headers included."
    return f"## Size\n\n{markdown_table(size_table(record))}\n\n{note}"


def _quality(record: Record) -> str:
    worst = [escaped(note)] if (note := worst_case_note(record)) else []
    trained = [escaped(note)] if (note := recovery_note(record)) else []
    if not record.quality:
        return "\n\n".join(
            [
                "## Quality",
                "Not measured: the configuration names no evaluation data.",
                *worst,
                *trained,
            ]
        )
    measured = [markdown_table(quality_table(record)), escaped(measured_in(record))]
    return "\n\n".join(["## Quality", *measured, *worst, *trained])


def _loading(record: Record) -> str:
    if not record.factorised:
        note = "No layer is factorised: this checkpoint loads like the original, without lrc."
        return f"## Loading\n\n{note}"
    version = record.provenance.lrc_version
    return "\n\n".join(
        [
            "## Loading",
            fenced("python", _loading_lines(record)),
            f"This needs lrc (`lrc_cli`, written with version {escaped(version)}). Without it"
            " loading fails loudly, on purpose: a factorised layer keeps its dense key for a"
            " tensor of another shape, so a loader that does not know the format reports a shape"
            " mismatch. Do not pass `ignore_mismatched_sizes=True` to transformers: it silences"
            " that error and leaves those layers at random values.",
        ]
    )


def _loading_lines(record: Record) -> str:
    model, architecture = settings(record)["model"], record.architecture
    path = '"path/to/this/directory"'
    if architecture is None or model.get("factory"):
        factory = model.get("factory") or "package.module:function"
        return f"import lrc_cli\n\nmodel = lrc_cli.load({path}, factory={_quoted(factory)})"
    if model.get("trust_remote_code") or not architecture.isidentifier():
        return f"import lrc_cli\n\nmodel = lrc_cli.load({path}, trust_remote_code=True)"
    return (
        "import lrc_cli.hf  # lets transformers read the format\n"
        f"from transformers import {architecture}\n"
        f"model = {architecture}.from_pretrained({path})"
    )


def _layers(record: Record) -> str:
    dense = [x for x in record.layers if x.facts.is_dense and not x.facts.fallback]
    parts = ["## Layers that are not factorised", _fallbacks(record)]
    if dense:
        parts += ["Left dense by choice:", markdown_table(left_dense_table(dense))]
    if record.skipped:
        parts += ["Not compressible:", markdown_table(skipped_table(record.skipped))]
    return "\n\n".join(parts)


def _fallbacks(record: Record) -> str:
    fallen = record.fallen_back
    if not fallen:
        return "No layer fell back."
    lines = [
        f"- {escaped(x.name)}: {escaped(x.facts.reason or '')}" for x in fallen[:MAX_FALLBACKS]
    ]
    if len(fallen) > MAX_FALLBACKS:
        lines.append(f"- and {len(fallen) - MAX_FALLBACKS} more, see report.json")
    return f"**{layers_fell_back(record)}:**\n\n" + "\n".join(lines)


def _certificate(record: Record) -> str:
    certificate = record.certificate
    if isinstance(certificate, NoCertificate):
        return f"## Certificate\n\nThere is none: {escaped(certificate.note or '')}."
    data = f"Certification data: sha256 {certificate.data.data_sha256}."
    return "\n\n".join(
        [
            "## Certificate",
            "\n".join(f"- {escaped(line)}" for line in main_statements(certificate)),
            "What this rests on:",
            "\n".join(f"- {escaped(line)}" for line in certificate.assumptions),
            escaped(data),
        ]
    )


def _limits(record: Record) -> str:
    lines = [f"- {escaped(line)}" for line in limits(record)]
    return "## What is not promised\n\n" + "\n".join(lines)


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
