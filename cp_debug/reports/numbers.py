"""Numbers as people read them."""

from __future__ import annotations

import math


def percent(share: float) -> str:
    """``62%``, and ``0%`` for what is negative by less than half of one."""
    return f"{round(share, 2) + 0.0:.0%}"


def number(value: float | None) -> str:
    """Three digits are enough to read: ``1.23e-04``, ``0``, ``inf``, and a dash for None."""
    if value is None:
        return "–"
    if value == 0:
        return "0"
    if not math.isfinite(value):
        return str(value)
    return f"{value:.3g}" if 0.01 <= abs(value) < 10000 else f"{value:.2e}"
