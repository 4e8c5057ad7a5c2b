"""Sensitivity of layers to INT8: the share of each in what it does to the outputs, and what leaving it out gives.

All shares come from one walk backward a sample (``bisect/backward.py``); the layers with the largest are left out, one
by one, and the model is run.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from cp_debug.backends.base import Program
from cp_debug.backends.narrow_options import NarrowOptions
from cp_debug.backends.registry import create
from cp_debug.backends.spec import BackendSpec
from cp_debug.bisect.backward import Backward, shares_over
from cp_debug.detection.evaluation import ConfidenceInterval
from cp_debug.display import OnStep
from cp_debug.errors import InputError
from cp_debug.graph.graph import Node
from cp_debug.graph.operators import QUANTIZERS
from cp_debug.minimize import smallest
from cp_debug.mixed_precision.goal import check_budget
from cp_debug.mixed_precision.layers import FusionGroup, Kept, TrialPrecision, nodes_of
from cp_debug.mixed_precision.runners import EmulatedRunner
from cp_debug.mixed_precision.trials import Measured, Results, draws_of_scores
from cp_debug.programs.layers import layer_name
from cp_debug.programs.pipeline import choose_export, prepare
from cp_debug.quantization.models import ErrorSum, QuantizedComponent, with_modules
from cp_debug.quantization.narrow_layers import weighted_layers
from cp_debug.quantization.quantized_programs import nodes_by_layer, quantized_programs
from cp_debug.recipes.abilities import DetectsBoxes, HasClasses, HasData
from cp_debug.recipes.base import Arrays, Component, Model, Sample
from cp_debug.recipes.data.base import DataOptions, DataSet, Truth, iterate
from cp_debug.recipes.data.open_data import DEFAULT_OPTIONS
from cp_debug.safe_text import did_you_mean
from cp_debug.serialize import JsonForm

if TYPE_CHECKING:
    import pandas as pd

KeptLayers = frozenset[str]
"""Names of the layers that stay in FP32."""


def relative_errors(model: str, outputs: Mapping[str, ErrorSum]) -> dict[str, float]:
    """Output → its error. Raises InputError where all are 0 in both runs, as far as they are finite: that is no error
    of 0."""
    if not any(error.whole or error.difference for error in outputs.values()):
        names = ", ".join(outputs) or "none"
        raise InputError(f"{model}: no error of an output can be measured: no finite number but 0 in {names}")
    return {name: error.relative for name, error in outputs.items()}


class LayerRunner:
    """A model whose layers can each compute in FP32 or low, on the emulator, sample by sample."""

    def __init__(
        self,
        model: Model,
        programs: Sequence[Program],
        precision: str,
        layers: Mapping[str, tuple[Program, Sequence[Node]]],
        folder: TemporaryDirectory[str] | None = None,
    ) -> None:
        """``precision``: as a backend spec has it. ``layers``: by name the nodes of a program that compute it, one for
        each call. ``folder`` has the files of the graphs, and lives as long as this."""
        self.model, self.precision, self._folder = model, precision, folder
        of, self._nodes = TrialPrecision(precision), layers
        self.layers = {
            name: FusionGroup(program.name, tuple(node.name for node in nodes), name)
            for name, (program, nodes) in layers.items()
        }
        self._others = frozenset(
            FusionGroup(p.name, tuple(of.candidates(p.graph) - nodes_of(self.layers.values(), p.name)), "")
            for p in programs
        )
        """Nodes that the precision takes, but that are of no layer; they stay in FP32."""
        self.emulator = EmulatedRunner(model, programs, [], of, "cpu")
        self.notes: list[str] = []
        """Sentences about layers whose shares are not complete, and why."""

    @property
    def all(self) -> KeptLayers:
        """Everything in FP32."""
        return frozenset(self.layers)

    def _kept(self, names: KeptLayers) -> Kept:
        return self._others | {self.layers[name] for name in names}

    def measure(
        self,
        samples: Sequence[Sample],
        trials: Iterable[KeptLayers],
        *,
        draws: int = 200,
        on_step: OnStep = lambda text, done, total: None,
    ) -> dict[KeptLayers, Measured]:
        """Run each set of kept layers on the samples; those with ground truth are scored where the model detects.

        Raises InputError for a layer that the model does not have.
        """
        outputs: dict[KeptLayers, dict[str, ErrorSum]] = {kept: defaultdict(ErrorSum) for kept in trials}
        detected: dict[KeptLayers, list[DetectsBoxes]] = {kept: [] for kept in outputs}
        if unknown := frozenset().union(*outputs) - self.all:
            hint = did_you_mean(min(unknown), self.layers)
            raise InputError(f"{self.model.name} has no quantized layer {min(unknown)!r}{hint}")
        scored = is_scored(self.model, samples)
        for number, sample in enumerate(samples):
            runner = self.emulator.on([sample])
            runner.prepare()
            if len(outputs) > 2:
                runner.remember(self._others)
            for place, kept in enumerate(outputs):
                on_step(f"{sample.source}: {place + 1} of {len(outputs)}", number, len(samples))
                (results,) = runner.run(self._kept(kept))
                for name, array in results[self.model.components[-1].name].items():
                    outputs[kept][name].add(array, runner.exact[0][name])
                if scored:
                    detected[kept].append(self.model.decode(sample, results))  # type: ignore[arg-type]
        on_step("scoring", len(samples), len(samples))
        measured = {}
        for kept, sums in outputs.items():
            errors = relative_errors(self.model.name, sums)
            scores = draws_of_scores(self.model, detected[kept], samples, draws) if scored else {}
            measured[kept] = Measured({"rel_l2": max(errors.values())}, errors, scores)
        return measured

    def shares(self, samples: Sequence[Sample]) -> list[LayerSensitivity]:
        """Share of each layer in what all of them low are off from FP32, over all samples: one walk backward each."""
        own = dict.fromkeys(self.layers, 0.0)

        def run(_: int, sample: Sample) -> tuple[Arrays, Results, Callable[[Component], Backward]]:
            runner = self.emulator.on([sample])
            runner.prepare()
            for name, layer in self.layers.items():
                own[name] += runner.local_error(layer) ** 2 / len(samples)
            return runner.divergence(0, self._others)

        shares = self.emulator.by_node(shares_over(self.model, samples, run, self.notes))
        return [
            LayerSensitivity(
                name, self._nodes[name][1][0].op, self._weights(name), own[name] ** 0.5, layer.share(shares)
            )
            for name, layer in self.layers.items()
        ]

    def _weights(self, name: str) -> int:
        """Elements of a layer's weight, which may stand behind a quantizer."""
        program, nodes = self._nodes[name]
        graph, inputs = program.graph, nodes[0].proto.input
        weight = inputs[1] if len(inputs) > 1 else ""
        while (maker := graph.producer.get(weight)) is not None and maker.op in QUANTIZERS:
            weight = maker.inputs[0]
        return math.prod(graph.weight(weight).dims) if weight in graph.initializers else 0


