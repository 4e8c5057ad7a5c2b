"""INT8: calibration, fake quantisation, checkpoints, and Q/DQ graphs. Names are imported when they are used."""

from __future__ import annotations

from importlib import import_module
from typing import Any

_MODULES = {
    "calibration": ("CalibrationManager",),
    "checkpoint": ("load_ptq_model", "save_ptq_model"),
    "folding": ("fuse_model_bn",),
    "models": ("QuantizedComponent", "quantize_model"),
    "opening": ("open_quantized",),
    "ptq": ("apply_scales", "quantize_ptq", "scales_of"),
    "qat": ("QatOptions", "finetune"),
    "scales": ("LayerScales", "Scales"),
    "sensitivity": ("SensitivityProfile", "build_sensitivity_profile", "get_sensitive_layers"),
    "toggles": ("disable_quantization", "enable_quantization", "print_quantizer_status", "quantizer_table"),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
