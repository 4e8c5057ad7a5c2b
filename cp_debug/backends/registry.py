"""Makes the backend of a spec; the runtime is imported here and not before."""

from __future__ import annotations

from typing import Any

from cp_debug.backends.base import Backend
from cp_debug.backends.spec import BackendSpec


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
    from cp_debug.backends.tensorrt.backend import TensorRTBackend

    return TensorRTBackend(spec, **options)
