"""Largest magnitudes of the data that layers of a graph read, over samples."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from cp_debug.backends.base import Program
from cp_debug.backends.executor import Executor
from cp_debug.errors import InputError
from cp_debug.graph.graph import Graph, Node
from cp_debug.probes.arrays import Tensor, dtype_name, has_torch_type, to_device
from cp_debug.programs.walk import Walk, tensors_as_arrays
from cp_debug.quantization.histogram import Histogram
from cp_debug.recipes.base import Model, Sample

METHODS = ("max", "percentile")
"""Ways to choose a scale for types whose steps grow with the numbers: little is gained there by clipping."""


class DataRanges:
    """Ranges of what ``nodes`` of a graph read first, of additions those of both operands together, whoever runs it."""

    def __init__(self, graph: Graph, nodes: Iterable[Node]) -> None:
        self._graph = graph
        self._read = {n.name: tuple(n.proto.input) if n.op == "Add" else (n.proto.input[0],) for n in nodes}
        self._seen = {values: Histogram() for values in self._read.values()}
        self._of_value: dict[str, list[Histogram]] = {}
        for values, histogram in self._seen.items():
            for value in values:
                self._of_value.setdefault(value, []).append(histogram)
        self._shapes: dict[str, tuple[int, ...]] = {}

    @property
    def watched(self) -> set[str]:
        """The values, graph inputs included, that ``see`` must be given."""
        return set(self._of_value)

    def see(self, name: str, tensor: Tensor) -> None:
        """Count one tensor of a run, of any shape and float dtype, if it is a watched one.

        Raises InputError for NaN or Inf in it.
        """
        for histogram in self._of_value.get(name, ()):
            if not has_torch_type(tensor):
                what = f"{name!r} is {dtype_name(tensor)}, which is not calibrated; expected floats"
                raise InputError(f"{self._graph}: {what}")
            self._shapes[name] = tuple(tensor.shape)
            try:
                histogram.add(to_device(tensor, "cpu"))
            except ValueError as error:
                raise InputError(f"{self._graph}: {name!r} holds {error} during calibration") from None

    def run(self, executor: Executor, inputs: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """Outputs that ``executor`` computes of ``inputs``, of shapes and dtypes that the graph takes; all is seen."""
        for name, array in inputs.items():
            self.see(name, array)
        return executor.run(inputs, self.see, self.watched)

    def amax(self, method: str) -> dict[str, float]:
        """Node → the largest magnitude to represent, by one of ``histogram.METHODS``.

        Raises InputError when nothing was seen.
        """
        if self._read and not self._shapes:
            raise InputError(f"{self._graph}: there is no calibration data: expected at least one sample")
        return {node: self._seen[values].amax(method) for node, values in self._read.items()}


def amax_of_programs(
    model: Model,
    programs: Sequence[Program],
    nodes: Mapping[str, Iterable[Node]],
    samples: Iterable[Sample],
    method: str = "max",
) -> dict[str, dict[str, float]]:
    """Program → node → the largest magnitude of what it reads first, over ``samples`` on their way through the model.

    ``nodes``: those of each program. Raises InputError for NaN and Inf, which names the sample, and without a sample.
    """
    ranges = {p.name: DataRanges(p.graph, nodes[p.name]) for p in programs}
    executors = {p.name: Executor(p.graph) for p in programs}
    for sample in samples:
        for step in Walk(model, sample):
            seen = ranges[step.name]
            try:
                step.outputs = tensors_as_arrays(seen.run(executors[step.name], step.inputs))
            except InputError as error:
                raise InputError(f"{sample.source}: {error}") from error
    return {name: seen.amax(method) for name, seen in ranges.items()}
