"""HTML and SVG elements are strings here, escaped by construction."""

from html import escape


class Markup(str):
    """Marks text that is already HTML and is not escaped again."""

    __slots__ = ()


def element(name: str, /, *children: str, **attributes: object) -> Markup:
    """Returns `<name attributes>children</name>`, escaped where children and values are not Markup.

    Args:
        attributes: a trailing underscore is dropped (`class_`), other underscores become hyphens;
            None leaves the attribute out, floats are cut to two decimals.
    """
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(_value(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Markup(f"<{name}{written}>{join(*children)}</{name}>")


def join(*children: str) -> Markup:
    """Returns children one after another, escaped where they are not Markup."""
    return Markup(
        "".join(child if isinstance(child, Markup) else escape(child) for child in children)
    )


def _value(value: object) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)
