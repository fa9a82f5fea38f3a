"""The worst-case bound of plain feed-forward networks is put into words here."""

from lrc_cli.report.record import Record
from lrc_cli.text import count, small


def worst_case_note(record: Record) -> str:
    """Returns one labelled sentence; empty for networks that have no such bound."""
    found = record.worst_case
    if found is None:
        return ""
    return (
        f"Worst case, from the product of the layers' norms: on each of the"
        f" {count(found.num_inputs)} {found.inputs} inputs the output changes by at most"
        f" {small(found.bound)} (2-norm); the largest change measured there is"
        f" {small(found.measured)}, the largest output {small(found.output_norm)}."
        " It bounds nothing on other inputs."
    )
