"""The held-out synthetic scenes as a data set."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cp_debug.recipes.base import Sample
from cp_debug.recipes.centerpoint.scenes import CLASSES, HELD_OUT_SEED, generate_scene
from cp_debug.recipes.data.attributes import attributes_of
from cp_debug.recipes.data.base import Truth

COLUMNS = ("x", "y", "z", "intensity", "dt")


class SyntheticData:
    """Scenes that no model was trained on, from ``first`` on; with truth for a model of exactly their classes."""

    def __init__(self, features: Sequence[str], class_names: Sequence[str], count: int, first: int) -> None:
        self.name = f"held-out synthetic scenes {first} to {first + count - 1}"
        self._columns = [COLUMNS.index(name) for name in features]
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
