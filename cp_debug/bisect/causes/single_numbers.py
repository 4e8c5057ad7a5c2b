"""Another number in a layer: an attribute, a scalar constant, or a factor on a constant, found by search."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from cp_debug.bisect.causes.base import Candidate, cause
from cp_debug.bisect.causes.batchnorm_parameters import EPSILONS
from cp_debug.bisect.causes.constant_changes import SIZED
from cp_debug.bisect.causes.schema import FITTED, with_attributes
from cp_debug.bisect.causes.segment import Segment
from cp_debug.graph.graph import Node
from cp_debug.graph.operators import RECURRENT
from cp_debug.programs.node_differences import PRODUCTS, argument_of, attributes

FACTORS = (-2.0, -1.0, -0.5, 0.0, 0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0, 4.0, 10.0, 100.0)
"""Starts of the search for a number, as multiples of the declared one."""
SUMMANDS = (-3.0, -1.0, -0.3, -0.1, -0.01, 0.0, 0.01, 0.1, 0.3, 1.0, 3.0)
"""Starts of the search where the declared number is 0."""
STEPS = 24
"""Golden sections of the interval around the best start: to 1e-5 of it."""
NEWTON = 3
"""Gauss–Newton steps behind them."""
FEWEST = 8
"""Elements of a result from which one number can be told."""
FEWEST_WRONG = 3
"""Elements that must be wrong."""
MOST = 1 << 22
"""Elements of a result up to which numbers are searched for."""
PROMISING = 0.8
"""Share of the introduced error that the best start may leave, if the search is to go on; or"""
TENDS = 0.6
"""the cosine between the error and what a small change of the number does."""
_GOLDEN = (5**0.5 - 1) / 2

Emulate = Callable[[float], Tensor | None]
"""The layer's result with the number."""


@cause(costly=True)
def searched(segment: Segment) -> Iterator[Candidate]:
    """Candidates: every number that is no part of a sum or product by itself, for which least squares are enough."""
    wrong = int((segment.error != 0).sum())
    if not FEWEST <= segment.test.numel() <= MOST or wrong < FEWEST_WRONG or segment.test.shape != segment.exact.shape:
        return
    for node in segment.nodes:
        yield from _attributes(segment, node)
        yield from _scalars(segment, node)
        yield from _factors(segment, node)


def _attributes(segment: Segment, node: Node) -> Iterator[Candidate]:
    for name, declared in attributes(segment.graph, node).items():
        if not isinstance(declared, float) or name in FITTED.get(node.op, ()):
            continue
        starts = sorted({declared, *EPSILONS, 0.1, 1.0}) if name == "epsilon" else ()
        fit = search(segment, declared, lambda number, name=name: segment.edited(node, **{name: number}), starts)  # type: ignore[misc]
        if fit is not None:
            yield with_attributes(node, {name: fit[0]}, {name: declared}, fit[1], 1)


def _scalars(segment: Segment, node: Node) -> Iterator[Candidate]:
    for place, name in enumerate(node.proto.input if node.op not in SIZED else ()):
        weight = segment.weight(node, place)
        if weight is None or weight.numel() != 1 or not segment.context.constants[name].is_floating_point():
            continue
        declared = float(weight)

        def with_number(number: float, place: int = place, weight: Tensor = weight) -> Tensor | None:
            return segment.edited(node, inputs={place: torch.full_like(weight, number)})

        if (fit := search(segment, declared, with_number)) is not None:
            number, value = fit
            says = f"the constant {name} of {node.op} is {number:.4g} instead of {declared:.4g}"
            evidence = {"constant": name, "value": number, "instead_of": declared}
            cause_name = "int8-scale" if node.op in ("QuantizeLinear", "DequantizeLinear") else "constant-differs"
            if (argument := argument_of(node, place)) is not None:
                cause_name, says = "attribute", f"{node.op}: {argument} is {number:.4g} instead of {declared:.4g}"
            yield Candidate(cause_name, says, value, 1, evidence, "compare the constants of {layers}")


