"""What may go on inside a region, emulated before anything is built: which of it gives what the engine gave."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from cp_debug.backends.arithmetic import ARITHMETICS, FP16, FP16ACC, Arithmetic
from cp_debug.backends.executor import Executor
from cp_debug.backends.kernels import Call
from cp_debug.backends.rounding import round_fp16
from cp_debug.bisect.causes.segment import Segment, as_double
from cp_debug.bisect.regions.region import HEAVY, MOVING
from cp_debug.errors import InputError
from cp_debug.probes.graph import Node

SECONDS = 60.0
"""Time that is spent on emulations of one region."""
LARGEST, SMALLEST = 65504.0, 2.0**-25
"""FP16's largest number, and the magnitude up to which a number becomes zero."""
REPRODUCED = 0.9
"""Share of the region's error from which on a hypothesis reproduces it."""

Deviation = Callable[[Call, Sequence[Any]], Tensor]
"""Computes a node another way, from inputs held in FP32 that are FP16 numbers."""


@dataclass(frozen=True)
class Hypothesis:
    """One way in which the region may compute, and how well it gives the captured result."""

    name: str
    says: str
    nodes: tuple[str, ...]
    """Those that it is about."""
    explained: float
    """1 − ‖captured − emulated‖ ÷ ‖captured − exact‖; minus infinity where the emulation is not finite."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe but for infinities."""
        return asdict(self)


def rank(segment: Segment) -> list[Hypothesis]:
    """The hypotheses that apply to a segment of many nodes, the best first.

    Those that need the longest come last and are left out when ``SECONDS`` are spent.
    """
    found, end = [], time.monotonic() + SECONDS
    for name, says, nodes, emulate in _hypotheses(segment):
        try:
            value = emulate()
        except (InputError, RuntimeError):  # an operator that nothing here executes, or shapes that do not fit
            continue
        if value.shape == segment.test.shape:
            found.append(Hypothesis(name, says, tuple(n.name for n in nodes), segment.explained(value)[0]))
        if time.monotonic() > end:
            break
    return sorted(found, key=lambda h: -h.explained)


Proposed = tuple[str, str, Sequence[Node], Callable[[], Tensor]]


def _hypotheses(segment: Segment) -> Iterator[Proposed]:
    nodes, claim = segment.nodes, ARITHMETICS.get(segment.lab.claim.name, FP16)
    of = _by_operator(nodes)
    products = [n for op in HEAVY for n in of.get(op, ())]
    yield claim.name, f"{claim.name.upper()} as declared, every result rounded", nodes, lambda: segment.claimed
    if claim.name != "fp16":
        return
    if products:
        yield "fp16-accumulation", "products accumulate in FP16", products, lambda: segment.run(FP16ACC)
    if out := _beyond(segment):
        saturated = replace(FP16, value=_saturate)
        yield "overflow", "results beyond 65504 become infinite", out, lambda: segment.claimed
        yield "saturation", "results beyond 65504 are cut to it", out, lambda: segment.run(saturated)
    if constants := _constants(segment):
        yield "constant-out-of-range", "a constant leaves FP16's range", constants, lambda: segment.claimed
    for op, deviations in DEVIATIONS.items():
        for name, says, deviate in deviations if op in of else ():
            yield name, f"{op}: {says}", of[op], lambda op=op, f=deviate: walk(segment, {op: f})  # type: ignore[misc]
    everything = {op: deviations[0][2] for op, deviations in DEVIATIONS.items() if op in of}
    if len(everything) > 1:
        inner = [n for op in everything for n in of[op]]
        yield "fp16-inside", "all reductions in FP16 throughout", inner, lambda: walk(segment, everything)
    for node in nodes:
        if node.op in HEAVY or node.op in MOVING:
            continue
        for source in node.inputs:
            if not segment.lab.constants.holds(source):
                yield "left-out", f"{node.op} is left out", [node], lambda n=node, s=source: _left_out(segment, n, s)  # type: ignore[misc]
                break


def _by_operator(nodes: Sequence[Node]) -> dict[str, list[Node]]:
    found: dict[str, list[Node]] = {}
    for node in nodes:
        found.setdefault(node.op, []).append(node)
    return found


def _left_out(segment: Segment, node: Node, source: str) -> Tensor:
    value = segment.edited(node, op="Identity", reads=[source])
    if value is None:
        raise InputError(f"{node.name} changes the shape")
    return value


def largest(segment: Segment) -> dict[str, float]:
    """Value → its largest exact magnitude, for all floating-point values that the segment computes."""
    names = [o for node in segment.nodes for o in node.outputs]
    results = segment.lab.oracle.run_nodes(segment.nodes, segment.given, names)
    return {n: float(v.abs().max()) for n, v in results.items() if torch.is_floating_point(v) and v.numel()}


def _beyond(segment: Segment) -> list[Node]:
    found = largest(segment)
    return [n for n in segment.nodes if any(found.get(o, 0.0) > LARGEST for o in n.outputs)]


def _constants(segment: Segment) -> list[Node]:
    """Readers of constants that FP16 cannot hold: too large, or all zero once stored."""
    found = []
    for node in segment.nodes:
        for place, name in enumerate(node.proto.input):
            if name and node.op not in MOVING and (value := segment.weight(node, place)) is not None and value.numel():
                top = float(value.abs().max())
                if math.isfinite(top) and (top > LARGEST or 0 < top <= SMALLEST):
                    found.append(node)
    return found


def walk(segment: Segment, deviations: Mapping[str, Deviation], arithmetic: Arithmetic = FP16) -> Tensor:
    """The segment's target in FP16, with the nodes of some operators computed another way."""
    executor: Executor = segment.lab.executor(arithmetic)
    values: dict[str, Any] = dict(segment.given)
    later = {name for node in segment.nodes for name in node.inputs} | {segment.target}
    pending: list[Node] = []

    def flush() -> None:
        wanted = [o for node in pending for o in node.outputs if o in later]
        values.update(executor.run_nodes(pending, values, wanted))
        pending.clear()

    for node in segment.nodes:
        if node.op not in deviations:
            pending.append(node)
            continue
        flush()
        given = executor.run_nodes([], values, node.inputs)
        call = Call.of(node, segment.graph.opsets.get("", 1), arithmetic, torch.device("cpu"))
        inputs = [given[name] if name else None for name in node.proto.input]
        values[node.outputs[0]] = deviations[node.op](call, inputs)
    flush()
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
        kept = call["keepdims"] is None or bool(call["keepdims"])
        return total if kept else total.squeeze(tuple(a % x.dim() for a in axes))

    return compute


DEVIATIONS: Mapping[str, Sequence[tuple[str, str, Deviation]]] = {
    "LayerNormalization": [("fp16-normalization", "mean, squares and their sum in FP16", _norm)],
    "ReduceMean": [("fp16-reduction", "sums in FP16", _reduce(True))],
    "ReduceSum": [("fp16-reduction", "sums in FP16", _reduce(False))],
    "Softmax": [
        ("fp16-softmax", "exponentials and their sum in FP16", _softmax(True)),
        ("softmax-overflow", "the largest value is not taken off before the exponential", _softmax(False)),
    ],
}
"""Operator → (name, what it does, how) of what kernels are known to do in FP16."""
