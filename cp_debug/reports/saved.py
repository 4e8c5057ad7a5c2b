"""A saved result, read back: the folder that ``bisect --save`` writes, or its ``result.json`` alone.

Unknown fields are left alone, so that files of later versions of the same schema can be read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from cp_debug.backends.base import RunRecord
from cp_debug.bisect.causes.finding import Finding
from cp_debug.bisect.observe import Observation
from cp_debug.bisect.optimizer_blame import OptimizerBlame
from cp_debug.bisect.result import SCHEMA, BisectResult, LayerRow, Remainder, StageRow, TestResult
from cp_debug.detection.detection_change import DetectionChange
from cp_debug.errors import InputError
from cp_debug.graph.graph import Graph
from cp_debug.probes.capture import Capture
from cp_debug.programs.scene import SavedScene
from cp_debug.reading import read_json
from cp_debug.serialize import decode

RESULT = "result.json"


@dataclass(frozen=True)
class SavedResult:
    """A result with what was kept beside it."""

    result: BisectResult
    folder: Path | None = None
    """Folder of the captures and graphs; None when only the JSON was given."""

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
        """A result as ``bisect`` returns it; ``folder`` holds its captures."""
        return cls._of(Fields(json.loads(json.dumps(result.to_dict())), "result", ""), folder)

    @classmethod
    def _of(cls, fields: Fields, folder: Path | None) -> SavedResult:
        if (schema := fields.get("schema", str)) != SCHEMA:
            fields.fail("schema", f"{schema!r}; this version reads {SCHEMA!r}")
        records = _objects(RunRecord, fields, "backends", _REQUIRED)
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
        """Component → graph that a test ran, for those whose file is still there."""
        return self._open(test.programs)

    def _open(self, programs: Mapping[str, str]) -> dict[str, Graph]:
        paths = {name: (self.folder or Path()) / path for name, path in programs.items()}
        return {name: Graph(path) for name, path in paths.items() if path.is_file()}

    def capture(self, sample: int, spec: str) -> Capture | None:
        """The tensors of one backend on one sample; None when they were not kept."""
        folder = self.folder and self.folder / f"sample-{sample}" / spec
        return Capture.open(folder) if folder and folder.is_dir() else None

    def scene(self, sample: int) -> SavedScene | None:
        """Points and detections of one sample; None when there are none."""
        return SavedScene.open(self.folder / f"sample-{sample}") if self.folder else None


def open_result(path: str | Path) -> BisectResult:
    """The result in a folder that ``bisect --save`` wrote, or in a JSON file. Raises InputError as ``SavedResult``."""
    return SavedResult.open(Path(path)).result


T = TypeVar("T")
_REQUIRED: Any = object()


class Fields:
    """One JSON object, read field by field; whatever is wrong is an InputError with the file and the field's path."""

    def __init__(self, value: Any, file: str, path: str) -> None:
        self.value, self.file, self.path = value, file, path
        if not isinstance(value, dict):
            raise InputError(f"{file}: {path or 'the document'} is not a JSON object")

    def get(self, key: str, kind: type | tuple[type, ...], default: Any = _REQUIRED) -> Any:
        """The field, which must be of type ``kind``; an absent field gives ``default``."""
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

    def objects(self, key: str, default: Any = _REQUIRED) -> list[Fields]:
        """A list of objects."""
        items = self.get(key, list, default)
        return [Fields(item, self.file, f"{self.where(key)}[{i}]") for i, item in enumerate(items)]

    def object(self, key: str, default: Any = _REQUIRED) -> Fields:
        """An object."""
        return Fields(self.get(key, dict, default), self.file, self.where(key))

    def fail(self, key: str, problem: str) -> NoReturn:
        """Raise the InputError for a field."""
        raise InputError(f"{self.file}: field {self.where(key)!r} is {problem}")

    def where(self, key: str) -> str:
        """The path of a field of this object."""
        return f"{self.path}.{key}" if self.path else key


def _observation(fields: Fields) -> Observation | None:
    if fields.value.get("noise_floor") is None:
        return None
    present = {k: v for k, v in fields.value.items() if v is not None}
    return decode(Observation, {"runs": 0} | present, fields.file, fields.path)


def _optional(kind: type[T], fields: Fields, key: str) -> T | None:
    """The object under ``key``; None where it is absent or null."""
    return None if fields.value.get(key) is None else decode(kind, fields.value[key], fields.file, fields.where(key))


def _objects(kind: type[T], fields: Fields, key: str, default: Any = None) -> list[T]:
    return [decode(kind, item.value, item.file, item.path) for item in fields.objects(key, default)]


def _test(fields: Fields, record: RunRecord, programs: dict[str, str]) -> TestResult:
    """``programs`` are those of all tests, in files that do not name each test's."""
    rows = _objects(LayerRow, fields, "layers", _REQUIRED)
    by_key = {(row.component, row.onnx): row for row in rows}

    def known(key: str) -> list[tuple[Fields, LayerRow]]:
        items = [(item, (item.get("component", str), item.get("onnx", str))) for item in fields.objects(key)]
        for item, place in items:
            if place not in by_key:
                item.fail("onnx", f"{place[1]!r}, which is none of the layers")
        return [(item, by_key[place]) for item, place in items]

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
        remainder=_optional(Remainder, fields, "remainder"),
        findings=[_finding(item) for item in fields.objects("findings", [])],
        detections=_optional(DetectionChange, fields, "detections"),
        optimizer_blame=_optimizer_blame(fields),
        expected_outputs=fields.object("compared", {}).get("outputs_expected", list, []),
        pairing=fields.get("pairing", dict, {}),
    )


def _finding(fields: Fields) -> Finding:
    """A finding; of a file that says no more than its cause, too."""
    least = {"says": fields.get("cause", str), "layers": [], "ops": []}
    return decode(Finding, least | fields.value, fields.file, fields.path)


def _optimizer_blame(fields: Fields) -> OptimizerBlame | None:
    if fields.value.get("knobs") is None:
        return None
    return OptimizerBlame.from_dict(fields.get("knobs", dict), fields.file, fields.where("knobs"))
