"""Words for layers whose values are not finite: which kind it is, and what is born in the layer itself."""

from __future__ import annotations

import math

from cp_debug.bisect.result import OK, LayerRow


def not_finite(row: LayerRow) -> str:
    """``∞`` or ``NaN`` for a row with a figure that is no number, or with such elements in its tensors; else empty."""
    stats, replay = row.stats, row.replay
    figures = [stats.rel_l2, stats.max_abs, *((replay.introduced, replay.inherited) if replay else ())]
    if stats.nan_ref or stats.nan_test or any(v is not None and math.isnan(v) for v in figures):
        return "NaN"
    return "∞" if stats.inf_ref or stats.inf_test or any(v is not None and math.isinf(v) for v in figures) else ""


def born(row: LayerRow) -> str:
    """``18 Inf``, ``3 NaN`` or ``5 NaN or Inf`` for a layer that makes such values of finite ones, and the reverse,
    ``2 NaN or Inf lost``; else empty."""
    count = row.replay.new_nonfinite if row.replay else 0
    numbers = row.replay is not None and row.replay.numbers == count
    return f"{count} {'NaN or Inf lost' if numbers else _kind(row)}" if count else ""


def verdict(row: LayerRow) -> str:
    """The verdict, with what is born in a guilty layer: its figures are of the finite values alone."""
    return f"{row.verdict}: {born(row)}" if born(row) else unless_nothing(row, row.verdict)


def unless_nothing(row: LayerRow, verdict: str) -> str:
    """``verdict``, or ``not compared`` for one that would say that all is well where there was no number."""
    return "not compared" if verdict == OK and row.stats.nothing_compared else verdict


def side_by_side(row: LayerRow) -> str:
    """Kind of value that is not finite on the test's side alone; empty where the excess says what the layer did."""
    if row.replay and row.replay.new_nonfinite:
        return _kind(row)
    return "" if math.isfinite(row.stats.rel_l2) else _kind(row)


def _kind(row: LayerRow) -> str:
    kinds = [name for name, count in (("NaN", row.stats.nan_test), ("Inf", row.stats.inf_test)) if count]
    return " or ".join(kinds) or "NaN or Inf"
