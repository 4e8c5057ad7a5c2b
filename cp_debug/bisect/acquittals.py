"""Layers that differ and are right all the same: masks of attention, and values in a basis that their readers undo.

A mask's scores are −Inf on one side and −1e9 on the other, of which Softmax makes the same zeros. Channels may be
permuted, rotated or scaled by one layer, and put right by what reads them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cp_debug.bisect.candidate_run import CandidateRun, loader
from cp_debug.bisect.causes.precision import OVERFLOWS
from cp_debug.bisect.range_loss import FURTHEST
from cp_debug.bisect.replay import Load, Replayer
from cp_debug.bisect.replayed import EXCESS
from cp_debug.bisect.result import DIVERGENT, GUILTY, INHERITED, OK, LayerRow
from cp_debug.bisect.whole_numbers import as_tensor
from cp_debug.errors import InputError
from cp_debug.graph.graph import Graph, Node, readers
from cp_debug.graph.operators import MOVERS
from cp_debug.probes.held import CapturedRun
from cp_debug.programs.pipeline import Key

MASKS = "masks with", "what differs is masked"
"""Beginnings of the reason why a layer that differs by a mask is right, and of that of those that pass the mask on."""
BASIS = "in another basis"
"""Beginning of the reason why a layer is right that holds its result so, or passes it on."""
MASKED = -100.0
"""Numbers up to this one may stand for "left out": e⁻¹⁰⁰ is nothing beside 1, in any precision."""
ENDS = {"Attention", "BiasSoftmax", "Exp", "MultiHeadAttention", "Softmax"}
"""Operators that make 0 of what is masked."""
PASSES = MOVERS | {"Add", "Cast", "Clip", "Div", "Max", "Min", "Mul", "ReduceMax", "Sub", "Where"}
"""Operators through which a mask is carried to those."""


def acquit_masks(
    run: CandidateRun, rows: Mapping[Key, LayerRow], reference: CapturedRun, test: CapturedRun
) -> list[str]:
    """Acquit layers that differ by the number alone that stands for "left out", or in what is left out at once;
    returns their names.

    The numbers that differ are masked on both sides, and whatever reads them comes to the same on this sample, as it
    ran or in exact arithmetic: the next Softmax makes the same of both. A mask that reaches an output, or of which one
    side makes NaN, is no such thing. Changes the rows.
    """
    found = []
    for key, row in rows.items():
        accused = row.verdict == GUILTY or (row.verdict == DIVERGENT and row.op == "Constant")
        if not accused or run.oracle is None or row.stats.shape_mismatch:
            continue
        replayer = run.replayer(key.component, test)
        nodes = _ends_of_mask(replayer.graph, key.value)
        if not nodes:
            continue
        loads = [loader(capture, key.component) for capture in (reference, test)]
        exact, other = (as_tensor(load(key.value)) for load in loads)
        if not (exact.is_floating_point() and other.is_floating_point()):
            continue
        other = other.to(exact)
        masked = (exact <= MASKED) & (other <= MASKED)
        masked |= (hidden := _masked_behind(replayer.graph, key.value, exact, loads))
        if bool((~masked & (torch.isfinite(exact) != torch.isfinite(other))).any()):
            continue  # one side masks what the other does not
        if not bool((masked & (exact != other)).any()) or not _agrees_beside(replayer, key.value, masked, loads[1]):
            continue
        change = key.value, exact, torch.where(masked, other, exact)
        ends = [rows.get(Key(key.component, node.outputs[0])) for node in nodes if node.op in ENDS]
        alike = all(end and end.within and end.stats.rel_l2 <= run.precision.rtol for end in ends)
        gone = run.precision.roundoff  # in exact arithmetic, a row that is all −65504 has its scores back
        if not alike and replayer.range_loss.matters(loads[0], change, gone, len(nodes) + FURTHEST):
            continue
        ours, theirs = (f"{float(t[masked].min()):.6g}".replace("inf", "Inf") for t in (exact, other))
        row.verdict, row.side = INHERITED, "test"
        how = f"{MASKS[1]} behind it" if bool(hidden.any()) else f"{MASKS[0]} {theirs} instead of {ours}"
        row.why = f"{how}; the result after it is the same"
        for node in nodes:
            if (passes := rows.get(Key(key.component, node.outputs[0]))) and passes.verdict == INHERITED:
                passes.why = passes.why or row.why
        found.append(row.name)
    return found


def _masked_behind(graph: Graph, value: str, like: Tensor, loads: Sequence[Load]) -> Tensor:
    """The elements of a value that every node that reads it masks on both sides."""
    masked, nodes = torch.ones_like(like, dtype=torch.bool), graph.consumers.get(value, ())
    for node in nodes:
        for load in loads:
            try:
                result = as_tensor(load(node.outputs[0]))
            except InputError:
                return torch.zeros_like(masked)
            masked &= (result <= MASKED) if result.shape == like.shape else False
    return masked & bool(nodes)


def beside_masks(graph: Graph, value: str, *runs: Tensor) -> tuple[Tensor, ...]:
    """A value in several runs, the exact one last, with 0 where numbers beyond FP16 say "left out" in all of them.

    A Softmax makes 0 of −3.4e38, and of the −65504 or −Inf that FP16 has for it. All have one shape, and float dtypes.
    """
    masked = runs[-1] <= -OVERFLOWS
    for run in runs[:-1]:
        masked &= run <= MASKED
    if not bool(masked.any()) or not _ends_of_mask(graph, value):
        return runs
    return tuple(run.masked_fill(masked, 0.0) for run in runs)


def _ends_of_mask(graph: Graph, value: str) -> list[Node]:
    """The nodes that a value reaches up to those that make 0 of a mask; none where it reaches anything else."""
    outputs, reached = {info.name for info in graph.outputs}, {value}
    passes = lambda node, _: node.op in PASSES  # noqa: E731
    nodes = [node for node, _ in readers(graph, value, passes)]
    reached.update(o for node in nodes if node.op in PASSES for o in node.outputs)
    return nodes if reached.isdisjoint(outputs) and all(node.op in PASSES | ENDS for node in nodes) else []


def _agrees_beside(replayer: Replayer, value: str, masked: Tensor, test: Load) -> bool:
    """Whether what is not masked has no error that precision cannot explain."""
    try:
        error, exact = replayer.introduced(value, test)
    except InputError:
        return False
    kept = ~masked.to(error.device)
    lost, scale = (float(t[kept].double().norm()) for t in (error, exact))
    return lost <= EXCESS * replayer.precision.roundoff * scale


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
                row.verdict = INHERITED
                for each in (own[name] for name in walk.changed if name in own):
                    each.why = f"{BASIS}; undone by {names[0]}" if each.verdict == INHERITED else each.why
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
    """Whether both sides have the same but for the rounding, which whole numbers do not share."""
    stats = row.stats
    other = stats.mismatched or stats.shape_mismatch or stats.unequal
    return not other and stats.finite_rel_l2 <= EXCESS * rounding
