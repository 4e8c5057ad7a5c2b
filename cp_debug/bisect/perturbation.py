"""How far correct FP32 implementations of the same layer lie apart: other orders of summation, other approximations.

Emulation knows one implementation. Another one may sum one after the other where the emulation sums pairwise, or
compute ``exp(x) − 1`` where it computes ``expm1(x)``. The spread of such choices is put on the result of every node as
random noise and carried to the end of the segment: what arrives there is no defect of the backend.

A sum of K terms in FP32, one after the other, rounds K partial sums, each by 0.4 u of its size (root mean square of the
rounding error of a number whose mantissa is evenly spread). With S the whole sum and Q the sum of squares, the partial
sums of terms in random order grow like k/K·S with a deviation of variance Q·k(K − k)/K², so that the error is
0.4 u √(K·(S²/3 + Q/6)): √K/2 times larger for terms of one sign than for terms that cancel. Q needs one more pass, with
squared operands.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from cp_debug.backends.base import Tensor as AnyTensor
from cp_debug.backends.executor import Executor
from cp_debug.graph.graph import Node

ROUNDING = 0.4
"""Root mean square of one rounding error, in unit roundoffs of the rounded number."""
ULPS = 1.5
"""Unit roundoffs that a good approximation of a transcendental function may be off, relative, root mean square."""

PRODUCTS = {"Conv", "ConvTranspose", "Gemm", "MatMul"}
MEANS = {"GlobalAveragePool", "AveragePool", "ReduceMean"}
SUMS = {"ReduceSum"} | MEANS
INSIDE = {"Softmax", "LogSoftmax", "LayerNormalization", "InstanceNormalization", "GroupNormalization", "ReduceL2"}
"""Operators that sum on the way to their result."""
MINUS_ONE = {"Elu", "Selu", "Celu"}
"""Operators that may subtract 1 from an exponential near 1."""
APPROXIMATED = {"Sigmoid", "Tanh", "Exp", "Log", "Erf", "Gelu", "Softplus", "Mish", "Sin", "Cos", "Pow", "Sqrt"}


def disturbed(
    oracle: Executor, nodes: Sequence[Node], given: Mapping[str, AnyTensor], targets: Sequence[str]
) -> dict[str, Tensor]:
    """The ``targets`` of a segment when every node's result is off by what correct implementations may differ.

    The noise is the same in every call. Raises InputError as ``Executor.run_nodes`` does.
    """
    generator = torch.Generator().manual_seed(0)
    values: dict[str, AnyTensor] = dict(given)
    for node in nodes:
        for name, value in oracle.run_nodes([node], values, node.outputs).items():
            if isinstance(value, Tensor) and value.is_floating_point():
                noise = torch.randn(value.shape, generator=generator, dtype=value.dtype).to(value.device)
                value = value + 2.0**-24 * spread(oracle, node, values, value) * noise
            values[name] = value
    return {t: torch.as_tensor(values[t]) for t in targets}


def spread(oracle: Executor, node: Node, values: Mapping[str, AnyTensor], result: Tensor) -> Tensor | float:
    """By how much each element of a node's result may be off, root mean square, in units of FP32's roundoff."""
    inputs = oracle.run_nodes([], values, node.inputs)
    if node.op in PRODUCTS | SUMS:
        count = _terms(node, inputs, result)
        squared = oracle.run_nodes([node], _squares(node, inputs), node.outputs)[node.outputs[0]]
        if node.op in MEANS:
            squared = squared / count
        return ROUNDING * (count * (result.square() / 3 + squared / 6)).sqrt()
    if node.op in INSIDE:
        return ROUNDING * math.sqrt(inputs[node.inputs[0]].shape[-1] / 3) * result.abs()
    if node.op in MINUS_ONE:
        return (result < 0) * (1 + result.abs())
    return ULPS * result.abs() if node.op in APPROXIMATED else 0.0


def _squares(node: Node, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inputs for which the node computes the sum of squared terms: operands squared, no bias."""
    operands, bias = (node.inputs[:2], node.inputs[2:]) if node.op in PRODUCTS else (node.inputs[:1], ())
    return {n: t.square() if n in operands else torch.zeros_like(t) if n in bias else t for n, t in inputs.items()}


def _terms(node: Node, inputs: Mapping[str, Tensor], result: Tensor) -> float:
    """How many terms one element of the result sums, on average."""
    first = inputs[node.inputs[0]]
    elements = max(result.numel(), 1)
    if node.op == "Conv":
        return inputs[node.inputs[1]][0].numel()
    if node.op == "ConvTranspose":
        return first.numel() * inputs[node.inputs[1]][0].numel() / elements
    if node.op == "MatMul":
        return first.shape[-1]
    return first.numel() / (result.shape[0] if node.op == "Gemm" else elements)