def int8_runner(model: Model, parts: Mapping[str, QuantizedComponent], sample: Sample) -> LayerRunner:
    """The layers of components in INT8, by their names in ``Scales``; torch modules are exported, with ``sample``.

    Raises InputError when no layer is quantized.
    """
    folder = TemporaryDirectory(prefix="cpdebug-sensitivity-")
    folded = with_modules(model, {name: part.folded for name, part in parts.items() if part.folded is not None})
    programs = quantized_programs(folded, _exported(folded, sample, folder), parts, sample, Path(folder.name))
    layers: dict[str, tuple[Program, list[Node]]] = {}
    for program in programs:
        by_name = {node.name: node for node in program.graph.nodes}
        for name, nodes in nodes_by_layer(parts[program.name].scales, program.alignment, program.graph).items():
            if nodes:
                layers[name] = program, [by_name[node] for node in nodes]
    if not layers:
        raise InputError(f"MODEL: no layer of {model.name} is quantized")
    return LayerRunner(folded, programs, "int8", layers, folder)


def narrow_runner(model: Model, precision: str, sample: Sample) -> LayerRunner:
    """Every layer with a weight that ``precision`` (``fp8:channel``) takes, with the scales of the numbers at hand;
    torch modules are exported, with ``sample``. Raises InputError where there is none."""
    folder = TemporaryDirectory(prefix="cpdebug-sensitivity-")
    options, programs = NarrowOptions.parse(precision), _exported(model, sample, folder)
    layers: dict[str, tuple[Program, list[Node]]] = {}
    for program in programs:
        for node in weighted_layers(program.graph, options):
            name = layer_name(program, node.outputs[0])
            name = f"{name} ({node.name})" if name in layers else name  # a module that is called twice
            layers[name] = program, [node]
    if not layers:
        raise InputError(f"MODEL: {model.name} has no layer with a weight that {options} takes")
    return LayerRunner(model, programs, str(options), layers, folder)


def _exported(model: Model, sample: Sample, folder: TemporaryDirectory[str]) -> list[Program]:
    how, _ = choose_export([create(BackendSpec("emu-fp32"))], None)
    return prepare(model, sample, Path(folder.name), how=how, folded=True)


def is_scored(model: Model, samples: Sequence[Sample]) -> bool:
    """Whether detections are scored: the model has classes, and all samples have ground truth."""
    return all(isinstance(sample.truth, Truth) for sample in samples) and isinstance(model, HasClasses)


