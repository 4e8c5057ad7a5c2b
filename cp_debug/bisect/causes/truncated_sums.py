"""Sums whose partial results are cut off instead of rounded: every error goes towards zero, and grows with the length.

A sum that is rounded K times is off by about √K roundings, one that is cut off by K/2: an accumulator that truncates
(as some matrix units do) shows as a shrinkage that no factor on the result explains to its rounding.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from cp_debug.bisect.causes.base import Candidate, cause
from cp_debug.bisect.causes.linear_parts import ProductLayout
from cp_debug.bisect.causes.segment import Segment

MOST_TERMS = 8192
FEWEST_TERMS = 32
"""Lengths of a sum between which it is emulated term by term."""
MOST_WORK = 1 << 28
"""Products of a layer up to which it is."""
LANES = (1, 8, 16)
"""Partial sums that are kept side by side and added in the end."""
LARGEST = 1e-2
"""Relative error above which no truncation in FP32 is the cause."""
LIKELY, LEAST_COSINE = (0.6, 1.6), 0.3
"""Norm of the error against an emulation in another order of summation, and the cosine between them: partial sums
of one sign err to one side in every order, those of changing sign partly; rounding elsewhere has none of it."""


def cut_off(x: Tensor) -> Tensor:
    """``x``, float64 of any shape, cut off after the 23 mantissa bits of FP32."""
    return (x.contiguous().view(torch.int64) & ~((1 << 29) - 1)).view(torch.float64)


@cause(costly=True)
def truncated(segment: Segment) -> Iterator[Candidate]:
    """Candidates: partial sums in FP32 that are cut off, by number of lanes; taken where nothing else explains."""
    node = segment.product
    if node is None or node is not segment.nodes[-1] or segment.strange or not segment.introduced:
        return
    if segment.introduced > LARGEST * float(torch.linalg.vector_norm(segment.exact)):
        return
    layout = ProductLayout.of(segment, node)
    if layout is None or layout.place != 1 or not FEWEST_TERMS <= layout.unknowns <= MOST_TERMS:
        return
    if segment.test.numel() * layout.unknowns > MOST_WORK or not layout.fits(segment):
        return
    columns, theta = layout.columns(segment), layout.theta_of(layout.weight)
    if columns is None:
        return
    bias = segment.exact - layout.without_bias(segment)
    for lanes in LANES:
        value = layout.unflat(_summed(columns, theta, lanes), segment.test) + bias
        change = torch.where(segment.finite, value - segment.exact, 0.0)
        norm = float(torch.linalg.vector_norm(change)) or 1.0
        ratio = segment.introduced / norm
        cosine = float((change * segment.error).sum()) / (segment.introduced * norm)
        figures = {"lanes": lanes, "norm_ratio": ratio, "cosine": cosine, "reduction_length": layout.unknowns}
        likely = LIKELY[0] < ratio < LIKELY[1] and cosine > LEAST_COSINE
        says = f"sums of {layout.unknowns} terms are truncated instead of rounded: the error grows with their length"
        fix = "choose a kernel that rounds its partial sums, or split the sums of {layers}"
        yield Candidate("truncated-accumulation", says, value, 0, figures, fix, by_magnitude=likely)


def _summed(columns: Tensor, theta: Tensor, lanes: int) -> Tensor:
    """[groups, rows, outputs] from columns [groups, rows, terms] and theta [groups, terms, outputs]."""
    sums = [torch.zeros(*columns.shape[:2], theta.shape[2], dtype=torch.float64) for _ in range(lanes)]
    for term in range(columns.shape[2]):
        lane = term % lanes
        sums[lane] = cut_off(sums[lane] + columns[:, :, term, None] * theta[:, None, term])
    total = sums[0]
    for part in sums[1:]:
        total = cut_off(total + part)
    return total
