"""Verdicts: when a layer is guilty, and the reason in words; of side values (see ``Layer``) and of shapes, too."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from cp_debug.backends.base import Program
from cp_debug.bisect.range_loss import RANGE
from cp_debug.bisect.replayed import EXCESS, Replay
from cp_debug.bisect.result import DIVERGENT, GUILTY, INHERITED, OK, SHAPE, LayerRow
from cp_debug.probes.statistics import TensorStats
from cp_debug.programs.matching import nearest
from cp_debug.programs.pipeline import Key
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
    # Without a divergence there is nothing to be guilty of, however inexact both are; nor where somebody else computed
    # this with the same result.
    if stats.equal or oracle_is_alone(stats, replay):
        return Judgement(OK, within)
    innocent = Judgement(OK if within else INHERITED, within)
    # It read something else than was captured, and made of it what the reference has; or nobody reads what it writes.
    if replay.contradicted or replay.unread:
        return innocent
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
        words = {math.inf: "some are beyond its largest", 1.0: "some become 0"}
        lost = words.get(replay.range_loss) or f"storing them loses {replay.range_loss:.2g}"
        return Judgement(GUILTY, within, f"its numbers leave the range of {precision.name.upper()}: {lost}")
    if replay.reference_excess > EXCESS:
        if replay.nonfinite_in:
            why = f"NaN or Inf arise from finite numbers in {replay.nonfinite_in}, even in exact arithmetic: "
            return Judgement(GUILTY, within, why + "the reference has none, so it computes something else", "reference")
        why = f"the reference introduces {replay.reference_excess:.3g}× what its precision explains"
        return Judgement(GUILTY, within, why, "reference")
    return innocent


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


def judged(judgement: Judgement, replay: Replay | None) -> Judgement:
    """The verdict on a side value: whole numbers that are not what its inputs make are no rounding, however near."""
    if replay is None or not replay.instead or judgement.verdict == SHAPE:
        return judgement
    return judgement._replace(verdict=GUILTY, why=replay.instead)


def without_emulation(judgement: Judgement, replay: Replay | None) -> Judgement:
    """Nobody is guilty of more than is expected where nobody knows what to expect."""
    if replay is None or not replay.not_emulated or replay.new_nonfinite or judgement.verdict != GUILTY:
        return judgement
    return Judgement(OK if judgement.within else DIVERGENT, judgement.within)


_OWN_INPUTS = ": its own inputs lead to that"


def trace_shapes(programs: Mapping[str, Program], rows: Mapping[Key, LayerRow]) -> None:
    """Give every row of another shape the place where the other shape begins.

    Only values that differ are followed backwards: side values with a row, and data of another shape. Where that began
    with a layer that gives what its own inputs make, and nobody above it is guilty, the inputs differ by what they may:
    another number of boxes or indices is inherited, and nobody's fault. ``programs`` are the reference's, by component.
    """
    wrong = [(key, row) for key, row in rows.items() if row.verdict == SHAPE and row.op != "input"]
    origins = [(row, _origin(programs[key.component], key, rows)) for key, row in wrong]
    for row, origin in origins:
        if origin.verdict != GUILTY and _inherits(programs, origin, rows):
            row.verdict = INHERITED
            row.why += _OWN_INPUTS if origin is row else f"; it comes from {origin.name} ({origin.op})"
        elif origin is not row and origin.kind != "data":
            row.why += f"; {origin.name} ({origin.op}) computes it: {origin.why}"
        elif origin is not row:
            row.why += f"; it comes from {origin.name} ({origin.op})"
        elif row.replay is not None and row.replay.skipped:
            row.why += "; its own inputs lead to the reference's"


def counts_told(rows: Mapping[Key, LayerRow]) -> list[str]:
    """A sentence for each layer whose number of results hangs on its values, and is another than the reference's."""
    return [
        f"{row.name} ({row.op}) has shape {list(row.stats.shape_test)}, the reference {list(row.stats.shape)}: the "
        "number of results depends on its input values, which differ"
        for row in sorted(rows.values(), key=lambda row: row.index)
        if row.verdict == INHERITED and row.why.endswith(_OWN_INPUTS)
    ]


def _inherits(programs: Mapping[str, Program], origin: LayerRow, rows: Mapping[Key, LayerRow]) -> bool:
    """Whether a layer gives the shape and the numbers of its own inputs, and no layer above it is guilty."""
    replay = origin.replay
    if replay is None or replay.excess is None or replay.excess > EXCESS or replay.new_nonfinite or replay.instead:
        return False
    graph = programs[origin.component].graph
    nodes, _ = graph.segment([origin.onnx] if origin.onnx in graph.producer else [], ())
    above = {Key(origin.component, name) for node in nodes for name in node.outputs}
    earlier = [row for key, row in rows.items() if key in above or key.component != origin.component]
    return not any(row.verdict == GUILTY for row in earlier)


def _origin(program: Program, key: Key, rows: Mapping[Key, LayerRow]) -> LayerRow:
    """The first row in execution order that the shape of ``key`` hangs on, guilty ones before others."""
    producer = program.graph.producer

    def behind(value: str) -> Iterator[str]:
        for name in producer[value].inputs if value in producer else ():
            row = rows.get(Key(key.component, name))
            if name in producer if row is None else row.verdict == SHAPE or row.kind != "data":
                yield name

    passed = (Key(key.component, name) for name in nearest(key.value, behind, lambda name: False)[1])
    candidates = [rows[key], *(rows[each] for each in passed if each in rows)]
    return min(candidates, key=lambda row: (row.verdict != GUILTY, row.index))
