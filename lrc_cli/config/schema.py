"""The JSON Schema of the config is made from the dataclasses and their fields' docstrings."""

import ast
import dataclasses
import inspect
import itertools
from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args, get_origin

from lrc_cli.config.built import BUILT
from lrc_cli.config.canonical import plain
from lrc_cli.config.reader import is_required, is_section, is_union, keys
from lrc_cli.config.sections import Config

_TYPES = {type(None): "null", bool: "boolean", int: "integer", float: "number", str: "string"}


def json_schema(whole: type = Config) -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of all configs that this version accepts.

    Args:
        whole: the dataclass of a whole config.
    """
    title = "lrc config" if whole is Config else "lrc certify config"
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": title,
        **_section(whole),
    }


def _section(section: type) -> dict[str, Any]:
    """The schema of a dataclass. As in the reader, null is allowed where no key is required."""
    texts = _docstrings(section)
    required = [name for name, (field, _) in keys(section).items() if is_required(field)]
    extra: dict[str, Any] = getattr(section, "SCHEMA", {})
    schema: dict[str, Any] = {
        "type": "object" if required or "oneOf" in extra else ["object", "null"],
        "description": " ".join((section.__doc__ or "").split()),
        "additionalProperties": False,
        "properties": {name: _key(section, name) | texts[name] for name in keys(section)},
    }
    return schema | ({"required": required} if required else {}) | extra


def _key(section: type, name: str) -> dict[str, Any]:
    field, hint = keys(section)[name]
    built = BUILT.get(f"{section.__name__}.{name}")
    schema = {"enum": list(built)} if built else _value(hint)
    if field.default is dataclasses.MISSING or field.metadata.get("derived"):
        return schema
    return schema | {"default": plain(field.default)}


def _value(hint: Any) -> dict[str, Any]:
    """The schema of an annotation."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        schema = _value(arguments[0])
        for constraint in arguments[1:]:
            schema |= constraint.schema()
        return schema
    if is_union(hint):
        return {"anyOf": [_value(option) for option in arguments]}
    if origin is Literal:
        return {"enum": list(arguments)}
    if origin is tuple:
        return _array(arguments)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return {"type": ["object", "null"], "additionalProperties": _value(arguments[1])}
    return _section(hint) if is_section(hint) else {"type": _TYPES[hint]}


def _array(items: tuple[Any, ...]) -> dict[str, Any]:
    schema = {"type": "array", "items": _value(items[0])}
    if items[-1] is Ellipsis:
        return schema
    return schema | {"minItems": len(items), "maxItems": len(items)}


def _docstrings(section: type) -> dict[str, dict[str, str]]:
    """The docstring under each field, read from the source because Python does not keep it."""
    definition = ast.parse(inspect.getsource(section)).body[0]
    assert isinstance(definition, ast.ClassDef)
    texts: dict[str, dict[str, str]] = {}
    for pair in itertools.pairwise(definition.body):
        match pair:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=text)):
                texts[name] = {"description": " ".join(str(text).split())}
    return texts
