"""Trials under fake quantizers: a quantized model with some of its layers in INT8 and the others in FP32."""

from __future__ import annotations

import difflib
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor, nn

from cp_debug.detection.changes import Detected
from cp_debug.detection.evaluate import as_detector
from cp_debug.detection.evaluation import EvaluationOptions, draws_of
from cp_debug.detection.predictions import Predictions
from cp_debug.errors import InputError
from cp_debug.mixed_precision.activation_reuse import Reuse
from cp_debug.mixed_precision.trial import Measured
from cp_debug.probes.distance import distance, ratio
from cp_debug.probes.outputs import flatten_outputs
from cp_debug.probes.strings import compare_strings, is_text
from cp_debug.programs.torch_layers import full_path, quantizers
from cp_debug.programs.walk import Walk, example_args, named_outputs, walk
from cp_debug.quantization.residual_adds import add_quantizers
from cp_debug.recipes.abilities import HasClasses
from cp_debug.recipes.base import Arrays, Component, Model, Sample
from cp_debug.recipes.data.base import Truth

SCORES = ("mAP", "NDS")
OnStep = Callable[[str, int, int], None]
KeptLayers = frozenset[str]
"""Names of the layers that stay in FP32."""


@dataclass(frozen=True)
class Int8Layer:
    """A layer that computes in INT8 while its quantizers are on: a module with weights, or a residual addition."""

    name: str
    """Name of the layer, as in ``Scales``."""
    path: str
    """Path of the module in the component's module; of an addition, of the quantizer of its operands."""
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


def quantized_layers(component: Component, module: nn.Module) -> Iterator[Int8Layer]:
    """Layers in INT8 of a quantized component; those whose quantizers are off are left out."""
    residual_adds = {id(quantizer): name for name, quantizer in add_quantizers(module).items()}
    quantizers_by_path: dict[str, list[Any]] = {}
    for path, quantizer in quantizers(module):
        if quantizer.is_enabled:
            quantizers_by_path.setdefault(
                path if id(quantizer) in residual_adds else path.rpartition(".")[0], []
            ).append(quantizer)
    for path, layer_quantizers in quantizers_by_path.items():
        name = full_path(component.prefix, residual_adds.get(id(layer_quantizers[0]), path))
        part = module.get_submodule(path)
        weight = getattr(part, "weight", None)
        kind = "add" if id(layer_quantizers[0]) in residual_adds else type(part).__name__.removeprefix("Quant")
        yield Int8Layer(name, path, component.name, kind, 0 if weight is None else weight.numel(), layer_quantizers)


@dataclass
class ErrorSum:
    """A relative L2 error over several pairs of tensors: sums of squares."""

    difference: float = 0.0
    whole: float = 0.0

    def add(self, test: Any, reference: Any) -> None:
        """Count a pair of tensors of one shape, arrays or tensors of any dtype; of strings, those that differ."""
        if is_text(reference):
            stats = compare_strings(reference, test)
            self.difference, self.whole = self.difference + stats.rel_l2**2 * stats.count, self.whole + stats.count
            return
        norms = distance(test, reference)
        self.difference += math.inf if norms.new_nonfinite else norms.difference**2
        self.whole += norms.whole**2

    @property
    def relative(self) -> float:
        """Relative L2 error over all pairs."""
        return ratio(math.sqrt(self.difference), math.sqrt(self.whole))


def relative_errors(model: str, outputs: Mapping[str, ErrorSum]) -> dict[str, float]:
    """Output → its error. Raises InputError where all are 0 in both runs, as far as they are finite: that is no error
    of 0."""
    if not any(error.whole or error.difference for error in outputs.values()):
        names = ", ".join(outputs) or "none"
        raise InputError(f"{model}: no error of an output can be measured: no finite number but 0 in {names}")
    return {name: error.relative for name, error in outputs.items()}


class _Changes(NamedTuple):
    """A set of kept layers as its difference from all in INT8 (``from_int8``), or from all in FP32."""

    from_int8: bool
    layers: tuple[str, ...]


@dataclass
class _TrialSums:
    """A trial so far."""

    changes: _Changes
    outputs: dict[str, ErrorSum] = field(default_factory=lambda: defaultdict(ErrorSum))
    layer: ErrorSum = field(default_factory=ErrorSum)
    detected: list[Detected] = field(default_factory=list)


