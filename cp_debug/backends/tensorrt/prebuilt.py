"""Engines that were built before: run as they are, without probes."""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from cp_debug.backends.base import Program, Sink
from cp_debug.backends.tensorrt.backend import TensorRTBackend
from cp_debug.backends.tensorrt.client import RunnerClient
from cp_debug.backends.tensorrt.engines import Engine
from cp_debug.backends.tensorrt.options import TensorRTOptions
from cp_debug.backends.tensorrt.session import EngineSession


class PrebuiltBackend:
    """The engine files of one TensorRT backend. ``builder`` builds engines of the same kind anew, with probes."""

    emulated = False

    def __init__(self, builder: TensorRTBackend, files: Mapping[str, Path]) -> None:
        self.builder, self._files = builder, files
        self.spec, self.precision, self.device = builder.spec, builder.precision, builder.device

    def open(self, program: Program) -> PrebuiltSession:
        """The component's engine."""
        return PrebuiltSession(self.builder.client, program, self._files[program.name], self.builder.options)

    def versions(self) -> dict[str, str]:
        """Those of the backend."""
        return self.builder.versions()


class PrebuiltSession(EngineSession):
    """One engine file; it shows its outputs."""

    def __init__(self, client: RunnerClient, program: Program, file: Path, options: TensorRTOptions) -> None:
        self._client, self._own, self._options = client, program.graph, options
        self._folder = tempfile.TemporaryDirectory(prefix="cpdebug-engine-")
        self._file = file

    @property
    def exposed(self) -> Collection[str]:
        """The graph's outputs."""
        return [v.name for v in self._own.outputs]

    @property
    def settings(self) -> Mapping[str, Any]:
        """Which file it is; what it was built with stands in the manifest beside it."""
        return {"engine": str(self._file)}

    def run(
        self, inputs: Mapping[str, np.ndarray], sink: Sink | None = None, probes: Collection[str] | None = None
    ) -> dict[str, np.ndarray]:
        """Run once. Raises InputError for inputs that do not fit the graph or the engine's profile."""
        outputs = super().run(inputs)
        for name, array in outputs.items():
            if sink is not None and (probes is None or name in probes):
                sink(name, array)
        return outputs

    def _engines(self, inputs: Mapping[str, np.ndarray]) -> Any:
        return SimpleNamespace(plain=Engine(self._file, (), {}))
