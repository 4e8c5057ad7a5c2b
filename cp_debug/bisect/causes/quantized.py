"""INT8: a quantizer's grid, range, zero point, granularity and ties; scales that are wrong; sums that saturate.

With Q/DQ pairs a layer may do what its scales say, while one of them is wrong. Sums of products saturate in 16 bits on
processors without VNNI.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from cp_debug.backends.kernels.paired_sums import INTEGER_PRODUCTS, PAIRED, with_paired_sums
from cp_debug.bisect.causes.base import Candidate, cause
from cp_debug.bisect.causes.segment import Segment, as_double, l2
from cp_debug.bisect.file_quantization import FileQuantization
from cp_debug.bisect.quantized_segment import Levels, QuantizerGrid, balanced
from cp_debug.errors import InputError
from cp_debug.graph.graph import Node
from cp_debug.graph.operators import PRODUCTS, QUANTIZERS
from cp_debug.graph.qdq import LEVELS, weight_axis
from cp_debug.probes.distance import relative_l2
from cp_debug.safe_text import some

MOST_LEVELS = 256
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
                f"calibrate {{layers}} again, on data like this: a scale of {needed:.3g}",
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
    if not 3 <= len(distinct) <= MOST_LEVELS:
        return None
    rough = float(distinct.diff().min())
    if rough <= 0:
        return None
    step = float(distinct.abs().max()) / round(float(distinct.abs().max()) / rough)
    levels = distinct / step
    if float((levels - levels.round()).abs().max()) > 0.01 or float(levels.abs().max()) > MOST_LEVELS:
        return None
    return step, int(levels.min().round()), int(levels.max().round())


def _uneven(segment: Segment) -> bool:
    """Whether the channels' largest magnitudes differ by much (the dead ones left out)."""
    if segment.exact.dim() < 2:
        return False
    largest = segment.exact.abs().amax([d for d in range(segment.exact.dim()) if d != segment.axis])
    largest = largest[largest > 0]
    return len(largest) > 1 and float(largest.max()) > UNEVEN * float(largest.median())


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
        says = f"the stored bias saturates at INT32's limit in channel{'s' * (len(channels) > 1)} {some(channels)}"
        fix = "give the weights of these channels of {layers} a larger scale, or keep its bias in FP32"
        yield Candidate("bias-saturated", says, value, evidence={"channels": channels}, fix=fix)


@cause(by_node=True, approximate=True)
def quantizer(segment: Segment) -> Iterator[Candidate]:
    """Candidates: a QuantizeLinear with another zero point, or that rounds ties another way."""
    node = segment.nodes[0] if segment.op == "QuantizeLinear" and len(segment.nodes) == 1 else None
    scale = segment.weight(node, 1) if node is not None else None
    if node is None or scale is None or scale.numel() > 1 or node.proto.input[0] not in segment.given:
        return
    x, zero, even = segment.input(node.proto.input[0]), segment.weight(node, 2), segment.exact
    low, high = float(segment.test.min()), float(segment.test.max())
    bottom, top = (0, 255) if high > 127 else (-128, 127)
    offset, levels = 0.0 if zero is None else float(zero), x / float(scale)
    near = ((levels - levels.floor()) - 0.5).abs() < 1e-4 * (1 + levels.abs())
    away = (levels.sign() * (levels.abs() + 0.5).floor() + offset).clamp(bottom, top)
    ties = {"ties": int(near.sum())}
    yield Candidate("int8-ties", "ties are rounded away from zero", torch.where(near, away, even), 0, ties)
    flips = torch.where(near & ((segment.test - even).abs() <= 1), segment.test, even)
    yield Candidate("int8-ties", "ties are rounded to the other side", flips, int(near.sum()), ties)
    inside = (segment.test > low) & (segment.test < high)
    if bool(inside.any()):
        shift = round(float((segment.test - levels)[inside].mean()))
        value = (torch.round(levels) + shift).clamp(bottom, top)
        evidence = {"scale": float(scale), "zero_point": shift}
        yield Candidate("int8-zero-point", f"the zero point is {shift}", value, 1, evidence, _PERCENTILE)


