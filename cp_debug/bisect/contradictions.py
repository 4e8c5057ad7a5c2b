"""Captured values that contradict each other: a result that is the reference's, and not what its captured inputs make.

A runtime may write a buffer again once all have read it, and a dump that is taken later shows what came last. Whoever
read the value before that has the right result, so that neither the reader nor the oracle is to be doubted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from cp_debug.bisect.replay import Load, Replayer
from cp_debug.bisect.replayed import EXCESS, Replay
from cp_debug.bisect.result import GUILTY, LayerRow
from cp_debug.probes.distance import apart
from cp_debug.probes.statistics import TensorStats
from cp_debug.programs.pipeline import Key

NEARER = 16.0
"""Factor by which a result must be nearer to the reference's than to what its captured inputs make."""


def contradicted(
    replayer: Replayer, target: str, replay: Replay, stats: TensorStats | None, reference: Load, test: Load
) -> tuple[str, ...]:
    """The captured inputs that ``target`` cannot have been computed from, those that differ the most; else empty.

    ``stats`` are those of the test's value against the reference's, of one graph on both sides: another graph may undo
    what was done to an input.
    """
    if stats is None or stats.shape_mismatch or stats.mismatched or replay.introduced is None:
        return ()
    beyond = replay.new_nonfinite or ((replay.excess or 0.0) > EXCESS and replay.introduced > 0)
    if not beyond or math.isinf(stats.finite_rel_l2) or stats.finite_rel_l2 * NEARER > replay.introduced:
        return ()
    nodes, starts = replayer.graph.segment([target], replayer.known)
    distances = {start: apart(test(start), reference(start)) for start in starts}
    most = max(distances.values(), default=0.0)
    if not most or replayer.reference_excess(nodes, starts, target, reference) > EXCESS:
        return ()
    return tuple(start for start, far in distances.items() if far * EXCESS >= most)


def trace_contradictions(rows: Mapping[Key, LayerRow]) -> None:
    """Add to the reason of every guilty row whose value another layer cannot have read which layer that is."""
    for key, reader in rows.items():
        for name in reader.replay.contradicted if reader.replay else ():
            row = rows.get(Key(key.component, name))
            if row is not None and row.verdict == GUILTY and "did not read this" not in row.why:
                row.why += f" (but {reader.name} did not read this: it has the reference's result)"
