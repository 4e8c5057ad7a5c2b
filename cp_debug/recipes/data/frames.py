"""Changes of coordinate frames, bit for bit as mmdet3d 1.4 computes them."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

CLOSE = 1.0
"""Points of an earlier sweep nearer than this to the sensor, in both x and y, are the car itself (m)."""


def camera_boxes_to_lidar(boxes: ArrayLike, lidar2cam: ArrayLike) -> NDArray[np.float64]:
    """Boxes of a camera's frame [M, 7] in the LiDAR's frame [M, 7], z of the *bottom* centre in both.

    In: x, y, z (right, down, forward), length, height, width, rotation about y; out: x, y, z (forward, left, up),
    length, width, height, yaw; metres and radians. Formula of mmdet3d's ``Box3DMode.convert``: the sensors' small
    relative tilt does not enter the yaw.
    """
    camera = np.array(boxes, dtype=np.float64).reshape(-1, 7)
    centres = np.concatenate((camera[:, :3], np.ones((len(camera), 1))), axis=1)
    lidar = np.empty_like(camera)
    lidar[:, :3] = (centres @ np.linalg.inv(np.asarray(lidar2cam, dtype=np.float64)).T)[:, :3]
    lidar[:, 3:6] = camera[:, [3, 5, 4]]
    lidar[:, 6] = (-camera[:, 6] - np.pi / 2 + np.pi) % (2 * np.pi) - np.pi
    return lidar


def bottom_to_centre(boxes: NDArray[np.float64]) -> NDArray[np.float64]:
    """Boxes [M, ≥ 7] with z moved from the bottom centre to the gravity centre."""
    moved = boxes.copy()
    moved[:, 2] += moved[:, 5] / 2
    return moved


def without_close(points: np.ndarray, radius: float = CLOSE) -> np.ndarray:
    """The points [N, C] of a sweep that are farther than ``radius`` m from the sensor in x or y."""
    return points[(np.abs(points[:, :2]) >= radius).any(axis=1)]


def to_reference(xyz: NDArray[np.float32], lidar2sensor: ArrayLike) -> NDArray[np.float32]:
    """Points [N, 3] of an earlier sweep in the frame of the reference sweep.

    ``lidar2sensor`` [4, 4] takes the reference LiDAR's frame to that of the sweep. mmdet3d's loader subtracts the
    stored translation without turning it; its converter stores it turned, so that in bends the sweep is off by
    2 sin(θ/2) |t|. Models are trained on such clouds, and so they are fed here.
    """
    matrix = np.asarray(lidar2sensor, dtype=np.float64)
    turned: NDArray[np.float32] = (xyz @ matrix[:3, :3]).astype(np.float32)
    turned -= matrix[:3, 3]
    return turned
