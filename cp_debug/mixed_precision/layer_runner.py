"""Shares and trials of layers in a low precision: INT8, FP8, block-scaled types and INT4, emulated on graphs."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np

from cp_debug.backends.arithmetic import ARITHMETICS
from cp_debug.backends.base import Program
from cp_debug.backends.narrow_options import NarrowOptions
from cp_debug.backends.registry import create
from cp_debug.backends.spec import BackendSpec
from cp_debug.bisect.backward import Backward, shares_over
from cp_debug.detection.boxes import Predictions
from cp_debug.detection.evaluate import as_detector
from cp_debug.detection.evaluation import EvaluationOptions, draws_of
from cp_debug.errors import InputError
from cp_debug.graph.graph import Graph, Node
from cp_debug.graph.operators import QUANTIZERS
from cp_debug.mixed_precision.judge import Results
from cp_debug.mixed_precision.mixed_graph import Computed, MixedExecutor
from cp_debug.mixed_precision.trial import Measured
from cp_debug.programs.layers import layer_name
from cp_debug.programs.pipeline import choose_export, prepare
from cp_debug.programs.walk import walk
from cp_debug.quantization.models import ErrorSum, QuantizedComponent, with_modules
from cp_debug.quantization.narrow_layers import weighted_layers
from cp_debug.quantization.quantized_programs import nodes_by_layer, quantized_programs
from cp_debug.recipes.abilities import DetectsBoxes, HasClasses
from cp_debug.recipes.base import Arrays, Component, Model, Sample
from cp_debug.recipes.data.base import Truth
from cp_debug.safe_text import did_you_mean

SCORES = ("mAP", "NDS")
OnStep = Callable[[str, int, int], None]
KeptLayers = frozenset[str]
"""Names of the layers that stay in FP32."""


class LayerShare(NamedTuple):
    """What one layer's precision does."""

    share: float
    """Part of the divergence of the outputs, all layers low, that it makes."""
    introduced: float
    """Relative L2 error of its own results, from the inputs that it has in FP32."""


@dataclass(frozen=True)
class LowLayer:
    """A layer that can compute low: the nodes that compute it in one component's graph, one for each call."""

    component: str
    nodes: tuple[str, ...]
    kind: str
    """Operator of the nodes."""
    weights: int

    @classmethod
    def of(cls, component: str, graph: Graph, nodes: Sequence[Node]) -> LowLayer:
        """The layer of these nodes; its weight may stand behind a quantizer."""
        weight = nodes[0].proto.input[1] if len(nodes[0].proto.input) > 1 else ""
        while (maker := graph.producer.get(weight)) is not None and maker.op in QUANTIZERS:
            weight = maker.inputs[0]
        size = math.prod(graph.weight(weight).dims) if weight in graph.initializers else 0
        return cls(component, tuple(node.name for node in nodes), nodes[0].op, size)


def relative_errors(model: str, outputs: Mapping[str, ErrorSum]) -> dict[str, float]:
    """Output → its error. Raises InputError where all are 0 in both runs, as far as they are finite: that is no error
    of 0."""
    if not any(error.whole or error.difference for error in outputs.values()):
        names = ", ".join(outputs) or "none"
        raise InputError(f"{model}: no error of an output can be measured: no finite number but 0 in {names}")
    return {name: error.relative for name, error in outputs.items()}


@dataclass
class LayerRunner:
    """A model whose layers can each compute in FP32 or low, on the executor.

    Each sample runs once in FP32 and once with all layers low; a trial computes only what its layers reach.
    """

    model: Model
    executors: Mapping[str, MixedExecutor]
    """By component."""
    layers: Mapping[str, LowLayer]
    """Those that can be low, by name."""
    precision: str
    """As a backend spec has it."""
    notes: list[str] = field(default_factory=list)
    """Sentences about layers whose shares are not complete, and why."""
    folder: TemporaryDirectory[str] | None = None
    """Files of the graphs, which live as long as this."""

    @classmethod
    def of(
        cls, model: Model, programs: Sequence[Program], precision: str, layers: Mapping[str, LowLayer]
    ) -> LayerRunner:
        """``precision``: as a backend spec has it. Raises InputError where no layer can be in it."""
        if not layers:
            raise InputError(f"MODEL: {model.name} has no layer with a weight that {precision} takes")
        arithmetic = ARITHMETICS[precision]
        return cls(model, {p.name: MixedExecutor(p.graph, arithmetic, "cpu") for p in programs}, layers, precision)

    @property
    def all(self) -> KeptLayers:
        """Everything in FP32."""
        return frozenset(self.layers)

    @property
    def _last(self) -> str:
        return self.model.components[-1].name

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
            exact, expected = self._run(sample, self.all)
            low, _ = self._run(sample, frozenset(), [exact])
            for place, kept in enumerate(outputs):
                on_step(f"{sample.source}: {place + 1} of {len(outputs)}", number, len(samples))
                results = expected if kept == self.all else self._run(sample, kept, [exact, low])[1]
                for name, array in results[self._last].items():
                    outputs[kept][name].add(array, expected[self._last][name])
                if scored:
                    detected[kept].append(self.model.decode(sample, results))  # type: ignore[arg-type]
        on_step("scoring", len(samples), len(samples))
        return {kept: measured_of(self.model, outputs[kept], detected[kept], samples, draws) for kept in outputs}

    def shares(self, samples: Sequence[Sample]) -> dict[str, LayerShare]:
        """Share of each layer in what all of them low are off from FP32, over all samples: one walk backward each."""
        names = {(layer.component, node): name for name, layer in self.layers.items() for node in layer.nodes}
        own = dict.fromkeys(self.layers, 0.0)

        def run(_: int, sample: Sample) -> tuple[Arrays, Results, Callable[[Component], Backward]]:
            exact, expected = self._run(sample, self.all)
            low, results = self._run(sample, frozenset(), [exact])
            for name, layer in self.layers.items():
                error = self.executors[layer.component].local_error(layer.nodes, exact[layer.component])
                own[name] += error**2 / len(samples)
            return expected[self._last], results, lambda c: self.executors[c.name].backward(low[c.name])

        shares = defaultdict[str, float](float)
        for (component, value), share in shares_over(self.model, samples, run, self.notes).items():
            node = self.executors[component].graph.producer[value].name
            shares[names.get((component, node), "")] += share
        return {name: LayerShare(shares[name], own[name] ** 0.5) for name in self.layers}

    def _run(
        self, sample: Sample, kept: KeptLayers, known: Sequence[dict[str, Computed]] = ()
    ) -> tuple[dict[str, Computed], Results]:
        layers = [layer for name, layer in self.layers.items() if name not in kept]
        low = {(layer.component, node) for layer in layers for node in layer.nodes}
        computed: dict[str, Computed] = {}

        def run(component: Component, inputs: Arrays) -> Arrays:
            executor = self.executors[component.name]
            high = frozenset(n.name for n in executor.graph.nodes if (component.name, n.name) not in low)
            computed[component.name] = executor.run(inputs, high, [each[component.name] for each in known])
            return executor.outputs(computed[component.name])

        return computed, walk(self.model, sample, run)


