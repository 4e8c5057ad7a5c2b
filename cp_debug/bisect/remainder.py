"""Divergence that no layer is guilty of: does the rounding add up to it, and which whole numbers did it flip?

The divergence is what all layers introduced, carried to the end. That holds where every node was replayed; and it is
rounding where the declared precision, emulated over the whole network, makes about as much.

Flips are whole numbers that come out otherwise because of a rounding in front of them, which have no derivative.
Indices, comparisons, casts to integers, Floor and Round do what they must with what they read; which of the values in
front was rounded across the border is the event that a reader wants to know.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from cp_debug.backends.arithmetic import ARITHMETICS
from cp_debug.backends.executor import Executor
from cp_debug.bisect.candidate_run import CandidateRun, loader
from cp_debug.bisect.replay import Load, Replayer
from cp_debug.bisect.replayed import Replay
from cp_debug.bisect.result import GUILTY, INHERITED, LayerRow, Remainder
from cp_debug.errors import InputError
from cp_debug.graph.graph import Graph
from cp_debug.probes.arrays import as_numpy
from cp_debug.probes.distance import apart, outputs_apart
from cp_debug.probes.held import CapturedRun
from cp_debug.probes.statistics_reduce import is_whole
from cp_debug.programs.pipeline import Key
from cp_debug.programs.walk import tensors_as_arrays, walk
from cp_debug.recipes.base import Arrays, Component, Sample
from cp_debug.safe_text import amount, in_digits, some


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
    remaining = Remainder(outputs_apart(results[last], ours[last]), not_replayed=missing)
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
    return outputs_apart(*outputs)


ROUNDING = {"Ceil", "Floor", "Round", "Sign", "Trunc"}
"""Operators whose results are whole numbers held as floats."""
EVENTS = 8
"""Events that are told."""
MOST = 3
"""Layers that are named behind one event."""
ITS_OWN = 0.5
"""Part of a value's divergence from which its layer's own rounding has made it."""


@dataclass
class Flip:
    """A layer whose rounding, or whose ties, make whole numbers flip, though all do what they must."""

    maker: Key
    says: str
    """How many of the first layer that flips."""
    first: Key | None = None
    """That layer; None for ties."""
    behind: list[str] = field(default_factory=list)
    """Names of further layers that flip for that reason."""

    @property
    def told(self) -> str:
        """The sentence with those layers."""
        verb = "differ" if len(self.behind) > 1 else "differs"
        return self.says + (f"; for that reason {some(self.behind, MOST)} {verb}, too" if self.behind else "")


def flips(
    run: CandidateRun,
    rows: Mapping[Key, LayerRow],
    reference: CapturedRun,
    test: CapturedRun,
    tied: Mapping[Key, str],
) -> list[Flip]:
    """Each layer whose rounding makes whole numbers flip.

    ``tied``: layers where ties are broken differently, with the words for it: what flips behind one is told with it.
    """
    found: dict[Key, Flip] = {}
    of_ties = {key: Flip(key, f"{rows[key].name} ({rows[key].op}): {says}") for key, says in tied.items()}
    for key, row in rows.items():
        if key in tied or row.verdict != INHERITED or row.kind != "data" or row.replay is None:
            continue
        replayer = run.replayer(key.component, test)
        if key.value in replayer.levels:
            continue  # of a quantizer, whose steps are its precision
        loads = loader(reference, key.component), loader(test, key.component)
        ours, theirs = (as_numpy(load(key.value)) for load in loads)
        if not (is_whole(ours) or row.op in ROUNDING) or ours.shape != theirs.shape:
            continue
        places = np.argwhere(ours != theirs)
        front = _front(replayer, rows, key, loads)
        if not len(places) or front is None:
            continue
        itself = ((row.replay.introduced or 0.0) >= ITS_OWN * row.stats.rel_l2) and row.stats.rel_l2 > 0
        made_by = key if itself else _maker(replayer, rows, front, loads, tied)
        if made_by in found or made_by in of_ties:
            (found | of_ties)[made_by].behind.append(row.name)
            continue
        if (rows[made_by].stats.is_whole and not itself) or rows[made_by].verdict == GUILTY:
            continue  # wrong, not rounded
        says = f"{row.name} ({row.op}): {len(places)} of {ours.size} results flip, first at {places[0].tolist()}"
        value = rows[front]
        pair = [as_numpy(c.load(front.value, component=front.component)) for c in (reference, test)]
        if pair[0].shape == pair[1].shape == ours.shape:
            exact, rounded = (float(a[tuple(places[0])]) for a in pair)
            said = [in_digits(rounded), in_digits(exact)]
            if rounded != exact and said[0] == said[1]:
                said = [f"{rounded:.9g}", f"{exact:.9g}"]
            says += f", where {value.name} ({value.op}) is {said[0]}" + f" for {said[1]}" * (rounded != exact)
        maker = rows[made_by]
        precision = ((maker.replay and maker.replay.precision) or run.precision.name).upper()
        by = "its own steps are rounded" if itself else f"{maker.name} ({maker.op}) rounded it"
        says += f"; {by} in {precision}"
        found[made_by] = Flip(made_by, says, key)
    return [*found.values(), *of_ties.values()]


def flips_told(found: Sequence[Flip]) -> Iterator[str]:
    """A sentence for each of the first flips, and how many more there are."""
    yield from (flip.told for flip in found[:EVENTS])
    if (more := len(found) - EVENTS) > 0:
        yield f"{amount(more, 'more rounding')} {'makes' if more == 1 else 'make'} whole numbers flip"


def _front(replayer: Replayer, rows: Mapping[Key, LayerRow], key: Key, loads: tuple[Load, Load]) -> Key | None:
    """The value in front of ``key`` whose divergence alone moves it most; None where none differs.

    ``loads``: of the reference and of the test.
    """
    read = [Key(key.component, name) for name in replayer.starts(key.value)]
    differing = [k for k in read if k in rows and rows[k].stats.rel_l2 > 0]
    moved = {k: rows[k].stats.rel_l2 for k in differing}
    if len(moved) > 1 and (replay := rows[key].replay) and replay.introduced is not None:
        plain = replayer.exact(key.value, loads[0])
        for k in moved:
            alone = {name: loads[name == k.value](name) for name in replayer.starts(key.value)}
            moved[k] = apart(replayer.exact(key.value, alone.__getitem__), plain)
    return max(moved, key=moved.__getitem__, default=None)


def _maker(
    replayer: Replayer, rows: Mapping[Key, LayerRow], key: Key, loads: tuple[Load, Load], tied: Collection[Key]
) -> Key:
    """The layer whose own rounding made most of the divergence of ``key``, or whose ties: itself, or one in front."""
    while True:
        row = rows[key]
        own = (row.replay and row.replay.introduced) or 0.0
        front = _front(replayer, rows, key, loads)
        if key in tied or own >= ITS_OWN * row.stats.rel_l2 or front is None:
            return key
        key = front
