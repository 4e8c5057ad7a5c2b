"""Stages of a deployment that are not run again: their records, and what makes one run again."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cp_debug.deploy import runner
from cp_debug.deploy.runner import Outcome, StageRecord, State, deploy
from cp_debug.files import hashes


def record(name: str = "export", **fields: Any) -> StageRecord:
    given: dict[str, Any] = {"key": "k", "passed": True, "line": "done", "seconds": 1.5} | fields
    return StageRecord(name, **given)


def test_records_are_there_in_the_next_run(tmp_path: Path) -> None:
    first = State(tmp_path / "work")
    kept = [record("load", document={"model": "m"}), record("export", resumed=True, line="two files")]
    for each in kept:
        first.add(each)
    again = State(tmp_path / "work")
    assert list(again.records) == ["load", "export"]
    assert again.records["load"] == kept[0]
    assert not again.records["export"].resumed  # of the run that reads it
    assert again.records["export"].line == "two files"


def test_a_stage_is_finished_for_the_same_input_where_it_passed_and_its_files_are_its_own(tmp_path: Path) -> None:
    state, file = State(tmp_path), tmp_path / "a.onnx"
    file.write_bytes(b"graph")
    state.add(record("export", files=hashes([file])))
    state.add(record("verify", passed=False))
    found = state.finished("export", "k")
    assert found is not None
    assert found.resumed
    assert state.finished("export", "other") is None
    assert state.finished("verify", "k") is None
    assert state.finished("build", "k") is None
    file.write_bytes(b"another graph")
    assert state.finished("export", "k") is None


def test_records_that_cannot_be_read_count_as_none(tmp_path: Path) -> None:
    State(tmp_path).add(record())
    path = tmp_path / "deploy.json"
    path.write_text(path.read_text().replace("cpdebug.deploy/1", "cpdebug.deploy/0"))
    assert State(tmp_path).records == {}
    path.write_text("{")
    assert State(tmp_path).records == {}


class Stages:
    """Stages that write what they are given; ``ran`` are the names of those that did."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
        self.folder, self.names = folder, names
        self.texts: dict[str, str] = {}
        self.needs: dict[str, int] = {}
        self.passes: dict[str, bool] = {}
        self.ran: list[str] = []
        self.heard: list[tuple[str, bool]] = []
        monkeypatch.setattr(runner, "_stages", self.stages)

    def stages(self, deployment: Any) -> Any:
        for name in self.names:
            yield name, {"needs": self.needs.get(name, 0)}, lambda given, name=name: self.run(name)

    def run(self, name: str) -> Outcome:
        self.ran.append(name)
        place = self.folder / name
        place.mkdir(exist_ok=True)
        (place / "file").write_text(self.texts.get(name, ""))
        return Outcome(self.passes.get(name, True), f"{name} is done", {"name": name}, place)

    def deploy(self, *, fresh: bool = False) -> list[StageRecord]:
        self.ran, self.heard = [], []
        deployment: Any = SimpleNamespace(config=SimpleNamespace(work_dir=self.folder))
        return deploy(deployment, fresh=fresh, on_stage=lambda n, r: self.heard.append((n, r is not None)))


def test_finished_stages_are_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stages = Stages(tmp_path, monkeypatch, "load", "export", "verify")
    first = stages.deploy()
    assert stages.ran == ["load", "export", "verify"]
    assert stages.heard == [(n, told) for n in stages.ran for told in (False, True)]
    assert [(r.name, r.passed, r.line, r.document) for r in first][1] == (
        "export", True, "export is done", {"name": "export"},
    )  # fmt: skip
    assert all(0 <= r.seconds < 60 and not r.resumed for r in first)
    assert [r.resumed for r in stages.deploy()] == [True] * 3
    assert stages.ran == []
    stages.deploy(fresh=True)
    assert stages.ran == ["load", "export", "verify"]


def test_a_stage_runs_again_when_what_it_works_on_is_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stages = Stages(tmp_path, monkeypatch, "export", "build", "verify", "evaluate")
    stages.passes["verify"] = False
    stages.deploy()
    stages.deploy()
    assert stages.ran == ["verify"]  # failed before; nothing depends on it
    stages.needs["export"] = 1  # another opset, the same files
    stages.deploy()
    assert stages.ran == ["export", "build", "verify", "evaluate"]
    (tmp_path / "build" / "file").write_text("somebody else's")
    stages.texts["build"] = "another engine"
    stages.deploy()
    assert stages.ran == ["build", "verify", "evaluate"]
    stages.needs["verify"] = 1
    stages.deploy()
    assert stages.ran == ["verify"]
