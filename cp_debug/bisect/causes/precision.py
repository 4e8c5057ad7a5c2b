"""Precisions other than the declared one: TF32, FP16, BF16, FP16 accumulation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from cp_debug.backends.arithmetic import (
    BF16,
    FP16,
    FP16ACC,
    TF32,
    TF32_CUT,
    TF32_DECONV,
    Arithmetic,
    round_bf16,
    round_fp16,
)
from cp_debug.backends.kernels.fp16_accumulation import with_epilogue
from cp_debug.backends.tensorrt.inspector import decode
from cp_debug.bisect.causes.base import Candidate, cause
from cp_debug.bisect.causes.segment import Segment, l2
from cp_debug.graph.graph import Node

OVERFLOWS = 65520.0
"""The smallest magnitude that FP16 rounds to Inf: then it is an overflow that must be told."""
ORDERS = ((64, 1), (64, 2), (32, 1), (128, 1), (16, 1))
"""Channels per tile and partial sums that share them, of the kernels seen so far."""
VECTORS = (8, 4)
"""Values that a thread loads at once in convolution kernels without shared memory."""
FEW = 48
"""Most channels of a convolution that was seen to run in one of those."""
LIKE_FP16 = (1e-5, 0.2)
"""Relative error that FP16 accumulation can make: outside of it nothing is tried."""
LIKELY, LEAST_COSINE = (0.7, 1.4), 0.2
"""Norm of the error against an emulation in another order of summation, and the cosine between them: measured on
TensorRT 8.6 kernels 0.27 to 0.66, and magnitudes within 1.2."""

_KEEP_FP32 = "compute these nodes in FP32 (node block list, or ILayer.precision): {layers}"
PROMOTED = {
    "tf32": 'torch: torch.backends.cudnn.conv.fp32_precision = "ieee" and torch.backends.cuda.matmul.fp32_precision = '
    '"ieee" · ONNX Runtime: provider option use_tf32=0 · TensorRT: config.clear_flag(trt.BuilderFlag.TF32)',
    "fp16": _KEEP_FP32,
    "bf16": _KEEP_FP32,
    "fp16-accumulation": "TensorRT: keep these layers in FP32 or BF16, or forbid FP16-accumulating tactics: {layers} · "
    "torch: torch.backends.cuda.matmul.allow_fp16_accumulation = False",
}


@cause(approximate=True)
def storage(segment: Segment) -> Iterator[Candidate]:
    """Candidates: only the result is narrow, through a cast that nobody asked for."""
    for name, function in (("fp16", round_fp16), ("bf16", round_bf16)):
        told = name == "fp16" and bool((segment.exact.abs() >= OVERFLOWS).any())
        if not told and segment.context.claim.name not in (name, "fp16acc"):
            says = f"the result is stored in {name.upper()}"
            yield Candidate(name, says, function(segment.exact.float()).double(), fix=PROMOTED[name])


@cause(approximate=True)
def arithmetic(segment: Segment) -> Iterator[Candidate]:
    """Candidates: the whole layer in another precision, accumulating in FP32."""
    for way, text in (
        (TF32, "TF32: operands are rounded to 10 mantissa bits"),
        (FP16, "FP16 weights, inputs and result, accumulated in FP32"),
        (BF16, "BF16 weights, inputs and result, accumulated in FP32"),
    ):
        told = way is FP16 and bool((segment.exact.abs() >= OVERFLOWS).any())
        if (
            segment.nodes
            and not told
            and way.name != segment.context.claim.name
            and (way is not TF32 or segment.product)
        ):
            yield Candidate(way.name, text, segment.run(way), fix=PROMOTED[way.name])
            evidence = {"computed": "product, bias and BatchNorm one after the other"}
            yield Candidate(way.name, text, segment.apart(way), 0, evidence, PROMOTED[way.name])


@cause(costly=True, approximate=True)
def tf32_cut_off(segment: Segment) -> Iterator[Candidate]:
    """Candidates: TF32 in kernels that cut off what they read instead of rounding it."""
    if segment.product is None or segment.context.claim.name == "tf32":
        return
    for way, operands in ((TF32_CUT, "operands"), (TF32_DECONV, "weights")):
        says = f"TF32: {operands} are truncated after 10 mantissa bits"
        yield Candidate("tf32", says, segment.run(way), fix=PROMOTED["tf32"])


@cause(costly=True, approximate=True)
def fp16_accumulation(segment: Segment) -> Iterator[Candidate]:
    """Candidates: partial sums in FP16, in the order of known kernels.

    In the right order the emulation fits bit by bit; in another one the error has the right size and a part of its
    direction.
    """
    size = segment.introduced / (l2(segment.exact) or 1.0)
    if segment.product is None or not LIKE_FP16[0] < size < LIKE_FP16[1] or segment.context.claim.name == "fp16acc":
        return
    for arithmetic, nodes, biases, epilogue in _kernels(segment):
        value = segment.run(arithmetic, nodes, biases)
        same = float((value == segment.test).double().mean())
        figures: dict[str, Any] = {"tile": arithmetic.tile, "slices": arithmetic.slices, "bit_identical": same}
        figures |= {"vector": arithmetic.vector} if arithmetic.vector else {}
        figures |= {"split": arithmetic.split} if arithmetic.split > 1 else {}
        figures |= {"reduction_length": _reduction(segment)} | ({"epilogue": epilogue} if epilogue else {})
        by_magnitude, says = False, "sums are accumulated in FP16"
        if bool(torch.isfinite(value[segment.finite]).all()):
            change = torch.where(segment.finite, value - segment.exact, 0.0)
            norm = l2(change) or 1.0
            figures["norm_ratio"] = segment.introduced / norm
            figures["cosine"] = float((change * segment.error).sum()) / (segment.introduced * norm)
            by_magnitude = LIKELY[0] < figures["norm_ratio"] < LIKELY[1] and figures["cosine"] > LEAST_COSINE
        fix = PROMOTED["fp16-accumulation"]
        yield Candidate("fp16-accumulation", says, value, 0, figures, fix, by_magnitude)
        if same > 0.9:
            return


def _kernels(segment: Segment) -> Iterator[tuple[Arithmetic, Sequence[Node], Mapping[str, Any], str]]:
    """Ways to compute the segment with partial sums in FP16: arithmetic, nodes, further values, and what comes in the
    order of TensorRT's kernels behind the sum, where that changes anything (``epilogue.fused``); that order first."""
    orders = [replace(FP16ACC, tile=tile, slices=slices) for tile, slices in ORDERS]
    told = decode(segment.tactic)
    if told.arithmetic == "fp16acc" and told.tile and not told.vector:
        named = replace(FP16ACC, tile=told.tile[2], slices=told.slices)
        named = replace(named, split=told.split, split_kernels=told.split_kernels)
        orders = [named, *(order for order in orders if order != named)]
    nodes, biases = with_epilogue(segment.graph, segment.nodes, segment.given)
    plain, _ = with_epilogue(segment.graph, segment.nodes, segment.given, bias_first=True)
    said = "x·sigmoid(x) rounded once" if len(plain) != len(segment.nodes) else ""
    vectors = [replace(FP16ACC, vector=vector) for vector in VECTORS if _channels(segment) <= FEW]
    for arithmetic in vectors[:1]:  # what takes first layers, so that nothing else is tried for them
        yield arithmetic, plain, {}, said
    if biases or said:
        for arithmetic in orders:
            yield arithmetic, nodes, biases, "a residual before the bias" if biases else said
        orders = orders[:1]
    for arithmetic in orders:
        yield arithmetic, segment.nodes, {}, ""
    for arithmetic in vectors[1:]:
        yield arithmetic, plain, {}, said


def _channels(segment: Segment) -> float:
    """Channels that one output of the convolution reads; infinite for other products."""
    weight = segment.weight(segment.product, 1) if segment.product and segment.product.op == "Conv" else None
    return float("inf") if weight is None else weight.shape[1]


def _reduction(segment: Segment) -> int:
    weight = segment.weight(segment.product, 1) if segment.product else None
    return 0 if weight is None else weight.numel() // segment.test.shape[segment.axis]
