"""INT8: calibration, fake quantization, checkpoints, and Q/DQ graphs. Names are imported when they are used."""

from __future__ import annotations

from importlib import import_module
from typing import Any

_MODULES = {
    "calibration": ("CalibrationManager",),
    "checkpoint": ("load_ptq_model", "save_ptq_model"),
    "models": ("QuantizedComponent", "quantize_model"),
    "open_quantized": ("open_quantized",),
    "ptq": ("apply_scales", "quantize_ptq", "scales_of"),
    "qat": ("QatOptions", "finetune"),
    "record": ("disable_quantization", "enable_quantization", "print_quantizer_status", "quantizer_table"),
}
_HOME = {name: f"{__name__}.{module}" for module, names in _MODULES.items() for name in names} | {
    "fuse_model_bn": "cp_debug.programs.batchnorm_folding",
    "LayerScales": "cp_debug.graph.scales",
    "Scales": "cp_debug.graph.scales",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
