"""Voxelization of both sides compared: the pillars, their order, and the places where they are cut off."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cp_debug.errors import InputError
from cp_debug.reading import read_npz
from cp_debug.recipes.centerpoint.config import CenterPointConfig
from cp_debug.recipes.centerpoint.voxelize import Voxels, voxelize
from cp_debug.serialize import JsonForm


@dataclass(frozen=True)
class VoxelChange(JsonForm):
    """Changes from the reference's pillars to the test's, for one cloud."""

    reference: int
    """Pillars of the reference."""
    test: int
    lost: int
    """Cells that only the reference has."""
    gained: int
    reordered: int
    """Pillars of both sides whose place among these differs."""
    changed: int
    """Pillars of both sides that hold other points, or the same in another order."""
    max_abs: float
    """Largest difference of a point's value, infinite where NaN meets a number; 0 where no pillar of both sides
    changed."""
    dropped_points: tuple[int, int]
    """Points in range that each side left out, as its pillar was full or one too many."""

    @property
    def agrees(self) -> bool:
        """Whether both sides feed the encoder the same tensor."""
        return not (self.lost or self.gained or self.reordered or self.changed)

    def derived(self) -> dict[str, Any]:
        """Whether both sides feed the encoder the same tensor."""
        return {"agrees": self.agrees}

    def __str__(self) -> str:
        ours, theirs = self.dropped_points
        dropped = f"{ours} points dropped" if ours == theirs else f"{ours} and {theirs} points dropped"
        if self.agrees and not self.reference:
            return f"no pillar on either side: the cloud is empty, or none of its points is in range; {dropped}"
        if self.agrees:
            return f"{self.reference} pillars, equal in order and content; {dropped}"
        phrases = [f"{self.reference} pillars against {self.test}"]
        phrases += [f"{self.lost} lost"] * bool(self.lost) + [f"{self.gained} gained"] * bool(self.gained)
        phrases += [f"{self.reordered} in another order"] * bool(self.reordered)
        phrases += [f"{self.changed} with other points (up to {self.max_abs:.3g})"] * bool(self.changed)
        return f"{', '.join(phrases)}; {dropped}"


def compare_voxels(reference: Voxels, test: Voxels, points: np.ndarray, config: CenterPointConfig) -> VoxelChange:
    """Compare the pillars of one cloud ``points`` [M, C], as two implementations made them."""
    ours, theirs = _cells(reference, config), _cells(test, config)
    common, place_in_reference, place_in_test = np.intersect1d(ours, theirs, return_indices=True)
    a, b = reference.voxels.cpu().numpy()[place_in_reference], test.voxels.cpu().numpy()[place_in_test]
    slots = max(a.shape[1], b.shape[1])
    a, b = _padded(a, slots), _padded(b, slots)
    equal = (a == b) | (np.isnan(a) & np.isnan(b))
    apart = np.where(equal, 0, np.nan_to_num(np.abs(a - b), nan=np.inf))
    gaps = apart.reshape(len(common), math.prod(apart.shape[1:])).max(axis=1, initial=0)
    counts = reference.num_points.cpu().numpy()[place_in_reference] != test.num_points.cpu().numpy()[place_in_test]
    inside = _in_range(points, config)
    return VoxelChange(
        reference=len(ours),
        test=len(theirs),
        lost=len(ours) - len(common),
        gained=len(theirs) - len(common),
        reordered=int((np.argsort(np.argsort(place_in_reference)) != np.argsort(np.argsort(place_in_test))).sum()),
        changed=int(((gaps > 0) | counts).sum()),
        max_abs=float(gaps.max(initial=0)),
        dropped_points=(inside - int(reference.num_points.sum()), inside - int(test.num_points.sum())),
    )


def voxelize_on(points: np.ndarray, config: CenterPointConfig, device: str) -> Voxels:
    """Pillars of one cloud ``points`` [M, C], made on a device and brought back to the CPU.

    They are made on the CPU where torch has no GPU, as beside TensorRT in an environment of its own.
    """
    pillars = voxelize(torch.from_numpy(points).to(device if torch.cuda.is_available() else "cpu"), config)
    return Voxels(*(tensor.cpu() for tensor in pillars))


def read_voxels(path: Path, config: CenterPointConfig) -> Voxels:
    """Pillars that another implementation wrote into an ``.npz`` file.

    It holds ``voxels`` [N, P, C] float, ``num_points`` [N] integers, ``coors`` [N, 3 or 4] integers (z, y, x last).
    Raises InputError that names file and array.
    """
    archive = read_npz(path)
    if missing := [name for name in Voxels._fields if name not in archive]:
        raise InputError(f"{path}: expected an .npz file with {', '.join(Voxels._fields)}; it has no {missing[0]}")
    voxels, counts, coors = (archive[name] for name in Voxels._fields)
    for name, array, kinds in (("voxels", voxels, "f"), ("num_points", counts, "iu"), ("coors", coors, "iu")):
        if array.dtype.kind not in kinds or not array.dtype.isnative:
            raise InputError(f"{path}: {name} is {array.dtype}; expected {'floats' if kinds == 'f' else 'integers'}")
    columns = len(config.point_features)
    if voxels.ndim != 3 or voxels.shape[2] != columns:
        raise InputError(f"{path}: voxels has shape {list(voxels.shape)}; expected [N, P, {columns}]")
    if counts.shape != (len(voxels),) or coors.shape[0] != len(voxels) or coors.shape[1:] not in ((3,), (4,)):
        raise InputError(
            f"{path}: num_points {list(counts.shape)} and coors {list(coors.shape)} do not fit {len(voxels)} voxels; "
            "expected [N] and [N, 3 or 4]"
        )
    return Voxels(torch.from_numpy(voxels), torch.from_numpy(counts), torch.from_numpy(coors))


def _cells(voxels: Voxels, config: CenterPointConfig) -> np.ndarray:
    """[N] one number a cell."""
    nx, ny, _ = config.grid
    z, y, x = voxels.coors.cpu().numpy().astype(np.int64).T[-3:]
    return (z * ny + y) * nx + x


def _padded(voxels: np.ndarray, slots: int) -> np.ndarray:
    return np.pad(voxels, ((0, 0), (0, slots - voxels.shape[1]), (0, 0)))


def _in_range(points: np.ndarray, config: CenterPointConfig) -> int:
    low, high = (
        np.array(limits, np.float32) for limits in (config.point_cloud_range[:3], config.point_cloud_range[3:])
    )
    cells = np.floor((points[:, :3] - low) / np.array(config.voxel_size, np.float32))
    return int(((cells >= 0) & (cells < np.round((high - low) / np.array(config.voxel_size)))).all(axis=1).sum())
