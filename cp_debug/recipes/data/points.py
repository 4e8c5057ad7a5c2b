"""Point files: raw float32 rows as nuScenes, KITTI and T4 store them, numpy's files and PCD."""

from __future__ import annotations

import struct
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cp_debug.errors import Damage, InputError
from cp_debug.reading import check_file, read_bytes, read_npy, read_npz, readable

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
    with readable(path, "a readable .pcd file"):
        header, start = _header(content)
        names, dtype = _fields(header)
        count = int(header["POINTS"][0]) if "POINTS" in header else int(header["WIDTH"][0]) * int(header["HEIGHT"][0])
        if count < 0 or count > LARGEST // dtype.itemsize:
            raise Damage(f"{count} points")
        rows = _body(content[start:], header["DATA"][0], dtype, count)
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


Points = NDArray[np.float32]

COLUMNS = {".pcd.bin": ("x", "y", "z", "intensity", "ring"), ".bin": ("x", "y", "z", "intensity")}
"""Columns of a file by its ending: nuScenes and T4 datasets, KITTI."""
LAST_RING = 255
LONGEST_DT = 10.0
"""Largest age of a sweep in seconds that a fifth column can mean; ten sweeps at 10 Hz take 1 s."""
ENDINGS = (*COLUMNS, ".npy", ".npz", ".pcd")
_PCD_NAMES = {"intensity": ("i", "reflectivity"), "dt": ("time_lag", "time")}


def read_points(path: Path, features: Sequence[str], columns: Sequence[str] | None = None) -> Points:
    """The cloud in ``path`` as [N, len(features)] float32; a file of 0 bytes is an empty cloud.

    ``.bin`` files hold one sweep with ``columns`` (None: by the ending); what they lack, ``dt`` for one, is 0.
    ``.npy``, and ``points`` in an ``.npz``, have exactly ``features``. Raises InputError for a missing file, an unknown
    ending, a size that is no multiple of the columns, an array of another name or shape, or of no numbers.
    """
    check_file(path, "point file")
    if path.suffix in (".npy", ".npz"):
        return _read_numpy(path, features)
    if path.suffix == ".pcd":
        return _select(path, read_pcd(path), features)
    ending = next((ending for ending in COLUMNS if path.name.endswith(ending)), None)
    if ending is None:
        raise InputError(f"{path}: not a point file; expected a name ending in {' '.join(ENDINGS)}")
    names = columns or columns_of(path, ending)[0]
    return _select(path, dict(zip(names, _read_raw(path, names).T, strict=True)), features)


def point_files(path: Path) -> list[Path]:
    """``path`` itself, or the files of that folder, by name. Raises InputError for none."""
    if not path.is_dir():
        return [path]
    if files := sorted(file for file in path.iterdir() if file.name.endswith(ENDINGS)):
        return files
    raise InputError(f"{path}: holds no sample (a file whose name ends in {' '.join(ENDINGS)})")


def columns_of(path: Path, ending: str) -> tuple[tuple[str, ...], str]:
    """The columns of a ``.bin`` file, and what is to be said of the choice: nothing where content and ending agree.

    Where the size fits four columns and five, the content decides, and the ending where both or neither can be.
    Intensity is never negative, rings are small whole numbers, and ages of points (``dt``) are short: rows cut at
    another width hold coordinates there.
    """
    usual, wide, narrow = COLUMNS[ending], COLUMNS[".pcd.bin"], COLUMNS[".bin"]
    size = check_file(path, "point file")
    if not size or any(size % (4 * len(names)) for names in (wide, narrow)):
        return usual, ""
    five = _read_raw(path, wide)
    fifth, four = _fifth(five), _intensities(_read_raw(path, narrow))
    if bool(fifth) == four or (four and usual == wide and _intensities(five)):  # nothing speaks against the ending
        other = len(wide if usual == narrow else narrow)
        return usual, f"{len(usual)} columns, by its ending; {other} fit its size, too, and its content does not tell"
    found = (*narrow, fifth) if fifth else narrow
    age = ", the last as dt" if fifth == "dt" else ""
    if len(found) == len(usual):  # files of one folder are read alike, whatever their sizes fit
        return usual, ""
    return found, f"{len(found)} columns{age}, by its content"


def _fifth(points: Points) -> str:
    """The name of the fifth column, ``ring`` or ``dt``; empty where rows cannot be those of five columns."""
    last = points[np.isfinite(points[:, 4]), 4]
    if not _intensities(points) or (last < 0).any():
        return ""
    if (last == np.round(last)).all() and (last <= LAST_RING).all():
        return "ring"
    return "dt" if (last <= LONGEST_DT).all() else ""


def _intensities(points: Points) -> bool:
    """Whether the fourth column can be intensity; NaN, which a sensor may write, does not speak against it."""
    return not (points[:, 3] < 0).any()


def _read_raw(path: Path, columns: Sequence[str]) -> Points:
    """Rows [N, len(columns)] of a headerless file. Raises InputError for a size that does not fit."""
    size = check_file(path, "point file")
    if size % (4 * len(columns)):
        fits = [ending for ending, names in COLUMNS.items() if size % (4 * len(names)) == 0]
        hint = f"; its size fits the {len(COLUMNS[fits[0]])} columns of *{fits[0]}" if fits else ""
        raise InputError(
            f"{path}: {size} bytes is not a multiple of {len(columns)} float32 columns ({', '.join(columns)}){hint}"
        )
    data = read_bytes(path, what="point file", most=LARGEST)
    return np.frombuffer(data, dtype=np.float32).reshape(-1, len(columns))


def _select(path: Path, fields: Mapping[str, np.ndarray], features: Sequence[str]) -> Points:
    """The features among named columns; 0 for those that a cloud can do without."""
    missing = {"x", "y", "z"} - fields.keys()
    if missing:
        raise InputError(f"{path}: has no field {', '.join(sorted(missing))}; it has {', '.join(fields)}")
    points = np.zeros((len(fields["x"]), len(features)), dtype=np.float32)
    for index, feature in enumerate(features):
        name = next((name for name in (feature, *_PCD_NAMES.get(feature, ())) if name in fields), None)
        if name is not None:
            points[:, index] = fields[name]
    return points


def _read_numpy(path: Path, features: Sequence[str]) -> Points:
    if path.suffix == ".npz":
        arrays = read_npz(path)
        if "points" not in arrays:
            raise InputError(f"{path}: expected an array 'points'; it has {', '.join(arrays) or 'none'}")
        points = arrays["points"]
    else:
        points = read_npy(path)
    if points.ndim != 2 or points.shape[1] != len(features) or points.dtype.kind not in "fiu":
        expected = f"numbers of shape [N, {len(features)}] ({', '.join(features)})"
        raise InputError(f"{path}: points are {points.dtype} of shape {list(points.shape)}; expected {expected}")
    with np.errstate(over="ignore"):  # what FP32 cannot hold is Inf, which is told of every cloud
        return points.astype(np.float32, copy=False)
