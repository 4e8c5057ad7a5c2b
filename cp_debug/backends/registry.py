"""Makes the backend of a spec; the runtime is imported here and not before."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from cp_debug import plugins
from cp_debug.backends.base import Backend
from cp_debug.backends.spec import COMPILED, BackendSpec
from cp_debug.errors import InputError
from cp_debug.optional import check_there

_FIELDS = ("spec", "precision", "device", "emulated", "open", "versions")
"""Attributes that a ``Backend`` has."""


def create(spec: BackendSpec, **options: Any) -> Backend:
    """The backend of a spec. ``options`` go to its constructor (ONNX Runtime: ``disabled_optimizers``, ``threads``).

    Raises BackendUnavailable or MissingPackage when it cannot run here.
    """
    if spec.name == "torch-fp8":
        from cp_debug.backends.torch_fp8 import TorchFp8Backend

        return TorchFp8Backend(spec, **options)
    if spec.name.startswith(COMPILED):
        from cp_debug.backends.torch_compile import TorchCompileBackend

        return TorchCompileBackend(spec, **options)
    if spec.family == "torch":
        from cp_debug.backends.torch_backend import TorchBackend

        return TorchBackend(spec, **options)
    if spec.family == "ort":
        from cp_debug.backends.ort_backend import OrtBackend

        return OrtBackend(spec, **options)
    if spec.family == "emu":
        from cp_debug.backends.emulated import EmulatedBackend

        return EmulatedBackend(spec, **options)
    if spec.family == "openvino":
        from cp_debug.backends.openvino_backend import OpenVinoBackend

        return OpenVinoBackend(spec, **options)
    if spec.family == "trt":
        from cp_debug.backends.tensorrt.backend import TensorRTBackend

        return TensorRTBackend(spec, **options)
    return _from_plugin(spec, options)


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
