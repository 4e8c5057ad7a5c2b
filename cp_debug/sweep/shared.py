"""Work that tasks share, exports and calibrations: made once, kept by content hash in a folder or an object store.

An entry is one file ``<key>.tar``: 64 hexadecimal digits, the SHA-256 of what follows, and a tar archive of plain
files. What is cut off or changed is made anew. While one process makes an entry the others wait: it writes
``<key>.claim`` anew every few seconds, and a claim that does not change any more belongs to a process that died. Two
that claim at the same time both make the entry, which costs time and nothing else. A store that fails in the middle of
a sweep is done without.
"""

from __future__ import annotations

import hashlib
import shutil
import tarfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from cp_debug.errors import InputError, in_one_line

REFRESH = 5.0
"""Seconds between two writes of a claim."""
STALE = 30.0
"""Seconds after which a claim that did not change is nobody's."""
_LOOK = 0.2
"""Seconds between two looks for an entry that another process makes."""
_DIGITS = 64


class SharedStore:
    """A folder, or an object store by its URL (``s3://bucket/prefix`` and whatever else fsspec opens).

    Raises InputError for an unknown protocol, and for one whose package is missing.
    """

    def __init__(self, url: str) -> None:
        import fsspec

        try:
            self._files, self._root = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError, OSError) as error:
            raise InputError(f"--shared: {url}: {in_one_line(error)}") from None
        self.url = url
        self._works = True

    def check(self) -> None:
        """Raise InputError where nothing can be written and read back."""
        place, text = self._place(f"{uuid.uuid4().hex}.probe"), b"cpdebug"
        try:
            self._files.makedirs(self._root, exist_ok=True)
            self._files.pipe_file(place, text)
            found = self._files.cat_file(place)
            self._files.rm_file(place)
        except Exception as error:  # every store has errors of its own
            raise InputError(f"--shared: {self.url}: cannot be written and read ({in_one_line(error)})") from None
        if found != text:
            raise InputError(f"--shared: {self.url}: gives back other bytes than were written")

    def make_once(self, key: str, folder: Path, make: Callable[[], None]) -> None:
        """Fill ``folder`` with the files of an entry: those that are kept, else those that ``make`` writes there.

        Raises what ``make`` raises.
        """
        if self._get(key, folder):
            return
        with self._claimed(key, folder) as there:
            if not there:
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
                if not self._files.exists(self._place(f"{key}.tar")):
                    return False
                self._files.get_file(self._place(f"{key}.tar"), str(archive))
                return _unpack(archive, folder)
            except FileNotFoundError:
                return False
            except Exception:  # every store has errors of its own
                self._works = False
                return False

    def _put(self, key: str, folder: Path) -> None:
        if not self._works:
            return
        with TemporaryDirectory(prefix="cpdebug-") as temporary:
            archive, partial = Path(temporary) / "entry", self._place(f".{uuid.uuid4().hex}.partial")
            try:
                _pack(folder, archive)
                self._files.makedirs(self._root, exist_ok=True)
                self._files.put_file(str(archive), partial)
                self._files.mv(partial, self._place(f"{key}.tar"))
            except Exception:  # every store has errors of its own, and a disk may be full
                self._works = False

    @contextmanager
    def _claimed(self, key: str, folder: Path) -> Iterator[bool]:
        """Wait while another process makes the entry; whether its files are in ``folder`` now, else it is claimed."""
        place, seen, since = self._place(f"{key}.claim"), b"", time.monotonic()
        while self._works:
            claim = self._read(place)
            if not claim:
                break
            if claim != seen:
                seen, since = claim, time.monotonic()
            elif time.monotonic() - since > STALE:
                break
            time.sleep(_LOOK)
            if self._get(key, folder):
                yield True
                return
        if self._get(key, folder):  # made between the first look and the claim's end
            yield True
            return
        done = threading.Event()
        keeper = threading.Thread(target=self._keep, args=(place, done), daemon=True)
        keeper.start()
        try:
            yield False
        finally:
            done.set()
            keeper.join()
            with suppress(Exception):
                self._files.rm_file(place)

    def _keep(self, place: str, done: threading.Event) -> None:
        owner, count = uuid.uuid4().hex, 0
        while self._works:
            with suppress(Exception):
                self._files.pipe_file(place, f"{owner} {count}".encode())
            count += 1
            if done.wait(REFRESH):
                return

    def _read(self, place: str) -> bytes:
        try:
            return bytes(self._files.cat_file(place))
        except Exception:  # not there, or a store's own error: then there is no claim to wait for
            return b""


@lru_cache(4)
def opened(url: str) -> SharedStore:
    """The store of a URL, opened once in this process."""
    return SharedStore(url)


def _pack(folder: Path, archive: Path) -> None:
    """Write an archive of the files in ``folder``, its digest before it."""
    with archive.open("w+b") as stream:
        stream.write(bytes(_DIGITS))
        with tarfile.open(fileobj=stream, mode="w") as tar:
            for file in sorted(folder.iterdir()):
                tar.add(file, file.name, recursive=False)
        digest = _digest_after(stream)
        stream.seek(0)
        stream.write(digest)


def _unpack(archive: Path, folder: Path) -> bool:
    """Put an archive's files into ``folder``; False, and none of them, where it is not whole."""
    with archive.open("rb") as stream:
        said = stream.read(_DIGITS)
        if said != _digest_after(stream):
            return False
        stream.seek(_DIGITS)
        with tarfile.open(fileobj=stream, mode="r:") as tar:
            for member in tar:
                content = tar.extractfile(member) if member.isreg() and Path(member.name).name == member.name else None
                if content is None:
                    return False
                with content, (folder / member.name).open("wb") as target:
                    shutil.copyfileobj(content, target)
    return True


def _digest_after(stream: Any) -> bytes:
    """SHA-256 of a file after its first 64 bytes."""
    stream.seek(_DIGITS)
    digest = hashlib.sha256()
    while block := stream.read(1 << 20):
        digest.update(block)
    return digest.hexdigest().encode()
