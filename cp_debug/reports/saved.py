"""A saved result, read back: the folder that ``bisect --save`` writes, or its ``result.json`` alone.

Unknown fields are left alone, so that files of later versions of the same schema can be read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePath

from cp_debug.bisect.result import BisectResult
from cp_debug.errors import InputError
from cp_debug.graph.graph import Graph
from cp_debug.probes.capture import Capture
from cp_debug.programs.scene import SavedScene
from cp_debug.reading import read_json, result_file
from cp_debug.serialize import decode


@dataclass(frozen=True)
class SavedResult:
    """A result with what was kept beside it."""

    result: BisectResult
    folder: Path | None = None
    """Folder of the captures and graphs; None when only the JSON was given."""

    @classmethod
    def open(cls, path: Path) -> SavedResult:
        """Read a saved folder, or a JSON file. Raises InputError that names the file and the field."""
        path = Path(path)
        file = result_file(path)
        document = read_json(file, what="saved result")
        return cls(decode(BisectResult, document, str(file)), path if path.is_dir() else None)

    @classmethod
    def of(cls, result: BisectResult, folder: Path | None = None) -> SavedResult:
        """A result as ``bisect`` returns it; ``folder`` holds its captures."""
        return cls(decode(BisectResult, json.loads(json.dumps(result.to_dict())), "result"), folder)

    @cached_property
    def graphs(self) -> dict[str, Graph]:
        """Component → its deployed graph, for those whose file is still there."""
        return self.opened(self.result.programs)

    def opened(self, programs: Mapping[str, str]) -> dict[str, Graph]:
        """Component → graph of these paths, such as a test's, for those whose file is still there."""
        paths = {name: (self.folder or Path()) / path for name, path in programs.items()}
        return {name: Graph(path) for name, path in paths.items() if path.is_file()}

    def capture(self, sample: int, spec: str) -> Capture | None:
        """The tensors of one backend on one sample; None when they were not kept."""
        if Path(spec).name != spec or spec == "..":  # a file that leads elsewhere
            return None
        folder = self.folder and self.folder / f"sample-{sample}" / spec
        return Capture.open(folder) if folder and folder.is_dir() else None

    def scene(self, sample: int) -> SavedScene | None:
        """Points and detections of one sample; None when there are none."""
        return SavedScene.open(self.folder / f"sample-{sample}") if self.folder else None


def open_result(path: str | Path) -> BisectResult:
    """The result in a folder that ``bisect --save`` wrote, or in a JSON file. Raises InputError as ``SavedResult``."""
    if not isinstance(path, str | PurePath):
        raise InputError(f"path: {type(path).__name__}; expected the path of a folder or of a JSON file")
    return SavedResult.open(Path(path)).result
