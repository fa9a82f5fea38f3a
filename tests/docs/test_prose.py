"""The mechanical rules for prose: the rest of the rules takes a reader."""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PARTS = ("README.md", "SECURITY.md", "docs", "lrc_cli", "scripts", "tests")
"""The files and folders that keep the rules, with every source and page in them."""

BANNED = re.compile(
    r"\b(?:that\s+of|those|the\s+ones?(?!-)|has\s+it\s+too|whatever\s+theirs\s+is)\b", re.IGNORECASE
)
"""Pronouns whose meaning a reader must look for. Quoted phrases do not count."""
NO_SUBJECT = re.compile(r"(?:Of|By)\b")
"""Words that a docstring or comment must not begin with: they hide its subject."""
QUOTED = re.compile(r"```.*?```|`[^`]*`", re.DOTALL)


def files(part: str, *suffixes: str) -> list[Path]:
    path = ROOT / part
    found = sorted(path.rglob("*")) if path.is_dir() else [path]
    return [file for file in found if file.suffix in suffixes]


def docstrings(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """The line and the text of every string that is a statement of its own."""
    for node in ast.walk(tree):
        match node:
            case ast.Expr(value=ast.Constant(value=str(text))):
                yield node.lineno, text


def comments(source: str) -> Iterator[tuple[int, str]]:
    """The line and the text of every comment, of one line each."""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string.lstrip("# ")


def prose(file: Path) -> list[tuple[int, str]]:
    """The texts of a file that people read, with the line on which each begins."""
    source = file.read_text("utf-8")
    if file.suffix == ".md":
        return [(1, source)]
    return [*docstrings(ast.parse(source)), *comments(source)]


def offences(file: Path) -> Iterator[str]:
    """What breaks the rules in a file, with the line."""
    for line, text in prose(file):
        own = QUOTED.sub(lambda quoted: re.sub(r"[^\n]", " ", quoted[0]), text)
        for found in BANNED.finditer(own):
            yield f"{file}:{line + own.count(chr(10), 0, found.start())}: {found[0]!r}"
        if file.suffix == ".py" and NO_SUBJECT.match(text.lstrip()):
            yield f"{file}:{line}: begins with {text.split()[0]!r}"


PROSE = '''"""Of a layer: its rank."""

# By name, the layers.
x = 1  # the norm is that of `those`, as
"""Said twice
of those."""
'''


def test_the_rules_find_what_breaks_them(tmp_path: Path) -> None:
    file = tmp_path / "prose.py"
    file.write_text(PROSE, encoding="utf-8")
    assert sorted(offence.removeprefix(f"{file}:") for offence in offences(file)) == [
        "1: begins with 'Of'",
        "3: begins with 'By'",
        "4: 'that of'",
        "6: 'those'",
    ]


@pytest.mark.parametrize("part", PARTS)
def test_no_docstring_comment_or_page_has_a_banned_phrase(part: str) -> None:
    read = files(part, ".py", ".md")
    found = [offence for file in read for offence in offences(file)]
    assert read, f"there is nothing in {part}"
    assert not found, "\n".join(found)


@pytest.mark.parametrize("part", ["lrc_cli", "scripts", "tests"])
def test_every_module_begins_with_a_sentence_of_one_line(part: str) -> None:
    for file in files(part, ".py"):
        docstring = ast.get_docstring(ast.parse(file.read_text("utf-8")))
        assert docstring, f"{file} has no docstring"
        assert docstring.partition("\n")[0].endswith((".", ":")), f"{file}: {docstring[:100]!r}"
