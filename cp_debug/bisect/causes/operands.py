"""Something that happens to what a layer reads: a function is applied to it, or it is multiplied by a number."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from cp_debug.bisect.causes.base import Candidate, cause
from cp_debug.bisect.causes.operators import ACTIVATIONS, FURTHER
from cp_debug.bisect.causes.segment import Segment
from cp_debug.bisect.causes.single_numbers import FEWEST, FEWEST_WRONG, search
from cp_debug.graph.graph import Node
from cp_debug.graph.operators import GATES, PRODUCTS

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
                and torch.as_tensor(segment.given[name]).is_floating_point()
            ):
                yield node, place, name


@cause(costly=True)
def functions(segment: Segment) -> Iterator[Candidate]:
    """Candidates: a function is applied to one of a node's operands."""
    if segment.test.numel() > MOST:
        return
    for node, place, name in _operands(segment):
        own = segment.input(name)
        for text, function in {**ACTIVATIONS, **FURTHER}.items():
            changed = function(own)
            if torch.equal(changed, own) or not bool(torch.isfinite(changed).all()):
                continue
            if (value := segment.edited(node, inputs={place: changed})) is not None:
                says = f"{text} is applied to {name} before {node.op} reads it"
                fix = f"remove the {text} in front of {{layers}}"
                yield Candidate("extra-activation", says, value, evidence={"op": text, "operand": name}, fix=fix)


@cause(costly=True)
def factors(segment: Segment) -> Iterator[Candidate]:
    """Candidates: a factor on one of a node's operands, a bound for it, or Sigmoid and Tanh of a multiple of an operand
    or of the result."""
    wrong = int((segment.error != 0).sum())
    if not FEWEST <= segment.test.numel() <= MOST or wrong < FEWEST_WRONG or segment.test.shape != segment.exact.shape:
        return
    for node, place, name in _operands(segment):
        own = segment.input(name)

        def edited(changed: Tensor, node: Node = node, place: int = place) -> Tensor | None:
            return segment.edited(node, inputs={place: changed})

        def scaled(number: float, own: Tensor = own, edited: Edited = edited) -> Tensor | None:
            return edited(own * number)

        def bounded(number: float, own: Tensor = own, edited: Edited = edited) -> Tensor | None:
            return edited(own.clamp(-abs(number), abs(number)))

        if node.op not in LINEAR and (fit := search(segment, 1.0, scaled)):
            says = f"{name} is multiplied by {fit[0]:.6g} before {node.op} reads it"
            fix = "compare what {layers} reads in both programs"
            yield Candidate("scaled", says, fit[1], 1, {"operand": name, "factor": fit[0]}, fix)
        largest = float(own.abs().max())
        if largest and (fit := search(segment, largest, bounded, [largest * share for share in BOUNDS])):
            says = f"{name} stops at ±{abs(fit[0]):.4g} before {node.op} reads it"
            evidence = {"operand": name, "bound": abs(fit[0])}
            yield Candidate("saturated", says, fit[1], 1, evidence, "remove the bound in front of {layers}")
        yield from _sloped(segment, f"{name} before {node.op} reads it", own, edited)
    if segment.nodes:
        yield from _sloped(segment, "the result although the graph has none here", segment.exact, lambda value: value)


def _sloped(segment: Segment, what: str, own: Tensor, edited: Callable[[Tensor], Tensor | None]) -> Iterator[Candidate]:
    for text, function in SLOPED.items():

        def emulate(number: float, function: Callable[[Tensor], Tensor] = function) -> Tensor | None:
            return edited(function(own * number)) if number else segment.exact

        if (fit := search(segment, 0.0, emulate, (0.0, *STARTS))) is not None:
            says = f"{text} of {fit[0]:.6g} times the value is applied to {what}"
            fix = f"remove the {text} at {{layers}}"
            yield Candidate("extra-activation", says, fit[1], 1, {"op": text, "factor": fit[0]}, fix)
