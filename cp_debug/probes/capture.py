"""A capture: the tensors of one run, on disk, self-describing, comparable on another machine.

A folder with ``manifest.json`` and one safetensors file a tensor, each holding one entry named ``tensor``. It is
written beside its final place and renamed when complete: a folder of that name is a whole capture or does not exist.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import mmap
import re
import shutil
import uuid
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path, PurePath
from types import TracebackType
from typing import Any

import ml_dtypes
import numpy as np
from typing_extensions import Required, TypedDict

from cp_debug.errors import InputError, system_reason
from cp_debug.files import named, partial_name
from cp_debug.probes.arrays import Tensor, as_numpy
from cp_debug.reading import check_file, json_text, read_json, typed, within

SCHEMA = "cpdebug.capture/1"
NO_CAPTURE = "expected a capture of `cpdebug capture`; `cpdebug import` makes one of other tensors"
MANIFEST = "manifest.json"

_SAFETENSORS = {
    "bool": "BOOL",
    **{f"{kind}int{bits}": f"{kind.upper() or 'I'}{bits}" for kind in ("", "u") for bits in (8, 16, 32, 64)},
    **{f"float{bits}": f"F{bits}" for bits in (16, 32, 64)},
    "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
}
"""Name of a dtype → its name in a safetensors file."""

_WRITE = 1 << 20
"""Bytes written at once: larger writes fill huge pages, which took a virtual machine 1.6 times as long."""


class Header(TypedDict, total=False):
    """Facts of a run in its manifest, besides the tensors. Every entry may be left out; others may be added."""

    backend: str
    """The spec, as in ``--backends``."""
    versions: Mapping[str, str]
    device: str
    settings: Mapping[str, Any]
    """Every setting that can change numbers, as read back."""
    model: Mapping[str, str]
    """``name`` and ``sha256``."""
    inputs: list[dict[str, str]]
    """One entry a sample: input name → ``array_hash``."""
    samples: list[str]
    """Source of each sample."""


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a capture."""

    name: str
    component: str
    sample: int
    index: int
    """Position in the execution order of its sample."""
    shape: tuple[int, ...]
    dtype: str
    file: str
    crc32: str
    """CRC-32 of the raw little-endian bytes, eight hexadecimal digits; empty in a capture without checksums."""


class _Manifest(Header, total=False):
    """Entries of a manifest that must have the right type."""

    tensors: Required[list[TensorEntry]]
    precision: str
    emulated: bool
    layers: dict[str, dict[str, str]]
    outputs: list[tuple[str, str]]
    levels: dict[str, list[str]]
    class_names: list[str]


def array_hash(array: np.ndarray) -> str:
    """SHA-256 of dtype, shape and row-major bytes: the same on every machine for the same input."""
    digest = hashlib.sha256(f"{array.dtype.name}{list(array.shape)}".encode())
    digest.update(_raw(array))
    return digest.hexdigest()


def check_free(folder: Path) -> None:
    """Raise InputError where no capture can be written: something is there already, or the name is no file name."""
    if not folder.name or "\0" in str(folder):
        raise InputError(f"{str(folder)!r}: expected the name of a new or empty folder for the capture")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder}: exists; expected a new or empty folder for the capture")


