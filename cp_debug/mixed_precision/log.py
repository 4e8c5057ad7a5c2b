"""Trials on disk, a line each, so that a search goes on where it was stopped."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from typing_extensions import TypedDict

from cp_debug.errors import InputError, system_reason
from cp_debug.mixed_precision.fusion_groups import Kept
from cp_debug.mixed_precision.judge import Measured
from cp_debug.reading import check_file, read_bytes, sealed, typed, unsealed
from cp_debug.serialize import json_safe

SCHEMA = "cpdebug.search-log/1"


class _TrialLine(TypedDict):
    kept: list[tuple[str, str]]
    layers: int
    emulated: bool
    figures: dict[str, float]
    outputs: dict[str, float]
    seconds: float
    latency: float | None
    error: str


class _FusedLayer(TypedDict):
    name: str
    nodes: list[str]


@dataclass(frozen=True)
class Trial:
    """One set of kept layers and what came of it."""

    nodes: frozenset[tuple[str, str]]
    """(Component, node) of everything that was kept."""
    layers: int
    emulated: bool
    """Whether it ran on the emulator in place of the backend."""
    measured: Measured
    seconds: float
    latency: float | None = None
    """Seconds of a pass on the device, where the backend tells."""
    error: str = ""
    """Why it could not be built; then nothing was measured."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe."""
        return json_safe(
            {
                "kept": sorted(map(list, self.nodes)),
                "layers": self.layers,
                "emulated": self.emulated,
                "figures": self.measured.figures,
                "outputs": self.measured.outputs,
                "seconds": self.seconds,
                "latency": self.latency,
                "error": self.error,
            }
        )

    @classmethod
    def of(cls, document: Mapping[str, Any]) -> Trial:
        """From ``to_dict``. Raises InputError for a document of another shape."""
        line: _TrialLine = typed(_TrialLine, document, "trial")
        return cls(
            frozenset(line["kept"]),
            line["layers"],
            line["emulated"],
            Measured(line["figures"], line["outputs"]),
            line["seconds"],
            line["latency"],
            line["error"],
        )


def nodes_in(kept: Kept) -> frozenset[tuple[str, str]]:
    """(Component, node) of a set of layers: its name in the log, however layers are grouped."""
    return frozenset((group.component, node) for group in kept for node in group.nodes)


class TrialLog:
    """The trials of one search; with a ``path`` each is on disk before the next begins."""

    def __init__(self, path: Path | None, about: Mapping[str, Any]) -> None:
        """``about``: what the search depends on, JSON-safe. Raises InputError for the log of another search."""
        self._path = path
        self.trials: dict[tuple[bool, frozenset[tuple[str, str]]], Trial] = {}
        self.engine: dict[str, list[dict[str, Any]]] = {}
        """Component → layers (``name``, ``nodes``) of the engine with nothing kept, where the backend tells."""
        header = {"schema": SCHEMA, **about}
        if path is None:
            return
        if path.exists() and check_file(path, "log"):
            self._read(path, header)
        else:
            self._write(header)

    def add(self, trial: Trial) -> None:
        """Keep a trial."""
        self.trials[trial.emulated, trial.nodes] = trial
        self._write(trial.to_dict())

    def add_engine(self, layers: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
        """Keep what the engine fused."""
        self.engine = {c: [{"name": e["name"], "nodes": list(e["nodes"])} for e in own] for c, own in layers.items()}
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
            whole, _, torn = read_bytes(path, what="log").rpartition(b"\n")
            first, *documents = [unsealed(line, f"line {n}") for n, line in enumerate(whole.split(b"\n"), 1)]
            different = [key for key in header if first[key] != header[key]]
            for document in documents:
                if "engine" in document:
                    self.engine = typed(dict[str, list[_FusedLayer]], document["engine"], "engine")
                else:
                    trial = Trial.of(document)
                    self.trials[trial.emulated, trial.nodes] = trial
        except (InputError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"--log: {path} is not the log of a search ({error}); give another file") from None
        if different:
            parts = ", ".join(f"{key} {first[key]!r}, now {header[key]!r}" for key in different)
            raise InputError(f"--log: {path} belongs to another search ({parts}); give another file")
        if torn:  # a line that was cut off when the search was killed
            os.truncate(path, len(whole) + 1)
