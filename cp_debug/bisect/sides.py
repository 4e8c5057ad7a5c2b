"""Verdicts and notes on side values (see ``Layer``) and on shapes: which node computed them."""

from __future__ import annotations

from collections.abc import Mapping

from cp_debug.backends.base import Program
from cp_debug.bisect.replayed import EXCESS, Replay
from cp_debug.bisect.result import DIVERGENT, GUILTY, INHERITED, OK, SHAPE, LayerRow
from cp_debug.bisect.verdict import Judgement
from cp_debug.programs.pipeline import Key


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
    candidates, stack, visited = [rows[key]], [key.value], {key.value}
    while stack:
        node = producer.get(stack.pop())
        for name in node.inputs if node is not None else ():
            row = rows.get(Key(key.component, name))
            hidden = row is None and name in producer and Key(key.component, name) not in rows
            if name in visited or not (hidden or (row is not None and (row.verdict == SHAPE or row.kind != "data"))):
                continue
            visited.add(name)
            stack.append(name)
            if row is not None:
                candidates.append(row)
    return min(candidates, key=lambda row: (row.verdict != GUILTY, row.index))
