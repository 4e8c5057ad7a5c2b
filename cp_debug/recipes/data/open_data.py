"""Opens what the user gave as data: info files, clouds without ground truth, or none, the held-out synthetic scenes."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from cp_debug.errors import InputError
from cp_debug.recipes.base import Sample
from cp_debug.recipes.centerpoint.scenes import CLASSES, HELD_OUT_SEED, generate_scene
from cp_debug.recipes.data.base import DataOptions, DataSet, Truth, attributes_of
from cp_debug.recipes.data.infos import InfoData, load_plain_pickle
from cp_debug.recipes.data.points import COLUMNS, columns_of, point_files, read_points

_COLUMNS = ("x", "y", "z", "intensity", "dt")


class SyntheticData:
    """Scenes that no model was trained on, from ``first`` on; with truth for a model of exactly their classes."""

    def __init__(self, features: Sequence[str], class_names: Sequence[str], count: int, first: int) -> None:
        self.name = f"held-out synthetic scenes {first} to {first + count - 1}"
        self._columns = [_COLUMNS.index(name) for name in features]
        self._known = tuple(class_names) == tuple(CLASSES)
        self._count, self._first = count, first
        self.notes = [] if self._known else [f"the scenes show {', '.join(CLASSES)}: no ground truth for this model"]

    def __len__(self) -> int:
        return self._count

    def sample(self, index: int) -> Sample:
        """Scene ``index``: ``points`` [N, C] in the model's columns; its truth where the classes are the model's."""
        number = self._first + index
        scene = generate_scene(HELD_OUT_SEED + number)
        truth = None
        if self._known:
            names = np.array(list(CLASSES))[scene.labels]
            attributes = attributes_of(names, scene.velocities)
            truth = Truth(scene.boxes, scene.labels, scene.velocities, scene.num_points, attributes)
        return Sample({"points": scene.points[:, self._columns]}, f"held-out synthetic scene {number}", truth)


DEFAULT_OPTIONS = DataOptions()


def open_data(
    path: Path | None,
    *,
    features: Sequence[str],
    class_names: Sequence[str],
    count: int,
    first: int = 0,
    options: DataOptions = DEFAULT_OPTIONS,
) -> DataSet:
    """Open an info file, point files or the synthetic scenes as a data set of at most ``count`` samples.

    ``path`` is mmdet3d's info file (``.pkl``), a point file, a folder of them, or None for the held-out synthetic
    scenes from ``first`` on. ``features`` are the columns of the model's points, ``class_names`` its classes. Raises
    InputError for any other file.
    """
    if path is None:
        return SyntheticData(features, class_names, count, first)
    if not path.exists():
        raise InputError(
            f"{path}: no such file or folder; expected an info file (.pkl), point files or a folder of them"
        )
    if path.suffix == ".pkl":
        return InfoData(path, features, class_names, count, options)
    return FolderData(path, features, count)


def count_data(path: Path) -> int:
    """Number of samples that ``open_data`` finds in an info file, a point file or a folder of them.

    Clouds that an info file names may be missing. Raises InputError for a file that cannot be read.
    """
    if path.suffix == ".pkl":
        content = load_plain_pickle(path)
        return len(content["data_list"]) if isinstance(content, dict) and "data_list" in content else 0
    return len(FolderData(path, (), sys.maxsize))


class FolderData:
    """The point files of a folder by name, at most ``count``; or one file. Raises InputError when there is none."""

    notes: Sequence[str] = ()

    def __init__(self, path: Path, features: Sequence[str], count: int) -> None:
        self.name, self._features = str(path), features
        self._files = point_files(path)[:count]

    def __len__(self) -> int:
        return len(self._files)

    def sample(self, index: int) -> Sample:
        """The cloud of file ``index``. Raises InputError for an unusable one."""
        file = self._files[index]
        ending = next((ending for ending in COLUMNS if file.name.endswith(ending)), None)
        points = read_points(file, self._features)
        note = columns_of(file, ending)[1] if ending else ""
        return Sample({"points": points}, f"{file} ({note})" if note else str(file))
