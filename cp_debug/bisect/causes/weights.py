"""A convolution or product whose kernel is flipped or transposed."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from cp_debug.bisect.causes.base import Candidate, cause
from cp_debug.bisect.causes.segment import Segment

_FIX = "compare the weights of {layers} in both programs: layout, checkpoint, folding"


@cause()
def other_layout(segment: Segment) -> Iterator[Candidate]:
    """Candidates: the declared weights in another layout, flipped or transposed."""
    node = segment.product
    weight = segment.weight(node, 1) if node is not None else None
    if node is None or weight is None or weight.dim() < 2:
        return
    spatial = list(range(2, weight.dim()))
    ways = []
    if spatial:
        ways.append(("the kernel is flipped (convolution instead of correlation)", weight.flip(spatial)))
    if len(spatial) == 2 and weight.shape[2] == weight.shape[3]:
        ways.append(("rows and columns of the kernel are exchanged", weight.transpose(2, 3)))
    if weight.shape[0] == weight.shape[1]:
        ways.append(("input and output channels of the weight are exchanged", weight.transpose(0, 1)))
    for says, rearranged in ways:
        if not torch.equal(rearranged, weight) and (value := segment.edited(node, inputs={1: rearranged})) is not None:
            yield Candidate("weight-layout", says, value, fix=_FIX)
