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
def made_of_numbers(segment: Segment) -> Iterator[Candidate]:
    """Candidates: a factor that overflowed, so that 0·Inf is NaN and all else Inf; NaN where the exact value is 0
    (0 ÷ 0), or throughout; and what algebra says of numbers, said of NaN and Inf: x·0 is 0, x − x is 0, x ÷ x is 1."""
    if not segment.strange:
        return
    exact, node = segment.exact, segment.nodes[-1] if segment.nodes else None
    guard = "guard the division in {layers} with an epsilon"
    for cause_name, says, value, fix in (
        # Of what the precision makes: a value that it rounds to 0, or past it, gives NaN or the other Inf.
        *(
            ("times-infinity", "the result is multiplied by Inf: its zeros become NaN", segment.claimed * infinity,
             "find the scale that is Inf: {layers}")
            for infinity in (torch.inf, -torch.inf)
        ),
        ("nan-at-zero", "NaN exactly where the result should be 0: a division of zeros",
         torch.where(exact == 0, torch.nan, exact), guard),
        ("nan-everywhere", "the whole tensor is NaN", torch.full_like(exact, torch.nan), guard),
    ):  # fmt: skip
        yield Candidate(cause_name, says, value, evidence=operands(segment), fix=fix)
    weights = (segment.weight(node, place) for place in (0, 1) if node is not None)
    zero, same = any(w is not None and not w.any() for w in weights), node is not None and len(set(node.inputs)) == 1
    for op, holds, text, number in (("Mul", zero, "x·0", 0), ("Sub", same, "x − x", 0), ("Div", same, "x ÷ x", 1)):
        if segment.op == op and holds:
            says, value = f"{text} is taken for {number} where x is NaN or Inf", torch.full_like(exact, number)
            fix = "report it, or replace NaN and Inf in front of {layers}"
            yield Candidate("folded", says, value, evidence=operands(segment), fix=fix)


@cause(costly=True)
def born_here(segment: Segment) -> Iterator[Candidate]:
    """Candidate of last resort: the place of the first NaN or Inf, and its operands."""
    if segment.strange:
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