_COARSE = 2.0
"""Factor above the needed scale from which a scale is called too coarse."""
_MANY = 0.5
"""Share of the numbers that a scale makes 0 from which it is too coarse for them, whatever the largest needs."""
MAIN = 0.5
"""Share of a layer's error that one of its parts makes, or is left without it, above which it is the main cause."""
UNEVEN = 8.0
"""Factor between the largest channel and the middle one from which they are uneven, and by which a scale for each must
make an error smaller to be the reason of it."""
_RESULT = -1
"""Place of a node's result beside those of its inputs."""
_APART = "keep what is that large, as a mask may be, out of what is quantized, or leave it unquantized: {unquantized}"
_CALIBRATE = "calibrate on data like this ({calibrate}), or leave it unquantized: {unquantized}"


@cause(approximate=True)
def declared(segment: Segment) -> Iterator[Candidate]:
    """Candidate: the layer as its own scales say, named after the part that makes most of the error."""
    if (quantized := segment.context.quantized) is None or not segment.nodes:
        return
    node, on_levels = _on_levels(segment, quantized)
    weight = segment.weight(node, 1)
    of_weight = on_levels.pop(1, (weight, None))[1] if weight is not None else None
    of_result = on_levels.get(_RESULT, (None, None))[1]
    quantized_inputs = {place: grid.quantized(x) for place, (x, grid) in on_levels.items() if place != _RESULT}
    if of_result is not None and not segment.product:
        # Where the reference has an activation in front of it, that one quantizer was taken for the input's.
        on_levels = {p: each for p, each in on_levels.items() if p == _RESULT or not each[1].equals(of_result)}
    errors = {
        (part, place): _error(segment, node, {place: value})
        for place, (x, grid) in on_levels.items()
        for part, value in (("clipped", x.clamp(*grid.range)), ("rounded", grid.value(grid.levels(x))))
    }
    if weight is not None and of_weight is not None:
        quantized_inputs[1] = of_weight.quantized(weight)
        if quantized.made_here:  # else one scale for all channels may be what somebody chose
            errors["weights", 1] = _error(segment, node, {1: quantized_inputs[1]})
    value = segment.edited(node, inputs=quantized_inputs) if errors else None  # the choice of weights is no cause
    if value is None:
        return
    value = on_levels[_RESULT][1].quantized(value) if _RESULT in on_levels else value
    worst, place = max(errors, key=errors.__getitem__)
    moved = on_levels[place][1].moved(on_levels[place][0]) if worst == "clipped" else None
    # By the file's own nodes, which hold quantizers further inside, and may lack an activation that the range replaces.
    whole = quantized.declared(segment.target, segment.given.keys(), segment.given)
    if whole is not None and whole.shape == segment.exact.shape:
        whole = as_double(whole)
        if moved is not None or errors[worst, place] >= MAIN * relative_l2(whole, segment.exact):
            value = whole
    evidence: dict[str, Any] = {}
    for (part, _), error in errors.items():
        evidence[f"error_{part}"] = max(error, evidence.get(f"error_{part}", 0.0))
    if worst == "weights" and weight is not None:
        name, says, fix = _of_weight(node, weight, of_weight)
    else:
        x, grid = on_levels[place]
        fitting = moved or grid.fitted(x)
        step, needed = (float(g.scale.flatten()[0]) for g in (grid, fitting))
        evidence |= {"scale": step, "needed_scale": needed, "clipped": grid.clipped(x)}
        present = x[x != 0]
        evidence["lost"] = float((present.abs() < step / 2).double().mean()) if present.numel() else 0.0
        better = f"a scale of {needed:.3g}"
        if moved is not None:
            evidence["zero_point"], evidence["needed_zero_point"] = (int(each.zero) for each in (grid, moved))
            better = f"a zero point of {int(moved.zero)} in place of {int(grid.zero)}"
        name, says, fix = _of_data(worst, x, grid, evidence, "result" if place == _RESULT else "input")
        then, now = (_error(segment, node, {**quantized_inputs, place: g.quantized(x)}) for g in (fitting, grid))
        now = max(now, relative_l2(value, segment.exact)) if moved else now
        if grid.scale.numel() == 1 and then < now:
            evidence |= {"error": now, "error_then": then}
            tried = f": {better} brings the error of this layer from {now:.2g} to {then:.2g}"
            fix = fix.replace(" ({calibrate})", f"{tried} ({{calibrate}})")
    if name != "int8" or segment.product is not None:  # that there is a pair is no cause by itself
        yield Candidate(name, says, value, 0, evidence, fix, declared=True)


