"""Boxes of many samples in flat arrays: predictions, which have a file, or ground truth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cp_debug.files import complete_path
from cp_debug.recipes.abilities import DetectsBoxes
from cp_debug.recipes.data.base import attributes_of

if TYPE_CHECKING:
    from typing_extensions import Self


Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Objects:
    """Objects of many samples, one after the other.

    centers: [N, 2] x and y in m. samples: [N] which sample each is in (any integers). labels: [N] class indices.
    scores: [N] confidence; of no meaning for ground truth.
    """

    centers: Floats
    samples: Ints
    labels: Ints
    scores: Floats

    @classmethod
    def gather(cls, samples: Sequence[tuple[Floats, Ints, Floats]]) -> Objects:
        """Objects of several samples, from (centers [n, 2], labels [n], scores [n]) of each."""
        return Objects(
            centers=np.concatenate([np.reshape(centers, (-1, 2)) for centers, _, _ in samples]).astype(np.float64),
            samples=np.repeat(np.arange(len(samples)), [len(labels) for _, labels, _ in samples]),
            labels=np.concatenate([labels for _, labels, _ in samples]).astype(np.int64),
            scores=np.concatenate([scores for _, _, scores in samples]).astype(np.float64),
        )

    def __len__(self) -> int:
        return len(self.samples)

    def take(self, chosen: NDArray) -> Self:
        """The objects of a mask or of indices."""
        return type(self)(*(getattr(self, field.name)[chosen] for field in fields(self)))

    def of_class(self, label: int) -> Self:
        """The boxes whose label is ``label``."""
        return self.take(self.labels == label)


@dataclass(frozen=True)
class Boxes(Objects):
    """Objects with everything that a box tells.

    heights: [N] z of the gravity centre (m). sizes: [N, 3] length, width, height (m). yaws: [N] rad, counter-clockwise
    from x. velocities: [N, 2] m/s, NaN where unknown. attributes: [N] names, "" where unknown.
    """

    heights: Floats
    sizes: Floats
    yaws: Floats
    velocities: Floats
    attributes: NDArray[np.str_]

    @classmethod
    def of(
        cls, boxes: ArrayLike, samples: Ints, labels: ArrayLike, scores: ArrayLike, attributes: NDArray[np.str_]
    ) -> Boxes:
        """Boxes from rows [N, 9]: x, y, z of the gravity centre, length, width, height, yaw, velocity."""
        x = np.asarray(boxes, dtype=np.float64).reshape(-1, 9)
        kinds, confidence = np.asarray(labels, dtype=np.int64), np.asarray(scores, dtype=np.float64)
        return cls(x[:, :2], samples, kinds, confidence, x[:, 2], x[:, 3:6], x[:, 6], x[:, 7:], attributes)

    @property
    def finite(self) -> NDArray[np.bool_]:
        """Mask [N] of boxes whose seven numbers hold neither NaN nor Inf; the others match nothing."""
        numbers = np.column_stack((self.centers, self.heights, self.sizes, self.yaws))
        return np.logical_and.reduce(np.isfinite(numbers), axis=1)


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
