"""Blame of a graph optimizer or a compiler: which of its parts make a difference, and which nodes they rewrote.

The parts are ONNX Runtime's optimizers, or properties of OpenVINO's CPU plug-in. The deployed program alone is asked,
without probes: parts are disabled until its final outputs are those of the unoptimized program, and as many as possible
are enabled again.

For torch's compiler its own bisector decides: it disables one subsystem after the other until the outputs of the
compiled module, which runs without probes, are those of eager, and halves the number of times that the guilty one is
applied.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Collection, Sequence
from contextlib import closing, redirect_stdout
from dataclasses import dataclass, field, replace
from typing import Any

from cp_debug.backends.base import Backend, Program
from cp_debug.backends.openvino_backend import KNOBS, OpenVinoBackend
from cp_debug.backends.ort_backend import OrtBackend, run_whole
from cp_debug.backends.ort_options import LEVELS, RULE_BASED, RULES, active_optimizers
from cp_debug.backends.registry import create
from cp_debug.backends.spec import COMPILED
from cp_debug.bisect.observe import gap
from cp_debug.minimize import Minimizer
from cp_debug.programs.pipeline import Pipeline
from cp_debug.programs.walk import walk
from cp_debug.recipes.base import Arrays, Component, Model, Sample
from cp_debug.serialize import JsonForm

REST = 0.01
"""Share of the whole difference that may remain when the responsible optimizers are disabled: their fellows round, too,
and usually a thousand times less."""


@dataclass(frozen=True)
class Rewrite:
    """Original nodes of one component, and the operators that compute their result instead."""

    component: str
    original: tuple[str, ...]
    operators: tuple[str, ...]


@dataclass(frozen=True)
class Culprit:
    """One of the responsible optimizers."""

    optimizer: str
    difference: float
    """Difference that it makes by itself, with the other responsible ones disabled."""
    rewrites: tuple[Rewrite, ...]


@dataclass(frozen=True)
class OptimizerBlame(JsonForm):
    """Effect of the optimizer on the final outputs; relative L2 against the unoptimized program."""

    level: str | None
    """The first level at which they differ by more than the noise floor; None: at none up to the backend's."""
    difference_with: float = field(metadata={"key": "difference.with"})
    """Difference with all optimizers enabled."""
    difference_without: float = field(metadata={"key": "difference.without"})
    """Difference with the responsible ones disabled."""
    responsible: list[Culprit] = field(default_factory=list, metadata={"key": "culprits"})
    """The set found: leaving any one of it enabled leaves a difference. Empty where disabling does not help."""
    active: list[str] = field(default_factory=list)
    """The optimizers that changed the graph."""
    runs: int = 0
    """Number of times that the model was run."""
    fix: str = ""
    """What leaves the responsible ones out; empty for ONNX Runtime, which is told their names."""

    @property
    def nodes(self) -> list[str]:
        """The original nodes that the responsible optimizers rewrote."""
        return list(dict.fromkeys(n for c in self.responsible for r in c.rewrites for n in r.original))

    def derived(self) -> dict[str, Any]:
        """The optimizers by name, and the nodes that they rewrote."""
        return {"responsible": [culprit.optimizer for culprit in self.responsible], "nodes": self.nodes}


def blame_optimizers(
    model: Model, programs: Sequence[Program], backend: OrtBackend, sample: Sample, noise_floor: float
) -> OptimizerBlame:
    """Find optimizers, none too many, whose disabling makes the outputs those of the unoptimized program.

    Without a difference above ``noise_floor`` nothing is searched. What remains afterwards is at most the noise floor,
    or ``REST`` of the whole difference; bit-equal outputs count as 0. Raises InputError when the model fails.
    """
    return _OptimizerSearch(model, programs, backend, sample, noise_floor).run()


