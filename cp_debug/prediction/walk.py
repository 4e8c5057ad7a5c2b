"""One component computed in all plausible ways side by side, layer after layer, and once in FP32 beside them."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cp_debug.backends.arithmetic import FP32, Arithmetic
from cp_debug.backends.base import Program
from cp_debug.backends.executor import Executor
from cp_debug.backends.kernels.fp16_accumulation import BIAS, with_epilogue
from cp_debug.bisect.acquittals import beside_masks
from cp_debug.bisect.causes.precision import OVERFLOWS as BEYOND
from cp_debug.bisect.preflight import leaves_half
from cp_debug.bisect.replayed import EXCESS
from cp_debug.graph.graph import Graph, Node, data_values
from cp_debug.graph.operators import QUANTIZERS
from cp_debug.graph.qdq import plain_nodes
from cp_debug.graph.tensor_ends import as_arrays
from cp_debug.prediction.kernels import FEW, LARGE, Group, Kernel, groups_of, operations, undecided
from cp_debug.prediction.result import CLOSE, OVERFLOWS, VANISHES, Interval, PredictedLayer
from cp_debug.probes.arrays import as_numpy
from cp_debug.probes.distance import relative_l2
from cp_debug.programs.layers import layer_name

VECTOR = 8
"""Values that a thread loads at once in the kernels that took first convolutions on TensorRT 8.6."""
SPREAD = 1.25
"""Factor by which an interval is wider than the kernels' errors: engines know more orders of summation than these."""
CLOSE_TO = 8.0
"""Factor below FP16's largest number within which another input is likely to exceed it."""
EXACT = ""
"""The name of the FP32 run among those of the kernels."""

Values = dict[str, Any]


