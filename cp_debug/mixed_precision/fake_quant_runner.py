"""Trials under fake quantizers: a quantized model with some of its layers in INT8 and the others in FP32."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from cp_debug.bisect.backward import shares_over
from cp_debug.detection.changes import Detected
from cp_debug.detection.evaluate import as_detector
from cp_debug.detection.evaluation import EvaluationOptions, draws_of
from cp_debug.detection.predictions import Predictions
from cp_debug.errors import InputError, in_one_line
from cp_debug.mixed_precision.judge import Results
from cp_debug.mixed_precision.trial import Measured
from cp_debug.probes.distance import distance, ratio
from cp_debug.probes.module_state import state_kept
from cp_debug.probes.outputs import flatten_outputs
from cp_debug.probes.strings import compare_strings, is_text
from cp_debug.probes.trace import as_written
from cp_debug.programs.torch_layers import full_path, quantizers
from cp_debug.programs.walk import example_args, named_outputs, run_module, walk
from cp_debug.quantization.residual_adds import add_quantizers
from cp_debug.recipes.abilities import HasClasses
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
    """Relative L2 error of its own results, from the inputs that it has there."""


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


class LayerRunner(ABC):
    """A model whose layers can each compute in FP32 or low, on which trials are run."""

    def __init__(self, model: Model, layers: Mapping[str, Any]) -> None:
        """``layers``: those that can be low by name, with the ``component`` of each."""
        self.model, self.layers = model, layers
        self.all: KeptLayers = frozenset(layers)
        """Everything in FP32."""
        self.notes: list[str] = []
        """Sentences about layers whose shares are not complete, and why."""
        self._last = model.components[-1].name

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
        detected: dict[KeptLayers, list[Detected]] = {kept: [] for kept in outputs}
        if unknown := frozenset().union(*outputs) - self.all:
            hint = did_you_mean(min(unknown), self.layers)
            raise InputError(f"{self.model.name} has no quantized layer {min(unknown)!r}{hint}")
        scored = is_scored(self.model, samples)
        with self._restored():
            for number, sample in enumerate(samples):
                exact, run = self._trials(sample)
                for place, kept in enumerate(outputs):
                    on_step(f"{sample.source}: {place + 1} of {len(outputs)}", number, len(samples))
                    results = exact if kept == self.all else run(kept)
                    for name, array in results[self._last].items():
                        outputs[kept][name].add(array, exact[self._last][name])
                    if scored:
                        detected[kept].append(self.model.decode(sample, results))  # type: ignore[arg-type]
        on_step("scoring", len(samples), len(samples))
        return {kept: measured_of(self.model, outputs[kept], detected[kept], samples, draws) for kept in outputs}

    def nodes_in(self, kept_layers: KeptLayers) -> frozenset[tuple[str, str]]:
        """(Component, layer) of a set: its name in a log."""
        return frozenset((self.layers[name].component, name) for name in kept_layers)

    @abstractmethod
    def shares(self, samples: Sequence[Sample]) -> dict[str, LayerShare]:
        """Share of each layer in what all of them low are off from FP32, over all samples: one walk backward each."""

    @abstractmethod
    def _trials(self, sample: Sample) -> tuple[Results, Callable[[KeptLayers], Results]]:
        """What all in FP32 gives of a sample, by component, and what runs another set on it."""

    def _restored(self) -> AbstractContextManager[None]:
        """Whatever trials change is afterwards as it was."""
        return nullcontext()


class FakeQuantRunner(LayerRunner):
    """A model and its quantized components."""

    layers: Mapping[str, Int8Layer]

    def __init__(self, model: Model, modules: Mapping[str, nn.Module]) -> None:
        """``modules``: component → its quantized module. Raises InputError when no layer of them is quantized."""
        self.modules = {name: module.eval() for name, module in modules.items()}
        quantized = [layer for c in model.components for layer in quantized_layers(c, modules[c.name])]
        if not quantized:
            raise InputError(f"MODEL: no layer of {model.name} is quantized")
        super().__init__(model, {layer.name: layer for layer in quantized})
        for child in (child for module in modules.values() for child in module.modules()):
            if getattr(child, "inplace", False):
                child.inplace = False  # type: ignore[assignment]  # what autograd has kept stays as it was

    def shares(self, samples: Sequence[Sample]) -> dict[str, LayerShare]:
        """``LayerRunner.shares`` by autograd, through the modules."""
        introduced = {name: ErrorSum() for name in self.layers}

        def both(_: int, sample: Sample) -> tuple[Arrays, dict[str, Arrays], Callable[[Component], ModuleWalk]]:
            with self._restored():
                exact = self._run(sample, self.all)
            walks: dict[str, ModuleWalk] = {}

            def run(component: Component, inputs: Arrays) -> Arrays:
                layers = [layer for layer in self.layers.values() if layer.component == component.name]
                walks[component.name] = ModuleWalk(component, self.modules[component.name], layers, introduced)
                return walks[component.name].run(inputs)

            return exact[self._last], walk(self.model, sample, run), lambda component: walks[component.name]

        found = shares_over(self.model, samples, both, self.notes)
        of = {name: found.get((layer.component, name), 0.0) for name, layer in self.layers.items()}
        return {name: LayerShare(of[name], introduced[name].relative) for name in self.layers}

    def _trials(self, sample: Sample) -> tuple[Results, Callable[[KeptLayers], Results]]:
        return self._run(sample, self.all), partial(self._run, sample)

    def _run(self, sample: Sample, kept: KeptLayers) -> Results:
        for name, layer in self.layers.items():
            layer.switch(name not in kept)
        return walk(self.model, sample, lambda c, inputs: run_module(replace(c, module=self.modules[c.name]), inputs))

    @contextmanager
    def _restored(self) -> Iterator[None]:
        """All layers are in INT8 afterwards."""
        try:
            yield
        finally:
            for layer in self.layers.values():
                layer.switch(True)


class ModuleWalk:
    """One forward of a quantized module, all in INT8, and the walk back over it.

    At every call of a layer its result in FP32, from the inputs that it has in INT8, goes on in the graph of autograd,
    with its error added as a constant: so the values are those in INT8, the derivatives those of the exact layers.
    """

    def __init__(
        self, component: Component, module: nn.Module, layers: Sequence[Int8Layer], introduced: Mapping[str, ErrorSum]
    ) -> None:
        """``introduced`` takes the error of each layer's own results, by name."""
        self._component, self._module, self._layers, self._introduced = component, module, layers, introduced
        self._errors: list[tuple[str, Tensor]] = []
        self._inputs: dict[str, Tensor] = {}
        self._outputs: dict[str, Tensor] = {}
        self.derivatives: dict[str, Tensor] = {}
        self.stopped: dict[str, str] = {}

    def run(self, inputs: Arrays) -> Arrays:
        """The outputs; ``inputs`` and outputs are arrays by name, in the dtypes of the module."""
        args = example_args(self._component, inputs)
        args = tuple(x.requires_grad_() if x.is_floating_point() else x for x in args)
        self._inputs = {n: x for n, x in zip(self._component.input_names, args, strict=True) if x.requires_grad}
        hooks = [
            self._module.get_submodule(layer.path).register_forward_hook(partial(self._called, layer), with_kwargs=True)
            for layer in self._layers
        ]
        try:
            with torch.enable_grad(), as_written(), state_kept(self._module):
                outputs = flatten_outputs(self._module(*(x.view_as(x) for x in args)))
        finally:
            for hook in hooks:
                hook.remove()
        self._outputs = dict(zip(self._component.output_names, outputs.values(), strict=True))
        return named_outputs(self._component, {n: x.detach() for n, x in outputs.items()})

    def _called(self, layer: Int8Layer, module: nn.Module, args: Any, kwargs: Any, low: Any) -> Any:
        layer.switch(False)
        try:
            exact = module.forward(*args, **kwargs)
        finally:
            layer.switch(True)
        pairs = zip(pytree.tree_leaves(exact), pytree.tree_leaves(low), strict=True)
        results = [self._with_error(layer, a, b) if isinstance(a, Tensor) else b for a, b in pairs]
        return pytree.tree_unflatten(results, pytree.tree_structure(low))

    def _with_error(self, layer: Int8Layer, exact: Tensor, low: Tensor) -> Tensor:
        self._introduced[layer.name].add(low.detach(), exact.detach())
        error = (low - exact).detach().requires_grad_()
        self._errors.append((layer.name, error))
        return exact + error

    def walk(self, derivatives: Arrays) -> Iterator[tuple[str, float]]:
        """(Layer, ⟨derivative, introduced error⟩), those of several calls added up."""
        outputs = {n: x for n, x in self._outputs.items() if n in derivatives and x.requires_grad}
        leaves = [*(error for _, error in self._errors), *self._inputs.values()]
        given = [torch.from_numpy(derivatives[n]).to(x) for n, x in outputs.items()]
        try:
            found = torch.autograd.grad([*outputs.values()], leaves, given, allow_unused=True) if outputs else ()
        except RuntimeError as failed:  # an operation that autograd cannot follow
            self.stopped = dict.fromkeys(outputs, in_one_line(failed))
            return
        shares: dict[str, float] = defaultdict(float)
        for (name, error), gradient in zip(self._errors, found, strict=False):
            shares[name] += (
                0.0 if gradient is None else float(gradient.double().flatten() @ error.detach().double().flatten())
            )
        of_inputs = zip(self._inputs, found[len(self._errors) :], strict=False)
        self.derivatives = {name: gradient for name, gradient in of_inputs if gradient is not None}
        yield from shares.items()


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


def measured_of(
    model: Model,
    outputs: Mapping[str, ErrorSum],
    detected: Sequence[Detected],
    samples: Sequence[Sample],
    draws: int,
) -> Measured:
    """Figures of one set over the samples; scores where there are detections."""
    errors = relative_errors(model.name, outputs)
    scores = draws_of_scores(model, detected, samples, draws) if detected else {}
    return Measured({"rel_l2": max(errors.values())}, errors, scores)
