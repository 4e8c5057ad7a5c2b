"""One component computed in all plausible ways side by side, layer after layer, and once in FP32 beside them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cp_debug.backends.arithmetic import FP32, Arithmetic
from cp_debug.backends.executor import Executor
from cp_debug.backends.kernels.fp16_accumulation import BIAS, with_epilogue
from cp_debug.bisect.masks import beside_masks
from cp_debug.graph.graph import Graph, Node, data_values
from cp_debug.graph.qdq import plain_nodes
from cp_debug.graph.tensor_ends import as_arrays
from cp_debug.prediction.groups import FEW, LARGE, Group, groups_of, operations, undecided
from cp_debug.prediction.targets import Kernel
from cp_debug.probes.arrays import as_numpy
from cp_debug.probes.distance import relative_l2

VECTOR = 8
"""Values that a thread loads at once in the kernels that took first convolutions on TensorRT 8.6."""
EXACT = ""
"""The name of the FP32 run among those of the kernels."""

Values = dict[str, Any]


@dataclass
class Walked:
    """One group as all kernels computed it. Errors: kernel → relative L2, infinite where a result is not finite."""

    group: Group
    value: str
    reads: list[str]
    """Values that the group reads and that depend on the model's input, around Q/DQ pairs."""
    error: dict[str, float] = field(default_factory=dict)
    introduced: dict[str, float] = field(default_factory=dict)
    inside: dict[str, dict[str, float]] = field(default_factory=dict)
    """Value inside the group → its errors, of kernels that compute it."""
    exact: Tensor | None = None
    """The result in FP32, see ``beside_masks``."""
    largest: dict[str, float] = field(default_factory=dict)
    """Node of the group → the largest finite magnitude of its results in FP32."""
    may_stay: bool = False
    """Whether a weakly typed target may leave the group in FP32."""


