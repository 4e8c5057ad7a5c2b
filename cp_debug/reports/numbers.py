"""Numbers in the form in which people read them."""

from __future__ import annotations

import math
from typing import Any

from cp_debug.safe_text import percent


def share(value: float) -> str:
    """A share of a sum of errors: ``62%``; ``×3.1`` or ``×−60`` where it is larger than the sum, or against it."""
    return percent(value) if -0.05 <= value <= 1.05 else f"×{value:.2g}".replace("-", "−")


def share_in_words(share: float) -> str:
    """A share of the final divergence in words; errors that cancel each other make it large or negative."""
    if share > 1.05:
        what = f"{share:.0%} of" if share < 10 else f"{share:.3g} times"
        return f"{what} the final divergence: other errors cancel the rest"
    if share < -0.05:
        what = f"{-share:.0%}" if share > -10 else f"{-share:.3g} times"
        return f"without it the final divergence would be {what} larger: other errors outweigh it"
    return f"{percent(share)} of the final divergence"


def fixed(value: float, digits: int = 4) -> str:
    """So many digits behind the point, ``0.5231``; zero without a sign, and a dash for NaN."""
    return "–" if math.isnan(value) else f"{round(value, digits) + 0.0:.{digits}f}"


def signed(value: float, digits: int = 4) -> str:
    """A change with its sign, ``-0.0023``; what rounds to zero is ``+0.0000``, and a dash for NaN."""
    return "–" if math.isnan(value) else f"{round(value, digits) + 0.0:+.{digits}f}"


def number(value: float | None) -> str:
    """Three digits: ``1.23e-04``, ``0``, ``inf``, and a dash for None."""
    if value is None:
        return "–"
    if value == 0:
        return "0"
    if not math.isfinite(value):
        return str(value)
    return f"{value:.3g}" if 0.01 <= abs(value) < 10000 else f"{value:.2e}"


def shape_of(having: Any) -> str:
    """The shape of an array, or of what was measured of one: ``64×3×7``, ``scalar``."""
    return "×".join(map(str, having.shape)) or "scalar"
