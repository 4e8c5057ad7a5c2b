"""Sums of INT8 products that saturate in 16 bits, as on processors without VNNI."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from cp_debug.backends.kernels.paired_sums import PAIRED, with_paired_sums
from cp_debug.bisect.causes.base import Candidate, cause
from cp_debug.bisect.causes.segment import Segment, as_double
from cp_debug.errors import InputError

FIX = (
    "quantize {layers} with weights of 7 bits (ONNX Runtime: reduce_range=True; NNCF: overflow_fix) or "
    "weight_type=QUInt8 · or let ONNX Runtime use its slower exact kernels: "
    'SessionOptions.add_session_config_entry("session.x64quantprecision", "1") · or run on a processor with VNNI'
)

MAIN = 0.5
"""Share of the introduced error that the program's own scales leave, above which saturation is the main cause."""


@cause()
def saturating(segment: Segment) -> Iterator[Candidate]:
    """Candidates: products of unsigned and signed bytes are added in pairs in 16 bits, in either order of terms."""
    if not segment.nodes or segment.strange:
        return
    tried = None
    for even in (False, True):
        pair = _from_scales(segment, even) if segment.context.quantized is not None else _from_nodes(segment, even)
        if pair is None:
            return
        exact, value = pair
        if not value.shape == exact.shape == segment.test.shape or (tried is not None and torch.equal(tried, value)):
            return
        tried = value
        without = float(torch.linalg.vector_norm(torch.where(segment.finite, segment.test - exact, 0.0)))
        changed = float((value != exact).double().mean())
        if not changed or without <= MAIN * segment.introduced:
            return
        says = (
            "products of unsigned and signed bytes are added in pairs in 16 bits and saturate there, as on a processor "
            "without VNNI"
        )
        yield Candidate("int8-pair-saturation", says, value, 0, {"results_changed": changed}, FIX)


def _from_scales(segment: Segment, even: bool) -> tuple[Tensor, Tensor] | None:
    """Results of the quantized graph behind a segment of its float parent: summed exactly, and in pairs."""
    quantized = segment.context.quantized
    assert quantized is not None
    value = quantized.declared(segment.target, segment.given.keys(), segment.given, paired_sums=True, even=even)
    exact = quantized.declared(segment.target, segment.given.keys(), segment.given) if value is not None else None
    return None if value is None or exact is None else (as_double(exact), as_double(value))


def _from_nodes(segment: Segment, even: bool) -> tuple[Tensor, Tensor] | None:
    """Results of a segment that is quantized itself: summed exactly, and in pairs."""
    nodes = with_paired_sums(segment.graph, segment.nodes, even=even)
    if nodes is None:
        return None
    try:
        return segment.exact, segment.run(PAIRED, nodes)
    except InputError:
        return None