def _on_levels(segment: Segment, quantized: FileQuantization) -> tuple[Node, dict[int, tuple[Tensor, QuantizerGrid]]]:
    """The node of a layer whose data a quantizer rounds, and place of each input that one rounds, ``_RESULT`` for the
    result → its numbers, float64, and its grid."""
    for node in [segment.product] if segment.product else segment.nodes:
        found = dict[int, tuple[Tensor, QuantizerGrid]]()
        for place, name in enumerate(node.proto.input[:2]):
            x = segment.weight(node, place)
            grid = quantized.grid(node, place, segment.nodes) if name and (x is None or place) else None
            if grid is not None and x is None:
                nodes = () if name in segment.given else segment.nodes
                x = segment.context.oracle.run_nodes(nodes, segment.given, [name])[name]
            if grid is not None and x is not None and x.is_floating_point() and grid.fits(x.shape):
                found[place] = as_double(x), grid
        if any(segment.weight(node, place) is None for place in found):
            break
    of_result = quantized.result_grid(segment.target)
    if of_result is not None and of_result.fits(segment.exact.shape):
        found[_RESULT] = segment.exact, of_result
    return node, found


def outliers(segment: Segment) -> tuple[str, str]:
    """Which channels take the levels of the one scale that serves all, and what helps, both in words; empty where a
    scale for each channel would not make the layer's error much smaller."""
    best, product = (0.0, "", ""), segment.product
    if (quantized := segment.context.quantized) is None or not segment.nodes:
        return best[1:]
    node, on_levels = _on_levels(segment, quantized)
    for place, (x, grid) in on_levels.items():
        what, axis = "its result" if place == _RESULT else "its input", segment.axis
        if product is not None and place != _RESULT:
            axis = 1 if product.op.startswith("Conv") else x.dim() - 1 - place
            if segment.weight(product, place) is not None:
                what, axis = "its weights", weight_axis(product, x.dim())
        if grid.scale.numel() > 1 or grid.codec is not None or x.dim() < 2 or not 0 <= axis < x.dim():
            continue
        sizes = x.abs().movedim(axis, 0).flatten(1).amax(1)
        usual = float(sizes[sizes > 0].median()) if bool(sizes.any()) else 0.0
        if not usual or float(sizes.max()) < UNEVEN * usual:
            continue
        values = grid.quantized(x), Levels(symmetric=True, channels=True).applied(x, axis)
        if place != _RESULT:
            now, then = (_error(segment, node, {place: value}) for value in values)
        else:
            now, then = (balanced(value - x, x, axis) for value in values)
        if now < MAIN * relative_l2(segment.test, segment.exact) or now <= max(best[0], UNEVEN * then):
            continue
        says = f"; channel {int(sizes.argmax())} of {what} reaches {float(sizes.max()) / usual:.3g} times what the "
        says += "middle one does, and one scale serves all: "
        says += f"with one for each, the error would be {then:.2g} instead of {now:.2g}"
        helps = f"divide such channels of {what} by a factor, and multiply what reads them by it (SmoothQuant)"
        best = now, says, "quantize its weights per channel" if what == "its weights" else helps
    return best[1:]


