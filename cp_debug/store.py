"""Work kept between runs and shared between machines: exports, calibrations, engines; by content hash.

An entry is one file ``<key>.zip`` of plain files in a folder or an object store. What is cut off or changed is made
anew. A store that fails is done without, and said to have failed: that costs time and nothing else.
"""

from __future__ import annotations

import os
import re
import shutil
import stat
import sys
import time
import uuid
import zipfile
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

from cp_debug.errors import InputError, in_one_line, system_reason
from cp_debug.optional import require
from cp_debug.reading import check_file

T = TypeVar("T")

KINDS = {
    "engines": "engines that TensorRT built, and timings of its kernels",
    "exports": "ONNX graphs of torch modules, with their alignments",
}
"""Name of a cache → what it keeps."""
UNFINISHED = 3600.0
"""Seconds after which something half-written is no longer being written."""
_AT_ONCE = 1 << 20
"""Bytes that are copied at a time: zipfile itself takes few, which is slow with large files."""
_KEY = re.compile(r"[0-9a-f]{64}")
_BUCKETS = {"s3", "s3a", "gs", "gcs", "oss", "cos", "obs"}
"""Protocols without folders: making one makes a bucket, which is not asked for."""


def cache_folder(kind: str) -> Path:
    """The user's folder of a cache: ``$XDG_CACHE_HOME/cpdebug/<kind>``, else under ``~/.cache``."""
    chosen = Path(os.environ.get("XDG_CACHE_HOME", ""))
    home = chosen if chosen.is_absolute() else Path.home() / ".cache"  # the specification ignores relative ones
    return Path(home) / "cpdebug" / kind


class _Folder:
    """What a store needs of fsspec, for a folder: to import fsspec takes longer than to read an entry."""

    protocol = "file"
    open: Any = staticmethod(open)
    mv, rm_file, makedirs = staticmethod(os.replace), staticmethod(os.remove), staticmethod(os.makedirs)


