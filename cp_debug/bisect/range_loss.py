"""Range loss: results and weights that overflow, vanish or lose digits among the subnormals of a type.

A loss counts only where it changes something that is computed from them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from cp_debug.backends.arithmetic import ARITHMETICS
from cp_debug.backends.base import Tensor as AnyTensor
from cp_debug.backends.executor import Executor
from cp_debug.backends.kernels import KERNELS
from cp_debug.bisect.consequences import Load, matters
from cp_debug.graph.graph import Graph, Node
from cp_debug.probes.distance import distance, ratio
from cp_debug.programs.precision import Precision

RANGE = 8.0
"""Merely storing a layer's result in the test's precision may lose this many unit roundoffs: more means that numbers
overflow, vanish, or lie among the subnormals."""
NEGLIGIBLE = 1.0
"""Unit roundoffs below which a change is gone. Not ``RANGE``: a loss just above that only needs to be averaged a little
to fall below it, and would still be many times what the layers behind it round."""
BOUNDED = {"Sigmoid", "HardSigmoid", "Softmax"}
"""Operators with results between 0 and 1, where what is below the rounding of 1 is 0 to whoever reads it."""


class RangeLoss:
    """Losses of storing the values of a graph's layers. ``known`` are the values that the capture holds."""

    def __init__(self, graph: Graph, oracle: Executor, known: Collection[str]) -> None:
        self.graph, self.oracle, self.known = graph, oracle, known
        self._constants = {n.outputs[0] for n in graph.nodes if n.op == "Constant"} | set(graph.initializers)
        self._weight_loss = lru_cache(maxsize=None)(self._loss_of_weight)

    def __call__(
        self,
        nodes: Sequence[Node],
        given: Mapping[str, AnyTensor],
        target: str,
        exact: Tensor,
        precision: Callable[[Node], Precision],
        load: Load,
    ) -> float:
        """The relative error of storing ``exact``, the result ``target``, and each weight of ``nodes`` in the precision
        of their nodes; infinite where a number overflows, 0 where nothing that is computed from the result notices.

        ``given`` are the inputs of the segment, ``load`` gives captured values.
        """
        maker = self.graph.producer[target]
        loss = storage_loss(exact, precision(maker), bounded=maker.op in BOUNDED)
        negligible = NEGLIGIBLE * precision(maker).roundoff
        if loss > RANGE * precision(maker).roundoff:
            stored = _stored(exact, precision(maker))
            assert stored is not None
            loss = loss if self._matters(target, exact, stored.to(exact.dtype), negligible, load) else 0.0
        for node in nodes:
            if node.op in KERNELS and KERNELS[node.op].exact:
                continue
            for name in sorted(self._constants.intersection(node.inputs)):
                lost = self._weight_loss(name, precision(node))
                if lost <= RANGE * precision(node).roundoff or lost <= loss:
                    loss = max(loss, lost)
                    continue
                weight = self.oracle.run_nodes([], {}, [name])[name]
                rounded = ARITHMETICS[precision(node).name].round_constant(weight.float()).to(weight.dtype)
                changed_result = self.oracle.run_nodes(nodes, {**given, name: rounded}, [target])[target]
                if self._matters(target, exact, changed_result, negligible, load):
                    loss = lost
        return loss

    def beyond(self, target: str, captured: Tensor, exact: Tensor, precision: Precision, load: Load) -> Tensor | None:
        """Mask of elements where ``exact`` lies beyond the type's range, and nothing that reads them notices.

        ``captured`` is Inf or the largest number there. None where there is no such element. ``captured`` and ``exact``
        have one shape; the mask is bool in that shape.
        """
        largest = precision.largest * (1 - 2 * precision.roundoff)
        beyond = torch.isfinite(exact) & (exact.abs() >= largest)
        if not bool(beyond.any()):
            return None
        cut = (torch.sign(captured) == torch.sign(exact)) & (captured.abs() >= largest)
        cut_off = torch.where(beyond, captured.to(exact.dtype), exact)
        is_cut_off = bool(cut[beyond].all())
        if not is_cut_off or self._matters(target, exact, cut_off, NEGLIGIBLE * precision.roundoff, load):
            return None
        return beyond

    def _matters(self, target: str, exact: Tensor, other: Tensor, gone: float, load: Load) -> bool:
        return matters(self.graph, self.oracle, self.known, load, (target, exact, other), gone)

    def _loss_of_weight(self, name: str, precision: Precision) -> float:
        weight = self.oracle.run_nodes([], {}, [name])[name]
        stored = _stored(weight, precision)
        if stored is None:
            return 0.0
        overflows = bool((torch.isinf(stored) & torch.isfinite(weight)).any())
        return math.inf if overflows else storage_loss(weight, precision)


def storage_loss(exact: Tensor, precision: Precision, *, bounded: bool = False) -> float:
    """The relative error of storing ``exact``, over the elements that stay finite; ``bounded``: beside 1.

    ``exact`` has any shape and a float dtype; 0 for a precision whose types store it as it is.
    """
    stored = _stored(exact, precision)
    if stored is None:
        return 0.0
    lost, scale, _ = distance(stored, exact.float())
    return ratio(lost, math.hypot(scale, math.sqrt(exact.numel())) if bounded else scale)


def _stored(exact: AnyTensor, precision: Precision) -> Tensor | None:
    """The tensor as the precision stores it, in FP32; None where it stores everything that FP32 does."""
    value = ARITHMETICS[precision.name].value
    if value is None or not isinstance(exact, Tensor) or not exact.is_floating_point():
        return None
    return value(exact.float())
