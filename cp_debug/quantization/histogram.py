"""Histograms of the magnitudes that a tensor took on, and the largest one that INT8 should still represent.

The library's calibrators do not serve: their histogram counts in FP32, which stops at 2²⁴ zeros; it fails on a first
batch of zeros and takes memory without bound after one of small values; its search for the least squared error passes
the bit width as the bias (0.8 dB on a SECOND-like net), and its entropy walks the bins in Python (88 s for 56 tensors).
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from torch import Tensor

from cp_debug.errors import InputError
from cp_debug.graph.scales import QMAX

METHODS = ("max", "percentile", "mse", "entropy")
PERCENTILE = 99.99
_BINS = 4096
_CANDIDATES = 128
_NONE = 1e-9
"""Probability given to what a quantized distribution cannot represent."""
_SPIKE = 7
"""Width in bins below which a peak is a spike: single values, such as zeros."""
_TOO_SMALL = 2.0**-24
"""Fake quantization makes everything 0 where the largest magnitude is below this."""


class Histogram:
    """Counts of magnitudes, in 4096 bins from 0 to a limit that doubles when it is exceeded."""

    def __init__(self) -> None:
        self.counts = torch.zeros(_BINS, dtype=torch.int64)
        self.limit = 0.0
        self.largest = 0.0

    def add(self, tensor: Tensor) -> None:
        """Count the elements of a tensor. Raises ValueError when it holds NaN or Inf.

        Any shape, float dtype.
        """
        magnitudes = tensor.detach().abs().flatten().float()
        largest = float(magnitudes.amax()) if len(magnitudes) else 0.0
        if not math.isfinite(largest):
            raise ValueError("NaN" if math.isnan(largest) else "Inf")
        self.largest = max(self.largest, largest)
        if self.limit == 0.0:
            self.limit = largest
        while largest > self.limit:
            self.limit *= 2
            self.counts = torch.cat((self.counts.view(-1, 2).sum(dim=1), self.counts.new_zeros(_BINS // 2)))
        if self.limit:
            magnitudes = (magnitudes * (_BINS / self.limit)).clamp_(max=_BINS - 1)
        self.counts += torch.bincount(magnitudes.int(), minlength=_BINS).cpu()

    def amax(self, method: str, percentile: float = PERCENTILE) -> float:
        """The magnitude to clip at, by one of ``METHODS``; 1 for a tensor of zeros.

        ``percentile`` is in percent. ``mse``: least squared error. ``entropy``: least Kullback–Leibler divergence, as
        TensorRT's entropy calibrator (Migacz, 8-bit Inference with TensorRT, GTC 2017), which clips nothing of fewer
        numbers than there are bins.
        Raises InputError for another method.
        """
        check_method(method)
        if self.largest <= _TOO_SMALL:
            return 1.0
        counts, edges = self.counts.numpy(), np.linspace(0, self.limit, _BINS + 1)
        # Fewer numbers than bins are no distribution: those of a pooled vector stand alone, each a spike.
        if method == "max" or (method == "entropy" and counts.sum() < _BINS):
            return self.largest
        if method == "percentile":
            clip = edges[1 + np.searchsorted(counts.cumsum(), counts.sum() * percentile / 100)]
        elif method == "mse":
            clip = _least_squares(counts, (edges[1:] + edges[:-1]) / 2, self.largest)
        else:
            clip = _least_divergence(counts, edges)
        return min(float(clip), self.largest)


def check_method(method: str, argument: str = "method") -> None:
    """Raise InputError, which names ``argument``, unless the method is one of ``METHODS``."""
    if method not in METHODS:
        raise InputError(f"{argument}: {method!r} is unknown; expected one of {', '.join(METHODS)}")


def weight_amax(weight: Tensor, axis: int, method: str) -> Tensor:
    """Largest magnitude to represent, for each output channel of a weight: float32 [C].

    ``axis`` is that of the channels. ``mse`` and ``entropy`` search for the least squared error among its own values;
    the others clip nothing. A channel of zeros gets the scale of the largest.
    """
    rows = weight.detach().float().movedim(axis, 0).flatten(1)
    largest = rows.abs().amax(dim=1)
    best = largest.clone()
    if method == "mse":
        error = torch.full_like(largest, math.inf)
        for share in torch.linspace(0.3, 1, _CANDIDATES).tolist():
            limit = largest * share
            scale = limit.clamp(min=_TOO_SMALL)[:, None] / QMAX
            squared_error = ((rows / scale).round().clamp(-QMAX - 1, QMAX) * scale - rows).square().sum(dim=1)
            better = (squared_error < error) & (limit > _TOO_SMALL)
            best, error = torch.where(better, limit, best), torch.where(better, squared_error, error)
    return torch.where(best > _TOO_SMALL, best, largest.max().item() if largest.max() > _TOO_SMALL else 1.0)


def _least_squares(counts: NDArray[np.int64], centres: NDArray[np.float64], largest: float) -> float:
    """The limit whose 255 levels are nearest to the magnitudes, in the sum of squares."""
    candidates = largest * np.linspace(1 / _CANDIDATES, 1, _CANDIDATES)
    scales = candidates[:, None] / QMAX
    errors = (np.clip(np.round(centres / scales), 0, QMAX) * scales - centres) ** 2 @ counts
    return float(candidates[errors.argmin()])


def _least_divergence(counts: NDArray[np.int64], edges: NDArray[np.float64]) -> float:
    """The limit with the least Kullback–Leibler divergence of the clipped from the quantized histogram.

    TensorRT's calibration (S. Migacz, 8-bit Inference with TensorRT, GTC 2017): what lies beyond the limit is counted
    in the last bin, and a level shares its counts out evenly among its bins that hold any. There only the bin of the
    zeros is cut down to its neighbour; here every spike is. Smearing one out costs so much divergence that the limit
    would be drawn to where a level is a bin, however much that clips: on the empty part of a bird's-eye canvas, which
    holds a few constants, at 4 % of the range.
    """
    bins = _without_spikes(counts.astype(np.float64))
    levels = QMAX + 1
    last = int(np.flatnonzero(bins)[-1]) + 1 if bins.any() else len(bins)
    best_stop, least = last, math.inf
    for stop in range(levels, last + 1, _BINS // 512):
        clipped = bins[:stop].copy()
        starts = np.arange(levels) * stop // levels
        occupied = clipped > 0
        if not occupied.any():
            continue
        totals, used = np.add.reduceat(clipped, starts), np.add.reduceat(occupied.astype(np.float64), starts)
        widths = np.diff(np.append(starts, stop))
        quantized = np.repeat(np.divide(totals, used, out=np.zeros(levels), where=used > 0), widths) * occupied
        clipped[-1] += bins[stop:].sum()
        occupied = clipped > 0
        p, q = clipped[occupied] / clipped.sum(), np.maximum(quantized[occupied] / quantized.sum(), _NONE)
        if (divergence := float((p * np.log(p / q)).sum())) < least:
            best_stop, least = stop, divergence
    return float(edges[best_stop])


def _without_spikes(bins: NDArray[np.float64]) -> NDArray[np.float64]:
    """Bins cut down to what stands beside them over ``_SPIKE`` bins (a morphological opening), where more than 1."""
    eroded = sliding_window_view(bins, _SPIKE).min(axis=1)
    opened = sliding_window_view(np.pad(eroded, _SPIKE - 1), _SPIKE).max(axis=1)
    return np.minimum(bins, np.maximum(opened, 1))
