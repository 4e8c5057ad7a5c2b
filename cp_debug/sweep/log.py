"""The log of a sweep: a header and one JSON record a line, appended as tasks finish. A restart reads it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

from cp_debug.errors import InputError
from cp_debug.files import Journal, complete_path, make_folder
from cp_debug.optional import require
from cp_debug.reading import check_file, unsealed
from cp_debug.sweep.spread import numeric

SCHEMA = "cpdebug.sweep/1"
_HEADER = (json.dumps({"schema": SCHEMA}) + "\n").encode()
_BATCH = 256
"""Number of records in a Parquet row group."""

Record = dict[str, Any]
"""``key``, ``kind``, ``params``, ``seconds``, ``worker``, and ``result`` or ``error``."""
Flatten = Callable[[Record], list[dict[str, Any]]]
"""Turns a record into rows of a table."""


class SweepLog(Journal):
    """The append-only log of a sweep.

    The first record with a result counts; later ones with its key are left alone. As a context, a log that was made
    here goes again, with the folders made for it, where an error comes before its first record. Raises InputError for a
    file that is not a log, and for a broken line within one.
    """

    def __init__(self, path: Path) -> None:
        self.others: set[str] = set()
        """Keys of records that ``records`` was not asked for: of other grids."""
        self._new = [place for place in (path, *path.parents) if not os.path.lexists(place)]
        make_folder(path.parent)
        if path.exists() and not path.is_dir():
            check_file(path, "log")
        super().__init__(path, f"{path}:", _HEADER)
        if not self.has_header:
            raise InputError(f"{path}: not the log of a sweep; its first line is not {_HEADER.decode()!r}")
        self._write(b"")  # a log that takes no record is refused before the work
        self.repair()

    def __iter__(self) -> Iterator[Record]:
        for number, line in islice(enumerate(self.lines(), 1), 1, None):
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

    def __enter__(self) -> SweepLog:
        return self

    def __exit__(self, kind: object, *exc: object) -> None:
        with suppress(OSError):  # what else is in a folder stays
            if kind is not None and self.path in self._new and self.path.stat().st_size <= len(_HEADER):
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


def flat_rows(
    columns: Mapping[str, type], parts: str | Iterable[Mapping[str, Any]], record: Record
) -> list[dict[str, Any]]:
    """A row of ``columns`` for each of ``parts``, or of the result's entry of that name.

    What a part lacks is of the record's result or parameters.
    """
    about = record["params"] | record["result"]
    found = about[parts] if isinstance(parts, str) else parts
    rows = ({name: part.get(name, about.get(name)) for name in columns} for part in found)
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
