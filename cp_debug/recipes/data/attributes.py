"""nuScenes' attributes: their names in info files, and the ones that a velocity suggests."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

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
