"""TensorRT as a backend: ``trt-fp32``, ``trt-tf32``, ``trt-fp16``, ``trt-bf16``, ``trt-int8``, ``trt-best``.

Its engines are built here, or were built before and run unchanged, without probes.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from cp_debug.backends.base import Program, Sink
from cp_debug.backends.spec import BackendSpec
from cp_debug.backends.tensorrt.client import RunnerClient
from cp_debug.backends.tensorrt.config import largest_opset
from cp_debug.backends.tensorrt.engine_runs import EngineRuns
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


class PrebuiltBackend:
    """The engine files of one TensorRT backend. ``builder`` builds engines of the same kind anew, with probes."""

    emulated = False

    def __init__(self, builder: TensorRTBackend, files: Mapping[str, Path]) -> None:
        self.builder, self._files = builder, files
        self.spec, self.precision, self.device = builder.spec, builder.precision, builder.device

    def open(self, program: Program) -> PrebuiltSession:
        """The component's engine."""
        return PrebuiltSession(self.builder.client, program, self._files[program.name], self.builder.options.device)

    def versions(self) -> dict[str, str]:
        """Versions of TensorRT, its Python and numpy, the GPU and its driver's CUDA version."""
        return self.builder.versions()


class PrebuiltSession:
    """One engine file; it shows its outputs."""

    def __init__(self, client: RunnerClient, program: Program, file: Path, device: int) -> None:
        self._graph, self._file = program.graph, file
        self._runs = EngineRuns(client, program.graph, device)

    @property
    def exposed(self) -> Collection[str]:
        """The graph's outputs."""
        return [v.name for v in self._graph.outputs]

    @property
    def settings(self) -> Mapping[str, Any]:
        """Path of the engine file; the manifest beside it has the settings of its build."""
        return {"engine": str(self._file)}

    def run(
        self, inputs: Mapping[str, np.ndarray], sink: Sink | None = None, probes: Collection[str] | None = None
    ) -> dict[str, np.ndarray]:
        """Run once. Raises InputError for inputs that do not fit the graph or the engine's profile.

        Takes and returns name → array in the dtype that the graph declares.
        """
        outputs = self._runs.once(self._file, inputs)
        for name, array in outputs.items():
            if sink is not None and (probes is None or name in probes):
                sink(name, array)
        return outputs

    def timings(self, inputs: Mapping[str, np.ndarray], passes: int) -> list[float]:
        """Seconds of ``passes`` runs after a first one, on the device, transfers left out.

        ``inputs``: name → array in the dtype and shape that the graph declares. Raises InputError for others.
        """
        return self._runs.timings(self._file, inputs, passes)

    def close(self) -> None:
        """Leave the engine file where it is: nothing else is held."""
