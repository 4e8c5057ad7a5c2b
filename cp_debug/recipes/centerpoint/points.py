"""Point files: raw float32 rows as nuScenes, KITTI and numpy store them."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np

from cp_debug.errors import InputError
from cp_debug.recipes.centerpoint.config import CenterPointConfig

COLUMNS = {".pcd.bin": ("x", "y", "z", "intensity", "ring"), ".bin": ("x", "y", "z", "intensity")}
"""What a file holds by its ending: nuScenes and T4 datasets, KITTI."""


def read_points(path: Path, config: CenterPointConfig) -> np.ndarray:
    """The cloud in ``path`` as [N, len(config.point_features)] float32; a file of 0 bytes is an empty cloud.

    ``.bin`` files hold one sweep: ``dt`` is 0. ``.npy``, and ``points`` in an ``.npz``, have the columns that the model
    takes. Raises InputError for a missing file, an unknown ending, a size that is no multiple of the columns, an array
    of another name or shape, or of no numbers.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such point file")
    if path.suffix in (".npy", ".npz"):
        return _read_numpy(path, config)
    ending = next((ending for ending in COLUMNS if path.name.endswith(ending)), None)
    if ending is None:
        raise InputError(f"{path}: not a point file; expected a name ending in {', '.join(COLUMNS)} .npy or .npz")
    columns = COLUMNS[ending]
    size = path.stat().st_size
    if size % (4 * len(columns)):
        fits = [other for other, names in COLUMNS.items() if size % (4 * len(names)) == 0]
        hint = f"; its size fits the {len(COLUMNS[fits[0]])} columns of *{fits[0]}" if fits else ""
        raise InputError(
            f"{path}: {size} bytes is not a multiple of {len(columns)} float32 columns ({', '.join(columns)}){hint}"
        )
    raw = np.fromfile(path, dtype=np.float32).reshape(-1, len(columns))
    points = np.zeros((len(raw), len(config.point_features)), dtype=np.float32)
    for index, name in enumerate(config.point_features):
        if name in columns:
            points[:, index] = raw[:, columns.index(name)]
    return points


def _read_numpy(path: Path, config: CenterPointConfig) -> np.ndarray:
    try:
        points = np.load(path, allow_pickle=False)
        if isinstance(points, np.lib.npyio.NpzFile):
            with points as archive:
                if "points" not in archive:
                    raise InputError(f"{path}: expected an array 'points'; it has {', '.join(archive) or 'none'}")
                points = archive["points"]
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(f"{path}: not a readable {path.suffix} file ({error})") from None
    names = config.point_features
    if points.ndim != 2 or points.shape[1] != len(names) or points.dtype.kind not in "fiu":
        expected = f"numbers of shape [N, {len(names)}] ({', '.join(names)})"
        raise InputError(f"{path}: points are {points.dtype} of shape {list(points.shape)}; expected {expected}")
    return points.astype(np.float32, copy=False)
