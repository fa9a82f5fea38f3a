"""The reader turns a tree of positioned values into dataclasses, by their annotations alone."""

import dataclasses
import difflib
import math
import re
import types
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from lrc_cli.config.built import BUILT
from lrc_cli.config.constraints import FieldError, LayerPattern
from lrc_cli.config.sections import Config
from lrc_cli.config.tree import Broken, Node, Position, Problem, Scalar, join

Whole = TypeVar("Whole")

_BAD: Any = object()
_NAMES = {
    type(None): "null",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
}


def is_union(hint: Any) -> bool:
    """Whether the annotation is `A | B`, in one of Python's two spellings."""
    return get_origin(hint) in (Union, types.UnionType)


def is_section(hint: Any) -> bool:
    """Whether the annotation is a dataclass, read from a mapping."""
    return isinstance(hint, type) and dataclasses.is_dataclass(hint)


@cache
def keys(section: type) -> dict[str, tuple[dataclasses.Field[Any], Any]]:
    """The keys of a section: its fields with their annotations, without the hidden ones."""
    hints = get_type_hints(section, include_extras=True)
    fields = [f for f in dataclasses.fields(section) if not f.metadata.get("hidden")]
    return {f.name: (f, hints[f.name]) for f in fields}


def is_required(field: dataclasses.Field[Any]) -> bool:
    """Whether a field has no default."""
    missing = dataclasses.MISSING
    return field.default is missing and field.default_factory is missing


def describe(hint: Any) -> str:
    """The values that an annotation allows, in words."""
    if get_origin(hint) is Annotated:
        base, *constraints = get_args(hint)
        words = describe(base)
        for constraint in constraints:
            words = constraint.describe(words)
        return words
    if is_union(hint):
        options = [describe(option) for option in get_args(hint) if option is not type(None)]
        words = " or ".join(options)
        return words if len(options) == len(get_args(hint)) else f"{words}, or null"
    if get_origin(hint) is Literal:
        return _words(get_args(hint))
    if get_origin(hint) is tuple:
        return f"a list, each item {describe(get_args(hint)[0])}"
    return _NAMES.get(hint, "a mapping")


def show(value: Any) -> str:
    """A value as the user wrote it, shortened."""
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list):
        items = [item.value for item in value]
        words = f"[{', '.join(show(item) for item in items if isinstance(item, Scalar))}]"
        is_short = len(words) <= 60 and all(isinstance(item, Scalar) for item in items)
        return words if is_short else "a list"
    if isinstance(value, str):
        return repr(value if len(value) <= 60 else value[:57] + "...")
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return str(value)[:60]


def read(root: Node, problems: list[Problem], whole: type[Whole]) -> Whole | None:
    """The config of a tree, or None with at least one more entry in `problems`.

    Args:
        whole: the dataclass of the whole config.
    """
    config = Reader(problems, whole).value(root, whole, "", "a mapping")
    return config if isinstance(config, whole) else None


