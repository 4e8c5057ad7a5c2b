"""A quantized model with some of its layers in INT8 and the others in FP32, measured on samples."""

from __future__ import annotations

import difflib
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor, nn

from cp_debug.detection.bootstrap import Interval
from cp_debug.detection.changes import Detected
from cp_debug.detection.evaluate import as_detector
from cp_debug.detection.evaluation import EvaluationOptions, draws_of
from cp_debug.detection.predictions import Predictions
from cp_debug.errors import InputError
from cp_debug.mixed_precision.activation_reuse import Reuse
from cp_debug.probes.distance import distance
from cp_debug.probes.outputs import flatten_outputs
from cp_debug.programs.torch_layers import full_path, quantizers
from cp_debug.programs.walk import Walk, example_args, named_outputs, walk
from cp_debug.quantization.residual_adds import add_quantizers
from cp_debug.recipes.abilities import HasClasses
from cp_debug.recipes.base import Arrays, Component, Model, Sample
from cp_debug.recipes.data.base import Truth

FLOAT, INT8 = "fp32", "int8"
SCORES = ("mAP", "NDS")
OnStep = Callable[[str, int, int], None]


class Int8Trial(NamedTuple):
    """All layers in FP32, or all in INT8, but for those in ``changed``, which are the other way round."""

    base: str
    changed: tuple[str, ...] = ()


@dataclass(frozen=True)
class Int8Layer:
    """What computes in INT8 while its quantizers are on: a module with weights, or a residual addition."""

    name: str
    """As ``Scales`` calls it."""
    path: str
    """In the component's module; of an addition, the quantizer of its operands."""
    component: str
    kind: str
    """Class before it was quantized, such as ``Conv2d``, or ``add``."""
    weights: int
    quantizers: Sequence[Any]

    def switch(self, on: bool) -> None:
        """Compute in INT8, or in FP32."""
        for quantizer in self.quantizers:
            if on:
                quantizer.enable()
            else:
                quantizer.disable()


@dataclass
class Measured:
    """What a trial gave over all samples, against the model in FP32."""

    trial: Int8Trial
    outputs: dict[str, float]
    """Output → relative L2 error."""
    introduced: float | None
    """Relative L2 change of the changed layer's own result, fed what it gets in ``trial.base``; None unless one is."""
    draws: dict[str, np.ndarray]
    """mAP and NDS in each draw of the samples [1 + draws]; empty for a model that detects nothing."""

    @property
    def error(self) -> float:
        """Root mean square over the outputs, so that each counts alike whatever its unit."""
        return math.sqrt(sum(value**2 for value in self.outputs.values()) / len(self.outputs))

    def change(self, name: str, before: Measured) -> Interval:
        """How much higher a score is than ``before``, drawn on the same samples."""
        return Interval.of(self.draws[name] - before.draws[name])


def quantized_layers(component: Component, module: nn.Module) -> Iterator[Int8Layer]:
    """What is in INT8 in a quantized component; layers whose quantizers are off are none."""
    residual_adds = {id(quantizer): name for name, quantizer in add_quantizers(module).items()}
    found: dict[str, list[Any]] = {}
    for path, quantizer in quantizers(module):
        if quantizer.is_enabled:
            found.setdefault(path if id(quantizer) in residual_adds else path.rpartition(".")[0], []).append(quantizer)
    for path, own in found.items():
        name = full_path(component.prefix, residual_adds.get(id(own[0]), path))
        part = module.get_submodule(path)
        weight = getattr(part, "weight", None)
        kind = "add" if id(own[0]) in residual_adds else type(part).__name__.removeprefix("Quant")
        yield Int8Layer(name, path, component.name, kind, 0 if weight is None else weight.numel(), own)


@dataclass
class _Error:
    """A relative L2 error over several pairs of tensors: sums of squares."""

    difference: float = 0.0
    whole: float = 0.0

    def add(self, test: Any, reference: Any) -> None:
        found = distance(test, reference)
        self.difference += math.inf if found.new_nonfinite else found.difference**2
        self.whole += found.whole**2

    @property
    def relative(self) -> float:
        if not self.whole:
            return math.inf if self.difference else 0.0
        return math.sqrt(self.difference / self.whole)


@dataclass
class _Totals:
    """A trial so far."""

    outputs: dict[str, _Error] = field(default_factory=lambda: defaultdict(_Error))
    layer: _Error = field(default_factory=_Error)
    detected: list[Detected] = field(default_factory=list)


