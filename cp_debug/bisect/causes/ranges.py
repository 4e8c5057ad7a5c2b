"""Numbers beyond what a type holds: overflow, underflow, flushed subnormals, saturation, whole numbers cut off."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import onnx
import torch
from torch import Tensor

from cp_debug.backends.arithmetic import ARITHMETICS, FP16, FP64, round_fp16
from cp_debug.bisect.causes.base import Candidate, cause
from cp_debug.bisect.causes.precision import OVERFLOWS
from cp_debug.bisect.causes.segment import Segment, as_double
from cp_debug.bisect.verdict import RANGE
from cp_debug.graph.graph import Node
from cp_debug.probes.distance import zeros_differ
from cp_debug.programs.precision import PRECISIONS

HALF = PRECISIONS["fp16"]
SMALLEST = 2.0**-24
"""The smallest subnormal of FP16."""

SMALLEST_NORMAL = 2.0**-126
"""The smallest normal number of FP32."""

TINY = 64
"""Elements up to which a single one at a bound is no evidence for the bound."""
FEWEST_CUT = 3
"""Elements that must be at a bound there."""

RESCALE = "scale the layer down and its reader up, or keep these nodes in FP32: {layers}"
BEYOND_FP16 = frozenset(("fp16-flush", "fp16-overflow", "fp16-underflow"))
"""Causes against which keeping nodes in FP32 is tried, where FP16 is emulated."""


def half_figures(exact: Tensor) -> dict[str, float]:
    """Range of a tensor against FP16: its largest magnitude, and the shares that overflow, vanish or are subnormal.

    ``exact`` has any shape and a float dtype; shares are of its finite elements that are not 0.
    """
    size = exact.abs()
    present = where(torch.isfinite(size) & (size > 0), size)
    count = max(present.numel(), 1)
    return {
        "largest": float(present.max()) if present.numel() else 0.0,
        "overflows": float((present >= OVERFLOWS).sum()) / count,
        "vanishes": float((present <= SMALLEST / 2).sum()) / count,
        "subnormal": float(((present > SMALLEST / 2) & (present < HALF.tiniest)).sum()) / count,
    }


def where(chosen: Tensor, values: Tensor) -> Tensor:
    """The values where ``chosen`` is true, of the same shape, in one row; without a copy where all are."""
    return values.flatten() if bool(chosen.all()) else values[chosen]


@cause(approximate=True)
def steps(segment: Segment) -> Iterator[Candidate]:
    """Candidates: a step inside the layer leaves the range of FP32, although its result lies within it: the squares of
    a standard deviation of 1e25 or of 1e-25."""
    if segment.context.claim.name != "fp32" or len(segment.nodes) < 2:
        return
    exact: dict[str, Tensor] = {}
    wanted = [name for node in segment.nodes for name in node.outputs]
    segment.context.oracle.run_nodes(segment.nodes, segment.given, wanted, lambda n, t: exact.update({n: as_double(t)}))
    for node in segment.nodes:
        value = exact.get(node.outputs[0])
        if node.outputs[0] == segment.target or value is None or not bool(torch.isfinite(value).all()):
            continue
        held, size = value.float(), value.abs()
        word = "overflow" if bool(held.isinf().any()) else "underflow"
        if word == "overflow" or (bool(size.any()) and not bool(held.any())):
            ends = "ends at 3.4e38" if word == "overflow" else "has 0 below 1.4e-45"
            told = f"reaches {float(size.max()):.3g}, and FP32 {ends}"
            fix = "scale what {layers} reads, or compute it in FP64"
            evidence = {"node": node.name, "largest": float(size.max())}
            says = f"FP32 {word} within the layer: {node.op} {told}"
            yield Candidate(f"fp32-{word}", says, segment.claimed, 0, evidence, fix, heard=True, declared=True)
            return


@cause(approximate=True)
def overflow(segment: Segment) -> Iterator[Candidate]:
    """Candidates: the exact result is finite, but beyond FP16."""
    figures = half_figures(segment.exact)
    if figures["overflows"]:
        says = f"FP16 overflow: values up to {figures['largest']:.3g}, the largest FP16 number is 65504"
        claimed = segment.context.claim.name.startswith("fp16")  # any Inf looks like any other one
        for value in (
            round_fp16(segment.exact.float()).double(),
            segment.run(FP16) if segment.nodes else segment.exact,
        ):
            yield Candidate("fp16-overflow", says, value, 0, figures, RESCALE, heard=claimed, declared=claimed)
        clamped = segment.exact.clamp(-HALF.largest, HALF.largest)
        says = says.replace("overflow", "overflow, saturated")
        yield Candidate("fp16-overflow", says, clamped, evidence=figures, fix=RESCALE)


@cause(approximate=True)
def operand_overflow(segment: Segment) -> Iterator[Candidate]:
    """Candidates: what the layer reads, an input of the network or a constant, is beyond FP16 already."""
    constants = {node.proto.input[place]: weight for node, place, weight in _constants(segment)}
    inputs = {name: segment.input(name) for name in segment.given}
    fed, claimed = {info.name for info in segment.graph.inputs}, segment.context.claim.name.startswith("fp16")
    for name, tensor in {**inputs, **constants}.items():
        figures = half_figures(tensor) if tensor.is_floating_point() else {"overflows": 0.0}
        if figures["overflows"]:
            what = "constant" if name in constants else "network's input" if name in fed else "operand"
            says = f"the {what} {name} is beyond FP16: values up to {figures['largest']:.3g}, FP16 ends at 65504"
            fix = f"scale {name} down, or keep its readers in FP32: {{layers}}"
            evidence, value = {**figures, "of": name}, segment.run(FP16)
            yield Candidate("fp16-overflow", says, value, 0, evidence, fix, heard=claimed, declared=claimed)


@cause(approximate=True)
def underflow(segment: Segment) -> Iterator[Candidate]:
    """Candidates: numbers below FP16's normal ones lose bits or vanish, in the result or in the weights."""
    value = ARITHMETICS[segment.context.claim.name].value if segment.context.claim.name in ARITHMETICS else None
    if value is None or not segment.context.claim.name.startswith("fp16"):
        yield from _undeclared(segment)
        return
    weights = ((f"weights of {node.name}", weight) for node, _, weight in _constants(segment))
    for tensor_name, exact in (*weights, ("result", segment.exact)):
        stored = value(exact.float()).double()
        lost = stored - exact
        finite = torch.isfinite(lost)
        loss = float(torch.linalg.vector_norm(lost[finite]) / (torch.linalg.vector_norm(exact[finite]) or 1.0))
        figures = half_figures(exact)
        small = figures["vanishes"] + figures["subnormal"]
        gone = tensor_name == "result" and zeros_differ(exact, stored)  # one is enough, where somebody divides by it
        if gone or (loss > RANGE * HALF.roundoff and small > 0.01):
            if exact.numel() == 1 and tensor_name != "result":
                constant = tensor_name.replace("weights", "constant")
                says = f"FP16 underflow: the {constant}, {float(exact):.3g}, is {float(stored):.3g} in FP16"
            elif gone and small <= 0.01:
                least = float(exact[exact != 0].abs().min())
                says = f"FP16 underflow: {least:.3g} and other numbers of the result are 0 in FP16"
            else:
                says = f"FP16 underflow: {small:.0%} of the {tensor_name} lie below the smallest normal FP16 number"
            evidence = {**figures, "of": tensor_name, "storage_loss": loss}
            given = segment.claimed
            yield Candidate("fp16-underflow", says, given, 0, evidence, RESCALE, heard=True, declared=True)


