"""Patterns match what Python's own engine matches, in linear time, and say what they cannot."""

import re
import warnings
from pathlib import Path

import pytest

from lrc_cli.config import parse_config
from lrc_cli.config.patterns import MOST_CHARACTERS, PatternError, check_pattern, matches
from lrc_cli.errors import InputError

PACKAGE = Path(__file__).resolve().parents[2] / "lrc_cli"

EXPRESSIONS = r"""
.*\.(up|down)
model\.layers\.(\d+)\.mlp\..*
model\.layers\.(?:[0-9]|1[0-5])\..+
(?:a|ab)(?:c|bcd)
(a|b|)+c?
x*?y+?
a{,3}
a{,}b
a{02}
a{1,2}b
a{}
a{x}
a{1,x}
{
[\w.]+
\w+
\w+é\w*
é
\u00e9
\x61+
\101
\_a
a\.b
.*\Z
\Amodel.*
^a$
(?i)MODEL.*
(?i:b)
(?s).*
(?m)^a$
(?P<x>a)b
[]a]+
[^]a]+
[a[]+
[a[^]+
[[:alpha:]]+
[]]
[\]]
]
a]
[\w-]+
[a\-z]+
[+--]+
\-\#\ 
\d+
[\d]+
[\D]+
[^\w.]+
\W+
\S+
\s+
[\s]+
[\b]
\t
[^\n]+
""".strip("\n").split("\n")
NAMES = """
model.layers.0.mlp.up
model.layers.10.mlp.down_proj
MODEL.x
a
aa
aaa
aaaa
aab
b
ab
abc
abcd
xy
xxyy
_a
a.b
A
é
éa
été_1
漢字
m²
٣
]
[
a]
a[
^
-
+
{
a{}
a{x}
a{1,x}
a{02}
a{,}b
-# 
""".strip("\n").split("\n")
NAMES += [
    "\uff11",
    "",
    " ",
    "\t",
    "\u2003",
    "\x85",
    "\x1c",
    "\x08",
    "\n",
    "a\nb",
    "e\u0301",
    "x" * 300,
]


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_an_expression_matches_what_it_matched(expression: str) -> None:
    with warnings.catch_warnings(action="ignore"):
        expected = [name for name in NAMES if re.fullmatch(expression, name)]
    assert [name for name in NAMES if matches(f"re:{expression}", name)] == expected


def test_the_expressions_tell_names_apart() -> None:
    """No expression of the table would pass if nothing matched anything."""
    found = [name for name in NAMES for x in EXPRESSIONS if matches(f"re:{x}", name)]
    assert len(set(found)) > len(NAMES) - 3


GLOBS = {
    "*": ["model.layers.0.mlp.up", ""],
    "model.*.up": ["model.layers.0.mlp.up"],
    "*.[0-9]*.mlp.*": ["model.layers.0.mlp.up", "model.layers.10.mlp.down_proj"],
    "a?": ["aa", "ab"],
    "[!a]": ["b", "A"],
    "re": [],
}


@pytest.mark.parametrize("glob", GLOBS)
def test_a_glob_fits_the_whole_name_in_its_case(glob: str) -> None:
    assert all(matches(glob, name) for name in GLOBS[glob])
    assert not matches("model", "model.x") and not matches("a*", "A")


REFUSED = {
    r"(?=a)b": "look-around",
    r"(?!a)b": "look-around",
    r"(?<=a)b": "look-around",
    r"(?<!a)b": "look-around",
    r"(a)\1": "back-reference",
    r"(?P<a>x)(?P=a)": "back-reference",
    r"(a)?(?(1)a|b)": "look-around",
    r"a++": "possessive",
    r"(?>a)": "RE2",
    r"(?x) a": "RE2",
    r"(?a)\w": "RE2",
    r"(?#note)a": "RE2",
    r"a{2000}": "repetition size",
    r"((a{1,100}){1,100}){1,100}": "repetition size",
    r"[\W]": r"\W within [...]",
    r"\N{DASH}": "undefined character name",
    r"(": "unterminated subpattern",
    r"[": "unterminated character set",
    r"\p{L}": "bad escape",
    r"*": "nothing to repeat",
    "a" * MOST_CHARACTERS: "more than 10,000 characters",
    "(" * 4000 + ")" * 4000: "",
    "\\" + "x{110000}": "",
    "\\" + "U00110000": "",
}


@pytest.mark.timeout(20)
@pytest.mark.parametrize("expression", REFUSED, ids=lambda x: x[:20])
def test_an_expression_that_cannot_be_matched_is_refused(expression: str) -> None:
    with pytest.raises(PatternError) as caught:
        check_pattern(f"re:{expression}")
    assert REFUSED[expression] in str(caught.value)
    with pytest.raises(PatternError, match="empty"):
        check_pattern("")


MINIMAL = "model: {path: m}\ncalibration: {path: c}\noutput: {path: o}\n"
PLACES = {
    "compression.include.0": "include: ['re:(?=a)b']",
    "compression.exclude.1": "exclude: [a, 're:(?=a)b']",
    "compression.layers": "layers: {'re:(?=a)b': {size: 0.5}}",
}


@pytest.mark.parametrize("key", PLACES)
def test_the_key_of_a_pattern_is_named_with_a_remedy(key: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_config(f"{MINIMAL}compression: {{size: 0.5, {PLACES[key]}}}\n", "demo.yaml")
    (line,) = str(caught.value).splitlines()
    assert line.startswith("demo.yaml:4:") and f" {key}: expected a glob or" in line
    assert "which has no look-around" in line and "use several patterns" in line


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    "pattern",
    [
        "re:(a*)*b",
        "re:(a+)+$b",
        "re:(a|a)*b",
        "re:(a|aa)+" * 1 + "b",
        "re:" + "(a|aa)+" * 50 + "b",
        "re:(.*)(.*)(.*)(.*)(.*)(.*)(.*)(.*)(.*)b",
        "re:" + "a?" * 500 + "a" * 500 + "b",
        "re:((((a*)*)*)*)*b",
        "*a" * 50 + "b",
        "a*" * 1000 + "b",
    ],
)
def test_patterns_that_backtrack_end_at_once(pattern: str) -> None:
    assert not matches(pattern, "a" * 5000)


def test_no_other_place_matches_a_pattern_that_is_not_in_the_code() -> None:
    """`re` is called with a literal, or with a name of a module's own literal in capitals."""
    # Constraints has `Matches`, whose expressions stand in the schema.
    allowed = {"config/patterns.py", "config/constraints.py"}
    functions = "compile|fullmatch|match|search|sub|split|findall|finditer"
    call = re.compile(rf"\bre\.(?:{functions})\((\s*\S+)")
    for file in PACKAGE.rglob("*.py"):
        if file.relative_to(PACKAGE).as_posix() in allowed:
            continue
        text = file.read_text(encoding="utf-8")
        assert "fnmatch" not in text and "re2" not in text.split(), file
        for argument in call.findall(text):
            assert re.match(r"\s*([brf]{0,2}[\"']|_?[A-Z]{3})", argument), (file, argument)
