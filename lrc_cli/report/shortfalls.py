"""What a run got less of than was asked for becomes sentences here, for terminal and pages."""

from collections.abc import Iterator, Mapping

from lrc_cli.report.record import DataFound, Record
from lrc_cli.text import count, percent, some_of

NOTABLE = 0.01
"""From this share on, it is said how much of a text the tokens do not stand for."""


def shortfalls(record: Record) -> list[str]:
    """Returns what the output rests on less of than was asked for, or lacks of the original."""
    left_out: dict[str, list[str]] = {}
    for name, why in record.provenance.left_out.items():
        left_out.setdefault(why, []).append(name)
    lines = [f"Left out of the output, {why}: {some_of(x)}." for why, x in sorted(left_out.items())]
    return [f"{line}." for line in data_shortfalls(record.provenance.data)] + lines


def data_shortfalls(data: Mapping[str, DataFound]) -> list[str]:
    """Returns a sentence, without its full stop, for everything that data lacks.

    Args:
        data: what was found of the data, by purpose. Purposes that lack the same share a sentence.
    """
    purposes: dict[str, list[str]] = {}
    for purpose, found in data.items():
        for sentence in _sentences(found):
            purposes.setdefault(sentence, []).append(purpose)
    return [f"{', '.join(names)}: {sentence}" for sentence, names in purposes.items()]


def _sentences(found: DataFound) -> Iterator[str]:
    if not found.found:
        yield "skipped, no sequence is left: give more data, or widen the part"
        return
    if found.found < found.asked:
        yield (
            f"{count(found.found)} sequences, not {count(found.asked)}, because no more are left:"
            " give more data, widen the part, or lower sequence_length"
        )
    if found.repeated:
        yield (
            f"{count(found.repeated)} of {count(found.found)} sequences equal another sequence:"
            " leave repeated texts or files out"
        )
    if found.unread is not None and found.unread >= NOTABLE:
        yield (
            f"no token, or only the unknown one, stands for {percent(found.unread)} of the text's"
            " characters: check that tokenizer and text belong together"
        )
    if found.dropped_turns or found.shortened_turns:
        yield (
            f"the chat template leaves out {count(found.dropped_turns)} of {count(found.turns)}"
            f" turns, and a part of {count(found.shortened_turns)}"
        )
    if found.empty_records:
        yield f"{count(found.empty_records)} records hold no text"
