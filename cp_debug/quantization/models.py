"""Whole models in INT8: every component calibrated on its inputs in the model's own chain."""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import nn

from cp_debug.backends.executor import Executor
from cp_debug.errors import InputError
from cp_debug.graph.graph import Graph
from cp_debug.graph.scales import Scales
from cp_debug.graph.tensor_ends import as_arrays
from cp_debug.optional import check_there
from cp_debug.probes.arrays import as_numpy
from cp_debug.probes.caveats import compare_any, compare_strings, is_text, why_nothing
from cp_debug.probes.distance import distance, ratio
from cp_debug.probes.statistics import TensorStats
from cp_debug.programs.batchnorm_folding import fuse_model_bn
from cp_debug.programs.torch_layers import full_path, layers_of, matches, select
from cp_debug.programs.walk import Walk, example_args, named_outputs, run_module, walk
from cp_debug.quantization.calibration import CalibrationManager
from cp_debug.quantization.onnx_ptq import GraphCalibration, names_of_layers
from cp_debug.quantization.ptq import apply_scales, quantized, scales_of
from cp_debug.recipes.base import Arrays, Component, Model, Sample


@dataclass(frozen=True)
class QuantizedComponent:
    """A component of a model in INT8: its module with fake quantizers, its scales, and what is exported."""

    module: nn.Module | None
    """The module with fake quantizers; None for a component that is an ONNX file."""
    scales: Scales
    """Scales by module paths in the whole model, or by the names of the ONNX file's nodes."""
    folded: nn.Module | None
    """The FP32 module with BatchNorm folded, which is exported; None for a component that is an ONNX file."""


def quantize_model(
    model: Model, samples: Iterable[Sample], *, method: str = "max", skip_layers: Sequence[str] = ()
) -> dict[str, QuantizedComponent]:
    """Every component in INT8, calibrated on ``samples``, which are read once and one at a time.

    A component is fed what the FP32 ones before it give. ``skip_layers`` are globs over the layers of the whole model.
    Raises InputError as ``quantize_ptq`` does, naming the sample where one is at fault.
    """
    globs = _globs_of(model, skip_layers)
    running: dict[str, _RunningCalibration] = {}
    for sample in samples:
        for step in Walk(model, sample):
            if step.name not in running:
                running[step.name] = _calibration(step.component, step.inputs, method, globs[step.name])
            inputs = step.inputs
            try:
                step.outputs = running[step.name].run(inputs)
            except InputError as error:
                raise InputError(f"{sample.source}: {error}") from error
    if not running:
        raise InputError("there is no calibration data: expected at least one sample")
    return {name: calibration.finish() for name, calibration in running.items()}


def reapply_scales(
    model: Model, sample: Sample, scales: Mapping[str, Scales], skip_layers: Sequence[str] = ()
) -> dict[str, QuantizedComponent]:
    """Every component in INT8 by scales that were found before, without calibrating.

    ``sample`` is run once, to fold. Raises InputError for scales of another model, and as ``quantize_ptq`` does for
    ``skip_layers``.
    """
    globs = _globs_of(model, skip_layers)
    in_int8 = {}
    for step in Walk(model, sample):
        component = step.component
        own_scales = _without(scales[component.name], globs[component.name])
        if component.module is None:
            assert component.onnx_path is not None
            if own_scales.model != Graph.shared(component.onnx_path).digest:
                raise InputError(f"{component.onnx_path}: the scales were calibrated on another graph")
            in_int8[component.name] = QuantizedComponent(None, own_scales, None)
            continue
        folded = fuse_model_bn(component.module, example_args(component, step.inputs))
        step.outputs = run_module(component, step.inputs)
        in_int8[component.name] = QuantizedComponent(
            apply_scales(folded, own_scales, component.prefix), own_scales, folded
        )
    return in_int8


def with_modules(model: Model, modules: Mapping[str, nn.Module]) -> Model:
    """A copy of ``model`` with other modules, by component name."""
    changed = copy.copy(model)
    changed.components = tuple(replace(c, module=modules[c.name]) if c.name in modules else c for c in model.components)
    return changed


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

    @property
    def decibel(self) -> float:
        """Signal to noise over all pairs in dB: 10·log10(whole ÷ difference); NaN where there is neither."""
        if not self.difference:
            return math.inf if self.whole else math.nan
        return 10 * math.log10(self.whole / self.difference) if self.whole and self.difference < math.inf else -math.inf


