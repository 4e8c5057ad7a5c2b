"""Trials of one mixed-precision search: in memory, or a line each on disk, so that it goes on where it was stopped."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from typing_extensions import TypedDict

from cp_debug.errors import InputError, system_reason
from cp_debug.files import check_target
from cp_debug.mixed_precision.trial import Trial
from cp_debug.reading import check_file, json_text, parse_json, read_bytes, sealed, typed, unsealed
from cp_debug.serialize import decode

SCHEMA = "cpdebug.search-log/1"


class _FusedLayer(TypedDict):
    name: str
    nodes: list[str]


class TrialLog:
    """The trials of one search; with a ``path`` each is on disk before the next begins."""

    def __init__(self, path: Path | None = None, about: Mapping[str, Any] = MappingProxyType({})) -> None:
        """``about``: what the search depends on, JSON-safe. Raises InputError for the log of another search."""
        self._path = path
        self.trials: dict[tuple[bool, frozenset[tuple[str, str]]], Trial] = {}
        self.engine: dict[str, list[dict[str, Any]]] = {}
        """Component → layers (``name``, ``nodes``) of the engine with nothing kept, where the backend tells."""
        if path is None:
            return
        header = parse_json(json_text({"schema": SCHEMA, **about}), str(path))
        if path.exists() and check_file(path, "log"):
            self._read(path, header)
        else:
            check_target(path)
            self._write(header)

    def add(self, trial: Trial) -> None:
        """Keep a trial."""
        self.trials[trial.emulated, trial.nodes] = trial
        self._write(trial.to_dict())

    def add_engine(self, layers: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
        """Keep the layers that the engine fused."""
        self.engine = {
            c: [{"name": e["name"], "nodes": list(e["nodes"])} for e in layers_of_component]
            for c, layers_of_component in layers.items()
        }
        self._write({"engine": self.engine})

    def _write(self, document: Mapping[str, Any]) -> None:
        if self._path is None:
            return
        try:
            with self._path.open("a", encoding="utf-8") as stream:
                stream.write(sealed(document) + "\n")
        except (OSError, ValueError) as error:
            reason = system_reason(error) if isinstance(error, OSError) else str(error)
            raise InputError(f"--log: {self._path} cannot be written ({reason})") from None

    def _read(self, path: Path, header: Mapping[str, Any]) -> None:
        try:
            complete, _, torn = read_bytes(path, what="log").rpartition(b"\n")
            first, *documents = [unsealed(line, f"line {n}") for n, line in enumerate(complete.split(b"\n"), 1)]
            different = [key for key in header if first[key] != header[key]]
            for document in documents:
                if "engine" in document:
                    self.engine = typed(dict[str, list[_FusedLayer]], document["engine"], "engine")
                else:
                    trial = decode(Trial, document, "trial")
                    if not trial.error and "rel_l2" not in trial.measured.figures:
                        raise ValueError("a trial lacks the figure rel_l2")
                    self.trials[trial.emulated, trial.nodes] = trial
            named = [set(t.measured.figures) for t in self.trials.values() if t.measured.figures]
            if others := [names for names in named if names != named[0]]:
                raise ValueError(f"one trial has the figures {sorted(named[0])}, another {sorted(others[0])}")
        except (InputError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"--log: {path} is not the log of a search ({error}); give another file") from None
        if different:
            parts = ", ".join(f"{key} {first[key]!r}, now {header[key]!r}" for key in different)
            raise InputError(f"--log: {path} belongs to another search ({parts}); give another file")
        if torn:  # a line that was cut off when the search was killed
            os.truncate(path, len(complete) + 1)
