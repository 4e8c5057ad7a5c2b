"""Engines that were built before: run unchanged, without probes."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cp_debug.backends.base import Program, Sink
from cp_debug.backends.tensorrt.backend import TensorRTBackend
from cp_debug.backends.tensorrt.client import RunnerClient
from cp_debug.backends.tensorrt.engine_runs import EngineRuns


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
