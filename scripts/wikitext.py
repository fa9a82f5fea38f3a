"""Plain prose from a MediaWiki dump: each article without markup, tables and references."""

import re
import xml.etree.ElementTree as ElementTree
from bz2 import BZ2File
from collections.abc import Iterator
from typing import BinaryIO

import mwparserfromhell
from mwparserfromhell import nodes
from mwparserfromhell.wikicode import Wikicode

NAMESPACE = "{http://www.mediawiki.org/xml/export-0.10/}"
DROPPED_TAGS = {"ref", "references", "table", "gallery", "math", "timeline", "code", "source"}
DROPPED_TAGS |= {"imagemap", "syntaxhighlight", "hiero", "score", "sup"}
DROPPED_LINKS = re.compile(r"\s*(file|image|category)\s*:", re.IGNORECASE)
# Templates whose arguments are part of the sentence, and which of them are shown.
SHOWN_ARGUMENTS = {"convert": ("1", "2"), "cvt": ("1", "2"), "lang": ("2",), "nowrap": ("1",)}
BACK_MATTER = re.compile(
    r"^=+\s*(see also|references?|notes|footnotes|citations|sources|external links|further reading"
    r"|bibliography|works cited)\b[^\n]*=+\s*$",
    re.IGNORECASE | re.MULTILINE,
)
# A table that the parser could not close stays text: its rows begin with the table's own marks.
TABLE_LEFTOVER = re.compile(r"[|!]|\{\|")
LIST_TITLE = re.compile(r"\(disambiguation\)|^List of ")
SHOWN_NAMES = {"ndash": "\u2013", "mdash": "\u2014", "snd": " \u2013 ", "spaced ndash": " \u2013 "}
MIN_CHARACTERS = 2000


def articles(dump: BinaryIO | BZ2File) -> Iterator[str]:
    """Yield the prose of each article of an XML dump, in the dump's order.

    Redirects, pages outside the article namespace, disambiguation pages and articles whose prose is
    shorter than `MIN_CHARACTERS` are left out. An article is a run of lines without a blank one.
    """
    for _, page in ElementTree.iterparse(dump):
        if page.tag != f"{NAMESPACE}page":
            continue
        markup = page.findtext(f"{NAMESPACE}revision/{NAMESPACE}text") or ""
        if is_article(page, markup):
            text = prose(markup)
            if len(text) >= MIN_CHARACTERS:
                yield text
        page.clear()


def is_article(page: ElementTree.Element, markup: str) -> bool:
    """Whether a `<page>` is an article: main namespace, no redirect, no list."""
    main = page.findtext(f"{NAMESPACE}ns") == "0"
    redirect = page.find(f"{NAMESPACE}redirect") is not None
    disambiguation = re.search(r"\{\{\s*(disambig|geodis|hndis)", markup, re.IGNORECASE)
    title = page.findtext(f"{NAMESPACE}title") or ""
    return main and not redirect and not disambiguation and not LIST_TITLE.search(title)


def prose(markup: str) -> str:
    """The sentences of one article, one paragraph a line, back matter cut off."""
    back = BACK_MATTER.search(markup)
    body = markup[: back.start()] if back else markup
    text = shown(mwparserfromhell.parse(body))
    text = re.sub(r"\(([;,\s]+)", "(", text).replace("()", "")
    text = re.sub(r"[ \t\u00a0]+", " ", text)
    text = re.sub(r" ([,.;:)])", r"\1", text)
    lines = (line.strip() for line in text.splitlines())
    return "\n".join(line for line in lines if line and not TABLE_LEFTOVER.match(line))


def shown(code: Wikicode | None) -> str:
    """The text that a reader sees of parsed markup."""
    return "" if code is None else "".join(map(shown_node, code.nodes))


def shown_node(node: nodes.Node) -> str:
    """The text that a reader sees of one node; empty where the node is not prose."""
    match node:
        case nodes.Text():
            return str(node.value)
        case nodes.HTMLEntity():
            return str(node.normalize())
        case nodes.Heading():
            return f"\n{shown(node.title)}\n"
        case nodes.Wikilink():
            return "" if DROPPED_LINKS.match(str(node.title)) else shown(node.text or node.title)
        case nodes.ExternalLink():
            return shown(node.title)
        case nodes.Template():
            return shown_template(node)
        case nodes.Tag():
            return "" if str(node.tag).lower() in DROPPED_TAGS else shown(node.contents)
    return ""


def shown_template(template: nodes.Template) -> str:
    """The shown arguments of the few templates that carry words of the sentence."""
    name = str(template.name).strip().lower()
    if name in SHOWN_NAMES:
        return SHOWN_NAMES[name]
    wanted = SHOWN_ARGUMENTS.get(name, ())
    values = (template.get(key).value for key in wanted if template.has(key))
    return " ".join(shown(value).strip() for value in values)