def _undeclared(segment: Segment) -> Iterator[Candidate]:
    """Candidates: the same where FP16 is not declared, if it leaves nothing of the result or of a constant."""
    figures = half_figures(segment.exact)
    if figures["vanishes"] == 1 and figures["largest"] >= SMALLEST_NORMAL:  # else FP32 itself may flush it
        says = f"FP16 underflow: all of the result, up to {figures['largest']:.3g}, lies below the smallest FP16 number"
        value = torch.zeros_like(segment.exact)
        yield Candidate("fp16-underflow", says, value, evidence={**figures, "of": "result"}, fix=RESCALE, heard=True)
    for node, place, weight in _constants(segment):
        figures, name = half_figures(weight), node.proto.input[place]
        if figures["vanishes"] == 1:
            says = f"FP16 underflow: the constant {name} of {node.op}, up to {figures['largest']:.3g}, is 0 in FP16"
            without = segment.edited(node, inputs={place: 0 * weight})
            yield Candidate("fp16-underflow", says, without, 0, {**figures, "of": name}, RESCALE, heard=True)


@cause(approximate=True)
def flushed(segment: Segment) -> Iterator[Candidate]:
    """Candidates: the hardware writes 0 for subnormal numbers."""
    half = round_fp16(segment.exact.float()).double()
    small = half.abs() < HALF.tiniest
    if bool((small & (half != 0)).any()):
        says = "FP16 subnormals are flushed to zero"
        value = torch.where(small, 0.0, half)
        yield Candidate("fp16-flush", says, value, evidence=half_figures(segment.exact), fix=RESCALE)
    subnormal = segment.exact.abs() < SMALLEST_NORMAL
    if bool((subnormal & (segment.exact != 0)).any()):
        share = float(subnormal.double().mean())
        says = f"FP32 subnormals are flushed to zero: {share:.0%} of the result lie below {SMALLEST_NORMAL:.3g}"
        value = torch.where(subnormal, 0.0, segment.exact)
        fix = "scale {layers} up, or let the processor keep subnormals (session.set_denormal_as_zero = 0)"
        yield Candidate("fp32-flush", says, value, evidence={"share": share}, fix=fix, heard=bool(subnormal.all()))