TRIED = 16
"""Layers that are left out one by one."""
DRAWS = 200
METRIC = "mAP"
"""Score that a budget limits the loss of, where the model detects; else it limits the outputs' relative L2 error."""


@dataclass(frozen=True)
class Int8Effect(JsonForm):
    """Effect of INT8 on the model."""

    error: float
    """Relative L2 of the outputs against FP32, root mean square over them."""
    scores: Mapping[str, ConfidenceInterval] = field(metadata={"written": False})
    """Change of mAP and NDS where the model detects: against FP32, or for a left-out layer against all in INT8."""

    @property
    def sqnr(self) -> float:
        """Signal to quantization noise of the outputs, in dB."""
        return -20 * math.log10(self.error) if self.error else math.inf

    def derived(self) -> dict[str, Any]:
        """The error in dB, and the change of each score as value, low and high."""
        return {"sqnr_db": self.sqnr, **self.scores}

    @classmethod
    def fields_from(cls, document: dict[str, Any]) -> dict[str, Any]:
        """The document with what is neither ``error`` nor ``sqnr_db`` under ``scores``."""
        return document | {"scores": {k: v for k, v in document.items() if k not in ("error", "sqnr_db")}}


@dataclass(frozen=True)
class LayerSensitivity:
    """What one layer's precision does."""

    layer: str
    kind: str
    weights: int
    introduced: float
    """Relative L2 error of its own results."""
    share: float
    """Part of the outputs' divergence, all layers in INT8, that its own error makes."""
    left_out: Int8Effect | None = None
    """All in INT8 but this layer; None where that was not tried, as its share is small."""

    @property
    def severity(self) -> tuple[float, ...]:
        """Sort key, larger is worse: mAP that leaving it out surely gives back, then the error without it, smaller
        first, then its share where that was not tried."""
        if self.left_out is None:
            return 0.0, -math.inf, self.share
        change = self.left_out.scores.get(METRIC)
        return max(change.low, 0.0) if change else 0.0, -self.left_out.error, self.share


@dataclass(frozen=True)
class Choice:
    """The layers that stay in FP32 so that a budget is kept, and what was measured with them."""

    budget: float
    skipped: list[str]
    loss: ConfidenceInterval
    """mAP lost against FP32; the outputs' relative L2 error for a model that detects nothing."""
    tried: int
    """Number of sets of layers that were run on all samples."""


@dataclass(frozen=True)
class SensitivityProfile(JsonForm):
    """All layers, the most sensitive first."""

    model: str
    data: str
    samples: int
    layers: list[LayerSensitivity]
    int8: Int8Effect
    """All layers in INT8."""
    scores: Mapping[str, float] = field(metadata={"key": "fp32"})
    """mAP and NDS in FP32; empty for a model that detects nothing."""
    choice: Choice | None = field(default=None, metadata={"key": "auto"})
    seconds: float = 0.0
    precision: str = "int8"
    """Precision of the layers, as a backend spec has it; where ``int8`` stands elsewhere, this is meant."""
    notes: list[str] = field(default_factory=list)
    """Sentences about layers whose shares are not complete, and why."""

    def to_pandas(self) -> pd.DataFrame:
        """A pandas DataFrame with a row for each layer."""
        import pandas as pd

        rows = []
        for row in self.layers:
            names = ("layer", "kind", "weights", "introduced", "share")
            flat: dict[str, Any] = {name: getattr(row, name) for name in names}
            if row.left_out is not None:
                flat |= {"left_out_error": row.left_out.error, "left_out_sqnr_db": row.left_out.sqnr}
                for name, change in row.left_out.scores.items():
                    bounds = zip(("", "_low", "_high"), change, strict=True)
                    flat |= {f"left_out_{name}{bound}": value for bound, value in bounds}
            rows.append(flat)
        return pd.DataFrame(rows)