class GraphWalk:
    """One component on one sample after the other.

    Every kernel is fed its own upstream results, as in a deployed pipeline. Values are freed after their last reader.
    """

    def __init__(
        self, program: Program, graph: Graph, kernels: Sequence[Kernel], precision: str, device: str, *, timed: bool
    ) -> None:
        """``graph``: the program's as the target computes it. ``timed``: whether the target chooses kernels by timing
        them; any layer may be in FP32 where it does not."""
        self._program, self.graph, self._kernels, self._fp16 = program, graph, kernels, precision == "fp16"
        self._device, self._timed = device, timed
        self._executors = {
            kernel.name: Executor(graph, kernel.arithmetic, device, overrides=_direct(graph, kernel) if i == 0 else {})
            for i, kernel in enumerate(kernels)
        }
        self._oracle = Executor(graph, FP32, device)
        self._plain = plain_nodes(graph)
        self.groups = groups_of(graph)
        open_groups = undecided(graph, self.groups) if timed else range(len(self.groups))
        self._undecided = {self.groups[i].nodes[0].index for i in open_groups if self.groups[i].computes}
        """Index of the first node of each group that a weakly typed target may leave in FP32, if it is not large."""
        self._data = set(data_values(graph)) | {v.name for v in graph.inputs}
        self.outputs: dict[str, dict[str, np.ndarray]] = {}
        """Run → output → array, once walked."""
        self.silent: dict[str, None] = {}
        """Layers without a finite number in FP32, of which nothing is predicted."""

    @property
    def not_emulated(self) -> dict[str, str]:
        """Node → operator of the nodes that were only rounded at their result."""
        return {n: op for executor in self._executors.values() for n, op in executor.not_emulated.items()}

    def run(self, inputs: Mapping[str, Mapping[str, np.ndarray]]) -> Iterator[PredictedLayer]:
        """The layers in execution order, each once it is computed; then ``outputs`` is known.

        ``inputs``: run (a kernel's name, or ``EXACT``) → what it is fed, by input.
        """
        output_names = [v.name for v in self.graph.outputs]
        live: dict[str, Values] = {run: dict(given) for run, given in inputs.items()}
        readers = Counter(name for group in self.groups for name in self._reads(group)) + Counter(output_names)
        for group in self.groups:
            results = [o for node in group.nodes for o in node.outputs if readers.get(o)] or [*group.nodes[-1].outputs]
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

    def _plainly(self, group: Group) -> list[Node]:
        return [self._plain.get(node.name, node) for node in group.nodes]

    def _exactly(self, group: Group, given: Values, names: Sequence[str]) -> tuple[Values, Values]:
        """(``names`` of a group in FP32, the values inside it)."""
        inside: Values = {}
        return self._oracle.run_nodes(self._plainly(group), given, names, inside.__setitem__), inside

    def _may_stay(self, group: Group, values: Mapping[str, Any]) -> bool:
        if group.nodes[0].index not in self._undecided:
            return False
        return not self._timed or operations(self.graph, group, values) < LARGE

    def _reads(self, group: Group) -> set[str]:
        """Values that the nodes of a group read from outside, around Q/DQ pairs too."""
        written = {output for node in group.nodes for output in node.outputs}
        around = {name for node in group.nodes if node.name in self._plain for name in self._plain[node.name].inputs}
        return ({name for node in group.nodes for name in node.inputs} | around) - written

    def _compute(self, group: Group, results: Sequence[str], live: Mapping[str, Values]) -> Iterator[PredictedLayer]:
        plain = self._plainly(group)
        exact, exact_inside = self._exactly(group, live[EXACT], results)
        outer = self._data.difference(output for node in plain for output in node.outputs)
        computed = exact_inside | exact
        may_stay = self._may_stay(group, {**live[EXACT], **computed})
        shown = [value for value in results if _floats(exact[value])]
        errors, introduced, inside = (defaultdict[str, dict[str, float]](dict) for _ in range(3))
        runs = {EXACT: exact}
        for kernel in self._kernels:
            given, exactly = live[kernel.name], kernel.mixed and may_stay
            low, low_inside = (
                self._exactly(group, given, results) if exactly else self._low(kernel, group, given, results)
            )
            right = self._oracle.run_nodes(plain, given, shown) if group.computes and shown else {}
            for value in shown:
                errors[value][kernel.name] = self._error(value, low[value], exact[value])
                if right:
                    introduced[value][kernel.name] = self._error(value, low[value], right[value])
            for value, x in low_inside.items():
                if _floats(x) and value in exact_inside and value not in results:
                    inside[value][kernel.name] = self._error(value, x, exact_inside[value])
            runs[kernel.name] = low
        for run, values in live.items():
            values.update(runs[run])
        if all(node.op in QUANTIZERS for node in group.nodes):
            return
        for value in shown:
            own = self._beside_masks(value, exact[value], exact[value])[1]
            layer = PredictedLayer(
                self._program.name,
                layer_name(self._program, value) if value in self._program.graph.producer else value,
                value,
                [node.name for node in group.nodes],
                [node.op for node in group.nodes],
                reads=[name for name in dict.fromkeys(i for n in plain for i in n.inputs) if name in outer],
                error=interval(errors[value]),
                introduced=interval(introduced[value]) if introduced[value] else None,
                inside={name: interval(found) for name, found in inside.items()},
                largest=_largest(self._beside_masks(o, *[computed.get(o)] * 2)[0] for n in plain for o in n.outputs),
                may_stay=may_stay and self._kernels[-1].mixed,
            )
            if not bool(torch.isfinite(own).any()):
                self.silent[layer.name] = None
                continue
            self._judge(layer, group, own, introduced[value])
            yield layer

    def _judge(self, layer: PredictedLayer, group: Group, exact: Tensor, introduced: Mapping[str, float]) -> None:
        """Tell what leaves FP16's range, and what should be kept. ``exact``: the result in FP32."""
        if layer.may_stay and layer.introduced is not None and (stored := self._kernels[-1].stored) is not None:
            # What it reads may come in FP32, so that even a pool rounds.
            rounding = relative_l2(stored.round(exact), exact)
            layer.introduced = replace(layer.introduced, high=max(layer.introduced.high, SPREAD * rounding))
        if self._fp16 and group.computes:
            layer.excess = max(introduced.values()) / introduced["fp16"] if introduced["fp16"] else 0.0
            if layer.largest >= BEYOND:
                layer.range = OVERFLOWS
            elif layer.largest >= BEYOND / CLOSE_TO:
                layer.range = CLOSE
            elif leaves_half(exact.cpu()):
                layer.range = VANISHES
        if layer.range == OVERFLOWS:
            layer.keep = f"results up to {layer.largest:.3g} are beyond FP16's 65504"
        elif layer.introduced is not None and not math.isfinite(layer.introduced.high):
            layer.keep = "NaN or Inf appears in it"
        elif layer.excess > EXCESS:
            layer.keep = f"sums in FP16 introduce up to {layer.excess:.1f} times what rounding its results does"

    def _beside_masks(self, name: str, ours: Any, exact: Any) -> tuple[Any, ...]:
        alike = _floats(ours) and _floats(exact) and ours.shape == exact.shape
        return beside_masks(self.graph, name, ours, exact) if alike else (ours, exact)

    def _error(self, name: str, ours: Any, exact: Any) -> float:
        """Relative L2 distance of ``ours`` from ``exact``; infinite where only ``ours`` is not finite."""
        return relative_l2(*self._beside_masks(name, ours, exact)) if isinstance(ours, Tensor) else math.inf

    def _low(self, kernel: Kernel, group: Group, given: Values, results: Sequence[str]) -> tuple[Values, Values]:
        """(Results of a group by one kernel, the values inside it that it computes)."""
        inside: Values = {}
        nodes, biases = with_epilogue(self.graph, group.nodes, given) if kernel.fused else (group.nodes, {})
        executor, values = self._executors[kernel.name], {**given, **biases}
        low = executor.run_nodes(nodes, values, results, inside.__setitem__ if kernel.stored is None else None)
        for node in (n for n in group.nodes if n.name + BIAS in biases):
            inside.pop(node.outputs[0], None)  # it lacks the bias
        if kernel is self._kernels[0] and any(o not in inside for n in group.nodes for o in n.outputs):
            executor.run_nodes(group.nodes, given, results, inside.setdefault)  # for an engine that splits the group
        if kernel.stored is not None and group.computes:
            last = {v.name for v in self.graph.outputs}
            low = {n: x if n in last or not _floats(x) else kernel.stored.round(x) for n, x in low.items()}
        return low, inside


def interval(errors: Mapping[str, float]) -> Interval:
    """The interval of errors by kernel, the most likely one first."""
    return Interval.around(next(iter(errors.values())), errors.values(), SPREAD)


def _direct(graph: Graph, kernel: Kernel) -> dict[str, Arithmetic]:
    """Convolutions that read few channels, in the order of the kernels that take them."""
    if not kernel.arithmetic.tile:
        return {}
    convolutions = (n for n in graph.nodes if n.op == "Conv" and n.proto.input[1] in graph.initializers)
    few = [
        n.name for n in convolutions if graph.weight(n.proto.input[1]).dims[1] <= FEW and n.attribute("group", 1) <= 1
    ]
    return dict.fromkeys(few, replace(kernel.arithmetic, vector=VECTOR))


def _floats(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _largest(values: Iterable[Any]) -> float:
    finite = [x[torch.isfinite(x)].abs() for x in values if _floats(x)]
    return max((float(x.max()) for x in finite if x.numel()), default=0.0)
