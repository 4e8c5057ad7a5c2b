"""Trials run: on the emulator, or on the backend itself.

On the emulator a graph is computed anew only from where two runs differ: a trial costs the part of the network behind
the first layer that changed.
"""

from __future__ import annotations

import tempfile
from collections import ChainMap, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import closing
from copy import copy
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from cp_debug.backends.arithmetic import ARITHMETICS, FP32, Arithmetic
from cp_debug.backends.base import Backend, Program, Session
from cp_debug.backends.capabilities import build_info_of, timer_of
from cp_debug.backends.determinism import deterministic
from cp_debug.backends.executor import Executor
from cp_debug.bisect.backward import Backward, shares_over
from cp_debug.graph.check_inputs import check_inputs
from cp_debug.graph.graph import Graph, Node
from cp_debug.graph.qdq import plain_nodes, remove_qdq
from cp_debug.graph.tensor_ends import as_arrays
from cp_debug.mixed_precision.layers import FusionGroup, Kept, TrialPrecision, nodes_of
from cp_debug.mixed_precision.trials import Results
from cp_debug.probes.arrays import as_numpy
from cp_debug.probes.distance import relative_l2
from cp_debug.programs.walk import Walk, walk
from cp_debug.recipes.base import Arrays, Component, Model, Sample


@dataclass(frozen=True)
class Computed:
    """One run: the nodes that were FP32, and every value."""

    high: frozenset[str]
    values: Mapping[str, Any]

    @property
    def nbytes(self) -> int:
        """Memory of the values."""
        return sum(getattr(value, "nbytes", 0) for value in self.values.values())


class MixedExecutor:
    """Runs one graph. Nodes in FP32 read what is in front of a Q/DQ pair, not what comes out of it.

    Results equal, bit for bit, those of ``EmulatedBackend`` with the same nodes as its ``overrides``.
    """

    def __init__(self, graph: Graph, arithmetic: Arithmetic, device: str) -> None:
        self.graph = graph
        self._low, self._high = Executor(graph, arithmetic, device), Executor(graph, FP32, device)
        self._plain = plain_nodes(graph)
        self._nodes = [node for node in graph.nodes if node.op != "Constant"]
        self.executed = 0
        """Nodes computed so far."""

    def run(self, inputs: Mapping[str, np.ndarray], high: frozenset[str], known: Iterable[Computed] = ()) -> Computed:
        """Run with the nodes ``high`` in FP32; of ``known`` runs the nearest is continued."""
        check_inputs(self.graph.inputs, inputs, str(self.graph))
        near = min(known, key=lambda run: len(run.high ^ high), default=None)
        before: Mapping[str, Any] = near.values if near else {}
        values: dict[str, Any] = {}
        for name, array in inputs.items():
            values[name] = _unless_equal(before.get(name), self._high.arithmetic.hold(array, self._high.device))
        with deterministic():
            for node in (self._of(node, high) for node in self._nodes):
                same = near is not None and (node.name in high) == (node.name in near.high)
                if same and all(values.get(name) is before.get(name) for name in node.inputs):
                    values.update((name, before[name]) for name in node.outputs)
                    continue
                for name, value in self._compute(node, high, values).items():
                    values[name] = _unless_equal(before.get(name), value)
        return Computed(high, values)

    def outputs(self, computed: Computed) -> dict[str, np.ndarray]:
        """The graph's outputs of a run: name → array, other outputs than tensors in parts as ``as_arrays`` has them."""
        results = self._high.run_nodes([], computed.values, [v.name for v in self.graph.outputs])
        return as_arrays(self.graph, results, as_numpy)

    def local_error(self, nodes: Collection[str], exact: Computed) -> float:
        """Error that ``nodes`` introduce by computing in the low arithmetic from the values of an FP32 run.

        Relative L2 of the worst value that others read; infinite where it is not finite, though the FP32 run's is.
        """
        chosen = [node for node in self._nodes if node.name in nodes]
        computed: dict[str, Any] = {}
        with deterministic():
            for node in chosen:
                computed |= self._compute(node, frozenset(), ChainMap(computed, dict(exact.values)))
        inner = {name for node in chosen for name in node.inputs}
        worst = 0.0
        for name in computed.keys() - (inner - {v.name for v in self.graph.outputs}):
            worst = max(worst, relative_l2(computed[name], exact.values[name]))
        return worst

    def backward(self, computed: Computed) -> Backward:
        """The walk back from derivatives of the outputs of this run; counted as three runs of the graph."""
        self.executed += 3 * len(self._nodes)
        test = computed.values.__getitem__
        return Backward(self.graph, computed.values.keys(), test, self._high, plain=self._plain)

    def _of(self, node: Node, high: Collection[str]) -> Node:
        """The node as it is computed: in FP32 it reads in front of Q/DQ pairs."""
        return self._plain.get(node.name, node) if node.name in high else node

    def _compute(self, node: Node, high: Collection[str], values: Mapping[str, Any]) -> dict[str, Any]:
        self.executed += 1
        executor = self._high if node.name in high else self._low
        return executor.run_nodes([node], values, node.outputs)


