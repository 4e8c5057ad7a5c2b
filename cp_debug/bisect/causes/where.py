"""Location of a layer's error: channels, region, the worst elements."""

from __future__ import annotations

import math

import numpy as np
import torch

from cp_debug.bisect.causes.segment import Segment
from cp_debug.bisect.finding import Element, Where

MOST = 5
"""Channels and elements that are named."""


def locate(segment: Segment, layer: str) -> Where:
    """Channels, region and worst elements of the introduced error; NaN and Inf that are born count as the worst."""
    error = torch.where(segment.new_nonfinite, torch.inf, segment.error.abs())
    if segment.error.numel() == 0:
        return Where(layer)
    strange = bool(segment.new_nonfinite.any())
    weight = segment.new_nonfinite.double() if strange else error.square()
    location = Where(layer, worst=[])
    if error.dim() > 1 and error.shape[segment.axis] > 1:
        shares = weight.sum([d for d in range(error.dim()) if d != segment.axis]) / (weight.sum() or 1.0)
        top = shares.topk(min(MOST, len(shares)))
        location.channels = {int(i): float(s) for s, i in zip(*top, strict=True) if s > 0}
    high = (segment.new_nonfinite if strange else error > error.max() / 10).nonzero()
    if len(high):
        location.region = [[int(a), int(b)] for a, b in zip(high.amin(0), high.amax(0), strict=True)]
        covered = math.prod(b - a + 1 for a, b in location.region)
        location.concentrated = covered / error.numel()
    for flat in error.flatten().topk(min(MOST, error.numel())).indices:
        index = [int(i) for i in np.unravel_index(int(flat), error.shape)]  # torch imports sympy for this
        place = tuple(index)
        if error[place] > 0:
            location.worst.append(Element(index, float(segment.test[place]), float(segment.exact[place])))
    return location