def int8_runner(model: Model, parts: Mapping[str, QuantizedComponent], sample: Sample) -> LayerRunner:
    """The layers of components in INT8, by their names in ``Scales``; torch modules are exported, with ``sample``.

    Raises InputError when no layer is quantized.
    """
    folder = TemporaryDirectory(prefix="cpdebug-sensitivity-")
    folded = with_modules(model, {name: part.folded for name, part in parts.items() if part.folded is not None})
    programs = quantized_programs(folded, _exported(folded, sample, folder), parts, sample, Path(folder.name))
    layers: dict[str, LowLayer] = {}
    for program in programs:
        by_name = {node.name: node for node in program.graph.nodes}
        for name, nodes in nodes_by_layer(parts[program.name].scales, program.alignment, program.graph).items():
            if nodes:
                layers[name] = LowLayer.of(program.name, program.graph, [by_name[node] for node in nodes])
    if not layers:
        raise InputError(f"MODEL: no layer of {model.name} is quantized")
    runner = LayerRunner.of(folded, programs, "int8", layers)
    runner.folder = folder
    return runner


def narrow_runner(model: Model, precision: str, sample: Sample) -> LayerRunner:
    """Every layer with a weight that ``precision`` (``fp8:channel``) takes, with the scales of the numbers at hand;
    torch modules are exported, with ``sample``. Raises InputError where there is none."""
    folder = TemporaryDirectory(prefix="cpdebug-sensitivity-")
    options, layers, programs = NarrowOptions.parse(precision), dict[str, LowLayer](), _exported(model, sample, folder)
    for program in programs:
        for node in weighted_layers(program.graph, options):
            name = layer_name(program, node.outputs[0])
            name = f"{name} ({node.name})" if name in layers else name  # a module that is called twice
            layers[name] = LowLayer.of(program.name, program.graph, [node])
    runner = LayerRunner.of(model, programs, str(options), layers)
    runner.folder = folder
    return runner


def _exported(model: Model, sample: Sample, folder: TemporaryDirectory[str]) -> list[Program]:
    how, _ = choose_export([create(BackendSpec("emu-fp32"))], None)
    return prepare(model, sample, Path(folder.name), how=how, folded=True)


def is_scored(model: Model, samples: Sequence[Sample]) -> bool:
    """Whether detections are scored: the model has classes, and all samples have ground truth."""
    return all(isinstance(sample.truth, Truth) for sample in samples) and isinstance(model, HasClasses)


def draws_of_scores(
    model: Model, detected: Sequence[DetectsBoxes], samples: Sequence[Sample], draws: int
) -> dict[str, np.ndarray]:
    """mAP and NDS in each draw of the samples, float64 [1 + draws]; the first is of all of them."""
    detector = as_detector(model)
    options = EvaluationOptions(region=detector.region, draws=draws)
    truths = [sample.truth for sample in samples]
    scores = draws_of(Predictions.gather(detected), truths, detector.class_names, options)
    return {name: scores[name] for name in SCORES}


def measured_of(
    model: Model,
    outputs: Mapping[str, ErrorSum],
    detected: Sequence[DetectsBoxes],
    samples: Sequence[Sample],
    draws: int,
) -> Measured:
    """Figures of one set over the samples; scores where there are detections."""
    errors = relative_errors(model.name, outputs)
    scores = draws_of_scores(model, detected, samples, draws) if detected else {}
    return Measured({"rel_l2": max(errors.values())}, errors, scores)
