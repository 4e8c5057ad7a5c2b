"""Detection metrics in parts: class by class, and by distance from the sensor, backends side by side with intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import ArrayLike

from cp_debug.detection.bootstrap import ConfidenceInterval, draw_samples, intervals
from cp_debug.detection.boxes import Boxes, Floats, Ints, Predictions
from cp_debug.detection.evaluation import EvaluationOptions, boxes_that_count, objects_that_count
from cp_debug.detection.metrics import Scores, score
from cp_debug.errors import InputError
from cp_debug.recipes.data.base import Truth
from cp_debug.serialize import JsonForm

RINGS = 3
"""Rings into which the region is cut where nobody names their edges."""


@dataclass(frozen=True)
class Rings:
    """Distances from the sensor, seen from above, in consecutive rings; the last has no end."""

    edges: tuple[float, ...]
    """Metres at which one ring ends and the next begins, rising."""

    @property
    def names(self) -> list[str]:
        """Names of the rings, the nearest first."""
        edges = [f"{edge:g}" for edge in self.edges]
        return [*(f"{near}–{far} m" for near, far in zip(["0", *edges], edges, strict=False)), f"from {edges[-1]} m"]

    def of(self, centers: ArrayLike) -> Ints:
        """Ring [N] of each centre [N, 2 or more] in m; one that is nowhere (NaN) is in the last."""
        distances = np.linalg.norm(np.asarray(centers, dtype=np.float64)[:, :2], axis=1)
        return np.searchsorted(np.array(self.edges), distances, side="right")


def rings_of(edges: Sequence[float], options: EvaluationOptions) -> Rings:
    """Rings with these ``edges`` in m; without any, ``RINGS`` of equal width as far as boxes count.

    Raises InputError for edges that do not rise from above 0.
    """
    if edges:
        if any(far <= near for near, far in zip([0.0, *edges], edges, strict=False)):
            given = ",".join(f"{edge:g}" for edge in edges)
            raise InputError(f"--distances: {given}; expected metres that rise, as in 20,40")
        return Rings(tuple(edges))
    farthest = options.farthest
    if not np.isfinite(farthest):
        return Rings((20.0, 40.0))
    return Rings(tuple(round(farthest * place / RINGS, 1) for place in range(1, RINGS)))


@dataclass(frozen=True)
class PartScores(JsonForm):
    """Figures of all backends on one class, or in one ring of distances."""

    part: str
    """Name of the class, or of the ring."""
    objects: int
    """Objects of the ground truth in it."""
    figures: dict[str, dict[str, ConfidenceInterval]]
    """Backend → figure: ``AP`` of a class; ``mAP`` and ``NDS`` of a ring, over the classes that have objects there."""
    differences: dict[str, dict[str, ConfidenceInterval]]
    """Test backend → figure less the reference's, drawn on the same samples."""


def by_class(
    predictions: Mapping[str, Predictions],
    truths: Sequence[Truth],
    class_names: Sequence[str],
    options: EvaluationOptions,
) -> list[PartScores]:
    """AP of each class; the first of ``predictions`` (backend → detections) is the reference."""
    truth, _ = objects_that_count(truths, class_names, options)
    scores = {spec: _scores(boxes_that_count(each, class_names, options), truth, class_names, options, len(truths))
              for spec, each in predictions.items()}  # fmt: skip
    return [
        _part(
            name,
            int((truth.labels == label).sum()),
            {spec: {"AP": each.precisions[:, label].mean(axis=1)} for spec, each in scores.items()},
        )
        for label, name in enumerate(class_names)
    ]


def by_distance(
    predictions: Mapping[str, Predictions],
    truths: Sequence[Truth],
    class_names: Sequence[str],
    options: EvaluationOptions,
    rings: Rings,
) -> list[PartScores]:
    """mAP and NDS in each ring that has objects; the first of ``predictions`` is the reference.

    Detections and objects are in the ring where their own centre is, as nuScenes' range of a class has it: a pair
    across an edge counts as one missed and one false. Means are over the classes with objects in the ring.
    """
    truth, _ = objects_that_count(truths, class_names, options)
    boxes = {spec: boxes_that_count(each, class_names, options) for spec, each in predictions.items()}
    parts = []
    for place, name in enumerate(rings.names):
        objects = truth.take(rings.of(truth.centers) == place)
        present = np.unique(objects.labels)
        if not len(present):
            continue
        draws = {}
        for spec, of_backend in boxes.items():
            inside = of_backend.take(rings.of(of_backend.centers) == place)
            scores = _scores(inside, objects, class_names, options, len(truths))
            chosen = Scores(*(getattr(scores, figure.name)[:, present] for figure in fields(Scores)))
            draws[spec] = {figure: values for figure, values in chosen.summary().items() if figure in ("mAP", "NDS")}
        parts.append(_part(name, len(objects), draws))
    return parts


def _scores(boxes: Boxes, truth: Boxes, class_names: Sequence[str], options: EvaluationOptions, samples: int) -> Scores:
    return score(boxes, truth, class_names, draw_samples(samples, options.draws, options.seed))


def _part(name: str, objects: int, draws: Mapping[str, Mapping[str, Floats]]) -> PartScores:
    reference, *tests = draws
    figures = {spec: intervals(each) for spec, each in draws.items()}
    return PartScores(name, objects, figures, {spec: intervals(draws[spec], draws[reference]) for spec in tests})
