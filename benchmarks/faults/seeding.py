"""A fault put into ``centerpoint:tiny`` by an edit of its graph."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from faults.edits import Editor

from cp_debug.backends.base import Program
from cp_debug.bisect.demos import Seeded
from cp_debug.graph.graph import Graph
from cp_debug.recipes.centerpoint.recipe import CenterPointModel

Edit = Callable[[Editor, str], None]


def edited(where: str, edits: dict[str, Edit]) -> Seeded:
    """The fault of a graph changed by ``edits``, by layer name."""

    def rewrite(programs: list[Program], folder: Path) -> list[Program]:
        return [_edit(program, edits, folder) for program in programs]

    return Seeded(CenterPointModel("tiny"), where, list(edits), test_model=rewrite)


def _edit(program: Program, edits: dict[str, Edit], folder: Path) -> Program:
    edits_by_value = {value: edits[name] for name, value in layers(program).items() if name in edits}
    if not edits_by_value:
        return program
    editor = Editor(program.graph.path)
    for value, edit in edits_by_value.items():
        edit(editor, value)
    return Program(program.name, Graph(editor.save(folder / f"{program.name}.spoilt.onnx")))


def layers(program: Program) -> dict[str, str]:
    """Layer name, as the tables print it → value in the deployed graph."""
    assert program.alignment is not None
    names = {program.alignment.layer_name(value): value for value in program.graph.producer}
    return {name: value for name, value in names.items() if name}
