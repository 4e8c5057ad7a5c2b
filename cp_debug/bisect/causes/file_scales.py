"""Scales of quantized files that are wrong: of weights by their codes and by what their float parent holds, of data by
what the layer is given; proved by the layer's own nodes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cp_debug.bisect.causes.base import Candidate
from cp_debug.bisect.causes.narrow import misfit
from cp_debug.bisect.causes.other_program import OtherPiece
from cp_debug.bisect.file_weights import BETTER, OFF, Repair, StoredCodes, is_narrow_kind, product_of, stored_codes
from cp_debug.bisect.quantized_segment import CODECS, QuantizerGrid
from cp_debug.errors import InputError
from cp_debug.graph.graph import Node
from cp_debug.graph.integer_values import constant_type
from cp_debug.graph.narrow_qdq import FAMILIES
from cp_debug.graph.operators import PRODUCTS
from cp_debug.probes.distance import relative_l2
from cp_debug.safe_text import amount

_ENDS = {2: (0, 255), 3: (-128, 127)}
"""ONNX data type of levels → the lowest and the highest."""
SHOWN = 6
"""Channels that a sentence names."""
MOST = 8
"""Scales of a region that are tried."""
_FIX = {
    "weights": "quantize the weights of {layers} again, by the largest of each channel",
    "data": "calibrate {layers} on data like this, or keep it in FP32",
}


def wrong_scale(piece: OtherPiece) -> Candidate | None:
    """The scale without which a layer would be much nearer to the exact result, where the test's own nodes reproduce
    the layer: one of FP8 or 4 bits that is not that of its numbers, one of INT8 that clips. None without one.

    In a region of several layers, those that clip most are tried, at most ``MOST``: each is a run of the region.
    """
    segment, held = piece.segment, piece.other.executor.arithmetic.held(torch.float32)
    products = any(node.op in PRODUCTS for node in segment.nodes)
    if not products or segment.strange or segment.test.shape != segment.exact.shape:
        return None
    try:
        # Where nothing is said of clipping, the scale is wrong for all of the numbers.
        tried = sorted((*_of_codes(piece), *_of_grids(piece)), key=lambda each: -each[1].evidence.get("clipped", 1.0))
        values = [(name, wrong.value.to(held), wrong) for name, wrong in tried[:MOST] if wrong.value is not None]
        found = [(relative_l2(piece.run({name: value}), segment.exact), wrong) for name, value, wrong in values]
        then, worst = min(found, key=lambda pair: pair[0], default=(0.0, None))
        if worst is None or not (now := relative_l2(piece.run(), segment.exact)) > BETTER * then:
            return None
    except InputError:  # an operator that nobody here can compute
        return None
    if (value := piece.result) is None:
        return None
    figures = {"error": now, "error_then": then, "read_off": "the scales and codes of the file"}
    return Candidate(worst.cause, worst.says, value, 0, worst.evidence | figures, worst.fix)


def _products(piece: OtherPiece) -> Iterator[tuple[Tensor, Node]]:
    """The constant weights of the reference's products, float64, and the test's products that stand for them."""
    segment, of_name = piece.segment, {node.name: node for node in piece.nodes}
    for product in (node for node in segment.nodes if node.op in PRODUCTS):
        twin = product_of(piece.nodes, product.op) if segment.product is not None else of_name.get(product.name)
        weight = segment.weight(product, 1)
        if weight is not None and twin is not None and twin.op == product.op:
            yield weight, twin


def _of_codes(piece: OtherPiece) -> Iterator[tuple[str, Candidate]]:
    """Weights in FP8 and 4 bits: the value that holds them, and what is wrong, with what it would be."""
    for weight, twin in _products(piece):
        stored = stored_codes(piece.other.graph, twin)
        if stored is None or not (is_narrow_kind(stored.kind) or stored.bits is not None):
            continue
        if (repair := stored.repair(weight)) is not None:
            yield stored.dequantizer.outputs[0], _of_weight(stored, repair)


def _of_grids(piece: OtherPiece) -> Iterator[tuple[str, Candidate]]:
    """The same of data in FP8 with one scale, and of numbers that a scale in INT8 cuts off."""
    constants, graph = piece.other.constants, piece.other.graph
    weights = {twin.proto.input[1]: weight for weight, twin in _products(piece)}
    own = {output for node in piece.nodes for output in node.outputs}
    pairs = dict[Node, Node | None]()
    for node in (node for node in piece.nodes if node.op == "DequantizeLinear"):
        quantizer = graph.producer.get(node.proto.input[0])
        if any(name and name not in constants for name in node.proto.input[1:]):
            continue
        if node.proto.input[0] in constants:
            if node.outputs[0] in weights:
                pairs[node] = None
        elif quantizer is not None and quantizer.op == "QuantizeLinear" and quantizer.outputs[0] in own:
            pairs[node] = quantizer
    if not pairs:
        return
    read = [quantizer.proto.input[0] for quantizer in pairs.values() if quantizer is not None]
    values = piece.values(*read, *(node.outputs[0] for node in pairs))
    for node, quantizer in pairs.items():
        numbers = weights[node.outputs[0]] if quantizer is None else values[quantizer.proto.input[0]]
        if not numbers.dim() or not numbers.numel() or not bool(torch.isfinite(numbers).all()):
            continue
        _, scale, zero = [*node.proto.input[:3], ""][:3]
        kind = constant_type(graph, zero) if zero else constant_type(graph, node.proto.input[0]) or 2
        if kind in CODECS and quantizer is not None and np.size(constants[scale]) == 1:
            codec, needed = CODECS[kind], float(numbers.abs().max()) / CODECS[kind].largest or 1.0
            name, says, figures = misfit(numbers, codec, float(np.ravel(constants[scale])[0]))
            fix = f"calibrate {{layers}} on data like this: a scale of {needed:.3g}"
            yield node.outputs[0], Candidate(name, says, codec(numbers / needed) * needed, 0, figures, fix)
        elif kind in _ENDS and not node.attribute("block_size"):
            scales, offset = (
                torch.from_numpy(np.asarray(array).astype(np.float64))
                for array in (constants[scale], constants[zero] if zero else 0.0)
            )
            grid = QuantizerGrid(scales, offset, *_ENDS[kind], node.attribute("axis", 1))
            of = "data" if quantizer is not None else "weights"
            stored = _Read(of, node, grid, numbers, values[node.outputs[0]])
            fits = bool((scales > 0).all()) and grid.fits(numbers.shape) and stored.stored.shape == numbers.shape
            if fits and bool(stored.beyond.any()):
                yield node.outputs[0], stored.told()


@dataclass(frozen=True)
class _Read:
    """Numbers behind one DequantizeLinear node of a layer, before they were put on its grid."""

    of: str
    """``weights`` or ``data``."""
    dequantizer: Node
    grid: QuantizerGrid
    numbers: Tensor
    """float64, in the shape of the node's result, as is ``stored``."""
    stored: Tensor
    """The node's result."""

    @cached_property
    def beyond(self) -> Tensor:
        """Mask of the numbers beyond the range, which the file holds at its ends."""
        levels, held = self.grid.levels(self.numbers), self.grid.levels(self.stored)
        return ((levels > self.grid.high) & (held == self.grid.high)) | (
            (levels < self.grid.low) & (held <= self.grid.low + 1)
        )

    def without(self) -> Tensor:
        """The node's result if its range had no ends."""
        return torch.where(self.beyond, self.grid.value(self.grid.levels(self.numbers)), self.stored)

    def told(self) -> Candidate:
        """The scales that clip, with their channels where they have any."""
        beyond, many = self.beyond, self.grid.scale.numel() > 1
        axis = self.grid.axis % beyond.dim() if many else 0
        by_scale = beyond.movedim(axis, 0).flatten(1) if many else beyond.reshape(1, -1)
        numbers = self.numbers.movedim(axis, 0).reshape(by_scale.shape)
        reach, scales = numbers.abs().amax(1), self.grid.scale.flatten()
        ends = torch.maximum((self.grid.high - self.grid.zero).abs(), (self.grid.low - self.grid.zero).abs()).flatten()
        held = (ends * scales).expand(len(reach))
        channels = by_scale.any(1).nonzero().flatten()
        worst = int((reach / held)[channels].argmax())
        channel = int(channels[worst])
        share = float(by_scale[channels].double().mean())
        name, limit = self.dequantizer.proto.input[1], f"±{float(held[channel]):.4g}"
        figures = f"{float(scales[channel if many else 0]):.3g} ends at {limit}, {{}} reach {float(reach[channel]):.4g}"
        subject = f"its {self.of}" if not many else f"the {self.of} of its channel {channel}"
        listed = ", ".join(str(int(c)) for c in channels[:SHOWN]) + (", …" if len(channels) > SHOWN else "")
        which = f"; {amount(len(channels), 'channel')} of {len(reach)} clipped: {listed}" if many else ""
        says = f"INT8 scale {name} clips {self.of}: {figures.format(subject)}; {share:.2%} clipped{which}"
        evidence = {
            "of": self.of,
            "scale_of": name,
            "scale": float(scales[channel if many else 0]),
            "reach": float(reach[channel]),
            "range": float(held[channel]),
            "clipped": share,
            **({"channels": channels.tolist(), "axis": axis} if many else {}),
        }
        return Candidate("int8-clipped", says, self.without(), 0, evidence, _FIX[self.of])