def _unless_equal(before: Any, value: Any) -> Any:
    """``before`` itself where both are the same tensor, so that who reads it need not be computed again."""
    if isinstance(before, torch.Tensor) and isinstance(value, torch.Tensor):
        alike = before.dtype == value.dtype and before.shape == value.shape
        return before if alike and torch.equal(before, value) else value
    return value


MEMORY = 4 << 30
"""Bytes of values that are kept to continue from; samples beyond are computed from the start in every trial."""
RUNS = 20
"""Timed runs of an engine."""


class EmulatedRunner:
    """Runs trials on the emulator, where a trial is a part of a forward pass."""

    builds = 0
    """Engines, graphs or sessions made so far: a trial needs none."""

    def __init__(
        self,
        model: Model,
        programs: Sequence[Program],
        samples: Sequence[Sample],
        precision: TrialPrecision,
        device: str,
    ) -> None:
        self._model, self._precision = model, precision
        arithmetic = ARITHMETICS[precision.name]
        self._executors = {p.name: MixedExecutor(p.graph, arithmetic, device) for p in programs}
        self._start(samples)

    def _start(self, samples: Sequence[Sample]) -> None:
        self._samples = samples
        self.exact: list[Arrays] = []
        """Final outputs in FP32 by sample, once prepared."""
        self._bases: list[dict[tuple[int, str], Computed]] = []
        self._last: dict[tuple[int, str], Computed] = {}
        self._room = MEMORY
        self._nodes = sum(len(executor.graph.nodes) for executor in self._executors.values()) * len(samples)

    def on(self, samples: Sequence[Sample]) -> EmulatedRunner:
        """The same model on other samples; nothing that was computed is shared."""
        other = copy(self)
        other._start(samples)
        return other

    def run(self, kept_groups: Kept) -> list[Results]:
        """Final outputs by sample, with ``kept_groups`` in high precision."""
        high = self._high(kept_groups)
        return [self._pass(i, high, self._last) for i in range(len(self._samples))]

    def _high(self, kept_groups: Kept) -> dict[str, frozenset[str]]:
        graphs = {name: executor.graph for name, executor in self._executors.items()}
        return {name: self._precision.high(graph, nodes_of(kept_groups, name)) for name, graph in graphs.items()}

    def latency(self) -> None:
        """None: an emulation has no time on a device."""

    def prepare(self) -> None:
        """Run everything in FP32: values that do not depend on a trial's layers need not be computed again."""
        ends = self._base({name: frozenset(n.name for n in e.graph.nodes) for name, e in self._executors.items()})
        self.exact = [results[self._model.components[-1].name] for results in ends]

    def remember(self, kept_groups: Kept) -> None:
        """Run a trial from which later ones near it are continued."""
        self._base(self._high(kept_groups))

    def _base(self, high: Mapping[str, frozenset[str]]) -> list[Results]:
        runs: dict[tuple[int, str], Computed] = {}
        ends = [self._pass(i, high, runs) for i in range(len(self._samples))]
        self._bases.append(runs)
        return ends

    def shares(self, kept_groups: Kept) -> dict[tuple[str, str], float]:
        """(Component, node) → its share of what the run with ``kept_groups`` is off from FP32, over all samples.

        To first order, by one walk backward a sample (``bisect/backward.py``); call ``prepare`` first. Empty where no
        output of floats differs.
        """
        return self.by_node(shares_over(self._model, self._samples, lambda i, _: self.divergence(i, kept_groups), []))

    def divergence(self, i: int, kept_groups: Kept) -> tuple[Arrays, Results, Callable[[Component], Backward]]:
        """Of sample ``i``, what ``shares_over`` asks: exact outputs, those with ``kept_groups``, the walk back."""
        runs: dict[str, Computed] = {}
        results = self._pass(i, self._high(kept_groups), self._last, runs)
        return self.exact[i], results, lambda c: self._executors[c.name].backward(runs[c.name])

    def by_node(self, shares: Mapping[tuple[str, str], float]) -> dict[tuple[str, str], float]:
        """Shares by (component, value) as shares by (component, node)."""
        found: dict[tuple[str, str], float] = defaultdict(float)
        for (component, value), share in shares.items():
            found[component, self._executors[component].graph.producer[value].name] += share
        return found

    def local_error(self, group: FusionGroup) -> float:
        """Relative L2 error that the layer introduces by itself, on the first sample."""
        return self._executors[group.component].local_error(group.nodes, self._bases[0][0, group.component])

    @property
    def passes(self) -> float:
        """Nodes computed so far, in passes over all samples."""
        return sum(executor.executed for executor in self._executors.values()) / max(self._nodes, 1)

    def _pass(
        self,
        i: int,
        high: Mapping[str, frozenset[str]],
        keep: dict[tuple[int, str], Computed],
        runs: dict[str, Computed] | None = None,
    ) -> Results:
        """Final outputs of sample ``i``. ``keep``: where its values are held; ``runs`` takes them by component."""

        def run(component: Component, inputs: Arrays) -> Arrays:
            key, executor = (i, component.name), self._executors[component.name]
            known = [store[key] for store in (*self._bases, self._last) if key in store]
            computed = executor.run(inputs, high[component.name], known)
            if runs is not None:
                runs[component.name] = computed
            if key not in keep and i:
                self._room -= computed.nbytes
            if key in keep or self._room > 0:
                keep[key] = computed
            return executor.outputs(computed)

        return walk(self._model, self._samples[i], run)


