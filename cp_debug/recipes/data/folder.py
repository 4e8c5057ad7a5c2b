"""Plain folders of point files: clouds without ground truth."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cp_debug.errors import InputError
from cp_debug.recipes.base import Sample
from cp_debug.recipes.data.points import COLUMNS, ENDINGS, columns_of, read_points


class FolderData:
    """The point files of a folder by name, at most ``count``; or one file. Raises InputError when there is none."""

    notes: Sequence[str] = ()

    def __init__(self, path: Path, features: Sequence[str], count: int) -> None:
        self.name, self._features = str(path), features
        if path.is_dir():
            self._files = sorted(file for file in path.iterdir() if file.name.endswith(ENDINGS))[:count]
            if not self._files:
                raise InputError(f"{path}: holds no point file (a name ending in {' '.join(ENDINGS)})")
        else:
            self._files = [path]

    def __len__(self) -> int:
        return len(self._files)

    def sample(self, index: int) -> Sample:
        """The cloud of file ``index``. Raises InputError for an unusable one."""
        file = self._files[index]
        ending = next((ending for ending in COLUMNS if file.name.endswith(ending)), None)
        points = read_points(file, self._features)
        note = columns_of(file, ending)[1] if ending else ""
        return Sample({"points": points}, f"{file} ({note})" if note else str(file))
