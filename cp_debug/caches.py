"""Folders that keep work between runs: their contents, and how to clear them."""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from cp_debug.errors import InputError, system_reason

KINDS = {
    "engines": "engines that TensorRT built, and timings of its kernels",
    "exports": "ONNX graphs of torch modules, with their alignments",
}
"""Name of a cache → what it keeps."""
UNFINISHED = 3600.0
"""Seconds after which something half-written is no longer being written."""
ENGINE_FILES = (".engine", ".json", ".timings")
"""Files of an engine, of what its build told, and of its kernels' timings."""
_KEY = re.compile(r"[0-9a-f]{64}")


def cache_folder(kind: str) -> Path:
    """The user's folder of a cache: ``$XDG_CACHE_HOME/cpdebug/<kind>``, else under ``~/.cache``."""
    chosen = Path(os.environ.get("XDG_CACHE_HOME", ""))
    home = chosen if chosen.is_absolute() else Path.home() / ".cache"  # the specification ignores relative ones
    return Path(home) / "cpdebug" / kind


@dataclass(frozen=True)
class KeptEntry:
    """Files or a folder that one run kept for later ones."""

    kind: str
    key: str
    """Hash of all that it depends on; for what was left half-written its name."""
    paths: tuple[Path, ...]
    size: int
    """Bytes of all its files."""
    used: float
    """Time of the last write or use, in seconds since 1970."""


def kept(kind: str, folder: Path) -> list[KeptEntry]:
    """List the entries of a cache in ``folder``, the last used first; foreign files are left out.

    Raises InputError where the folder cannot be read; one that is not there is empty.
    """
    groups: dict[str, list[Path]] = {}
    try:
        found = sorted(folder.iterdir())
    except FileNotFoundError:
        return []
    except OSError as error:
        raise InputError(f"{folder}: cannot be read ({system_reason(error)})") from None
    for path in found:
        if key := _key(kind, path):
            groups.setdefault(key, []).append(path)
    entries = []
    for key, paths in groups.items():
        stats = [stat for path in paths for stat in _stats(path)]
        if stats:
            size, used = sum(stat.st_size for stat in stats), max(stat.st_mtime for stat in stats)
            entries.append(KeptEntry(kind, key, tuple(paths), size, used))
    return sorted(entries, key=lambda entry: entry.used, reverse=True)


def remove(entries: Iterable[KeptEntry]) -> int:
    """Remove entries; returns the bytes that are free now. Raises InputError for what cannot be removed."""
    freed = 0
    for entry in entries:
        for path in entry.paths:
            try:
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink(missing_ok=True)
            except FileNotFoundError:  # another process was faster
                continue
            except OSError as error:
                raise InputError(f"{path}: cannot be removed ({system_reason(error)})") from None
        freed += entry.size
    return freed


def trim(kind: str, folder: Path, most: int) -> None:
    """Remove the least recently used entries of a cache, so that the others have at most ``most`` bytes.

    Raises InputError for what cannot be read or removed.
    """
    total = 0
    for entry in kept(kind, folder):
        total += entry.size
        if total > most:
            remove([entry])


def _key(kind: str, path: Path) -> str:
    """Key of the entry that a file or folder belongs to; empty for a foreign one, and for one that is being written."""
    if path.name.startswith(".") and path.name.endswith(".partial"):
        with suppress(OSError):
            return path.name if time.time() - path.lstat().st_mtime > UNFINISHED else ""
        return ""
    stem = path.name.partition(".")[0]
    ours = path.is_dir() and (path / "entry.json").is_file() if kind == "exports" else path.suffix in ENGINE_FILES
    return stem if ours and _KEY.fullmatch(stem) else ""


def _stats(path: Path) -> Iterator[os.stat_result]:
    """The state of a file, or of all files of a folder and the folder itself."""
    with suppress(OSError):
        yield path.lstat()
        if path.is_dir() and not path.is_symlink():
            yield from (file.lstat() for file in path.iterdir())
