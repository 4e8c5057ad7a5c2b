"""Causes of a layer's error: each candidate is emulated on the layer's captured inputs, and the evidence decides."""

from cp_debug.bisect.causes import (  # noqa: F401 - importing them registers their families
    affine,
    batchnorm,
    fitted_weights,
    formulas,
    layout,
    narrow,
    nonfinite,
    operators,
    precision,
    quantized,
    ranges,
    schema,
    single_numbers,
    tried_weights,
)
from cp_debug.bisect.causes.base import CAUSES, Candidate, Cause, cause

__all__ = ["CAUSES", "Candidate", "Cause", "cause"]
