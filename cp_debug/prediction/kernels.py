"""How a target computes a graph: its kernels, the layers that it fuses, and those that it may leave in FP32.

What TensorRT 8.6 did on an H100 (``docs/gpu/h100.md``): convolutions among convolutions ran in FP16, whatever their
size. Left in FP32 were, in some engines, first convolutions that read few channels; normalizations, products of values
and elementwise operators, which its compiler takes into regions of one type; and the convolutions beside such regions.
The larger of these were not: changing the type of what is read and written takes longer than FP16 saves on small ones.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from cp_debug.backends.arithmetic import (
    BF16,
    FP16,
    FP16ACC,
    INT8,
    TF32,
    TF32_CUT,
    TF32_DECONV,
    Arithmetic,
    round_bf16,
    round_fp16,
)
from cp_debug.graph.graph import Graph, Node, data_values
from cp_debug.graph.operators import ACTIVATIONS, MOVING, PRODUCTS
from cp_debug.prediction.targets import Target
from cp_debug.programs.matching import nearest

TILES = (32, 64, 128)
"""Channels per tile of the kernels that accumulate in FP16."""


@dataclass(frozen=True)
class Kernel:
    """One way in which all layers of a network may be computed.

    ``once``: the result of a fused group is rounded, as ``arithmetic.value`` of ``stored`` says, and nothing inside.
    """

    name: str
    says: str
    arithmetic: Arithmetic
    stored: Arithmetic | None = None
    """Rounding of a fused group's result where ``arithmetic`` rounds no results."""
    fused: bool = False
    """Whether additions behind a convolution come in the order of ``with_epilogue``."""
    mixed: bool = False
    """Whether layers that the target may leave in FP32 (``undecided``) are computed so."""


_ONCE = "operands rounded, sums in FP32, a fused layer's result rounded once"
_EACH = "sums in FP32, every operator's result rounded"
_KERNELS: dict[str, tuple[Kernel, ...]] = {
    "fp16": (
        Kernel("fp16acc/64", "sums in FP16, 64 channels a tile", FP16ACC, fused=True),
        *(
            Kernel(f"fp16acc/{t}", f"sums in FP16, {t} channels a tile", replace(FP16ACC, tile=t), fused=True)
            for t in TILES
            if t != FP16ACC.tile
        ),
        Kernel("fp16", _EACH, FP16),
        Kernel("fp16-once", _ONCE, Arithmetic("fp16", operand=round_fp16), FP16),
    ),
    "bf16": (
        Kernel("bf16", _EACH, BF16),
        Kernel("bf16-once", _ONCE, Arithmetic("bf16", operand=round_bf16), BF16),
    ),
    "tf32": (
        Kernel("tf32", "operands of products rounded to TF32", TF32),
        Kernel("tf32-cut", "operands of products truncated after 10 bits", TF32_CUT),
        Kernel("tf32-weights-cut", "operands rounded, weights truncated after 10 bits", TF32_DECONV),
    ),
    "int8": (
        Kernel("int8", "as the file's Q/DQ pairs say, FP32 between them", INT8),
        Kernel("int8-fp16", "as the file's Q/DQ pairs say, FP16 between them", FP16),
    ),
}
"""Precision → the plausible ways, the most likely first."""


def kernels_of(target: Target, precision: str) -> tuple[Kernel, ...]:
    """The plausible ways in which ``target`` computes in ``precision``, the most likely first."""
    kernels = _KERNELS[precision]
    if not target.weak or precision == "int8":
        return kernels
    says = f"layers that may stay in FP32 stay there; the others: {kernels[-1].says}"  # the smallest error to expect
    return (*kernels, replace(kernels[-1], name="mixed", says=says, mixed=True))


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
    data, ends = set(data_values(graph)), {v.name for v in graph.outputs}
    taken: set[int] = set()
    """Indices of the nodes that have a group."""

    def more(last: Node, allowed: Collection[str]) -> list[Node]:
        """The fewest further nodes behind the last one's result, so that again one value leaves; none where there are
        no such nodes."""
        found: dict[int, Node] = {}
        inside, waiting = {last.outputs[0]}, [n.index for n in graph.consumers.get(last.outputs[0], ())]
        heapq.heapify(waiting)
        while waiting and len(found) < REACH:
            node = graph.nodes[heapq.heappop(waiting)]
            if node.index in found or node.op not in allowed or len(node.outputs) != 1 or node.index in taken:
                continue
            earlier = [name for name in node.inputs if name in data and name not in inside]
            if not all(graph.producer[name].index in taken for name in earlier):
                continue
            found[node.index] = node
            inside.add(node.outputs[0])
            for reader in graph.consumers.get(node.outputs[0], ()):
                heapq.heappush(waiting, reader.index)
            left = [v for v in inside if v in ends or any(r.index not in found for r in graph.consumers.get(v, ()))]
            if left == [node.outputs[0]]:
                return [*found.values()]
        return []

    groups: list[Group] = []
    for node in graph.nodes:
        if node.index in taken or node.op == "Constant":
            taken.add(node.index)
            continue
        side, nodes = data.isdisjoint(node.outputs), [node]
        if not side and node.op not in _KEPT and len(node.outputs) == 1:
            allowed = POINTWISE | REDUCING if node.op in REDUCING else POINTWISE
            while behind := more(nodes[-1], allowed):
                nodes += behind
        taken.update(n.index for n in nodes)
        groups.append(Group(tuple(nodes), side))
    return sorted(groups, key=lambda group: group.nodes[-1].index)


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
    writers = {output: i for i, g in enumerate(groups) for node in g.nodes for output in node.outputs}
    up = [
        {writers[name] for node in g.nodes for name in node.inputs if name in writers} - {i}
        for i, g in enumerate(groups)
    ]
    down: list[set[int]] = [set() for _ in groups]
    for i, above in enumerate(up):
        for j in above:
            down[j].add(i)
    stops = [_convolves(group) or _regional(group) for group in groups]

    def beside_region(place: int, links: Sequence[set[int]]) -> bool:
        """Whether one of the nearest convolutions and regional groups in a direction is a regional one."""

        def around(i: int) -> set[int]:
            return set() if groups[i].side and i != place else links[i] - {place}

        return any(_regional(groups[i]) for i in nearest(place, around, stops.__getitem__)[0])

    return frozenset(
        i
        for i, group in enumerate(groups)
        if group.computes
        and (not _convolves(group) or _reads_few(graph, group) or beside_region(i, up) or beside_region(i, down))
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