@cause(approximate=True)
def saturated(segment: Segment) -> Iterator[Candidate]:
    """Candidates: the result stops at a bound that the exact one passes, on one side or both."""
    captured = segment.test[segment.finite]
    if not captured.numel():
        return
    low, high = float(captured.min()), float(captured.max())
    largest = max(abs(low), abs(high))
    bounds = ((-largest, largest, 1), (-torch.inf, high, 1), (low, torch.inf, 1), (low, high, 2))
    for lower, upper, parameters in bounds:
        cut = (segment.exact < lower) | (segment.exact > upper)
        count = int((cut & segment.finite).sum())
        if count < (1 if cut.numel() > TINY else FEWEST_CUT) or count == int(segment.finite.sum()):
            continue  # a result that is cut off everywhere is a constant, of whatever origin
        evidence = {"low": lower, "high": upper, "share": float(cut.double().mean())}
        says, value = f"the result is clipped at {largest:.4g}", segment.exact.clamp(lower, upper)
        fix = "widen the bound: calibrate with a higher percentile, or remove the clip of {layers}"
        yield Candidate("saturated", says, value, parameters, evidence, fix)


def _constants(segment: Segment) -> Iterator[tuple[Node, int, Tensor]]:
    """Every constant of fractions that a node reads: the node, its place and the constant."""
    for node in segment.nodes:
        for place, name in enumerate(node.proto.input):
            weight = segment.weight(node, place)
            if weight is not None and segment.context.constants[name].is_floating_point():
                yield node, place, weight


_ENDS = -(1 << 31), (1 << 31) - 1
_MOST = 1 << 62
"""Magnitude below which FP32's nearest number is an INT64."""

_Way = Callable[[Tensor], Tensor]


def _wraps(value: Tensor) -> Tensor:
    return (((value.long() - _ENDS[0]) & 0xFFFFFFFF) + _ENDS[0]).to(value.dtype)


def _saturates(value: Tensor) -> Tensor:
    return value.clamp(*_ENDS)


def _becomes_smallest(value: Tensor) -> Tensor:
    """What x86 makes of floats beyond INT32."""
    return torch.where(value == value.clamp(*_ENDS), value, _ENDS[0])


def _loses_digits(value: Tensor) -> Tensor:
    return value.long().clamp(-_MOST, _MOST).float().long().to(value.dtype)


_WORDS: dict[_Way, str] = {
    _wraps: "wraps",
    _saturates: "saturates",
    _becomes_smallest: f"becomes {_ENDS[0]}",
    _loses_digits: "loses digits",
}
_IN_INT32 = "INT64 is computed in INT32, which ends at 2³¹"
_TYPES: tuple[tuple[str, str, _Way, _Way, _Way], ...] = (
    *(("int32-overflow", _IN_INT32, _wraps, _saturates, way) for way in (_wraps, _saturates, _becomes_smallest)),
    ("fp32-integers", "integers are computed in FP32, which holds them up to 2²⁴", *3 * (_loses_digits,)),
)
"""Cause, its words, and what becomes of data, constants and results."""


@cause()
def narrower(segment: Segment) -> Iterator[Candidate]:
    """Candidates: integers that are read, stored or computed are no longer what they were in a narrower type."""
    given = {name: FP64.hold(value, "cpu") for name, value in segment.given.items()}
    held = segment.context.constants
    constants = {name: held[name] for node in segment.nodes for name in node.inputs if held.holds(name)}
    casts = any(node.op == "Cast" and node.attribute("to", 0) == onnx.TensorProto.INT64 for node in segment.nodes)
    if not casts and not any(map(_is_integer, given.values())):
        return  # constants alone are axes, shapes
    for name, says, of_data, of_constants, of_results in _TYPES:
        changes: dict[str, None] = {}

        def changed(values: dict[str, Any], way: _Way, what: str, changes: dict[str, None] = changes) -> dict[str, Any]:
            new = {n: way(v) if _is_integer(v) else v for n, v in values.items()}
            lost = [n for n, v in values.items() if _is_integer(v) and not torch.equal(new[n], v)]
            changes |= dict.fromkeys(f"{what.format(n)} {_WORDS[way]}" for n in lost)
            return new

        values = changed(constants, of_constants, "the constant {}") | changed(given, of_data, "{}")
        for node in segment.nodes:
            results = segment.context.oracle.run_nodes([node], values, node.outputs)
            values |= changed(results, of_results, f"the result of {node.op}")
        if changes:
            value, limit = as_double(values[segment.target]), says.split()[-1]
            fix = f"keep integers of {{layers}} below {limit}, or compute them outside the network"
            yield Candidate(name, f"{says}: {', '.join(changes)}", value, fix=fix, heard=True)


def _is_integer(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype in (torch.int32, torch.int64)
