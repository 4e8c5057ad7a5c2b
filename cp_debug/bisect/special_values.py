"""Values that no distance tells: signs of zeros and of NaN, and origins of NaN and Inf that no row shows.

1 ÷ x, atan2, copysign, signbit and roots see signs. Origins without a row are constants, nodes that read nothing else,
and nodes between two probes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cp_debug.backends.arithmetic import FP32
from cp_debug.backends.base import Tensor as AnyTensor
from cp_debug.backends.executor import Executor
from cp_debug.bisect.candidate_run import CandidateRun, loader
from cp_debug.bisect.finding import Finding
from cp_debug.bisect.replay import Load, Replayer
from cp_debug.bisect.result import GUILTY, INHERITED, KINDS, SIDES, LayerRow, first_with
from cp_debug.bisect.verdict import is_within
from cp_debug.bisect.whole_numbers import as_tensor
from cp_debug.errors import InputError
from cp_debug.graph.graph import Graph, Node
from cp_debug.probes.arrays import as_numpy, as_torch
from cp_debug.probes.held import CapturedRun
from cp_debug.probes.statistics import compare
from cp_debug.programs.pipeline import Key
from cp_debug.safe_text import amount

TURNED = "turned-sign"
"""The cause where only the sign of a zero or of NaN is another."""
MOST = 32
"""Layers that are asked whether signs explain them."""


def judge_signs(
    run: CandidateRun, rows: Mapping[Key, LayerRow], reference: CapturedRun, test: CapturedRun
) -> dict[Key, Finding]:
    """Accuse the layers that turn signs which make another layer's result wrong, and acquit that one.

    Returns the findings of the accused rows; changes the rows.
    """
    found: dict[Key, Finding] = {}
    asked = 0
    for key, row in rows.items():
        if row.within or row.kind != "data" or row.stats.shape_mismatch or asked == MOST:
            continue
        sides = loader(reference, key.component), loader(test, key.component)
        replayer = run.replayer(key.component, test)
        read = [rows.get(Key(key.component, name)) for name in replayer.starts(key.value)]
        if any(start is not None and not start.within for start in read):
            continue  # what it reads is another number already
        turned = _turned_inputs(replayer, key.value, *sides)
        if not turned:
            continue
        asked += 1
        if not _explain(run, replayer, row, key.value, turned, *sides):
            continue
        name, marks = max(turned.items(), key=lambda item: int(item[1].sum()))
        while earlier := _turned_inputs(replayer, name, *sides):
            name, marks = max(earlier.items(), key=lambda item: int(item[1].sum()))
        made = Key(key.component, name)
        if made not in rows or name not in replayer.graph.producer:
            continue
        row.verdict, row.side, row.why = INHERITED, "test", f"reads the signs of {rows[made].name}"
        if made in found:
            continue
        maker, zeros = rows[made], int((marks & (_float(sides[1], name) == 0)).sum())
        what = amount(zeros, "zero") if zeros else f"{int(marks.sum())} NaN"
        says = f"the sign of {what} differs, which {row.name} ({row.op}) reads"
        maker.verdict, maker.why = GUILTY, says
        maker.side = _side(replayer, name, marks, *sides) if zeros else "test"
        evidence = {"read_by": row.name}
        found[made] = Finding(TURNED, says, [maker.name], [maker.op], side=maker.side, evidence=evidence)
    return found


def _turned_inputs(replayer: Replayer, value: str, reference: Load, test: Load) -> dict[str, Tensor]:
    """What a value is computed from: those in which zeros or NaN have another sign, with the places."""
    try:
        pairs = {name: (_float(reference, name), _float(test, name)) for name in replayer.starts(value)}
    except (InputError, KeyError):
        return {}
    marks = {
        name: (((a == 0) & (b == 0)) | (a.isnan() & b.isnan())) & (torch.signbit(a) != torch.signbit(b))
        for name, (a, b) in pairs.items()
        if a.shape == b.shape and a.is_floating_point() and b.is_floating_point()
    }
    return {name: places for name, places in marks.items() if bool(places.any())}


def _explain(
    run: CandidateRun,
    replayer: Replayer,
    row: LayerRow,
    value: str,
    turned: Mapping[str, Tensor],
    reference: Load,
    test: Load,
) -> bool:
    """Whether a value would be the reference's if the signs of what it is computed from were."""

    def with_signs(name: str) -> Tensor:
        own = as_torch(as_numpy(test(name)))
        return own if name not in turned else torch.where(turned[name], as_torch(as_numpy(reference(name))), own)

    levels = value in replayer.levels
    theirs = reference(value)
    made = [_computed(replayer, value, load) for load in (test, with_signs)]
    if any(m is None or tuple(m.shape) != tuple(theirs.shape) for m in made):
        return False
    before, after = (compare(theirs, m) for m in made if m is not None)
    return is_within(after, *run.tolerance, levels=levels) and not is_within(before, *run.tolerance, levels=levels)


def _computed(replayer: Replayer, value: str, load: Load) -> Tensor | None:
    """A value from captured ones, by the module's own operators where it has them: they know the sign of NaN."""
    own = replayer.module_result(value, load)
    if own is not None:
        return own.cpu()
    try:
        return replayer.exact(value, load).cpu()
    except InputError:
        return None


def _side(replayer: Replayer, value: str, marks: Tensor, reference: Load, test: Load) -> str:
    """The side whose zeros have a sign that its own inputs do not make."""
    wrong = []
    for load in (reference, test):
        own = _computed(replayer, value, load)
        usable = own is not None and own.shape == marks.shape
        wrong.append(usable and bool((torch.signbit(own) != torch.signbit(_float(load, value)))[marks].any()))  # type: ignore[arg-type]
    return "reference" if wrong == [True, False] else "test"


def _float(load: Load, name: str) -> Tensor:
    return as_torch(as_numpy(load(name)))


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
    graph: Graph, value: str, kind: str, known: Mapping[str, str], load: Callable[[str], AnyTensor], device: str
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
    return array.dtype.kind in "fV" and bool((np.isnan if kind == "nan" else np.isinf)(array).any())
