"""The one place that uses nvidia-modelopt: its fake quantizers, put where they belong and nowhere else."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from cp_debug.errors import InputError, MissingPackage
from cp_debug.graph.scales import LayerScales
from cp_debug.optional import install, require
from cp_debug.programs.torch_layers import channels, layers_of, weight_axis

BITS = 8


def insert_quantizers(module: nn.Module, layers: Mapping[str, LayerScales]) -> None:
    """Give these layers, by path, quantizers for input and weight, in place.

    Every other quantizer that the library puts in is off. Raises InputError for scales that do not fit a weight and for
    a module that the library cannot take, MissingPackage without the library.
    """
    quantization = _library()
    layer_at = layers_of(module)
    for path, scales in layers.items():
        if len(scales.weight) != channels(layer_at[path]):
            raise InputError(f"{path}: {len(scales.weight)} scales for a weight of {channels(layer_at[path])} channels")
    entries: list[dict[str, Any]] = [{"quantizer_name": "*", "enable": False}]
    for path in layers:
        for kind, axis in (("input", None), ("weight", weight_axis(layer_at[path]))):
            name = f"{path}.{kind}_quantizer" if path else f"{kind}_quantizer"
            entries.append({"quantizer_name": name, "cfg": {"num_bits": BITS, "axis": axis}})
    with _quiet():
        try:
            quantization.quantize(module, {"quant_cfg": entries, "algorithm": None})
        except Exception as error:  # it walks, copies and patches the user's own classes
            what = f"{type(module).__name__}: modelopt cannot insert quantizers"
            raise InputError(f"{what}: {type(error).__name__}: {error}") from error
    for path, scales in layers.items():
        layer: Any = layer_at[path]
        weight = layer.weight
        shape = [-1 if axis == weight_axis(layer) else 1 for axis in range(weight.dim())]
        layer.input_quantizer.amax = torch.tensor(scales.input, device=weight.device)
        layer.weight_quantizer.amax = torch.tensor(scales.weight, device=weight.device).view(shape)


def activation_quantizer(amax: float, device: torch.device) -> nn.Module:
    """A fake quantizer with one scale for a whole tensor. Raises MissingPackage without the library."""
    quantization = _library()
    quantizer = quantization.nn.TensorQuantizer(quantization.config.QuantizerAttributeConfig(num_bits=BITS, axis=None))
    quantizer.amax = torch.tensor(amax, device=device)
    return quantizer


def _library() -> Any:
    """The library, imported without its warnings. Raises MissingPackage without it."""
    with _quiet():
        try:
            return require("modelopt.torch.quantization", "quant")
        except ModuleNotFoundError as error:  # modelopt does not declare all that it imports
            raise MissingPackage(f"modelopt needs the package {error.name!r}: {install('quant')}") from None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
        warnings.simplefilter("ignore")
        yield
