"""Files read within limits.

No FIFO or device is waited for, nothing is allocated because a header claims it, and whatever is wrong is one sentence
that names the file.
"""

from __future__ import annotations

import errno
import json
import os
import re
import stat
import warnings
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import date, time
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from cp_debug.errors import DAMAGED, CpdebugError, Damage, InputError, library_reason, system_reason
from cp_debug.safe_text import did_you_mean, in_utf8

if TYPE_CHECKING:
    from typing import IO

    import numpy as np
    from pydantic import ValidationError
    from pydantic_core import ErrorDetails

T = TypeVar("T")

RESULT = "result.json"
"""File of the result in a saved folder."""
SHOWN = 3
"""Largest number of fields that a message names."""
DEPTH = 64
"""Largest depth of lists and objects in a JSON document."""
MOST = 50_000
"""Largest number of values in a document of settings."""
LONGEST = 100_000
"""Largest number of characters of a text in settings."""
LONGEST_NUMBER = 1024
"""Largest number of bits of a number in settings."""
LARGEST_DOCUMENT = 1 << 30
"""Largest size of a JSON document in bytes."""
LARGEST_SETTINGS = 1 << 17
"""Largest size in bytes of a file that a person writes: a configuration, settings."""
_EXPECTED = {"path_type": "expected a path", "model_type": "expected settings by name"}
"""What is said of errors whose own message is about Python's classes."""


def check_file(path: Path, what: str = "file") -> int:
    """The size in bytes of a regular file; ``what`` names it in messages.

    Raises InputError where there is none, or something that is no file.
    """
    try:
        status = path.stat()
    except FileNotFoundError:
        with suppress(OSError):
            what += did_you_mean(path.name, (each.name for each in islice(path.parent.iterdir(), 1000)))
        raise InputError(f"{path}: no such {what}") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({system_reason(error)})") from None
    except ValueError:
        raise InputError(f"{str(path)!r}: no such {what} (a null byte in its name)") from None
    if not stat.S_ISREG(status.st_mode):
        raise InputError(f"{path}: is {_kind(status.st_mode)}; expected a {what}")
    return status.st_size


def read_bytes(path: Path, *, what: str = "file", most: int = LARGEST_DOCUMENT) -> bytes:
    """The content of a file; ``what`` names it in messages.

    Raises InputError for what is not a regular file, cannot be read, or is larger than ``most`` bytes.
    """
    size = check_file(path, what)
    if size > most:
        raise InputError(f"{path}: {size} bytes; a {what} has at most {most}")
    with reading(path):
        return path.read_bytes()


def read_text(path: Path, *, what: str = "file", most: int = LARGEST_SETTINGS) -> str:
    """The content of a UTF-8 file; ``what`` names it in messages.

    Raises InputError as ``read_bytes`` does, and for other encodings and null bytes.
    """
    data = read_bytes(path, what=what, most=most)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text (byte {error.start})") from None
    if "\0" in text:
        raise InputError(f"{path}: holds a null byte at character {text.index(chr(0))}; expected text")
    return text


def read_json(path: Path, *, what: str = "file", most: int = LARGEST_DOCUMENT) -> Any:
    """The document in a JSON file; ``what`` names it in messages.

    Raises InputError as ``read_bytes`` and ``parse_json`` do.
    """
    return parse_json(read_bytes(path, what=what, most=most), str(path))


def result_file(path: Path) -> Path:
    """The file of a saved result, which is in a folder or is the path itself. Raises InputError where there is none."""
    file = path / RESULT if path.is_dir() else path
    if file.exists():
        return file
    if any(path.glob("sample-*/*/manifest.json")):
        raise InputError(f"{path}: the run was interrupted before it had a result; run it again with --overwrite")
    raise InputError(f"{file}: no such file; expected what `cpdebug bisect --save FOLDER` writes")


def parse_json(data: bytes | str, source: str, *, unique: bool = False) -> Any:
    """A JSON document of text and numbers that others can hold: 64 bits, no halves of surrogates.

    Raises InputError, starting with ``source``, for what is none or nests more than ``DEPTH`` deep, and where keys are
    to be ``unique`` for one that stands twice in an object.
    """
    try:
        document = json.loads(data, parse_int=_integer, object_pairs_hook=_unique if unique else None)
        _check_tree(document)
    except RecursionError:
        raise InputError(f"{source}: nested too deep; expected at most {DEPTH} levels") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{source}: not JSON that can be read (no text in UTF-8 at byte {error.start})") from None
    except UnicodeEncodeError:
        raise InputError(f"{source}: not JSON that can be read (a text holds half of a surrogate pair)") from None
    except ValueError as error:
        raise InputError(f"{source}: not JSON that can be read ({error})") from None
    return document


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} is set twice")
    return document


def json_text(document: Any, indent: int | None = None) -> str:
    """A document as JSON in ASCII that ``parse_json`` reads, with its texts ``in_utf8``."""
    text = json.dumps(document, indent=indent, allow_nan=False)
    return json.dumps(_whole(document), indent=indent, allow_nan=False) if "\\ud" in text else text


