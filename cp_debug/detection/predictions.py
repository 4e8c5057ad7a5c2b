"""Detections of a backend in every sample, in flat arrays and in a file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cp_debug.detection.boxes import Boxes
from cp_debug.files import complete_path
from cp_debug.recipes.abilities import DetectsBoxes
from cp_debug.recipes.data.attributes import attributes_of

_FIELDS = ("boxes", "scores", "labels", "counts")


@dataclass(frozen=True)
class Predictions:
    """Detections of S samples, one after the other: ``counts`` [S] boxes each.

    boxes: [N, 9] float32, z of the gravity centre, as in ``Truth``, then the velocity. scores: [N] float32. labels: [N]
    int16.
    """

    boxes: NDArray[np.float32]
    scores: NDArray[np.float32]
    labels: NDArray[np.int16]
    counts: NDArray[np.int64]

    @classmethod
    def gather(cls, samples: Sequence[DetectsBoxes]) -> Predictions:
        """Predictions from detections with z of the *bottom* centre, as mmdet3d predicts."""
        boxes = np.concatenate([np.zeros((0, 9), np.float32), *(detected.boxes for detected in samples)])
        boxes[:, 2] += boxes[:, 5] / 2
        return cls(
            boxes.astype(np.float32),
            np.concatenate([np.zeros(0), *(detected.scores for detected in samples)]).astype(np.float32),
            np.concatenate([np.zeros(0), *(detected.labels for detected in samples)]).astype(np.int16),
            np.array([len(detected.scores) for detected in samples], dtype=np.int64),
        )

    def as_boxes(self, class_names: Sequence[str]) -> Boxes:
        """Boxes to score, with the attributes that classes and velocities suggest; a score of NaN is the lowest."""
        attributes = attributes_of(np.array(class_names)[self.labels], self.boxes[:, 7:])
        samples = np.repeat(np.arange(len(self.counts)), self.counts)
        return Boxes.of(self.boxes, samples, self.labels, np.nan_to_num(self.scores), attributes)


def save_predictions(path: Path, samples: Sequence[str], backends: Mapping[str, Predictions]) -> None:
    """Write an ``.npz`` with ``samples``, and ``<backend>/boxes``, ``/scores``, ``/labels``, ``/counts``.

    It appears whole or not at all. Raises InputError when it cannot be written.
    """
    arrays = {
        f"{spec}/{name}": getattr(predictions, name) for spec, predictions in backends.items() for name in _FIELDS
    }
    with complete_path(path) as partial, partial.open("wb") as stream:
        np.savez_compressed(stream, samples=np.array(samples, dtype=np.str_), **arrays)
