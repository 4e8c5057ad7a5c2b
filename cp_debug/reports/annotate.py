"""The deployed ONNX file with a result written into it: a viewer such as Netron shows the figures at each node."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import onnx

from cp_debug.bisect.result import BisectResult, LayerRow
from cp_debug.errors import InputError
from cp_debug.graph.graph import Graph
from cp_debug.graph.surgery import save
from cp_debug.reports.numbers import number
from cp_debug.reports.saved import SavedResult

PREFIX = "cpdebug"
"""Keys are ``cpdebug.<backend>.<value>.<figure>``."""


def write_annotated(saved: SavedResult, target: Path) -> list[Path]:
    """Write ``target``, or ``target/<component>.onnx`` when the model has several components; return the files.

    Raises InputError when a graph is gone, or when ``target`` is the graph itself.
    """
    programs, graphs = saved.result.programs, saved.graphs
    for component, path in programs.items():
        if component not in graphs:
            raise InputError(f"{path}: the graph of {component} no longer exists; expected it next to the result")
    files = {name: target / f"{name}.onnx" if len(graphs) > 1 else target for name in graphs}
    for component, file in files.items():
        if file.exists() and file.samefile(graphs[component].path):
            raise InputError(f"{file}: is the graph itself; give another name for the annotated copy")
    for component, file in files.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        save(annotate(graphs[component], component, saved.result), graphs[component], file)
    return list(files.values())


def annotate(graph: Graph, component: str, result: BisectResult) -> onnx.ModelProto:
    """A copy of the model: every node's ``metadata_props`` carries the figures, its ``doc_string`` the verdicts."""
    model = graph.copied()
    nodes = {output: node for node in model.graph.node for output in node.output if output}
    for test in result.tests:
        for row in test.rows:
            if row.component != component or row.onnx not in nodes:
                continue
            node, figures = nodes[row.onnx], _figures(row)
            for name, value in figures.items():
                node.metadata_props.add(key=f"{PREFIX}.{test.backend.spec}.{row.onnx}.{name}", value=value)
            line = ", ".join(f"{name} {value}" for name, value in figures.items() if value)
            node.doc_string = "\n".join(filter(None, (node.doc_string, f"{PREFIX} {test.backend.spec}: {line}")))
    return model


def _figures(row: LayerRow) -> Mapping[str, str]:
    figures = {"verdict": row.verdict}
    if row.why:
        figures["why"] = row.why
    figures |= {"max_abs": number(row.stats.max_abs), "rel_l2": number(row.stats.rel_l2)}
    for name in ("introduced", "inherited", "expected", "excess"):
        value = getattr(row.replay, name, None)
        if value is not None:
            figures[name] = number(value)
    return figures
