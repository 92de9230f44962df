"""The digits that are kept of what was measured."""

from __future__ import annotations

import math
from typing import Any


def rounded(value: Any, digits: int) -> Any:
    """A number, or lists of them, to so many significant digits; what is not finite is None."""
    if isinstance(value, list):
        return [rounded(v, digits) for v in value]
    if isinstance(value, float):
        return float(f"{value:.{digits}g}") if math.isfinite(value) else None
    return value
