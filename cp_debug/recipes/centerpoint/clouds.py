"""Clouds that are not what they should be: empty, out of the model's range, or with NaN and Inf in them."""

from __future__ import annotations

import numpy as np

from cp_debug.recipes.centerpoint.config import CenterPointConfig


def cloud_remarks(points: np.ndarray, source: str, config: CenterPointConfig) -> list[str]:
    """Sentences about a cloud ``points`` [N, C] float32 that a reader must know; none for a sound one."""
    limits = np.array(config.point_cloud_range, np.float32)
    if not len(points):
        return [f"{source}: the cloud is empty, so the model is compared without points"]
    lines = []
    inside = ((points[:, :3] >= limits[:3]) & (points[:, :3] < limits[3:])).all(axis=1)
    if not inside.any():
        where = ", ".join(f"{low:g} to {high:g}" for low, high in zip(limits[:3], limits[3:], strict=True))
        lines.append(f"{source}: none of the {len(points)} points is in the model's range (x, y, z: {where})")
    if strange := int((~np.isfinite(points).all(axis=1)).sum()):
        lines.append(f"{source}: {strange} of {len(points)} points hold NaN or Inf")
    return lines
