"""Opens the quantized model that a command means: from a checkpoint, or calibrated now."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from torch import nn

from cp_debug.errors import InputError
from cp_debug.probes.module_state import copied
from cp_debug.programs.align import module_digest
from cp_debug.programs.batchnorm_folding import apply_folding
from cp_debug.programs.torch_layers import full_path, layers_of, matches, select
from cp_debug.quantization.amax_checkpoint import is_amax_checkpoint, load_amax_checkpoint
from cp_debug.quantization.checkpoint import file_of, is_ptq_checkpoint, load_ptq_model
from cp_debug.quantization.models import QuantizedComponent, quantize_model
from cp_debug.quantization.ptq import scales_of
from cp_debug.quantization.record import disable_quantization, quantization_of
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
    """Every component in INT8, from a checkpoint or calibrated now.

    ``checkpoint`` is a file, the folder of `cpdebug quantize ptq`, or
    another tool's checkpoint (``load_amax_checkpoint``); without one, ``count`` samples of ``data`` are calibrated on.
    ``skip_layers`` are globs over layers that stay in FP32, besides those that the checkpoint names itself.
    Raises InputError as ``quantize_model`` and the readers of checkpoints do.
    """
    if checkpoint is None:
        samples = calibration_samples(model, data, count, on_step)
        return quantize_model(model, samples, method=method, skip_layers=skip_layers)
    checkpoint = file_of(checkpoint)
    if is_amax_checkpoint(checkpoint):
        quantized = load_amax_checkpoint(model, checkpoint, next(model.samples(1, CALIBRATION_FIRST, None)))
    else:
        quantized = {component.name: _load(component, checkpoint) for component in model.components}
    names = [full_path(c.prefix, path) for c in model.components if c.module for path in layers_of(c.module)]
    select(names, skip_layers)
    return {c.name: _without(quantized[c.name], c.prefix, skip_layers) for c in model.components}


def is_quantized_checkpoint(path: Path) -> bool:
    """Whether ``open_quantized`` reads a file, which is then no checkpoint in FP32."""
    return is_ptq_checkpoint(path) or is_amax_checkpoint(path)


def modules_of(quantized: Mapping[str, QuantizedComponent]) -> dict[str, nn.Module]:
    """The modules with fake quantizers. Raises InputError for a component that is an ONNX file."""
    modules = {name: part.module for name, part in quantized.items() if part.module is not None}
    if files := quantized.keys() - modules.keys():
        raise InputError(f"MODEL: {min(files)} is an ONNX file; expected a model of torch modules")
    return modules


def calibration_samples(
    model: Model, data: Path | None, count: int, on_step: OnStep = lambda text, done, total: None
) -> Iterator[Sample]:
    """At most ``count`` samples to calibrate on, by default ones that evaluations do not use.

    Raises InputError for unusable files.
    """
    for number, sample in enumerate(model.samples(count, 0 if data else CALIBRATION_FIRST, data)):
        on_step("calibrating", number, count)
        yield sample


def unquantized(module: nn.Module, quantized: nn.Module) -> nn.Module:
    """The FP32 module, BatchNorm folded, behind a quantized one: its weights without its quantizers.

    ``module`` is the FP32 one from which ``quantized`` was made; its weights are not used.
    """
    plain = copied(module).eval()
    apply_folding(plain, quantization_of(quantized).folding)
    weights = quantized.state_dict()
    plain.load_state_dict({name: weights[name] for name in plain.state_dict()})
    return plain


def adopt_weights(module: nn.Module, quantized: nn.Module) -> None:
    """Let the scales of ``quantized``, whose weights were trained since, belong to the weights that it has now."""
    quantization_of(quantized).model = module_digest(unquantized(module, quantized))


def _load(component: Component, path: Path) -> QuantizedComponent:
    if component.module is None:
        raise InputError(f"{path}: {component.name} is an ONNX file; expected a model of torch modules")
    module = load_ptq_model(component.module, path, component.name)
    return QuantizedComponent(module, scales_of(module, component.prefix), unquantized(component.module, module))


def _without(part: QuantizedComponent, prefix: str, globs: Sequence[str]) -> QuantizedComponent:
    """A copy of ``part`` with the quantizers off that a glob means."""
    assert part.module is not None
    about = quantization_of(part.module)
    names = {path: full_path(prefix, path) for path in (*about.layers, *about.residual_adds)}
    skipped = [path for path, name in names.items() if any(matches(name, glob) for glob in globs)]
    if skipped:
        disable_quantization(part.module, *skipped)
    return replace(part, scales=scales_of(part.module, prefix))
