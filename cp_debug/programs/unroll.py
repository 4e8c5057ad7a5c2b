"""Programs with the bodies of If, Loop and Scan, and the file's own functions, put in their place, to look inside."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from cp_debug.backends.arithmetic import ARITHMETICS
from cp_debug.backends.base import Program
from cp_debug.backends.executor import Executor
from cp_debug.graph import surgery
from cp_debug.graph.flatten import Decision, flatten, needs_flattening
from cp_debug.graph.graph import Graph
from cp_debug.recipes.base import Arrays, Model, Sample

Decisions = dict[str, dict[str, Decision]]
"""Component → path → what every sample decides."""


def decide(programs: Sequence[Program], model: Model, samples: Iterable[Sample], arithmetic: str) -> Decisions:
    """What the control flow of ``programs`` does on ``samples``, executed in an arithmetic by its name.

    Where samples differ, nothing is decided. Raises InputError for a program that the executor cannot run.
    """
    executors = {p.name: Executor(p.graph, ARITHMETICS[arithmetic]) for p in programs}
    found: Decisions = {}
    for sample in samples:
        results: dict[str, Arrays] = {}
        for component in model.components:
            executor = executors[component.name]
            executor.decisions.clear()
            outputs = executor.run(model.feed(component, sample, results), probes=())
            results[component.name] = {n: v.numpy() for n, v in outputs.items() if hasattr(v, "numpy")}
            earlier = found.setdefault(component.name, dict(executor.decisions))
            for path, decision in executor.decisions.items():
                if earlier.setdefault(path, decision) != decision:
                    earlier[path] = -1
    return {name: {p: d for p, d in own.items() if d != -1} for name, own in found.items()}


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
