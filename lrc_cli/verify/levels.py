"""Verification has three levels, in order: the files alone, then the original, then the data."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lrc_cli.certify.record import CERTIFICATE
from lrc_cli.errors import InputError
from lrc_cli.runtime.progress import Progress
from lrc_cli.verify.again.measure import check_against, not_measured
from lrc_cli.verify.copy.again import check_copy_against
from lrc_cli.verify.copy.files import check_copy_files, open_copy
from lrc_cli.verify.files.certificate import check_certificate
from lrc_cli.verify.files.figures import check_figures, check_pages
from lrc_cli.verify.files.manifest import check_hex, check_manifest, check_pin, open_manifest
from lrc_cli.verify.files.weights import check_weights
from lrc_cli.verify.files.written import open_written
from lrc_cli.verify.statements import Findings


@dataclass(frozen=True, kw_only=True)
class Verified:
    """Holds what a verification came to."""

    findings: Findings
    manifest_sha256: str
    """The hash of manifest.json as it is, which pins every byte of the output."""

    def as_dict(self) -> dict[str, Any]:
        """Returns the result for JSON."""
        return {
            "manifest_sha256": self.manifest_sha256,
            "failed": self.findings.failed,
            "left_open": len(self.findings.left_open),
            "statements": [statement.as_dict() for statement in self.findings.statements],
        }


def verify_directory(
    directory: Path,
    *,
    against: Path | None = None,
    other: Path | None = None,
    data: Path | None = None,
    manifest_sha256: str | None = None,
    factory: str | None = None,
    trust_remote_code: bool = False,
    state_dict: str | None = None,
    progress: Progress | None = None,
) -> Verified:
    """Checks every statement that can be checked with what is given.

    Args:
        directory: an output of `lrc compress`, or a certificate of `lrc certify`.
        against: the original checkpoint; None: only the files are checked.
        other: the copy that a certificate is about.
        data: a data file of the run that is not where the config says; it is known by its hash.
        manifest_sha256: what sha256 of manifest.json should be, in hexadecimal.
        factory: builds the module of checkpoints that are not transformers'.
        trust_remote_code: whether code that comes with the checkpoints may run.
        state_dict: the original's state dict in a file with several; None: as lrc.yaml says.

    Raises:
        InputError: the directory is no finished output, or an argument cannot be used.
    """
    progress = progress or Progress(quiet=True)
    findings = Findings()
    check_hex(manifest_sha256)
    if state_dict is not None and against is None:
        cause = "--state-dict names a part of the original, and no --against is given"
        raise InputError(cause, "give the original with --against")
    manifest = open_manifest(directory)
    if (directory / CERTIFICATE).is_file():
        given = against, other, data
        pin = _verify_copy(
            directory,
            manifest,
            given,
            manifest_sha256,
            findings=findings,
            progress=progress,
            factory=factory,
            trust_remote_code=trust_remote_code,
        )
        return Verified(findings=findings, manifest_sha256=pin)
    if other is not None:
        cause = f"--other is for certificates, and {directory} has no {CERTIFICATE}"
        raise InputError(cause, "give the directory that `lrc certify` printed")
    with progress.phase("files", 1):
        pin = check_pin(directory, manifest_sha256, findings)
        check_manifest(directory, manifest, findings)
        written = open_written(directory, findings)
        check_weights(written, findings)
        check_figures(written, findings)
        check_certificate(written, findings)
        check_pages(written, findings)
    if against is None:
        not_measured(written, findings, "no --against was given", by_design=True)
    else:
        check_against(
            written,
            against,
            data=data,
            factory=factory,
            trust_remote_code=trust_remote_code,
            state_dict=state_dict,
            findings=findings,
            progress=progress,
        )
    return Verified(findings=findings, manifest_sha256=pin)


def _verify_copy(
    directory: Path,
    manifest: dict[str, Any],
    given: tuple[Path | None, Path | None, Path | None],
    manifest_sha256: str | None,
    *,
    findings: Findings,
    progress: Progress,
    **options: Any,
) -> str:
    """Checks the certificate of a copy, and returns the hash of its manifest.

    Args:
        given: the original, the copy and the data, as far as they are given.
        options: how modules are built, as in `verify_directory`.
    """
    against, other, data = given
    if (against is None) != (other is None):
        cause = "a certificate is about two checkpoints, and one of them is given"
        raise InputError(cause, "give the original with --against and the copy with --other")
    with progress.phase("files", 1):
        pin = check_pin(directory, manifest_sha256, findings)
        check_manifest(directory, manifest, findings)
        written = open_copy(directory, findings)
        if written is None:
            return pin
        check_copy_files(written, findings)
    if against is None or other is None:
        for id in ("checkpoints", "weights", "values"):
            reason = "no --against and no --other were given"
            findings.not_checked(id, f"the {id}", reason, by_design=True)
    else:
        check_copy_against(
            written, against, other, data=data, findings=findings, progress=progress, **options
        )
    return pin
