"""The graph that a test runs where it is not the reference's: the part that makes a layer, and orders that differ."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cp_debug.backends.arithmetic import ARITHMETICS
from cp_debug.backends.executor import Executor
from cp_debug.backends.kernels.paired_sums import PAIRED, with_paired_sums
from cp_debug.bisect.causes.base import Candidate
from cp_debug.bisect.causes.segment import Segment, as_double
from cp_debug.errors import InputError
from cp_debug.graph.constants import Constants
from cp_debug.graph.graph import Graph, Node, downstream
from cp_debug.graph.operators import QUANTIZERS
from cp_debug.probes.arrays import as_numpy
from cp_debug.programs.layers import side_values
from cp_debug.programs.node_differences import NodeDifference, Pieces, attributes
from cp_debug.programs.weight_differences import WeightDifferences, weight_differences


@dataclass
class OtherProgram:
    """The test's graph, with what was captured of it."""

    graph: Graph
    reference: Graph
    names: Mapping[str, str]
    """Value of the test's graph → value of the reference's graph."""
    load: Callable[[str], Any]
    """A captured value by the reference's name."""
    executor: Executor

    @cached_property
    def constants(self) -> Constants:
        """The constants of the graph."""
        return Constants(self.graph)

    @cached_property
    def sides(self) -> tuple[set[str], set[str]]:
        """Values that hang on constants and shapes alone: the reference's, and those of this graph."""
        ours, theirs = (set(side_values(graph)) for graph in (self.reference, self.graph))
        return ours, theirs

    @cached_property
    def weights(self) -> WeightDifferences:
        """Differences of its weights from the reference's."""
        return weight_differences(self.reference, self.graph)

    def piece(self, segment: Segment, known: set[str]) -> OtherPiece | None:
        """The part that computes a segment's target from values that are ``known``; None without one."""
        own = (n for n, name in self.names.items() if name == segment.target and n in self.graph.producer)
        plain = segment.target in self.graph.producer and segment.target not in self.names
        test_name = next(own, segment.target if plain else None)
        if test_name is None:
            return None
        nodes, starts = self.graph.segment([test_name], {o for o in self.graph.values if self.names.get(o, o) in known})
        return OtherPiece(segment, self, test_name, nodes, starts)


@dataclass
class OtherPiece:
    """The test's nodes that make what a segment of the reference makes."""

    segment: Segment
    other: OtherProgram
    own: str
    """The segment's target by its name in the test."""
    nodes: list[Node]
    starts: list[str]

    @cached_property
    def inputs(self) -> dict[str, Any]:
        """What the test captured of the values that the nodes start from."""
        return {s: self.other.load(self.other.names.get(s, s)) for s in self.starts}

    @cached_property
    def matched(self) -> Pieces:
        """The nodes, matched with the reference's."""
        segment, other = self.segment, self.other
        ours = _settled(segment.context.oracle, other.sides[0], segment.nodes, segment.given, segment.target)
        theirs = _settled(other.executor, other.sides[1], self.nodes, self.inputs, self.own)
        if ours is None or theirs is None:
            ours, theirs = {}, {}
        paired = {name: other.names.get(name, name) for name in theirs}
        apart = [n for n, m in paired.items() if m in ours and not np.array_equal(ours[m], theirs[n], equal_nan=True)]
        # What both compute, to other values, is no constant: the nodes that make it tell more.
        for values, graph, names in (theirs, other.graph, apart), (ours, segment.graph, [paired[n] for n in apart]):
            for node in graph.segment(names, set())[0] if names else ():
                for name in node.outputs:
                    values.pop(name, None)
        return Pieces(segment.graph, segment.nodes, other.graph, self.nodes, other.names, (ours, theirs))

    def run(self, replaced: Mapping[str, Any] = MappingProxyType({})) -> Tensor:
        """The result on the oracle; ``replaced``: value of a node, by its name in the test → what stands in its place.

        float64, in the result's shape. Raises InputError for an operator that nobody here can compute.
        """
        return self.values(self.own, replaced=replaced)[self.own]

    def values(self, *names: str, replaced: Mapping[str, Any] = MappingProxyType({})) -> dict[str, Tensor]:
        """Several values by their names in the test, in one run like ``run``'s; those that no node makes are inputs or
        constants.

        float64, each in its value's shape.
        """
        nodes, given = [n for n in self.nodes if replaced.keys().isdisjoint(n.outputs)], {**self.inputs, **replaced}
        made = {output for node in nodes for output in node.outputs}
        found = self.other.executor.run_nodes(nodes, given, [name for name in names if name in made])
        constants = {name: self.other.constants[name] for name in names if name not in made | given.keys()}
        found |= given | {name: torch.from_numpy(np.array(value)) for name, value in constants.items()}
        return {name: as_double(found[name]) for name in names}

    @cached_property
    def result(self) -> Tensor | None:
        """The result, by the arithmetic that explains the layer best; float64, of the captured shape, else None."""
        segment, results, oracle = self.segment, [], self.other.executor
        # The claimed precision rounds the values between the test's nodes.
        claimed = ARITHMETICS.get(segment.context.claim.name, oracle.arithmetic)
        runs = [(oracle.beside(each), self.nodes) for each in dict.fromkeys((oracle.arithmetic, claimed))]
        if (saturating := with_paired_sums(self.other.graph, self.nodes)) is not None:
            runs.append((oracle.beside(PAIRED), saturating))
        for executor, nodes in runs:
            try:
                results.append(as_double(executor.run_nodes(nodes, self.inputs, [self.own])[self.own]))
            except InputError:  # an operator that nobody here can compute
                continue
        fitting = [value for value in results if value.shape == segment.test.shape]
        if segment.test.shape != segment.exact.shape:  # whether the shape fits is all that can be asked
            return next(iter(fitting), None)
        return max(fitting, key=lambda value: segment.explained(value)[0], default=None)


