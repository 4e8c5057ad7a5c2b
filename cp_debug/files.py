"""Files that appear whole or not at all, renamed when complete; journals of JSON, which grow by whole lines."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from cp_debug.errors import InputError, system_reason
from cp_debug.reading import reading, sealed

READER = 10.0
"""Seconds to wait for somebody who reads a pipe; opened as a file it would wait for ever."""
SHORTENED = 100
"""Number of characters of a name that a temporary name repeats."""
results: TextIO | None = None
"""The stream of reports that no file was named for; None: ``sys.stdout``, unless that is set aside for prints."""


def named(path: Path) -> str:
    """The name of a file in messages: of one in a working folder of this program, which nobody knows, where that is."""
    temporary = Path(tempfile.gettempdir())
    if path.is_relative_to(temporary) and str(path.relative_to(temporary)).startswith("cpdebug-"):
        return f"a working file in {temporary}"
    return str(path)


@contextmanager
def complete_path(path: Path) -> Iterator[Path]:
    """A temporary name that becomes ``path`` when the block succeeds. Raises InputError when it cannot be written."""
    check_target(path)
    partial = partial_name(path)
    special = path.exists() and not path.is_file()
    pipe = _read_pipe(path) if special and path.is_fifo() else None
    try:
        yield path if special else partial  # a device or a pipe, such as /dev/stdout, is written to as it is
        if not special:
            partial.replace(path)
    except OSError as error:
        raise InputError(f"{named(path)}: cannot be written ({system_reason(error)})") from error
    finally:
        if pipe is not None:
            os.close(pipe)
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def _read_pipe(path: Path) -> int:
    """A descriptor of a pipe that somebody reads, open so that its reader stays. Raises InputError where none comes."""
    end = time.monotonic() + READER
    while True:
        try:
            return os.open(path, os.O_WRONLY | os.O_NONBLOCK)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise InputError(f"{path}: cannot be written ({system_reason(error)})") from None
        if time.monotonic() > end:
            raise InputError(f"{path}: cannot be written (a pipe that nothing reads)")
        time.sleep(0.05)


@contextmanager
def complete_folder(path: Path) -> Iterator[Path]:
    """A temporary folder whose files become those of the folder ``path`` when the block succeeds, one after the other.

    ``path`` is made then where it does not exist; files that it has under other names stay. Raises InputError when it
    cannot be written.
    """
    new = missing_folders(path)
    make_folder(path.parent)
    if path.exists() and not path.is_dir():
        raise InputError(f"{path}: exists and is not a folder")
    partial = partial_name(path if path.name else path / "output")  # the current folder has no name
    try:
        partial.mkdir()
        yield partial
        make_folder(path)
        for file in sorted(partial.iterdir()):
            file.replace(path / file.name)
        new = []
    except OSError as error:
        raise InputError(f"{named(path)}: cannot be written ({system_reason(error)})") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        for folder in new:
            with suppress(OSError):  # somebody else's file lies there by now
                folder.rmdir()


def missing_folders(path: Path) -> list[Path]:
    """The folder ``path`` and those around it as far as they do not exist yet, the innermost first."""
    try:
        return [folder for folder in (path, *path.parents) if not os.path.lexists(folder)]
    except ValueError:  # a null byte, of which ``make_folder`` has a sentence
        return []


def partial_name(path: Path, mark: str = "") -> Path:
    """The temporary name beside ``path`` under which this process writes; ``mark`` tells apart those of one process.

    Files that processes left which are gone are removed.
    """
    stem = f".{path.name[:SHORTENED]}."
    with suppress(OSError):
        for entry in path.parent.iterdir():
            owner = entry.name[len(stem) :].removesuffix(".partial").partition("-")[0]
            if entry.name.startswith(stem) and entry.name.endswith(".partial") and _is_gone(owner):
                shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
    return path.with_name(f"{stem}{os.getpid()}{f'-{mark}' if mark else ''}.partial")


def _is_gone(owner: str) -> bool:
    """Whether ``owner`` is the number of a process that runs no more on this machine."""
    if not (owner.isdigit() and len(owner) < 10):
        return False
    try:
        os.kill(int(owner), 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False


def resolved(path: Path) -> Path:
    """The absolute path without symbolic links; where links go round in a circle, as far as they lead.

    Raises InputError for a null byte in the name.
    """
    try:
        return Path(os.path.realpath(path))
    except ValueError:
        raise InputError(f"{str(path)!r}: no such file (a null byte in its name)") from None


def check_target(path: Path) -> None:
    """Raise InputError where no file can be written: an empty or impossible name, a folder, no folder around it."""
    if "\0" in str(path):
        raise InputError(f"{str(path)!r}: cannot be written (a null byte in its name)")
    if str(path) == "-":
        raise InputError("-: expected the name of a file; the standard output is /dev/stdout")
    try:
        if not path.name or path.is_dir():
            raise InputError(f"{path}: cannot be written (it is a folder); expected the name of a file")
        path.exists()
        parent = path.parent.stat()
    except OSError as error:
        reason = "there is no such folder" if isinstance(error, FileNotFoundError) else system_reason(error)
        raise InputError(f"{path}: cannot be written ({reason})") from None
    if not stat.S_ISDIR(parent.st_mode):
        raise InputError(f"{path}: cannot be written ({path.parent} is no folder)")
    if path.is_file() or not path.exists():  # else it is written as it is: a pipe, a device
        try:
            with tempfile.TemporaryFile(dir=path.parent):
                pass
        except OSError as error:
            raise InputError(f"{path}: cannot be written ({system_reason(error)})") from None


def make_folder(path: Path, what: str = "folder") -> None:
    """Make a folder and those around it, or find it there.

    ``what`` names the folder in messages. Raises InputError when it cannot be made.
    """
    if str(path) == "-":
        raise InputError(f"-: expected the name of a {what}")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise InputError(f"{path}: exists and is not a folder; expected a {what}") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be created ({system_reason(error)})") from None
    except ValueError:
        raise InputError(f"{str(path)!r}: cannot be created (a null byte in its name)") from None
    except RecursionError:  # a call for each folder around it
        raise InputError(f"{path}: cannot be created ({len(path.parts)} nested folders)") from None


@contextmanager
def complete_file(path: Path) -> Iterator[TextIO]:
    """Open ``path`` for writing so that it appears whole or not at all. Raises InputError when it cannot be written."""
    with complete_path(path) as partial, partial.open("w", encoding="utf-8", errors="backslashreplace") as stream:
        yield stream


def write_text(text: str, target: Path | None) -> None:
    """Write a report to a file, or to stdout without one. Raises InputError when it cannot be written."""
    if target is None:
        stream = results or sys.stdout
        stream.write(text)
        stream.flush()
        return
    with complete_file(target) as stream:
        stream.write(text)


class Journal:
    """JSON documents, a line each, which a later run goes on with; ``sealed``, so that a changed one is noticed.

    Every line is one write at the end of the file. So whatever dies leaves whole lines but for the last, which counts
    for nothing. ``header``: the first line, written where the file is new or has only the start of it. Whether that of
    an older file is right is for the caller to say, and then to ``repair``. Raises InputError, starting with ``name``,
    where the file cannot be written.
    """

    def __init__(self, path: Path, name: str, header: bytes) -> None:
        self.path, self._name = path, name
        start = b""
        if path.is_file():
            with reading(path), path.open("rb") as stream:
                start = stream.read(len(header))
        self.has_header = header.startswith(start)
        if self.has_header and start != header:
            self._write(header[len(start) :])

    def lines(self) -> Iterator[bytes]:
        """The whole lines, and the first in any case."""
        with self.path.open("rb") as stream:
            for number, line in enumerate(stream):
                if number and not line.endswith(b"\n"):
                    return  # being written
                yield line

    def repair(self) -> None:
        """Drop what an interrupted write left at the end. Raises InputError where it cannot be written."""
        end = sum(map(len, self.lines()))
        if end < self.path.stat().st_size:
            self._write(b"")
            os.truncate(self.path, end)

    def append(self, document: Mapping[str, Any]) -> None:
        """Add a document. Raises InputError when the disk does not take it."""
        self._write(f"{sealed(document)}\n".encode())

    def _write(self, line: bytes) -> None:
        try:
            with self.path.open("ab", buffering=0) as stream:
                if stream.write(line) != len(line):
                    raise OSError(errno.ENOSPC, "no space left")
        except OSError as error:
            raise InputError(f"{self._name} cannot be written ({system_reason(error)})") from error


def key_of(parts: Mapping[str, Any]) -> str:
    """SHA-256 of plain containers, the same for equal ones."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def hashes(paths: Iterable[Path]) -> dict[str, str]:
    """Path → SHA-256 of each file."""
    return {str(path): file_hash(path) for path in sorted(paths)}


def file_hash(path: Path) -> str:
    """SHA-256 of a file; empty where there is none."""
    digest = hashlib.sha256()
    if not path.is_file():
        return ""
    try:
        with path.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    except OSError:
        return ""
    return digest.hexdigest()
