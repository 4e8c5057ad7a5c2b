"""The run behind an evaluation by itself: which programs a backend runs, and which samples are not finite."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from cp_debug.detection.evaluate import _prepare, evaluate
from cp_debug.recipes.base import Sample


def test_backends_in_int8_run_what_quantize_made_and_the_others_the_export(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cp_debug.detection.evaluate.prepare", lambda *given, **how: ["plain"])
    monkeypatch.setattr("cp_debug.detection.evaluate.wants_int8", lambda backend: backend == "int8")
    model: Any = SimpleNamespace(samples=lambda count, seed, inputs: ["s"])
    asked: list[Any] = []

    def quantize(programs: Any, folder: Path) -> Any:
        asked.append((programs, folder))
        return ["in INT8"], "by mse"

    made: Any = lambda *backends: _prepare(model, backends, Path("f"), None, True, quantize)  # type: ignore[arg-type]  # noqa: E731
    assert made("torch", "ort") == ([["plain"], ["plain"]], "")
    assert not asked
    assert made("torch", "int8", "ort") == ([["plain"], ["in INT8"], ["plain"]], "by mse")
    assert asked == [(["plain"], Path("f/int8"))]


def test_each_backends_samples_that_are_not_finite_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"ort": [1.0, np.nan, 3.0], "torch": [1.0, 2.0, 3.0]}
    seen: list[dict[str, int]] = []

    class Running:
        """Stands in for a pipeline that gives one number for each sample."""

        def __init__(self, model: Any, programs: Any, backend: Any) -> None:
            self.backend = backend

        def __enter__(self) -> Any:
            return self

        def __exit__(self, *error: object) -> None: ...

        def run(self, sample: Sample) -> Any:
            return {"net": {"y": np.float32([given[self.backend.spec][int(sample.source)]])}}

        def record(self) -> Any:
            return self.backend

    def scored(runs: Any, truths: Any, names: Any, options: Any, strange: Any, on_step: Any) -> Any:
        seen.append(dict(strange))
        return [], []

    samples = [SimpleNamespace(source=str(i), truth="boxes", arrays={}) for i in range(3)]
    for name, stub in {
        "Pipeline": Running, "score_backends": scored, "Predictions": SimpleNamespace(gather=list),
        "iterate": iter, "Remarks": lambda model: SimpleNamespace(see=lambda sample: None, sentences=[]),
    }.items():  # fmt: skip
        monkeypatch.setattr(f"cp_debug.detection.evaluate.{name}", stub)
    model: Any = SimpleNamespace(
        name="m", components=[SimpleNamespace(name="net")], class_names=["car"], decode=lambda sample, results: results
    )
    backends: Any = [SimpleNamespace(spec=spec) for spec in given]

    class Data(list[Any]):
        name, notes = "data", ()

    options: Any = SimpleNamespace(region=(0, 0, 1, 1))
    found = evaluate(model, backends, Data(samples), options, programs=[])  # type: ignore[arg-type]
    assert seen == [{"ort": 1, "torch": 0}]
    assert found.samples == ["0", "1", "2"]
