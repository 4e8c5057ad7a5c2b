"""Boxes of many samples in flat arrays: predictions, or ground truth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

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
