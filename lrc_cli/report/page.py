"""A page needs neither network nor scripts: its frame and its parts are made here."""

from collections.abc import Iterable
from importlib.resources import files

from lrc_cli.report.markup import Markup, element, join
from lrc_cli.report.tables import Table
from lrc_cli.text import visible

# The policy makes the promise binding: a browser that honours it fetches nothing for this page.
HEAD = (
    '<meta charset="utf-8">'
    '<meta name="viewport" content="width=device-width, initial-scale=1">'
    '<meta http-equiv="Content-Security-Policy"'
    " content=\"default-src 'none'; style-src 'unsafe-inline'\">"
)


def html_page(title: str, *parts: str) -> str:
    """Returns a page as text: style inline, every name escaped.

    Args:
        title: the title and the heading.
        parts: what stands below the heading; text that is not Markup is escaped.
    """
    style = Markup(files(__package__).joinpath("page.css").read_text(encoding="utf-8"))
    head = element("head", Markup(HEAD), element("title", title), element("style", style))
    body = element("body", element("h1", title), *parts)
    page = f"<!DOCTYPE html>\n{element('html', head, body, lang='en')}\n"
    return visible(page, keep="\n\t")


def section(title: str, *children: str) -> Markup:
    """Returns a section with a heading."""
    return element("section", element("h2", title), *children)


def bullets(lines: Iterable[str]) -> Markup:
    """Returns a list with a bullet for each line."""
    return element("ul", *(element("li", line) for line in lines))


def remark(text: str) -> Markup:
    """Returns a faint paragraph, or nothing where there is no text."""
    return element("p", text, class_="note") if text else Markup()


def html_table(
    table: Table, kind: str | None = None, *, tall: bool = False, alarms: set[int] | None = None
) -> Markup:
    """Returns an HTML table; `alarms` are the rows that stand out."""

    def cells(name: str, row: tuple[str, ...]) -> Markup:
        sides = zip(row, table.align, strict=True)
        return join(*(element(name, cell, class_="r" if s == "r" else None) for cell, s in sides))

    rows = [
        element("tr", cells("td", row), class_="fallback" if index in (alarms or ()) else None)
        for index, row in enumerate(table.rows)
    ]
    head = element("thead", element("tr", cells("th", table.head)))
    written = element("table", head, element("tbody", *rows), class_=kind)
    return element("div", written, class_="scroll tall" if tall else "scroll")