def output_sqnr(model: Model, tests: Mapping[str, nn.Module | Path], samples: Iterable[Sample]) -> dict[str, float]:
    """``component/output`` → signal to quantization noise over all samples in dB: 10·log10(Σ ref² ÷ Σ (test − ref)²).

    The reference is ``model``. In the test, components are other modules or ONNX files, and are fed each other's
    results, as deployed. Infinite without noise, and minus infinity where a shape is another or NaN and Inf are not at
    the same places. NaN for outputs that tell nothing: without an element, NaN or Inf everywhere, or 0 everywhere in
    both. Raises InputError where no output of any sample holds a finite number.
    """
    reference = {c.name: _runner(c, c.module or c.onnx_path) for c in model.components}
    test = {c.name: _runner(c, tests[c.name]) for c in model.components}
    sums: dict[str, ErrorSum] = defaultdict(ErrorSum)
    seen: dict[str, list[TensorStats]] = defaultdict(list)
    for sample in samples:
        expected = walk(model, sample, lambda component, inputs: reference[component.name](inputs))
        actual = walk(model, sample, lambda component, inputs: test[component.name](inputs))
        for component, outputs in expected.items():
            for name, array in outputs.items():
                if name not in actual[component]:  # of a sequence whose length differs, which is an output, too
                    continue
                stats, key = compare_any(array, actual[component][name]), f"{component}/{name}"
                seen[key].append(stats)
                if stats.shape_mismatch or stats.mismatched:
                    sums[key].difference = math.inf
                else:
                    sums[key].add(actual[component][name], array)
    if why := why_nothing(seen):
        raise InputError(f"{model.name}: no cost at the outputs can be measured: {why}; give other inputs")
    return {name: sums[name].decibel for name in seen}


def _runner(component: Component, program: nn.Module | Path | None) -> Callable[[Mapping[str, np.ndarray]], Arrays]:
    """A function that runs a component's module or ONNX file on inputs by name."""
    if isinstance(program, nn.Module):
        return partial(run_module, replace(component, module=program))
    assert program is not None
    executor = Executor(Graph(program, source=component.shown))
    return lambda inputs: as_arrays(executor.graph, executor.run(inputs), as_numpy)


class _RunningCalibration(NamedTuple):
    run: Callable[[Mapping[str, np.ndarray]], Arrays]
    finish: Callable[[], QuantizedComponent]


def _calibration(
    component: Component, inputs: Mapping[str, np.ndarray], method: str, globs: Sequence[str]
) -> _RunningCalibration:
    if component.module is None:
        assert component.onnx_path is not None
        graph = Graph.shared(component.onnx_path, source=component.shown)
        watching, executor = GraphCalibration(graph, method, globs), Executor(graph)
        return _RunningCalibration(
            lambda inputs: as_arrays(graph, watching.run(executor, inputs), as_numpy),
            lambda: QuantizedComponent(None, watching.scales(), None),
        )
    folded = fuse_model_bn(component.module, example_args(component, inputs))
    manager = CalibrationManager(folded, method=method, skip_layers=globs, prefix=component.prefix)
    check_there("modelopt", "quant")  # what is calibrated here gets its quantizers from it

    def finish() -> QuantizedComponent:
        module = quantized(manager)
        return QuantizedComponent(module, scales_of(module, component.prefix), folded)

    return _RunningCalibration(
        lambda inputs: named_outputs(component, manager.run(example_args(component, inputs))), finish
    )


def _globs_of(model: Model, globs: Sequence[str]) -> dict[str, list[str]]:
    """The globs that mean something in a component, by its name. Raises InputError for one that means nothing."""
    layers: dict[str, list[str]] = {}
    for component in model.components:
        if component.module is not None:
            layers[component.name] = [full_path(component.prefix, path) for path in layers_of(component.module)]
        else:
            assert component.onnx_path is not None
            names = names_of_layers(Graph.shared(component.onnx_path))
            layers[component.name] = [*names, *names.values()]
    select([path for paths in layers.values() for path in paths], globs)
    return {
        name: [glob for glob in globs if any(matches(path, glob) for path in paths)] for name, paths in layers.items()
    }


def _without(scales: Scales, globs: Sequence[str]) -> Scales:
    skipped = {name for name in (*scales.layers, *scales.residual_adds) if any(matches(name, glob) for glob in globs)}
    return replace(
        scales,
        layers={name: layer for name, layer in scales.layers.items() if name not in skipped},
        residual_adds={name: amax for name, amax in scales.residual_adds.items() if name not in skipped},
    )
