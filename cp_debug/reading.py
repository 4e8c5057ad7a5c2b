"""Files read within limits: no FIFO or device is waited for, nothing is allocated because a header claims it, and
whatever is wrong is one sentence that names the file."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cp_debug.errors import InputError, system_reason

if TYPE_CHECKING:
    from typing import IO

    import numpy as np

DEPTH = 64
"""Lists and objects in each other that a JSON document may have."""
LARGEST_DOCUMENT = 1 << 30
"""Bytes of a JSON document."""
LARGEST_SETTINGS = 4 << 20
"""Bytes of a file that a person writes: a configuration, settings."""


def check_file(path: Path, what: str = "file") -> int:
    """The size in bytes of a regular file. Raises InputError where there is none, or something that is no file."""
    try:
        status = path.stat()
    except FileNotFoundError:
        raise InputError(f"{path}: no such {what}") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({system_reason(error)})") from None
    except ValueError:
        raise InputError(f"{str(path)!r}: no such {what} (a null byte in its name)") from None
    if not stat.S_ISREG(status.st_mode):
        raise InputError(f"{path}: is {_kind(status.st_mode)}; expected a {what}")
    return status.st_size


def read_bytes(path: Path, *, what: str = "file", most: int = LARGEST_DOCUMENT) -> bytes:
    """The content. Raises InputError for what is no regular file, cannot be read, or is larger than ``most`` bytes."""
    size = check_file(path, what)
    if size > most:
        raise InputError(f"{path}: {size} bytes; a {what} has at most {most}")
    with reading(path):
        return path.read_bytes()


def read_text(path: Path, *, what: str = "file", most: int = LARGEST_SETTINGS) -> str:
    """The content as UTF-8. Raises InputError as ``read_bytes`` does, and for other encodings and null bytes."""
    data = read_bytes(path, what=what, most=most)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text (byte {error.start})") from None
    if "\0" in text:
        raise InputError(f"{path}: holds a null byte at character {text.index(chr(0))}; expected text")
    return text


def read_json(path: Path, *, what: str = "file", most: int = LARGEST_DOCUMENT) -> Any:
    """The document. Raises InputError as ``read_bytes`` does, and as ``parse_json`` does."""
    return parse_json(read_bytes(path, what=what, most=most), str(path))


def parse_json(data: bytes | str, source: str) -> Any:
    """A JSON document. Raises InputError, starting with ``source``, for what is none or nests too deep."""
    try:
        document = json.loads(data)
    except RecursionError:
        raise InputError(f"{source}: not JSON that can be read (nested too deep)") from None
    except ValueError as error:
        raise InputError(f"{source}: not JSON ({error})") from None
    if _depth(document) > DEPTH:
        raise InputError(f"{source}: nested more than {DEPTH} deep")
    return document


def read_npz(path: Path, names: frozenset[str] | None = None) -> dict[str, np.ndarray]:
    """The plain arrays of a ``.npz`` file, those of ``names`` alone where given.

    Raises InputError for a file that is none, for objects, and for arrays whose header and data disagree.
    """
    import zipfile

    check_file(path, ".npz file")
    with _numpy_file(path, ".npz"), zipfile.ZipFile(path) as archive:
        members = {m.filename.removesuffix(".npy"): m for m in archive.infolist() if m.filename.endswith(".npy")}
        wanted = {name: member for name, member in members.items() if names is None or name in names}
        _check_room(path, sum(member.file_size for member in wanted.values()))
        arrays = {}
        for name, member in wanted.items():
            with archive.open(member) as stream:
                arrays[name] = _array(stream, member.file_size, name)
        return arrays


def read_npy(path: Path) -> np.ndarray:
    """The plain array of a ``.npy`` file. Raises InputError as ``read_npz`` does."""
    size = check_file(path, ".npy file")
    _check_room(path, size)
    with _numpy_file(path, ".npy"), path.open("rb") as stream:
        return _array(stream, size, "the array")


def physical_memory() -> int:
    """Bytes of main memory; what claims more can be no input."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):  # no POSIX
        return 1 << 40


def within(folder: Path, name: str, source: str) -> Path:
    """The file ``name`` of a folder. Raises InputError, starting with ``source``, for a name that leaves the folder."""
    path = Path(name)
    if not name or "\0" in name or path.is_absolute() or ".." in path.parts or path == Path():
        raise InputError(f"{source}: names the file {name!r}; expected one in {folder}")
    return folder / path


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Tells what the operating system refuses while ``path`` is read."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({system_reason(error)})") from None


def _array(stream: IO[bytes], size: int, name: str) -> np.ndarray:
    """An array whose header says what follows it, in ``size`` bytes. Raises ValueError and more for any other."""
    import math

    import numpy as np
    from numpy.lib import format as npy

    version = npy.read_magic(stream)
    read = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}.get(version)
    if read is None:
        raise ValueError(f"{name} is in version {version} of the format; expected 1.0 or 2.0")
    shape, fortran, dtype = read(stream)
    if dtype.hasobject:
        raise ValueError(f"{name} holds Python objects; expected numbers")
    if any(not isinstance(n, int) or isinstance(n, bool) or n < 0 for n in shape):
        raise ValueError(f"{name} has the shape {shape}")
    wanted, found = math.prod(shape) * dtype.itemsize, size - stream.tell()
    if wanted != found:
        raise ValueError(f"{name} is {dtype}{list(shape)}, {wanted} bytes; {found} bytes follow")
    values = np.frombuffer(bytearray(stream.read(wanted)), dtype, math.prod(shape)) if wanted else np.empty(0, dtype)
    if not wanted and math.prod(shape):
        raise ValueError(f"{name} has elements of no bytes")
    return values.reshape(shape, order="F" if fortran else "C")


@contextmanager
def _numpy_file(path: Path, kind: str) -> Iterator[None]:
    try:
        yield
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({system_reason(error)})") from None
    except Exception as error:  # zipfile, zlib, tokenize and numpy raise nearly anything on what is no such file
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise InputError(f"{path}: not a complete {kind} file of plain arrays: {reason[:200]}") from None


def _check_room(path: Path, size: int) -> None:
    if size > physical_memory():
        raise InputError(f"{path}: its arrays take {size / 2**30:.0f} GiB, more than this machine has")


def _depth(document: Any) -> int:
    """Lists and objects in each other, counted to one more than ``DEPTH`` and without recursion."""
    level = [document]
    for depth in range(DEPTH + 1):
        containers = [item for item in level if isinstance(item, list | Mapping)]
        if not containers:
            return depth
        level = [v for c in containers for v in (c.values() if isinstance(c, Mapping) else c)]
    return DEPTH + 1


def _kind(mode: int) -> str:
    kinds = {
        stat.S_IFDIR: "a folder",
        stat.S_IFIFO: "a pipe",
        stat.S_IFCHR: "a device",
        stat.S_IFBLK: "a device",
        stat.S_IFSOCK: "a socket",
    }
    return kinds.get(stat.S_IFMT(mode), "no regular file")
