"""The figures of a trial: its final outputs and detections against the reference's."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from cp_debug.backends.base import RunRecord
from cp_debug.detection.boxes import Predictions
from cp_debug.detection.changes import compare_detections
from cp_debug.detection.evaluation import EvaluationOptions, score_backends
from cp_debug.errors import InputError
from cp_debug.mixed_precision.goal import DETECTIONS, Goal, without_counts
from cp_debug.mixed_precision.trial import Measured
from cp_debug.probes.caveats import caveats, compare_any, why_nothing
from cp_debug.probes.statistics import TensorStats
from cp_debug.programs.scene import decode
from cp_debug.recipes.abilities import DetectsBoxes
from cp_debug.recipes.base import Arrays, Model, Sample

Results = Mapping[str, Arrays]
"""Component → output name → array."""


class Judge:
    """Measures against the reference's results, one a sample.

    Raises InputError for a reference with NaN in its outputs, or without a finite number in any of them, a goal on
    detections of a model that has none, and for ``map_drop`` without ground truth. Inf is a value like others: a test
    must have it at the same places.
    """

    def __init__(self, model: Model, samples: Sequence[Sample], reference: Sequence[Results], goal: Goal) -> None:
        self._model, self._samples, self._last = model, samples, model.components[-1].name
        self._outputs = [results[self._last] for results in reference]
        self._counts = sorted(goal.figures.intersection(DETECTIONS))
        self._scored = "map_drop" in goal.figures
        self._decoded: list[Any] = []
        own: dict[str, list[TensorStats]] = {}
        """Output → what the reference holds there, by sample."""
        for sample, outputs in zip(samples, self._outputs, strict=True):
            for name, array in outputs.items():
                own.setdefault(name, []).append(stats := compare_any(array, array))
                if stats.nan_ref:
                    raise InputError(
                        f"{sample.source}: the reference's output {name} holds {stats.nan_ref} NaN of {stats.count} "
                        "elements, so no goal can be judged by it; give other inputs"
                    )
        if why := why_nothing(own):
            raise InputError(f"{model.name}: no goal can be judged: {why}; give other inputs")
        self._notes = caveats(own)
        if self._counts or self._scored:
            self._decoded = [decode(model, *pair) for pair in zip(samples, reference, strict=True)]
            if not all(isinstance(decoded, DetectsBoxes) for decoded in self._decoded):
                raise without_counts(model.name)
        if self._scored and any(sample.truth is None for sample in samples):
            raise InputError("--goal: map_drop needs samples with ground truth; give an info file with --data")

    @property
    def notes(self) -> list[str]:
        """Remarks that a reader of the figures must know."""
        empty = self._decoded and not any(len(decoded.scores) for decoded in self._decoded)
        says = ["the reference detects nothing on these samples, so there is nothing to lose"] if empty else []
        return [*self._notes, *says]

    def measure(self, results: Sequence[Results]) -> Measured:
        """Figures of one run over all samples. Raises InputError for a run that lacks an output."""
        outputs: dict[str, float] = {}
        largest = 0.0
        for reference, test in zip(self._outputs, results, strict=True):
            if missing := sorted(reference.keys() - test[self._last].keys()):
                present = ", ".join(test[self._last]) or "none"
                raise InputError(f"{self._last}: the test has no output {missing[0]!r}; its outputs are {present}")
            for name, array in reference.items():
                stats = compare_any(array, test[self._last][name])
                outputs[name] = max(outputs.get(name, 0.0), _or_infinite(stats.rel_l2))
                largest = max(largest, _or_infinite(stats.max_abs))
        figures = {"rel_l2": max(outputs.values(), default=0.0), "max_abs": largest}
        if self._decoded:
            figures |= self._detections(
                [decode(self._model, *pair) for pair in zip(self._samples, results, strict=True)]
            )
        return Measured(figures, outputs)

    def _detections(self, decoded: Sequence[Any]) -> dict[str, float]:
        if any(detections is None for detections in decoded):  # outputs that the decoder cannot read
            return dict.fromkeys((*self._counts, *(("map_drop",) if self._scored else ())), math.inf)
        changes = [compare_detections(a, b) for a, b in zip(self._decoded, decoded, strict=True)]
        figures = {name: float(sum(getattr(c, name.removeprefix("boxes_")) for c in changes)) for name in self._counts}
        if self._scored:
            figures["map_drop"] = self._map_drop(decoded)
        return figures

    def _map_drop(self, decoded: Sequence[Any]) -> float:
        model: Any = self._model
        names = ("reference", "test")
        runs = {
            name: (RunRecord(name, "", "", False), Predictions.gather(detections))
            for name, detections in zip(names, (self._decoded, decoded), strict=True)
        }
        options = EvaluationOptions(region=model.region, draws=0)
        scores, _ = score_backends(runs, [sample.truth for sample in self._samples], model.class_names, options)
        assert scores[1].difference is not None
        return -100 * scores[1].difference["mAP"].value


def _or_infinite(value: float) -> float:
    return value if math.isfinite(value) else math.inf
