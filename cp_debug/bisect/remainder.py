"""Divergence of outputs that no layer is guilty of: does the rounding add up to it?

The divergence is what all layers introduced, carried to the end. That holds where every node was replayed; and it is
rounding where the declared precision, emulated over the whole network, makes about as much.
"""

from __future__ import annotations

from collections.abc import Mapping

from cp_debug.backends.arithmetic import ARITHMETICS
from cp_debug.backends.executor import Executor
from cp_debug.bisect.candidate_run import CandidateRun
from cp_debug.bisect.replayed import Replay
from cp_debug.bisect.result import Remainder
from cp_debug.errors import InputError
from cp_debug.graph.graph import Graph
from cp_debug.probes import distance
from cp_debug.programs.pipeline import Key
from cp_debug.programs.walk import tensors_as_arrays, walk
from cp_debug.recipes.base import Arrays, Component, Sample


def remainder(
    run: CandidateRun,
    sample: Sample,
    results: Mapping[str, Arrays],
    ours: Mapping[str, Arrays],
    replays: Mapping[Key, Replay],
) -> Remainder:
    """The remaining divergence, with what rounding explains of it.

    ``results`` and ``ours``: the outputs of the test and of the reference, by component. Each is component → output
    name → array. Arrays have the dtype that the graph declares.
    """
    last = run.pipeline.model.components[-1].name
    missing: dict[str, str] = {}
    for component, program in run.programs.items():
        component_replays = {key.value: replay for key, replay in replays.items() if key.component == component}
        missing |= not_replayed(program.graph, component_replays)
    remaining = Remainder(apart(results[last], ours[last]), not_replayed=missing)
    if not missing and not run.pipeline.backend.emulated:
        remaining.rounding = _rounding(run, sample)
    return remaining


def not_replayed(graph: Graph, replays: Mapping[str, Replay]) -> dict[str, str]:
    """Node → reason, for nodes that the outputs depend on and that no replay with a known expectation covers."""
    covered = {name for r in replays.values() if r.introduced is not None for name in r.nodes}
    covered -= {name for r in replays.values() for name in r.not_emulated}
    reasons = {v: r.skipped for v, r in replays.items() if r.skipped}
    reasons |= {v: "its precision is not emulated" for v, r in replays.items() if r.not_emulated}
    nodes, _ = graph.segment([v.name for v in graph.outputs if v.name in graph.producer], ())
    return {
        node.name: next((reasons[o] for o in node.outputs if o in reasons), "no probe shows what it computes")
        for node in nodes
        if node.op != "Constant" and node.name not in covered
    }


def _rounding(run: CandidateRun, sample: Sample) -> float | None:
    """Relative L2 distance of the emulated precision from the oracle at the final outputs, on the whole network."""
    assert run.oracle is not None
    if run.precision.name == "int8" or any(graph.precision == "int8" for graph in run.graphs.values()):
        return None  # the emulation rounds to no levels
    model = run.pipeline.model
    outputs: list[Arrays] = []
    for arithmetic in (run.precision.name, run.oracle):

        def execute(component: Component, inputs: Arrays, arithmetic: str = arithmetic) -> Arrays:
            executor = Executor(run.programs[component.name].graph, ARITHMETICS[arithmetic], run.device)
            return tensors_as_arrays(executor.run(inputs))

        try:
            outputs.append(walk(model, sample, execute)[model.components[-1].name])
        except InputError:
            return None
    return apart(*outputs)


def apart(a: Arrays, b: Arrays) -> float:
    """The worst output's relative L2 distance; infinite where shapes differ, or where NaN or Inf is on one side."""
    return max((distance.apart(a[name], theirs) for name, theirs in b.items() if name in a), default=0.0)
