"""Makes the backend of a spec; the runtime is imported here and not before."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import import_module
from typing import Any

from cp_debug import plugins
from cp_debug.backends.base import Backend
from cp_debug.backends.spec import COMPILED, BackendSpec
from cp_debug.errors import InputError
from cp_debug.optional import check_there

_FIELDS = ("spec", "precision", "device", "emulated", "open", "versions")
"""Attributes that a ``Backend`` has."""
_OWN = {
    "torch-fp8": "torch_fp8:TorchFp8Backend",
    COMPILED: "torch_compile:TorchCompileBackend",
    "torch": "torch_backend:TorchBackend",
    "ort": "ort_backend:OrtBackend",
    "emu": "emulated:EmulatedBackend",
    "openvino": "openvino_backend:OpenVinoBackend",
    "trt": "tensorrt.backend:TensorRTBackend",
}
"""Name or family of a spec → module of this package and class."""


def create(spec: BackendSpec, **options: Any) -> Backend:
    """The backend of a spec. ``options`` go to its constructor (ONNX Runtime: ``disabled_optimizers``, ``threads``).

    Raises BackendUnavailable or MissingPackage when it cannot run here.
    """
    own = spec.name if spec.name in _OWN else COMPILED if spec.name.startswith(COMPILED) else spec.family
    if own not in _OWN:
        return _from_plugin(spec, options)
    module, _, name = _OWN[own].partition(":")
    backend: Backend = getattr(import_module(f"cp_debug.backends.{module}"), name)(spec, **options)
    return backend


def check_installed(specs: Iterable[BackendSpec], trt_python: str | None = None) -> None:
    """Whether the runtimes of some specs are there, as far as that can be told without importing them or torch.

    ``trt_python``: the interpreter that a command line names for TensorRT. Raises BackendUnavailable or MissingPackage
    for the first one that is missing; whether what is there works, ``create`` finds out.
    """
    for spec in specs:
        if spec.family == "ort":
            check_there("onnxruntime", "cpu")
        if spec.family == "openvino":
            check_there("openvino", "openvino")
        if spec.name == "torch-int8":
            check_there("modelopt", "quant")
        if spec.family == "trt":
            from cp_debug.backends.tensorrt.client import check_named

            check_named(trt_python, str(spec))


def _from_plugin(spec: BackendSpec, options: dict[str, Any]) -> Backend:
    from cp_debug.backends.arithmetic import ARITHMETICS

    plugin = plugins.names(plugins.BACKENDS)[spec.family]
    make = plugin.load()
    with plugin.running():
        backend = make(spec, **options)
    plugin.require(backend, _FIELDS, "backend (cp_debug.backends.base.Backend)")
    if backend.precision not in ARITHMETICS:
        expected = ", ".join(ARITHMETICS)
        raise InputError(f"{plugin} returned a backend of precision {backend.precision!r}; expected one of {expected}")
    return backend
