"""The tutorial still tells the truth: its commands print the lines that it shows."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

DOCS = Path(__file__).parents[1] / "docs"


def _tutorial() -> ModuleType:
    spec = importlib.util.spec_from_file_location("tutorial", DOCS / "tutorial.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


tutorial = _tutorial()
PAGE = tutorial.PAGE.read_text(encoding="utf-8")
SECTIONS = [tutorial.blocks(section) for section in PAGE.split("\n## ")[1:]]


@pytest.mark.slow
@pytest.mark.parametrize("commands", SECTIONS)
def test_a_section_still_holds(tmp_path: Path, commands: list[tuple[str, list[str]]]) -> None:
    tutorial.write_files(PAGE, tmp_path)
    for command, lines in commands:
        assert lines, command
        found = list(tutorial.updated(lines, tutorial.run(command, tmp_path)))
        assert all(holds for _, holds in found), [line for line, holds in found if not holds]


def test_lines_that_changed_are_told() -> None:
    printed = ["a  0.5", "", "guilty: x 3.0e-04", "b  7"]
    assert list(tutorial.updated(["a  0.6", "⋮", "b 8"], printed)) == [("a  0.5", True), ("⋮", True), ("b  7", True)]
    assert list(tutorial.updated(["guilty: y 3e-04", "a 1.5"], printed)) == [
        ("guilty: y 3e-04", False),
        ("a  0.5", False),
    ]
    moved = ["at most 2e-07 m in centre, 2e-07 rad"]
    assert next(iter(tutorial.updated(moved, ["at most 5e-06 m in centre, 2e-07 rad"])))[1]
    assert not next(iter(tutorial.updated(moved, ["at most 5e-05 m in centre, 2e-07 rad"])))[1]
    assert not next(iter(tutorial.updated(moved, ["at most 2e-07 m in centre, 5e-06 rad"])))[1]
    assert len(SECTIONS) == 8
