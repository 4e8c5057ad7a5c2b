"""cpdebug names the first layer whose result its precision cannot explain.

``cp_debug.diagnose(model, backends)`` is the main job as a function. It returns a result that shows itself in a
terminal and in a notebook; ``.layers`` is a pandas DataFrame. Names are imported when they are used.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

from cp_debug.version import __version__

if TYPE_CHECKING:
    from cp_debug.api.diagnose import assert_agree, diagnose
    from cp_debug.api.jobs import evaluate, predict, quantize, search, verify
    from cp_debug.api.tensors import compare_tensors
    from cp_debug.bisect.engine import Options
    from cp_debug.bisect.result import BisectResult
    from cp_debug.bisect.result_diff import diff_results
    from cp_debug.deploy.exporting import ExportOptions
    from cp_debug.deploy.quantize_output import PtqResult
    from cp_debug.deploy.verify import VerifyOptions, VerifyResult
    from cp_debug.detection.evaluation import EvaluationOptions, EvaluationResult
    from cp_debug.errors import BackendUnavailable, CpdebugError, InputError, MissingPackage
    from cp_debug.mixed_precision.result import MixedPrecisionResult
    from cp_debug.mixed_precision.search import MixedPrecisionOptions
    from cp_debug.prediction.predict import PredictOptions
    from cp_debug.prediction.result import Prediction
    from cp_debug.probes.capture import Capture
    from cp_debug.probes.statistics import compare
    from cp_debug.recipes.input_files import Reading
    from cp_debug.reports.saved import open_result

# Torch then asks Linux for huge pages: fresh memory, which every replayed layer takes, costs 512 times fewer page
# faults. It reads the variable at its first allocation.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

__all__ = [
    "BackendUnavailable",
    "BisectResult",
    "Capture",
    "CpdebugError",
    "EvaluationOptions",
    "EvaluationResult",
    "ExportOptions",
    "InputError",
    "MissingPackage",
    "MixedPrecisionOptions",
    "MixedPrecisionResult",
    "Options",
    "PredictOptions",
    "Prediction",
    "PtqResult",
    "Reading",
    "VerifyOptions",
    "VerifyResult",
    "__version__",
    "assert_agree",
    "compare",
    "compare_tensors",
    "diagnose",
    "diff_results",
    "evaluate",
    "open_result",
    "predict",
    "quantize",
    "search",
    "verify",
]

_NAMES = {
    "api.diagnose": ("assert_agree", "diagnose"),
    "api.jobs": ("evaluate", "predict", "quantize", "search", "verify"),
    "api.tensors": ("compare_tensors",),
    "bisect.engine": ("Options",),
    "bisect.result": ("BisectResult",),
    "bisect.result_diff": ("diff_results",),
    "deploy.exporting": ("ExportOptions",),
    "deploy.quantize_output": ("PtqResult",),
    "deploy.verify": ("VerifyOptions", "VerifyResult"),
    "detection.evaluation": ("EvaluationOptions", "EvaluationResult"),
    "errors": ("BackendUnavailable", "CpdebugError", "InputError", "MissingPackage"),
    "mixed_precision.result": ("MixedPrecisionResult",),
    "mixed_precision.search": ("MixedPrecisionOptions",),
    "prediction.predict": ("PredictOptions",),
    "prediction.result": ("Prediction",),
    "probes.capture": ("Capture",),
    "probes.statistics": ("compare",),
    "recipes.input_files": ("Reading",),
    "reports.saved": ("open_result",),
}
"""Module → its names here. None is called as a folder of the package: importing that would hide it."""
_HOME = {name: module for module, names in _NAMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'cp_debug' has no attribute {name!r}")
    return getattr(import_module(f"cp_debug.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
