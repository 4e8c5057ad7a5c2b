"""The module against its own export: rows where the exported graph, and not a backend, computes something else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import onnx

from cp_debug.bisect.candidate_run import CandidateRun, loader
from cp_debug.bisect.finding import Finding
from cp_debug.bisect.replay import Load, Replayer
from cp_debug.bisect.result import GUILTY, INHERITED, LayerRow
from cp_debug.bisect.whole_numbers import as_tensor
from cp_debug.graph.graph import Graph
from cp_debug.probes.alignment import TIE, Departure
from cp_debug.probes.arrays import as_numpy, as_torch
from cp_debug.probes.caveats import ties
from cp_debug.probes.held import CapturedRun
from cp_debug.programs.pipeline import Key
from cp_debug.safe_text import one_line

SAYS = "the exported graph does not compute what the module does"
_DECIDE = "use torch.where or torch.cond for the decision, or export a graph for each branch"
MOST_NODES = 4
"""Nodes of a graph that are told with their attributes."""


class Exports(NamedTuple):
    """What the export is to blame for."""

    settled: dict[Key, Finding]
    """Guilty rows → their finding, where the alignment knows the place."""
    tied: dict[Key, str]
    """Layers where ties are broken differently, which is no fault → how, in words."""


def judge_exports(run: CandidateRun, rows: Mapping[Key, LayerRow], module: CapturedRun) -> Exports:
    """Lay at the export's door what one side, the module, computes otherwise than the graph that the other one runs.

    ``module`` holds the values of the side that runs the module. Changes the rows.
    """
    settled: dict[Key, Finding] = {}
    tied: dict[Key, str] = {}
    for key, row in rows.items():
        if row.verdict != GUILTY or run.module_side(key.component) != row.side:
            continue
        program = run.programs[key.component]
        departures = program.alignment.departures if program.alignment is not None else ()
        departure = next((d for d in departures if d.onnx == key.value), None)
        if departure is None and (row.side != "reference" or row.replay is None):
            continue
        outputs = [rows.get(Key(key.component, info.name)) for info in program.graph.outputs]
        if all(output is not None and output.within for output in outputs):
            row.verdict, row.side, row.why = INHERITED, "test", "the outputs agree"
            continue
        if departure is None:
            tie = _tie(run.replayer(key.component, module), key.value, loader(module, key.component))
        else:
            tie, row.source = departure.says * (departure.cause == TIE), departure.source or row.source
        if tie:
            tied[key] = tie
            row.verdict, row.side, row.why = INHERITED, "test", f"{tie} and nothing need be mended"
        elif departure is None:
            assert row.replay is not None
            fixed = ", ".join(program.alignment.decisions) if program.alignment is not None else ""
            how = f"tracing froze a decision of the module at {fixed}" if fixed else ""
            row.side = "export"
            row.why = f"{SAYS}: {how or f'{row.replay.reference_excess:.3g}× what its precision explains'}"
            if fixed:
                settled[key] = Finding("control-flow", row.why, [row.name], [row.op], side="export", fix=_DECIDE)
        else:
            nodes = row.replay.nodes if row.replay is not None else ()
            row.side, row.why = "export", _sentence(departure, program.graph, nodes)
            evidence: dict[str, Any] = {"module": departure.path, "calls": list(departure.calls), "nodes": list(nodes)}
            evidence["off"] = departure.error
            fix = f"--exporter {departure.right_by}: tried, its graph computes what the module computes here"
            if not departure.right_by:
                fix = f"write `{departure.at}` in the module with other operators, and compare again"
            cause, layers, ops = departure.cause or "export", [row.name], [row.op]
            settled[key] = Finding(cause, row.why, layers, ops, "export", evidence=evidence, fix=fix)
    return Exports(settled, tied)


def _tie(replayer: Replayer, value: str, load: Load) -> str:
    """In words, where the module and the graph choose among elements of the module's own that are equal; else empty."""
    node, held = replayer.graph.producer[value], as_torch(as_numpy(load(value)))
    if held.is_floating_point() or not set(node.inputs) & replayer.known:
        return ""
    given = {name: load(name) for name in node.inputs if name in replayer.known}
    own = as_tensor(replayer.oracle.run_nodes([node], given, [value])[value])
    keys = (as_torch(as_numpy(t)) for t in given.values())
    return next(filter(None, (ties(k, held, own) for k in keys if k.is_floating_point())), "")


def _sentence(departure: Departure, graph: Graph, nodes: tuple[str, ...]) -> str:
    says = departure.says
    if not says:
        own = [node for node in graph.nodes if node.name in nodes and node.op != "Constant"]
        more = f" and {len(own) - MOST_NODES} more" if len(own) > MOST_NODES else ""
        in_graph = ", ".join(map(_in_words, (node.proto for node in own[-MOST_NODES:])))
        says = f"the module computes {', '.join(departure.calls)}, the graph {in_graph}{more}"
    return one_line(f"{SAYS}, {departure.place}: {says}")


def _in_words(node: onnx.NodeProto) -> str:
    values = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute if not a.HasField("t")}
    plain = {n: v.decode(errors="replace") if isinstance(v, bytes) else v for n, v in values.items()}
    told = ", ".join(f"{n}={v!r}" for n, v in plain.items() if isinstance(v, int | float | str | list))
    return f"`{node.op_type}({told})`"
