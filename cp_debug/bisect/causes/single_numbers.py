"""Another number in a layer: an attribute, a scalar constant, a factor on a constant, a bound of one.

Each is a ``Number``: what the layer gives with it, and what is told of it. The usual values of a number are tried as
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
from cp_debug.bisect.causes.schema import EXCHANGED, of_attributes
from cp_debug.bisect.causes.segment import Segment
from cp_debug.graph.graph import Node
from cp_debug.graph.operators import PRODUCTS, QUANTIZERS, RECURRENT
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

Emulate = Callable[[float], Tensor | None]
"""The layer's result with the number."""
Tell = Callable[[float], tuple[str, str, dict[str, Any], str]]
"""(Cause, in words, evidence, fix) of the number."""


@dataclass(frozen=True)
class Number:
    """A number that a layer may have otherwise."""

    own: float
    """The declared one; NaN where there is none."""
    emulate: Emulate
    tell: Tell
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
            if not math.isclose(other, number.own, rel_tol=1e-6) and (value := number.emulate(other)) is not None:
                name, says, evidence, fix = number.tell(other)
                yield Candidate(name, says, value, 0, evidence, fix)


def by_search(segment: Segment, numbers: Iterable[Number]) -> Iterator[Candidate]:
    """The candidates of numbers that are searched for, each one fitted number."""
    for number in numbers:
        if (fit := search(segment, number.own, number.emulate, number.starts)) is not None:
            name, says, evidence, fix = number.tell(fit[0])
            yield Candidate(name, says, fit[1], 1, evidence, fix)


def epsilon(own: float, emulate: Emulate, tell: Tell) -> Number:
    """The number ε of a normalization."""
    return Number(own, emulate, tell, sorted({own, *EPSILONS, 0.1, 1.0}), EPSILONS)


def _attributes(segment: Segment, node: Node) -> Iterator[Number]:
    for name, own in attributes(segment.graph, node).items():
        if isinstance(own, float):
            yield _attribute(segment, node, name, own)


def _attribute(segment: Segment, node: Node, name: str, own: float) -> Number:
    def emulate(number: float) -> Tensor | None:
        other: dict[str, Any] = {name: number}
        return segment.edited(node, **other)

    def tell(number: float) -> tuple[str, str, dict[str, Any], str]:
        return of_attributes(node, {name: number}, {name: own})

    if name == "epsilon":
        return epsilon(own, emulate, tell)
    others = dict.fromkeys((*USUAL.get(name, ()), 0.0, 1.0, 2 * own, own / 2, -own))
    return Number(own, emulate, tell, usual=[v for v in others if abs(v - own) > 1e-6])


def _constants(segment: Segment, node: Node) -> Iterator[Number]:
    weights = constants_of(segment, node, 1)
    groups = [[place] for place, weight in weights.items() if weight.numel() > 1 and node.op not in PRODUCTS]
    if node.op in RECURRENT and {1, 2} <= weights.keys():
        groups.insert(0, [1, 2])  # of input and state
    yield from (_scalar(segment, node, place, float(w)) for place, w in weights.items() if w.numel() == 1)
    yield from (_factor(segment, node, {place: weights[place] for place in group}) for group in groups)
    for place, weight in weights.items():
        if weight.dim() > 1 and weight.numel() >= FEWEST_CUT and bool(torch.isfinite(weight).all()):
            yield from _cuts(segment, node, place, weight)


def _scalar(segment: Segment, node: Node, place: int, own: float) -> Number:
    name, argument = node.proto.input[place], argument_of(node, place)

    def emulate(number: float) -> Tensor | None:
        return segment.edited(node, inputs={place: torch.full_like(segment.context.constants[name], number)})

    def tell(number: float) -> tuple[str, str, dict[str, Any], str]:
        called = "int8-scale" if node.op in QUANTIZERS else "constant-differs"
        what = f"the constant {name} of {node.op}" if argument is None else f"{node.op}: {argument}"
        says = f"{what} is {number:.4g} instead of {own:.4g}"
        evidence = {"constant": name, "value": number, "instead_of": own}
        return called if argument is None else "attribute", says, evidence, "compare the constants of {layers}"

    def of_root(number: float) -> tuple[str, str, dict[str, Any], str]:
        says, evidence = f"eps is {number:.3g} instead of {own:.3g}", {"eps": number, "instead_of": own}
        return "normalization-eps", says, evidence, "set eps in {layers} as declared"

    readers = segment.graph.consumers.get(node.outputs[0], []) if node.op == "Add" else []
    if 0 < own <= max(EPSILONS) and any(reader.op in ROOTS for reader in readers):
        return epsilon(own, emulate, of_root)
    return Number(own, emulate, tell)


def _factor(segment: Segment, node: Node, weights: Mapping[int, Tensor]) -> Number:
    """One factor on some constants."""
    names, called = [node.proto.input[place] for place in weights], "constant-differs"
    if node.op in RECURRENT:
        called = "bias-scaled" if [*weights] == [3] else "weights-scaled" if min(weights) < 3 else called

    def tell(number: float) -> tuple[str, str, dict[str, Any], str]:
        says = f"{' and '.join(names)} of {node.op} × {number:.6g}"
        return called, says, {"constants": names, "factor": number}, "compare the weights of {layers} in both programs"

    return Number(1.0, lambda n: segment.edited(node, inputs={p: w * n for p, w in weights.items()}), tell)


def _cuts(segment: Segment, node: Node, place: int, weight: Tensor) -> Iterator[Number]:
    """Weights below some size that are zero, or beyond some size cut off at it."""
    ranked, fix = weight.abs().flatten().sort().values, "export the weights of {layers} again"
    largest, name = float(ranked[-1]), node.proto.input[place]

    def pruned(share: float) -> Tensor | None:
        if not 0 <= (first := round(share * len(ranked))) < len(ranked):
            return None
        return segment.edited(node, inputs={place: torch.where(weight.abs() < ranked[first], 0.0, weight)})

    def clipped(share: float) -> Tensor | None:
        bound = share * largest
        return segment.edited(node, inputs={place: weight.clamp(-bound, bound)}) if share > 0 else None

    def of_zeros(share: float) -> tuple[str, str, dict[str, Any], str]:
        says = f"the smallest {share:.3g} of the weights of {node.op} are zero"
        return "weights-pruned", says, {"constant": name, "share": share}, fix

    def of_ends(share: float) -> tuple[str, str, dict[str, Any], str]:
        says = f"the weights of {node.op} are clipped at ±{share * largest:.4g}"
        return "weights-clipped", says, {"constant": name, "share": share}, fix

    yield Number(0.0, pruned, of_zeros, SHARES)
    yield Number(1.0, clipped, of_ends, BOUNDS)


def _slopes(segment: Segment, node: Node) -> Iterator[Number]:
    """The slope of another activation, none of the usual ones."""
    for op in SLOPED if node.op in EXCHANGED[0] else ():
        if op != node.op:
            yield _slope(segment, node, op)


def _slope(segment: Segment, node: Node, op: str) -> Number:
    def tell(number: float) -> tuple[str, str, dict[str, Any], str]:
        says = f"{node.op} is computed as {op} with alpha = {number:.4g}"
        evidence = {"op": node.op, "test_op": op, "alpha": number}
        return "other-operator", says, evidence, f"compare both programs at {{layers}}: {says}"

    reads, own = node.proto.input[:1], 0.0 if node.op == "Relu" else math.nan
    return Number(own, lambda n: segment.edited(node, op=op, reads=reads, alpha=n), tell, USUAL["alpha"])


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
    return moved is not None and abs(segment.towards(moved)) > TENDS
