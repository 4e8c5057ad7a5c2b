"""Trials on graphs: on the emulator, or on the backend itself."""

from __future__ import annotations

import tempfile
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any, Protocol

from cp_debug.backends.arithmetic import ARITHMETICS
from cp_debug.backends.base import Backend, Program, Session
from cp_debug.backends.capabilities import build_info_of, timer_of
from cp_debug.bisect.backward import Backward, shares_over
from cp_debug.graph.graph import Graph
from cp_debug.graph.qdq import remove_qdq
from cp_debug.mixed_precision.fusion_groups import FusionGroup, Kept, nodes_of
from cp_debug.mixed_precision.judge import Results
from cp_debug.mixed_precision.mixed_graph import Computed, MixedExecutor
from cp_debug.mixed_precision.precision import TrialPrecision
from cp_debug.programs.walk import Walk, walk
from cp_debug.recipes.base import Arrays, Component, Model, Sample

MEMORY = 4 << 30
"""Bytes of values that are kept to continue from; samples beyond are computed from the start in every trial."""
RUNS = 20
"""Timed runs of an engine."""


class Runner(Protocol):
    """Runs trials of one model on its samples."""

    builds: int
    """Engines, graphs or sessions made so far; 0 where a trial needs none."""

    def run(self, kept_groups: Kept) -> list[Results]:
        """Final outputs by sample, with ``kept_groups`` in high precision. Raises InputError for a refused build."""
        ...

    def latency(self) -> float | None:
        """Seconds of the last trial on its device, where the backend tells."""
        ...


class EmulatedRunner:
    """Runs the trials of a search on the emulator, where a trial is a part of a forward pass."""

    builds = 0

    def __init__(
        self,
        model: Model,
        programs: Sequence[Program],
        samples: Sequence[Sample],
        precision: TrialPrecision,
        device: str,
    ) -> None:
        self._model, self._samples, self._precision = model, samples, precision
        self._last_component = model.components[-1].name
        self._outputs: list[Arrays] = []
        arithmetic = ARITHMETICS[precision.name]
        self._executors = {p.name: MixedExecutor(p.graph, arithmetic, device) for p in programs}
        self._exact: dict[tuple[int, str], Computed] = {}
        self._last: dict[tuple[int, str], Computed] = {}
        self._room = MEMORY
        self._nodes = sum(len(executor.graph.nodes) for executor in self._executors.values()) * len(samples)

    def run(self, kept_groups: Kept) -> list[Results]:
        """Final outputs by sample, with ``kept_groups`` in high precision."""
        high = self._high(kept_groups)
        return [self._pass(i, high) for i in range(len(self._samples))]

    def _high(self, kept_groups: Kept) -> dict[str, frozenset[str]]:
        graphs = {name: executor.graph for name, executor in self._executors.items()}
        return {name: self._precision.high(graph, nodes_of(kept_groups, name)) for name, graph in graphs.items()}

    def latency(self) -> None:
        """None: an emulation has no time on a device."""

    def prepare(self) -> None:
        """Run everything in FP32: values that do not depend on a trial's layers need not be computed again."""
        high = {name: frozenset(n.name for n in e.graph.nodes) for name, e in self._executors.items()}
        self._outputs = [self._pass(i, high, keep=self._exact)[self._last_component] for i in range(len(self._samples))]

    def shares(self, kept_groups: Kept) -> dict[tuple[str, str], float]:
        """(Component, node) → its share of what the run with ``kept_groups`` is off from FP32, over all samples.

        To first order, by one walk backward a sample (``bisect/backward.py``); call ``prepare`` first. Empty where no
        output of floats differs.
        """
        high, runs = self._high(kept_groups), dict[str, Computed]()

        def run(i: int, sample: Sample) -> tuple[Arrays, Results, Callable[[Component], Backward]]:
            results = self._pass(i, high, runs=runs)
            return self._outputs[i], results, lambda c: self._executors[c.name].backward(runs[c.name])

        found: dict[tuple[str, str], float] = defaultdict(float)
        for (component, value), share in shares_over(self._model, self._samples, run, []).items():
            found[component, self._executors[component].graph.producer[value].name] += share
        return found

    def local_error(self, group: FusionGroup) -> float:
        """Relative L2 error that the layer introduces by itself, on the first sample."""
        return self._executors[group.component].local_error(group.nodes, self._exact[0, group.component])

    @property
    def passes(self) -> float:
        """Nodes computed so far, in passes over all samples."""
        return sum(executor.executed for executor in self._executors.values()) / max(self._nodes, 1)

    def _pass(
        self,
        i: int,
        high: Mapping[str, frozenset[str]],
        keep: dict[tuple[int, str], Computed] | None = None,
        runs: dict[str, Computed] | None = None,
    ) -> Results:
        """Final outputs of sample ``i``. ``keep``: where its values are held; ``runs`` takes them by component."""
        keep = self._last if keep is None else keep

        def run(component: Component, inputs: Arrays) -> Arrays:
            key, executor = (i, component.name), self._executors[component.name]
            known = [store[key] for store in (self._exact, self._last) if key in store]
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
