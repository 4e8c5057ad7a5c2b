"""Results as files: JSON, CSV, Parquet; JUnit XML and GitHub's annotations for gates; the ONNX file, annotated.

Files are written to a temporary name and renamed when complete. A viewer such as Netron shows the figures that
``write_annotated`` puts at each node.
"""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import onnx

from cp_debug.bisect.result import GUILTY, SHAPE, BisectResult, LayerRow, TestResult
from cp_debug.errors import InputError
from cp_debug.files import complete_path, write_text
from cp_debug.graph.graph import Graph
from cp_debug.graph.surgery import save
from cp_debug.optional import require
from cp_debug.reading import json_text
from cp_debug.reports.numbers import number
from cp_debug.reports.saved import SavedResult
from cp_debug.reports.verdict_line import verdict_line
from cp_debug.safe_text import annotation, csv_cell, visible

if TYPE_CHECKING:
    import pandas as pd


def write_json(result: BisectResult, target: Path) -> None:
    """Write the result as JSON, as ``SavedResult.open`` reads it."""
    write_text(json_text(result.to_dict(), indent=1) + "\n", target)


def layer_frame(result: BisectResult) -> pd.DataFrame:
    """The layers of every test backend as one table with a leading column ``backend``; figures are numbers."""
    import pandas as pd

    table = pd.concat([test.layers.assign(backend=test.backend.spec) for test in result.tests], ignore_index=True)
    return table[["backend", *table.columns.drop("backend")]]


def csv_text(table: pd.DataFrame) -> str:
    """A table as CSV in which no cell is a formula."""
    cells = {csv_cell(name): [csv_cell(cell) for cell in column] for name, column in table.items() if _is_text(column)}
    return table.rename(columns=csv_cell).assign(**cells).to_csv(index=False)


def _is_text(column: pd.Series) -> bool:
    from pandas.api.types import is_numeric_dtype

    return not is_numeric_dtype(column)


def write_parquet(result: BisectResult, target: Path) -> None:
    """Write the layers of every test backend as one Parquet file. Raises MissingPackage without pyarrow."""
    require("pyarrow", "parquet")
    with complete_path(target) as partial:
        layer_frame(result).to_parquet(partial, engine="pyarrow", index=False)


def render_junit(saved: SavedResult) -> str:
    """One suite for each test backend, with a test case for the verdict and one for each layer, failed if guilty."""
    result, suites = saved.result, []
    for test in result.tests:
        cases = {"verdict": ("divergence", "" if test.agrees else verdict_line(test).plain)}
        for row in test.rows:
            failed = row.verdict in (GUILTY, SHAPE)
            cases[f"{row.name} ({row.component}/{row.onnx})"] = (row.verdict, _in_words(row) if failed else "")
        suites.append((f"{result.reference.spec} → {test.backend.spec}", test.backend.spec, cases))
    return junit(f"cpdebug {result.model}", suites)


def junit(title: str, suites: Iterable[tuple[str, str, Mapping[str, tuple[str, str]]]]) -> str:
    """The whole file; characters that XML cannot hold, and invisible ones, stand in it as escapes.

    ``suites``: (name, class of its cases, case → kind of failure and message); a case without a message has passed.
    """
    root = ET.Element("testsuites", name=visible(title))
    for name, kind, cases in suites:
        failures = sum(bool(message) for _, message in cases.values())
        counts = {"tests": str(len(cases)), "failures": str(failures), "errors": "0"}
        suite = ET.SubElement(root, "testsuite", {"name": visible(name), **counts})
        for case, (failure, message) in cases.items():
            element = ET.SubElement(suite, "testcase", classname=visible(kind), name=visible(case), time="0")
            if said := visible(message):
                ET.SubElement(element, "failure", type=visible(failure), message=said).text = said
    ET.indent(root)
    text = ET.tostring(root, encoding="unicode").replace("##[", "&#35;#[")  # a command, in a log of GitHub's
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{text}\n'


def render_github(saved: SavedResult) -> str:
    """One line for each test backend.

    ``::error``; ``::warning`` where only rounding adds up; ``::notice`` when it agrees.
    """
    return "".join(_annotation(test, saved.result.model) for test in saved.result.tests)


def _annotation(test: TestResult, model: str) -> str:
    explained = test.remainder is None or test.remainder.adds_up
    otherwise = test.guilty or test.undecided or test.missing_outputs or test.moved_outputs
    rounding = test.oracle and not otherwise and explained
    level = "notice" if test.agrees else "warning" if rounding else "error"
    title = annotation(f"cpdebug: {model} on {test.backend.spec}", name=True)
    return f"::{level} title={title}::{annotation(verdict_line(test).plain)}\n"


def _in_words(row: LayerRow) -> str:
    replay = row.replay
    figures = [f"max |Δ| {number(row.stats.max_abs)}", f"rel. L2 {number(row.stats.rel_l2)}"]
    if replay and replay.introduced is not None:
        figures += [f"{name} {number(getattr(replay, name))}" for name in ("introduced", "expected", "excess")]
    return f"{row.why}; {', '.join(figures)}"


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
            node, figures = nodes[row.onnx], _metadata(row)
            for name, value in figures.items():
                node.metadata_props.add(key=f"{PREFIX}.{test.backend.spec}.{row.onnx}.{name}", value=value)
            line = ", ".join(f"{name} {value}" for name, value in figures.items() if value)
            node.doc_string = "\n".join(filter(None, (node.doc_string, f"{PREFIX} {test.backend.spec}: {line}")))
    return model


def _metadata(row: LayerRow) -> Mapping[str, str]:
    figures = {"verdict": row.verdict}
    if row.why:
        figures["why"] = row.why
    figures |= {"max_abs": number(row.stats.max_abs), "rel_l2": number(row.stats.rel_l2)}
    for name in ("introduced", "inherited", "expected", "excess"):
        value = getattr(row.replay, name, None)
        if value is not None:
            figures[name] = number(value)
    return figures
