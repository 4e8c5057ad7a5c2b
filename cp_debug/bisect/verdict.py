"""Verdicts: when a layer is guilty, and the reason in words."""

from __future__ import annotations

import math
from typing import NamedTuple

from cp_debug.bisect.range_loss import RANGE
from cp_debug.bisect.replayed import EXCESS, Replay
from cp_debug.bisect.result import DIVERGENT, GUILTY, INHERITED, OK, SHAPE
from cp_debug.probes.statistics import TensorStats
from cp_debug.programs.precision import Precision
from cp_debug.safe_text import amount


class Judgement(NamedTuple):
    """A verdict on one layer; ``why`` is empty unless it is guilty or of another shape."""

    verdict: str
    within: bool
    """Whether max |Δ| is within the tolerance."""
    why: str = ""
    side: str = "test"
    """Whose result is at fault: ``test`` or ``reference``."""


def is_within(stats: TensorStats, rtol: float, atol: float, *, levels: bool = False) -> bool:
    """Whether max |Δ| is within the tolerance, ``atol + rtol · max |reference|``.

    Indices, ids, counts and masks are right or wrong, however large: of integers ``atol`` alone counts, which is
    below 1 unless somebody said so, and bool must be equal. ``levels``: integers that a quantizer rounded to.
    """
    if stats.shape_mismatch:
        return False
    if stats.is_whole and not levels:
        only_bool = stats.dtype_ref == stats.dtype_test == "bool"
        return stats.max_abs <= (0.0 if only_bool and math.isfinite(atol) else atol)
    return stats.max_abs <= atol + rtol * stats.max_ref


def judge(
    stats: TensorStats,
    replay: Replay | None,
    precision: Precision,
    rtol: float,
    atol: float,
    floor: float,
    floor_read: float = 0.0,
    *,
    kind: str = "",
    levels: bool = False,
) -> Judgement:
    """Judge one layer.

    ``floor`` is its noise floor, ``floor_read`` that of what it read, relative L2 norms: where that is ``EXCESS`` times
    what the layer introduced, two runs differ for other reasons, and its own floor says nothing of it, as deep in a
    network that enlarges every difference. ``rtol``, ``atol`` and ``levels``: see ``is_within``. ``kind`` names what
    the layer is quantized to, where that is known: its rounding is expected besides that of ``precision``.
    """
    kind = (kind or precision.name).upper()
    within = is_within(stats, rtol, atol, levels=levels)
    if stats.shape_mismatch:
        return Judgement(SHAPE, False, f"the shape is {list(stats.shape_test)}, the reference's {list(stats.shape)}")
    if replay is None or replay.introduced is None or replay.excess is None:
        return Judgement(OK if within else DIVERGENT, within)
    floor = floor if floor_read <= EXCESS * replay.introduced else 0.0
    if stats.equal:  # there is no divergence to be guilty of, however inexact both are
        return Judgement(OK, within)
    if oracle_is_alone(stats, replay):  # whoever else computed this came to the same result
        return Judgement(OK, within)
    if replay.contradicted:  # it read something else than was captured, and made of it what the reference has
        return Judgement(OK if within else INHERITED, within)
    if replay.unread:  # runtimes need not even write it
        return Judgement(OK if within else INHERITED, within)
    if replay.new_nonfinite:
        values = amount(replay.new_nonfinite, "value")
        numbers = replay.numbers == replay.new_nonfinite
        born = f"NaN or Inf {'is lost' if numbers else 'appears'} here in {values}"
        if math.isfinite(stats.max_ref) and stats.max_ref > precision.largest:
            name = precision.name.upper()
            born += f": the reference reaches {stats.max_ref:.6g}, {name} ends at {precision.largest:.6g}"
        return Judgement(GUILTY, within, born)
    if math.isinf(replay.excess) and replay.instead:
        return Judgement(GUILTY, within, replay.instead)
    if replay.excess > EXCESS and replay.introduced > floor:
        says = f"introduces {replay.excess:.3g}× what {kind} explains"
        return Judgement(GUILTY, within, says + _scales(replay))
    if (replay.channel_excess or 0.0) > EXCESS and replay.introduced > floor:
        says = f"its worst channels introduce {replay.channel_excess:.3g}× what {kind} explains"
        return Judgement(GUILTY, within, says + _scales(replay))
    if replay.misfit and replay.introduced > floor:
        why = f"introduces {replay.misfit:.3g}× what its weights' codes would, read as they were computed"
        return Judgement(GUILTY, within, why)
    if replay.computed_in:
        declared = precision.name if replay.precision is None else replay.precision
        return Judgement(GUILTY, within, f"computes as {replay.computed_in}, not as {declared}")
    # A number beyond the range would show: where only rounding is seen, the test did not store it in that type.
    kept = math.isinf(replay.range_loss) and replay.introduced <= RANGE * precision.roundoff
    if replay.range_loss > RANGE * precision.roundoff and not kept:
        lost = f"storing them loses {replay.range_loss:.2g}"
        return Judgement(GUILTY, within, f"its numbers leave the range of {precision.name.upper()}: {lost}")
    if replay.reference_excess > EXCESS:
        if replay.nonfinite_in:
            why = f"NaN or Inf arise from finite numbers in {replay.nonfinite_in}, even in exact arithmetic: "
            return Judgement(GUILTY, within, why + "the reference has none, so it computes something else", "reference")
        why = f"the reference introduces {replay.reference_excess:.3g}× what its precision explains"
        return Judgement(GUILTY, within, why, "reference")
    return Judgement(OK if within else INHERITED, within)


def oracle_is_alone(stats: TensorStats, replay: Replay) -> bool:
    """Whether reference and test agree as closely as their precision can, and the oracle with neither of them.

    Two programs that share nothing but their
    inputs rarely make the same mistake, so it is the oracle that is doubted. No guilty layer is overlooked by this:
    what it introduced would be part of the divergence.
    """
    if stats.mismatched or replay.expected is None or replay.introduced is None:
        return False
    near = stats.finite_rel_l2 <= EXCESS * replay.expected
    beyond = stats.finite_rel_l2 * EXCESS < replay.introduced and replay.introduced > EXCESS * replay.expected
    return near and (beyond or replay.new_nonfinite > 0)


def obeys_scales(replay: Replay) -> bool | None:
    """Whether a layer that is quantized comes nearer to what its scales say than to the oracle; None where nobody
    knows."""
    if replay.deviation_from_scales is None or replay.introduced is None:
        return None
    return replay.deviation_from_scales < replay.introduced / 2


def _scales(replay: Replay) -> str:
    """Phrase about whether a layer in INT8 does what its scales say."""
    obeys = obeys_scales(replay)
    return "" if obeys is None else ", although it follows its scales" if obeys else ", and does not follow its scales"
