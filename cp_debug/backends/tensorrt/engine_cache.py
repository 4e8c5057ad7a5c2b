"""Built engines kept on disk under a hash of all that they depend on, so that the same engine is built once."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cp_debug.errors import InputError
from cp_debug.files import complete_path, file_hash, key_of, write_text

LARGEST = 20 << 30
"""Bytes of engines that are kept; beyond it the least recently used are removed."""


def default_folder() -> Path:
    """The user's cache folder: ``$XDG_CACHE_HOME/cpdebug/engines``, else under ``~/.cache``."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "cpdebug" / "engines"


@dataclass(frozen=True)
class EngineCache:
    """A folder of ``<key>.engine``, ``<key>.json`` (what its build told) and timing caches.

    A key covers the graph's content, every setting of the build, the runner, TensorRT's version and the GPU: engines of
    another GPU may lie in the same folder and are not found.
    """

    folder: Path

    @classmethod
    def open(cls, folder: Path, *, asked: bool) -> EngineCache | None:
        """The cache in ``folder``, which is made.

        Where it cannot be written: InputError when a person ``asked`` for that folder, else None.
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
        return cls(folder)

    @staticmethod
    def key(parts: Mapping[str, Any]) -> str:
        """The hash of plain containers."""
        return key_of(parts)

    def timing_cache(self, parts: Mapping[str, Any]) -> Path:
        """File of the kernels' timings of one graph on one machine."""
        return self.folder / f"{self.key(parts)}.timings"

    def get(self, key: str) -> tuple[Path, dict[str, Any]] | None:
        """The engine's file and what its build reported; None where there is none, or it is not as it was written."""
        engine, facts_file = self.folder / f"{key}.engine", self.folder / f"{key}.json"
        try:
            document = json.loads(facts_file.read_text(encoding="utf-8"))
            facts = dict(document["facts"])
            if document["sha256"] != file_hash(engine):
                return None
            os.utime(engine)
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return engine, facts

    def put(self, key: str, engine: Path, facts: Mapping[str, Any]) -> None:
        """Keep a copy of an engine. A full disk is no reason to stop: then it is not kept."""
        target = self.folder / f"{key}.engine"
        try:
            with complete_path(target) as partial:
                shutil.copyfile(engine, partial)
            document = {"sha256": file_hash(target), "facts": dict(facts)}
            write_text(json.dumps(document) + "\n", self.folder / f"{key}.json")
        except InputError:
            return
        self._trim()

    def _trim(self) -> None:
        files = sorted(self.folder.glob("*.engine"), key=lambda path: path.stat().st_mtime, reverse=True)
        total = 0
        for path in files:
            total += path.stat().st_size
            if total > LARGEST:
                path.unlink(missing_ok=True)
                path.with_suffix(".json").unlink(missing_ok=True)