def _whole(value: Any) -> Any:
    if isinstance(value, str):
        return in_utf8(value)
    if isinstance(value, Mapping):
        return {_whole(name): _whole(each) for name, each in value.items()}
    return [*map(_whole, value)] if isinstance(value, list | tuple) else value


def sealed(document: Mapping[str, Any]) -> str:
    """A document as one line of JSON with its own checksum inside, which ``unsealed`` compares."""
    text = json_text(document)
    return f"{text[:-1]}{', ' if document else ''}{_seal(text)}"


def unsealed(line: bytes, source: str) -> dict[str, Any]:
    """The document that ``sealed`` wrote as ``line``.

    Raises InputError, starting with ``source``, for a line that is none or was changed.
    """
    document = parse_json(line, source)
    text = line.strip().decode(errors="replace")  # JSON may be in UTF-16: not what ``sealed`` writes
    seal = len(_seal(""))
    body = f"{text[:-seal].removesuffix(', ')}}}"
    if not isinstance(document, dict) or text[-seal:] != _seal(body):
        raise InputError(f"{source}: changed since it was written, or written by an earlier version")
    del document["crc32"]
    return document


def _seal(text: str) -> str:
    return f'"crc32": "{zlib.crc32(text.encode()):08x}"}}'


def typed(kind: type[T] | Any, document: Any, source: str) -> T:
    """``document`` as a type: a dataclass, a TypedDict, a container of such.

    Numbers may be strings ("NaN", "Infinity"), as JSON lacks those. Raises InputError, starting with ``source``, that
    names the first fields that do not fit.
    """
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(kind).validate_python(document)
    except ValidationError as error:
        phrases = misfits(error, document)
        phrases[SHOWN:] = [f"and {len(phrases) - SHOWN} more"] if len(phrases) > SHOWN else []
        raise InputError(f"{source}: {'; '.join(phrases)}") from None


def misfits(error: ValidationError, document: Any) -> list[str]:
    """What pydantic refuses of ``document``: ``tensors.1.rank is "x"; expected a valid integer``, one after another."""
    phrases = []
    for problem in error.errors(include_url=False, include_context=False):
        kind, key = problem["type"], _place(problem, document)
        text = problem["msg"].removeprefix("Value error, ").replace("Input should be", "expected")
        if kind == "missing":
            phrases.append(f"{key} is missing")
        elif kind in ("unknown_key", "value_error"):  # the text says what is there
            phrases.append(f"{key}: {text}" if key else text)
        else:
            phrases.append(f"{key or 'the document'} is {excerpt(problem['input'])}; {_EXPECTED.get(kind, text)}")
    return phrases


