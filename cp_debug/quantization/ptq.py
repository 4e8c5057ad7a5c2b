"""Post-training quantization by nvidia-modelopt: an FP32 module becomes one that computes as INT8 would, in FP32."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from itertools import chain
from typing import Any

import torch
from torch import nn

from cp_debug.errors import InputError, MissingPackage
from cp_debug.graph.scales import LayerScales, Scales
from cp_debug.optional import check_there, require
from cp_debug.optional import install as install_command
from cp_debug.probes.module_state import copied
from cp_debug.programs.align import module_digest
from cp_debug.programs.batchnorm_folding import Folding, fuse_model_bn
from cp_debug.programs.torch_layers import channels, full_path, is_quantized, layers_of, own_path, weight_axis
from cp_debug.quantization.calibration import CalibrationManager, plain_batches
from cp_debug.quantization.record import NOT_RUN, Quantization, also_named, print_quantizer_status, quantization_of
from cp_debug.quantization.residual_adds import add_quantizers, attach

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
            raise MissingPackage(f"modelopt needs the package {error.name!r}: {install_command('quant')}") from None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
        warnings.simplefilter("ignore")
        yield


@also_named(model="module", dataloader="batches", amax_method="method", fuse_bn="fold", sensitive_layers="skip_layers")
def quantize_ptq(
    module: nn.Module,
    batches: Iterable[Any],
    num_calibration_batches: int | None = None,
    method: str | None = None,
    fold: bool | None = None,
    skip_layers: Collection[str] | None = None,
    forward_fn: Callable[[nn.Module, Any], Any] | None = None,
    verbose: bool = False,
    *,
    prefix: str = "",
    bits: int = BITS,
) -> nn.Module:
    """A copy of ``module`` with fake quantizers, calibrated on ``batches``, which are read once.

    Weights get a scale for each output channel, inputs of layers one each, both operands of a residual addition one
    together; BatchNorm is folded first. ``method`` is ``mse``, also without one, ``max``, ``percentile``
    (99.99) or ``entropy``; ``skip_layers`` are globs over the paths of modules in the whole model, to which ``prefix``
    leads.

    AWML's names, in its order, do the same: ``model`` and ``dataloader`` are ``module`` and ``batches``,
    ``amax_method`` and ``fuse_bn`` are ``method`` and ``fold``, ``sensitive_layers`` are ``skip_layers``, and
    ``num_calibration_batches`` are read, all without it. A batch of nested containers is handed to
    ``forward_fn(model, batch)``, without one to the model's ``test_step`` where it has one; ``verbose`` prints the
    quantizers. AWML changes the model that it is given; here that one stays as it is.

    Raises InputError for a name that is given in both spellings, what is no module, no batches, NaN or Inf in one, a
    glob that matches no layer, an unknown method, other than 8 bits, and a module that is quantized already;
    MissingPackage without nvidia-modelopt.
    """
    if bits != BITS:
        raise InputError(f"bits: {bits} is not supported; expected {BITS}: engines have kernels for INT8")
    if not isinstance(module, nn.Module):
        raise InputError(f"module: {type(module).__name__}; expected a torch module")
    if not isinstance(batches, Iterable):
        raise InputError(f"batches: {type(batches).__name__}; expected batches, or a data loader of them")
    manager = CalibrationManager(module, method=method or "mse", skip_layers=sorted(skip_layers or ()), prefix=prefix)
    if num_calibration_batches is not None and num_calibration_batches < 1:
        raise InputError(f"num_calibration_batches is {num_calibration_batches}; expected at least 1")
    with plain_batches(module, batches, num_calibration_batches, forward_fn) as (stream, restore):
        first = next(stream, None)
        if first is None:
            raise InputError("there is no calibration data: expected at least one batch")
        check_there("modelopt", "quant")
        if fold is not False:
            manager.module = fuse_model_bn(module, manager.arguments(first))
        manager.calibrate(chain((first,), stream))
        made = quantized(manager)
        restore(made)
    if verbose:
        print_quantizer_status(made)
    return made


def quantized(manager: CalibrationManager) -> nn.Module:
    """A quantized copy of the module that ``manager`` has calibrated."""
    quantized_copy = apply_scales(manager.module, manager.scales(), manager.prefix)
    quantization_of(quantized_copy).skipped.update(
        {path: f"skipped by {glob!r}" for path, glob in manager.skipped.items()}
    )
    return quantized_copy


def apply_scales(module: nn.Module, scales: Scales, prefix: str = "") -> nn.Module:
    """A quantized copy of ``module``, which is FP32 with BatchNorm folded, with scales that exist already.

    ``prefix`` leads from the names of the scales to the module. Layers and additions that ``scales`` does not name stay
    in FP32. Raises InputError when the scales were calibrated on other weights, and for a module that is quantized
    already.
    """
    if is_quantized(module):
        raise InputError(f"{type(module).__name__} is quantized already; expected the FP32 model")
    if scales.model != module_digest(module):
        raise InputError(
            f"these scales were calibrated on other weights than those of this {type(module).__name__}; "
            "expected the cache of this model, with BatchNorm folded"
        )
    layers = {own_path(prefix, path): layer_scales for path, layer_scales in scales.layers.items()}
    return install(
        module, scales.model, scales.method, layers, {own_path(prefix, n): a for n, a in scales.residual_adds.items()}
    )


def install(
    module: nn.Module, model: str, method: str, layers: Mapping[str, LayerScales], residual_adds: Mapping[str, float]
) -> nn.Module:
    """A copy of ``module`` with these quantizers; layers and additions by their paths in the module.

    Raises InputError for a name that the module does not have.
    """
    quantized_module = copied(module).eval()
    present = layers_of(quantized_module)
    if unknown := sorted(layers.keys() - present.keys()):
        raise InputError(f"{type(module).__name__} has no layer {unknown[0]!r}")
    insert_quantizers(quantized_module, layers)
    device = next((p.device for p in quantized_module.parameters()), torch.device("cpu"))
    attach(quantized_module, {name: activation_quantizer(amax, device) for name, amax in residual_adds.items()})
    quantized_module.quantization = Quantization(  # type: ignore[assignment]
        model=model,
        method=method,
        layers=list(layers),
        residual_adds=list(residual_adds),
        skipped={path: NOT_RUN for path in present if path not in layers},
        folding=getattr(module, "folding", Folding(())),
    )
    return quantized_module


def scales_of(module: nn.Module, prefix: str = "") -> Scales:
    """The scales of the quantizers that are on; layers are named by their paths in the whole model.

    Raises InputError for a module that is not quantized.
    """
    record = quantization_of(module)
    layers: dict[str, LayerScales] = {}
    for path in record.layers:
        layer: Any = module.get_submodule(path)
        if layer.input_quantizer.is_enabled and layer.weight_quantizer.is_enabled:
            weight = layer.weight_quantizer.amax.flatten().cpu().numpy()
            layers[full_path(prefix, path)] = LayerScales(float(layer.input_quantizer.amax), weight)
    residual_adds = {
        full_path(prefix, name): float(q.amax) for name, q in add_quantizers(module).items() if q.is_enabled
    }
    return Scales(record.model, record.method, layers, residual_adds)
