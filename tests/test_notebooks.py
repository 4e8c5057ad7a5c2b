"""The notebooks run from the first cell to the last, and are kept without what they printed."""

from __future__ import annotations

import html
from pathlib import Path

import pytest
from extras import module_needs
from nets import second_like

pytestmark = [module_needs("nbclient"), pytest.mark.slow]

import nbformat  # noqa: E402
from nbclient import NotebookClient  # noqa: E402

NOTEBOOKS = sorted((Path(__file__).parents[1] / "examples" / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path: Path, tmp_path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in code), "clear its outputs"
    NotebookClient(notebook, timeout=240, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert all(cell.execution_count for cell in code)


def test_a_cell_shows_the_page_and_keeps_nothing_of_the_progress(tmp_path: Path) -> None:
    second_like(tmp_path / "a.onnx", depth=1, size=8)
    source = 'import cp_debug\nresult = cp_debug.diagnose("a.onnx", "ort,ort-all")\nresult.show()\nresult'
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)])
    NotebookClient(notebook, timeout=240, resources={"metadata": {"path": str(tmp_path)}}).execute()
    shown = [output["data"] for output in notebook.cells[0].outputs]
    assert not any(set(data) == {"text/plain"} for data in shown)  # an empty <pre> stays of such a line
    [frame] = [data["text/html"] for data in shown if "<iframe" in data.get("text/html", "")]
    assert html.unescape(frame.split('"')[1]).startswith("<!")


def test_there_are_four() -> None:
    assert len(NOTEBOOKS) == 4
