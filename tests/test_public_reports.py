"""The rebuilt reports of ``benchmarks/reports``: each has a fault where it says so, and a twin without one."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import onnx
import pytest
from reports.case import Report
from reports.networks import values_of
from reports.run import ALL, run_case

NAMES = [report.name for report in ALL]


def relative(a: np.ndarray, b: np.ndarray) -> float:
    difference = a.astype(np.float64) - b.astype(np.float64)
    return float(np.linalg.norm(difference) / np.linalg.norm(a.astype(np.float64)))


def test_there_are_sixty_with_names_of_their_own() -> None:
    assert len(set(NAMES)) == len(NAMES) >= 60
    assert all(re.fullmatch(r"[\w.-]+/[\w.-]+/(issues|pull)/\d+", report.thread) for report in ALL)


@pytest.mark.parametrize("report", ALL, ids=NAMES)
def test_a_report_is_what_it_says(report: Report, tmp_path: Path) -> None:
    report.write(tmp_path)
    inputs = dict(np.load(tmp_path / "inputs.npz"))
    right = onnx.load(tmp_path / "right.onnx")
    nodes = {output for node in right.graph.node for output in node.output}
    y = values_of(right, inputs)["y"]
    if report.kind == "files":
        wrong = onnx.load(tmp_path / "wrong.onnx")
        nodes |= {output for node in wrong.graph.node for output in node.output}
        apart = relative(y, values_of(wrong, inputs)["y"])
        assert not apart <= 1e-5 or not report.guilty
        assert relative(y, values_of(onnx.load(tmp_path / "healthy.onnx"), inputs)["y"]) < 1e-6
    elif report.kind == "dump":
        bad, well = (np.load(tmp_path / f"{name}.npz") for name in ("wrong", "healthy"))
        assert not np.array_equal(bad["y"], well["y"])
        np.testing.assert_array_equal(well["y"], y)
    assert set(report.guilty) <= nodes


QUICK = {
    "average over padding",
    "square of a LayerNorm",
    "logarithm of a sum of nothing",
    "a constant of minus 10 to the 12",
    "rotary embedding at 1857",
}


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in QUICK else pytest.mark.slow) for n in NAMES])
def test_a_case_is_named_with_its_cause_and_fix_and_its_twin_is_well(name: str, tmp_path: Path) -> None:
    record = run_case(ALL[NAMES.index(name)], tmp_path)
    assert [record[part] for part in ("layer", "cause", "fix", "twin")] == [True] * 4, record
