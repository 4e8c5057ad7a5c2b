"""Nodes to keep in FP32, or to leave unquantized, found by trying: the whole network is emulated with them, and its
outputs are compared."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from cp_debug.backends.arithmetic import ARITHMETICS, FP32, INT8, overrides_of
from cp_debug.backends.executor import Executor
from cp_debug.bisect.candidate_run import CandidateRun
from cp_debug.bisect.range_loss import RANGE
from cp_debug.bisect.result import LayerRow
from cp_debug.errors import InputError
from cp_debug.graph.half_precision import narrow_values
from cp_debug.graph.operators import ALL_MOVERS, MOVING
from cp_debug.probes.arrays import as_numpy
from cp_debug.probes.distance import outputs_apart
from cp_debug.programs.layers import layer_name
from cp_debug.programs.pipeline import Key, by_reference
from cp_debug.programs.walk import tensors_as_arrays, walk
from cp_debug.recipes.base import Arrays, Component, Sample
from cp_debug.safe_text import flags

Name = tuple[str, str]
"""Component and node."""
EMULATED = ("fp16", "bf16", "fp16acc")
"""Precisions from which single nodes can be kept."""
MOST = 8
"""Names in a line."""
TRIALS = 24
"""Runs of the emulated network for one search."""
ENOUGH = 0.1
"""Part of the divergence that may be left for a set to grow no further."""
HELPS = 0.5
"""Part of the divergence that may be left for a set to be told."""
LESS = 0.9
"""Part that may be left for layers to be told that are left unquantized, and for a wider set to be better."""
COUNTS = (1, 2, 4, 8)
"""How many layers are left unquantized, one count after the other."""
WIDEST = 0.5
"""Part of all nodes that compute up to which a set grows: with more of them, the network is as good as in FP32."""


@dataclass(frozen=True)
class TriedSet:
    """A set that was tried: relative L2 of the worst final output from the reference's, or the part of whole numbers
    that flip, with it and without."""

    nodes: tuple[Name, ...]
    after: float
    before: float
    trials: int
    layers: int = 0
    """How many of the layers that were asked for are in it."""
    vital: tuple[Name, ...] = ()
    """Those of its nodes without which the outputs are not finite."""


class KeepTrials:
    """Tries sets of nodes to keep in FP32, or to leave unquantized, on one sample."""

    def __init__(self, run: CandidateRun, sample: Sample, reference: Arrays) -> None:
        """``reference``: the reference's final outputs, name → array in the dtype that the graph declares."""
        self._run = run
        self._programs, self._graphs, self._model = run.programs, run.graphs, run.pipeline.model
        self._sample, self._reference = sample, reference
        self._precision, self._device = run.precision, run.device
        self._told = {name: run.pipeline.kept(name) for name in run.programs}
        self._errors: dict[frozenset[Name], float] = {}
        self._nodes: dict[Name, Collection[str]] = {}
        """Value of a layer that is left unquantized → the reference's nodes that compute it."""

    @classmethod
    def of(cls, run: CandidateRun, sample: Sample, reference: Arrays) -> KeepTrials | None:
        """Trials for one test; None where it computes no graph of the reference in a precision that is emulated, and
        no quantized one.

        ``reference``: the reference's final outputs, name → array in the dtype that the graph declares.
        """
        alike = all(run.graphs[name] is program.graph for name, program in run.programs.items())
        quantized = not alike and any(graph.precision == "int8" for graph in run.graphs.values())
        return cls(run, sample, reference) if quantized or (alike and run.precision.name in EMULATED) else None

    @property
    def quantized(self) -> bool:
        """Whether layers can be left unquantized; else nodes of the reference's own graphs can be kept in FP32."""
        return any(graph is not self._programs[name].graph for name, graph in self._graphs.items())

    def first(self, ranked: Mapping[Key, LayerRow], counts: Sequence[int] = COUNTS) -> TriedSet | None:
        """The first layers, as few as halve the divergence, else those that leave least, computed by the reference's
        own nodes in FP32; None where most is left without any of them. Raises InputError where a run fails.

        ``ranked``: replayed rows, the layer that costs most first. ``counts``: how many are left out, one count after
        the other.
        """
        self._nodes |= {(key.component, key.value): row.replay.nodes for key, row in ranked.items() if row.replay}
        before, best = self._error(frozenset()), None
        for count in counts:
            values = frozenset((key.component, key.value) for key in [*ranked][:count])
            if best is None or self._error(values) < best.after:
                best = TriedSet((), self._error(values), before, len(self._errors), min(count, len(ranked)))
            if best.after <= HELPS * before or count >= len(ranked):
                break
        return best if best is not None and best.after <= LESS * before else None

    def _without(self, component: str, inputs: Arrays, values: Collection[str]) -> Arrays:
        """Outputs of a quantized graph by its own names, some ``values`` of the reference's graph computed as there.

        These are what the reference's nodes make in FP32 of the values that the test shows in front of them: without
        what rounds their operands, their weights and themselves.
        """
        graph, plain = self._graphs[component], self._programs[component].graph
        own = {name: value for value, name in self._run.names(component).items() if value in graph.producer}
        low, exact = Executor(graph, INT8, self._device), Executor(plain, FP32, self._device)
        known, done = dict[str, Any](inputs), 0
        for value in sorted(own.keys() & set(values), key=lambda name: graph.producer[own[name]].index):
            seen, end = dict[str, Any](), graph.producer[own[value]].index + 1
            low.run_nodes(graph.nodes[done:end], known, (), seen.__setitem__)
            known, done = known | seen, end
            names = self._nodes[component, value]
            inner = {output for node in plain.nodes if node.name in names for output in node.outputs}
            nodes, starts = plain.segment([value], own.keys() - inner)
            given = {name: known[own.get(name, name)] for name in starts}
            if not all(torch.as_tensor(v).is_floating_point() for v in (*given.values(), known[own[value]])):
                raise InputError(f"{value}: levels are all that is known around it")
            known[own[value]] = exact.run_nodes(nodes, given, [value])[value]
        outputs = [info.name for info in graph.outputs]
        return tensors_as_arrays(low.run_nodes(graph.nodes[done:], known, outputs))

    def find(self, first: Sequence[Name], *, guilty: bool = False) -> TriedSet | None:
        """A set with the nodes ``first``, or some of them, that leaves less than half of the divergence.

        ``guilty``: what a layer loses is no rounding, so where more remains than rounding may leave, the set also grows
        as long as that halves it.

        A node in FP32 helps nothing where what feeds or reads it rounds the same numbers: the set grows by readers, and
        by what moves numbers in front, then the best one by all that is in front, then by both, until little is left;
        then what is needless is taken out again. None where no set helps. Raises InputError where a run fails.
        """
        before, last = self._error(frozenset()), len(self._errors) + TRIALS
        enough = min(ENOUGH * before, self._precision.rtol)
        rounding = min(enough, RANGE * self._precision.roundoff) if guilty else enough
        nodes = {(c, node.name): node.op for c, graph in self._graphs.items() for node in graph.nodes}
        computing = {name for name, op in nodes.items() if op not in MOVING}
        kept = best = frozenset(name for name in first if nodes[name] != "Constant")  # who reads one, rounds it
        wider = 2 * MOST if len(first) <= MOST else MOST
        behind, in_front = self._behind, self._in_front
        for ways, widest in (((behind,), MOST), ((in_front,), wider), ((behind, in_front), wider)):
            kept = best
            while len(self._errors) < last:
                if self._error(kept) < LESS * self._error(best):
                    best = kept
                grown = kept.union(*(way(kept) for way in ways))
                too_wide = len(grown & computing) > WIDEST * len(computing) and len(grown) > widest
                if grown == kept or too_wide:
                    break
                left = self._error(best)
                if left <= rounding or (left <= enough and self._error(grown) > HELPS * left):
                    break
                kept = grown
        if not self._error(best) <= HELPS * before or math.isinf(self._error(best)):
            return None
        left = self._error(best)
        most = max(1.1 * left, min(enough, max(rounding, left / HELPS)))
        for name in sorted(best, key=lambda name: (name in first, name)):
            if len(self._errors) >= last or len(best) == 1:
                break
            if self._error(best - {name}) <= most:
                best -= {name}
        chosen = tuple(name for name in nodes if name in best)
        vital = tuple(name for name in chosen if math.isinf(self._errors.get(best - {name}, math.inf)))
        return TriedSet(chosen, self._error(best), before, len(self._errors), vital=vital)

    def names(self, nodes: Sequence[Name]) -> list[str]:
        """The nodes as ``--keep-fp32`` takes them: a module's layers by their paths, others by the node's name, with
        the component's where there are several."""
        made = {(c, node.name): node.outputs[0] for c, graph in self._graphs.items() for node in graph.nodes}
        names = [(layer_name(self._programs[c], made[c, node]), c, node) for c, node in nodes]
        alone = len(self._graphs) == 1
        return [name if alone or name != node else f"{component}/{node}" for name, component, node in names]

    def _behind(self, kept: Collection[Name]) -> set[Name]:
        """Readers of the nodes, and nodes in front of them that move or cast numbers."""
        found: set[Name] = set()
        for component, graph in self._graphs.items():
            for node in (n for n in graph.nodes if (component, n.name) in kept):
                found |= {(component, r.name) for output in node.outputs for r in graph.consumers.get(output, ())}
                makers = (graph.producer.get(name) for name in node.inputs)
                found |= {(component, m.name) for m in makers if m and (m.op in ALL_MOVERS or m.op == "Cast")}
        return found

    def _in_front(self, kept: Collection[Name]) -> set[Name]:
        """Nodes that make what these read."""
        return {
            (component, maker.name)
            for component, graph in self._graphs.items()
            for node in graph.nodes
            if (component, node.name) in kept
            for maker in map(graph.producer.get, node.inputs)
            if maker and maker.op != "Constant"
        }

    def _error(self, kept: frozenset[Name]) -> float:
        if kept not in self._errors:
            outputs = walk(self._model, self._sample, self._runner(kept))[self._model.components[-1].name]
            pairs = ((as_numpy(outputs[n]), as_numpy(t)) for n, t in self._reference.items() if n in outputs)
            flips = (np.mean(a != b) for a, b in pairs if b.dtype.kind in "biu" and a.shape == b.shape)
            self._errors[kept] = max(outputs_apart(outputs, self._reference), *map(float, flips), 0.0)
        return self._errors[kept]

    def _runner(self, kept: frozenset[Name]) -> Callable[[Component, Arrays], Arrays]:
        arithmetic = ARITHMETICS[self._precision.name]

        def execute(component: Component, inputs: Arrays) -> Arrays:
            graph, told = self._graphs[component.name], self._told.get(component.name, ())
            nodes = {n.name for n in graph.nodes if n.name in told or (component.name, n.name) in kept}
            if graph is not self._programs[component.name].graph:
                values = {value for of, value in kept if of == component.name}
                outputs = self._without(component.name, inputs, values)
                return by_reference(self._run.pipeline.program(component.name), outputs)
            overrides = overrides_of(graph, narrow_values(graph), arithmetic) | dict.fromkeys(nodes, FP32)
            return tensors_as_arrays(Executor(graph, arithmetic, self._device, overrides=overrides).run(inputs))

        return execute


def gave(tried: TriedSet) -> str:
    """``0.0011 (0.83 before), emulated``."""
    return f"{tried.after:.2g} ({tried.before:.2g} before), emulated"


def in_words(tried: TriedSet, names: Sequence[str]) -> str:
    """``keep in FP32: --keep-fp32 a --keep-fp32 b: 0.0011 (0.83 before), emulated``. ``names``: those of its nodes."""
    return f"keep in FP32: {flags('--keep-fp32', names, len(names))}: {gave(tried)}"
