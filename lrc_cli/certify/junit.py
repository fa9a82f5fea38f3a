"""The certificate of a copy is written as JUnit XML for CI systems."""

from pathlib import Path

from lrc_cli.certify.record import CopyRecord
from lrc_cli.quality.certificate_record import CERTIFIED
from lrc_cli.report.facts import gate_missed
from lrc_cli.report.junit import Case, render_suite, write_junit_text


def render_copy_junit(record: CopyRecord) -> str:
    """Returns a test suite with a case for each gate, each statement and each flag.

    A statement that could not be certified is skipped, and so is a flag: only gates fail.
    """
    cases = [
        Case(
            group="gates",
            name=f"{gate.name} <= {gate.limit:g}",
            failure=None if gate.met else gate_missed(gate),
        )
        for gate in record.gates
    ]
    cases += [
        Case(
            group="certificate",
            name=statement.id,
            skipped=None if statement.status == CERTIFIED else statement.text,
        )
        for statement in record.certificate.statements
    ]
    cases += [
        Case(group="flags", name=f"{flag.kind}: {flag.tensor}", skipped=flag.text)
        for flag in record.weights.flags
    ]
    return render_suite(cases)


def write_copy_junit(path: Path, record: CopyRecord) -> None:
    """Writes `render_copy_junit` whole or not at all.

    Raises:
        RunError: something that lrc did not write has appeared under the name.
    """
    write_junit_text(path, render_copy_junit(record))
