"""A finished output lies beside its original here, with what `lrc verify` finds in it."""

from pathlib import Path

from lrc_cli.verify import verify_directory
from lrc_cli.verify.levels import Verified


class Made:
    """Holds a finished output with its original."""

    def __init__(self, output: Path, original: Path) -> None:
        self.output, self.original = output, original
        self.pin = verify_directory(output).manifest_sha256


def failed(found: Verified) -> list[str]:
    """Returns the ids of what fails, with why."""
    return [f"{s.id}: {s.what}: {s.detail}" for s in found.findings.with_status("fails")]


def unchecked(found: Verified) -> set[str]:
    """Returns the ids of what was not checked."""
    return {s.id for s in found.findings.with_status("not checked")}
