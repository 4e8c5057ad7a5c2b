"""Record of how a module was quantized, which the module carries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import nn

from cp_debug.errors import InputError
from cp_debug.programs.batchnorm_folding import Folding

NOT_RUN = "it did not run during calibration"


@dataclass
class Quantization:
    """Record of how a module was quantized; ``quantization`` on the module."""

    model: str
    """SHA-256 of the FP32 weights, BatchNorm folded."""
    method: str
    layers: Sequence[str]
    """Paths of layers with quantizers, in this module."""
    residual_adds: Sequence[str] = ()
    skipped: dict[str, str] = field(default_factory=dict)
    """Layers that stay in FP32, and why."""
    folding: Folding = field(default_factory=lambda: Folding(()))


def quantization_of(module: nn.Module) -> Quantization:
    """The record of how a module was quantized.

    Raises InputError for a module that was not quantized, or not by ``quantize_ptq``.
    """
    record = getattr(module, "quantization", None)
    if not isinstance(record, Quantization):
        raise InputError(f"{type(module).__name__} is not quantized; expected what quantize_ptq returned")
    return record