def _of_weight(stored: StoredCodes, repair: Repair) -> Candidate:
    family = f"int{stored.bits}" if stored.bits is not None else FAMILIES[stored.kind]
    name = "int4-weights" if family.startswith("int") else f"{family}-weights"
    if repair.kind == "scales":
        says, evidence = _scales(stored, repair.evidence["fitted"], family)
        fix = "store the scales with which the weights of {layers} were rounded, in their order, or quantize them again"
        return Candidate(name, says, repair.value, 0, evidence, fix)
    evidence = {"wrong": repair.kind, **repair.evidence}
    if repair.kind == "zero-points":
        says, fix = _zero_points(repair.evidence), "store the zero points of {layers} as their format has them: GPTQ's "
        fix += "first format stores them minus 1, gptq_v2 and AWQ as they are"
        return Candidate(name, says, repair.value, 0, evidence, fix)
    if repair.kind == "groups":
        moved, of = repair.evidence["moved"], repair.evidence["of"]
        says = f"{moved} of {of} inputs are not in the groups of their {family.upper()} codes"
        fix = "keep g_idx of {layers}, which says the group of each input (desc_act), or quantize without it"
        return Candidate(name, says, repair.value, 0, evidence, fix)
    what, order, along = repair.evidence["what"], repair.evidence["order"], repair.evidence["axis"]
    says = f"its {family.upper()} {what} are in another order within words of eight along axis {along}: {order}"
    fix = "unpack the words of {layers} in the order of their format: AWQ's is 0, 2, 4, 6, 1, 3, 5, 7, GPTQ's is plain"
    return Candidate(name, says, repair.value, 0, evidence, fix)


def _zero_points(evidence: Mapping[str, Any]) -> str:
    by, share = evidence["by"], evidence["share"]
    if by and share > 1 - OFF:
        return f"its zero points are {abs(by):g} too {'small' if by > 0 else 'large'}"
    return f"{1 - share if not by else 1.0:.0%} of its zero points are not those that its codes were computed with"


def _scales(stored: StoredCodes, fitted: Tensor, family: str) -> tuple[str, dict[str, Any]]:
    ratios = (stored.scale / fitted).abs()
    told = stored.codes != 0
    wrong = ((ratios - 1).abs() > OFF) & told
    if not bool(wrong.any()):  # all of them are off by little
        wrong = told
    share = float(wrong.double().mean())
    low, high = (
        float(q) for q in torch.quantile(ratios[wrong].flatten()[: 1 << 20], torch.tensor([0.05, 0.95]).double())
    )
    times = f"{low:.3g} times" if high < low * (1 + OFF) else f"{low:.3g} to {high:.3g} times"
    says = (
        f"the {family.upper()} scales of {share:.0%} of its weights are {times} those that their codes were computed "
        "with"
    )
    return says, {"share": share, "low": low, "high": high}
