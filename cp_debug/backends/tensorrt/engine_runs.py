"""Runs of engines in the runner's process, and reading of the results that they wrote."""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cp_debug.backends.tensorrt.answers import Ran
from cp_debug.backends.tensorrt.client import RunnerClient
from cp_debug.backends.tensorrt.options import LoaderScript
from cp_debug.errors import BackendUnavailable, InputError
from cp_debug.graph.check_inputs import check_inputs
from cp_debug.graph.graph import Graph, fits_shape
from cp_debug.reading import read_npy

RUNS = 20
"""Further runs of the plain engine that measure its time."""


@dataclass(frozen=True)
class RanEngine:
    """One engine after its runs."""

    written: dict[str, Path]
    """Value → file."""
    seconds: list[float]
    """Seconds of every run."""


class EngineRuns:
    """Runs engines of one graph on one device."""

    def __init__(self, client: RunnerClient, graph: Graph, device: int, loader: LoaderScript | None = None) -> None:
        self._client, self._graph, self._device = client, graph, device
        self._loader = loader and loader.step()

    def execute(
        self,
        engines: Sequence[Path],
        inputs: Mapping[str, np.ndarray],
        folder: Path,
        values: Collection[str] = (),
        listen: bool = False,
        repeat: int = 0,
    ) -> list[RanEngine]:
        """Run engine files one after the other in one process; ``folder`` takes what goes in and out.

        ``values`` are put out besides the graph's outputs, where an engine has them. ``listen`` is for the first one,
        which runs ``repeat`` more times; the others run repeatedly. ``inputs``: name → array in the dtype and shape
        that the graph declares.
        """
        feeds = {}
        for i, value in enumerate(self._graph.inputs):
            feeds[value.name] = str(folder / f"input-{i}.npy")
            np.save(feeds[value.name], inputs[value.name], allow_pickle=False)
        names = sorted({*values, *(v.name for v in self._graph.outputs)})
        steps = [
            {
                "command": "run",
                "device": self._device,
                "loader": self._loader,
                "engine": str(engine),
                "inputs": feeds,
                "folder": str(folder / f"run-{i}"),
                "names": names,
                "listen": listen and i == 0,
                "repeat": RUNS if i else repeat,
            }
            for i, engine in enumerate(engines)
        ]
        return [
            RanEngine(self._written(result["tensors"], Path(str(step["folder"]))), self._seconds(step, result))
            for step, result in zip(steps, self._client.checked(Ran, self._client.execute(steps)), strict=True)
        ]

    def once(self, engine: Path, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The outputs of one run. Raises InputError for inputs that do not fit the graph.

        Takes and returns name → array in the dtype that the graph declares.
        """
        check_inputs(self._graph.inputs, inputs, str(self._graph))
        with tempfile.TemporaryDirectory(prefix="cpdebug-engine-") as folder:
            (ran,) = self.execute([engine], inputs, Path(folder))
            return self.outputs(ran.written)

    def timings(self, engine: Path, inputs: Mapping[str, np.ndarray], repeats: int) -> list[float]:
        """Seconds of ``repeats`` runs after a first one, on the device, transfers left out.

        ``inputs``: name → array in the dtype and shape that the graph declares.
        Raises InputError for inputs that do not fit the graph.
        """
        check_inputs(self._graph.inputs, inputs, str(self._graph))
        with tempfile.TemporaryDirectory(prefix="cpdebug-engine-") as folder:
            (ran,) = self.execute([engine], inputs, Path(folder), repeat=repeats)
        return ran.seconds[1:]

    def _seconds(self, step: Mapping[str, Any], result: Mapping[str, Any]) -> list[float]:
        """Seconds of each run. Raises BackendUnavailable where there are more or fewer than were asked for."""
        expected, seconds = 1 + int(step["repeat"]), list(result["seconds"])
        if len(seconds) != expected:
            raise self.nonsense(f"it reports the times of {len(seconds)} runs; expected {expected}")
        return seconds

    def _written(self, entries: Sequence[Mapping[str, str]], folder: Path) -> dict[str, Path]:
        """Value → file. Raises BackendUnavailable for files elsewhere, and where an output is missing."""
        written = {entry["name"]: Path(entry["file"]) for entry in entries}
        for name, file in written.items():
            if file.parent != folder or file.name in ("", ".", ".."):
                raise self.nonsense(f"{name!r} is in {str(file)!r}; expected a file in the run's folder")
        if missing := [v.name for v in self._graph.outputs if v.name not in written]:
            raise self.nonsense(f"the output {missing[0]!r} is missing")
        return written

    def load(self, name: str, file: Path) -> np.ndarray:
        """A tensor that was written. Raises BackendUnavailable for a file that is none.

        Shape and dtype are the engine's: numbers or bool.
        """
        try:
            array = read_npy(file)
        except InputError as error:
            raise self.nonsense(f"{name!r}: {error}") from None
        if array.dtype.kind not in "fiub":
            raise self.nonsense(f"{name!r} is {array.dtype}; expected numbers")
        return array

    def nonsense(self, problem: str) -> BackendUnavailable:
        """The error for an answer that cannot be used."""
        return BackendUnavailable(self._client.spec, f"its runner's answer cannot be used: {problem}")

    def outputs(self, written: Mapping[str, Path]) -> dict[str, np.ndarray]:
        """The graph's outputs in the graph's own types: TensorRT 8.6 has INT32 where ONNX says INT64.

        Name → array in the dtype and shape that the graph declares. Raises BackendUnavailable for a file that does not
        fit.
        """
        outputs = {}
        for value in self._graph.outputs:
            array = self.load(value.name, written[value.name])
            if not fits_shape(array.shape, value.shape):
                raise self.nonsense(f"the output {value} has the shape {list(array.shape)}")
            outputs[value.name] = array.astype(value.dtype, copy=False)
        return outputs


def output_distance(reference: Mapping[Any, np.ndarray], test: Mapping[Any, np.ndarray]) -> float:
    """``outputs_apart`` of a test from its reference, name → array of any shape and dtype."""
    from cp_debug.probes.distance import outputs_apart  # brings torch, which evaluation of engines does without

    return outputs_apart(test, reference)