def _of_data(
    worst: str, x: Tensor, grid: QuantizerGrid, evidence: Mapping[str, float], what: str
) -> tuple[str, str, str]:
    kind, step, needed = "INT16" if grid.most > LEVELS else "INT8", evidence["scale"], evidence["needed_scale"]
    if worst == "clipped":
        moved = "zero_point" in evidence
        both = moved or not grid.has_middle
        ends = " and ".join(f"{end:.4g}" for end in grid.range) if both else f"±{step * grid.most:.4g}"
        reach = f"{float(x.min()):.4g} and {float(x.max()):.4g}" if both else f"{float(x.abs().max()):.4g}"
        where = f"{kind} scale {step:.3g}" + f" with zero point {int(grid.zero)}" * both
        says = f"its {what} reaches {reach}, and its {where} ends at {ends}: "
        says += f"{100 * evidence['clipped']:.3g}% is clipped"
        return "int8-zero-point" if moved else "int8-clipped", says, _CALIBRATE
    if step > _COARSE * needed:
        says = f"the {kind} scale {step:.3g} of its {what} is {step / needed:.1f} times too coarse"
        return "int8-coarse", says, _CALIBRATE
    if evidence["lost"] > _MANY:
        says = f"the {kind} scale {step:.3g} of its {what} turns {evidence['lost']:.0%} of it into 0"
        return "int8-coarse", says, _APART
    return "int8", f"its {what} is quantized to {kind} with scale {step:.3g}", _CALIBRATE


def _of_weight(node: Node, weight: Tensor, grid: QuantizerGrid | None) -> tuple[str, str, str]:
    axis = weight_axis(node, weight.dim())
    if grid is not None and grid.scale.numel() == 1:
        return "int8-per-tensor", "its weights have one INT8 scale for all channels", "quantize {layers} per channel"
    if grid is not None and grid.axis != axis:
        says = f"the INT8 scales of its weights are along axis {grid.axis}; the output channels are axis {axis}"
        return "int8-axis", says, f"quantize the weights of {{layers}} along axis {axis}"
    return "int8-weights", "the INT8 scales of its weights do not fit them", "quantize {layers} again"


def _error(segment: Segment, node: Node, inputs: dict[int, Tensor]) -> float:
    """The relative error that inputs of ``node`` make, over all or in the worst channels; that of its result alone
    where that is given, too (``_RESULT``)."""
    if _RESULT in inputs:
        return relative_l2(inputs[_RESULT], segment.exact)
    if (value := segment.edited(node, inputs=inputs)) is None:
        return 0.0
    return max(relative_l2(value, segment.exact), balanced(value - segment.exact, segment.exact, segment.axis))


FIX = (
    "quantize {layers} with weights of 7 bits (ONNX Runtime: reduce_range=True; NNCF: overflow_fix) or "
    "weight_type=QUInt8 · or let ONNX Runtime use its slower exact kernels: "
    'SessionOptions.add_session_config_entry("session.x64quantprecision", "1") · or run on a processor with VNNI'
)


@cause()
def saturating(segment: Segment) -> Iterator[Candidate]:
    """Candidates: products of unsigned and signed bytes are added in pairs in 16 bits, in either order of terms."""
    if not segment.nodes or segment.strange:
        return
    products = [n.name for n in segment.nodes if n.op in PRODUCTS or n.op in INTEGER_PRODUCTS]
    fix = FIX if segment.nodes[-1].name in products else FIX.replace("{layers}", some(products))
    tried = None
    for even in (False, True):
        exact, value = _in_pairs(segment, even) or (None, None)
        if value is None or exact is None or not value.shape == exact.shape == segment.test.shape:
            return
        changed = float((value != exact).double().mean())
        without = l2(torch.where(segment.finite, segment.test - exact, 0.0))
        if not changed or without <= MAIN * segment.introduced or (tried is not None and torch.equal(tried, value)):
            return
        tried = value
        says = (
            "products of unsigned and signed bytes are added in pairs in 16 bits and saturate there, as on a processor "
            "without VNNI"
        )
        yield Candidate("int8-pair-saturation", says, value, 0, {"results_changed": changed}, fix)


def _in_pairs(segment: Segment, even: bool) -> tuple[Tensor, Tensor] | None:
    """Results of a quantized segment, or of the quantized graph behind one of its float parent: summed exactly, and in
    pairs."""
    target, given, quantized = segment.target, segment.given, segment.context.quantized
    if quantized is not None:
        value = quantized.declared(target, given.keys(), given, paired_sums=True, even=even)
        exact = quantized.declared(target, given.keys(), given) if value is not None else None
        return None if value is None or exact is None else (as_double(exact), as_double(value))
    nodes = with_paired_sums(segment.graph, segment.nodes, even=even)
    try:
        return None if nodes is None else (segment.exact, segment.run(PAIRED, nodes))
    except InputError:
        return None
