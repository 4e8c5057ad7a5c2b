"""Causes of a layer's error: each candidate is emulated on the layer's captured inputs, and the evidence decides."""

from cp_debug.bisect.causes import (
    affine,
    batchnorm,
    fitted_weights,
    layout,
    nonfinite,
    operators,
    precision,
    quantized,
    ranges,
    rearranged_weights,
    scales,
    schema,
    single_numbers,
    stored_weights,
    truncated_sums,
    weights,
)
from cp_debug.bisect.causes.base import CAUSES, Candidate, Cause, cause

__all__ = [
    "CAUSES",
    "Candidate",
    "Cause",
    "affine",
    "batchnorm",
    "cause",
    "fitted_weights",
    "layout",
    "nonfinite",
    "operators",
    "precision",
    "quantized",
    "ranges",
    "rearranged_weights",
    "scales",
    "schema",
    "single_numbers",
    "stored_weights",
    "truncated_sums",
    "weights",
]
