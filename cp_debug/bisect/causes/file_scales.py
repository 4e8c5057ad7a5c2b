"""Scales of quantized files that are wrong: of weights by their codes and by what their float parent holds, of data by
what the layer is given; proved by the layer's own nodes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from cp_debug.backends.arithmetic import FP64
from cp_debug.backends.executor import Weights
from cp_debug.bisect.causes.base import Candidate
from cp_debug.bisect.causes.narrow import misfit
from cp_debug.bisect.causes.other_program import OtherPiece
from cp_debug.bisect.file_weights import BETTER, OFF, Repair, StoredCodes, same_product, stored_codes, turned, twin_of
from cp_debug.bisect.quantized_segment import QuantizerGrid, constant_grid, derived_step, stored_bias
from cp_debug.errors import InputError
from cp_debug.graph.graph import Node
from cp_debug.graph.narrow_qdq import FAMILIES
from cp_debug.graph.operators import PRODUCTS
from cp_debug.graph.spelled_out import DERIVED
from cp_debug.probes.distance import relative_l2
from cp_debug.safe_text import amount

_ENDS = ((0, 255), (-128, 127))
"""The lowest and the highest level of INT8, without a sign and with one."""
SHOWN = 6
"""Channels that a sentence names."""
MOST = 8
"""Scales of a region that are tried."""
_FIX = {
    "weights": "quantize the weights of {layers} again, by the largest of each channel",
    "bias": "quantize the bias of {layers} with the scale of its input times that of its weights",
    "pair": "give both the same parameters",
    "data": "calibrate {layers} on data like this, or keep it in FP32",
    "scales": "store the scales with which the weights of {layers} were rounded, in their order, or quantize them "
    "again",
    "axis": "give the DequantizeLinear of the weights of {layers} the axis that they were quantized along",
    "zero-points": "store the zero points of {layers} as their format has them: GPTQ's first format stores them minus "
    "1, gptq_v2 and AWQ as they are",
    "zero-point": "store the zero points with which the weights of {layers} were rounded",
    "codes": "quantize the weights of {layers} again, from the parameters that the reference has",
    "groups": "keep g_idx of {layers}, which says the group of each input (desc_act), or quantize without it",
    "order": "unpack the words of {layers} in the order of their format: AWQ's is 0, 2, 4, 6, 1, 3, 5, 7, GPTQ's is "
    "plain, and MatMulNBits has the first of two in the low four bits",
}


def wrong_scale(piece: OtherPiece) -> Candidate | None:
    """The scale without which a layer would be much nearer to the exact result, where the test's own nodes reproduce
    the layer: one of FP8 or 4 bits that is not that of its numbers, one of INT8 that clips, or of which a Q/DQ pair
    has two. None without one.

    In a region of several layers, those that clip most are tried, at most ``MOST``: each is a run of the region.
    """
    segment, held = piece.segment, piece.other.executor.arithmetic.held(torch.float32)
    if segment.strange or segment.test.shape != segment.exact.shape:
        return None
    try:
        products = any(node.op in PRODUCTS for node in segment.nodes)
        grids = list(_of_grids(piece))
        pairs = [each for each in grids if each[1].fix == _FIX["pair"]]
        # Where nothing is said of clipping, the scale is wrong for all of the numbers.
        tried = sorted(
            (*_of_codes(piece), *_of_biases(piece), *grids) if products else pairs,
            key=lambda each: -each[1].evidence.get("clipped", 1.0),
        )
        sets = [({name: wrong.value}, wrong) for name, wrong in tried[:MOST]]
        if len(pairs) > 1:
            says = "; ".join(wrong.says for _, wrong in pairs)
            sets.append(({name: wrong.value for name, wrong in pairs}, replace(pairs[0][1], says=says)))
        derived = _derived_biases(piece)
        values = ({**v, **derived} for v, _ in sets)
        known = ({name: value.to(held) for name, value in v.items() if value is not None} for v in values)
        found = [(relative_l2(piece.run(v), segment.exact), wrong) for v, (_, wrong) in zip(known, sets, strict=True)]
        then, worst = min(found, key=lambda pair: pair[0], default=(0.0, None))
        if worst is None or not (now := relative_l2(piece.run(), segment.exact)) > BETTER * then:
            return None
    except InputError:  # an operator that nobody here can compute
        return None
    if (value := piece.result) is None:
        return None
    figures = {"error": now, "error_then": then, "read_off": "the scales and codes of the file"}
    return Candidate(worst.cause, worst.says, value, 0, worst.evidence | figures, worst.fix)


def _derived_biases(piece: OtherPiece) -> dict[str, Tensor]:
    """Biases as the reference has them, by the values that hold them in an operator whose other scales are theirs, too:
    with a wrong scale they are wrong as well."""
    product = piece.segment.product
    twin = twin_of(product, piece.nodes) if product is not None else None
    bias = piece.segment.weight(product, 2) if product is not None else None
    name = "".join(twin.proto.input[2:]) if twin is not None else ""
    maker = piece.other.graph.producer.get(name)
    derived = maker is not None and any(each.endswith(DERIVED) for each in maker.inputs)
    return {name: bias} if bias is not None and derived else {}


def _products(piece: OtherPiece) -> Iterator[tuple[Tensor, Node]]:
    """The constant weights of the reference's products, float64, and the test's products that stand for them."""
    segment, of_name = piece.segment, {node.name: node for node in piece.nodes}
    for product in (node for node in segment.nodes if node.op in PRODUCTS):
        twin = twin_of(product, piece.nodes) if segment.product is not None else of_name.get(product.name)
        weight = segment.weight(product, 1)
        if weight is not None and twin is not None and same_product(twin, product):
            yield turned(weight, product, twin), twin


def _of_codes(piece: OtherPiece) -> Iterator[tuple[str, Candidate]]:
    """Weights: the value that holds them, and what is wrong, with what it would be."""
    for weight, twin in _products(piece):
        stored = stored_codes(piece.other.graph, twin)
        if stored is not None and (repair := stored.repair(weight, codes=True)) is not None:
            yield stored.dequantizer.outputs[0], _of_weight(stored, repair)


def _of_biases(piece: OtherPiece) -> Iterator[tuple[str, Candidate]]:
    """Biases whose scale is not that of the input times that of the weights: what holds them, and the same of it."""
    graph = piece.other.graph
    stored = Weights(graph, FP64, torch.device("cpu"), 0)
    for _, twin in _products(piece):
        bias, step = stored_bias(graph, stored, twin), derived_step(graph, stored, twin)
        if bias is None or step is None or not bool(step.all()) or bias.on(step, OFF):
            continue
        if step.numel() in (1, bias.levels.numel()):
            times = bias.scale / step
            worst = float(times[times.abs().log().abs().argmax()])
            says = f"the scale of its bias is not that of its input times that of its weights, but {worst:.3g} times "
            fault = Candidate("int8-scale", f"{says}that", bias.levels * step, 0, {"of": "weights"}, _FIX["bias"])
            yield twin.proto.input[2], fault


def _of_grids(piece: OtherPiece) -> Iterator[tuple[str, Candidate]]:
    """The same of data in FP8 with one scale, and of numbers that a scale in INT8 cuts off."""
    constants, graph = piece.other.constants, piece.other.graph
    products = {twin.proto.input[1]: weight for weight, twin in _products(piece)}
    stored = Weights(graph, FP64, torch.device("cpu"), 0)
    maker = {output: node for node in piece.nodes for output in node.outputs}
    reads: dict[Node, str] = {}  # nodes, and of what their levels are: of a product's weights, nothing that there is
    for node in (node for node in piece.nodes if node.op == "DequantizeLinear"):
        levels, *grid_names = node.proto.input
        if levels in constants and node.outputs[0] in products:
            reads[node] = ""
        elif levels not in constants and levels in maker and maker[levels].op == "QuantizeLinear":
            reads[node] = maker[levels].proto.input[0]
        if any(name and name not in constants for name in grid_names):
            reads.pop(node, None)
    values = piece.values(*filter(None, reads.values()), *(node.outputs[0] for node in reads)) if reads else {}
    for node, source in reads.items():
        numbers, held = values[source] if source else products[node.outputs[0]], values[node.outputs[0]]
        grid = constant_grid(graph, stored, node)
        if grid is None or not numbers.dim() or not numbers.numel() or not bool(torch.isfinite(numbers).all()):
            continue
        plain = grid.codec is None and (grid.low, grid.high) in _ENDS and not node.attribute("block_size")
        if grid.codec is not None and source and grid.scale.numel() == 1:
            codec, needed = grid.codec, float(numbers.abs().max()) / grid.codec.largest or 1.0
            name, says, figures = misfit(numbers, codec, float(grid.scale))
            fix = f"calibrate {{layers}} on data like this: a scale of {needed:.3g}"
            yield node.outputs[0], Candidate(name, says, codec(numbers / needed) * needed, 0, figures, fix)
        elif plain and bool((grid.scale > 0).all()) and grid.fits(numbers.shape) and held.shape == numbers.shape:
            of = "data" if source and source not in constants else "weights"
            yield from _clipped(of, node, grid, numbers, held)
            if source:
                quantizer = maker[node.proto.input[0]]
                yield from _disagreeing(quantizer, constant_grid(graph, stored, quantizer), node, numbers, grid)


def _disagreeing(
    quantizer: Node, made: QuantizerGrid | None, node: Node, numbers: Tensor, grid: QuantizerGrid
) -> Iterator[tuple[str, Candidate]]:
    """The value of ``node``, and what it would be with the scales and zero points that its levels were made with."""
    if made is None or not made.fits(numbers.shape):
        return
    for what, name, ours, theirs in (
        ("scale", "int8-scale", made.scale, grid.scale),
        ("zero point", "int8-zero-point", made.zero, grid.zero),
    ):
        pairs = torch.stack(torch.broadcast_tensors(ours.flatten(), theirs.flatten()), 1)
        if wrong := pairs[pairs[:, 0] != pairs[:, 1]].tolist():
            told = " and ".join(f"{number:.4g}" for number in wrong[0])
            says = f"{quantizer.name} and {node.name} disagree in their {what}: {told}"
            yield node.outputs[0], Candidate(name, says, made.quantized(numbers), 0, fix=_FIX["pair"])
            return


def _clipped(
    of: str, node: Node, grid: QuantizerGrid, numbers: Tensor, held: Tensor
) -> Iterator[tuple[str, Candidate]]:
    """The value of ``node`` and what it would be if the range of its scales had no ends, with the channels that they
    clip; nothing where none does. ``numbers``: before they were put on the grid; ``held``: what the file holds."""
    levels, at = grid.levels(numbers), grid.levels(held)
    beyond = ((levels > grid.high) & (at == grid.high)) | ((levels < grid.low) & (at <= grid.low + 1))
    if not bool(beyond.any()):
        return
    many = grid.scale.numel() > 1
    axis = grid.axis % beyond.dim() if many else 0
    cut, given = (t.movedim(axis, 0).flatten(1) if many else t.reshape(1, -1) for t in (beyond, numbers))
    scales, reach = grid.scale.flatten(), given.abs().amax(1)
    ends = torch.maximum((grid.high - grid.zero).abs(), (grid.low - grid.zero).abs()).flatten() * scales
    channels = cut.any(1).nonzero().flatten()
    worst = int(channels[(reach / ends)[channels].argmax()])
    figures = {"scale": float(scales[worst]), "reach": float(reach[worst]), "range": float(ends[worst])}
    share, name = float(cut[channels].double().mean()), node.proto.input[1]
    subject, which = f"its {of}", ""
    evidence = {"of": of, "scale_of": name, **figures, "clipped": share}
    if many:
        subject = f"the {of} of its channel {worst}"
        listed = ", ".join(map(str, channels[:SHOWN].tolist())) + (", …" if len(channels) > SHOWN else "")
        which = f"; {amount(len(channels), 'channel')} of {len(reach)} clipped: {listed}"
        evidence |= {"channels": channels.tolist(), "axis": axis}
    says = f"INT8 scale {name} clips {of}: {figures['scale']:.3g} ends at ±{figures['range']:.4g}, {subject} reach "
    says += f"{figures['reach']:.4g}; {share:.2%} clipped{which}"
    without = torch.where(beyond, grid.value(levels), held)
    yield node.outputs[0], Candidate("int8-clipped", says, without, 0, evidence, _FIX[of])


def _of_weight(stored: StoredCodes, repair: Repair) -> Candidate:
    family = f"int{stored.bits}" if stored.bits is not None else FAMILIES.get(stored.kind, "int8")
    name = "int4-weights" if family.startswith("int") and family != "int8" else f"{family}-weights"
    figures = repair.evidence
    evidence = {"wrong": repair.kind, **figures}
    if repair.kind == "scales":
        says, evidence = _scales(stored, figures["fitted"], family)
    elif repair.kind == "axis":
        name, axes = f"{family}-axis", (figures["axis"], figures["right"])
        says = f"the {family.upper()} scales of its weights are read along axis {axes[0]}; "
        says += f"its codes are by axis {axes[1]}"
    elif repair.kind == "zero-points":
        says = _zero_points(figures)
    elif repair.kind == "codes":
        says = f"{figures['share']:.0%} of its {family.upper()} weights are off by more than a level: they were "
        says += "rounded from others than the reference's"
    elif repair.kind == "groups":
        says = f"{figures['moved']} of {figures['of']} inputs are not in the groups of their {family.upper()} codes"
    else:
        says = f"its {family.upper()} {figures['what']} are in another order within words of eight along axis "
        says += f"{figures['axis']}: {figures['order']}"
    fix = "zero-point" if repair.kind == "zero-points" and stored.groups is None else repair.kind
    return Candidate(name, says, repair.value, 0, {"of": "weights", **evidence}, _FIX[fix])


def _zero_points(evidence: Mapping[str, Any]) -> str:
    by, share = evidence["by"], evidence["share"]
    if by and share > 1 - OFF:
        return f"its zero points are {abs(by):g} too {'small' if by > 0 else 'large'}"
    return f"{1 - share if not by else 1.0:.0%} of its zero points are not those that its codes were computed with"


def _scales(stored: StoredCodes, fitted: Tensor, family: str) -> tuple[str, dict[str, Any]]:
    ratios = stored.scale / fitted
    told = stored.codes != 0
    wrong = ((ratios - 1).abs() > OFF) & told
    if not bool(wrong.any()):  # all of them are off by little
        wrong = told
    share = float(wrong.double().mean())
    ends = torch.tensor([0.05, 0.95], dtype=torch.float64)
    low, high = torch.quantile(ratios[wrong].flatten()[: 1 << 20], ends).tolist()
    one = high - low <= OFF * abs(low)
    times = "0, not" if not high and not low else f"{low:.3g} times" if one else f"{low:.3g} to {high:.3g} times"
    says = f"the {family.upper()} scales of {share:.0%} of its weights are {times} those that their codes were "
    return f"{says}computed with", {"share": share, "low": low, "high": high}
