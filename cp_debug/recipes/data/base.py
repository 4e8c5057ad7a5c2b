"""Data sets: clouds in the model's columns, and the ground truth in the model's labels, with nuScenes' attributes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cp_debug.recipes.base import Sample

NAMES = (
    "cycle.with_rider",
    "cycle.without_rider",
    "pedestrian.moving",
    "pedestrian.standing",
    "pedestrian.sitting_lying_down",
    "vehicle.moving",
    "vehicle.parked",
    "vehicle.stopped",
    "",
)
"""Names of the attributes, by ``attr_label`` of mmdet3d's infos."""

MOVING_SPEED = 0.2
"""Speed in m/s from which an object counts as moving, as in mmdet3d's NuScenesMetric."""

_VEHICLES = ("car", "construction_vehicle", "bus", "truck", "trailer")
_MOVING_AND_NOT = {
    **dict.fromkeys(_VEHICLES, ("vehicle.moving", "vehicle.parked")),
    "bus": ("vehicle.moving", "vehicle.stopped"),
    **dict.fromkeys(("bicycle", "motorcycle"), ("cycle.with_rider", "cycle.without_rider")),
    "pedestrian": ("pedestrian.moving", "pedestrian.standing"),
    **dict.fromkeys(("barrier", "traffic_cone"), ("", "")),
}


def attributes_of(class_names: ArrayLike, velocities: ArrayLike) -> NDArray[np.str_]:
    """Attributes [N] that mmdet3d's NuScenesMetric gives to boxes of these classes [N] and velocities [N, 2] in m/s.

    CenterPoint predicts no attribute. A class that nuScenes does not have is ``moving`` or ``still``.
    """
    names = np.asarray(class_names, dtype=np.str_)
    moving = np.linalg.norm(np.reshape(velocities, (-1, 2)), axis=1) > MOVING_SPEED
    attributes = np.where(moving, "moving", "still").astype("<U32")
    for name, (fast, slow) in _MOVING_AND_NOT.items():
        attributes = np.where(names == name, np.where(moving, fast, slow), attributes)
    return attributes


@dataclass(frozen=True)
class Truth:
    """The objects of one sample, in the LiDAR's frame.

    boxes: [M, 7] x, y, z of the gravity centre, length, width, height (m), yaw (rad, counter-clockwise from x).
    labels: [M] index into the model's classes. velocities: [M, 2] m/s, NaN where unknown.
    num_points: [M] points in the box (LiDAR and radar, as nuScenes counts). attributes: [M] names, "" where unknown.
    """

    boxes: NDArray[np.float32]
    labels: NDArray[np.int64]
    velocities: NDArray[np.float32]
    num_points: NDArray[np.int64]
    attributes: NDArray[np.str_]


@dataclass(frozen=True)
class DataOptions:
    """Options for reading a data set.

    root: folder that paths in an info file are relative to; None: the file's folder, then the folders above it. sweeps:
    earlier sweeps to merge, at most, where the model takes ``dt``. skip_missing: leave samples out whose clouds are
    missing, instead of an error.
    """

    root: Path | None = None
    sweeps: int = 9
    skip_missing: bool = False


class DataSet(Protocol):
    """Samples by number, read when asked for. A ``Sample`` has ``points`` and, where it is known, a ``Truth``."""

    @property
    def name(self) -> str:
        """Name of the data set for people."""
        ...

    @property
    def notes(self) -> Sequence[str]:
        """Remarks that a reader of the results must know: classes and samples that were left out."""
        ...

    def __len__(self) -> int: ...

    def sample(self, index: int) -> Sample:
        """Sample ``index`` of ``len(self)``. Raises InputError for an unusable cloud."""
        ...


def iterate(data: DataSet) -> Iterator[Sample]:
    """All samples in order."""
    return (data.sample(index) for index in range(len(data)))
