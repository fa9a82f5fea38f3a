"""How much of the data that a config asks for a plan has found."""

from lrc_cli.data.draw import Sequences
from lrc_cli.data.purposes import purposes_of
from lrc_cli.execution.input_checks import ignored_inputs
from lrc_cli.job.plan import Plan
from lrc_cli.report.record import DataFound
from lrc_cli.report.shortfalls import data_shortfalls
from lrc_cli.text import some_of


def data_found(plan: Plan) -> dict[str, DataFound]:
    """Returns what was found of the data, by purpose, also of purposes without a sequence."""
    return {
        purpose.name: _found(purpose.num_sequences, plan.sequences.get(purpose.name))
        for purpose in purposes_of(plan.config)
    }


def _found(asked: int, drawn: Sequences | None) -> DataFound:
    if drawn is None:
        return DataFound(asked=asked, found=0)
    findings, reading = drawn.findings, drawn.findings.reading
    return DataFound(
        asked=asked,
        found=len(drawn),
        repeated=drawn.repeated,
        unread=None if reading is None else reading.unread,
        turns=findings.turns.total,
        dropped_turns=findings.turns.dropped,
        shortened_turns=findings.turns.shortened,
        empty_records=findings.empty_records,
    )


def data_notes(plan: Plan) -> list[str]:
    """Returns a sentence for everything that data lack, or have for nothing."""
    few = [] if plan.reach is None else plan.reach.shortfalls
    return [*data_shortfalls(data_found(plan)), *few, *unused_data(plan)]


def unused_data(plan: Plan) -> list[str]:
    """Returns a sentence for linked folders and for inputs that are there for nothing."""
    return [*_unread_folders(plan), *ignored_inputs(plan.network, plan.sequences)]


def _unread_folders(plan: Plan) -> list[str]:
    """Returns a sentence for every purpose whose folder of data has links to other folders."""
    linked = {name: drawn.findings.linked_folders for name, drawn in plan.sequences.items()}
    return [
        f"{name}: links to folders are not followed: {some_of(links)}; give such a folder itself"
        for name, links in linked.items()
        if links
    ]
