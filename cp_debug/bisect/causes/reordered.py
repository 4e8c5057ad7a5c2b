"""Operations in another order: a node that the test has too, at another place of the same way through the network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from cp_debug.bisect.causes.base import Candidate
from cp_debug.bisect.causes.other_program import OtherPiece
from cp_debug.graph.constants import Constants
from cp_debug.graph.graph import Graph, Node, downstream
from cp_debug.programs.node_differences import NodeDifference, attributes


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
