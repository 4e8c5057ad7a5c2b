"""Layers that a weakly typed engine may leave in FP32, as far as a graph tells.

What TensorRT 8.6 did on an H100 (``docs/gpu/h100.md``): convolutions among convolutions ran in FP16, whatever their
size. Left in FP32 were, in some engines, first convolutions that read few channels; normalizations, products of values
and elementwise operators, which its compiler takes into regions of one type; and the convolutions beside such regions.
The larger of these were not: changing the type of what is read and written takes longer than FP16 saves on small ones.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from cp_debug.graph.graph import Graph, Node
from cp_debug.graph.operators import PRODUCTS
from cp_debug.prediction.groups import Group
from cp_debug.programs.matching import nearest

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
