"""Origins of NaN and Inf that no row shows: constants, nodes that read nothing else, nodes between two probes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from cp_debug.backends.arithmetic import FP32
from cp_debug.backends.base import Tensor
from cp_debug.backends.executor import Executor
from cp_debug.bisect.candidate_run import CandidateRun, loader
from cp_debug.bisect.result import LayerRow
from cp_debug.bisect.strange_numbers import KINDS, SIDES, first_with
from cp_debug.bisect.whole_numbers import as_tensor
from cp_debug.errors import InputError
from cp_debug.graph.graph import Graph, Node
from cp_debug.probes.arrays import as_numpy
from cp_debug.probes.held import CapturedRun
from cp_debug.programs.pipeline import Key

_HOLDS: Mapping[str, Callable[[Any], Any]] = {"nan": np.isnan, "inf": np.isinf}


def trace_origins(run: CandidateRun, rows: Mapping[Key, LayerRow], reference: CapturedRun, test: CapturedRun) -> None:
    """Write the origin of the first NaN and the first Inf of each side into the row that holds it."""
    for kind in KINDS:
        for side in SIDES:
            row = first_with([*rows.values()], kind, side)
            if row is None or row.op == "input":
                continue
            component, names = row.component, run.names(row.component)
            graph, capture = run.programs[component].graph, reference
            own = {name: name for name in (*graph.values, *(v.name for v in graph.inputs))}
            if side == "test":
                graph, capture = run.graphs[component], test
                inputs = {v.name: v.name for v in graph.inputs}
                own = inputs | {name: test_name for test_name, name in names.items()}
            shown = set(capture.names(component=component))
            known = {own[name]: name for name in shown if name in own}
            load = loader(capture, component)
            if row.onnx in own and (says := _says(graph, own[row.onnx], kind, known, load, run.device)):
                row.nonfinite_from.append(f"{kind} {side}: {says}")


def _says(
    graph: Graph, value: str, kind: str, known: Mapping[str, str], load: Callable[[str], Tensor], device: str
) -> str:
    """Origin of the NaN or Inf of a value, as a phrase; empty where the node that computes it makes them.

    ``known``: value of ``graph`` that was captured → its name in the capture, by which ``load`` gives it.
    """
    if value not in graph.producer:
        return ""
    try:
        nodes, starts = graph.segment([value], known)
        given = {start: load(known[start]) for start in starts if start in known}
        for start, tensor in given.items():
            if _holds(tensor, kind):
                return _says(graph, start, kind, known, load, device) or _named(graph, start)
        results = [name for node in nodes for name in node.outputs]
        made = Executor(graph, FP32, device).run_nodes(nodes, given, results)
    except (InputError, KeyError):  # a graph that is not executed here; a value that nobody kept
        return ""
    return next((says for node in nodes if (says := _of_node(graph, node, kind, made, value))), "")


def _of_node(graph: Graph, node: Node, kind: str, made: Mapping[str, Any], value: str) -> str:
    """The phrase, where NaN or Inf are first in a constant of this node, or in its results."""
    for name in node.inputs:
        if name in graph.initializers and _holds(graph.initializer(name), kind):
            return f"comes in with the constant {name}"
    if value in node.outputs or not any(_holds(made[name], kind) for name in node.outputs):
        return ""
    return _named(graph, node.outputs[0])


def _named(graph: Graph, value: str) -> str:
    if value not in graph.producer:
        return f"comes in with the input {value}"
    node = graph.producer[value]
    return (
        f"comes in with the constant {value}" if node.op == "Constant" else f"first appears at {node.name} ({node.op})"
    )


def _holds(value: Any, kind: str) -> bool:
    """Whether a value, of any type, holds NaN or Inf."""
    if isinstance(value, list) or value is None:
        return False
    array = as_numpy(as_tensor(value))
    return array.dtype.kind in "fV" and bool(_HOLDS[kind](array).any())
