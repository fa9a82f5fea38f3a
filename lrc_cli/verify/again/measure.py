"""With the original at hand, what was measured is measured again on the same data."""

from pathlib import Path

from lrc_cli.errors import InputError
from lrc_cli.runtime.progress import Progress
from lrc_cli.verify.again.layers import measure_layers
from lrc_cli.verify.again.networks import open_run
from lrc_cli.verify.again.quality import check_certificate_values, check_quality
from lrc_cli.verify.again.recovery import check_recovery
from lrc_cli.verify.again.worst_case import check_worst_case
from lrc_cli.verify.files.written import Written
from lrc_cli.verify.original.unchanged import (
    check_factory,
    check_original,
    check_state_dict,
    open_original,
)
from lrc_cli.verify.statements import Findings

MEASURED = {
    "c1": "the layers' errors on the calibration data",
    "quality": "the quality on the evaluation data",
    "recovery": "what training the factors gave on the sequences held out",
    "c2": "the certificate's values on the certification data",
}
"""The statements that need both networks, by the first part of their ids."""


def not_measured(
    written: Written, findings: Findings, reason: str, *, by_design: bool = False
) -> None:
    """Notes one unchecked statement for each group of statements that needs the original."""
    what = "the original's hashes and the tensors that are unchanged"
    findings.not_checked("original", what, reason, by_design=by_design)
    _not_run(written, findings, reason, by_design=by_design)


def _not_run(written: Written, findings: Findings, reason: str, *, by_design: bool = False) -> None:
    trained = written.report is not None and written.report.get("recovery") is not None
    for id, what in MEASURED.items():
        if id != "recovery" or trained:
            findings.not_checked(id, what, reason, by_design=by_design)
    if written.report is not None and written.report.get("worst_case") is not None:
        what = "the worst-case bound"
        findings.not_checked("c3.worst_case", what, reason, by_design=by_design)


def check_against(
    written: Written,
    against: Path,
    *,
    data: Path | None,
    factory: str | None,
    trust_remote_code: bool,
    state_dict: str | None,
    findings: Findings,
    progress: Progress,
) -> None:
    """Checks levels two and three: the original's hashes and tensors, then C1, C3, quality and C2.

    Raises:
        InputError: the original or `data` cannot be opened, or a factory is missing.
    """
    if written.report is None or written.config is None:
        not_measured(written, findings, "report.json or lrc.yaml cannot be read")
        return
    original = open_original(against, factory, written.config.model, state_dict)
    run = None
    what = "the output can be compared with the original"
    with (
        progress.phase("original", 1),
        findings.guard("original", what, passing=(InputError,)),
    ):
        check_state_dict(written, state_dict, findings)
        if not check_original(written, original, findings):
            _not_run(written, findings, "--against is not the checkpoint that was compressed")
            return
        check_factory(written, factory, findings)
        run = open_run(written, original, data, factory, trust_remote_code, findings, progress)
    if run is None:
        _not_run(written, findings, "the two networks do not match")
        return
    with findings.guard("c1", "the layers' errors can be measured"):
        measure_layers(run)
    check_worst_case(run)
    with findings.guard("quality", "the quality can be measured"):
        check_quality(run)
    with findings.guard("recovery", "what training gave can be measured"):
        check_recovery(run)
    with findings.guard("c2", "the certificate can be measured"):
        check_certificate_values(run)
