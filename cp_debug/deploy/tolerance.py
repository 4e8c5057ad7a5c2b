"""Tolerances in units of a tensor's own rounding noise, not one number for all.

A network amplifies rounding differently at each output. The distance between FP32 and FP64 shows how much FP32 rounding
arrives there; a precision of larger unit roundoff brings proportionally more. On the tiny CenterPoint the distance of
ONNX Runtime and of emulated TF32, BF16, FP16 and FP16 accumulation is 0.13 to 2.8 times that prediction, at every
output; ``MARGIN`` leaves room for other orders of summation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from cp_debug.backends.base import Program
from cp_debug.backends.registry import create
from cp_debug.backends.spec import BackendSpec
from cp_debug.errors import InputError
from cp_debug.probes.statistics import compare
from cp_debug.programs.pipeline import Key, Pipeline
from cp_debug.programs.precision import PRECISIONS, coarser
from cp_debug.recipes.base import Arrays, Model, Sample

MARGIN = 8.0
"""Largest multiple of the predicted noise that is let through."""
_FP32 = PRECISIONS["fp32"].roundoff


def noise_floors(
    model: Model, programs: Sequence[Program], sample: Sample, single: Mapping[str, Arrays] | None = None
) -> dict[Key, float]:
    """Relative L2 distance of FP32 from FP64 at every output of every component.

    ``single``: the results of an FP32 run on this sample, where there are some already.
    """
    exact = _run(model, programs, sample, "torch-fp64")
    fp32_results = single or _run(model, programs, sample, "torch")
    return {
        Key(component, name): max(compare(array, fp32_results[component][name]).finite_rel_l2, _FP32)
        for component, outputs in exact.items()
        for name, array in outputs.items()
    }


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

    def limit(self, name: str, floor: float, reference: str, test: str) -> float:
        """The largest relative L2 distance of a tensor between two precisions."""
        precision = coarser(reference, test)
        for key in (f"{name}@{precision.name}", name, precision.name):
            if key in self._given:
                return self._given[key]
        return MARGIN * floor * max(precision.roundoff / _FP32, 1.0)
