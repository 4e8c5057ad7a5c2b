"""Turned rectangles: the area that two have in common, many pairs at a time."""

from __future__ import annotations

import numpy as np

_CORNERS = np.array([[-0.5, -0.5], [0.5, -0.5], [0.5, 0.5], [-0.5, 0.5]])


def intersection_areas(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Common area [K] of the rectangles in each row of ``a`` and ``b`` [K, 5]: x, y, length, width, yaw.

    The border of ``a``, in the frame of ``b``, with each point outside moved to the nearest of ``b``: what is outside
    collapses onto the border of ``b`` and encloses nothing, so the curve encloses the intersection. It bends where an
    edge crosses a side's line. Lengths in metres, angles in radians, areas in m².
    """
    corners, limits = _corners(a, b), b[:, None, 2:4] / 2
    steps = np.roll(corners, -1, axis=1) - corners
    with np.errstate(divide="ignore", invalid="ignore"):
        crossings = np.concatenate(((-limits - corners) / steps, (limits - corners) / steps), axis=-1)
    bends = np.sort(np.clip(np.nan_to_num(crossings), 0, 1), axis=-1)
    bends = np.concatenate((np.zeros_like(bends[..., :1]), bends), axis=-1)[..., None]
    curve = np.clip(corners[:, :, None] + bends * steps[:, :, None], -limits[:, None], limits[:, None])
    x, y = np.moveaxis(curve.reshape(len(a), 4 * 5, 2), -1, 0)
    return (x * np.roll(y, -1, axis=1) - y * np.roll(x, -1, axis=1)).sum(axis=1) / 2


def _corners(of: np.ndarray, frame: np.ndarray) -> np.ndarray:
    """Corners [K, 4, 2] of the rectangles, counter-clockwise, in the frames of others (their centres, their axes)."""
    local = _CORNERS * of[:, None, 2:4]
    return _turned(_turned(local, of[:, 4]) + (of[:, :2] - frame[:, :2])[:, None], -frame[:, 4])


def _turned(points: np.ndarray, yaw: np.ndarray) -> np.ndarray:
    cos, sin = np.cos(yaw)[:, None], np.sin(yaw)[:, None]
    x, y = points[..., 0], points[..., 1]
    return np.stack((x * cos - y * sin, x * sin + y * cos), axis=-1)
