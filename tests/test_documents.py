"""Pages speak of the project, and say of every measured figure where its raw result is."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
WORK = re.compile(r"\b(visits?|the visit's|this round|our session|(two|three|several) sessions|helpers?)\b", re.I)
"""Remarks on how the work was organised while something was measured."""


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_do_not_tell_how_the_work_was_organised(page: Path) -> None:
    found = [line for line in page.read_text().splitlines() if WORK.search(line)]
    assert not found


def test_figures_without_a_raw_result_are_marked() -> None:
    """Of the H200 none was kept: each row of figures says so."""
    text = (ROOT / "docs" / "gpu" / "h200.md").read_text()
    assert "**† marks a figure" in text
    lines = text.splitlines()
    heads = {i - 1 for i, line in enumerate(lines) if re.fullmatch(r"\|[-| :]+\|", line)}
    rows = [line for i, line in enumerate(lines) if line.startswith("|") and i not in heads]
    figures = [line for line in rows if re.search(r"\d", line) and not re.fullmatch(r"\|[-| :]+\|", line)]
    assert len(figures) > 60
    assert not [line for line in figures if "†" not in line]


@pytest.mark.parametrize("page", ["h100.md", "h200.md"])
def test_raw_results_that_a_page_names_are_there(page: str) -> None:
    folder = ROOT / "docs" / "gpu"
    for name in re.findall(r"\]\((data/[^)]+\.json)\)", (folder / page).read_text()):
        assert (folder / name).is_file(), name
