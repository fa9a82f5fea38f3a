"""The values of this version, where the config language already knows more of them.

Whoever builds a feature deletes its line, or adds its value.
"""

from typing import Any

_METHODS = ("svd", "frobenius", "curvature")

BUILT: dict[str, tuple[Any, ...]] = {
    "Calibration.chat_template": (False,),
    "Compression.method": _METHODS,
    "Compression.sequential": (False, "auto"),
    "Compression.center": (False,),
    "LayerOverride.method": (*_METHODS, None),
    "Recover.scope": ("none",),
    "Recover.tokens": ("auto",),
    "Runtime.memory_limit": (None,),
    "Output.remote_code": (False,),
    "Gates.max_perplexity_increase": (None,),
    "Gates.max_layer_error": (None,),
}
"""The allowed values, by dataclass and field; a field that is not here is built whole."""
