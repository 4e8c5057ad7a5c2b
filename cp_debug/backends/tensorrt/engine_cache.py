"""Built engines kept on disk under a hash of all that they depend on, so that the same engine is built once."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

from typing_extensions import TypedDict

from cp_debug.backends.tensorrt.answers import Built
from cp_debug.caches import trim
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


class EngineStore(Protocol):
    """A place that several machines reach, where one makes an entry while the others wait for it."""

    def make_once(self, key: str, folder: Path, make: Callable[[], None]) -> None:
        """Fill ``folder`` with the files that are kept under ``key``, else with those that ``make`` writes there."""


@dataclass(frozen=True)
class EngineCache:
    """A folder of ``<key>.engine``, ``<key>.json`` (what its build told) and timing caches.

    A key covers the graph's content, every setting of the build, the runner, TensorRT's version and the GPU: engines of
    another GPU may lie in the same folder and are not found.
    """

    folder: Path
    on_say: Callable[[str], None] = field(default=lambda text: None, compare=False, repr=False)
    """Told of entries that cannot be used."""
    store: EngineStore | None = None
    """Place of engines that are not in the folder; those built here are put there for others."""

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

    def timing_cache(self, parts: Mapping[str, Any]) -> Path:
        """File of the kernels' timings of one graph on one machine."""
        return self.folder / f"{key_of(parts)}.timings"

    def make_once(
        self, key: str, timings: Path | None, build: Callable[[], tuple[Path, dict[str, Any]]]
    ) -> tuple[Path, dict[str, Any]]:
        """The engine's file and the facts of its build, which ``build`` gives where neither folder nor store has them.

        ``timings``: the file of kernel timings that a build reads and writes. It goes with the engine, so that whoever
        takes the engine builds others of the graph with the same kernels. Facts of what was not built have ``cached``.
        """
        if (found := self.get(key)) is not None:
            return found[0], {**found[1], "cached": True}
        built: list[tuple[Path, dict[str, Any]]] = []
        if self.store is not None:
            with TemporaryDirectory(prefix="cpdebug-") as name:
                entry = EngineCache(Path(name), self.on_say)

                def make() -> None:
                    built.append(build())
                    entry.put(key, *built[0])
                    _copy(timings, entry.folder)

                self.store.make_once(key, entry.folder, make)
                if not built and (found := entry.get(key)) is not None:
                    self.put(key, *found)
                    if timings is not None and not timings.exists():
                        _copy(entry.folder / timings.name, timings.parent)
            if not built and (found := self.get(key)) is not None:
                return found[0], {**found[1], "cached": True}
        engine, facts = built[0] if built else build()
        self.put(key, engine, facts)
        return engine, facts

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
                raise InputError(f"{engine}: not the engine that was written here: truncated, or changed since")
            os.utime(engine)
        except (InputError, OSError) as error:
            self.on_say(f"engine cache: built again: {in_one_line(error)}")
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
            trim("engines", self.folder, LARGEST)  # another process may remove the same entries meanwhile
        except (InputError, OSError):
            return


def _make_room(path: Path) -> None:
    """Remove what is no file, so that a file can take its place."""
    if path.is_symlink() or (path.exists() and not path.is_file() and not path.is_dir()):
        path.unlink()
    elif path.is_dir():
        shutil.rmtree(path)


def _copy(file: Path | None, folder: Path) -> None:
    """Copy a file of timings, where there is one; a full disk is no reason to stop."""
    with suppress(OSError):
        if file is not None and file.is_file():
            with complete_path(folder / file.name) as partial:
                shutil.copyfile(file, partial)
