"""Layers that hold their values in another basis, which what reads them undoes: channels that are permuted, rotated or
scaled by a tool that exports a network again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from cp_debug.bisect.candidate_run import CandidateRun
from cp_debug.bisect.replayed import EXCESS
from cp_debug.bisect.result import GUILTY, INHERITED, LayerRow
from cp_debug.graph.graph import Graph, Node
from cp_debug.programs.pipeline import Key

BOTH_CHANGED = {"Einsum", "MatMul", "Mul", "Div"}
"""Operators whose two operands may each hold a basis of which nothing is left in the result, as of queries and keys."""


@dataclass
class _Changed:
    """The values that are computed from a guilty layer, until they agree with the reference again."""

    changed: set[str]
    undoing: list[str]
    """Results that agree again, and would not by the reference's weights."""
    of_two: list[Node]
    """Nodes whose results agree again, and do so by what they read: both operands must have been changed."""


def acquit_undone(run: CandidateRun, rows: Mapping[Key, LayerRow]) -> dict[str, list[str]]:
    """Acquit guilty layers of another program whose deviation is undone before any output.

    Every value that is computed from them agrees with the reference again as closely as precision allows, at a layer
    that does so against the oracle: from what it read, the reference's weights would have made something else. No fault
    is undone so. Returns the names of those layers → of the layers that undo it, and changes their rows.
    """
    found: dict[str, list[str]] = {}
    for component, program in run.programs.items():
        if run.pipeline.program(component).graph is program.graph:
            continue  # one program with one set of weights has one basis
        own = {key.value: row for key, row in rows.items() if key.component == component}
        guilty = [value for value, row in own.items() if row.verdict == GUILTY and row.side == "test"]
        walks = {value: walk for value in guilty if (walk := _walk(program.graph, value, own)) is not None}
        while True:
            changed = {value for walk in walks.values() for value in walk.changed}
            kept = {v: w for v, w in walks.items() if all(set(node.inputs) <= changed for node in w.of_two)}
            if len(kept) == len(walks):
                break
            walks = kept
        for value, walk in walks.items():
            undoing = [*walk.undoing, *(o for node in walk.of_two for o in node.outputs if o in own)]
            if undoing:
                row, names = own[value], list(dict.fromkeys(own[other].name for other in undoing))
                found[row.name] = names
                row.verdict, row.why = INHERITED, f"holds its result in another basis; undone by {names[0]}"
    return found


def _walk(graph: Graph, start: str, rows: Mapping[str, LayerRow]) -> _Changed | None:
    """The values that ``start`` changes; None where an output is one, or where one agrees again for another reason."""
    outputs = {info.name for info in graph.outputs}
    walk, waiting = _Changed({start}, [], []), [(start, _expected(rows[start]))]
    while waiting:
        name, rounding = waiting.pop()
        if name in outputs:
            return None
        for node in graph.consumers.get(name, []):
            for result in node.outputs:
                row, together = rows.get(result), rounding + _expected(rows.get(result))
                if row is None or row.replay is None or not _agrees(row, together):
                    if result not in walk.changed:
                        walk.changed.add(result)
                        waiting.append((result, together))
                elif (row.replay.introduced or 0.0) > EXCESS * max(row.stats.finite_rel_l2, together):
                    walk.undoing.append(result)
                elif node.op in BOTH_CHANGED and len(node.inputs) > 1:
                    walk.of_two.append(node)
                else:
                    return None
    return walk


def _expected(row: LayerRow | None) -> float:
    return (row.replay.expected or 0.0) if row is not None and row.replay is not None else 0.0


def _agrees(row: LayerRow, rounding: float) -> bool:
    stats = row.stats
    return not (stats.mismatched or stats.shape_mismatch) and stats.finite_rel_l2 <= EXCESS * rounding
