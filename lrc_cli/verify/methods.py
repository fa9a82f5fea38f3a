"""Verification knows some methods, and says of any other method that nothing was checked."""

from collections.abc import Mapping
from typing import Any

KNOWN = frozenset({"svd", "frobenius", "nuclear", "relu", "curvature"})
"""The methods whose metric and whose bias verification finds by its own way."""


def unknown_method(row: Mapping[str, Any]) -> str | None:
    """Returns why the statements of a layer's method cannot be checked; None where they can.

    Args:
        row: the report's row of the layer.
    """
    method = row["method"]
    return None if method in KNOWN else f"verification knows nothing of the method {method}"
