"""Layers that hold their values in another basis, which what reads them undoes: channels that are permuted, rotated or
scaled by a tool that exports a network again."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from cp_debug.bisect.candidate_run import CandidateRun
from cp_debug.bisect.replayed import EXCESS
from cp_debug.bisect.result import GUILTY, INHERITED, OK, LayerRow
from cp_debug.graph.graph import Graph, Node
from cp_debug.programs.pipeline import Key

BOTH_CHANGED = {"Einsum", "MatMul", "Mul", "Div"}
"""Operators whose two operands may each hold a basis of which nothing is left in the result, as of queries and keys."""


@dataclass
class _Changed:
    """The values that are computed from a guilty layer, until they agree with the reference again."""

    changed: set[str]
    undoing: list[str]
    """Results that agree again, and would not by the reference's weights. Where what was read differs between the sides
    already, they were found guilty themselves."""
    of_two: list[Node]
    """Nodes whose results agree again, and do so by what they read: both operands must have been changed."""


def acquit_undone(run: CandidateRun, rows: Mapping[Key, LayerRow]) -> dict[str, list[str]]:
    """Acquit guilty layers of another program whose deviation is undone before any output.

    Every value that is computed from them agrees with the reference again as closely as precision and what was read
    allow, at a layer that does so against the oracle: from what it read, the reference's weights would have made
    something else. No fault is undone so. Returns the names of those layers → of the layers that undo it, and changes
    the rows of both.
    """
    found: dict[str, list[str]] = {}
    for component, program in run.programs.items():
        if run.pipeline.program(component).graph is program.graph:
            continue  # one program with one set of weights has one basis
        own = {key.value: row for key, row in rows.items() if key.component == component}
        layers = {value: row for value, row in own.items() if value in program.graph.producer}
        guilty = [value for value, row in layers.items() if row.verdict == GUILTY and row.side == "test"]
        network = _Network(program.graph, own)
        walks = {value: walk for value in guilty if (walk := network.walk(value)) is not None}
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
            for other in walk.undoing:
                if own[other].verdict == GUILTY and own[other].side == "test":
                    own[other].verdict, own[other].why = OK if own[other].within else INHERITED, ""
    return found


class _Network:
    """A program's graph with the rows of its values."""

    def __init__(self, graph: Graph, rows: Mapping[str, LayerRow]) -> None:
        self._graph, self._rows = graph, rows
        self._outputs = {info.name for info in graph.outputs}
        self._read_by: dict[str, list[str]] = {}
        """Value → values with rows that it is computed from."""

    def walk(self, start: str) -> _Changed | None:
        """The values that ``start`` changes; None where an output is one, or one agrees again for another reason."""
        rows = self._rows
        walk = _Changed({start}, [], [])
        waiting = [(start, _expected(rows[start]), self._read(start, start, walk.changed))]
        while waiting:
            name, rounding, read = waiting.pop()
            if name in self._outputs:
                return None
            for node in self._graph.consumers.get(name, []):
                for result in node.outputs:
                    row, together = rows.get(result), rounding + _expected(rows.get(result))
                    read_so_far = max(read, self._read(result, start, walk.changed))
                    if row is None or row.replay is None or not _agrees(row, together + read_so_far):
                        if result not in walk.changed:
                            walk.changed.add(result)
                            waiting.append((result, together, read_so_far))
                    elif (row.replay.introduced or 0.0) > EXCESS * max(row.stats.finite_rel_l2, together + read_so_far):
                        walk.undoing.append(result)
                    elif node.op in BOTH_CHANGED and len(node.inputs) > 1:
                        walk.of_two.append(node)
                    else:
                        return None
        return walk

    def _read(self, result: str, start: str, changed: Collection[str]) -> float:
        """The largest relative L2 by which the sides differ in what ``result`` is computed from besides what ``start``
        changed; what differs nearly as much as ``start`` is left out, for it is in another basis, too."""
        if result not in self._read_by:
            _, values = self._graph.segment([result], self._rows)
            self._read_by[result] = [value for value in values if value in self._rows]
        others = (self._rows[value].stats.finite_rel_l2 for value in self._read_by[result] if value not in changed)
        most = self._rows[start].stats.finite_rel_l2 / EXCESS
        return max((difference for difference in others if difference < most), default=0.0)


def _expected(row: LayerRow | None) -> float:
    return (row.replay.expected or 0.0) if row is not None and row.replay is not None else 0.0


def _agrees(row: LayerRow, rounding: float) -> bool:
    stats = row.stats
    return not (stats.mismatched or stats.shape_mismatch) and stats.finite_rel_l2 <= EXCESS * rounding
