"""Built engines kept on disk under a hash of all that they depend on, so that the same engine is built once."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from typing_extensions import TypedDict

from cp_debug.backends.tensorrt.answers import Built
from cp_debug.errors import InputError, in_one_line
from cp_debug.files import complete_path, file_hash, key_of, write_text
from cp_debug.reading import check_file, read_json, typed

LARGEST = 20 << 30
"""Bytes of engines that are kept; beyond it the least recently used are removed."""
LARGEST_ENTRY = 256 << 20
"""Largest size of the JSON file beside an engine, in bytes."""


class CachedEngine(TypedDict):
    """Content of the JSON file beside an engine."""

    key: str
    sha256: str
    facts: Built


@dataclass(frozen=True)
class EngineCache:
    """A folder of ``<key>.engine``, ``<key>.json`` (what its build told) and timing caches.

    A key covers the graph's content, every setting of the build, the runner, TensorRT's version and the GPU: engines of
    another GPU may lie in the same folder and are not found.
    """

    folder: Path
    on_say: Callable[[str], None] = field(default=lambda text: None, compare=False, repr=False)
    """Told of entries that cannot be used."""

    @classmethod
    def open(
        cls, folder: Path, *, asked: bool, on_say: Callable[[str], None] = lambda text: None
    ) -> EngineCache | None:
        """The cache in ``folder``, which is made; None where it cannot be written.

        Raises InputError in place of None when a person ``asked`` for that folder.
        """
        try:
            folder.mkdir(parents=True, exist_ok=True)
            probe = folder / f".{os.getpid()}.probe"
            probe.write_bytes(b"")
            probe.unlink()
        except OSError as error:
            if not asked:
                return None
            raise InputError(f"--cache: {folder} cannot be written ({error.strerror or error})") from None
        return cls(folder, on_say)

    @staticmethod
    def key(parts: Mapping[str, Any]) -> str:
        """The hash of plain containers."""
        return key_of(parts)

    def timing_cache(self, parts: Mapping[str, Any]) -> Path:
        """File of the kernels' timings of one graph on one machine."""
        return self.folder / f"{self.key(parts)}.timings"

    def get(self, key: str) -> tuple[Path, dict[str, Any]] | None:
        """The engine's file and the facts of its build; None where the cache has no usable entry.

        An entry that this class did not write so is not used, and the reason is told: cut off, changed, written for
        other settings, a link or anything else that is no file.
        """
        engine, record = self.folder / f"{key}.engine", self.folder / f"{key}.json"
        if not (os.path.lexists(engine) and os.path.lexists(record)):
            return None
        try:
            for path in (engine, record):
                if path.is_symlink():
                    raise InputError(f"{path}: is a symbolic link; expected a file")
            entry: CachedEngine = typed(
                CachedEngine, read_json(record, what="entry of the engine cache", most=LARGEST_ENTRY), str(record)
            )
            if entry["key"] != key:
                raise InputError(f"{record}: written for other settings, or another GPU")
            check_file(engine, "engine")
            if entry["sha256"] != file_hash(engine):
                raise InputError(f"{engine}: not the engine that was written here: cut off, or changed since")
            os.utime(engine)
        except (InputError, OSError) as error:
            self.on_say(f"engine cache: built anew: {in_one_line(error)}")
            return None
        return engine, dict(entry["facts"])

    def put(self, key: str, engine: Path, facts: Mapping[str, Any]) -> None:
        """Keep a copy of an engine. A full disk is no reason to stop: then it is not kept."""
        target = self.folder / f"{key}.engine"
        try:
            for path in (target, target.with_suffix(".json")):
                _make_room(path)
            with complete_path(target) as partial:
                shutil.copyfile(engine, partial)
            document = {"key": key, "sha256": file_hash(engine), "facts": dict(facts)}
            write_text(json.dumps(document) + "\n", self.folder / f"{key}.json")
            self._trim()  # another process may remove the same entries meanwhile
        except (InputError, OSError):
            return

    def _trim(self) -> None:
        files = sorted(self.folder.glob("*.engine"), key=lambda path: path.stat().st_mtime, reverse=True)
        total = 0
        for path in files:
            total += path.stat().st_size
            if total > LARGEST:
                path.unlink(missing_ok=True)
                path.with_suffix(".json").unlink(missing_ok=True)


def _make_room(path: Path) -> None:
    """Remove what is no file, so that a file can take its place."""
    if path.is_symlink() or (path.exists() and not path.is_file() and not path.is_dir()):
        path.unlink()
    elif path.is_dir():
        shutil.rmtree(path)
