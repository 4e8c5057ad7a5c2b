"""Hypotheses about the inside of a region, emulated before anything is built, and ranked by the engine's result."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from graphlib import CycleError, TopologicalSorter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cp_debug.backends.arithmetic import ARITHMETICS, FP16, FP16ACC, Arithmetic, round_fp16
from cp_debug.backends.kernels import Call
from cp_debug.bisect.causes.segment import Segment, as_double
from cp_debug.errors import InputError
from cp_debug.graph.graph import Node
from cp_debug.graph.operators import MOVING, PRODUCTS

SECONDS = 60.0
"""Time that is spent on emulations of one region."""
MOST_CROSSED = 3
"""Results that are tried in each other's place at once: all orders of so many."""
LARGEST = 65504.0
"""FP16's largest number."""
REPRODUCED = 0.9
"""Share of the region's error from which on a hypothesis reproduces it."""
CERTAIN = 0.99
"""Share from which on a hypothesis other than the declared precision leaves nothing to look for."""

Deviation = Callable[[Call, Sequence[Any]], Tensor]
"""Computes a node another way, from inputs held in FP32 that are FP16 numbers."""


@dataclass(frozen=True)
class Hypothesis:
    """One way in which the region may compute, and how well it gives the captured result."""

    name: str
    says: str
    nodes: tuple[str, ...]
    """Nodes that the hypothesis is about."""
    explained: float
    """1 − ‖captured − emulated‖ ÷ ‖captured − exact‖; minus infinity where the emulation is not finite."""


def rank(segment: Segment) -> list[Hypothesis]:
    """The hypotheses that apply to a segment of many nodes, the best first.

    Those that need the longest come last and are left out when ``SECONDS`` are spent.
    """
    hypotheses: list[Hypothesis] = []
    end = time.monotonic() + SECONDS
    for name, says, nodes, emulate in _hypotheses(segment):
        if name == "left-out" and any(h.explained >= REPRODUCED and h.nodes != hypotheses[0].nodes for h in hypotheses):
            break  # one pass a node, for what is explained already
        if any(h.explained >= CERTAIN and h.name != name for h in hypotheses[1:]):
            break  # what is left is slower, and cannot explain more
        try:
            value = emulate()
        except (InputError, RuntimeError, CycleError):  # an operator that nothing here executes, or what does not fit
            continue
        if value is not None and value.shape == segment.test.shape:
            hypotheses.append(Hypothesis(name, says, tuple(n.name for n in nodes), segment.explained(value)[0]))
        if time.monotonic() > end:
            break
    return sorted(hypotheses, key=lambda h: -h.explained)


Proposed = tuple[str, str, Sequence[Node], Callable[[], Tensor | None]]


def _hypotheses(segment: Segment) -> Iterator[Proposed]:
    nodes, claim = segment.nodes, ARITHMETICS.get(segment.context.claim.name, FP16)
    ranges = survey(segment)
    yield claim.name, f"{claim.name.upper()} as declared, every result rounded", nodes, lambda: segment.claimed
    yield from crossed(segment, ranges, claim)
    if claim.name == "fp16":
        yield from _in_fp16(segment, ranges)
    for node in nodes:
        if node.op in PRODUCTS or node.op in MOVING:
            continue
        source = next((name for name in node.inputs if not segment.context.constants.holds(name)), None)
        if source is not None:
            without = partial(segment.edited, node, op="Identity", reads=[source])
            yield "left-out", f"{node.op} is left out", [node], without


def _in_fp16(segment: Segment, ranges: Mapping[str, ValueSummary]) -> Iterator[Proposed]:
    of: dict[str, list[Node]] = {}
    for node in segment.nodes:
        of.setdefault(node.op, []).append(node)
    if products := [n for op in PRODUCTS for n in of.get(op, ())]:
        yield "fp16-accumulation", "products accumulate in FP16", products, lambda: segment.run(FP16ACC)
    if out := [n for n in segment.nodes if any(o in ranges and ranges[o].largest > LARGEST for o in n.outputs)]:
        saturated = replace(FP16, value=_saturate)
        yield "saturation", "results beyond 65504 are clipped to it", out, lambda: segment.run(saturated)
    for op, deviations in DEVIATIONS.items():
        for name, says, deviate in deviations if op in of else ():
            yield name, f"{op}: {says}", of[op], partial(walk, segment, {op: deviate})
    everything = {op: deviations[0][2] for op, deviations in DEVIATIONS.items() if op in of}
    if len(everything) > 1:
        inner = [n for op in everything for n in of[op]]
        yield "fp16-inside", "all reductions in FP16 throughout", inner, lambda: walk(segment, everything)


class ValueSummary(NamedTuple):
    """Shape and magnitude of one exact value."""

    shape: tuple[int, ...]
    largest: float
    """Largest magnitude."""


def survey(segment: Segment) -> dict[str, ValueSummary]:
    """Value → shape and magnitude, for all floating-point values that the segment computes, by the oracle."""
    ranges: dict[str, ValueSummary] = {}

    def keep(name: str, value: Any) -> None:
        if isinstance(value, Tensor) and value.is_floating_point() and value.numel():
            ranges[name] = ValueSummary(tuple(value.shape), float(value.abs().max()))

    segment.context.oracle.run_nodes(segment.nodes, segment.given, [segment.target], keep)
    return ranges


