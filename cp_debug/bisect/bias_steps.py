"""Biases of 32 bits in quantized files: their steps, and a layer's bias on them.

Integer kernels add the bias to sums of products of levels, so that its scale is the data's times the weights'. Where
the data's is large, as for a value that was zero in calibration, the bias is coarse, and nobody could choose better.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from cp_debug.backends.base import Tensor as AnyTensor
from cp_debug.backends.executor import Executor, Weights
from cp_debug.graph.graph import Graph, Node
from cp_debug.graph.integer_values import is_constant
from cp_debug.graph.operators import PRODUCTS

BIAS_PLACE = {"QLinearConv": 8, "QGemm": 6}
"""Operator that reads levels → place of its bias, in levels of the data's scale times the weights'."""
ON_SCALE = 0.01
"""Relative difference up to which the scale of a bias is that of data times weights."""


def bias_step(graph: Graph, constants: Weights, node: Node, *, rounds_floats: bool) -> Tensor | None:
    """The step of a product's bias, float64, one number or one for each channel: the data's scale times the weights'.

    None for a node that rounds no bias, and for one on another scale. ``rounds_floats``: the backend rounds biases that
    the file left in FP32, as ONNX Runtime's optimizer WeightBiasQuantization does.
    """
    inputs = [*node.proto.input, *[""] * 9]
    op = node.op.removeprefix("com.microsoft.")
    if op in BIAS_PLACE:
        return _product(constants, inputs[1], inputs[4]) if inputs[BIAS_PLACE[op]] else None
    made_by = [graph.producer.get(name) for name in inputs[:3]]
    data, weights, bias = (n if n is not None and n.op == "DequantizeLinear" else None for n in made_by)
    if op not in PRODUCTS or data is None or weights is None or not inputs[2]:
        return None
    product = _product(constants, data.proto.input[1], weights.proto.input[1])
    if bias is None:
        return product if rounds_floats and is_constant(graph, inputs[2]) else None
    stated = _product(constants, bias.proto.input[1])
    if product is None or stated is None or product.numel() not in (1, stated.numel()):
        return None
    return product if torch.allclose(stated, product, rtol=ON_SCALE, atol=0) else None


class StoredBias(NamedTuple):
    """A bias as a quantized file holds it: levels [channels] and their scale, one or one for each channel; float64."""

    levels: Tensor
    scale: Tensor


def stored_bias(graph: Graph, constants: Weights, node: Node) -> StoredBias | None:
    """The constant bias of a product of a quantized file, in levels; None where it has none or computes it."""
    inputs = [*node.proto.input, *[""] * 9]
    op = node.op.removeprefix("com.microsoft.")
    if op in BIAS_PLACE:
        levels, scale = inputs[BIAS_PLACE[op]], _product(constants, inputs[1], inputs[4])
    else:
        made_by = graph.producer.get(inputs[2]) if op in PRODUCTS else None
        if made_by is None or made_by.op != "DequantizeLinear":
            return None
        levels, scale = made_by.proto.input[0], _product(constants, made_by.proto.input[1])
    if scale is None or not levels or not constants.holds(levels) or (numbers := constants.numbers(levels)) is None:
        return None
    return StoredBias(numbers.double().flatten(), scale)


def rounded_bias(executor: Executor, node: Node, values: Mapping[str, AnyTensor], step: Tensor) -> dict[str, Tensor]:
    """The constant bias of a product on whole steps, [channels], by its name.

    Empty without one, or where steps do not fit.
    """
    name = node.proto.input[2] if node.op in PRODUCTS and len(node.proto.input) > 2 else ""
    if not name or name in values or not is_constant(executor.graph, name):
        return {}
    bias = torch.as_tensor(executor.run_nodes([], values, [name])[name])
    if step.numel() not in (1, bias.shape[-1] if bias.dim() else 1):
        return {}
    return {name: ((bias.double() / step).round() * step).to(bias.dtype)}


def _product(constants: Weights, *scales: str) -> Tensor | None:
    """The product of constant scales, float64, one number or one for each channel; None where one is computed."""
    numbers = [constants.numbers(name) for name in scales if constants.holds(name)]
    known = [n.double().flatten() for n in numbers if n is not None]
    return math.prod(known[1:], start=known[0]) if len(known) == len(scales) else None
