"""Shares and trials of layers in FP8, block-scaled types and INT4, emulated."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from cp_debug.backends.arithmetic import ARITHMETICS
from cp_debug.backends.base import Program
from cp_debug.backends.narrow_options import NarrowOptions
from cp_debug.bisect.backward import Backward, shares_over
from cp_debug.detection.changes import Detected
from cp_debug.errors import InputError
from cp_debug.mixed_precision.fake_quant_runner import (
    ErrorSum,
    KeptLayers,
    LayerShare,
    OnStep,
    is_scored,
    measured_of,
)
from cp_debug.mixed_precision.mixed_graph import Computed, MixedExecutor
from cp_debug.mixed_precision.trial import Measured
from cp_debug.programs.layers import layer_name
from cp_debug.programs.walk import walk
from cp_debug.quantization.narrow_layers import weighted_layers
from cp_debug.recipes.base import Arrays, Component, Model, Sample


@dataclass(frozen=True)
class EmulatedLayer:
    """A layer with a weight, in one component's graph."""

    component: str
    node: str
    kind: str
    """Operator of the node."""
    weights: int


class NarrowRunner:
    """A model whose layers with weights can each compute in a narrow precision, on the executor.

    Scales are those of the numbers at hand. Each sample runs once in FP32 and once with all layers low; a trial
    computes only what its layers reach.
    """

    def __init__(self, model: Model, programs: Sequence[Program], precision: str) -> None:
        """``precision``: as a backend spec has it, ``fp8:channel``. Raises InputError where no layer can be in it."""
        self.model, options = model, NarrowOptions.parse(precision)
        self.layers: dict[str, EmulatedLayer] = {}
        for program in programs:
            for node in weighted_layers(program.graph, options):
                name = layer_name(program, node.outputs[0])
                if name in self.layers:  # a module that is called twice
                    name = f"{name} ({node.name})"
                held = node.proto.input[1] in program.graph.initializers
                size = math.prod(program.graph.weight(node.proto.input[1]).dims) if held else 0
                self.layers[name] = EmulatedLayer(program.name, node.name, node.op, size)
        if not self.layers:
            raise InputError(f"MODEL: {model.name} has no layer with a weight that {options.family} takes")
        self.all: KeptLayers = frozenset(self.layers)
        """Everything in FP32."""
        self.notes: list[str] = []
        """Sentences about layers whose shares are not complete, and why."""
        self._executors = {p.name: MixedExecutor(p.graph, ARITHMETICS[str(options)], "cpu") for p in programs}
        self._last = model.components[-1].name

    def nodes_in(self, kept_layers: KeptLayers) -> frozenset[tuple[str, str]]:
        """(Component, layer) of a set: its name in a log."""
        return frozenset((self.layers[name].component, name) for name in kept_layers)

    def measure(
        self,
        samples: Sequence[Sample],
        trials: Iterable[KeptLayers],
        *,
        draws: int = 200,
        on_step: OnStep = lambda text, done, total: None,
    ) -> dict[KeptLayers, Measured]:
        """Run each set of kept layers on the samples; those with ground truth are scored where the model detects."""
        outputs: dict[KeptLayers, dict[str, ErrorSum]] = {kept: defaultdict(ErrorSum) for kept in trials}
        detected: dict[KeptLayers, list[Detected]] = {kept: [] for kept in outputs}
        scored = is_scored(self.model, samples)
        for number, sample in enumerate(samples):
            exact, expected = self._run(sample, self.all, [])
            low, _ = self._run(sample, frozenset(), [exact])
            for place, kept in enumerate(outputs):
                on_step(f"{sample.source}: {place + 1} of {len(outputs)}", number, len(samples))
                _, results = self._run(sample, kept, [exact, low])
                for name, array in results[self._last].items():
                    outputs[kept][name].add(array, expected[self._last][name])
                if scored:
                    detected[kept].append(self.model.decode(sample, results))  # type: ignore[arg-type]
        return {kept: measured_of(self.model, outputs[kept], detected[kept], samples, draws) for kept in outputs}

    def shares(self, samples: Sequence[Sample]) -> dict[str, LayerShare]:
        """Share of each layer in what all of them low are off from FP32, over all samples: one walk backward each."""
        names = {(layer.component, layer.node): name for name, layer in self.layers.items()}
        own = dict.fromkeys(self.layers, 0.0)

        def run(_: int, sample: Sample) -> tuple[Arrays, dict[str, Arrays], Callable[[Component], Backward]]:
            exact, expected = self._run(sample, self.all, [])
            low, results = self._run(sample, frozenset(), [exact])
            for name, layer in self.layers.items():
                error = self._executors[layer.component].local_error([layer.node], exact[layer.component])
                own[name] += error**2 / len(samples)
            return expected[self._last], results, lambda c: self._executors[c.name].backward(low[c.name])

        shares = defaultdict[str, float](float)
        for (component, value), share in shares_over(self.model, samples, run, self.notes).items():
            node = self._executors[component].graph.producer[value].name
            shares[names.get((component, node), "")] += share
        return {name: LayerShare(shares[name], own[name] ** 0.5) for name in self.layers}

    def _run(
        self, sample: Sample, kept: KeptLayers, known: Sequence[dict[str, Computed]]
    ) -> tuple[dict[str, Computed], dict[str, Arrays]]:
        low = {(layer.component, layer.node) for name, layer in self.layers.items() if name not in kept}
        computed: dict[str, Computed] = {}

        def run(component: Component, inputs: Arrays) -> Arrays:
            executor = self._executors[component.name]
            high = frozenset(n.name for n in executor.graph.nodes if (component.name, n.name) not in low)
            computed[component.name] = executor.run(inputs, high, [each[component.name] for each in known])
            return executor.outputs(computed[component.name])

        return computed, walk(self.model, sample, run)