def profile_of(
    runner: LayerRunner,
    samples: Sequence[Sample],
    *,
    data: str = "",
    budget: float | None = None,
    draws: int = DRAWS,
    tried: int = TRIED,
    on_step: OnStep = lambda text, done, total: None,
) -> SensitivityProfile:
    """Measure every layer of ``runner`` on ``samples``, with its precision emulated.

    Samples with ground truth are scored where the model detects. ``budget`` also chooses the layers to leave in FP32
    (``choose_layers``). ``draws`` of the samples give the intervals. ``tried``: layers that are left out one by one,
    the largest shares first. Raises InputError where there is no sample, or a budget of mAP meets samples without
    ground truth.
    """
    started, model = time.perf_counter(), runner.model
    check_samples(samples)
    unknown = [sample.source for sample in samples if sample.truth is None]
    if budget is not None and unknown and isinstance(model, HasClasses):
        raise InputError(f"--auto: {unknown[0]} has no ground truth, so mAP is unknown; expected an info file (.pkl)")
    on_step("shares of all layers", 0, len(samples))
    rows = sorted(runner.shares(samples), key=lambda row: -row.share)
    alone = {row.layer: frozenset([row.layer]) for row in rows[:tried]}
    sets = dict.fromkeys([runner.all, frozenset(), *alone.values()])
    measured = runner.measure(samples, sets, draws=draws, on_step=on_step)
    exact, low = measured[runner.all], measured[frozenset()]
    left_out = {name: _effect(measured[kept], low) for name, kept in alone.items()}
    layers = [replace(row, left_out=left_out.get(row.layer)) for row in rows]
    profile = SensitivityProfile(
        model.name,
        data,
        len(samples),
        sorted(layers, key=lambda row: row.severity, reverse=True),
        _effect(low, exact),
        {score: float(values[0]) for score, values in exact.draws.items()},
        precision=runner.precision,
        notes=list(dict.fromkeys(runner.notes)),
    )
    if budget is not None:
        profile = replace(profile, choice=choose_layers(runner, samples, profile, budget, draws=draws, on_step=on_step))
    return replace(profile, seconds=time.perf_counter() - started)


def check_samples(samples: Sequence[Sample]) -> None:
    """Raise InputError where there is no sample to measure on."""
    if not samples:
        raise InputError("--data: there is no sample; expected at least one")


def scored_samples(
    model: Model, data: Path | None, count: int, first: int = 0, options: DataOptions = DEFAULT_OPTIONS
) -> tuple[str, list[Sample]]:
    """(Name of the data, at most ``count`` samples of them); samples have ground truth where the data have it."""
    if isinstance(model, HasData):
        opened: DataSet = model.data(data, count, first, options)
        return opened.name, list(iterate(opened))
    return data.name if data else f"seed {first}", list(model.samples(count, first, data))


def _effect(test: Measured, before: Measured) -> Int8Effect:
    return Int8Effect(test.error, {score: test.change(score, before) for score in test.draws})


def choose_layers(
    runner: LayerRunner,
    samples: Sequence[Sample],
    profile: SensitivityProfile,
    budget: float,
    *,
    draws: int = 1000,
    on_step: OnStep = lambda text, done, total: None,
) -> Choice:
    """Few layers to leave in FP32 so that the rest loses at most ``budget`` mAP on ``samples``.

    Those that the profile predicts to be enough are tried first (``get_sensitive_layers``), then the most sensitive,
    twice as many each time, until the budget is kept; then each that is not needed is given back. Every set is run on
    all samples. For a model that detects nothing, ``budget`` is the relative L2 error of the outputs. Raises InputError
    for a budget that nothing can keep.
    """
    check_budget(budget)
    ranked, predicted = [row.layer for row in profile.layers], get_sensitive_layers(profile, budget)
    measured = runner.measure(samples, dict.fromkeys([runner.all, frozenset()]), draws=draws, on_step=on_step)

    def loss(kept_layers: KeptLayers) -> ConfidenceInterval:
        if kept_layers not in measured:
            measured.update(runner.measure(samples, [kept_layers], draws=draws, on_step=on_step))
        return _loss(measured[kept_layers], measured[runner.all])

    smallest_set = smallest(
        lambda kept_layers: loss(kept_layers).value <= budget,
        lambda grown: [name for name in ranked if name not in grown][: max(1, len(grown))],
        predicted if len(predicted) < len(ranked) else (),
    )
    chosen = ranked if smallest_set is None else smallest_set  # all in FP32 lose nothing
    return Choice(budget, chosen, loss(frozenset(chosen)), len(measured))


def _loss(test: Measured, reference: Measured) -> ConfidenceInterval:
    if METRIC not in test.draws:
        return ConfidenceInterval(test.error, test.error, test.error)
    return ConfidenceInterval.of(reference.draws[METRIC] - test.draws[METRIC])


def get_sensitive_layers(profile: SensitivityProfile, budget: float) -> list[str]:
    """The layers to leave in FP32, as the profile alone predicts it; ``choose_layers`` begins with them.

    These are the most sensitive ones until the others, their losses added up, are within ``budget`` (mAP, or the
    outputs' relative L2 error).
    """
    limit, left = budget, profile.int8.error
    gains: dict[str, float] = {}
    if METRIC in profile.int8.scores:
        left = -profile.int8.scores[METRIC].value
        gains = {row.layer: max(row.left_out.scores[METRIC].value, 0.0) for row in profile.layers if row.left_out}
    else:  # squares of errors add up
        limit, left = budget**2, left**2
        gains = {row.layer: max(row.share, 0.0) * left for row in profile.layers}
    taken: list[str] = []
    for row in profile.layers:
        if left - sum(gains.get(name, 0.0) for name in taken) <= limit:
            break
        taken.append(row.layer)
    return taken
