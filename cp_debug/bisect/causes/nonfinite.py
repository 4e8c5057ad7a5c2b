"""NaN and Inf that arise in a layer: their cause, and the operands that they come from."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from cp_debug.bisect.causes.base import Candidate, cause
from cp_debug.bisect.causes.segment import Segment
from cp_debug.safe_text import amount


@cause()
def times_infinity(segment: Segment) -> Iterator[Candidate]:
    """Candidate: a factor that overflowed, so that 0·Inf is NaN and all else Inf."""
    if bool(segment.new_nonfinite.any()):
        for sign in (1, -1):
            says = "the result is multiplied by Inf: its zeros become NaN"
            # Of what the precision makes: a value that it rounds to 0, or past it, gives NaN or the other Inf.
            value = segment.claimed * (sign * torch.inf)
            yield Candidate(
                "times-infinity", says, value, evidence=operands(segment), fix="find the scale that is Inf: {layers}"
            )


@cause()
def nan_for_zero_or_all(segment: Segment) -> Iterator[Candidate]:
    """Candidates: NaN where the exact value is 0 (0/0), or NaN throughout."""
    if not bool(segment.new_nonfinite.any()):
        return
    nan = torch.full((), torch.nan, dtype=torch.float64)
    for name, says, place in (
        ("nan-at-zero", "NaN exactly where the result should be 0: a division of zeros", segment.exact == 0),
        ("nan-everywhere", "the whole tensor is NaN", torch.ones_like(segment.exact, dtype=torch.bool)),
    ):
        value = torch.where(place, nan, segment.exact)
        yield Candidate(
            name, says, value, evidence=operands(segment), fix="guard the division in {layers} with an epsilon"
        )


@cause()
def folded(segment: Segment) -> Iterator[Candidate]:
    """Candidates: what algebra says of numbers is said of NaN and Inf: x·0 is 0, x − x is 0, x ÷ x is 1."""
    if not segment.nodes or not bool(segment.new_nonfinite.any()):
        return
    node = segment.nodes[-1]
    same = len(set(node.inputs)) == 1
    zero = any(w is not None and not w.any() for w in (segment.weight(node, place) for place in (0, 1)))
    for op, holds, text, result in (
        ("Mul", zero, "x·0", 0.0),
        ("Sub", same, "x − x", 0.0),
        ("Div", same, "x ÷ x", 1.0),
    ):
        if node.op == op and holds:
            says = f"{text} is taken for {result:.0f} where x is NaN or Inf"
            value = torch.full_like(segment.exact, result)
            fix = "report it, or replace NaN and Inf in front of {layers}"
            yield Candidate("folded", says, value, evidence=operands(segment), fix=fix)


@cause(costly=True)
def born_here(segment: Segment) -> Iterator[Candidate]:
    """Candidate of last resort: the place of the first NaN or Inf, and its operands."""
    if bool(segment.new_nonfinite.any()):
        count = int(segment.new_nonfinite.sum())
        what, right = (_kinds(tensor[segment.new_nonfinite]) for tensor in (segment.test, segment.exact))
        says = f"{what} appears here in {amount(count, 'value')} where {right} is right"
        yield Candidate(
            "nonfinite",
            says,
            segment.test,
            count,
            operands(segment),
            "look at the operands in {layers}",
            observed=True,
        )


def _kinds(values: Tensor) -> str:
    kinds = {"a number": torch.isfinite, "NaN": torch.isnan, "Inf": torch.isinf}
    return " or ".join(word for word, holds in kinds.items() if bool(holds(values).any()))


def operands(segment: Segment) -> dict[str, Any]:
    """JSON entry of the first NaN or Inf: exact value, operands at its place where shapes agree, else their range."""
    first = tuple(int(i) for i in segment.new_nonfinite.nonzero()[0])
    entry: dict[str, Any] = {
        "born": int(segment.new_nonfinite.sum()),
        "first": list(first),
        "value": float(segment.test[first]),
        "oracle": float(segment.exact[first]),
    }
    for name in segment.given:
        tensor = segment.input(name)
        if tensor.shape == segment.test.shape:
            entry[f"operand {name}"] = float(tensor[first])
        elif tensor.numel():
            entry[f"range of {name}"] = [float(tensor.min()), float(tensor.max())]
    return entry