def _factors(segment: Segment, node: Node) -> Iterator[Candidate]:
    """Candidates: one factor on a constant; on a recurrent layer's weights of input and state, also together."""
    if node.op in PRODUCTS or node.op in SIZED:
        return
    constants = segment.context.constants
    weights = {
        place: weight
        for place, name in enumerate(node.proto.input)
        if (weight := segment.weight(node, place)) is not None
        and weight.numel() > 1
        and constants[name].is_floating_point()
    }
    groups = [[place] for place in weights]
    if node.op in RECURRENT and {1, 2} <= weights.keys():
        groups.insert(0, [1, 2])
    for places in groups:

        def scaled(number: float, places: list[int] = places) -> Tensor | None:
            return segment.edited(node, inputs={place: weights[place] * number for place in places})

        if (fit := search(segment, 1.0, scaled)) is None:
            continue
        factor, value = fit
        names = " and ".join(node.proto.input[place] for place in places)
        cause_name = "constant-differs"
        if node.op in RECURRENT:
            cause_name = "bias-scaled" if places == [3] else "weights-scaled" if places[0] < 3 else cause_name
        says = f"{names} of {node.op} × {factor:.6g}"
        evidence = {"constants": [node.proto.input[place] for place in places], "factor": factor}
        yield Candidate(cause_name, says, value, 1, evidence, "compare the weights of {layers} in both programs")


def search(segment: Segment, own: float, emulate: Emulate, starts: Sequence[float] = ()) -> tuple[float, Tensor] | None:
    """The number that leaves least, and the result with it, of the captured shape; None where none is better than the
    declared one, ``own``. ``starts``: numbers that are tried first, in ascending order, ``own`` among them; without
    them, multiples of it."""

    def left(number: float) -> float:
        value = emulate(number)
        return float("inf") if value is None else segment.explained(value)[1]

    if segment.strange:
        return None
    starts = starts or (sorted(own * f for f in FACTORS) if own else SUMMANDS)
    figures = [segment.introduced if s == own else left(s) for s in starts]
    best = min(range(len(starts)), key=figures.__getitem__)
    if figures[best] > PROMISING * segment.introduced and not _tends(segment, own, emulate):
        return None
    low, high = starts[max(best - 1, 0)], starts[min(best + 1, len(starts) - 1)]
    inner = [high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)]
    heights = [left(number) for number in inner]
    for _ in range(STEPS):
        if heights[0] <= heights[1]:
            high, inner[1], heights[1] = inner[1], inner[0], heights[0]
            inner[0] = high - _GOLDEN * (high - low)
            heights[0] = left(inner[0])
        else:
            low, inner[0], heights[0] = inner[0], inner[1], heights[1]
            inner[1] = low + _GOLDEN * (high - low)
            heights[1] = left(inner[1])
    number = min((starts[best], figures[best]), *zip(inner, heights, strict=True), key=lambda pair: pair[1])[0]
    value = emulate(number) if number != own else None
    return None if value is None else _refined(segment, number, value, emulate)


def _refined(segment: Segment, number: float, value: Tensor, emulate: Emulate) -> tuple[float, Tensor]:
    """Gauss–Newton steps from where the search ended: the number that a smooth result tells, to all its digits."""
    left = segment.explained(value)[1]
    for _ in range(NEWTON):
        step = 1e-4 * (abs(number) or 1.0)
        beside = emulate(number + step)
        if beside is None:
            break
        slope = torch.where(segment.finite, beside - value, 0.0) / step
        norm = float(slope.square().sum())
        if not math.isfinite(norm) or not norm:
            break
        further = number + float((slope * torch.where(segment.finite, segment.test - value, 0.0)).sum()) / norm
        result = emulate(further)
        remains = math.inf if result is None else segment.explained(result)[1]
        if result is None or not remains < left:
            break
        number, value, left = further, result, remains
    return number, value


def _tends(segment: Segment, own: float, emulate: Emulate) -> bool:
    """Whether a small change of the number moves the result where the error lies, or away from it."""
    moved = emulate(own * (1 + 1e-3) if own else 1e-3)
    if moved is None:
        return False
    change = (moved - segment.exact)[segment.finite]
    norm = float(torch.linalg.vector_norm(change)) * segment.introduced
    return norm > 0 and abs(float((change * segment.error[segment.finite]).sum())) > TENDS * norm