def crossed(segment: Segment, ranges: Mapping[str, ValueSummary], claim: Arithmetic) -> Iterator[Proposed]:
    """Hypotheses: results of one shape and one source (Split, slices, several products) taken for each other.

    Queries, keys and values of an attention are such results. All groups of a kind are exchanged at once, as a fusion
    rule would.
    """
    made: dict[tuple[Any, ...], list[tuple[str, Node]]] = {}
    for node in segment.nodes:
        results = [name for name in node.outputs if name in ranges]
        sources = (
            [s for s in node.inputs if s in ranges or s in segment.given] if len(node.outputs) == 1 else [node.name]
        )
        for name, source in itertools.product(results, sources):
            made.setdefault((node.op, source, ranges[name].shape), []).append((name, node))
    groups: dict[tuple[str, int], list[list[tuple[str, Node]]]] = {}
    for (op, *_), group in made.items():
        if 1 < len(group) <= MOST_CROSSED and len(group[0][1].outputs) in (1, len(group)):
            groups.setdefault((op, len(group)), []).append(group)
    for (op, count), alike in groups.items():
        nodes = list(dict.fromkeys(node for group in alike for _, node in group))
        for order in itertools.islice(itertools.permutations(range(count)), 1, None):
            renamed = {group[i][0]: group[place][0] for group in alike for i, place in enumerate(order)}
            says = f"{op}: its results are exchanged, in the order {', '.join(map(str, order))}"
            yield "crossed", says, nodes, partial(_renamed, segment, renamed, claim)


def _renamed(segment: Segment, names: Mapping[str, str], claim: Arithmetic) -> Tensor:
    """The target when values have other names from where they are made on."""
    renamed = ([names.get(output, output) for output in node.proto.output] for node in segment.nodes)
    nodes = [n if o == [*n.proto.output] else n.changed(outputs=o) for n, o in zip(segment.nodes, renamed, strict=True)]
    return segment.run(claim, _ordered(nodes))


def _ordered(nodes: Sequence[Node]) -> list[Node]:
    """The nodes, each behind those whose results it reads."""
    maker = {name: node for node in nodes for name in node.outputs}
    reads = {node: [maker[name] for name in node.inputs if name in maker] for node in nodes}
    return list(TopologicalSorter(reads).static_order())


def walk(segment: Segment, deviations: Mapping[str, Deviation], arithmetic: Arithmetic = FP16) -> Tensor:
    """The segment's target in FP16, with the nodes of some operators computed another way.

    The shape is the target's, the dtype the one in which ``arithmetic`` holds values.
    """
    executor, values = segment.context.oracle.beside(arithmetic), dict(segment.given)
    for node in segment.nodes:
        if node.op not in deviations:
            values |= executor.run_nodes([node], values, node.outputs)
            continue
        values_read = executor.run_nodes([], values, node.inputs)
        call = Call(node, segment.graph.opsets.get("", 1), arithmetic, torch.device("cpu"))
        inputs = [values_read[name] if name else None for name in node.proto.input]
        values[node.outputs[0]] = deviations[node.op](call, inputs)
    return as_double(values[segment.target])


def _saturate(value: Tensor) -> Tensor:
    return round_fp16(value.clamp(-LARGEST, LARGEST)) if value.is_floating_point() else value


def _sum(x: Tensor, axes: Sequence[int]) -> Tensor:
    """A sum over ``axes`` of which every partial sum is rounded to FP16; the axes are kept."""
    moved = x.movedim([a % x.dim() for a in axes], list(range(len(axes)))).flatten(0, len(axes) - 1)
    total = torch.zeros_like(moved[0])
    for part in moved:
        total = round_fp16(total + part)
    shape = [1 if d in {a % x.dim() for a in axes} else n for d, n in enumerate(x.shape)]
    return total.reshape(shape)


def _norm(call: Call, inputs: Sequence[Any]) -> Tensor:
    x, weight, bias = (*inputs, None, None)[:3]
    axes = list(range(int(call["axis"] or -1) % x.dim(), x.dim()))
    count = math.prod(x.shape[a] for a in axes)
    centred = round_fp16(x - round_fp16(_sum(x, axes) / count))
    variance = round_fp16(_sum(round_fp16(centred * centred), axes) / count)
    deviation = round_fp16(round_fp16(variance + round_fp16(torch.tensor(float(call["epsilon"] or 1e-5)))).sqrt())
    y = round_fp16(centred / deviation)
    y = y if weight is None else round_fp16(y * weight)
    return y if bias is None else round_fp16(y + bias)


def _softmax(shifted: bool) -> Deviation:
    def compute(call: Call, inputs: Sequence[Any]) -> Tensor:
        x, axis = inputs[0], int(-1 if call["axis"] is None else call["axis"])
        y = round_fp16(x - x.amax(axis, keepdim=True)) if shifted else x
        y = round_fp16(y.exp())
        return round_fp16(y / _sum(y, [axis]))

    return compute


def _reduce(divide: bool) -> Deviation:
    def compute(call: Call, inputs: Sequence[Any]) -> Tensor:
        x = inputs[0]
        axes = call.ints("axes", inputs[1] if len(inputs) > 1 else None) or list(range(x.dim()))
        total = _sum(x, axes)
        total = round_fp16(total / math.prod(x.shape[a] for a in axes)) if divide else total
        keepdims = call["keepdims"] is None or bool(call["keepdims"])
        return total if keepdims else total.squeeze(tuple(a % x.dim() for a in axes))

    return compute


DEVIATIONS: Mapping[str, Sequence[tuple[str, str, Deviation]]] = {
    "LayerNormalization": [("fp16-normalization", "mean, squares and their sum in FP16", _norm)],
    "ReduceMean": [("fp16-reduction", "sums in FP16", _reduce(True))],
    "ReduceSum": [("fp16-reduction", "sums in FP16", _reduce(False))],
    "Softmax": [
        ("fp16-softmax", "exponentials and their sum in FP16", _softmax(True)),
        ("softmax-overflow", "the largest value is not subtracted before the exponential", _softmax(False)),
    ],
}
"""Operator → (name, what it does, how) of what kernels are known to do in FP16."""
