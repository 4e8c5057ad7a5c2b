"""Makes the backend of a spec; the runtime is imported here and not before."""

from __future__ import annotations

from typing import Any

from cp_debug import plugins
from cp_debug.backends.base import Backend
from cp_debug.backends.spec import BackendSpec
from cp_debug.errors import InputError

_FIELDS = ("spec", "precision", "device", "emulated", "open", "versions")
"""Attributes that a ``Backend`` has."""


def create(spec: BackendSpec, **options: Any) -> Backend:
    """The backend of a spec. ``options`` go to its constructor (ONNX Runtime: ``disabled_optimizers``, ``threads``).

    Raises BackendUnavailable or MissingPackage when it cannot run here.
    """
    if spec.family == "torch":
        from cp_debug.backends.torch_backend import TorchBackend

        return TorchBackend(spec, **options)
    if spec.family == "ort":
        from cp_debug.backends.ort_backend import OrtBackend

        return OrtBackend(spec, **options)
    if spec.family == "emu":
        from cp_debug.backends.emulated import EmulatedBackend

        return EmulatedBackend(spec, **options)
    if spec.family == "trt":
        from cp_debug.backends.tensorrt.backend import TensorRTBackend

        return TensorRTBackend(spec, **options)
    return _from_plugin(spec, options)


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
