"""A graph some layers of which compute in FP32 and the rest in the arithmetic under test.

It is computed anew only from where two runs differ: a trial costs the part of the network behind the first layer that
changed.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from cp_debug.backends.arithmetic import FP32, Arithmetic
from cp_debug.backends.determinism import deterministic
from cp_debug.backends.executor import Executor
from cp_debug.bisect.backward import Backward
from cp_debug.graph.check_inputs import check_inputs
from cp_debug.graph.graph import Graph, Node
from cp_debug.graph.qdq import plain_nodes
from cp_debug.graph.tensor_ends import as_arrays
from cp_debug.probes.arrays import as_numpy
from cp_debug.probes.distance import relative_l2


@dataclass(frozen=True)
class Computed:
    """One run: the nodes that were FP32, and every value."""

    high: frozenset[str]
    values: Mapping[str, Any]

    @property
    def nbytes(self) -> int:
        """Memory of the values."""
        return sum(getattr(value, "nbytes", 0) for value in self.values.values())


class MixedExecutor:
    """Runs one graph. Nodes in FP32 read what is in front of a Q/DQ pair, not what comes out of it.

    Results equal, bit for bit, those of ``EmulatedBackend`` with the same nodes as its ``overrides``.
    """

    def __init__(self, graph: Graph, arithmetic: Arithmetic, device: str) -> None:
        self.graph = graph
        self._low, self._high = Executor(graph, arithmetic, device), Executor(graph, FP32, device)
        self._plain = plain_nodes(graph)
        self._nodes = [node for node in graph.nodes if node.op != "Constant"]
        self.executed = 0
        """Nodes computed so far."""

    def run(self, inputs: Mapping[str, np.ndarray], high: frozenset[str], known: Iterable[Computed] = ()) -> Computed:
        """Run with the nodes ``high`` in FP32; of ``known`` runs the nearest is continued."""
        check_inputs(self.graph.inputs, inputs, str(self.graph))
        near = min(known, key=lambda run: len(run.high ^ high), default=None)
        before: Mapping[str, Any] = near.values if near else {}
        values: dict[str, Any] = {}
        for name, array in inputs.items():
            values[name] = _unless_equal(before.get(name), self._high.arithmetic.hold(array, self._high.device))
        with deterministic():
            for node in (self._of(node, high) for node in self._nodes):
                same = near is not None and (node.name in high) == (node.name in near.high)
                if same and all(values.get(name) is before.get(name) for name in node.inputs):
                    values.update((name, before[name]) for name in node.outputs)
                    continue
                for name, value in self._compute(node, high, values).items():
                    values[name] = _unless_equal(before.get(name), value)
        return Computed(high, values)

    def outputs(self, computed: Computed) -> dict[str, np.ndarray]:
        """The graph's outputs of a run: name → array, other outputs than tensors in parts as ``as_arrays`` has them."""
        results = self._high.run_nodes([], computed.values, [v.name for v in self.graph.outputs])
        return as_arrays(self.graph, results, as_numpy)

    def local_error(self, nodes: Collection[str], exact: Computed) -> float:
        """Error that ``nodes`` introduce by computing in the low arithmetic from the values of an FP32 run.

        Relative L2 of the worst value that others read; infinite where it is not finite, though the FP32 run's is.
        """
        chosen = [node for node in self._nodes if node.name in nodes]
        computed: dict[str, Any] = {}
        with deterministic():
            for node in chosen:
                computed |= self._compute(node, frozenset(), ChainMap(computed, dict(exact.values)))
        inner = {name for node in chosen for name in node.inputs}
        worst = 0.0
        for name in computed.keys() - (inner - {v.name for v in self.graph.outputs}):
            worst = max(worst, relative_l2(computed[name], exact.values[name]))
        return worst

    def backward(self, computed: Computed) -> Backward:
        """The walk back from derivatives of the outputs of this run; counted as three runs of the graph."""
        self.executed += 3 * len(self._nodes)
        test = computed.values.__getitem__
        return Backward(self.graph, computed.values.keys(), test, self._high, plain=self._plain)

    def _of(self, node: Node, high: Collection[str]) -> Node:
        """The node as it is computed: in FP32 it reads in front of Q/DQ pairs."""
        return self._plain.get(node.name, node) if node.name in high else node

    def _compute(self, node: Node, high: Collection[str], values: Mapping[str, Any]) -> dict[str, Any]:
        self.executed += 1
        executor = self._high if node.name in high else self._low
        return executor.run_nodes([node], values, node.outputs)


def _unless_equal(before: Any, value: Any) -> Any:
    """``before`` itself where both are the same tensor, so that who reads it need not be computed again."""
    if isinstance(before, torch.Tensor) and isinstance(value, torch.Tensor):
        alike = before.dtype == value.dtype and before.shape == value.shape
        return before if alike and torch.equal(before, value) else value
    return value
