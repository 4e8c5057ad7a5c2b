"""The layers that an engine is expected to make of a graph: nodes that are computed together, with one result."""

from __future__ import annotations

import heapq
from collections.abc import Collection
from dataclasses import dataclass

from cp_debug.graph.downstream import data_values
from cp_debug.graph.graph import Graph, Node
from cp_debug.graph.operators import ACTIVATIONS, MOVING

POINTWISE = ACTIVATIONS | {
    *("Abs", "Add", "BatchNormalization", "Ceil", "Div", "Exp", "Floor", "Log", "Max", "Min", "Mul", "Neg", "Pow"),
    *("Reciprocal", "Round", "Sign", "Sqrt", "Sub"),
}
"""Operators that engines compute together with what they read."""
REDUCING = frozenset(("ReduceMean", "ReduceSum", "ReduceMax", "ReduceL2", "ReduceSumSquare"))
"""Operators that begin a normalization which was exported in parts."""
_KEPT = MOVING | {"DepthToSpace", "DequantizeLinear", "Pad", "QuantizeLinear", "SpaceToDepth"}
"""Operators that compute nothing."""
REACH = 32
"""Nodes up to which a fusion is looked for behind one value."""


@dataclass(frozen=True)
class Group:
    """Nodes in execution order."""

    nodes: tuple[Node, ...]
    side: bool = False
    """Whether they read no element of an input: constants and shapes."""

    @property
    def computes(self) -> bool:
        """Whether any node of the group rounds."""
        return not self.side and any(node.op not in _KEPT for node in self.nodes)


def groups_of(graph: Graph) -> list[Group]:
    """All nodes of a graph but constants, in groups that can be computed one after the other.

    Behind a product, a convolution or any operator that computes come the elementwise operators that read nothing else
    but what is there already, as long as one value leaves the group; additions of earlier values count. A reduction
    starts a normalization, which ends where one value is left.
    """
    data = set(data_values(graph))
    grouped = _Grouped(graph, data)
    groups: list[Group] = []
    for node in graph.nodes:
        if node.index in grouped.taken or node.op == "Constant":
            grouped.taken.add(node.index)
            continue
        side = data.isdisjoint(node.outputs)
        nodes = [node] if side or node.op in _KEPT or len(node.outputs) != 1 else grouped.behind(node)
        grouped.taken.update(n.index for n in nodes)
        groups.append(Group(tuple(nodes), side))
    return sorted(groups, key=lambda group: group.nodes[-1].index)


class _Grouped:
    def __init__(self, graph: Graph, data: Collection[str]) -> None:
        self.graph, self._data = graph, data
        self.taken: set[int] = set()
        """Indices of the nodes that have a group."""
        self._outputs = {v.name for v in graph.outputs}

    def behind(self, node: Node) -> list[Node]:
        """The node and everything that an engine would compute with it."""
        allowed = POINTWISE | REDUCING if node.op in REDUCING else POINTWISE
        nodes = [node]
        while more := self._next(nodes, allowed):
            nodes += more
        return nodes

    def _next(self, nodes: list[Node], allowed: Collection[str]) -> list[Node]:
        """The fewest further nodes behind the last one's result, so that again one value leaves; none where there are
        no such nodes."""
        (value,) = nodes[-1].outputs
        more: list[Node] = []
        inside, waiting = {value}, [n.index for n in self.graph.consumers.get(value, ())]
        heapq.heapify(waiting)
        while waiting and len(more) < REACH:
            node = self.graph.nodes[heapq.heappop(waiting)]
            if node in more or node.op not in allowed or not self._ready(node, inside):
                continue
            more.append(node)
            inside.update(node.outputs)
            for output in node.outputs:
                for reader in self.graph.consumers.get(output, ()):
                    heapq.heappush(waiting, reader.index)
            leaving = [v for v in inside if self._leaves(v, more)]
            if leaving == [node.outputs[0]]:
                return more
        return []

    def _ready(self, node: Node, inside: Collection[str]) -> bool:
        """Whether all that the node reads is in the group, computed by another group before, a weight or an input."""
        if len(node.outputs) != 1 or node.index in self.taken:
            return False
        earlier = [name for name in node.inputs if name in self._data and name not in inside]
        return all(self.graph.producer[name].index in self.taken for name in earlier)

    def _leaves(self, value: str, nodes: list[Node]) -> bool:
        inside = {node.index for node in nodes}
        return value in self._outputs or any(n.index not in inside for n in self.graph.consumers.get(value, ()))