def blame_properties(
    model: Model, programs: Sequence[Program], backend: OpenVinoBackend, sample: Sample, noise_floor: float
) -> OptimizerBlame:
    """The same for OpenVINO: unoptimized is the program for which all of ``KNOBS`` are disabled."""
    blame = _PropertySearch(model, programs, backend, sample, noise_floor).run()
    disabled = {culprit.optimizer: KNOBS[culprit.optimizer] for culprit in blame.responsible}
    return replace(blame, fix=f'core.compile_model(model, "CPU", {json.dumps(disabled)})' if disabled else "")


Replaced = tuple[tuple[str, ...], tuple[str, ...]]
"""Original nodes, and the operators that compute their result instead."""


class _OptimizerSearch:
    def __init__(
        self, model: Model, programs: Sequence[Program], backend: Any, sample: Sample, noise_floor: float
    ) -> None:
        self._model, self._programs, self._backend, self._sample = model, programs, backend, sample
        self._floor = noise_floor
        self._seen: dict[tuple[str, frozenset[str]], float] = {}
        self._unoptimized = self._outputs("none", frozenset())

    @property
    def _levels(self) -> list[str]:
        """Levels above the unoptimized program, up to the backend's."""
        return list(LEVELS)[1 : list(LEVELS).index(self._backend.level) + 1]

    def run(self) -> OptimizerBlame:
        whole = self._difference(frozenset())
        first = next((level for level in self._levels if self._difference(frozenset(), level) > self._floor), None)
        active = self._active(())
        if whole <= self._floor:
            return OptimizerBlame(first, whole, whole, active=active, runs=self._runs)
        disabled = self._responsible(max(self._floor, REST * whole), active)
        culprits = [self._culprit(name, disabled) for name in disabled]
        culprits.sort(key=lambda culprit: culprit.difference, reverse=True)
        return OptimizerBlame(first, whole, self._difference(frozenset(disabled)), culprits, active, self._runs)

    @property
    def _runs(self) -> int:
        return 1 + len(self._seen)

    def _responsible(self, allowed: float, active: list[str]) -> list[str]:
        """A set to disable of which none can be left out; empty when the difference stays whatever is disabled."""
        minimizer = Minimizer[str](lambda disabled: self._difference(disabled) <= allowed)
        candidates: list[str] = []
        while new := [name for name in active if name not in candidates]:
            candidates += new
            if minimizer.holds(candidates):
                break
            active = self._active(candidates)  # what had nothing left to do before
        if not minimizer.holds(candidates):
            return []
        smallest = minimizer.minimize(candidates)
        if RULE_BASED in smallest:
            rules = [*RULES, *(name for name in smallest if name != RULE_BASED)]
            if minimizer.holds(rules):  # else a rule that is not in the list
                smallest = minimizer.minimize(rules)
        return smallest

    def _culprit(self, name: str, disabled: Collection[str]) -> Culprit:
        others = [other for other in disabled if other != name]
        rewrites: list[Rewrite] = []
        for program in self._programs:
            without = set(self._replacements(program, disabled))
            alone = dict.fromkeys(self._replacements(program, others))
            rewrites += (Rewrite(program.name, *change) for change in alone if change not in without)
        return Culprit(name, self._difference(frozenset(others)), tuple(rewrites))

    def _replacements(self, program: Program, disabled: Collection[str]) -> list[Replaced]:
        backend = OrtBackend(
            self._backend.spec, disabled_optimizers=sorted(disabled), threads=self._backend.runtime.threads
        )
        with closing(backend.open(program)) as session:
            return [(r.original, r.operators) for r in session.optimized_nodes()]

    def _active(self, disabled: Collection[str]) -> list[str]:
        runtime, level = self._backend.runtime, self._backend.level
        names = (n for p in self._programs for n in active_optimizers(runtime, p.graph, level, disabled))
        return list(dict.fromkeys(names))

    def _difference(self, disabled: frozenset[str], level: str | None = None) -> float:
        """Relative L2 from the unoptimized program; 0 where all outputs are equal bit for bit."""
        key = (level or self._levels[-1], disabled)
        if key not in self._seen:
            self._seen[key] = gap(self._unoptimized, self._outputs(*key))
        return self._seen[key]

    def _outputs(self, level: str, disabled: frozenset[str]) -> dict[str, Arrays]:
        graphs = {program.name: program.graph for program in self._programs}

        def run(component: Component, inputs: Arrays) -> Arrays:
            graph = graphs[component.name]
            session = self._backend.runtime.session(graph.path, level=level, disabled_optimizers=sorted(disabled))
            return run_whole(session, graph, inputs)

        return walk(self._model, self._sample, run)


