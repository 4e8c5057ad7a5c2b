"""Pages speak of the project, and say of every measured figure where its raw result is."""

from __future__ import annotations

import json
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


GPU = ROOT / "docs" / "gpu"
RAW = re.compile(r"\]\((data/[^)]+\.json)\)")


@pytest.mark.parametrize("page", sorted(GPU.glob("h*.md")), ids=lambda page: page.name)
def test_every_table_measured_on_a_gpu_has_its_raw_result(page: Path) -> None:
    """Each section with a table of figures names a file that is there."""
    sections = re.split(r"^## ", page.read_text(), flags=re.M)[1:]
    assert sections
    for section in sections:
        for name in RAW.findall(section):
            assert (GPU / name).is_file(), name
        figures = re.sub(r"TensorRT \d+\.\d|opset \d+", "", section)
        rows = [line for line in figures.splitlines() if line.startswith("|") and re.search(r"\d\.\d", line)]
        assert not rows or RAW.search(section), section.partition("\n")[0]


def test_every_raw_result_has_its_command_and_a_page() -> None:
    pages = "".join(page.read_text() for page in GPU.glob("*.md"))
    for file in sorted((GPU / "data").glob("*.json")):
        document = json.loads(file.read_text())
        assert document["command"].startswith(("cpdebug ", "python ", "polygraphy ", "per network: cpdebug ")), (
            file.name
        )
        assert document.get("machine") or document["versions"]["gpu"], file.name
        assert f"data/{file.name}" in pages, file.name


def test_figures_of_a_gpu_stand_on_its_pages_alone() -> None:
    """Other pages name a GPU without figures: what was measured on one is where its raw result is."""
    gpu = re.compile(r"\b(H100|H200|A100)\b")
    for page in PAGES:
        if page.parent == GPU:
            continue
        for paragraph in re.split(r"\n\s*\n", page.read_text()):
            if gpu.search(paragraph) and "gpu/h100.md" not in paragraph:
                assert not re.search(r"\d(\.\d+)? ?(%|ms|s|dB)\b|\de-\d", paragraph), (page.name, paragraph[:80])