class GraphWalk:
    """One component on one sample. ``inputs``: run (a kernel's name, or ``EXACT``) → what it is fed, by input.

    Every kernel is fed its own upstream results, as in a deployed pipeline. Values are freed after their last reader.
    ``timed``: whether the target chooses kernels by timing them; any layer may be in FP32 where it does not.
    """

    def __init__(self, graph: Graph, kernels: Sequence[Kernel], device: str, *, timed: bool = True) -> None:
        self.graph, self._kernels = graph, kernels
        self._device = device
        self._executors = {
            kernel.name: Executor(graph, kernel.arithmetic, device, overrides=_direct(graph, kernel) if i == 0 else {})
            for i, kernel in enumerate(kernels)
        }
        self._oracle = Executor(graph, FP32, device)
        self._plain = plain_nodes(graph)
        self.groups = groups_of(graph)
        self._timed = timed
        open_groups = undecided(graph, self.groups) if timed else range(len(self.groups))
        self._undecided = {self.groups[i].nodes[0].index for i in open_groups if self.groups[i].computes}
        """Index of the first node of each group that a weakly typed target may leave in FP32, if it is not large."""
        self._data = set(data_values(graph)) | {v.name for v in graph.inputs}
        self.outputs: dict[str, dict[str, np.ndarray]] = {}
        """Run → output → array, once walked."""

    @property
    def not_emulated(self) -> dict[str, str]:
        """Node → operator of the nodes that were only rounded at their result."""
        return {n: op for executor in self._executors.values() for n, op in executor.not_emulated.items()}

    def run(self, inputs: Mapping[str, Mapping[str, np.ndarray]]) -> Iterator[Walked]:
        """The groups in execution order, each once it is computed; then ``outputs`` is known."""
        output_names = [v.name for v in self.graph.outputs]
        live: dict[str, Values] = {run: dict(given) for run, given in inputs.items()}
        readers = Counter(name for group in self.groups for name in self._reads(group)) + Counter(output_names)
        for group in self.groups:
            results = self._exits(group, readers)
            if group.side:
                side_values = self._oracle.run_nodes(group.nodes, live[EXACT], results)
                for values in live.values():
                    values.update(side_values)
            else:
                yield from self._compute(group, results, live)
            for name in self._reads(group):
                readers[name] -= 1
                if not readers[name]:
                    for values in live.values():
                        values.pop(name, None)
        for run, values in live.items():
            tensors = self._oracle.run_nodes([], values, output_names)
            self.outputs[run] = as_arrays(self.graph, tensors, as_numpy)

    def _exactly(self, group: Group, given: Mapping[str, Any], names: Sequence[str]) -> tuple[Values, Values]:
        inside: Values = {}
        plain = [self._plain.get(node.name, node) for node in group.nodes]
        return self._oracle.run_nodes(plain, given, names, inside.__setitem__), inside

    def _may_stay(self, group: Group, values: Mapping[str, Any]) -> bool:
        if group.nodes[0].index not in self._undecided:
            return False
        return not self._timed or operations(self.graph, group, values) < LARGE

    def _reads(self, group: Group) -> set[str]:
        """Values that the nodes of a group read from outside, around Q/DQ pairs too."""
        written = {output for node in group.nodes for output in node.outputs}
        around = {name for node in group.nodes if node.name in self._plain for name in self._plain[node.name].inputs}
        return ({name for node in group.nodes for name in node.inputs} | around) - written

    @staticmethod
    def _exits(group: Group, readers: Mapping[str, int]) -> list[str]:
        return [o for node in group.nodes for o in node.outputs if readers.get(o)] or list(group.nodes[-1].outputs)

    def _compute(self, group: Group, results: Sequence[str], live: Mapping[str, Values]) -> Iterator[Walked]:
        plain = [self._plain.get(node.name, node) for node in group.nodes]
        exact, exact_inside = self._exactly(group, live[EXACT], results)
        outer = self._data.difference(output for node in plain for output in node.outputs)
        reads = [name for name in dict.fromkeys(i for n in plain for i in n.inputs) if name in outer]
        may_stay = self._may_stay(group, {**live[EXACT], **exact_inside, **exact})
        walked = {
            v: Walked(group, v, reads, exact=self._beside_masks(v, x, x)[1], may_stay=may_stay)
            for v in results
            if isinstance(x := exact[v], Tensor) and x.is_floating_point()
        }
        computed = exact_inside | exact
        largest = {n.name: _largest(self._beside_masks(o, *[computed.get(o)] * 2)[0] for o in n.outputs) for n in plain}
        for value in walked.values():
            value.largest = largest
        results_by_run: dict[str, Values] = {EXACT: exact}
        for kernel in self._kernels:
            inside: Values = {}
            given = live[kernel.name]
            if kernel.mixed and may_stay:
                kernel_results, inside = self._exactly(group, given, results)
            else:
                kernel_results = self._low(kernel, group, given, results, inside)
            results_by_run[kernel.name] = kernel_results
            for name, value in walked.items():
                value.error[kernel.name] = _error(*self._beside_masks(name, kernel_results[name], exact[name]))
                value.inside |= {
                    inner: value.inside.get(inner, {})
                    | {kernel.name: _error(*self._beside_masks(inner, x, exact_inside[inner]))}
                    for inner, x in inside.items()
                    if inner in exact_inside
                    and inner not in results
                    and isinstance(x, Tensor)
                    and x.is_floating_point()
                }
            if group.computes and walked:
                right = self._oracle.run_nodes(plain, live[kernel.name], list(walked))
                for name, value in walked.items():
                    value.introduced[kernel.name] = _error(*self._beside_masks(name, kernel_results[name], right[name]))
        for run, values in live.items():
            values.update(results_by_run[run])
        yield from walked.values()

    def _beside_masks(self, name: str, ours: Any, exact: Any) -> tuple[Any, Any]:
        if not (_floats(ours) and _floats(exact) and ours.shape == exact.shape):
            return ours, exact
        ours, exact = beside_masks(self.graph, name, ours, exact)
        return ours, exact

    def _low(
        self,
        kernel: Kernel,
        group: Group,
        given: Mapping[str, Any],
        results: Sequence[str],
        inside: dict[str, Any],
    ) -> dict[str, Any]:
        nodes, biases = with_epilogue(self.graph, group.nodes, given) if kernel.fused else (group.nodes, {})
        executor, values = self._executors[kernel.name], {**given, **biases}
        results_low = executor.run_nodes(nodes, values, results, inside.__setitem__ if kernel.stored is None else None)
        for node in (n for n in group.nodes if n.name + BIAS in biases):
            inside.pop(node.outputs[0], None)  # it lacks the bias
        if kernel is self._kernels[0] and any(o not in inside for n in group.nodes for o in n.outputs):
            executor.run_nodes(group.nodes, given, results, inside.setdefault)  # for an engine that splits the group
        if kernel.stored is None or not group.computes:
            return results_low
        last = {v.name for v in self.graph.outputs}
        return {n: x if n in last or not _floats(x) else kernel.stored.round(x) for n, x in results_low.items()}


def _direct(graph: Graph, kernel: Kernel) -> dict[str, Arithmetic]:
    """Convolutions that read few channels, in the order of the kernels that take them."""
    if not kernel.arithmetic.tile:
        return {}
    convolutions = (n for n in graph.nodes if n.op == "Conv" and n.proto.input[1] in graph.initializers)
    few = [n.name for n in convolutions if graph.weight(n.proto.input[1]).dims[1] <= FEW and not _grouped(n)]
    return dict.fromkeys(few, replace(kernel.arithmetic, vector=VECTOR))


def _grouped(node: Node) -> bool:
    return bool(node.attribute("group", 1) > 1)


def _floats(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _largest(values: Iterable[Any]) -> float:
    finite = [x[torch.isfinite(x)].abs() for x in values if _floats(x)]
    return max((float(x.max()) for x in finite if x.numel()), default=0.0)


def _error(ours: Any, theirs: Any) -> float:
    """Relative L2 distance of ``ours`` from ``theirs``; infinite where only ``ours`` is not finite."""
    return relative_l2(ours, theirs) if isinstance(ours, Tensor) else math.inf
