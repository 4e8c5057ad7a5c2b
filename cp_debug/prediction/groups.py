"""The layers that an engine is expected to make of a graph: nodes that are computed together, with one result.

Of a weakly typed engine also those that it may leave in FP32, as far as a graph tells.

What TensorRT 8.6 did on an H100 (``docs/gpu/h100.md``): convolutions among convolutions ran in FP16, whatever their
size. Left in FP32 were, in some engines, first convolutions that read few channels; normalizations, products of values
and elementwise operators, which its compiler takes into regions of one type; and the convolutions beside such regions.
The larger of these were not: changing the type of what is read and written takes longer than FP16 saves on small ones.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cp_debug.graph.graph import Graph, Node, data_values
from cp_debug.graph.operators import ACTIVATIONS, MOVING, PRODUCTS
from cp_debug.programs.matching import nearest

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


FEW = 4
"""Channels of an input up to which TensorRT 8.6 computed the first convolution in FP32: in 3 of 6 networks."""
LARGE = 6e8
"""Multiplications and additions of a product from which on FP16 is certain: four times those of the largest one that
TensorRT 8.6 left in FP32 on an H100. Slower GPUs gain more, so that they choose FP16 for smaller ones."""
CONVOLUTIONS = frozenset(("Conv", "ConvTranspose"))
REGIONAL = frozenset(
    ("Attention", "GRU", "GroupNormalization", "InstanceNormalization", "LSTM", "LayerNormalization", "MatMul",
     "RMSNormalization", "RNN", "Softmax")
)  # fmt: skip
"""Operators around which TensorRT makes regions."""


def undecided(graph: Graph, groups: Sequence[Group]) -> frozenset[int]:
    """Places in ``groups`` of those whose type cannot be known: all that compute, but for convolutions whose nearest
    other products, up and down the graph, are convolutions too."""
    beside = _Beside(groups)
    return frozenset(
        i for i, g in enumerate(groups) if g.computes and not (_convolves(g) and _decided(graph, beside, i))
    )


def operations(graph: Graph, group: Group, values: Mapping[str, Any]) -> float:
    """Multiplications and additions of the group's products. ``values``: the tensors that they read and write, but for
    the graph's weights."""
    return sum(_operations(graph, node, values) for node in group.nodes if node.op in PRODUCTS)


def _operations(graph: Graph, node: Node, values: Mapping[str, Any]) -> float:
    data, weight, result = (
        tuple(graph.weight(name).dims if name in graph.initializers else getattr(values.get(name), "shape", ()))
        for name in (*node.inputs[:2], node.outputs[0])
    )
    if not data or not weight or not result:
        return 0.0
    if node.op == "Conv":  # [out, in ÷ groups, …]
        return 2.0 * math.prod(result) * math.prod(weight[1:])
    if node.op == "ConvTranspose":  # [in, out ÷ groups, …]
        return 2.0 * math.prod(data) * math.prod(weight[1:])
    transposed = node.op == "Gemm" and bool(node.attribute("transA", 0))
    return 2.0 * math.prod(result) * data[0 if transposed else -1]


def _decided(graph: Graph, beside: _Beside, place: int) -> bool:
    return not _reads_few(graph, beside.groups[place]) and not any(map(_regional, beside.nearest(place)))


def _convolves(group: Group) -> bool:
    return any(node.op in CONVOLUTIONS for node in group.nodes)


def _regional(group: Group) -> bool:
    ops = {node.op for node in group.nodes}
    return bool(ops & REGIONAL) or (any(op.startswith("Reduce") for op in ops) and "Sqrt" in ops)


def _reads_few(graph: Graph, group: Group) -> bool:
    """Whether a convolution reads so few channels of a graph's input that tensor cores gain little."""
    shapes = {v.name: v.shape or () for v in graph.inputs}
    first = group.nodes[0]
    shape = shapes.get(first.inputs[0], ()) if first.op == "Conv" else ()
    return len(shape) > 1 and isinstance(shape[1], int) and shape[1] <= FEW


class _Beside:
    """Neighbours of each group, by what it reads."""

    def __init__(self, groups: Sequence[Group]) -> None:
        self.groups = groups
        writers = {output: i for i, g in enumerate(groups) for node in g.nodes for output in node.outputs}
        self._up: list[set[int]] = [
            {writers[name] for node in g.nodes for name in node.inputs if name in writers} - {i}
            for i, g in enumerate(groups)
        ]
        self._down: list[set[int]] = [set() for _ in groups]
        for i, above in enumerate(self._up):
            for j in above:
                self._down[j].add(i)

    def nearest(self, place: int) -> list[Group]:
        """Convolutions and regional groups above and below, those next to each path; other groups are walked
        through."""
        found: set[int] = set()
        for links in (self._up, self._down):
            beside = [() if group.side and i != place else links[i] - {place} for i, group in enumerate(self.groups)]
            stops = lambda i: _convolves(self.groups[i]) or _regional(self.groups[i])  # noqa: E731
            found.update(nearest(place, beside.__getitem__, stops)[0])
        return [self.groups[i] for i in found]
