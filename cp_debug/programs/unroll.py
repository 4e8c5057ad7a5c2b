"""Programs with the bodies of If, Loop and Scan, and the file's own functions, put in their place, to look inside."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from cp_debug.backends.arithmetic import ARITHMETICS
from cp_debug.backends.base import Program
from cp_debug.backends.executor import Executor
from cp_debug.errors import InputError
from cp_debug.graph import surgery
from cp_debug.graph.flatten import Decision, flatten, has_control_flow, needs_flattening
from cp_debug.graph.graph import Graph
from cp_debug.graph.onnx_runtime import Endless
from cp_debug.programs.pipeline import as_declared
from cp_debug.programs.walk import tensors_as_arrays, walk
from cp_debug.recipes.base import Arrays, Component, Model, Sample

Decisions = dict[str, dict[str, Decision]]
"""Component → path → what every sample decides."""
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
        if not any(needs_flattening(p.graph) for p in programs):
            return programs
        decisions: Decisions = {}
        if any(has_control_flow(p.graph) for p in programs):
            try:
                decisions = decide(programs, model, samples(), arithmetic)
            except Endless:
                raise
            except InputError as error:
                note = f"nobody looked into If, Loop and Scan, for the model cannot be executed beforehand: {error}"
                self.notes += [note] if note not in self.notes else []
        key = tuple(programs), repr(decisions)
        if key not in self._made:
            self._made[key] = unroll(programs, decisions, self._folder)
        return self._made[key]


def decide(programs: Sequence[Program], model: Model, samples: Iterable[Sample], arithmetic: str) -> Decisions:
    """Decisions of the control flow of ``programs`` on ``samples``, executed in an arithmetic by its name.

    Where samples differ, nothing is decided. Raises InputError for a program that the executor cannot run.
    """
    executors = {p.name: Executor(p.graph, ARITHMETICS[arithmetic]) for p in programs}
    decided: Decisions = {}
    for sample in samples:
        for executor in executors.values():
            executor.decisions.clear()

        def run(component: Component, given: Arrays) -> Arrays:
            executor = executors[component.name]
            inputs = as_declared(executor.graph, _as_called(executor.graph, given))
            return tensors_as_arrays(executor.run(inputs, probes=()))

        walk(model, sample, run)
        for name, executor in executors.items():
            earlier = decided.setdefault(name, dict(executor.decisions))
            for path, decision in executor.decisions.items():
                if earlier.setdefault(path, decision) != decision:
                    earlier[path] = UNDECIDED
    return {name: {p: d for p, d in own.items() if d != UNDECIDED} for name, own in decided.items()}


def _as_called(graph: Graph, inputs: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
    """The inputs under the names of a graph that calls them otherwise, in their order."""
    names = [v.name for v in graph.inputs]
    return inputs if set(names) <= set(inputs) else dict(zip(names, inputs.values(), strict=False))


def unroll(programs: Sequence[Program], decisions: Mapping[str, Mapping[str, Decision]], folder: Path) -> list[Program]:
    """``programs`` with what is decided put flat; the files lie in ``folder``."""
    return [_unrolled(p, decisions.get(p.name, {}), folder) if needs_flattening(p.graph) else p for p in programs]


def _unrolled(program: Program, decisions: Mapping[str, Decision], folder: Path) -> Program:
    model, branches = flatten(program.graph, decisions)
    path = folder / f"{program.name}.unrolled.onnx"
    count = 1
    while path.exists():
        count += 1
        path = folder / f"{program.name}.unrolled-{count}.onnx"
    surgery.save(model, program.graph, path)
    return replace(program, graph=Graph(path), deployed=program.graph, branches=branches)
