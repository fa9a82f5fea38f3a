"""Markdown is made here, with names and messages escaped."""

import re

from lrc_cli.report.tables import Table


def markdown_table(table: Table) -> str:
    """Returns a table as Markdown."""
    rules = ["---:" if side == "r" else "---" for side in table.align]
    rows = [[escaped(cell) for cell in row] for row in (table.head, *table.rows)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (rows[0], rules, *rows[1:]))


def fenced(language: str, text: str) -> str:
    """Returns a block of code, fenced by more backticks than the text has."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def escaped(text: str) -> str:
    """Returns one line of text that Markdown shows as it is."""
    marked = re.sub(r"([\\`*\[\]|])", r"\\\1", " ".join(text.split()))
    entities = re.sub(r"&(?=[#\w])", "&amp;", marked)
    return re.sub(r"<(?=[A-Za-z/!?])", "&lt;", entities)
