"""The quantised model that a command means: from a checkpoint, or calibrated now."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from torch import nn

from cp_debug.errors import InputError
from cp_debug.probes.alignment import module_digest
from cp_debug.quantization.checkpoint import load_ptq_model
from cp_debug.quantization.folding import apply_folding
from cp_debug.quantization.layers import full_path, layers_of, matches, select
from cp_debug.quantization.models import QuantizedComponent, quantize_model
from cp_debug.quantization.ptq import quantization_of, scales_of
from cp_debug.quantization.toggles import disable_quantization
from cp_debug.recipes.base import Component, Model, Sample

CALIBRATION_FIRST = 1000
"""First held-out synthetic scene that is calibrated on: evaluations begin at 0."""
OnStep = Callable[[str, int, int], None]


def open_quantized(
    model: Model,
    checkpoint: Path | None,
    data: Path | None = None,
    count: int = 20,
    *,
    method: str = "mse",
    skip_layers: Sequence[str] = (),
    on_step: OnStep = lambda text, done, total: None,
) -> dict[str, QuantizedComponent]:
    """Every component in INT8; without ``checkpoint`` calibrated on ``count`` samples of ``data``.

    ``skip_layers`` are globs over what stays in FP32, for a checkpoint beyond what it skips itself. Raises InputError
    as ``quantize_model`` and ``load_ptq_model`` do.
    """
    if checkpoint is None:
        samples = calibration_samples(model, data, count, on_step)
        return quantize_model(model, samples, method=method, skip_layers=skip_layers)
    loaded = {component.name: _load(component, checkpoint, skip_layers) for component in model.components}
    select(
        [full_path(c.prefix, path) for c in model.components if c.module for path in layers_of(c.module)], skip_layers
    )
    return loaded


def modules_of(quantized: Mapping[str, QuantizedComponent]) -> dict[str, nn.Module]:
    """The modules with fake quantisers. Raises InputError for a component that is an ONNX file."""
    modules = {name: part.module for name, part in quantized.items() if part.module is not None}
    if files := quantized.keys() - modules.keys():
        raise InputError(f"MODEL: {min(files)} is an ONNX file; expected a model of torch modules")
    return modules


def calibration_samples(
    model: Model, data: Path | None, count: int, on_step: OnStep = lambda text, done, total: None
) -> Iterator[Sample]:
    """At most ``count`` samples to calibrate on, by default ones that evaluations do not use."""
    for number, sample in enumerate(model.samples(count, 0 if data else CALIBRATION_FIRST, data)):
        on_step("calibrating", number, count)
        yield sample


def unquantized(module: nn.Module, quantized: nn.Module) -> nn.Module:
    """The FP32 module, BatchNorm folded, behind a quantised one: its weights without its quantisers.

    ``module`` is the FP32 one from which ``quantized`` was made; its weights are not used.
    """
    plain = copy.deepcopy(module).eval()
    apply_folding(plain, quantization_of(quantized).folding)
    weights = quantized.state_dict()
    plain.load_state_dict({name: weights[name] for name in plain.state_dict()})
    return plain


def adopt_weights(module: nn.Module, quantized: nn.Module) -> None:
    """Let the scales of ``quantized``, whose weights were trained since, belong to the weights that it has now."""
    quantization_of(quantized).model = module_digest(unquantized(module, quantized))


def _load(component: Component, path: Path, skip_layers: Sequence[str]) -> QuantizedComponent:
    if component.module is None:
        raise InputError(f"{path}: {component.name} is an ONNX file; expected a model of torch modules")
    module = load_ptq_model(component.module, path, component.name)
    about = quantization_of(module)
    names = {own: full_path(component.prefix, own) for own in (*about.layers, *about.adds)}
    skipped = [own for own, name in names.items() if any(matches(name, glob) for glob in skip_layers)]
    if skipped:
        disable_quantization(module, *skipped)
    return QuantizedComponent(module, scales_of(module, component.prefix), unquantized(component.module, module))
