"""Side values that a backend folded away, computed again from the graph it was given.

An optimizer computes what hangs on weights alone, and on shapes, before the first run: no probe shows it. Where test
and reference are different graphs, such a branch may hold the difference, so it is computed from each side's own graph
and judged like any layer.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cp_debug.backends.arithmetic import FP32
from cp_debug.backends.base import Tensor as AnyTensor
from cp_debug.backends.executor import Executor
from cp_debug.errors import InputError
from cp_debug.graph.graph import Graph
from cp_debug.programs.layers import side_values


class Folded:
    """Side values of ``graph`` that are not ``exposed``, computed again.

    Every value of a run goes through ``see``; then ``values`` gives those that were not seen.
    """

    def __init__(self, graph: Graph, exposed: Collection[str]) -> None:
        self._graph = graph
        numeric = set(graph.tensors)
        self.names = [v for v in side_values(graph) if v not in exposed and v in numeric]
        self._measured = {n.inputs[0] for n in graph.nodes if n.op in ("Shape", "Size") and n.inputs}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._executor = Executor(graph, FP32)

    def see(self, name: str, tensor: AnyTensor) -> None:
        """Keep the shape of a tensor (any shape and dtype) of the run, where an operator asks for it."""
        if name in self._measured:
            self._shapes[name] = tuple(tensor.shape)

    def values(self) -> Iterator[tuple[str, np.ndarray]]:
        """Each folded value with its name, in execution order; what cannot be computed is left out.

        Arrays have the shape and dtype that the node gives.
        """
        # Of a tensor whose elements nobody reads, one zero in its shape will do.
        computed: dict[str, Any] = {name: torch.zeros(()).expand(shape) for name, shape in self._shapes.items()}
        for node in self._graph.nodes:
            if not (node.op == "Constant" or set(node.outputs) & set(self.names)):
                continue
            try:
                results = self._executor.run_nodes([node], computed, node.outputs)
            except InputError:  # an operator that nothing here can execute, or a shape that no probe showed
                continue
            computed |= results
            for name, value in results.items():
                if name in self.names:
                    yield name, value.cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)
