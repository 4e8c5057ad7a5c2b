"""Largest magnitudes of the data that layers of a graph read, over samples."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from cp_debug.errors import InputError
from cp_debug.graph.graph import Graph, Node
from cp_debug.probes.arrays import Tensor, as_numpy
from cp_debug.quantization.histogram import Histogram

METHODS = ("max", "percentile")
"""Ways to choose a scale for types whose steps grow with the numbers: little is gained there by clipping."""


class DataRanges:
    """Ranges of what ``nodes`` of a graph read first."""

    def __init__(self, graph: Graph, nodes: Iterable[Node]) -> None:
        self._graph = graph
        self._inputs = {node.name: node.proto.input[0] for node in nodes}
        self._seen = {value: Histogram() for value in self._inputs.values()}
        self._samples = 0

    @property
    def watched(self) -> set[str]:
        """The values, graph inputs included, that ``see`` must be given."""
        return set(self._seen)

    def see(self, name: str, tensor: Tensor) -> None:
        """Count one tensor of a run, of any shape and float dtype, if it is a watched one.

        Raises InputError for NaN or Inf in it.
        """
        if name in self._seen:
            self._samples += 1
            try:
                self._seen[name].add(torch.as_tensor(as_numpy(tensor)))
            except ValueError as error:
                raise InputError(f"{self._graph}: {name!r} holds {error} during calibration") from None

    def amax(self, method: str) -> dict[str, float]:
        """Node → the largest magnitude to represent, by one of ``METHODS``. Raises InputError when nothing was seen."""
        if self._inputs and not self._samples:
            raise InputError(f"{self._graph}: there is no calibration data: expected at least one sample")
        return {node: self._seen[value].amax(method) for node, value in self._inputs.items()}