class Bench:
    """A model and its quantized components, on which trials are run.

    Each sample runs once in FP32 and once in INT8; a trial computes only what its changed layers reach.
    """

    def __init__(self, model: Model, modules: Mapping[str, nn.Module]) -> None:
        """``modules``: component → its quantized module. Raises InputError when no layer of them is quantized."""
        self.model, self.modules = model, modules
        found = [layer for c in model.components for layer in quantized_layers(c, modules[c.name])]
        if not found:
            raise InputError(f"MODEL: no layer of {model.name} is quantized")
        self.layers = {layer.name: layer for layer in found}
        self._reuse = {}
        for name, module in modules.items():
            for child in module.modules():
                if getattr(child, "inplace", False):
                    child.inplace = False  # type: ignore[assignment]  # so that what is recorded stays as it was
            self._reuse[name] = Reuse(module.eval(), [layer.path for layer in found if layer.component == name])

    def measure(
        self,
        samples: Sequence[Sample],
        trials: Sequence[Int8Trial],
        *,
        draws: int = 200,
        on_step: OnStep = lambda text, done, total: None,
    ) -> list[Measured]:
        """Run the trials on the samples; those with ground truth are scored where the model detects.

        Raises InputError for a layer that the model does not have.
        """
        if unknown := {name for trial in trials for name in trial.changed} - self.layers.keys():
            near = difflib.get_close_matches(min(unknown), self.layers, n=1, cutoff=0.0)[0]
            raise InputError(f"{self.model.name} has no quantized layer {min(unknown)!r}; nearest is {near}")
        totals = {trial: _Totals() for trial in trials}
        scored = all(isinstance(sample.truth, Truth) for sample in samples) and isinstance(self.model, HasClasses)
        with self._restored():
            for number, sample in enumerate(samples):
                on_step(sample.source, number, len(samples))
                self._sample(sample, totals, scored)
        on_step("scoring", len(samples), len(samples))
        return [
            Measured(
                trial,
                {name: error.relative for name, error in sums.outputs.items()},
                sums.layer.relative if len(trial.changed) == 1 else None,
                self._score(sums.detected, samples, draws) if scored else {},
            )
            for trial, sums in totals.items()
        ]

    def _sample(self, sample: Sample, totals: Mapping[Int8Trial, _Totals], scored: bool) -> None:
        expected: Arrays = {}
        for base in (FLOAT, INT8):
            if base == INT8 and not any(trial.base == INT8 for trial in totals):
                break
            for layer in self.layers.values():
                layer.switch(base == INT8)
            recorded = self._record(sample)
            expected = expected or recorded.results[self.model.components[-1].name]
            for trial in (t for t in totals if t.base == base):
                sums = totals[trial]
                results = self._rerun(sample, trial, recorded, sums) if trial.changed else recorded.results
                for name, array in results[self.model.components[-1].name].items():
                    sums.outputs[name].add(array, expected[name])
                if scored:
                    sums.detected.append(self.model.decode(sample, results))  # type: ignore[arg-type]

    def _record(self, sample: Sample) -> _Recorded:
        inputs: dict[str, Sequence[Tensor]] = {}

        def record(component: Component, arrays: Arrays) -> Arrays:
            inputs[component.name] = example_args(component, arrays)
            return _named(component, self._reuse[component.name].record(*inputs[component.name]))

        return _Recorded(inputs, walk(self.model, sample, record))

    def _rerun(self, sample: Sample, trial: Int8Trial, recorded: _Recorded, sums: _Totals) -> dict[str, Arrays]:
        changed = [self.layers[name] for name in trial.changed]
        for layer in changed:
            layer.switch(trial.base == FLOAT)
        way = Walk(self.model, sample)
        for step in way:
            here = [layer.path for layer in changed if layer.component == step.name]
            as_before = all(way.results[name] is recorded.results[name] for name in way.results)
            if as_before and not here:
                step.outputs = recorded.results[step.name]
                continue
            reuse = self._reuse[step.name]
            inputs = recorded.inputs[step.name] if as_before else example_args(step.component, step.inputs)
            outputs, given = reuse.rerun(here, *inputs)
            step.outputs = _named(step.component, outputs)
            if here and len(changed) == 1:
                for test, reference in zip(given[here[0]], reuse.outputs(here[0]), strict=True):
                    sums.layer.add(test, reference)
        for layer in changed:
            layer.switch(trial.base == INT8)
        return way.results

    def _score(self, detected: Sequence[Detected], samples: Sequence[Sample], draws: int) -> dict[str, np.ndarray]:
        model = as_detector(self.model)
        options = EvaluationOptions(region=model.region, draws=draws)
        truths = [sample.truth for sample in samples]
        found = draws_of(Predictions.gather(detected), truths, model.class_names, options)
        return {name: found[name] for name in SCORES}

    @contextmanager
    def _restored(self) -> Iterator[None]:
        """All layers are in INT8 afterwards."""
        try:
            yield
        finally:
            for layer in self.layers.values():
                layer.switch(True)


class _Recorded(NamedTuple):
    """One sample in ``base``: the inputs and outputs of each component."""

    inputs: Mapping[str, Sequence[Tensor]]
    results: dict[str, Arrays]


def _named(component: Component, outputs: Any) -> Arrays:
    return named_outputs(component, flatten_outputs(outputs))