class Reader:
    """The reader of nodes by annotation, which gathers every problem.

    Args:
        problems: gains an entry for each problem.
        whole: the dataclass of the whole config, whose keys are suggested for unknown keys.
    """

    def __init__(self, problems: list[Problem], whole: type = Config) -> None:
        self.problems, self.whole = problems, whole

    def report(self, at: Position, path: str, message: str) -> Any:
        """Add a problem. The result stands for a value that could not be read."""
        self.problems.append(Problem(at, path, message))
        return _BAD

    def section(self, node: Node, section: type, path: str) -> Any:
        """An instance of a dataclass from a mapping. null means a section with all defaults."""
        children = {} if node.value is None else node.value
        if not isinstance(children, dict):
            return self.report(node.at, path, f"expected a mapping, got {show(children)}")
        known = keys(section)
        for key in children.keys() - known.keys():
            message = f"unknown key; {_nearest_key(key, known, self.whole)}"
            self.report(children[key].key_at, join(path, key), message)
        values = {name: self.entry(node, children, section, name, path) for name in known}
        if _BAD in values.values():
            return _BAD
        values = {name: value for name, value in values.items() if value is not dataclasses.MISSING}
        for name, (field, _) in known.items():
            if "derived" in field.metadata and name not in values:
                values[name] = field.metadata["derived"](values)
        for flag in _flags(section):
            values[flag] = flag.removesuffix("_is_default") not in children
        try:
            return section(**values)
        except FieldError as error:
            at = _find(node, error.key).at if error.key else node.key_at
            return self.report(at, join(path, error.key) if error.key else path, error.message)

    def entry(
        self, node: Node, children: Mapping[str, Node], section: type, name: str, path: str
    ) -> Any:
        """The value of one key of a section; MISSING where the default is meant."""
        field, hint = keys(section)[name]
        path = join(path, name)
        built = BUILT.get(f"{section.__name__}.{name}")
        if name in children:
            child = children[name]
            value = self.value(child, hint, path, _words(built) if built else describe(hint))
            if built and value is not _BAD and value not in built:
                message = f"{show(child.value)} is not in this version; allowed: {_words(built)}"
                return self.report(child.at, path, message)
            return value
        if not is_required(field):
            return dataclasses.MISSING
        if is_section(hint):
            return self.section(Node(None, node.key_at, node.key_at), hint, path)
        return self.report(node.key_at, path, f"missing key; expected {describe(hint)}")

    def value(self, node: Node, hint: Any, path: str, expected: str) -> Any:
        """A value of any annotation; `expected` describes everything that is allowed."""
        if isinstance(node.value, Broken):
            return _BAD
        origin = get_origin(hint)
        if origin is Annotated:
            base, *constraints = get_args(hint)
            value = self.value(node, base, path, expected)
            if value is _BAD or all(constraint.accepts(value) for constraint in constraints):
                return value
            return self.mismatch(node, hint, path, expected)
        if is_union(hint):
            return self.union(node, hint, path, expected)
        if is_section(hint):
            return self.section(node, hint, path)
        if origin is tuple:
            return self.items(node, get_args(hint), path, expected)
        if isinstance(origin, type) and issubclass(origin, Mapping):
            return self.mapping(node, get_args(hint), path)
        raw: Any = node.value
        if not _has_type(raw, hint):
            return self.mismatch(node, hint, path, expected)
        return float(raw) if hint is float else raw

    def union(self, node: Node, hint: Any, path: str, expected: str) -> Any:
        """The first option that fits; the messages inside a lone container are kept."""
        if node.value is None and type(None) in get_args(hint):
            return None
        options = [option for option in get_args(hint) if option is not type(None)]
        if len(options) == 1:
            return self.value(node, options[0], path, expected)
        for option in options:
            value = Reader([], self.whole).value(node, option, path, expected)
            if value is not _BAD:
                return value
        return self.mismatch(node, hint, path, expected)

    def items(self, node: Node, types_: tuple[Any, ...], path: str, expected: str) -> Any:
        """A tuple from a list, of any length for `tuple[T, ...]`."""
        is_open = types_[-1] is Ellipsis
        if not isinstance(node.value, list) or not (is_open or len(node.value) == len(types_)):
            return self.mismatch(node, tuple, path, expected)
        hints = types_[:1] * len(node.value) if is_open else types_
        values = tuple(
            self.value(item, hint, join(path, i), describe(hint))
            for i, (item, hint) in enumerate(zip(node.value, hints, strict=True))
        )
        return _BAD if _BAD in values else values

    def mapping(self, node: Node, hints: tuple[Any, Any], path: str) -> Any:
        """A dict in the order of the file. null means an empty dict."""
        key_hint, hint = hints
        children = {} if node.value is None else node.value
        if not isinstance(children, dict):
            return self.report(node.at, path, f"expected a mapping, got {show(children)}")
        values = {}
        for key, child in children.items():
            key_node = Node(key, child.key_at, child.key_at)
            name = self.value(key_node, key_hint, path, describe(key_hint))
            values[name] = self.value(child, hint, join(path, key), describe(hint))
        return _BAD if _BAD in {*values} or _BAD in values.values() else values

    def mismatch(self, node: Node, hint: Any, path: str, expected: str) -> Any:
        """Report a value of the wrong kind, with the likeliest remedy."""
        reason = _why_not(node.value, hint)
        remedy = f": {reason}" if reason else _remedy(node.value, hint, expected)
        message = f"expected {expected}, got {show(node.value)}{remedy}"
        return self.report(node.at, path, message)


def _has_type(value: Any, hint: Any) -> bool:
    if get_origin(hint) is Literal:
        return any(type(value) is type(option) and value == option for option in get_args(hint))
    if hint is float:
        return type(value) in (int, float) and _is_finite(value)
    return type(value) is hint


def _is_finite(value: float) -> bool:
    """Whether a number, which may be an int of any length, is a finite float."""
    try:
        return math.isfinite(float(value))
    except OverflowError:
        return False


def _why_not(value: Any, hint: Any) -> str:
    """What a constraint itself says of a value of the right type that it does not accept."""
    _, *constraints = get_args(hint) if get_origin(hint) is Annotated else (hint,)
    return "".join(x.why_not(value) for x in constraints if isinstance(x, LayerPattern))


def _remedy(value: Any, hint: Any, expected: str) -> str:
    """A hint on the commonest slips: a typing error, and quotes too many or too few."""
    if isinstance(value, str):
        near = difflib.get_close_matches(value, re.split("one of |, | or ", expected), n=1)
        if near and near[0].isidentifier():
            return f"; did you mean {near[0]!r}?"
        if "number" in expected and _is_number(value):
            return "; remove the quotes"
    if hint is str and isinstance(value, bool | int | float):
        return "; put it in quotes"
    return ""


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _words(values: tuple[Any, ...]) -> str:
    words = ", ".join(value if isinstance(value, str) else show(value) for value in values)
    return words if len(values) == 1 else f"one of {words}"


def _nearest_key(key: str, known: Mapping[str, Any], whole: type) -> str:
    """A likely key, of this section or another, and the keys that are allowed here."""
    allowed = f"allowed: {', '.join(known)}"
    near = difflib.get_close_matches(key, known, n=1)
    near = near or [path for path in _paths(whole, "") if path.split(".")[-1] == key]
    return f"did you mean {near[0]!r}? ({allowed})" if near else allowed


def _paths(section: type, path: str) -> Iterator[str]:
    """The dotted paths of all keys outside lists and mappings."""
    for name, (_, hint) in keys(section).items():
        yield join(path, name)
        for option in (hint, *get_args(hint)):
            if is_section(option):
                yield from _paths(option, join(path, name))


def _flags(section: type) -> list[str]:
    return [f.name for f in dataclasses.fields(section) if f.metadata.get("hidden")]


def _find(node: Node, path: str) -> Node:
    """The node at a dotted path, or the last node on the way there."""
    for key in path.split("."):
        if isinstance(node.value, list):
            node = node.value[int(key)]
        elif isinstance(node.value, dict) and key in node.value:
            node = node.value[key]
    return node
