"""A saved result, read back: the folder that ``bisect --save`` writes, or its ``result.json`` alone.

Unknown fields are left alone, so that files of later versions of the same schema can be read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

from cp_debug.backends.base import RunRecord
from cp_debug.bisect.causes.finding import Effect, Element, Finding, Where
from cp_debug.bisect.observe import Observation
from cp_debug.bisect.regions.region import Region
from cp_debug.bisect.replay import Replay
from cp_debug.bisect.result import SCHEMA, BisectResult, LayerRow, Remainder, StageRow, TestResult
from cp_debug.detection.detection_change import DetectionChange
from cp_debug.errors import InputError
from cp_debug.graph.graph import Graph
from cp_debug.probes.capture import Capture
from cp_debug.probes.statistics import TensorStats
from cp_debug.programs.scene import Scene
from cp_debug.reading import read_json

RESULT = "result.json"


@dataclass(frozen=True)
class SavedResult:
    """A result with what was kept beside it."""

    result: BisectResult
    folder: Path | None = None
    """Where the captures and graphs lie; None when only the JSON was given."""

    @classmethod
    def open(cls, path: Path) -> SavedResult:
        """Read a saved folder, or a JSON file. Raises InputError that names the file and the field."""
        path = Path(path)
        file = path / RESULT if path.is_dir() else path
        if not file.exists():
            raise InputError(f"{file}: no such file; expected what `cpdebug bisect --save FOLDER` writes")
        document = read_json(file, what="saved result")
        return cls._of(Fields(document, str(file), ""), path if path.is_dir() else None)

    @classmethod
    def of(cls, result: BisectResult, folder: Path | None = None) -> SavedResult:
        """A result as it comes out of ``bisect``; ``folder`` is where that saved its captures."""
        return cls._of(Fields(json.loads(json.dumps(result.to_dict())), "result", ""), folder)

    @classmethod
    def _of(cls, fields: Fields, folder: Path | None) -> SavedResult:
        if (schema := fields.get("schema", str)) != SCHEMA:
            fields.fail("schema", f"{schema!r}; this version reads {SCHEMA!r}")
        records = [_record(record) for record in fields.objects("backends")]
        blocks = fields.objects("tests")
        if not blocks or len(records) != len(blocks) + 1:
            fields.fail("tests", f"{len(blocks)} entries; expected one for each backend after the reference")
        programs = fields.get("test_programs", dict, {})
        result = BisectResult(
            model=fields.get("model", str),
            reference=records[0],
            tests=[_test(block, record, programs) for block, record in zip(blocks, records[1:], strict=True)],
            samples=fields.get("samples", list),
            coverage=fields.get("coverage", dict, {}),
            programs=fields.get("programs", dict, {}),
            reference_observation=_observation(fields.object("reference_observation", {})),
            command=fields.get("command", str, ""),
            weights=fields.get("weights", dict, {}),
        )
        return cls(result, folder)

    @cached_property
    def graphs(self) -> dict[str, Graph]:
        """Component → its deployed graph, for those whose file is still there."""
        return self._open(self.result.programs)

    def test_graphs(self, test: TestResult) -> dict[str, Graph]:
        """The same for what a test ran."""
        return self._open(test.programs)

    def _open(self, programs: Mapping[str, str]) -> dict[str, Graph]:
        paths = {name: (self.folder or Path()) / path for name, path in programs.items()}
        return {name: Graph(path) for name, path in paths.items() if path.is_file()}

    def capture(self, sample: int, spec: str) -> Capture | None:
        """The tensors of one backend on one sample; None when they were not kept."""
        folder = self.folder and self.folder / f"sample-{sample}" / spec
        return Capture.open(folder) if folder and folder.is_dir() else None

    def scene(self, sample: int) -> Scene | None:
        """Points and detections of one sample; None when there are none."""
        return Scene.open(self.folder / f"sample-{sample}") if self.folder else None


_REQUIRED: Any = object()


class Fields:
    """One JSON object, read field by field; whatever is wrong is an InputError with the file and the field's path."""

    def __init__(self, value: Any, file: str, path: str) -> None:
        self.value, self._file, self._path = value, file, path
        if not isinstance(value, dict):
            raise InputError(f"{file}: {path or 'the document'} is not a JSON object")

    def get(self, key: str, kind: type | tuple[type, ...], default: Any = _REQUIRED) -> Any:
        """The field, which is of type ``kind``; absent fields give ``default``."""
        if key not in self.value:
            if default is _REQUIRED:
                self.fail(key, "missing")
            return default
        value = self.value[key]
        if not isinstance(value, kind) or (isinstance(value, bool) and kind in (int, float)):
            names = kind.__name__ if isinstance(kind, type) else " or ".join(k.__name__ for k in kind)
            self.fail(key, f"{json.dumps(value)[:40]}; expected {names}")
        return value

    def number(self, key: str, default: Any = _REQUIRED) -> float:
        """A number, or one of the strings "NaN", "Infinity", "-Infinity"."""
        value = self.get(key, (int, float, str), default)
        if value is default:
            return default
        try:
            return float(value)
        except ValueError:
            self.fail(key, f"{value!r}; expected a number")

    def optional(self, key: str) -> float | None:
        """A number, or None where the field is absent or null."""
        return None if self.value.get(key) is None else self.number(key)

    def objects(self, key: str, default: Any = _REQUIRED) -> list[Fields]:
        """A list of objects."""
        items = self.get(key, list, default)
        return [Fields(item, self._file, f"{self._where(key)}[{i}]") for i, item in enumerate(items)]

    def object(self, key: str, default: Any = _REQUIRED) -> Fields:
        """An object."""
        return Fields(self.get(key, dict, default), self._file, self._where(key))

    def fail(self, key: str, problem: str) -> NoReturn:
        """Raise the InputError for a field."""
        raise InputError(f"{self._file}: field {self._where(key)!r} is {problem}")

    def _where(self, key: str) -> str:
        return f"{self._path}.{key}" if self._path else key


