"""Opens the quantized model that a command means: from a checkpoint, also another tool's, or calibrated now."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from torch import Tensor, nn

from cp_debug.display import OnStep
from cp_debug.errors import InputError
from cp_debug.graph.scales import LayerScales, Scales
from cp_debug.probes.module_state import copied
from cp_debug.programs.align import module_digest
from cp_debug.programs.batchnorm_folding import Folding, apply_folding, find_folding
from cp_debug.programs.torch_layers import WeightedLayer, channels, full_path, layers_of, matches, select
from cp_debug.programs.walk import Walk, example_args, run_module
from cp_debug.quantization.checkpoint import file_of, is_ptq_checkpoint, load_ptq_model
from cp_debug.quantization.models import QuantizedComponent, quantize_model
from cp_debug.quantization.ptq import apply_scales, scales_of
from cp_debug.quantization.record import disable_quantization, quantization_of
from cp_debug.recipes.base import Component, Model, Sample
from cp_debug.recipes.checkpoint import load_state, read_state_dict

AMAX = "_quantizer._amax"
METHOD = "given"


def is_amax_checkpoint(path: Path) -> bool:
    """Whether a file is a state dict with scales in it; False for one that cannot be read."""
    try:
        return any(name.endswith(AMAX) for name in read_state_dict(path))
    except InputError:
        return False


def load_amax_checkpoint(model: Model, path: Path, sample: Sample) -> dict[str, QuantizedComponent]:
    """Every component in INT8 as another tool's checkpoint says: its weights and scales, folded where it is folded.

    It is a state dict with ``_amax`` beside the weights, as NVIDIA's pytorch-quantization, which AWML uses, and
    nvidia-modelopt write it (``QATHook``'s checkpoints among them).
    ``sample`` is run once in FP32, to see which BatchNorm stands behind which layer. Layers without scales stay in
    FP32. Raises InputError for names and shapes that are not the model's, and for scales that are no layer's.
    """
    state = read_state_dict(path)
    quantized = {}
    for step in Walk(model, sample):
        component = step.component
        module = _module(component, path)
        step.outputs = run_module(component, step.inputs)
        folding = find_folding(module, example_args(component, step.inputs))
        quantized[component.name] = _of_scales(component, module, folding, state, path)
    scaled_layers = {name for part in quantized.values() for name in part.scales.layers}
    for name in state:
        owner = name.removesuffix(AMAX).rpartition(".")[0]
        if name.endswith(AMAX) and owner not in scaled_layers:
            raise InputError(f"{path}: {name} is the scale of no layer of {model.name}")
    return quantized


def _of_scales(
    component: Component, module: nn.Module, folding: Folding, state: Mapping[str, Tensor], path: Path
) -> QuantizedComponent:
    def name(own: str) -> str:
        return full_path(component.prefix, own)

    pairs = [(layer, norm) for layer, norm in folding.pairs if name(f"{norm}.running_mean") not in state]
    folded = copied(module).eval()
    apply_folding(folded, Folding(pairs, folding.notes))
    load_state(
        folded,
        {path_here: state[name(path_here)] for path_here in folded.state_dict() if name(path_here) in state},
        str(path),
    )
    layers = {}
    for path_here, layer in layers_of(folded).items():
        ranges = {kind: _amax(state, name(path_here), kind) for kind in ("input", "weight")}
        if ranges["input"] is not None and ranges["weight"] is not None:
            weight = _for_channels(layer, ranges["weight"], f"{path}: {name(path_here)}")
            layers[name(path_here)] = LayerScales(float(ranges["input"].amax()), weight)
    scales = Scales(module_digest(folded), METHOD, layers)
    quantized = apply_scales(folded, scales, component.prefix)
    quantization_of(quantized).skipped.update(
        dict.fromkeys(quantization_of(quantized).skipped, f"{path.name} has no scale")
    )
    return QuantizedComponent(quantized, scales, folded)


def _amax(state: Mapping[str, Tensor], layer: str, kind: str) -> Tensor | None:
    """pytorch-quantization begins the name with an underscore, modelopt does not."""
    return state.get(f"{layer}._{kind}{AMAX}", state.get(f"{layer}.{kind}{AMAX}"))


def _for_channels(layer: WeightedLayer, amax: Tensor, where: str) -> np.ndarray:
    """Largest magnitude for each output channel [C_out]; a scale of the whole weight is repeated.

    Raises InputError for any other number of scales; ``where`` starts its message.
    """
    if amax.numel() not in (1, channels(layer)):
        raise InputError(
            f"{where} has {amax.numel()} scales for its weight; expected one, or one for each of its {channels(layer)} "
            "output channels; engines take no other"
        )
    return amax.float().flatten().expand(channels(layer)).numpy().copy()


CALIBRATION_FIRST = 1000
"""First held-out synthetic scene that is calibrated on: evaluations begin at 0."""


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
    plain = _module(component, path)
    module = load_ptq_model(plain, path, component.name)
    return QuantizedComponent(module, scales_of(module, component.prefix), unquantized(plain, module))


def _module(component: Component, path: Path) -> nn.Module:
    if component.module is None:
        raise InputError(f"{path}: {component.name} is an ONNX file; expected a model of torch modules")
    return component.module


def _without(part: QuantizedComponent, prefix: str, globs: Sequence[str]) -> QuantizedComponent:
    """A copy of ``part`` with the quantizers off that a glob means."""
    assert part.module is not None
    about = quantization_of(part.module)
    names = {path: full_path(prefix, path) for path in (*about.layers, *about.residual_adds)}
    skipped = [path for path, name in names.items() if any(matches(name, glob) for glob in globs)]
    if skipped:
        disable_quantization(part.module, *skipped)
    return replace(part, scales=scales_of(part.module, prefix))
