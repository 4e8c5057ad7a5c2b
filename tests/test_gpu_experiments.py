"""The bookkeeping of a series, on commands that end, fail, hang and come too late."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))
from gpu_experiments import Series, Step, chosen, experiments

NEVER = float("inf")


def python(name: str, code: str, limit: float = 20.0) -> Step:
    return Step(name, [sys.executable, "-c", code], limit)


@pytest.mark.process
def test_a_failed_step_is_noted_and_the_next_one_runs(tmp_path: Path) -> None:
    hanging = "import time\ntry: time.sleep(60)\nexcept KeyboardInterrupt: print('interrupted')"
    steps = [python("fails", "raise SystemExit('no such thing')"), python("hangs", hanging, 5.0), python("runs", "1")]
    series = Series(tmp_path, NEVER)
    series.experiment(steps)
    rows = json.loads((tmp_path / "experiments.json").read_text())
    assert [row["status"] for row in rows] == [1, "stopped at its limit", 0]
    assert "no such thing" in rows[0]["said"]
    assert (tmp_path / "hangs.log").read_text() == "interrupted\n"


def test_nothing_starts_when_the_time_is_up(tmp_path: Path) -> None:
    series = Series(tmp_path, 0.0)
    series.experiment([python("late", "1")])
    assert series.rows[0]["status"] == "no time left"


def test_a_step_is_left_out_without_what_it_needs(tmp_path: Path) -> None:
    series = Series(tmp_path, NEVER)
    series.experiment([Step("reads", [sys.executable, "-c", "1"], needs=tmp_path / "nothing")])
    assert series.rows[0]["status"].startswith("left out")


def test_experiments_and_steps_are_chosen_by_name(tmp_path: Path) -> None:
    found = experiments(tmp_path, tmp_path / "work", tmp_path)
    names = [step.name for steps in found.values() for step in steps]
    assert len(set(names)) == len(names)
    assert set(chosen(found, ["int8", "tiny-fp16"])) == {"int8", "tiny"}
    assert [step.name for step in chosen(found, ["tiny-fp16"])["tiny"]] == ["tiny-fp16"]
    assert chosen(found, []) == found