class Store:
    """A folder, or an object store by its URL (``s3://bucket/prefix`` and whatever else fsspec opens).

    most: bytes that are kept, beyond which the least recently used entries go; None for a store that tasks of a sweep
    share: while one of them makes an entry the others wait, by a lock of Dask's, which a worker that died gives back.
    behind: where entries come from that this one lacks, and where those made here are put for others. ``on_say`` is
    told, in a line, of entries that cannot be used, and once that the store failed. An empty ``place`` keeps nothing.
    """

    def __init__(
        self,
        place: str | Path,
        *,
        most: int | None = None,
        behind: Store | None = None,
        on_say: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.place, self._most, self._behind, self._on_say = str(place), most, behind, on_say
        self._works = bool(self.place)
        self._files: Any = _Folder
        self._root, self._is_folder = self.place, "://" not in self.place
        if not self._is_folder:  # lists that are remembered do not have what other processes add
            url_to_fs = require("fsspec", "dask").core.url_to_fs
            self._files, self._root = url_to_fs(self.place, use_listings_cache=False)

    @classmethod
    def open(cls, place: str | Path, flag: str, **options: Any) -> Store:
        """The store, once something was written there and read back. Raises InputError, beginning with ``flag``."""
        text = uuid.uuid4().hex.encode()
        try:
            store = cls(place, **options)
            probe = store._place(f"{text.decode()}.probe")
            store._make_folder()
            with store._files.open(probe, "wb") as stream:
                stream.write(text)
            with store._files.open(probe, "rb") as stream:
                found = stream.read()
            store._files.rm_file(probe)
        except Exception as error:  # every store has errors of its own
            reason = system_reason(error) if isinstance(error, OSError) else in_one_line(error)
            raise InputError(f"{flag}: {place} cannot be written and read ({reason})") from None
        if found != text:
            raise InputError(f"{flag}: {place} returns other bytes than were written")
        return store

    def take(
        self, key: str | None, make: Callable[[Path], T], use: Callable[[Path], T | None], within: Path | None = None
    ) -> T:
        """What ``use`` gives of the files of an entry, else what ``make`` gives, which puts them into a folder.

        ``use`` gives None, or raises InputError, for an entry that does not serve. The folder lies ``within`` another,
        and goes afterwards. None as ``key`` keeps nothing. Raises what ``make`` raises.
        """
        made: list[T] = []
        with TemporaryDirectory(prefix="cpdebug-", dir=within) as name:
            folder = Path(name)

            def fill() -> None:
                for file in folder.iterdir():  # of an entry that was cut off, or does not serve
                    file.unlink()
                made.append(make(folder))

            self.make_once(key, folder, fill)
            if not made:
                try:
                    if (used := use(folder)) is not None:
                        return used
                except (InputError, OSError) as error:
                    self._on_say(f"made again: {in_one_line(error)}")
                fill()
                self.put(key, folder)
        return made[0]

    def make_once(self, key: str | None, folder: Path, make: Callable[[], None]) -> None:
        """Fill ``folder`` with the files of an entry: those that are kept, else those that ``make`` writes there.

        Raises what ``make`` raises.
        """
        if self.get(key, folder):
            return
        with self._alone(key):
            if self._most is None and self.get(key, folder):  # somebody made it meanwhile
                return
            if self._behind is None:
                make()
            else:
                self._behind.make_once(key, folder, make)
            self.put(key, folder)

    def get(self, key: str | None, folder: Path) -> bool:
        """Whether the entry was there, whole, and its files are in ``folder`` now."""
        if key is None or not self._works:
            return False
        place = self._place(f"{key}.zip")
        try:
            if self._is_folder and os.path.lexists(place):
                if Path(place).is_symlink():
                    raise InputError(f"{place}: is a symbolic link; expected a file")
                check_file(Path(place), "entry")
                os.utime(place)
            with self._files.open(place, "rb") as stream, zipfile.ZipFile(stream) as entry:
                if entry.comment != key.encode():
                    raise InputError(f"{place}: written under another key")
                for file in entry.infolist():  # of each it knows the sum, which is checked at its end
                    with entry.open(file) as source, (folder / Path(file.filename).name).open("wb") as target:
                        shutil.copyfileobj(source, target, _AT_ONCE)
        except FileNotFoundError:
            return False
        except (InputError, zipfile.BadZipFile, EOFError, NotImplementedError) as error:
            self._on_say(f"made again: {in_one_line(error)}")
            return False
        except Exception as error:  # every store has errors of its own
            self._failed(error)
            return False
        return True

    def put(self, key: str | None, folder: Path) -> None:
        """Keep the files of ``folder``. A full disk is no reason to stop: then they are not kept."""
        if key is None or not self._works or not any(folder.iterdir()):
            return
        partial, place = self._place(f".{uuid.uuid4().hex}.partial"), self._place(f"{key}.zip")
        try:
            self._make_folder()
            if self._is_folder and Path(place).is_dir():
                shutil.rmtree(place)
            with self._files.open(partial, "wb") as stream, zipfile.ZipFile(stream, "w") as entry:
                entry.comment = key.encode()
                for path in sorted(folder.iterdir()):
                    file = zipfile.ZipInfo.from_file(path, path.name, strict_timestamps=False)
                    with path.open("rb") as source, entry.open(file, "w") as target:
                        shutil.copyfileobj(source, target, _AT_ONCE)
            self._files.mv(partial, place)
            if self._most is not None:
                left = self._most
                for kept_entry in kept(Path(self.place)):
                    left -= kept_entry.size
                    if left < 0:
                        remove([kept_entry])
        except Exception as error:  # every store has errors of its own, and a disk may be full
            with suppress(Exception):
                self._files.rm_file(partial)
            self._failed(error)

    def _place(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}"

    def _make_folder(self) -> None:
        protocols = self._files.protocol
        if not _BUCKETS & ({protocols} if isinstance(protocols, str) else set(protocols)):
            self._files.makedirs(self._root, exist_ok=True)

    def _failed(self, error: Exception) -> None:
        if self._works:
            self._works = False
            why = in_one_line(error) or type(error).__name__
            self._on_say(f"{self.place}: not used from now on, because it failed: {why}")

    def _alone(self, key: str | None) -> AbstractContextManager[object]:
        """Context that one task of a sweep is in at a time; outside of a worker it holds nobody up."""
        if (workers := sys.modules.get("distributed.worker")) is None or self._most is not None or not self._works:
            return nullcontext()
        try:
            workers.get_worker()
        except ValueError:
            return nullcontext()
        from distributed import Lock

        return Lock(f"cpdebug {self.place} {key}")


def fill(folder: Path, contents: Mapping[str, Path | str]) -> None:
    """Put files, without a copy where that is possible, and texts into an entry's folder, by their names there.

    Where the disk is full the folder stays empty: nothing is kept then.
    """
    try:
        for name, content in contents.items():
            if isinstance(content, str):
                (folder / name).write_text(content, encoding="utf-8")
                continue
            try:
                os.link(content, folder / name)
            except OSError:  # a file system without links
                shutil.copyfile(content, folder / name)
    except OSError:
        for file in folder.iterdir():
            file.unlink()


@dataclass(frozen=True)
class KeptEntry:
    """A file that one run kept for later ones."""

    key: str
    """Hash of all that it depends on; for what was left half-written its name."""
    path: Path
    size: int
    """In bytes."""
    used: float
    """Time of the last write or use, in seconds since 1970."""


def kept(folder: Path) -> list[KeptEntry]:
    """List the entries of a cache in ``folder``, the last used first; foreign files are left out.

    Raises InputError where the folder cannot be read; one that is not there is empty.
    """
    entries = []
    try:
        found = sorted(folder.iterdir())
    except FileNotFoundError:
        return []
    except OSError as error:
        raise InputError(f"{folder}: cannot be read ({system_reason(error)})") from None
    for path in found:
        half = path.name.startswith(".") and path.name.endswith(".partial")
        key = path.name if half else path.name.partition(".")[0]
        with suppress(OSError):  # another process removed it
            state = path.lstat()
            left = half and time.time() - state.st_mtime > UNFINISHED
            if stat.S_ISREG(state.st_mode) and (left or _KEY.fullmatch(key)):
                entries.append(KeptEntry(key, path, state.st_size, state.st_mtime))
    return sorted(entries, key=lambda entry: entry.used, reverse=True)


def remove(entries: Iterable[KeptEntry]) -> int:
    """Remove entries; returns the bytes that are free now. Raises InputError for what cannot be removed."""
    freed = 0
    for entry in entries:
        try:
            entry.path.unlink(missing_ok=True)
        except OSError as error:
            raise InputError(f"{entry.path}: cannot be removed ({system_reason(error)})") from None
        freed += entry.size
    return freed
