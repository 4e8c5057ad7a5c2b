"""Something that happens to what a layer reads: a function is applied to it, or it is multiplied by a number."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from cp_debug.bisect.causes.base import Candidate, cause
from cp_debug.bisect.causes.operators import FUNCTIONS
from cp_debug.bisect.causes.segment import Segment
from cp_debug.bisect.causes.single_numbers import Number, by_search, is_told
from cp_debug.graph.graph import Node
from cp_debug.graph.operators import GATES, PRODUCTS
from cp_debug.probes.arrays import as_numpy, as_torch

LINEAR = {
    *PRODUCTS, *GATES, "Abs", "AveragePool", "BatchNormalization", "Div", "Einsum", "Flatten", "GlobalAveragePool",
    "GlobalMaxPool", "Identity", "LayerNormalization", "LeakyRelu", "MaxPool", "Mul", "Neg", "ReduceMax", "ReduceMean",
    "ReduceSum", "Relu", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze",
}  # fmt: skip
"""Operators of which a factor on what they read is one on their result or their weights, or changes nothing."""
SLOPED: Mapping[str, Callable[[Tensor], Tensor]] = {"Sigmoid": torch.sigmoid, "Tanh": torch.tanh}
"""Functions that are put behind or in front of a layer with a factor on what they read."""
STARTS = (0.1, 0.25, 0.5, 0.7071, 0.75, 0.9, 1.0, 1.1, 1.25, 1.414, 1.702, 2.0, 3.0, 4.0, 8.0)
"""Factors from which the search starts."""
BOUNDS = (1e-3, 3e-3, 0.01, 0.03, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
"""Bounds of an operand from which the search starts, as shares of its largest element."""
MOST = 1 << 20
"""Elements of a result up to which functions of an operand are tried."""


Edited = Callable[[Tensor], Tensor | None]
"""The layer's result where an operand is another tensor."""


def _operands(segment: Segment) -> Iterator[tuple[Node, int, str]]:
    """(Node, place, name) of every captured tensor of several fractions that a node of the segment reads."""
    for node in segment.nodes:
        for place, name in enumerate(node.proto.input):
            if (
                name in segment.given
                and segment.input(name).numel() > 1
                and as_torch(as_numpy(segment.given[name])).is_floating_point()
            ):
                yield node, place, name


@cause(costly=True)
def functions(segment: Segment) -> Iterator[Candidate]:
    """Candidates: a function is applied to one of a node's operands."""
    if segment.test.numel() > MOST:
        return
    for node, place, name in _operands(segment):
        own = segment.input(name)
        for text, function in FUNCTIONS.items():
            changed = function(own)
            if torch.equal(changed, own) or not bool(torch.isfinite(changed).all()):
                continue
            if (value := segment.edited(node, inputs={place: changed})) is not None:
                says = f"{text} is applied to {name} before {node.op} reads it"
                fix = f"remove the {text} before {{layers}}"
                yield Candidate("extra-activation", says, value, evidence={"op": text, "operand": name}, fix=fix)


@cause(costly=True)
def factors(segment: Segment) -> Iterator[Candidate]:
    """Candidates: a factor on one of a node's operands, a bound for it, or Sigmoid and Tanh of a multiple of an operand
    or of the result."""
    if is_told(segment, MOST):
        for node, place, name in _operands(segment):
            yield from by_search(segment, _numbers(segment, node, place, name))
        if segment.nodes:
            what = "the result although the graph has none here"
            yield from by_search(segment, _sloped(segment, what, segment.exact, lambda value: value))


def _numbers(segment: Segment, node: Node, place: int, name: str) -> Iterator[Number]:
    own = segment.input(name)
    largest = float(own.abs().max())

    def edited(changed: Tensor) -> Tensor | None:
        return segment.edited(node, inputs={place: changed})

    def factor(number: float) -> tuple[str, str, dict[str, Any], str]:
        says = f"{name} is multiplied by {number:.6g} before {node.op} reads it"
        return "scaled", says, {"operand": name, "factor": number}, "compare what {layers} reads in both programs"

    def bound(number: float) -> tuple[str, str, dict[str, Any], str]:
        says = f"{name} stops at ±{abs(number):.4g} before {node.op} reads it"
        return "saturated", says, {"operand": name, "bound": abs(number)}, "remove the bound before {layers}"

    if node.op not in LINEAR:
        yield Number(1.0, lambda number: edited(own * number), factor)
    if largest:
        bounded = [largest * share for share in BOUNDS]
        yield Number(largest, lambda number: edited(own.clamp(-abs(number), abs(number))), bound, bounded)
    yield from _sloped(segment, f"{name} before {node.op} reads it", own, edited)


def _sloped(segment: Segment, what: str, own: Tensor, edited: Edited) -> Iterator[Number]:
    for text, function in SLOPED.items():

        def emulate(number: float, function: Callable[[Tensor], Tensor] = function) -> Tensor | None:
            return edited(function(own * number)) if number else segment.exact

        def tell(number: float, text: str = text) -> tuple[str, str, dict[str, Any], str]:
            says = f"{text} of {number:.6g} times the value is applied to {what}"
            return "extra-activation", says, {"op": text, "factor": number}, f"remove the {text} at {{layers}}"

        yield Number(0.0, emulate, tell, (0.0, *STARTS))