class FakeQuantRunner:
    """A model and its quantized components, on which trials are run.

    Each sample runs once in FP32 and once in INT8; a trial computes only what the layers reach in which it differs from
    the nearer of these.
    """

    def __init__(self, model: Model, modules: Mapping[str, nn.Module]) -> None:
        """``modules``: component → its quantized module. Raises InputError when no layer of them is quantized."""
        self.model, self.modules = model, modules
        quantized = [layer for c in model.components for layer in quantized_layers(c, modules[c.name])]
        if not quantized:
            raise InputError(f"MODEL: no layer of {model.name} is quantized")
        self.layers = {layer.name: layer for layer in quantized}
        self.all: KeptLayers = frozenset(self.layers)
        """Everything in FP32."""
        self._reuse = {}
        for name, module in modules.items():
            for child in module.modules():
                if getattr(child, "inplace", False):
                    child.inplace = False  # type: ignore[assignment]  # so that what is recorded stays as it was
            self._reuse[name] = Reuse(module.eval(), [layer.path for layer in quantized if layer.component == name])

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
        totals = {kept_layers: _TrialSums(self._changes(kept_layers)) for kept_layers in trials}
        if unknown := frozenset().union(*totals) - self.all:
            near = difflib.get_close_matches(min(unknown), self.layers, n=1, cutoff=0.0)[0]
            raise InputError(f"{self.model.name} has no quantized layer {min(unknown)!r}; nearest is {near}")
        scored = is_scored(self.model, samples)
        with self._restored():
            for number, sample in enumerate(samples):
                on_step(sample.source, number, len(samples))
                self._sample(sample, list(totals.values()), scored)
        on_step("scoring", len(samples), len(samples))
        return {
            kept_layers: self._measured(sums, samples, draws if scored else None)
            for kept_layers, sums in totals.items()
        }

    def nodes_in(self, kept_layers: KeptLayers) -> frozenset[tuple[str, str]]:
        """(Component, layer) of a set: its name in a log."""
        return frozenset((self.layers[name].component, name) for name in kept_layers)

    def _changes(self, kept_layers: KeptLayers) -> _Changes:
        """The set as changes of all in FP32 where few layers are low, else of all in INT8."""
        low = self.all - kept_layers
        from_int8 = len(low) > 1 and len(low) >= len(kept_layers)
        return _Changes(from_int8, tuple(name for name in self.layers if name in (kept_layers if from_int8 else low)))

    def _measured(self, sums: _TrialSums, samples: Sequence[Sample], draws: int | None) -> Measured:
        outputs = relative_errors(self.model.name, sums.outputs)
        return Measured(
            {"rel_l2": max(outputs.values())},
            outputs,
            sums.layer.relative if len(sums.changes.layers) == 1 else None,
            {} if draws is None else draws_of_scores(self.model, sums.detected, samples, draws),
        )

    def _sample(self, sample: Sample, totals: Sequence[_TrialSums], scored: bool) -> None:
        expected: Arrays = {}
        for in_int8 in (False, True):
            if in_int8 and not any(sums.changes.from_int8 for sums in totals):
                break
            for layer in self.layers.values():
                layer.switch(in_int8)
            recorded = self._record(sample)
            expected = expected or recorded.results[self.model.components[-1].name]
            for sums in (each for each in totals if each.changes.from_int8 == in_int8):
                results = self._rerun(sample, recorded, sums) if sums.changes.layers else recorded.results
                for name, array in results[self.model.components[-1].name].items():
                    sums.outputs[name].add(array, expected[name])
                if scored:
                    sums.detected.append(self.model.decode(sample, results))  # type: ignore[arg-type]

    def _record(self, sample: Sample) -> _RecordedSample:
        inputs: dict[str, Sequence[Tensor]] = {}

        def record(component: Component, arrays: Arrays) -> Arrays:
            inputs[component.name] = example_args(component, arrays)
            return _named(component, self._reuse[component.name].record(*inputs[component.name]))

        return _RecordedSample(inputs, walk(self.model, sample, record))

    def _rerun(self, sample: Sample, recorded: _RecordedSample, sums: _TrialSums) -> dict[str, Arrays]:
        changed = [self.layers[name] for name in sums.changes.layers]
        for layer in changed:
            layer.switch(not sums.changes.from_int8)
        way = Walk(self.model, sample)
        for step in way:
            paths = [layer.path for layer in changed if layer.component == step.name]
            as_before = all(way.results[name] is recorded.results[name] for name in way.results)
            if as_before and not paths:
                step.outputs = recorded.results[step.name]
                continue
            reuse = self._reuse[step.name]
            inputs = recorded.inputs[step.name] if as_before else example_args(step.component, step.inputs)
            outputs, layer_results = reuse.rerun(paths, *inputs)
            step.outputs = _named(step.component, outputs)
            if paths and len(changed) == 1:
                for test, reference in zip(layer_results[paths[0]], reuse.outputs(paths[0]), strict=True):
                    sums.layer.add(test, reference)
        for layer in changed:
            layer.switch(sums.changes.from_int8)
        return way.results

    @contextmanager
    def _restored(self) -> Iterator[None]:
        """All layers are in INT8 afterwards."""
        try:
            yield
        finally:
            for layer in self.layers.values():
                layer.switch(True)


def is_scored(model: Model, samples: Sequence[Sample]) -> bool:
    """Whether detections are scored: the model has classes, and all samples have ground truth."""
    return all(isinstance(sample.truth, Truth) for sample in samples) and isinstance(model, HasClasses)


def draws_of_scores(
    model: Model, detected: Sequence[Detected], samples: Sequence[Sample], draws: int
) -> dict[str, np.ndarray]:
    """mAP and NDS in each draw of the samples, float64 [1 + draws]; the first is of all of them."""
    detector = as_detector(model)
    options = EvaluationOptions(region=detector.region, draws=draws)
    truths = [sample.truth for sample in samples]
    scores = draws_of(Predictions.gather(detected), truths, detector.class_names, options)
    return {name: scores[name] for name in SCORES}


class _RecordedSample(NamedTuple):
    """One sample, all in FP32 or all in INT8: the inputs and outputs of each component."""

    inputs: Mapping[str, Sequence[Tensor]]
    results: dict[str, Arrays]


def _named(component: Component, outputs: Any) -> Arrays:
    return named_outputs(component, flatten_outputs(outputs))
