"""PCD files (the Point Cloud Library's format 0.7): ascii, binary and binary_compressed."""

from __future__ import annotations

import struct
import warnings
from pathlib import Path

import numpy as np

from cp_debug.errors import DAMAGED, Damage, InputError, library_reason
from cp_debug.reading import read_bytes

LARGEST = 1 << 31
"""Largest size of a file, and of its points, in bytes."""
LONGEST_COPY = 264
"""Largest number of bytes that three packed ones can stand for."""
_KEYS = ("VERSION", "FIELDS", "SIZE", "TYPE", "COUNT", "WIDTH", "HEIGHT", "VIEWPOINT", "POINTS", "DATA")


def read_pcd(path: Path) -> dict[str, np.ndarray]:
    """Field name → [N] values, in the file's types; fields of several values and padding are left out.

    Raises InputError for a header or a body that is not as the format says.
    """
    content = read_bytes(path, what="point file", most=LARGEST)
    try:
        header, start = _header(content)
        names, dtype = _fields(header)
        count = int(header["POINTS"][0]) if "POINTS" in header else int(header["WIDTH"][0]) * int(header["HEIGHT"][0])
        if count < 0 or count > LARGEST // dtype.itemsize:
            raise Damage(f"{count} points")
        rows = _body(content[start:], header["DATA"][0], dtype, count)
    except Exception as error:  # header and body are taken apart by numpy, which raises nearly anything
        raise InputError(f"{path}: not a readable .pcd file ({library_reason(error) or DAMAGED})") from None
    return {name: rows[name] for name in names if rows[name].ndim == 1}


def _header(content: bytes) -> tuple[dict[str, list[str]], int]:
    """Entries of the header, and where the body starts."""
    header: dict[str, list[str]] = {}
    start = 0
    while "DATA" not in header:
        end = content.index(b"\n", start)
        key, *values = content[start:end].decode("ascii").split() or ["#"]
        if not key.startswith("#"):
            if key not in _KEYS:
                raise Damage(f"unknown header entry {key!r}")
            header[key] = values
        start = end + 1
    return header, start


def _fields(header: dict[str, list[str]]) -> tuple[list[str], np.dtype]:
    """The names that are not padding, and the type of a row."""
    counts = header.get("COUNT", ["1"] * len(header["FIELDS"]))
    rows = zip(header["FIELDS"], header["TYPE"], header["SIZE"], counts, strict=True)
    kinds = []
    for index, (name, kind, size, count) in enumerate(rows):
        kind = {"F": "f", "I": "i", "U": "u"}[kind]
        shape = (int(count),) if int(count) > 1 else ()
        kinds.append((f"_{index}" if name == "_" else name, f"<{kind}{size}", shape))
    return [name for name in header["FIELDS"] if name != "_"], np.dtype(kinds)


def _body(body: bytes, encoding: str, dtype: np.dtype, count: int) -> np.ndarray:
    """Rows [N] of the structured type ``dtype``. Raises Damage for a body that does not fit the header."""
    if encoding == "ascii":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that there are no rows
            return np.atleast_1d(np.loadtxt(body.decode("ascii").splitlines(), dtype=dtype, max_rows=count, ndmin=1))
    if encoding == "binary":
        return np.frombuffer(body, dtype, count)
    if encoding != "binary_compressed":
        raise Damage(f"DATA {encoding}; expected ascii, binary or binary_compressed")
    packed, size = struct.unpack_from("<II", body)
    if size != dtype.itemsize * count or size > LONGEST_COPY * max(len(body), 1):
        raise Damage(f"{size} bytes for {count} rows of {dtype.itemsize}")
    plain = lzf_decompress(body[8 : 8 + packed], size)
    rows, start = np.empty(count, dtype), 0
    for name in dtype.names or ():  # one field after the other, not one row after the other
        field = np.frombuffer(plain, dtype[name], count, start)
        rows[name] = field
        start += dtype[name].itemsize * count
    return rows


def lzf_decompress(packed: bytes, size: int) -> bytes:
    """Decompress Marc Lehmann's LZF: literal runs, and copies of output up to 8 KiB before.

    ``size`` is the length of the result. Raises Damage when the data do not unpack to it.
    """
    plain = bytearray()
    at = 0
    while at < len(packed):
        control = packed[at]
        at += 1
        if control < 32:
            plain += packed[at : at + control + 1]
            at += control + 1
            continue
        length = control >> 5
        if length == 7:
            length += packed[at]
            at += 1
        start = len(plain) - ((control & 31) << 8) - packed[at] - 1
        at += 1
        if start < 0:
            raise Damage("a copy from before the start")
        chunk = plain[start : start + length + 2]
        plain += (chunk * (length // len(chunk) + 2))[: length + 2]  # a copy may run into itself
    if len(plain) != size:
        raise Damage(f"{len(plain)} bytes unpacked; expected {size}")
    return bytes(plain)
