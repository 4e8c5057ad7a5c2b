"""State of a deployment, kept in its work folder, so that it goes on where it stopped."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cp_debug.errors import InputError
from cp_debug.files import complete_file, file_hash, make_folder
from cp_debug.reading import read_bytes, sealed, typed, unsealed
from cp_debug.serialize import json_safe

SCHEMA = "cpdebug.deploy/1"
FILE = "deploy.json"


@dataclass
class StageRecord:
    """Record of one finished stage of a deployment, by which a later run knows whether to repeat it."""

    name: str
    key: str
    """Hash of everything that the stage depends on: a stage with the same key and files need not run again."""
    passed: bool
    line: str
    """The outcome in one line."""
    seconds: float
    files: dict[str, str] = field(default_factory=dict)
    """Files written → their SHA-256."""
    document: dict[str, Any] = field(default_factory=dict)
    """The whole outcome, JSON-safe."""
    resumed: bool = False
    """Whether this is from an earlier run."""


class State:
    """The records of a work folder. A file that cannot be read counts as none: everything then runs again."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / FILE
        self.records: dict[str, StageRecord] = {}
        try:
            document = unsealed(read_bytes(self._path), str(self._path))
            if document.get("schema") == SCHEMA:
                self.records = typed(dict[str, StageRecord], document.get("stages"), str(self._path))
        except InputError:
            pass

    def finished(self, name: str, key: str) -> StageRecord | None:
        """The record of a stage that passed on the same input and whose files are as it left them."""
        record = self.records.get(name)
        if record is None or record.key != key or not record.passed:
            return None
        if any(file_hash(Path(path)) != digest for path, digest in record.files.items()):
            return None
        record.resumed = True
        return record

    def add(self, record: StageRecord) -> None:
        """Keep a record, on disk at once. Raises InputError when it cannot be written."""
        self.records[record.name] = record
        make_folder(self._path.parent)
        stages = {name: {**asdict(kept_record), "resumed": False} for name, kept_record in self.records.items()}
        with complete_file(self._path) as stream:
            stream.write(sealed(json_safe({"schema": SCHEMA, "stages": stages})) + "\n")
