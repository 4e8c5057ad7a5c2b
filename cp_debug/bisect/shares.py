"""Shares of guilty layers in the final divergence: each introduced error, carried through the network by itself."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

import numpy as np

from cp_debug.backends.arithmetic import FP32
from cp_debug.backends.executor import Executor
from cp_debug.bisect.candidate_run import CandidateRun, loader
from cp_debug.bisect.result import GUILTY, LayerRow
from cp_debug.errors import InputError, in_one_line
from cp_debug.graph.downstream import downstream
from cp_debug.probes.arrays import as_numpy
from cp_debug.probes.distance import ratio
from cp_debug.probes.held import CapturedRun
from cp_debug.probes.integers import are_wide, differences
from cp_debug.programs.pipeline import Key
from cp_debug.programs.walk import tensors_as_arrays, walk
from cp_debug.recipes.base import Arrays, Component, Sample

MOST = 8
"""Number of guilty layers whose share is computed, the most excessive first: each costs part of a forward pass."""


def set_shares(
    run: CandidateRun, rows: Mapping[Key, LayerRow], sample: Sample, reference: CapturedRun, test: CapturedRun
) -> list[str]:
    """Give every guilty row (up to ``MOST``) its share of the final divergence.

    The introduced error of a layer is added to the reference's value there and carried to the final outputs in FP32,
    giving Δ. Its share is ⟨Δ, D⟩ ÷ ‖D‖² for the final divergence D, each output scaled by its reference norm: shares
    of independent errors in a nearly linear network add up to 1. Glue has no node to replay, and what NaN and Inf
    that are born in a layer or stand in the test's outputs alone do to the end is no number: no share; nor is there one
    where the outputs have no finite difference. Returns a sentence for each share that could not be computed.
    """
    guilty = [
        (key, row)
        for key, row in rows.items()
        if row.verdict == GUILTY
        and row.side == "test"
        and row.op != "input"
        and row.replay
        and not row.replay.new_nonfinite
    ]
    guilty.sort(key=lambda item: item[1].replay.excess or 0.0, reverse=True)  # type: ignore[union-attr]
    notes: list[str] = []
    if not guilty:
        return notes
    propagate = Propagation(run, sample, reference, test)
    if propagate.ends_in_infinity or not propagate.differs:
        return notes
    for key, row in guilty[:MOST]:
        try:
            row.share = propagate.share(key)
        except Exception as error:
            notes.append(f"{row.name}: its share of the final divergence is not known: {in_one_line(error)}")
    return notes


class Propagation:
    """Carries a change of one value to the final outputs, everything else as the reference computed it."""

    def __init__(self, run: CandidateRun, sample: Sample, reference: CapturedRun, test: CapturedRun) -> None:
        self._run, self._sample, self._reference, self._test = run, sample, reference, test
        self._model = run.pipeline.model
        self._components = [c.name for c in self._model.components]

    def share(self, key: Key) -> float:
        """⟨Δ, D⟩ ÷ ‖D‖² of the layer ``key``.

        Raises InputError where its segment cannot be replayed, and where the final outputs do not differ.
        """
        if not self.differs:
            raise InputError("the final outputs have no finite difference of which a layer could have a share")
        return ratio(float(self.change(key) @ self.divergence), float(self.divergence @ self.divergence))

    @property
    def differs(self) -> bool:
        """Whether the final outputs have a finite difference."""
        return bool(self.divergence.any())

    @cached_property
    def divergence(self) -> np.ndarray:
        """D: the test's final outputs minus the reference's, as one vector.

        [elements of all final outputs] float64, each output divided by the norm of the reference's.
        """
        component = self._components[-1]
        return self._vector({n: _array(self._test, n, component) for n in self._in_both})

    @property
    def ends_in_infinity(self) -> bool:
        """Whether the test's final outputs hold NaN or Inf where the reference's are finite."""
        component = self._components[-1]
        for name in self._in_both:
            ours, theirs = (_array(c, name, component) for c in (self._reference, self._test))
            floats = ours.shape == theirs.shape and ours.dtype.kind == theirs.dtype.kind == "f"
            if floats and bool((np.isfinite(ours) & ~np.isfinite(theirs)).any()):
                return True
        return False

    def change(self, key: Key) -> np.ndarray:
        """Δ: change of the final outputs by the introduced error of the layer ``key``, as one vector.

        [elements of all final outputs] float64, as ``divergence``.
        Raises InputError where its segment cannot be replayed.
        """
        return self._vector(self.outputs(key))

    def outputs(self, key: Key) -> Arrays:
        """The final outputs when the introduced error of the layer ``key`` is the only one.

        Name → array of the reference's shape.
        """
        start = self._components.index(key.component)
        results: dict[str, Arrays] = {
            c: {n: _array(self._reference, n, c) for n in self._outputs(c)} for c in self._components[:start]
        }
        results[key.component] = self._downstream(key)

        def run(component: Component, inputs: Arrays) -> Arrays:
            graph = self._run.programs[component.name].graph
            return tensors_as_arrays(Executor(graph, FP32, self._run.device).run(inputs))

        return walk(self._model, self._sample, run, results)[self._components[-1]]

    def _downstream(self, key: Key) -> dict[str, np.ndarray]:
        """The outputs of the layer's own component when its value alone is changed."""
        graph, load = self._run.programs[key.component].graph, loader(self._reference, key.component)
        replayer = self._run.replayer(key.component, self._test)
        introduced, _ = replayer.introduced(key.value, loader(self._test, key.component))
        value = as_numpy(load(key.value))
        added = np.nan_to_num(as_numpy(introduced), posinf=0.0, neginf=0.0)
        if value.dtype.kind in "iu":  # which float64 may not hold
            added = np.rint(added).astype(value.dtype)
        changed = {key.value: (value + added).astype(value.dtype)}
        reached = {key.value, *downstream(graph.nodes, [key.value])}
        outputs = self._outputs(key.component)
        captured = {n for n in self._reference.names(component=key.component) if n not in reached or n == key.value}
        inside = [n for n in outputs if n in reached and n != key.value]
        results = {n: as_numpy(changed[n] if n == key.value else load(n)) for n in outputs if n not in inside}
        if inside:
            nodes, starts = graph.segment(inside, captured)
            inputs = {s: changed.get(s) if s in changed else load(s) for s in starts}
            computed = Executor(graph, FP32, self._run.device).run_nodes(nodes, inputs, inside)
            results.update({n: as_numpy(t) for n, t in computed.items()})
        return results

    def _outputs(self, component: str) -> list[str]:
        return [v.name for v in self._run.programs[component].graph.outputs]

    @cached_property
    def _in_both(self) -> list[str]:
        """The final outputs that the test has, too."""
        component = self._components[-1]
        shown = set(self._test.names(component=component))
        return [name for name in self._outputs(component) if name in shown]

    def _vector(self, outputs: Arrays) -> np.ndarray:
        component, parts = self._components[-1], []
        for name in self._in_both:
            reference, output = _array(self._reference, name, component), np.asarray(outputs[name])
            if tuple(self._test.load(name, component=component).shape) != reference.shape:
                continue
            rounded = reference.astype(np.float64)
            exact = are_wide(output, reference)
            difference = differences(output, reference) if exact else output.astype(np.float64) - rounded
            difference = np.nan_to_num(difference, posinf=0.0, neginf=0.0)
            size = np.linalg.norm(rounded[np.isfinite(rounded)])
            parts.append(difference.ravel() / (size or 1.0))
        return np.concatenate([np.empty(0), *parts])


def _array(capture: CapturedRun, name: str, component: str) -> np.ndarray:
    return as_numpy(capture.load(name, component=component))