def _settled(
    executor: Executor, sides: Set[str], nodes: Sequence[Node], given: Mapping[str, Any], target: str
) -> dict[str, np.ndarray] | None:
    """What nodes make of constants and shapes alone (``sides``), floats as FP32: one exporter writes such nodes,
    another stores what they give. None where it cannot be computed, or where the target itself is of it.

    A quantizer is matched, with what reads it: a weight that it rounds is no constant.
    """
    made = {name for node in nodes for name in node.outputs}
    rounded = [name for node in nodes if node.op in QUANTIZERS for name in node.outputs]
    names = sorted((sides & made) - {*rounded, *downstream(nodes, rounded)})
    if target in names:
        return None
    try:
        found = executor.run_nodes(nodes, given, names) if names else {}
    except InputError:  # an operator that nobody here can compute
        return None
    arrays = {name: as_numpy(value) for name, value in found.items()}
    floats = {name: array.astype(np.float32) for name, array in arrays.items() if array.dtype.kind == "f"}
    return {**arrays, **floats}


def reordered(piece: OtherPiece, differences: Sequence[NodeDifference]) -> Candidate | None:
    """The candidate of a node that is left out or added at a layer, where the other graph has it earlier or later.

    ``differences`` are those of the layer. None where more differs, where the two graphs do not have as many such
    nodes, or where the test's nodes at the layer cannot be computed.
    """
    ours = _Ordered(piece.segment.graph, Constants(piece.segment.graph), {}, piece.segment.target)
    theirs = _Ordered(piece.other.graph, piece.other.constants, piece.other.names, piece.own)
    one = all(d.structural for d in differences) and len({d.evidence.get("op") for d in differences}) == 1
    for difference in differences if one else ():
        here, there = (theirs, ours) if difference.added else (ours, theirs)
        node = next((n for n in here.graph.nodes if n.name == difference.node), None)
        alike = [] if node is None else [side.like(here.does(node)) for side in (here, there)]
        if node is None or len(alike[0]) != len(alike[1]):  # one that is gone, or one more
            continue
        paired = {here.named(n) for n in alike[0]}
        moved = [n for n in there.on_the_way(alike[1]) if there.named(n) not in paired]
        if not moved or (value := piece.result) is None:
            continue
        place = {here: here.behind(node), there: there.behind(moved[0])}
        operands = [name for name in node.inputs if name != here.main(node)]
        what = node.op + f" of {', '.join(operands)}" * bool(operands)
        says = f"the order is another: {what} follows {place[theirs]} instead of {place[ours]}"
        evidence = {"op": node.op, "node": node.name, "read_off": "the difference of the two graphs"}
        return Candidate("operator-order", says, value, 0, evidence, f"apply {what} behind {place[ours]}")
    return None


class _Ordered:
    """The graph of one side, its values by the reference's names, and the layer's value by its own."""

    def __init__(self, graph: Graph, constants: Constants, names: Mapping[str, str], end: str) -> None:
        self.graph, self._constants, self._names, self._end = graph, constants, names, end

    def main(self, node: Node) -> str:
        """The input of a node that its data comes from: the first one that other nodes compute."""
        computed = (n for n in node.inputs if n in self.graph.producer and n not in self._constants)
        return next(computed, node.inputs[0])

    def does(self, node: Node) -> tuple[str, ...]:
        """The operator with its attributes and other operands: constants by what they hold, values by the reference's
        names."""
        rest = (name for name in node.inputs if name != self.main(node))
        held = (self._constants.digest(n) if n in self._constants else self._names.get(n, n) for n in rest)
        return node.op, str(attributes(self.graph, node)), *held

    def like(self, does: tuple[str, ...]) -> list[Node]:
        """The nodes that do so."""
        return [n for n in self.graph.nodes if n.op == does[0] and n.inputs and self.does(n) == does]

    def named(self, node: Node) -> str:
        """A node's result by the reference's name."""
        return self._names.get(node.outputs[0], node.outputs[0])

    def on_the_way(self, nodes: Sequence[Node]) -> list[Node]:
        """Those of the nodes that the layer hangs on, or that hang on the layer."""
        before = {n.name for n in self.graph.segment([self._end], ())[0]}
        behind = downstream(self.graph.nodes, [self._end])
        return [n for n in nodes if n.name in before or n.outputs[0] in behind]

    def behind(self, node: Node) -> str:
        """``Mul (c)``, the node in front of one; ``x``, where that is an input."""
        maker = self.graph.producer.get(name := self.main(node))
        shown = self._names.get(name, name)
        return shown if maker is None else f"{maker.op} ({shown})"