def _record(fields: Fields) -> RunRecord:
    return RunRecord(
        spec=fields.get("spec", str),
        precision=fields.get("precision", str),
        device=fields.get("device", str),
        emulated=fields.get("emulated", bool),
        versions=fields.get("versions", dict, {}),
        settings=fields.get("settings", dict, {}),
    )


def _observation(fields: Fields) -> Observation | None:
    if (floor := fields.optional("noise_floor")) is None:
        return None
    return Observation(
        noise_floor=floor,
        observer_gap=fields.number("observer_gap"),
        runs=fields.get("runs", int, 0),
        first_unsteady=fields.get("first_unsteady", (str, type(None)), None),
        repeats=fields.get("repeats", (bool, type(None)), True) is not False,
    )


def _test(fields: Fields, record: RunRecord, programs: dict[str, str]) -> TestResult:
    """``programs`` are those of all tests, in files that do not name each test's."""
    rows = [_row(row) for row in fields.objects("layers")]
    by_key = {(row.component, row.onnx): row for row in rows}

    def known(key: str) -> list[tuple[Fields, LayerRow]]:
        found = [(item, (item.get("component", str), item.get("onnx", str))) for item in fields.objects(key)]
        for item, place in found:
            if place not in by_key:
                item.fail("onnx", f"{place[1]!r}, which is none of the layers")
        return [(item, by_key[place]) for item, place in found]

    alignment, tolerance = fields.object("alignment"), fields.object("tolerance")
    return TestResult(
        backend=record,
        rows=rows,
        stages=[
            StageRow(item.get("stage", str), row, [str(name) for name in item.get("guilty", list, [])])
            for item, row in known("stages")
        ],
        outputs=[row for _, row in known("outputs")],
        compared=alignment.get("aligned", int),
        total=alignment.get("total", int),
        rtol=tolerance.number("rtol"),
        atol=tolerance.number("atol"),
        oracle=fields.get("oracle", (str, type(None))),
        observation=_observation(fields),
        notes=fields.get("notes", list, []),
        programs=fields.get("test_programs", dict, programs),
        remainder=_remainder(fields),
        findings=[_finding(finding) for finding in fields.objects("findings", [])],
        detections=_detections(fields),
        expected_outputs=fields.object("compared", {}).get("outputs_expected", list, []),
        pairing=fields.get("pairing", dict, {}),
    )


def _remainder(fields: Fields) -> Remainder | None:
    if fields.value.get("remainder") is None:
        return None
    found = fields.object("remainder")
    return Remainder(
        divergence=found.number("divergence"),
        rounding=found.optional("rounding"),
        not_replayed=found.get("not_replayed", dict, {}),
    )