def excerpt(value: Any) -> str:
    """The beginning of a value, as JSON where it can be: ``"x"``, ``null``."""
    try:
        text = json.dumps(value, default=str, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError):  # keys that are no text; a list that holds itself
        text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def plain(document: Any, source: str, *, nulls: bool = False) -> Any:
    """Settings as text, numbers, lists and tables; dates become text.

    ``nulls``: whether texts may hold null bytes, as those of a programming language may. What is shared within the
    document counts wherever it stands, so that none unfolds beyond ``MOST`` values. Raises InputError, starting with
    ``source``, that names the key of anything else, and for what nests too deep.
    """
    room = [MOST]

    def copy(value: Any, place: tuple[str, ...]) -> Any:
        room[0] -= 1
        where = f"{source}: {'.'.join(place)[:80] or 'the document'}"
        if room[0] < 0 or len(place) > DEPTH:
            raise InputError(f"{source}: unfolds to more than {MOST} values or {DEPTH} levels")
        if isinstance(value, dict):
            for key in value:
                if not isinstance(key, str | int):
                    raise InputError(f"{where}: the key {str(key)[:60]!r} is {type(key).__name__}; expected text")
            return {key: copy(item, (*place, str(key))) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [copy(item, (*place, str(index))) for index, item in enumerate(value)]
        if isinstance(value, str):
            if ("\0" in value and not nulls) or len(value) > LONGEST:
                raise InputError(f"{where}: {'a null byte' if len(value) <= LONGEST else 'too long a text'}")
            return value
        if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > LONGEST_NUMBER:
            raise InputError(f"{where}: a number of {value.bit_length()} bits")
        if isinstance(value, date | time):
            return value.isoformat()
        if value is None or isinstance(value, bool | int | float):
            return value
        raise InputError(f"{where}: {type(value).__name__}; expected text, a number, a list or a table")

    return copy(document, ())


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """The plain arrays of a ``.npz`` file.

    Raises InputError for a file that is none, for objects, and for arrays whose header and data disagree.
    """
    import zipfile

    check_file(path, ".npz file")
    with (
        readable(path, "a readable .npz file of plain arrays"),
        zipfile.ZipFile(path) as archive,
    ):
        members = {m.filename.removesuffix(".npy"): m for m in archive.infolist() if m.filename.endswith(".npy")}
        _check_room(path, sum(member.file_size for member in members.values()))
        arrays = {}
        for name, member in members.items():
            with archive.open(member) as stream:
                arrays[name] = array_of(stream, member.file_size, name)
        return arrays


def read_npy(path: Path) -> np.ndarray:
    """The plain array of a ``.npy`` file. Raises InputError as ``read_npz`` does."""
    size = check_file(path, ".npy file")
    _check_room(path, size)
    with readable(path, "a readable .npy file of a plain array"), path.open("rb") as stream:
        return array_of(stream, size, "the array")


def physical_memory() -> int:
    """Main memory in bytes: a file that claims to hold more is refused."""
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
    """Context that turns what the operating system refuses while ``path`` is read into InputError."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({system_reason(error)})") from None


@contextmanager
def readable(path: Path | str, what: str) -> Iterator[None]:
    """Context that turns whatever a library raises while it reads ``path`` into InputError: it is not ``what``.

    On what is no such file, nearly every library raises nearly everything.
    """
    try:
        yield
    except CpdebugError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):  # which is of a place that it names
            raise InputError(f"{path}: cannot be read ({system_reason(error)})") from None
        raise InputError(f"{path}: not {what} ({library_reason(error) or DAMAGED})") from None


def array_of(stream: IO[bytes], size: int, name: str) -> np.ndarray:
    """Array that follows a ``.npy`` header in ``stream``, which holds ``size`` bytes of it.

    Raises Damage, or what numpy raises, for a header that claims something else.
    """
    import math

    import numpy as np
    from numpy.lib import format as npy

    version = npy.read_magic(stream)
    read_header = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}.get(version)
    if read_header is None:
        raise Damage(f"{name} is in version {version} of the format; expected 1.0 or 2.0")
    shape: tuple[Any, ...]
    try:
        shape, fortran, dtype = read_header(stream)
    except Exception as error:  # numpy evaluates its text as a literal of Python, and makes a type of what comes
        if (found := re.search(r"dtype descriptor: ('\w{1,16}')", str(error))) is not None:
            raise Damage(f"{name} has the dtype {found[1]}, which numpy lacks") from None
        raise Damage(f"{name} has a header without type, order and shape") from None
    if dtype.hasobject:
        raise Damage(f"{name} holds Python objects; expected numbers")
    if any(not isinstance(n, int) or isinstance(n, bool) or n < 0 for n in shape):
        raise Damage(f"{name} has the shape {shape}")
    sizes: list[int] = list(shape)
    count = math.prod(sizes)
    needed, available = count * dtype.itemsize, size - stream.tell()
    if needed != available:
        raise Damage(f"{name} is {dtype}{list(shape)}, {needed} bytes; {available} bytes follow")
    if count and not needed:
        raise Damage(f"{name} has elements of no bytes")
    values = np.frombuffer(bytearray(stream.read(needed)), dtype, count) if needed else np.empty(0, dtype)
    return values.reshape(sizes, order="F" if fortran else "C")


def _check_room(path: Path, size: int) -> None:
    if size > physical_memory():
        raise InputError(f"{path}: its arrays take {size / 2**30:.0f} GiB, more than this machine has")


def _integer(digits: str) -> int:
    if len(digits) > 20 or not -(1 << 63) <= (value := int(digits)) < 1 << 64:
        raise ValueError(f"the number {digits[:20]}… has more than 64 bits")
    return value


def _check_tree(document: Any) -> None:
    """Raises RecursionError for more than ``DEPTH`` levels, and UnicodeError for text that no file can hold."""
    level = [document]
    for _ in range(DEPTH + 1):
        following: list[Any] = []
        for item in level:
            if isinstance(item, str):
                item.encode()
            elif isinstance(item, list):
                following += item
            elif isinstance(item, dict):
                following += item.keys()
                following += item.values()
        if not following:
            return
        level = following
    raise RecursionError


def _place(error: ErrorDetails, document: Any) -> str:
    """``tensors.1.dtype``: the keys on the way to what is wrong, without pydantic's own names of types."""
    keys, value = [], document
    for place, key in enumerate(error["loc"], 1):
        inside = isinstance(value, Mapping) and key in value
        if inside or isinstance(key, int) or (error["type"] == "missing" and place == len(error["loc"])):
            keys.append(str(key))
        if inside or (isinstance(value, list | tuple) and isinstance(key, int) and key < len(value)):
            value = value[key]
    return ".".join(keys)


def _kind(mode: int) -> str:
    kinds = {
        stat.S_IFDIR: "a folder",
        stat.S_IFIFO: "a pipe",
        stat.S_IFCHR: "a device",
        stat.S_IFBLK: "a device",
        stat.S_IFSOCK: "a socket",
    }
    return kinds.get(stat.S_IFMT(mode), "not a regular file")


def load_plain(path: Path) -> Any:
    """Content of a file of ``torch.save``, on the CPU, without code; raises as ``torch.load`` does.

    What torch warns of is about its own reader, and says nothing to who only has the file.
    """
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.load(path, map_location="cpu", weights_only=True)
