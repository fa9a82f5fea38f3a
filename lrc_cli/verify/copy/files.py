"""These checks need the certificate's files only: each figure follows from others, word by word."""

import dataclasses
from pathlib import Path
from typing import Any

from lrc_cli import __version__
from lrc_cli.certify.pages import RENDERED
from lrc_cli.certify.record import CONFIG, DIRECTION, CopyRecord, read_record
from lrc_cli.certify.sentences import arithmetic_sentences
from lrc_cli.config import CertifyConfig, certify_yaml, parse_certify
from lrc_cli.data.kinds import member
from lrc_cli.quality.certificate_record import CERTIFIED, Certificate, NoCertificate
from lrc_cli.quality.sentences import assumptions, statement_text
from lrc_cli.reading import JSON_BYTES, read_bytes
from lrc_cli.verify.files.certificate import SELECTED, check_listed_values, statement_problem
from lrc_cli.verify.statements import Findings

SELECTION = "selection"
FLAG_KINDS = frozenset(
    {"missing", "extra", "renamed", "shape", "not finite", "constant", "repeated", "permuted",
     "another layer", "changed", "far", "scale", "grid"}
)  # fmt: skip
"""The kinds of flags that a certificate may have."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class WrittenCopy:
    """Holds a certificate as it was read."""

    directory: Path
    record: CopyRecord
    config: CertifyConfig


def open_copy(directory: Path, findings: Findings) -> WrittenCopy | None:
    """Reads certificate.json and the config in it; None, with a failed statement, if it cannot."""
    with findings.guard("certificate.form", "certificate.json can be read"):
        record = read_record(directory)
        config = parse_certify(record.config, f"{directory}: config")
        findings.judge("certificate.form", "certificate.json can be read", None)
        return WrittenCopy(directory=directory, record=record, config=config)
    return None


def check_copy_files(written: WrittenCopy, findings: Findings) -> None:
    """Checks all that follows from the certificate alone."""
    _check_config(written, findings)
    _check_header(written, findings)
    _check_certificate(written, findings)
    _check_rest(written, findings)
    _check_pages(written, findings)


def _check_config(written: WrittenCopy, findings: Findings) -> None:
    record, config = written.record, written.config
    same = certify_yaml(config) == record.config
    what = "the config is written as lrc writes it"
    findings.judge("config.form", what, None if same else "it is not")
    with findings.guard("config.form", f"{CONFIG} can be read"):
        text = read_bytes(written.directory / CONFIG, JSON_BYTES).decode()
        what = f"{CONFIG} is the config in the certificate"
        findings.judge("config.form", what, None if text == record.config else "the two differ")
    names = [record.original.name, record.other.name]
    wanted = [Path(x.path).name for x in (config.original, config.other)]
    findings.equal("config.names", "both checkpoints are named as in the config", names, wanted)


def _check_header(written: WrittenCopy, findings: Findings) -> None:
    """Unit, population and sampling are the config's."""
    certificate, config = written.record.certificate, written.config
    if isinstance(certificate, NoCertificate):
        return
    data, path = certificate.data, Path(config.data.path)
    unit, size = member(path), data.population.size
    length = config.data.sequence_length if unit == "block" else None
    first, last = config.data.part or (0.0, 1.0)
    part = "" if (first, last) == (0.0, 1.0) else f" (part {first:g} to {last:g})"
    many = f"{unit}s" if length is None else f"blocks of {length} tokens"
    whole = f"the {size:,} {many} of {path.name}{part} that {SELECTION} left free"
    passages = data.population.description.startswith(f"the {size:,} {many} of one passage in ")
    stated = {
        "confidence": certificate.confidence,
        "quantile": certificate.quantile,
        "unit": data.unit,
        "sequence_length": data.sequence_length,
        "sampling": data.sampling,
        "file": [data.population.file, list(data.population.part)],
        "description": data.population.description,
        "selection": [data.selection.purpose, data.selection.num_sequences <= SELECTED],
        "activations": data.activation_dtype,
        "not_covered": data.not_covered,
        "rest": [certificate.note, dict(certificate.tolerances), certificate.values.layers],
    }
    found = {
        "confidence": config.confidence,
        "quantile": config.quantile,
        "unit": unit if length is None else f"sequence of {length} tokens",
        "sequence_length": length,
        "sampling": "uniformly at random without replacement",
        "file": [path.name, [first, last]],
        # The number of passages is checked where the data is at hand.
        "description": data.population.description if passages else whole,
        "selection": [SELECTION, True],
        "activations": written.record.arithmetic.activation_dtype,
        "not_covered": (),
        "rest": [None, {}, None],
    }
    what = "the certificate's header agrees with the config"
    findings.equal("certificate.header", what, stated, found)


