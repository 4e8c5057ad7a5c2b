"""Functions computed by their textbook formula, whose intermediate values overflow, cancel or vanish in FP32."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from cp_debug.bisect.causes.base import Candidate, cause
from cp_debug.bisect.causes.segment import Segment, as_double
from cp_debug.graph.graph import Node

Axes = list[int]


class Formula(NamedTuple):
    """A formula that is right for real numbers, and not in floating point."""

    text: str
    apply: Callable[[Tensor, Axes], Tensor]
    """Function of an FP32 tensor, of any shape, and the axes that are reduced: the result, which keeps its axes."""
    better: str


_SHIFT = "subtract the largest argument in front of exp"
_EXPM1, _LOG1P = "use expm1(x)", "use max(x, 0) + log1p(exp(−|x|))"
FORMULAS: Mapping[str, tuple[Formula, ...]] = {
    "Softplus": (Formula("log(1 + exp(x))", lambda x, _: (1 + x.exp()).log(), _LOG1P),),
    "Mish": (Formula("x·tanh(log(1 + exp(x)))", lambda x, _: x * (1 + x.exp()).log().tanh(), _LOG1P),),
    "Sigmoid": (Formula("exp(x) ÷ (1 + exp(x))", lambda x, _: x.exp() / (1 + x.exp()), "use 1 ÷ (1 + exp(−x))"),),
    "Tanh": (
        Formula("(exp(2x) − 1) ÷ (exp(2x) + 1)", lambda x, _: ((2 * x).exp() - 1) / ((2 * x).exp() + 1), _EXPM1),
        Formula("sinh(x) ÷ cosh(x)", lambda x, _: (x.exp() - (-x).exp()) / (x.exp() + (-x).exp()), _EXPM1),
    ),
    "Sinh": (Formula("(exp(x) − exp(−x)) ÷ 2", lambda x, _: (x.exp() - (-x).exp()) / 2, _EXPM1),),
    "Asinh": (
        Formula("log(x + √(x² + 1))", lambda x, _: (x + (x * x + 1).sqrt()).log(), "use asinh of |x|, by log1p"),
    ),
    "Acosh": (Formula("log(x + √(x² − 1))", lambda x, _: (x + (x * x - 1).sqrt()).log(), "use log(2x) of large x"),),
    "Atanh": (Formula("log((1 + x) ÷ (1 − x)) ÷ 2", lambda x, _: ((1 + x) / (1 - x)).log() / 2, "use log1p"),),
    "Softmax": (Formula("exp(x) ÷ Σ exp(x)", lambda x, d: x.exp() / x.exp().sum(d, keepdim=True), _SHIFT),),
    "LogSoftmax": (
        Formula("x − log(Σ exp(x))", lambda x, d: x - x.exp().sum(d, keepdim=True).log(), _SHIFT),
        Formula("log(softmax(x))", lambda x, d: x.softmax(d[0]).log(), "use x − max − log(Σ exp(x − max))"),
    ),
    "ReduceLogSumExp": (
        Formula("log(Σ exp(x))", lambda x, d: x.exp().sum(d, keepdim=True).log(), _SHIFT),
        Formula(
            "max + log(Σ exp(x − max))",
            lambda x, d: x.amax(d, keepdim=True) + (x - x.amax(d, keepdim=True)).exp().sum(d, keepdim=True).log(),
            "subtract 0 where the maximum is Inf or −Inf: Inf − Inf is NaN",
        ),
    ),
}
"""Operator → formulas that are not right everywhere in floating point."""


@cause()
def textbook(segment: Segment) -> Iterator[Candidate]:
    """Candidates: a node of the segment is computed by such a formula, each step of it in FP32."""
    for node in segment.nodes:
        for formula in _formulas(node):
            name = node.proto.input[0]
            given = segment.context.oracle.run_nodes(segment.nodes, segment.given, [name])[name]
            x = as_double(given).float()
            if (axes := _axes(segment, node, x)) is None:
                continue
            made = formula.apply(x, axes)
            if node.op.startswith("Reduce") and not node.attribute("keepdims", 1):
                made = made.squeeze(axes)
            value = segment.edited(node, op="Identity", reads=[name], inputs={0: made})
            if value is not None and not torch.equal(value, segment.exact.float().double()):
                says = (
                    f"{node.op} is computed as {formula.text} in FP32, which is wrong for {_where(segment, value, x)}"
                )
                fix = f"compute {node.op} in {{layers}} in another way: {formula.better}"
                yield Candidate("textbook-formula", says, value, 0, {"node": node.name, "formula": formula.text}, fix)


def _formulas(node: Node) -> tuple[Formula, ...]:
    if node.op not in ("Celu", "Elu", "Selu"):
        return FORMULAS.get(node.op, ())
    alpha = float(node.attribute("alpha", 1.6732632 if node.op == "Selu" else 1.0))
    gamma = float(node.attribute("gamma", 1.050701)) if node.op == "Selu" else 1.0
    width = alpha if node.op == "Celu" else 1.0
    of = "x ÷ α" if node.op == "Celu" else "x"
    text = f"{'γ·' * (node.op == 'Selu')}α·(exp({of}) − 1)"
    return (Formula(text, lambda x, _: gamma * torch.where(x > 0, x, alpha * ((x / width).exp() - 1)), _EXPM1),)


def _axes(segment: Segment, node: Node, x: Tensor) -> Axes | None:
    """The axes that a node reduces, or normalizes along; None where nobody knows them."""
    every = [*range(x.dim())]
    if node.op.startswith("Reduce"):
        if len(node.proto.input) > 1 and node.proto.input[1]:
            given = segment.context.constants
            held = given.holds(node.proto.input[1])
            return [int(a) % x.dim() for a in as_double(given[node.proto.input[1]])] if held else None
        return [a % x.dim() for a in node.attribute("axes", every)] if x.dim() else None
    modern = segment.graph.opsets.get("", 1) >= 13
    axis = node.attribute("axis", -1 if modern else 1) if x.dim() else None
    return None if axis is None else [axis % x.dim()] if modern else every[axis % x.dim() :]


def _where(segment: Segment, value: Tensor, x: Tensor) -> str:
    """``arguments such as −12``, where the formula is off most; ``the arguments of [1, 0]`` of a reduction."""
    apart = ((value - segment.exact) / segment.exact.abs().clamp(min=1e-30)).abs()
    apart = torch.where(torch.isfinite(value) | (value == segment.exact), apart.nan_to_num(0.0), torch.inf)
    worst = int(apart.flatten().argmax())
    if x.shape == apart.shape:
        return f"arguments such as {float(x.flatten()[worst]):.4g}"
    return f"the arguments of {[int(i) for i in torch.unravel_index(torch.tensor(worst), apart.shape)]}"
