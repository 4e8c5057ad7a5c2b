"""INT8: effects of a quantizer's grid, its range, its zero point, its granularity and its rounding of ties."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from cp_debug.bisect.causes.base import Candidate, cause
from cp_debug.bisect.causes.segment import Segment
from cp_debug.graph.operators import QUANTIZERS
from cp_debug.safe_text import some

LEVELS = 256
_PERCENTILE = "calibrate {layers} again: entropy or a higher percentile"


@cause(by_node=True, approximate=True)
def on_a_grid(segment: Segment) -> Iterator[Candidate]:
    """Candidates: the result has at most 256 equally spaced values, so it passed an INT8 quantizer."""
    grid = _grid(segment.test[segment.finite])
    exact = segment.exact
    if grid is None or segment.op in QUANTIZERS or not exact.any():
        return
    step, low, high = grid
    levels = torch.round(exact / step)
    for bottom, top, parameters in ((-128, 127, 1), (-127, 127, 1), (0, 255, 1), (low, high, 2)):
        if low < bottom or high > top:
            continue
        value = levels.clamp(bottom, top) * step
        beyond = (levels < bottom) | (levels > top)
        error = (value - exact).square()
        share = float(error[beyond].sum() / (error.sum() or 1.0))
        evidence = {
            "scale": step,
            "levels": [bottom, top],
            "clipped": float(beyond.double().mean()),
            "error_clipped": share,
        }
        evidence["needed_scale"] = needed = float(exact.abs().max()) / 127
        if share > 0.5:
            name, says, fix = "int8-clipped", f"INT8 scale {step:.3g} clips beyond ±{step * top:.4g}", _PERCENTILE
        elif step > 2 * needed:
            name, says, fix = (
                "int8-coarse",
                f"INT8 scale {step:.3g} is {step / needed:.1f} times too coarse",
                _PERCENTILE,
            )
        elif _uneven(segment):
            name, says = "int8-per-tensor", f"one INT8 scale ({step:.3g}) for channels of very different range"
            fix = "quantize {layers} per channel, or leave it unquantized"
        else:
            name, says = "int8", f"the result is quantized to INT8 with scale {step:.3g}"
            fix = "leave {layers} unquantized, or accept it: its scale is right"
        yield Candidate(name, says, value, parameters, evidence, fix)


def _grid(values: Tensor) -> tuple[float, int, int] | None:
    """(Step, lowest and highest level) of values that are multiples of one step; None where they are not."""
    distinct = torch.unique(values)
    if not 3 <= len(distinct) <= LEVELS:
        return None
    rough = float(distinct.diff().min())
    if rough <= 0:
        return None
    step = float(distinct.abs().max()) / round(float(distinct.abs().max()) / rough)
    levels = distinct / step
    if float((levels - levels.round()).abs().max()) > 0.01 or float(levels.abs().max()) > LEVELS:
        return None
    return step, int(levels.min().round()), int(levels.max().round())


def _uneven(segment: Segment) -> bool:
    """Whether the channels' largest magnitudes differ more than eightfold (the dead ones left out)."""
    if segment.exact.dim() < 2:
        return False
    largest = segment.exact.abs().amax([d for d in range(segment.exact.dim()) if d != segment.axis])
    largest = largest[largest > 0]
    return len(largest) > 1 and float(largest.max()) > 8 * float(largest.median())


@cause(by_node=True, approximate=True)
def saturated_bias(segment: Segment) -> Iterator[Candidate]:
    """Candidates: biases that are stored at INT32's end, for their scale is too small to hold them."""
    quantized = segment.context.quantized
    if quantized is None:
        return
    for node in segment.nodes:
        stored = quantized.stored_bias(node)
        channels = [] if stored is None else stored.levels.abs().ge(2**31 - 1).nonzero().flatten().tolist()
        if stored is None or not channels or len(node.proto.input) < 3:
            continue
        value = segment.edited(node, inputs={2: stored.levels * stored.scale})
        if value is not None:
            says = f"the stored bias saturates at INT32's limit in channel{'s' * (len(channels) > 1)} {some(channels)}"
            fix = "give the weights of these channels of {layers} a larger scale, or keep its bias in FP32"
            yield Candidate("bias-saturated", says, value, evidence={"channels": channels}, fix=fix)


@cause(by_node=True, approximate=True)
def quantizer(segment: Segment) -> Iterator[Candidate]:
    """Candidates: a QuantizeLinear with another scale or zero point, or that rounds ties another way."""
    node = segment.nodes[-1] if segment.nodes else None
    alone = node is not None and node.op == "QuantizeLinear" and len(segment.nodes) == 1
    if node is None or not alone or node.proto.input[0] not in segment.given:
        return
    x = segment.input(node.proto.input[0])
    scale, zero = segment.weight(node, 1), segment.weight(node, 2)
    if scale is None:
        return
    low, high = float(segment.test.min()), float(segment.test.max())
    bottom, top = (0, 255) if high > 127 else (-128, 127)
    if scale.numel() == 1:
        offset = 0.0 if zero is None else float(zero)
        levels = x / float(scale)
        near = ((levels - levels.floor()) - 0.5).abs() < 1e-4 * (1 + levels.abs())
        away = (levels.sign() * (levels.abs() + 0.5).floor() + offset).clamp(bottom, top)
        ties = {"ties": int(near.sum())}
        even = segment.exact
        yield Candidate("int8-ties", "ties are rounded away from zero", torch.where(near, away, even), 0, ties)
        flips = torch.where(near & ((segment.test - even).abs() <= 1), segment.test, even)
        yield Candidate("int8-ties", "ties are rounded to the other side", flips, int(near.sum()), ties)
    inside = (segment.test > low) & (segment.test < high)
    if int(inside.sum()) < 16:
        return
    a = torch.stack([x[inside], torch.ones_like(x[inside])], 1)
    slope, zero_point = torch.linalg.lstsq(a, segment.test[inside][:, None]).solution.flatten().tolist()
    if slope <= 0:
        return
    shift, declared = round(zero_point), float(scale.flatten()[0])
    says = f"the scale is {1 / slope:.4g} instead of {declared:.4g}"
    ways = [("int8-scale", says, 1 / slope, 2)]
    if scale.numel() == 1:
        ways.insert(0, ("int8-zero-point", f"the zero point is {shift}", declared, 1))
    for name, text, step, numbers in ways:
        value = (torch.round(x / step) + shift).clamp(bottom, top)
        yield Candidate(name, text, value, numbers, {"scale": step, "zero_point": shift}, _PERCENTILE)