class BackendRunner:
    """Trials on the backend itself: a component is built anew when its own layers change."""

    def __init__(
        self,
        model: Model,
        programs: Sequence[Program],
        samples: Sequence[Sample],
        precision: TrialPrecision,
        backend: Any,
        folder: Path,
    ) -> None:
        self._model, self._samples, self._precision, self._backend = model, samples, precision, backend
        self._programs = {program.name: program for program in programs}
        self._folder = folder
        self._outputs: dict[tuple[frozenset[str], ...], list[Arrays]] = {}
        self._seconds: dict[tuple[frozenset[str], ...], float | None] = {}
        self._latest: tuple[frozenset[str], ...] = ()
        self.builds = 0
        self.layers: dict[str, Sequence[Mapping[str, Any]]] = {}
        """Component → layers of its latest engine (``name``, ``nodes``), where the backend tells."""

    def run(self, kept_groups: Kept) -> list[Results]:
        """Final outputs by sample, with ``kept_groups`` in high precision. Raises InputError for a refused build."""
        walks = [Walk(self._model, sample) for sample in self._samples]
        chain: tuple[frozenset[str], ...] = ()
        for steps in zip(*walks, strict=True):
            program = self._programs[steps[0].name]
            chain = (*chain, self._precision.keep(program.graph, nodes_of(kept_groups, program.name)))
            if chain not in self._outputs:
                feeds = [step.inputs for step in steps]
                self._outputs[chain], self._seconds[chain] = self._build(program, chain[-1], feeds)
            for step, outputs in zip(steps, self._outputs[chain], strict=True):
                step.outputs = outputs
        del self._outputs[chain]  # nobody asks for a whole trial twice
        self._latest = chain
        return [each.results for each in walks]

    def latency(self) -> float | None:
        """Seconds of the last trial's engines, copies left out, on the first sample; None unless all tell."""
        parts = [self._seconds[self._latest[: i + 1]] for i in range(len(self._latest))]
        return None if None in parts else sum(part for part in parts if part is not None)

    def _build(
        self, program: Program, kept_nodes: frozenset[str], feeds: Sequence[Arrays]
    ) -> tuple[list[Arrays], float | None]:
        backend: Backend = self._backend
        with tempfile.TemporaryDirectory(dir=self._folder) as folder:
            if self._precision.name == "int8":
                graph = Graph(remove_qdq(program.graph, kept_nodes, Path(folder) / "kept.onnx"), source=program.graph)
                plain = program.plain or program.graph  # says that no pair is left by intention
                program = replace(program, graph=graph, module=None, alignment=None, plain=plain)
            else:
                backend = self._backend.keeping(kept_nodes)
            dynamic = any(not isinstance(d, int) for v in program.graph.inputs for d in v.shape or ())
            shapes = {tuple((name, array.shape) for name, array in sorted(feed.items())) for feed in feeds}
            self.builds += len(shapes) if dynamic else 1
            with closing(backend.open(program)) as session:
                outputs: list[Arrays] = [session.run(feed) for feed in feeds]
                if info := build_info_of(session):
                    self.layers[program.name] = info.layers
                return outputs, _seconds(session, feeds[0])


def _seconds(session: Session, feed: Arrays) -> float | None:
    timings = timer_of(session)
    return None if timings is None else median(timings(feed, RUNS))
