"""Quantized checkpoints of other tools: a state dict with ``_amax`` beside the weights, BatchNorm folded away.

NVIDIA's pytorch-quantization, as AWML uses it, writes such files, and so does nvidia-modelopt (``QATHook``'s
checkpoints among them).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from torch import Tensor, nn

from cp_debug.errors import InputError
from cp_debug.graph.scales import LayerScales, Scales
from cp_debug.probes.module_state import copied
from cp_debug.programs.align import module_digest
from cp_debug.programs.batchnorm_folding import Folding, apply_folding, find_folding
from cp_debug.programs.torch_layers import WeightedLayer, channels, full_path, layers_of
from cp_debug.programs.walk import Walk, example_args, run_module
from cp_debug.quantization.models import QuantizedComponent
from cp_debug.quantization.ptq import apply_scales
from cp_debug.quantization.record import quantization_of
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
    """Every component in INT8 as the file says: its weights, its scales, folded where its BatchNorm is gone.

    ``sample`` is run once in FP32, to see which BatchNorm stands behind which layer. Layers without scales stay in
    FP32. Raises InputError for names and shapes that are not the model's, and for scales that are no layer's.
    """
    state = read_state_dict(path)
    quantized = {}
    for step in Walk(model, sample):
        component = step.component
        if component.module is None:
            raise InputError(f"{path}: {component.name} is an ONNX file; expected a model of torch modules")
        step.outputs = run_module(component, step.inputs)
        folding = find_folding(component.module, example_args(component, step.inputs))
        quantized[component.name] = _load(component, component.module, folding, state, path)
    scaled_layers = {name for part in quantized.values() for name in part.scales.layers}
    for name in state:
        owner = name.removesuffix(AMAX).rpartition(".")[0]
        if name.endswith(AMAX) and owner not in scaled_layers:
            raise InputError(f"{path}: {name} is the scale of no layer of {model.name}")
    return quantized


def _load(
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