class CaptureWriter:
    """Context manager that writes one capture; an exception in its block, Ctrl-C too, leaves nothing behind."""

    def __init__(self, folder: Path, header: Header | Mapping[str, Any], *, checksums: bool = True) -> None:
        """``header`` is JSON-safe; ``checksums`` are for captures that are kept.

        Entering raises InputError when ``folder`` exists and is not empty.
        """
        self.folder = Path(folder)
        self._header = dict(header)
        self._checksums = checksums
        self._partial = self.folder
        self._entries: dict[tuple[int, str, str], TensorEntry] = {}
        self._written: Counter[int] = Counter()
        self._writer = ThreadPoolExecutor(1, "capture")
        self._pending: Future[None] | None = None
        self._copy = bytearray()

    def __enter__(self) -> CaptureWriter:
        check_free(self.folder)
        self._partial = partial_name(self.folder, uuid.uuid4().hex[:8])
        with self._disk():
            self._partial.mkdir(parents=True)
        return self

    def update(self, header: Header | Mapping[str, Any]) -> None:
        """Replace entries of the header."""
        self._header.update(header)

    def put(self, name: str, tensor: Tensor, sample: int = 0, component: str = "") -> None:
        """Write one tensor; the caller may change it afterwards. Call in execution order.

        It is copied and written while the caller goes on, one tensor at a time. Raises InputError for a second tensor
        of that name, a dtype that safetensors does not know, or, here or at the end, a full disk.
        """
        key = (sample, component, name)
        if key in self._entries:
            raise InputError(f"{self.folder}: tensor {name!r} of sample {sample} was written twice")
        array = as_numpy(tensor)
        if array.dtype.name not in _SAFETENSORS:
            what = f"tensor {name!r} has dtype {array.dtype}"
            raise InputError(f"{named(self.folder)}: {what}, which safetensors cannot hold")
        # The running number makes the name unique, on file systems that fold case too; the rest is for people.
        file = f"{len(self._entries):05d}-{re.sub(r'[^A-Za-z0-9._-]+', '_', name)[:80]}.safetensors"
        raw = _raw(array)
        self._wait()
        if len(self._copy) < len(raw):
            self._copy = bytearray(len(raw))
        copy = memoryview(self._copy)[: len(raw)]
        copy[:] = raw
        self._pending = self._writer.submit(self._write, file, _file_header(array), copy)
        self._entries[key] = TensorEntry(
            name=name,
            component=component,
            sample=sample,
            index=self._written[sample],
            shape=tuple(array.shape),
            dtype=array.dtype.name,
            file=file,
            crc32=f"{zlib.crc32(raw):08x}" if self._checksums else "",
        )
        self._written[sample] += 1

    def _write(self, file: str, header: bytes, raw: memoryview) -> None:
        with self._disk(), (self._partial / file).open("wb") as stream:
            stream.write(header)
            for start in range(0, len(raw), _WRITE):
                stream.write(raw[start : start + _WRITE])

    def _wait(self) -> None:
        """Wait for the tensor before; raise what writing it has raised."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._wait()
                tensors = [asdict(entry) for entry in self._entries.values()]
                text = json_text({"schema": SCHEMA, **self._header, "tensors": tensors}, indent=1)
                with self._disk():
                    (self._partial / MANIFEST).write_text(text, encoding="utf-8")
                    self._partial.replace(self.folder)
        finally:
            self._writer.shutdown()
            self._copy = bytearray()
            shutil.rmtree(self._partial, ignore_errors=True)

    @contextmanager
    def _disk(self) -> Iterator[None]:
        """Turn an OSError into an InputError that tells the reason and how much room the disk has."""
        try:
            yield
        except OSError as error:
            where = next(parent for parent in self._partial.absolute().parents if parent.exists())
            free = shutil.disk_usage(where).free
            room = f" ({free / 2**20:.0f} MiB free)" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
            reason = f"{system_reason(error)}{room}"
            raise InputError(f"{self.folder}: cannot write the capture: {reason}; nothing was kept") from error


class Capture:
    """A capture on disk. Tensors are mapped into memory when they are asked for."""

    def __init__(self, folder: Path, manifest: dict[str, Any], entries: Iterable[TensorEntry]) -> None:
        self.folder, self.manifest = folder, manifest
        self.entries = tuple(entries)
        """Entries in the order in which they were written."""
        self._by_key = {(entry.sample, entry.component, entry.name): entry for entry in self.entries}

    @classmethod
    def open(cls, folder: Path) -> Capture:
        """Read the manifest. Raises InputError when this is not a capture or one of another schema version."""
        if not isinstance(folder, str | PurePath):
            raise InputError(f"folder: {type(folder).__name__}; expected the path of a capture")
        folder = Path(folder)
        if not folder.is_dir():
            if folder.exists():
                raise InputError(f"{folder}: a file; {NO_CAPTURE}")
            raise InputError(f"{folder}: no such folder; expected a capture of `cpdebug capture`")
        path = folder / MANIFEST
        if not path.exists():
            raise InputError(f"{folder}: has no {MANIFEST}; {NO_CAPTURE}")
        manifest = read_json(path, what="manifest")
        schema = manifest.get("schema") if isinstance(manifest, dict) else None
        if schema != SCHEMA:
            raise InputError(f"{path}: schema is {schema!r}; this version reads {SCHEMA!r}")
        contents: _Manifest = typed(_Manifest, manifest, f"{path}: does not follow {SCHEMA}")
        entries, runs = contents["tensors"], len(contents.get("samples") or contents.get("inputs") or [{}])
        for entry in entries:
            if entry.dtype not in _SAFETENSORS:
                raise InputError(f"{path}: tensor {entry.name!r} is {entry.dtype!r}, which a capture cannot hold")
            if any(size < 0 for size in entry.shape):
                raise InputError(f"{path}: tensor {entry.name!r} has the shape {list(entry.shape)}")
            if not 0 <= entry.sample < runs:
                raise InputError(f"{path}: tensor {entry.name!r} is of sample {entry.sample}, which is not listed")
            within(folder, entry.file, f"{path}: tensor {entry.name!r}")
        if len({(each.sample, each.component, each.name) for each in entries}) < len(entries):
            raise InputError(f"{path}: lists a tensor twice")
        return cls(folder, manifest, entries)

    @property
    def samples(self) -> list[int]:
        """The samples that have tensors."""
        return sorted({entry.sample for entry in self.entries})

    def names(self, sample: int = 0, component: str = "") -> list[str]:
        """The tensors of one sample and component in execution order."""
        return [entry.name for entry in self.entries if (entry.sample, entry.component) == (sample, component)]

    def load(self, name: str, sample: int = 0, component: str = "") -> np.ndarray:
        """The tensor, read-only, mapped from its file.

        Shape and dtype are those of the run; bfloat16 and 8-bit floats come as ml_dtypes has them.
        Raises InputError when the capture does not list it, or its file is missing, cut short or another one.
        """
        entry = self._by_key.get((sample, component, name))
        if entry is None:
            raise InputError(f"{self.folder}: has no tensor {name!r} of sample {sample}, component {component!r}")
        path = self.folder / entry.file
        if path.exists():
            check_file(path, "tensor's file")
        try:
            with path.open("rb") as stream:
                mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
            dtype, shape, start, stop = _parse_header(mapped)
        except OSError as error:
            raise InputError(f"{path}: tensor {name!r} cannot be read: {system_reason(error)}") from None
        except (ValueError, KeyError, TypeError, RecursionError):
            raise InputError(f"{path}: tensor {name!r} cannot be read: not a safetensors file, or cut short") from None
        if (dtype, shape) != (_SAFETENSORS[entry.dtype], entry.shape):
            raise InputError(
                f"{path}: holds {dtype} {shape}; the manifest says {entry.dtype} {entry.shape} for {name!r}"
            )
        if stop - start != math.prod(shape) * _dtype(entry.dtype).itemsize:
            raise InputError(f"{path}: tensor {name!r} takes {stop - start} bytes, which does not fit its shape")
        if len(mapped) < stop:
            raise InputError(f"{path}: tensor {name!r} is cut short: {len(mapped)} bytes where {stop} were expected")
        if start == stop:
            return np.empty(shape, _dtype(entry.dtype))
        return np.frombuffer(mapped, _dtype(entry.dtype), math.prod(shape), start).reshape(shape)

    def load_checked(self, name: str, sample: int = 0, component: str = "") -> np.ndarray:
        """``load``, with the checksum of the manifest compared: for captures that came from elsewhere.

        Shape and dtype as ``load``.
        Raises InputError, also for a tensor that changed since it was written.
        """
        array, entry = self.load(name, sample, component), self._by_key[sample, component, name]
        if f"{zlib.crc32(_raw(array)):08x}" != entry.crc32:
            raise InputError(f"{self.folder / entry.file}: tensor {name!r} changed since it was written")
        return array

    def differences(self, other: Capture) -> list[str]:
        """Reasons why two captures should not be compared, a sentence each; empty where they may be."""
        reasons = []
        ours, theirs = (capture.manifest.get("model", {}).get("sha256") for capture in (self, other))
        if ours != theirs:
            reasons.append(f"the model differs: sha256 {ours} in {self.folder}, {theirs} in {other.folder}")
        inputs, other_inputs = self.manifest.get("inputs", []), other.manifest.get("inputs", [])
        if len(inputs) != len(other_inputs):
            reasons.append(
                f"the number of samples differs: {len(inputs)} in {self.folder}, {len(other_inputs)} in {other.folder}"
            )
        for sample, (our_hashes, other_hashes) in enumerate(zip(inputs, other_inputs, strict=False)):
            names = sorted(
                name for name in {*our_hashes, *other_hashes} if our_hashes.get(name) != other_hashes.get(name)
            )
            if names and (
                our_hashes.keys() == other_hashes.keys() or sorted(our_hashes.values()) != sorted(other_hashes.values())
            ):
                reasons.append(f"sample {sample}: input {', '.join(names)} differs")
        return reasons


def _raw(array: np.ndarray) -> memoryview:
    """The row-major little-endian bytes, without a copy where they lie so."""
    return np.ascontiguousarray(array.astype(_dtype(array.dtype.name), copy=False)).reshape(-1).view(np.uint8).data


def _dtype(name: str) -> np.dtype:
    return np.dtype(getattr(ml_dtypes, name, name)).newbyteorder("<")


def _file_header(array: np.ndarray) -> bytes:
    """The bytes before the data in a safetensors file: length of the JSON, JSON padded to a multiple of 8 bytes."""
    fields = {"dtype": _SAFETENSORS[array.dtype.name], "shape": array.shape, "data_offsets": [0, array.nbytes]}
    text = json.dumps({"tensor": fields}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _parse_header(data: mmap.mmap) -> tuple[str, tuple[int, ...], int, int]:
    """Dtype, shape, first byte and byte after the last of the one ``tensor`` in a safetensors file.

    Raises ValueError, KeyError or TypeError for other files.
    """
    length = int.from_bytes(data[:8], "little")
    fields = json.loads(data[8 : 8 + length])["tensor"]
    start, stop = (8 + length + int(offset) for offset in fields["data_offsets"])
    if not 8 + length <= start <= stop:
        raise ValueError("offsets")
    return str(fields["dtype"]), tuple(int(size) for size in fields["shape"]), start, stop
