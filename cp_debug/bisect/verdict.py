"""When a layer is guilty, and what is said about it."""

from __future__ import annotations

from cp_debug.bisect.precision import Precision
from cp_debug.bisect.replay import Replay
from cp_debug.bisect.result import DIVERGENT, GUILTY, INHERITED, OK, SHAPE
from cp_debug.probes.statistics import TensorStats

EXCESS = 4.0
"""A layer whose introduced error is this many times the expected one is guilty: ``docs/thresholds.md`` has the
measurements."""
RANGE = 8.0
"""Merely storing a layer's result in the test's precision may lose this many unit roundoffs: more means that numbers
overflow, vanish, or lie among the subnormals."""


def judge(
    stats: TensorStats, replay: Replay | None, precision: Precision, rtol: float, atol: float, floor: float
) -> tuple[str, bool, str]:
    """(verdict, within tolerance, why) of one layer. ``floor`` is its noise floor, relative L2."""
    within = not stats.shape_mismatch and stats.max_abs <= atol + rtol * stats.max_ref
    if stats.shape_mismatch:
        return SHAPE, False, f"the shape is {list(stats.shape_test)}, the reference's {list(stats.shape)}"
    if replay is None or replay.introduced is None or replay.excess is None:
        return (OK if within else DIVERGENT), within, ""
    if replay.born:
        return GUILTY, within, f"{replay.born} NaN or Inf are born here"
    if replay.excess > EXCESS and replay.introduced > floor:
        return GUILTY, within, f"introduces {replay.excess:.3g}× what {precision.name.upper()} explains"
    if replay.range_loss > RANGE * precision.roundoff:
        lost = f"{replay.range_loss:.2g}"
        return GUILTY, within, f"its numbers leave the range of {precision.name.upper()}: storing them loses {lost}"
    return (OK if within else INHERITED), within, ""
