"""Work that tasks share, exports, calibrations, engines: made once, kept by content hash in a folder or object store.

An entry is one file ``<key>.zip`` of plain files; what is cut off or changed is made anew. While one task makes it the
others of its sweep wait, by a lock of Dask's, which a worker that died gives back. Should two sweeps make it at once,
that costs time and nothing else. A store that fails in the middle of a sweep is done without, and said to have failed.
"""

from __future__ import annotations

import uuid
import zipfile
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory

from cp_debug.errors import InputError, in_one_line

TOPIC = "cpdebug-shared-store"
"""Topic of Dask's events on which workers tell that a store failed."""
_BUCKETS = {"s3", "s3a", "gs", "gcs", "oss", "cos", "obs"}
"""Protocols without folders: making one makes a bucket, which is not asked for."""


class SharedStore:
    """A folder, or an object store by its URL (``s3://bucket/prefix`` and whatever else fsspec opens).

    ``on_say`` is told once, in one line, that it failed and why. Raises InputError for an unknown protocol, and for one
    whose package is missing.
    """

    def __init__(self, url: str, on_say: Callable[[str], None] = lambda text: None) -> None:
        import fsspec

        try:  # lists that are remembered do not have what other processes add
            self._files, self._root = fsspec.core.url_to_fs(url, use_listings_cache=False)
        except (ImportError, ValueError, OSError) as error:
            raise InputError(f"--shared: {url}: {in_one_line(error)}") from None
        self.url = url
        self._works = True
        self._on_say = on_say

    def check(self) -> None:
        """Raise InputError where nothing can be written and read back."""
        place, text = self._place(f"{uuid.uuid4().hex}.probe"), b"cpdebug"
        try:
            self._make_folder()
            self._files.pipe_file(place, text)
            found = self._files.cat_file(place)
            self._files.rm_file(place)
        except Exception as error:  # every store has errors of its own
            raise InputError(f"--shared: {self.url}: cannot be written and read ({in_one_line(error)})") from None
        if found != text:
            raise InputError(f"--shared: {self.url}: returns other bytes than were written")

    def make_once(self, key: str, folder: Path, make: Callable[[], None]) -> None:
        """Fill ``folder`` with the files of an entry: those that are kept, else those that ``make`` writes there.

        Raises what ``make`` raises.
        """
        if self._get(key, folder):
            return
        with _alone(f"cpdebug {self.url} {key}"):
            if not self._get(key, folder):
                make()
                self._put(key, folder)

    def _place(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}"

    def _get(self, key: str, folder: Path) -> bool:
        """Whether the entry was there, whole, and its files are in ``folder`` now."""
        if not self._works:
            return False
        with TemporaryDirectory(prefix="cpdebug-") as temporary:
            archive = Path(temporary) / "entry"
            try:
                self._files.get_file(self._place(f"{key}.zip"), str(archive))
                with zipfile.ZipFile(archive) as entry:  # of each file it knows the sum, and checks it
                    entry.extractall(folder)
            except (FileNotFoundError, zipfile.BadZipFile):
                return False
            except Exception as error:  # every store has errors of its own
                self._failed(error)
                return False
        return True

    def _put(self, key: str, folder: Path) -> None:
        if not self._works:
            return
        with TemporaryDirectory(prefix="cpdebug-") as temporary:
            archive, partial = Path(temporary) / "entry", self._place(f".{uuid.uuid4().hex}.partial")
            try:
                with zipfile.ZipFile(archive, "w") as entry:
                    for file in sorted(folder.iterdir()):
                        entry.write(file, file.name)
                self._make_folder()
                self._files.put_file(str(archive), partial)
                self._files.mv(partial, self._place(f"{key}.zip"))
            except Exception as error:  # every store has errors of its own, and a disk may be full
                self._failed(error)

    def _make_folder(self) -> None:
        protocols = self._files.protocol
        if not _BUCKETS & ({protocols} if isinstance(protocols, str) else set(protocols)):
            self._files.makedirs(self._root, exist_ok=True)

    def _failed(self, error: Exception) -> None:
        if self._works:
            self._works = False
            why = in_one_line(error) or type(error).__name__
            self._on_say(f"shared store {self.url}: not used from now on, because it failed: {why}")


def _alone(name: str) -> AbstractContextManager[object]:
    """Context that one task of a sweep is in at a time; outside of a worker it holds nobody up."""
    from distributed import Lock, get_worker

    try:
        get_worker()
    except ValueError:
        return nullcontext()
    return Lock(name)


@lru_cache(4)
def opened(url: str) -> SharedStore:
    """The store of a URL, opened once in this process; where it fails, Dask's client is told."""
    return SharedStore(url, _tell_client)


def _tell_client(text: str) -> None:
    from distributed import get_worker

    with suppress(ValueError):  # no worker: tasks run in this process
        get_worker().log_event(TOPIC, text)
