"""Tolerances in units of a tensor's own rounding noise, not one number for all.

A network amplifies rounding differently at each output. The distance between FP32 and FP64 shows how much FP32 rounding
arrives there; a precision of larger unit roundoff brings proportionally more. On the tiny CenterPoint the distance of
ONNX Runtime and of emulated TF32, BF16, FP16 and FP16 accumulation is 0.13 to 2.8 times that prediction, at every
output; ``MARGIN`` leaves room for other orders of summation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from cp_debug.backends.base import Program
from cp_debug.backends.registry import create
from cp_debug.backends.spec import BackendSpec
from cp_debug.errors import InputError
from cp_debug.graph.declared import narrow_values
from cp_debug.probes.statistics import compare
from cp_debug.probes.strings import is_text
from cp_debug.programs.pipeline import Key, Pipeline
from cp_debug.programs.precision import PRECISIONS, coarsest
from cp_debug.recipes.base import Arrays, Model, Sample

MARGIN = 8.0
"""Largest multiple of the predicted noise that is let through."""
_FP32 = PRECISIONS["fp32"].roundoff


def noise_floors(
    model: Model, programs: Sequence[Program], sample: Sample, single: Mapping[str, Arrays] | None = None
) -> dict[Key, float]:
    """Relative L2 distance of FP32 from FP64 at every output of every component.

    Modules and files in FP16 or BF16 compute in that where FP32 is asked for: their noise is scaled to FP32.

    ``single``: the results of an FP32 run on this sample, where there are some already.
    """
    exact = _run(model, programs, sample, "torch-fp64")
    fp32_results = single or _run(model, programs, sample, "torch")
    scales = {p.name: _FP32 / coarsest("fp32", *narrow_values(p.graph).values()).roundoff for p in programs}
    return {
        Key(component, name): max(scales[component] * _noise(array, fp32_results[component].get(name)), _FP32)
        for component, outputs in exact.items()
        for name, array in outputs.items()
    }


def _noise(exact: np.ndarray, single: np.ndarray | None) -> float:
    """Distance of an output in FP32; 0 for strings, and for an element that a sequence has in one of the runs alone."""
    if single is None or is_text(exact) or exact.shape != single.shape:
        return 0.0
    return compare(exact, single).finite_rel_l2


def _run(model: Model, programs: Sequence[Program], sample: Sample, spec: str) -> dict[str, Arrays]:
    with Pipeline(model, programs, create(BackendSpec(spec))) as pipeline:
        return pipeline.run(sample)


class Tolerances:
    """Relative L2 limits: the user's, else ``MARGIN`` times the noise predicted from the floor.

    ``given``: by tensor (``heatmap``), by precision (``fp16``) or both (``heatmap@fp16``). Raises InputError for a name
    that is neither a tensor of ``names`` nor a precision.
    """

    def __init__(self, given: Mapping[str, float], names: Sequence[str]) -> None:
        for key in given:
            tensor, sign, precision = key.partition("@")
            fits = tensor in names and (not sign or precision in PRECISIONS)
            if not (fits or (key in PRECISIONS)):
                raise InputError(
                    f"tolerance {key!r}: expected a tensor ({', '.join(names)}), a precision ({', '.join(PRECISIONS)}) "
                    "or TENSOR@PRECISION"
                )
        self._given = given

    def limit(self, name: str, floor: float, *precisions: str, whole: bool = False) -> float:
        """The largest relative L2 distance of a tensor between two sides, by the precisions of backends and files.

        ``whole``: it holds indices, ids or masks, which are equal unless the user said something of this tensor.
        """
        precision = coarsest(*precisions)
        for key in (f"{name}@{precision.name}", name):
            if key in self._given:
                return self._given[key]
        if whole:
            return 0.0
        if precision.name in self._given:
            return self._given[precision.name]
        return MARGIN * floor * max(precision.roundoff / _FP32, 1.0)