def _finding(fields: Fields) -> Finding:
    effect = fields.object("effect", {})
    return Finding(
        cause=fields.get("cause", str),
        says=fields.get("says", str, fields.get("cause", str)),
        layers=fields.get("layers", list, []),
        ops=fields.get("ops", list, []),
        side=fields.get("side", str, "test"),
        explained=fields.optional("explained"),
        runner_up=fields.get("runner_up", (str, type(None)), None),
        runner_up_explained=fields.optional("runner_up_explained"),
        evidence=fields.get("evidence", dict, {}),
        where=[_where(place) for place in fields.objects("where", [])],
        effect=Effect(effect.optional("share"), _detections(effect)),
        fix=fields.get("fix", str, ""),
        inside=fields.get("inside", (dict, type(None)), None),
    )


def _region(fields: Fields) -> Region | None:
    if fields.value.get("region") is None:
        return None
    told = fields.object("region")
    return Region(tuple(told.get("nodes", list)), told.get("kind", str, ""), told.get("layer", str, ""))


def _where(fields: Fields) -> Where:
    worst = fields.objects("worst", [])
    channels = fields.object("channels", {})
    return Where(
        layer=fields.get("layer", str, ""),
        channels={int(channel): channels.number(channel) for channel in channels.value},
        region=fields.get("region", list, []),
        concentrated=fields.number("concentrated", 1.0),
        worst=[Element(e.get("index", list), e.number("value"), e.number("oracle")) for e in worst],
    )


def _detections(fields: Fields) -> DetectionChange | None:
    if fields.value.get("detections") is None:
        return None
    counts = fields.object("detections")
    known = [name for name in DetectionChange.__dataclass_fields__ if name in counts.value]
    return DetectionChange(**{name: counts.get(name, (int, float)) for name in known})


_WHOLE = ("nan_ref", "nan_test", "inf_ref", "inf_test", "mismatched")
_REAL = ("mean_abs", "rel_l2", "cosine", "sqnr_db", "p50_abs", "p99_abs", "max_ref", "finite_max_abs", "finite_rel_l2")


def _row(fields: Fields) -> LayerRow:
    counts: dict[str, Any] = {name: fields.get(name, int) for name in _WHOLE}
    figures: dict[str, Any] = {name: fields.number(name) for name in _REAL}
    stats = TensorStats(
        shape=tuple(fields.get("shape", list)),
        shape_test=tuple(fields.get("shape_test", list)),
        dtype_ref=fields.get("dtype_ref", str),
        dtype_test=fields.get("dtype_test", str),
        count=fields.get("count", int),
        max_abs=fields.number("max_abs"),
        argmax=None if fields.value.get("argmax") is None else tuple(fields.get("argmax", list)),
        equal=fields.get("equal", bool),
        **counts,
        **figures,
    )
    replay = Replay(
        nodes=tuple(fields.get("nodes", list, [])),
        introduced=fields.optional("introduced"),
        inherited=fields.optional("inherited"),
        amplification=fields.optional("amplification"),
        expected=fields.optional("expected"),
        excess=fields.optional("excess"),
        declared=fields.optional("declared"),
        deviation_from_scales=fields.optional("departs"),
        channel_excess=fields.optional("channel_excess"),
        clipped=fields.optional("clipped"),
        step=fields.optional("step"),
        oracle_error=fields.number("oracle_error", 0.0),
        new_nonfinite=fields.get("born_nonfinite", int, 0),
        not_emulated=tuple(fields.get("not_emulated", list, [])),
        skipped=fields.get("skipped", (str, type(None)), None),
    )
    return LayerRow(
        index=fields.get("index", int),
        component=fields.get("component", str),
        name=fields.get("name", str),
        onnx=fields.get("onnx", str),
        op=fields.get("op", str),
        stats=stats,
        verdict=fields.get("verdict", str),
        within=fields.get("within_tolerance", bool),
        replay=replay,
        why=fields.get("why", str, ""),
        side=fields.get("side", str, "test"),
        share=fields.optional("share"),
        noise_floor=fields.number("noise_floor", 0.0),
        sample=fields.get("sample", int, 0),
        tactic=fields.get("tactic", str, ""),
        region=_region(fields),
        kind=fields.get("kind", str, "data"),
    )
