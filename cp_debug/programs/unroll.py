"""Programs with the bodies of If, Loop and Scan, and the file's own functions, put in their place, to look inside."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import onnx

from cp_debug.backends.arithmetic import ARITHMETICS
from cp_debug.backends.base import Program
from cp_debug.backends.executor import Executor, constants_of
from cp_debug.errors import InputError
from cp_debug.graph import surgery
from cp_debug.graph.check_inputs import as_declared
from cp_debug.graph.control_flow import ControlFlow
from cp_debug.graph.flatten import Decision, decisions_by_node, flatten, has_control_flow, idle_bodies, needs_flattening
from cp_debug.graph.graph import Graph
from cp_debug.graph.onnx_runtime import Endless
from cp_debug.graph.tensor_ends import other_outputs, with_tensors, without_maps
from cp_debug.programs.walk import tensors_as_arrays, walk
from cp_debug.recipes.base import Arrays, Component, Model, Sample

Decisions = dict[str, dict[str, Decision]]
"""Component → path → what every sample decides."""
Ends = dict[str, dict[str, Any]]
"""Component → output that is no tensor of numbers → its value."""
Flows = dict[str, ControlFlow]
"""Component → what its control flow did on all samples."""
UNDECIDED = -1


class Unroller:
    """Makes flat programs, each once: backends that decide alike share one list."""

    def __init__(self, folder: Path) -> None:
        """``folder`` keeps the files."""
        self._folder = folder
        self._made: dict[tuple[tuple[Program, ...], str], list[Program]] = {}
        self.notes: list[str] = []

    def unrolled(
        self, programs: list[Program], model: Model, samples: Callable[[], Iterable[Sample]], arithmetic: str
    ) -> list[Program]:
        """``programs`` as they run on ``samples`` in ``arithmetic``; the same list where there is nothing to unroll."""
        programs = self._without_maps(programs)
        if not any(needs_flattening(p.graph) or other_outputs(p.graph) for p in programs):
            return programs
        asked = tuple(programs), arithmetic
        if asked in self._made:
            return self._made[asked]
        decisions: Decisions = {}
        ends: Ends = {}
        flows: Flows = {}
        if any(has_control_flow(p.graph) or other_outputs(p.graph) for p in programs):
            try:
                decisions, ends, flows = decide(programs, model, samples(), arithmetic)
            except Endless:
                raise
            except InputError as error:
                what = "If, Loop and Scan" if any(has_control_flow(p.graph) for p in programs) else "other outputs"
                note = f"{what} were not examined, because the model cannot be executed in advance: {error}"
                self.notes += [note] if note not in self.notes else []
        key = tuple(programs), repr((decisions, ends, [flow.idle for flow in flows.values()]))
        if key not in self._made:
            unrolled = unroll(programs, decisions, self._folder, ends)
            self._made[key] = [replace(p, flow=flows[p.name]) if p.name in flows else p for p in unrolled]
        self._made[asked] = self._made[key]
        return self._made[key]

    def _without_maps(self, programs: list[Program]) -> list[Program]:
        key = tuple(programs), "maps"
        if key not in self._made:
            models = [(p, without_maps(p.graph)) for p in programs]
            changed = [p if m is None else replace(p, graph=_saved(p, m, self._folder, "tensors")) for p, m in models]
            self._made[key] = programs if all(m is None for _, m in models) else changed
        return self._made[key]


def decide(
    programs: Sequence[Program], model: Model, samples: Iterable[Sample], arithmetic: str
) -> tuple[Decisions, Ends, Flows]:
    """Decisions of the control flow of ``programs`` on ``samples``, executed in an arithmetic by its name, the values
    of outputs that are no tensors of numbers, on the first of them, and what ran at all.

    Where samples differ, nothing is decided. Raises InputError for a program that the executor cannot run.
    """
    executors = {p.name: Executor(p.graph, ARITHMETICS[arithmetic]) for p in programs}
    decided: Decisions = {}
    ends: Ends = {}
    runs: dict[str, list[dict[str, Decision]]] = {name: [] for name in executors}
    for sample in samples:
        for executor in executors.values():
            executor.decisions.clear()

        def run(component: Component, given: Arrays) -> Arrays:
            executor = executors[component.name]
            names = [v.name for v in executor.graph.inputs]
            if not set(names) <= set(given):  # the graph calls its inputs otherwise, in their order
                given = dict(zip(names, given.values(), strict=False))
            inputs = as_declared(executor.graph, given)
            outputs, others = executor.run(inputs, probes=()), other_outputs(executor.graph)
            if others:
                ends.setdefault(component.name, {name: outputs[name] for name in others})
            return tensors_as_arrays({name: value for name, value in outputs.items() if name not in others})

        walk(model, sample, run)
        for name, executor in executors.items():
            runs[name].append(dict(executor.decisions))
            earlier = decided.setdefault(name, dict(executor.decisions))
            for path, decision in executor.decisions.items():
                if earlier.setdefault(path, decision) != decision:
                    earlier[path] = UNDECIDED
    flows = {}
    for name, of_samples in runs.items():
        taken, graph = decisions_by_node(of_samples), executors[name].graph
        flows[name] = ControlFlow(frozenset(taken), tuple(idle_bodies(graph, taken, constants_of(graph))))
    return {name: {p: d for p, d in own.items() if d != UNDECIDED} for name, own in decided.items()}, ends, flows


def unroll(
    programs: Sequence[Program],
    decisions: Mapping[str, Mapping[str, Decision]],
    folder: Path,
    ends: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
) -> list[Program]:
    """``programs`` with what is decided put flat, and tensors in place of other outputs; the files lie in ``folder``.

    ``ends``: component → output that is no tensor of numbers → its value in a run.
    """
    unrolled = [*programs]
    for place, program in enumerate(programs):
        if needs_flattening(program.graph) or program.name in ends:
            model, branches = flatten(program.graph, decisions.get(program.name, {}))
            other_ends = with_tensors(model, program.graph, ends.get(program.name, {}))
            graph = _saved(program, model, folder, "unrolled")
            # With other outputs than the deployed file has, no run of that is to be held against this one.
            deployed = None if other_ends else program.graph
            unrolled[place] = replace(program, graph=graph, deployed=deployed, branches=branches)
    return unrolled


def _saved(program: Program, model: onnx.ModelProto, folder: Path, what: str) -> Graph:
    path = folder / f"{program.name}.{what}.onnx"
    count = 1
    while path.exists():
        count += 1
        path = folder / f"{program.name}.{what}-{count}.onnx"
    surgery.save(model, program.graph, path)
    return Graph(path, source=program.graph)
