"""The constants of a graph, converted for an arithmetic and kept up to a size."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from cp_debug.backends.arithmetic import Arithmetic
from cp_debug.graph.constants import constant
from cp_debug.graph.graph import Graph


class Weights:
    """Initializers and the results of Constant nodes, by name.

    Both are read rounded as ``arithmetic`` stores constants, or exact by operators that take them as parameters, such
    as scales.
    """

    def __init__(self, graph: Graph, arithmetic: Arithmetic, device: torch.device, limit: int) -> None:
        self._graph, self._arithmetic, self._device = graph, arithmetic, device
        self._constants = {n.outputs[0]: n for n in graph.nodes if n.op == "Constant"}
        self._kept: dict[tuple[str, bool], Any] = {}
        """The last that were asked for, the latest at the end."""
        self._limit, self._held = limit, 0

    def free_memory(self) -> None:
        """Free what is kept; it is read again when it is asked for."""
        self._kept.clear()
        self._held = 0

    def holds(self, name: str) -> bool:
        """Whether ``name`` is a constant of the graph."""
        return name in self._graph.initializers or name in self._constants

    def __getitem__(self, name: str) -> Any:
        return self.get(name, rounded=True)

    def get(self, name: str, *, rounded: bool) -> Any:
        """The constant as a kernel wants it. Raises KeyError for a name that is none."""
        key = (name, rounded and self._arithmetic.value is not None)
        if key in self._kept:
            self._kept[key] = kept = self._kept.pop(key)
            return kept
        value = self._arithmetic.hold(self._read(name), self._device)
        if rounded:
            value = self._arithmetic.round_constant(value)
        if value.nbytes <= self._limit:
            self._kept[key] = value
            self._held += value.nbytes
            while self._held > self._limit:
                self._held -= self._kept.pop(next(iter(self._kept))).nbytes
        return value

    def numbers(self, name: str) -> torch.Tensor | None:
        """The constant in its shape, those of types that torch lacks (some FP8, 2 and 4 bits) in float64; None where
        there are no real numbers, and for a name that is no constant."""
        value = self[name] if self.holds(name) else None
        if isinstance(value, np.ndarray) and value.dtype.kind not in "OSUc":
            return torch.from_numpy(value.astype(np.float64))
        return value if isinstance(value, torch.Tensor) and not value.is_complex() else None

    def shape(self, name: str) -> tuple[int, ...] | None:
        """The shape of a constant of numbers, an initializer's without reading it; None as for ``numbers``."""
        if name in self._graph.initializers:
            return tuple(self._graph.weight(name).dims)
        value = self.numbers(name)
        return None if value is None else tuple(value.shape)

    def _read(self, name: str) -> Any:
        node = self._constants.get(name)
        return self._graph.initializer(name) if node is None else constant(node)
