"""Channels of an output that are gone: 0 everywhere in the test, beside others of the same tensor that are not.

Boxes of hundreds of pixels and scores below 1 may share a tensor and its scale. Judged as one tensor, scores that are
all 0 are a small difference.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from cp_debug.recipes.base import Arrays
from cp_debug.safe_text import some

LEAST = 16
"""Elements of a channel that must be 0 for it to count as gone, not as small by chance."""
BEYOND = 10.0
"""A channel counts whose largest magnitude in the reference is so many times the absolute tolerance."""
NAMED = 8
"""Channels that are named."""


def lost_channels(reference: Arrays, test: Arrays, atol: float) -> Iterator[str]:
    """A sentence for each output, in both name → array of one shape and any float dtype, whose channels are lost.

    Channels lie along the second axis or along the last one.
    """
    for name, ours in reference.items():
        theirs = test.get(name)
        if theirs is None or theirs.shape != ours.shape or ours.ndim < 2 or ours.dtype.kind != "f" or not ours.size:
            continue
        for axis in dict.fromkeys((1, ours.ndim - 1)):
            others = tuple(a for a in range(ours.ndim) if a != axis)
            largest, left = (np.abs(np.nan_to_num(a)).max(axis=others) for a in (ours, theirs))
            gone = np.flatnonzero((left == 0) & (largest > BEYOND * atol))
            if ours.size // ours.shape[axis] < LEAST or not gone.size or not left.any():
                continue
            names = f"channel{'s' * (len(gone) > 1)} {some(gone.tolist(), NAMED)}"
            are, reach = ("are", "reach") if len(gone) > 1 else ("is", "reaches")
            yield (
                f"{name}: {names} {are} 0 everywhere, but {reach} {largest[gone].max():.3g} in the reference; other "
                f"channels reach {left.max():.3g}"
            )
            break
