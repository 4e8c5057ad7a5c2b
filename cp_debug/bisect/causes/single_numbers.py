"""Another number in a layer: an attribute, a scalar constant, a factor on a constant, a bound of one.

Each is a ``Number``: the candidate of the layer with it. The usual values of a number are tried as
they are, without a fit; any other is found by search.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cp_debug.bisect.causes.base import Candidate, cause
from cp_debug.bisect.causes.batchnorm_parameters import EPSILONS
from cp_debug.bisect.causes.constant_changes import constants_of
from cp_debug.bisect.causes.schema import EXCHANGED, computed_as, with_attributes
from cp_debug.bisect.causes.segment import Segment
from cp_debug.graph.graph import Node
from cp_debug.graph.operators import QUANTIZERS, RECURRENT
from cp_debug.programs.node_differences import argument_of, attributes

FACTORS = (-2.0, -1.0, -0.5, 0.0, 0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0, 4.0, 10.0, 100.0)
"""Starts of the search for a number, as multiples of the declared one."""
SUMMANDS = (-3.0, -1.0, -0.3, -0.1, -0.01, 0.0, 0.01, 0.1, 0.3, 1.0, 3.0)
"""Starts of the search where the declared number is 0."""
SHARES = (0.0, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
"""Starts of the search for the share of the weights, the smallest, that are zero."""
BOUNDS = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1.0)
"""Starts of the search for a bound of the weights, in shares of the largest one."""
USUAL = {"alpha": (0.0, 0.01, 0.1, 0.2, 0.3, 1.0, 1.67326), "beta": (0.0, 0.5, 1.0), "gamma": (1.0, 1.0507)}
"""Attribute → values that frameworks have for it."""
SLOPED = ("LeakyRelu", "Elu")
"""Activations with a slope of their own, which others are taken for."""
ROOTS = {"Sqrt", "Pow", "Reciprocal"}
"""Operators before which an epsilon is added, in a normalization that is written out."""
STEPS = 24
"""Golden sections of the interval around the best start: to 1e-5 of it."""
NEWTON = 3
"""Gauss–Newton steps behind them."""
FEWEST = 8
"""Elements of a result from which one number can be told."""
FEWEST_WRONG = 3
"""Elements that must be wrong."""
FEWEST_CUT = 32
"""Weights of a constant from which a threshold among them is searched for."""
MOST = 1 << 22
"""Elements of a result up to which numbers are searched for."""
PROMISING = 0.8
"""Share of the introduced error that the best start may leave, if the search is to go on; or"""
TENDS = 0.6
"""the cosine between the error and what a small change of the number does."""
_GOLDEN = (5**0.5 - 1) / 2

With = Callable[[float], Candidate]
"""The layer with the number."""


@dataclass(frozen=True)
class Number:
    """A number that a layer may have otherwise."""

    own: float
    """The declared one; NaN where there is none."""
    candidate: With
    starts: Sequence[float] = ()
    """Numbers that a search tries first, in ascending order; without them, multiples of the declared one."""
    usual: Sequence[float] = ()
    """Values that it often has."""


@cause(costly=True, structural=True, by_node=True)
def usual(segment: Segment) -> Iterator[Candidate]:
    """Candidates: numbers of the layer with the values that they often have."""
    for node in segment.nodes:
        yield from with_usual((*_attributes(segment, node), *_constants(segment, node)))


@cause(costly=True, by_node=True)
def searched(segment: Segment) -> Iterator[Candidate]:
    """Candidates: every number that is no part of a sum or product by itself, for which least squares are enough."""
    for node in segment.nodes if is_told(segment, MOST) else ():
        for numbers in (_attributes, _constants, _slopes):
            yield from by_search(segment, numbers(segment, node))


def is_told(segment: Segment, most: int) -> bool:
    """Whether a result of up to ``most`` elements is wrong in enough of them to tell a number."""
    right = segment.test.shape == segment.exact.shape and FEWEST <= segment.test.numel() <= most
    return right and int((segment.error != 0).sum()) >= FEWEST_WRONG


def with_usual(numbers: Iterable[Number]) -> Iterator[Candidate]:
    """The candidates of numbers with their usual values, none of them fitted."""
    for number in numbers:
        for other in number.usual:  # which files hold in float32
            if not math.isclose(other, number.own, rel_tol=1e-6):
                yield number.candidate(other)


def by_search(segment: Segment, numbers: Iterable[Number]) -> Iterator[Candidate]:
    """The candidates of numbers that are searched for, each one fitted number."""
    for number in numbers:
        if (found := _searched(segment, number)) is not None:
            found.parameters = 1
            yield found


def epsilon(own: float, candidate: With) -> Number:
    """The number ε of a normalization."""
    return Number(own, candidate, sorted({own, *EPSILONS, 0.1, 1.0}), EPSILONS)


def _attributes(segment: Segment, node: Node) -> Iterator[Number]:
    for name, own in attributes(segment.graph, node).items():
        if isinstance(own, float):
            yield _attribute(segment, node, name, own)


def _attribute(segment: Segment, node: Node, name: str, own: float) -> Number:
    def candidate(number: float) -> Candidate:
        other: dict[str, Any] = {name: number}
        return with_attributes(node, other, {name: own}, segment.edited(node, **other))

    if name == "epsilon":
        return epsilon(own, candidate)
    others = dict.fromkeys((*USUAL.get(name, ()), 0.0, 1.0, 2 * own, own / 2, -own))
    return Number(own, candidate, usual=[v for v in others if abs(v - own) > 1e-6])


def _constants(segment: Segment, node: Node) -> Iterator[Number]:
    weights = constants_of(segment, node, 1)
    # Of input and state together, and each alone; of all other nodes ``tried_weights.times`` reads a factor off.
    groups = [[1, 2], *([place] for place in weights)] if node.op in RECURRENT and {1, 2} <= weights.keys() else []
    yield from (_scalar(segment, node, place, float(w)) for place, w in weights.items() if w.numel() == 1)
    yield from (_factor(segment, node, {place: weights[place] for place in group}) for group in groups)
    for place, weight in weights.items():
        if weight.dim() > 1 and weight.numel() >= FEWEST_CUT and bool(torch.isfinite(weight).all()):
            yield from _cuts(segment, node, place, weight)


def _scalar(segment: Segment, node: Node, place: int, own: float) -> Number:
    name, argument = node.proto.input[place], argument_of(node, place)

    def emulated(number: float) -> Tensor | None:
        return segment.edited(node, inputs={place: torch.full_like(segment.context.constants[name], number)})

    def candidate(number: float) -> Candidate:
        called = "int8-scale" if node.op in QUANTIZERS else "constant-differs"
        what = f"the constant {name} of {node.op}" if argument is None else f"{node.op}: {argument}"
        says = f"{what} is {number:.4g} instead of {own:.4g}"
        evidence = {"constant": name, "value": number, "instead_of": own}
        called = called if argument is None else "attribute"
        return Candidate(called, says, emulated(number), 0, evidence, "compare the constants of {layers}")

    def of_root(number: float) -> Candidate:
        says, evidence = f"eps is {number:.3g} instead of {own:.3g}", {"eps": number, "instead_of": own}
        fix = "set eps in {layers} as declared"
        return Candidate("normalization-eps", says, emulated(number), 0, evidence, fix)

    readers = segment.graph.consumers.get(node.outputs[0], []) if node.op == "Add" else []
    is_epsilon = 0 < own <= max(EPSILONS) and any(reader.op in ROOTS for reader in readers)
    return epsilon(own, of_root) if is_epsilon else Number(own, candidate)


def _factor(segment: Segment, node: Node, weights: Mapping[int, Tensor]) -> Number:
    """One factor on some constants of a recurrent layer."""
    names = [node.proto.input[place] for place in weights]
    called = "bias-scaled" if [*weights] == [3] else "weights-scaled" if min(weights) < 3 else "constant-differs"

    def candidate(number: float) -> Candidate:
        says, evidence = f"{' and '.join(names)} of {node.op} × {number:.6g}", {"constants": names, "factor": number}
        value = segment.edited(node, inputs={place: weight * number for place, weight in weights.items()})
        return Candidate(called, says, value, 0, evidence, "compare the weights of {layers} in both programs")

    return Number(1.0, candidate)


def _cuts(segment: Segment, node: Node, place: int, weight: Tensor) -> Iterator[Number]:
    """Weights below some size that are zero, or beyond some size cut off at it."""
    ranked, fix = weight.abs().flatten().sort().values, "export the weights of {layers} again"
    largest, name = float(ranked[-1]), node.proto.input[place]

    def pruned(share: float) -> Candidate:
        says, value = f"the smallest {share:.3g} of the weights of {node.op} are zero", None
        if 0 <= (first := round(share * len(ranked))) < len(ranked):
            value = segment.edited(node, inputs={place: torch.where(weight.abs() < ranked[first], 0.0, weight)})
        return Candidate("weights-pruned", says, value, 0, {"constant": name, "share": share}, fix)

    def clipped(share: float) -> Candidate:
        says, bound = f"the weights of {node.op} are clipped at ±{share * largest:.4g}", share * largest
        value = segment.edited(node, inputs={place: weight.clamp(-bound, bound)}) if share > 0 else None
        return Candidate("weights-clipped", says, value, 0, {"constant": name, "share": share}, fix)

    yield Number(0.0, pruned, SHARES)
    yield Number(1.0, clipped, BOUNDS)


def _slopes(segment: Segment, node: Node) -> Iterator[Number]:
    """The slope of another activation, none of the usual ones."""
    for op in (op for op in SLOPED if op != node.op) if node.op in EXCHANGED[0] else ():

        def candidate(alpha: float, op: str = op) -> Candidate:
            value = segment.edited(node, op=op, reads=node.proto.input[:1], alpha=alpha)
            return computed_as(node, op, value, alpha=alpha)

        yield Number(0.0 if node.op == "Relu" else math.nan, candidate, USUAL["alpha"])


def _searched(segment: Segment, number: Number) -> Candidate | None:
    """The candidate of the number that leaves least; None where none is better than the declared one."""

    def left(tried: float) -> float:
        return segment.explained(number.candidate(tried).value)[1]

    if segment.strange:
        return None
    own = number.own
    starts = number.starts or (sorted(own * f for f in FACTORS) if own else SUMMANDS)
    figures = [segment.introduced if s == own else left(s) for s in starts]
    best = min(range(len(starts)), key=figures.__getitem__)
    if figures[best] > PROMISING * segment.introduced and not _tends(segment, number):
        return None
    low, high = starts[max(best - 1, 0)], starts[min(best + 1, len(starts) - 1)]
    inner = [high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)]
    heights = [left(tried) for tried in inner]
    for _ in range(STEPS):
        if heights[0] <= heights[1]:
            high, inner[1], heights[1] = inner[1], inner[0], heights[0]
            inner[0] = high - _GOLDEN * (high - low)
            heights[0] = left(inner[0])
        else:
            low, inner[0], heights[0] = inner[0], inner[1], heights[1]
            inner[1] = low + _GOLDEN * (high - low)
            heights[1] = left(inner[1])
    nearest = min((starts[best], figures[best]), *zip(inner, heights, strict=True), key=lambda pair: pair[1])[0]
    return _refined(segment, nearest, number.candidate) if nearest != own else None


def _refined(segment: Segment, number: float, candidate: With) -> Candidate:
    """Gauss–Newton steps from where the search ended: the number that a smooth result tells, to all its digits."""
    found = candidate(number)
    for _ in range(NEWTON):
        step = 1e-4 * (abs(number) or 1.0)
        beside = candidate(number + step).value
        if beside is None or found.value is None:
            break
        slope = torch.where(segment.finite, beside - found.value, 0.0) / step
        norm = float(slope.square().sum())
        if not math.isfinite(norm) or not norm:
            break
        number += float((slope * torch.where(segment.finite, segment.test - found.value, 0.0)).sum()) / norm
        further = candidate(number)
        if not segment.explained(further.value)[1] < segment.explained(found.value)[1]:
            break
        found = further
    return found


def _tends(segment: Segment, number: Number) -> bool:
    """Whether a small change of the number moves the result where the error lies, or away from it."""
    moved = number.candidate(number.own * (1 + 1e-3) if number.own else 1e-3)
    return abs(segment.towards(moved.value)) > TENDS
