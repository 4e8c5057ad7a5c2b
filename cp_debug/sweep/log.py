"""The log of a sweep: a header and one JSON record a line, appended as tasks finish. A restart reads it."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

from cp_debug.errors import InputError, system_reason
from cp_debug.files import complete_path, make_folder
from cp_debug.optional import require
from cp_debug.reading import check_file, sealed, unsealed
from cp_debug.sweep.spread import numeric

SCHEMA = "cpdebug.sweep/1"
_HEADER = (json.dumps({"schema": SCHEMA}) + "\n").encode()
_BATCH = 256
"""Number of records in a Parquet row group."""

Record = dict[str, Any]
"""``key``, ``kind``, ``params``, ``seconds``, ``worker``, and ``result`` or ``error``."""
Flatten = Callable[[Record], list[dict[str, Any]]]
"""Turns a record into rows of a table."""


class SweepLog:
    """The append-only log of a sweep.

    Every record is one write at the end of the file, so that whatever dies leaves whole lines but for the last, which
    is then dropped. The first record with a result counts; later ones with its key are left alone. As a context, a log
    that was made here goes again, with the folders made for it, where an error comes before its first record. Raises
    InputError for a file that is not a log, and for a broken line within one.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.others: set[str] = set()
        """Keys of records that ``records`` was not asked for: of other grids."""
        self._new = [place for place in (path, *path.parents) if not os.path.lexists(place)]
        make_folder(path.parent)
        if path.exists() and not path.is_dir():
            check_file(path, "log")
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        except OSError as error:
            raise InputError(f"{path}: cannot be written ({system_reason(error)})") from error
        try:
            self._repair()
        except BaseException:
            self.close()
            raise

    def _repair(self) -> None:
        """Write the header where there is none, and drop what an interrupted write left at the end."""
        with self.path.open("rb") as stream:
            start = stream.read(len(_HEADER))
            if start != _HEADER:
                if not _HEADER.startswith(start):
                    raise InputError(f"{self.path}: not the log of a sweep; its first line is not {_HEADER.decode()!r}")
                os.truncate(self._file, 0)
                os.write(self._file, _HEADER)
                return
            end = len(_HEADER)
            for line in stream:
                if line.endswith(b"\n"):
                    end += len(line)
        os.truncate(self._file, end)

    def append(self, record: Record) -> None:
        """Add one record. Raises InputError when the disk does not take it."""
        line = f"{sealed(record)}\n".encode()
        try:
            if os.write(self._file, line) != len(line):
                raise OSError(errno.ENOSPC, "no space left")
        except OSError as error:
            raise InputError(f"{self.path}: cannot be written ({system_reason(error)})") from error

    def __iter__(self) -> Iterator[Record]:
        with self.path.open("rb") as stream:
            next(stream, None)
            for number, line in enumerate(stream, 2):
                if not line.endswith(b"\n"):
                    return  # being written
                try:
                    record = unsealed(line, "record")
                    if not isinstance(record.get("key"), str):
                        raise InputError("it has no key")
                    yield record
                except InputError as error:
                    raise InputError(f"{self.path}: line {number} is not JSON of this sweep ({error})") from None

    def records(self, keys: Collection[str]) -> Iterator[Record]:
        """One record for each of ``keys`` that has any: the first with a result, else the last error."""
        failed: dict[str, Record] = {}
        yielded: set[str] = set()
        for record in self:
            key = record["key"]
            if key not in keys:
                self.others.add(key)
                continue
            if key in yielded:
                continue
            if "error" in record:
                failed[key] = record
                continue
            yielded.add(key)
            failed.pop(key, None)
            yield record
        yield from failed.values()

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)

    def __enter__(self) -> SweepLog:
        return self

    def __exit__(self, kind: object, *exc: object) -> None:
        empty = os.fstat(self._file).st_size <= len(_HEADER)
        self.close()
        if kind is not None and empty and self.path in self._new:
            with suppress(OSError):  # what else is in a folder stays
                self.path.unlink()
                for folder in self._new[1:]:
                    folder.rmdir()


def group_of(record: Record) -> tuple[str, ...]:
    """The model with its backends."""
    return record["params"]["label"], *record["params"].get("backends", ())


def grouped(records: Iterable[Record]) -> Iterable[tuple[tuple[str, ...], list[Record]]]:
    """The model with its backends, and its records, in the order of the grid."""
    groups: dict[tuple[str, ...], list[Record]] = {}
    for record in sorted(records, key=lambda each: each["place"]):
        groups.setdefault(group_of(record), []).append(record)
    return groups.items()


def flat_rows(record: Record, columns: Mapping[str, type], parts: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row of ``columns`` for each of ``parts``; what a part lacks is of the record's result or parameters."""
    about = record["params"] | record["result"]
    rows = ({name: part.get(name, about.get(name)) for name in columns} for part in parts)
    return [{name: numeric(v) if columns[name] is float else v for name, v in row.items()} for row in rows]


def write_table(records: Iterable[Record], flatten: Flatten, columns: Mapping[str, type], target: Path) -> None:
    """The records as one flat table in a Parquet file, a batch at a time. Raises MissingPackage without pyarrow."""
    require("pyarrow", "parquet")
    import pyarrow as pa  # type: ignore[import-untyped]
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    arrow = {str: pa.string(), float: pa.float64(), int: pa.int64(), bool: pa.bool_()}
    schema = pa.schema([(name, arrow[kind]) for name, kind in columns.items()])
    remaining = iter(records)
    batches = (
        pa.RecordBatch.from_pylist([row for record in batch for row in flatten(record)], schema)
        for batch in iter(lambda: list(islice(remaining, _BATCH)), [])
    )
    with complete_path(target) as partial, pq.ParquetWriter(partial, schema) as writer:
        for batch in batches:
            writer.write_batch(batch)
