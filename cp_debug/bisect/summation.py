"""Errors of sums in another order: products, pools, reductions.

A sum of K terms in FP32, one after the other, rounds K partial sums, each by 0.4 u of its size (root mean square of the
rounding error of a number whose mantissa is evenly spread). With S the whole sum and Q the sum of squares, the partial
sums of terms in random order grow like k/K·S with a deviation of variance Q·k(K − k)/K², so that the error is 0.4 u
√(K·(S²/3 + Q/6)): √K/2 times larger for terms of one sign than for terms that cancel. Q needs one more pass, with
squared operands.

That takes the roundings to be independent. Equal terms are not: added to a partial sum whose last place is worth h, the
term a is off by δ(a) = h·round(a/h) − a each time, so that a flat map is off by K·δ, up to the bound K·u·S. So the mean
of δ over the terms is computed from the terms themselves, for every h between the last place of S and that of S/32 (a
sum in up to 32 lanes), and the largest counts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from cp_debug.backends.executor import Executor
from cp_debug.graph.graph import Node
from cp_debug.graph.operators import CONTRACTIONS

U = 2.0**-24
"""Unit roundoff of FP32."""
ROUNDING = 0.4
"""Root mean square of one rounding error, in unit roundoffs of the rounded number."""
LANES = 6
"""Partial sums in up to 2⁵ lanes are rounded at last places up to 2⁵ times smaller than that of the whole sum."""
PLACES = 24
"""Number of last places that are looked at: further down, sums that nearly cancel are not one-sided."""

MEANS = {"GlobalAveragePool", "AveragePool", "ReduceMean"}
SUMS = {"ReduceSum", "CumSum"} | MEANS
Derivative = Callable[[Tensor, Tensor], Tensor]
OF_FUNCTIONS: dict[str, tuple[Callable[[Tensor], Tensor], Derivative]] = {
    "ReduceL1": (torch.abs, lambda total, result: torch.ones_like(result)),
    "ReduceSumSquare": (torch.square, lambda total, result: torch.ones_like(result)),
    "ReduceL2": (torch.square, lambda total, result: 0.5 / result),
    "ReduceLogSum": (lambda x: x, lambda total, result: 1 / total),
}
"""Reductions that sum a function of their input, and by how much their result changes with that sum, of the sum and the
result."""


def summation(oracle: Executor, node: Node, inputs: Mapping[str, Tensor], result: Tensor) -> Tensor | None:
    """Error of each element of a sum, root mean square, in FP32's unit roundoffs; None for other nodes.

    ``inputs`` are the node's, as ``oracle`` holds them.
    """
    first = node.inputs[0] if node.inputs else ""
    adds_only = node.op in SUMS or (node.op == "Einsum" and len(node.inputs) == 1)
    if node.op in CONTRACTIONS and not adds_only:
        squared = oracle.run_nodes([node], squares(node, inputs), node.outputs)[node.outputs[0]]
        return in_any_order(result, squared, _terms(node, inputs, result))
    if not adds_only and node.op not in OF_FUNCTIONS:
        return None
    function, derivative = OF_FUNCTIONS.get(node.op, (lambda x: x, lambda total, result: torch.ones_like(result)))
    adds = _adding(node) if node.op in OF_FUNCTIONS else node
    count = _terms(node, inputs, result)
    factor = count if node.op in MEANS else 1.0

    def add(terms: Tensor) -> Tensor:
        summed = oracle.run_nodes([adds], {**inputs, first: terms}, adds.outputs)[adds.outputs[0]]
        return torch.as_tensor(summed) * factor

    terms = function(inputs[first])
    total, squared = add(terms), add(terms.square())
    error = torch.hypot(in_any_order(total, squared, count), one_sided(terms, add, total, squared))
    return torch.hypot(error / factor * derivative(total, result).abs(), ROUNDING * result.abs())


def in_any_order(total: Tensor, squared: Tensor, count: float) -> Tensor:
    """Root mean square error of sums of ``count`` terms one after the other, in FP32's unit roundoffs.

    ``total`` and ``squared`` are the sums of the terms and of their squares.
    """
    return ROUNDING * (count * (total.square() / 3 + squared / 6)).sqrt()


def one_sided(terms: Tensor, add: Callable[[Tensor], Tensor], total: Tensor, squared: Tensor) -> Tensor:
    """Error of sums, in FP32's unit roundoffs, when all their terms are rounded at the same last place.

    ``add`` sums any tensor of the shape of ``terms`` as the operator does.
    """
    worst = torch.zeros_like(total)
    largest = torch.maximum(total.abs(), squared.sqrt())
    present = torch.isfinite(largest) & (largest > 0)
    if not bool(present.any()):
        return worst
    # A number between 2^p and 2^(p+1) has the last place 2^(p−23).
    places = torch.where(present, torch.floor(torch.log2(largest)), -torch.inf) - 23
    top = int(places[present].max())
    lowest = max(int(places[present].min()), top - PLACES) - LANES
    for place in range(top, max(lowest, -149), -1):
        step = 2.0**place
        lost = torch.round(terms.double() / step) * step - terms
        in_reach = (places >= place) & (places < place + LANES)
        worst = torch.where(in_reach, torch.maximum(worst, add(lost).abs()), worst)
    return worst / U


def squares(node: Node, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inputs for which a product computes the sum of its squared terms: operands squared, no bias.

    Shapes and dtypes stay.
    """
    operands, bias = (node.inputs, ()) if node.op == "Einsum" else (node.inputs[:2], node.inputs[2:])
    return {n: t.square() if n in operands else torch.zeros_like(t) if n in bias else t for n, t in inputs.items()}


def _adding(node: Node) -> Node:
    """The ReduceSum over the same axes."""
    proto = node.changed().proto
    proto.op_type = "ReduceSum"
    return Node.of(-(10**9) - node.index, proto)


def _terms(node: Node, inputs: Mapping[str, Tensor], result: Tensor) -> float:
    """Number of terms that one element of the result sums, on average."""
    first = inputs[node.inputs[0]]
    elements = max(result.numel(), 1)
    if node.op == "Conv":
        return inputs[node.inputs[1]][0].numel()
    if node.op == "ConvTranspose":
        return first.numel() * inputs[node.inputs[1]][0].numel() / elements
    if node.op == "MatMul":
        return first.shape[-1]
    if node.op == "Gemm":
        return first.numel() / max(result.shape[0], 1)
    if node.op == "Einsum":
        return _contracted(node, inputs)
    if node.op == "CumSum":
        return first.shape[int(inputs[node.inputs[1]])] if first.dim() else 1
    if node.op == "AveragePool":
        return math.prod(node.attribute("kernel_shape", [1]))
    return first.numel() / elements


def _contracted(node: Node, inputs: Mapping[str, Tensor]) -> float:
    """The product of the sizes of an Einsum's summed indices."""
    equation = node.attribute("equation").decode().replace(" ", "")
    left, _, right = equation.partition("->")
    sizes: dict[str, int] = {}
    for indices, name in zip(left.split(","), node.proto.input, strict=True):
        before, _, after = indices.partition("...")
        shape = inputs[name].shape
        sizes |= dict(zip(before, shape, strict=False))
        sizes |= dict(zip(reversed(after), reversed(shape), strict=False))
    free_indices = right if "->" in equation else {i for i in sizes if left.count(i) == 1}
    return math.prod(size for index, size in sizes.items() if index not in free_indices)