def _check_certificate(written: WrittenCopy, findings: Findings) -> None:
    certificate = written.record.certificate
    if isinstance(certificate, NoCertificate):
        return
    plain: dict[str, Any] = certificate.to_json()
    bare = dataclasses.replace(certificate, statements=(), assumptions=())
    with findings.guard("certificate.values", "the listed values can be read"):
        check_listed_values(plain, findings)
    for statement, found in zip(certificate.statements, plain["statements"], strict=True):
        what = f"the statement {statement.id} follows from the values"
        with findings.guard("certificate.statement", what):
            findings.judge("certificate.statement", what, statement_problem(found, plain))
        what = f"the sentence of {statement.id} says what its figures say"
        with findings.guard("certificate.sentence", what):
            same = statement.text == statement_text(statement, bare, DIRECTION)
            findings.judge("certificate.sentence", what, None if same else "it does not")
    same = certificate.assumptions == assumptions(bare)
    what = "the assumptions are the assumptions of such a certificate"
    findings.judge("certificate.sentence", what, None if same else "they are not")
    _check_worst(written.record, certificate, findings)


def _check_worst(record: CopyRecord, certificate: Certificate, findings: Findings) -> None:
    stated = [(x.quantity, x.value, x.index) for x in record.worst]
    found = []
    for quantity, values in certificate.values.quantities.items():
        index = max(range(len(values)), key=lambda i: (values[i], -i))
        found.append((quantity, values[index], index))
    findings.equal(
        "certificate.worst", "the worst sequences are the values' largest", stated, found
    )


def _check_rest(written: WrittenCopy, findings: Findings) -> None:
    record = written.record
    arithmetic = record.arithmetic
    wanted = arithmetic_sentences(arithmetic.device, arithmetic.activation_dtype, record.other.form)
    what = "the arithmetic is described by its sentences"
    findings.equal("arithmetic", what, arithmetic.sentences, wanted)
    kinds = sorted({flag.kind for flag in record.weights.flags} - FLAG_KINDS)
    problem = f"not so: {', '.join(kinds)[:80]}" if kinds else None
    findings.judge("flags.kinds", "every flag is of a known kind", problem)
    _check_gates(written, findings)


def _check_gates(written: WrittenCopy, findings: Findings) -> None:
    """Each limit of the config is judged by the bound with its name."""
    record = written.record
    bounds: dict[str, float | None] = {"max_flags": len(record.weights.flags)}
    for statement in record.certificate.statements:
        is_certified = statement.status == CERTIFIED
        name = f"max_{statement.quantity}_{statement.kind}"
        bounds[name] = statement.bound if is_certified else None
    limits = {k: x for k, x in dataclasses.asdict(written.config.gates).items() if x is not None}
    found = []
    for name, limit in limits.items():
        bound = bounds.get(name)
        found.append((name, float(limit), bound, bound is not None and bound <= limit))
    stated = [(gate.name, float(gate.limit), gate.measured, gate.met) for gate in record.gates]
    what = "every gate of the config is judged by its bound"
    findings.equal("gates", what, sorted(stated), sorted(found))


def _check_pages(written: WrittenCopy, findings: Findings) -> None:
    """Section, page and badge say what certificate.json says, word by word."""
    for name, render in RENDERED.items():
        what = f"{name} is what certificate.json renders to"
        with findings.guard("pages", what):
            if written.record.lrc_version != __version__:
                reason = (
                    f"PAGES OF ANOTHER VERSION: this is lrc {__version__}, so that the page may say"
                    " anything"
                )
                findings.not_checked("pages", what, reason)
                continue
            found = read_bytes(written.directory / name, JSON_BYTES)
            same = found == render(written.record).encode()
            findings.judge("pages", what, None if same else "the two differ")
