"""This table holds the values that this version accepts, where the config language knows more.

Whoever builds a feature deletes its line, or adds its value.
"""

from typing import Any

BUILT: dict[str, tuple[Any, ...]] = {
    "Output.remote_code": (False,),
}
"""The allowed values, by dataclass and field. A field that is not listed accepts all its values."""
