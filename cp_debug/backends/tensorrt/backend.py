"""TensorRT as a backend: ``trt-fp32``, ``trt-tf32``, ``trt-fp16``, ``trt-bf16``, ``trt-int8``, ``trt-best``."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from cp_debug.backends.base import Program
from cp_debug.backends.spec import BackendSpec
from cp_debug.backends.tensorrt.client import RunnerClient
from cp_debug.backends.tensorrt.config import largest_opset
from cp_debug.backends.tensorrt.options import TensorRTOptions
from cp_debug.backends.tensorrt.session import EngineSession
from cp_debug.errors import BackendUnavailable


class TensorRTBackend:
    """TensorRT on one CUDA device, wherever ``TensorRTOptions.python`` or the environment says it is.

    ``options`` are the fields of ``cp_debug.backends.tensorrt.options.Options``. Raises BackendUnavailable when there
    is no TensorRT, no GPU, or a version that cannot do what the spec says.
    """

    emulated = False

    def __init__(self, spec: BackendSpec, **options: Any) -> None:
        device = spec.device or "cuda:0"
        if device == "cpu":
            raise BackendUnavailable(str(spec), "TensorRT runs on CUDA only", nearest=spec.name)
        self.spec, self.device = spec, device
        self.precision = "fp16" if spec.variant == "best" else spec.variant
        index = int(device.partition(":")[2] or 0)
        self.options = replace(TensorRTOptions(**options), device=index)
        self.client = RunnerClient(
            self.options.python,
            spec=str(spec),
            time_limit=self.options.time_limit,
            on_event=self.options.on_event,
        )
        self._facts = self.client.probe(index)

    def keeping(self, nodes: Collection[str]) -> TensorRTBackend:
        """A copy of the backend that keeps these ONNX nodes in FP32."""
        copied = copy.copy(self)
        copied.options = replace(self.options, keep_fp32=frozenset(nodes))
        return copied

    @property
    def keep_fp32(self) -> frozenset[str]:
        """ONNX nodes that stay FP32."""
        return self.options.keep_fp32

    @property
    def profiles(self) -> Mapping[str, tuple[Sequence[int], Sequence[int], Sequence[int]]]:
        """Input → its smallest, optimal and largest shape."""
        return self.options.profiles

    @property
    def implicit_int8(self) -> bool:
        """Whether TensorRT's own calibrator finds the scales, so that the graph comes without Q/DQ pairs."""
        return self.options.calibration_cache is not None or self.options.calibration_data is not None

    @property
    def largest_opset(self) -> int | None:
        """The ONNX opset up to which this TensorRT reads."""
        return largest_opset(self._facts["tensorrt"])

    def open(self, program: Program) -> EngineSession:
        """Build the engine. Raises InputError when TensorRT cannot, or when no layer runs in the asked precision."""
        return EngineSession(
            self.client, program, self.spec.variant, self._facts["tensorrt"], self.options, self.versions()
        )

    def versions(self) -> dict[str, str]:
        """TensorRT, its Python and numpy, the GPU and its driver's CUDA version."""
        return self.client.versions(self.options.device)
