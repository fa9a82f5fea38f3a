"""YAML text becomes a tree of values that know their positions; `--set` changes such a tree."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, TypeAlias

import yaml

from lrc_cli.errors import InputError, Problems
from lrc_cli.reading import DIGITS

Scalar: TypeAlias = str | int | float | bool | None

_TAG = "tag:yaml.org,2002:"
_TEXT_TAGS = {_TAG + name for name in ("str", "timestamp", "value", "merge")}
_TYPED_TAGS = {_TAG + name for name in ("null", "bool", "int", "float")}
# YAML 1.1 takes such numbers for texts; YAML 1.2 and every person take them for numbers.
_EXPONENT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")
_MAX_SHOWN = 10

CONFIG_BYTES = 500_000
"""The most bytes of a config. PyYAML reads as much in five seconds."""
MOST_ENTRIES = 10_000
"""The most entries of one list or mapping."""
MOST_KEYS = 100
"""The most keys on the way to a value of `--set`, and the most digits of the index of an item."""
_MOST_IN_NUMBER = 1000
"""The most characters of a number, null or truth value."""


@dataclass(frozen=True, order=True)
class Position:
    """A line and a column, from 1, in a named text; line 0: the text has no positions."""

    line: int
    column: int
    name: str

    def __str__(self) -> str:
        return f"{self.name}:{self.line}:{self.column}" if self.line else self.name


class Broken:
    """A mark in place of a value on which a problem has been reported already."""


@dataclass(frozen=True)
class Node:
    """A value with its position and the position of its key."""

    value: "Value"
    at: Position
    key_at: Position


Value: TypeAlias = Scalar | dict[str, Node] | list[Node] | Broken


@dataclass(frozen=True, order=True)
class Problem:
    """One line of an error: position, key and what is allowed."""

    at: Position
    key: str
    message: str

    def __str__(self) -> str:
        return ": ".join(str(part) for part in (self.at, self.key, self.message) if part)


def fail(problems: Sequence[Problem]) -> InputError:
    """The error that lists the problems in the order of the file, at most the first ten."""
    lines = [str(problem) for problem in sorted(problems)]
    if len(lines) > _MAX_SHOWN:
        lines = [*lines[:_MAX_SHOWN], f"and {len(lines) - _MAX_SHOWN} more"]
    return Problems(lines)


def join(path: str, key: str | int) -> str:
    """The dotted path of a key."""
    return f"{path}.{key}" if path else str(key)


def parse(text: str, name: str, problems: list[Problem]) -> Node | None:
    """The tree of a YAML document; None if the document is empty.

    Duplicate keys, tags and aliases that contain themselves are added to `problems`.

    Raises:
        InputError: the text is not YAML.
    """
    return _Builder(name, numbered=True, problems=problems).parse(text, "")


@lru_cache(maxsize=8)
def plain_values(text: str, name: str) -> Any:
    """The value of a YAML text as dicts, lists and scalars, which are not to be changed.

    Aliases are shared objects. Nothing is merged, so that no text stands for more than its own
    size.

    Raises:
        InputError: the text is no YAML that `parse` reads without a problem.
    """
    problems: list[Problem] = []
    root = parse(text, name, problems)
    if problems:
        raise fail(problems)
    return None if root is None else _plain(root, {})


def _plain(node: Node, done: dict[int, Any]) -> Any:
    value = node.value
    if not isinstance(value, dict | list):
        return value
    if id(value) not in done:
        done[id(value)] = (
            {key: _plain(child, done) for key, child in value.items()}
            if isinstance(value, dict)
            else [_plain(child, done) for child in value]
        )
    return done[id(value)]


def set_value(root: Node, assignment: str, problems: list[Problem]) -> Node:
    """The tree with `KEY.SUB=VALUE` applied. VALUE is YAML, and a list item's key is its index.

    Raises:
        InputError: there is no "=", a key on the way is not a mapping, or VALUE is not YAML.
    """
    path, equals, text = assignment.partition("=")
    path = path.strip()
    place = Position(0, 0, f"--set {path}")
    if path.count(".") > MOST_KEYS:
        raise fail([Problem(place, "", f"names more than {MOST_KEYS} keys; check the key")])
    if not equals or not all(path.split(".")):
        raise fail([Problem(place, "", "expected KEY=VALUE, such as compression.size=0.8")])
    node = _Builder(place.name, numbered=False, problems=problems).parse(text, path)
    leaf = node or Node(None, place, place)
    return _put(root, _keys(path, leaf), leaf, place)


def put_value(root: Node, path: str, value: Any, name: str) -> Node:
    """The tree with a plain value, or a list of plain values, at a dotted path.

    Args:
        name: stands for the value's place in messages, such as the option that gave it.
    """
    at = Position(0, 0, name)
    made = [Node(item, at, at) for item in value] if isinstance(value, list | tuple) else value
    return _put(root, path.split("."), Node(made, at, at), at)


def _keys(path: str, leaf: Node) -> list[str]:
    """The keys of a dotted path. A layer pattern has dots of its own."""
    *start, rest = path.split(".", 2)
    if start != ["compression", "layers"]:
        return path.split(".")
    pattern, dot, key = rest.rpartition(".")
    is_whole = isinstance(leaf.value, dict) or not dot
    return [*start, rest] if is_whole else [*start, pattern, key]


def _put(node: Node, keys: list[str], leaf: Node, place: Position) -> Node:
    """A copy of the tree with the leaf at the keys; missing mappings are made."""
    if not keys:
        return leaf
    first, *rest = keys
    value = {} if node.value is None else node.value
    if isinstance(value, dict):
        child = value.get(first, Node(None, place, place))
        return replace(node, value=value | {first: _put(child, rest, leaf, place)})
    is_index = first.isdecimal() and len(first) <= MOST_KEYS
    if isinstance(value, list) and is_index and int(first) < len(value):
        items = list(value)
        items[int(first)] = _put(items[int(first)], rest, leaf, place)
        return replace(node, value=items)
    what = "the list has no such item" if isinstance(value, list) else "not a mapping"
    raise fail([Problem(place, "", f"{what}; nothing can be set at {first!r}")])


class _Builder:
    """The builder of our tree from the nodes of one YAML text."""

    def __init__(self, name: str, *, numbered: bool, problems: list[Problem]) -> None:
        self.name = name
        self.numbered = numbered
        self.problems = problems
        self.open: set[int] = set()
        self.done: dict[int, Node] = {}

    def parse(self, text: str, path: str) -> Node | None:
        """The tree; None for an empty text. `path` is the place of the tree in the config."""
        if len(text) > CONFIG_BYTES:
            message = f"has {len(text):,} characters, and at most {CONFIG_BYTES:,} are read"
            raise fail([Problem(self.position(0, 0), "", f"{message}; check that it is a config")])
        try:
            node = yaml.compose(text, Loader=yaml.SafeLoader)
            return None if node is None else self.convert(node, path)
        except yaml.MarkedYAMLError as error:
            raise fail([self.syntax_problem(error)]) from error
        except yaml.reader.ReaderError as error:
            before = text[: error.position]
            line, column = before.count("\n"), len(before) - before.rfind("\n") - 1
            message = f"not valid YAML: the character U+{error.character:04X} is not allowed"
            raise fail([Problem(self.position(line, column), "", message)]) from error
        except (ValueError, OverflowError) as error:  # of numbers in escapes and directives
            raise fail([Problem(self.position(0, 0), "", f"not valid YAML: {error}")]) from error
        except RecursionError as error:
            raise fail([Problem(self.position(0, 0), "", "nested too deeply")]) from error

    def position(self, line: int, column: int) -> Position:
        """The position of a line and a column that are counted from 0."""
        if not self.numbered:
            return Position(0, 0, self.name)
        return Position(line + 1, column + 1, self.name)

    def syntax_problem(self, error: yaml.MarkedYAMLError) -> Problem:
        mark = error.problem_mark or error.context_mark
        at = self.position(mark.line, mark.column) if mark else self.position(0, 0)
        reason = ", ".join(part for part in (error.context, error.problem) if part)
        if "'\\t'" in reason:
            reason = "a tab cannot indent; use spaces"
        return Problem(at, "", f"not valid YAML: {reason}")

    def convert(self, node: yaml.Node, path: str, key_at: Position | None = None) -> Node:
        """Our node of a YAML node. An anchored node that is met again is built once."""
        at = self.position(node.start_mark.line, node.start_mark.column)
        if id(node) in self.open:
            broken = self.broken(at, path, "contains itself; write the value out")
            return Node(broken, at, key_at or at)
        if id(node) not in self.done:
            self.open.add(id(node))
            self.done[id(node)] = Node(self.value(node, path, at), at, at)
            self.open.remove(id(node))
        return replace(self.done[id(node)], key_at=key_at or at)

    def broken(self, at: Position, path: str, message: str) -> Broken:
        self.problems.append(Problem(at, path, message))
        return Broken()

    def value(self, node: yaml.Node, path: str, at: Position) -> Value:
        if not isinstance(node, yaml.ScalarNode) and len(node.value) > MOST_ENTRIES:
            message = f"has {len(node.value):,} entries, and at most {MOST_ENTRIES:,} are read"
            return self.broken(at, path, message)
        if isinstance(node, yaml.MappingNode) and node.tag == _TAG + "map":
            return self.mapping(node, path)
        if isinstance(node, yaml.SequenceNode) and node.tag == _TAG + "seq":
            return [self.convert(item, join(path, i)) for i, item in enumerate(node.value)]
        if isinstance(node, yaml.ScalarNode) and node.tag in _TEXT_TAGS | _TYPED_TAGS:
            return self.scalar(node, path, at)
        return self.broken(at, path, f"the tag {node.tag!r} is not allowed; remove it")

    def mapping(self, node: yaml.MappingNode, path: str) -> dict[str, Node]:
        children: dict[str, Node] = {}
        for key, value in node.value:
            at = self.position(key.start_mark.line, key.start_mark.column)
            if not isinstance(key, yaml.ScalarNode):
                self.problems.append(Problem(at, path, "a key must be a text"))
                continue
            if not _is_utf8(key.value):
                self.problems.append(Problem(at, path, f"a key {_HALF}"))
                continue
            child_path = join(path, key.value)
            if key.value in children:
                first = children[key.value].key_at
                message = f"duplicate key, first given at {first}; remove one"
                self.problems.append(Problem(at, child_path, message))
            else:
                children[key.value] = self.convert(value, child_path, at)
        return children

    def scalar(self, node: yaml.ScalarNode, path: str, at: Position) -> Value:
        text: str = node.value
        if not _is_utf8(text):
            return self.broken(at, path, _HALF)
        if node.tag in _TEXT_TAGS:
            plain_number = node.style is None and _EXPONENT.fullmatch(text)
            return float(text) if plain_number else text
        if len(text) > _MOST_IN_NUMBER:  # PyYAML takes quadratic time for some
            return self.broken(at, path, f"{text[:40]!r}... cannot be read as a value")
        try:
            value: Scalar = yaml.constructor.SafeConstructor().construct_object(node)
        except Exception:  # PyYAML raises whatever its own code stumbles over
            return self.broken(at, path, f"{text[:40]!r} cannot be read as a value")
        if isinstance(value, int) and abs(value) >= 10**DIGITS:
            return self.broken(at, path, f"{text[:40]!r}... has more than {DIGITS} digits")
        return value


_HALF = "holds half of a character, which no UTF-8 file can hold; write the character itself"


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
