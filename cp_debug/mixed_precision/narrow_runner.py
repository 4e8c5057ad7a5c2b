"""Shares and trials of layers in FP8, block-scaled types and INT4, emulated."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from cp_debug.backends.arithmetic import ARITHMETICS
from cp_debug.backends.base import Program
from cp_debug.backends.narrow_options import NarrowOptions
from cp_debug.bisect.backward import Backward, shares_over
from cp_debug.errors import InputError
from cp_debug.mixed_precision.fake_quant_runner import KeptLayers, LayerRunner, LayerShare
from cp_debug.mixed_precision.judge import Results
from cp_debug.mixed_precision.mixed_graph import Computed, MixedExecutor
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


class NarrowRunner(LayerRunner):
    """A model whose layers with weights can each compute in a narrow precision, on the executor.

    Scales are those of the numbers at hand. Each sample runs once in FP32 and once with all layers low; a trial
    computes only what its layers reach.
    """

    layers: Mapping[str, EmulatedLayer]

    def __init__(self, model: Model, programs: Sequence[Program], precision: str) -> None:
        """``precision``: as a backend spec has it, ``fp8:channel``. Raises InputError where no layer can be in it."""
        options, layers = NarrowOptions.parse(precision), dict[str, EmulatedLayer]()
        for program in programs:
            for node in weighted_layers(program.graph, options):
                name = layer_name(program, node.outputs[0])
                if name in layers:  # a module that is called twice
                    name = f"{name} ({node.name})"
                held = node.proto.input[1] in program.graph.initializers
                size = math.prod(program.graph.weight(node.proto.input[1]).dims) if held else 0
                layers[name] = EmulatedLayer(program.name, node.name, node.op, size)
        if not layers:
            raise InputError(f"MODEL: {model.name} has no layer with a weight that {options.family} takes")
        super().__init__(model, layers)
        self._executors = {p.name: MixedExecutor(p.graph, ARITHMETICS[str(options)], "cpu") for p in programs}

    def _trials(self, sample: Sample) -> tuple[Results, Callable[[KeptLayers], Results]]:
        exact, expected = self._run(sample, self.all, [])
        low, _ = self._run(sample, frozenset(), [exact])
        return expected, lambda kept: self._run(sample, kept, [exact, low])[1]

    def shares(self, samples: Sequence[Sample]) -> dict[str, LayerShare]:
        """``LayerRunner.shares`` by the graphs."""
        names = {(layer.component, layer.node): name for name, layer in self.layers.items()}
        own = dict.fromkeys(self.layers, 0.0)

        def run(_: int, sample: Sample) -> tuple[Arrays, Results, Callable[[Component], Backward]]:
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
    ) -> tuple[dict[str, Computed], Results]:
        low = {(layer.component, layer.node) for name, layer in self.layers.items() if name not in kept}
        computed: dict[str, Computed] = {}

        def run(component: Component, inputs: Arrays) -> Arrays:
            executor = self._executors[component.name]
            high = frozenset(n.name for n in executor.graph.nodes if (component.name, n.name) not in low)
            computed[component.name] = executor.run(inputs, high, [each[component.name] for each in known])
            return executor.outputs(computed[component.name])

        return computed, walk(self.model, sample, run)
