"""The values of this version, where the config language already knows more of them.

Whoever builds a feature deletes its line, or adds its value.
"""

from typing import Any

_METHODS = ("svd", "frobenius", "nuclear", "relu", "curvature")

BUILT: dict[str, tuple[Any, ...]] = {
    "Compression.method": _METHODS,
    "LayerOverride.method": (*_METHODS, None),
    "Recover.scope": ("none",),
    "Recover.tokens": ("auto",),
    "Output.remote_code": (False,),
}
"""The allowed values, by dataclass and field; a field that is not here is built whole."""