class _PropertySearch(_OptimizerSearch):
    @property
    def _levels(self) -> list[str]:
        return ["all"]

    def _replacements(self, program: Program, disabled: Collection[str]) -> list[Replaced]:
        return self._layers(program, disabled)[0]

    def _layers(self, program: Program, disabled: Collection[str]) -> tuple[list[Replaced], dict[str, Any]]:
        with closing(self._backend.without(disabled).open(program)) as session:
            return session.layers, session.settings

    def _active(self, disabled: Collection[str]) -> list[str]:
        """Properties that change a layer of the compiled model, or what is read back of it."""
        now = [self._layers(program, disabled) for program in self._programs]
        left = [name for name in self._backend.knobs if name not in disabled]
        return [name for name in left if now != [self._layers(p, {*disabled, name}) for p in self._programs]]

    def _outputs(self, level: str, disabled: frozenset[str]) -> dict[str, Arrays]:
        backend = self._backend.without(self._backend.knobs if level == "none" else disabled)
        with Pipeline(self._model, self._programs, backend) as pipeline:
            return pipeline.run(self._sample)


def blame_compiler(
    model: Model, programs: Sequence[Program], backend: Backend, sample: Sample, noise_floor: float
) -> OptimizerBlame:
    """Find the step of ``torch-compile`` that makes its outputs differ from eager's in the same precision.

    Without a difference above ``noise_floor`` (relative L2) nothing is searched. A step is responsible where no more
    than the noise floor, or ``REST`` of the whole difference, remains without it. Raises InputError when the model
    fails.
    """
    differences: list[float] = []

    def outputs(backend: Backend) -> dict[str, Arrays]:
        with Pipeline(model, programs, backend) as pipeline:
            return pipeline.run(sample)

    eager = replace(backend.spec, name=backend.spec.name.replace(COMPILED, "torch", 1), options="")
    expected = outputs(create(eager))

    def difference() -> float:
        differences.append(gap(expected, outputs(create(backend.spec))))
        return differences[-1]

    whole = difference()
    if whole <= noise_floor:
        return OptimizerBlame(None, whole, whole, runs=2)
    allowed = max(noise_floor, REST * whole)
    from torch._inductor.compiler_bisector import BACKENDS, CompilerBisector, ConfigChange

    with redirect_stdout(io.StringIO()):
        found = CompilerBisector.do_bisect(lambda: difference() <= allowed)
    stage, runs = found.backend if found else None, 1 + len(differences)
    if found is None or found.subsystem is None:
        return OptimizerBlame(stage, whole, whole, active=["all that torch can disable there"], runs=runs)
    name, number = found.subsystem, found.bisect_number or 0
    setting = next((s for s in BACKENDS[found.backend] if s.name == name and isinstance(s, ConfigChange)), None)
    if setting is not None:
        told = f"{setting.config_field} = {setting.config_value}"
        culprit, fix = Culprit(told, whole, ()), f"torch._inductor.config.{told}"
    else:
        what = re.sub(r"<OpOverload\(op='(.+?)'.*", r"\1", found.debug_info or f"number {number}")
        culprit = Culprit(f"{name.rstrip('s')} of {what}", whole, ())
        fix = f"TORCH_BISECT_BACKEND={found.backend} TORCH_BISECT_SUBSYSTEM={name} TORCH_BISECT_MAX={number - 1}"
        fix += " leaves out this one and all behind it"
    return OptimizerBlame(stage, whole, min(differences), [culprit], runs=runs, fix=fix)
