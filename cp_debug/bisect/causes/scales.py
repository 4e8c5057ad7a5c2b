"""INT8 with Q/DQ pairs: a layer that does what its scales say, while one of the scales is wrong."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from cp_debug.bisect.causes.base import Candidate, cause
from cp_debug.bisect.causes.segment import Segment, as_double
from cp_debug.bisect.quantized_segment import QuantizerGrid, balanced
from cp_debug.graph.graph import Node
from cp_debug.graph.qdq import LEVELS, weight_axis
from cp_debug.probes.distance import relative_l2

_COARSE = 2.0
"""Factor above the needed scale from which a scale is called too coarse."""
_MANY = 0.5
"""Share of the numbers that a scale makes 0 from which it is too coarse for them, whatever the largest needs."""
_APART = "keep what is that large, as a mask may be, out of what is quantized, or leave it unquantized: {unquantized}"
_CALIBRATE = "calibrate on data like this ({calibrate}), or leave it unquantized: {unquantized}"


@cause(approximate=True)
def declared(segment: Segment) -> Iterator[Candidate]:
    """Candidate: the layer as its own scales say, named after the part that makes most of the error."""
    quantized = segment.context.quantized
    nodes = [segment.product] if segment.product is not None else segment.nodes
    if quantized is None or (node := next((n for n in nodes if _data(segment, n)), None)) is None:
        return
    weight, data = segment.weight(node, 1), _data(segment, node)
    place, (x, grid) = max(data.items(), key=lambda item: item[1][1].clipped(item[1][0]))
    parts = {
        "clipped": {i: x.clamp(*grid.range) for i, (x, grid) in data.items()},
        "rounded": {i: grid.value(grid.levels(x)) for i, (x, grid) in data.items()},
    }
    quantized_inputs = {i: grid.quantized(x) for i, (x, grid) in data.items()}
    of_weight = quantized.grid(node, 1) if weight is not None else None
    if weight is not None and of_weight is not None:
        quantized_inputs[1] = of_weight.quantized(weight)
        parts["weights"] = {1: quantized_inputs[1]}
    value = segment.edited(node, inputs=quantized_inputs)
    if value is None:
        return
    errors = {part: _error(segment, node, inputs) for part, inputs in parts.items()}
    worst = max(errors, key=errors.__getitem__)
    evidence: dict[str, Any] = {f"error_{part}": error for part, error in errors.items()}
    if worst == "weights" and weight is not None:
        name, says, fix = _of_weight(node, weight, of_weight)
    else:
        step, needed = float(grid.scale.flatten()[0]), float(x.abs().max()) / grid.most
        evidence |= {"scale": step, "needed_scale": needed, "clipped": grid.clipped(x)}
        present = x[x != 0]
        evidence["lost"] = float((present.abs() < step / 2).double().mean()) if present.numel() else 0.0
        name, says, fix = _of_input(worst, needed, grid, evidence)
        fitting = replace(grid, scale=grid.scale * (needed / step))
        then, now = (_error(segment, node, {**quantized_inputs, place: g.quantized(x)}) for g in (fitting, grid))
        if grid.scale.numel() == 1 and then < now:
            evidence |= {"error": now, "error_then": then}
            tried = f": a scale of {needed:.3g} brings the error of this layer from {now:.2g} to {then:.2g}"
            fix = fix.replace(" ({calibrate})", f"{tried} ({{calibrate}})")
    if name != "int8" or segment.product is not None:  # that there is a pair is no cause by itself
        yield Candidate(name, says, value, 0, evidence, fix)


def _data(segment: Segment, node: Node) -> dict[int, tuple[Tensor, QuantizerGrid]]:
    """Place of an input of ``node`` that a quantizer rounds, no constant → the input, float64, and its grid."""
    found, quantized = {}, segment.context.quantized
    for place, name in enumerate(node.proto.input[:2] if quantized is not None else ()):
        grid = quantized.grid(node, place) if quantized is not None and name else None
        if grid is None or segment.weight(node, place) is not None:
            continue
        nodes = () if name in segment.given else segment.nodes
        x = segment.context.oracle.run_nodes(nodes, segment.given, [name])[name]
        if x.is_floating_point() and grid.fits(x.shape):
            found[place] = as_double(x), grid
    return found


def _of_input(worst: str, needed: float, grid: QuantizerGrid, evidence: Mapping[str, float]) -> tuple[str, str, str]:
    kind, step = "INT16" if grid.most > LEVELS else "INT8", evidence["scale"]
    if worst == "clipped":
        ends = f"its {kind} scale {step:.3g} ends at ±{step * grid.most:.4g}"
        says = f"its input reaches {needed * grid.most:.4g}, and {ends}"
        return "int8-clipped", f"{says}: {evidence['clipped']:.2%} is clipped", _CALIBRATE
    if step > _COARSE * needed:
        says = f"the {kind} scale {step:.3g} of its input is {step / needed:.1f} times too coarse"
        return "int8-coarse", says, _CALIBRATE
    if evidence["lost"] > _MANY:
        return (
            "int8-coarse",
            f"the {kind} scale {step:.3g} of its input turns {evidence['lost']:.0%} of it into 0",
            _APART,
        )
    return "int8", f"its input is quantized to {kind} with scale {step:.3g}", _CALIBRATE


def _of_weight(node: Node, weight: Tensor, grid: QuantizerGrid | None) -> tuple[str, str, str]:
    axis = weight_axis(node, weight.dim())
    if grid is not None and grid.scale.numel() == 1:
        return "int8-per-tensor", "its weights have one INT8 scale for all channels", "quantize {layers} per channel"
    if grid is not None and grid.axis != axis:
        says = f"the INT8 scales of its weights are along axis {grid.axis}; the output channels are axis {axis}"
        return "int8-axis", says, f"quantize the weights of {{layers}} along axis {axis}"
    return "int8-weights", "the INT8 scales of its weights do not fit them", "quantize {layers} again"


def _error(segment: Segment, node: Node, inputs: dict[int, Tensor]) -> float:
    """The relative error that one part of the quantization makes by itself, over all or in the worst channels."""
    value = segment.edited(node, inputs=inputs)
    if value is None:
        return 0.0
    return max(relative_l2(value, segment.exact), balanced(value - segment.exact, segment.exact, segment.axis))
