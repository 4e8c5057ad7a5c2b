"""Range loss: results and weights that overflow, vanish or lose digits among the subnormals of a type.

Numbers that leave a type's range need not be a defect: a mask of −3.4e38 becomes −Inf in FP16, and the Softmax behind
it gives the same zeros; an ε of 1e-6 loses digits, and vanishes beside a variance of 1; a product of 1e-9 is flushed to
zero, and is added to 1. So a change is followed through its readers until it is gone (``matters``), and a loss counts
only if it reaches an output.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from cp_debug.backends.arithmetic import ARITHMETICS, FP64
from cp_debug.backends.base import Tensor as AnyTensor
from cp_debug.backends.executor import Executor
from cp_debug.backends.kernels import KERNELS
from cp_debug.errors import InputError
from cp_debug.graph.graph import Graph, Node
from cp_debug.probes.distance import apart, distance, ratio, zeros_differ
from cp_debug.programs.precision import Precision

RANGE = 8.0
"""Merely storing a layer's result in the test's precision may lose this many unit roundoffs: more means that numbers
overflow, vanish, or lie among the subnormals."""
NEGLIGIBLE = 1.0
"""Unit roundoffs below which a change is gone. Not ``RANGE``: a loss just above that only needs to be averaged a little
to fall below it, and would still be many times what the layers behind it round."""
BOUNDED = {"Sigmoid", "HardSigmoid", "Softmax"}
"""Operators with results between 0 and 1, where what is below the rounding of 1 is 0 to whoever reads it."""
FURTHEST = 16
"""Number of nodes that a change is followed through before it counts as one that stays."""

Load = Callable[[str], AnyTensor]


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
        sides: tuple[AnyTensor, Tensor],
        precision: Callable[[Node], Precision],
        load: Load,
    ) -> float:
        """The relative error of storing the result ``target``, and each weight of ``nodes``, in the precision of their
        nodes; infinite where a number overflows, 0 where nothing that is computed from the result notices.

        ``sides``: the result as it was captured, and as it should be, of one shape. ``given`` are the inputs of the
        segment, ``load`` gives captured values.
        """
        maker, (captured, exact) = self.graph.producer[target], sides
        stored, negligible = _stored(exact, precision(maker)), NEGLIGIBLE * precision(maker).roundoff
        loss = storage_loss(exact, stored, bounded=maker.op in BOUNDED)
        much = loss > RANGE * precision(maker).roundoff
        if stored is not None and much:
            loss = loss if self.matters(load, (target, exact, stored.to(exact.dtype)), negligible) else 0.0
        elif stored is not None and stored.count_nonzero() != exact.count_nonzero():
            # One element that is 0, as the test has it, too, is no loss of a norm, but somebody may divide by it.
            gone = (stored == 0) & (FP64.hold(captured, exact.device) == 0)
            least = sys.float_info.max if maker.op in BOUNDED else RANGE * precision(maker).roundoff  # only NaN and Inf
            if self.matters(load, (target, exact, torch.where(gone, 0.0, exact)), least):
                loss = 1.0
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
                if self.matters(load, (target, exact, changed_result), negligible):
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
        if not is_cut_off or self.matters(load, (target, exact, cut_off), NEGLIGIBLE * precision.roundoff):
            return None
        return beyond

    def matters(
        self, load: Load, change: tuple[str, Tensor, Tensor], negligible: float, furthest: int = FURTHEST
    ) -> bool:
        """Whether a change of a value, (its name, as it is, as it would be), changes what is computed from it.

        Its readers are followed, on the oracle, until the relative L2 change is ``negligible`` everywhere, and nothing
        is 0 that was not, for somebody may divide by it; or until the change is none that will go away: at an output of
        the graph, after ``furthest`` nodes, where nothing can be computed. NaN or Inf that only one of both has is
        never negligible. ``load`` gives the values that are known. Both tensors of the change have one shape and dtype.
        """
        name, exact, changed = change
        before: dict[str, AnyTensor] = {name: exact}
        after: dict[str, AnyTensor] = {name: changed}
        outputs = {v.name for v in self.graph.outputs}
        if name in outputs and difference(exact, changed) > negligible:
            return True
        followed = 0
        for node in self.graph.nodes:
            if before.keys().isdisjoint(node.inputs):
                continue
            followed += 1
            try:
                sides = [self._computed(load, node, values) for values in (before, after)]
            except InputError:
                return True
            for value in node.outputs:
                value_before, value_after = (side[value] for side in sides)
                stays = difference(value_before, value_after) > negligible
                last = value in outputs or followed >= furthest
                if last and stays:
                    return True
                if last or not (stays or zeros_differ(value_before, value_after)):
                    continue
                before[value], after[value] = value_before, value_after
        return False

    def _computed(self, load: Load, node: Node, changed: Mapping[str, AnyTensor]) -> dict[str, Tensor]:
        """Outputs of ``node`` when some values are changed and all others are as captured, or computed from those."""
        missing = [n for n in node.inputs if n in self.graph.producer and n not in self.known and n not in changed]
        nodes, starts = self.graph.segment(missing, {*self.known, *changed}) if missing else ([], [])
        inputs = {v.name for v in self.graph.inputs}
        to_load = [n for n in (*starts, *node.inputs) if n not in changed and (n in self.known or n in inputs)]
        return self.oracle.run_nodes([*nodes, node], {**{n: load(n) for n in to_load}, **changed}, node.outputs)

    def _loss_of_weight(self, name: str, precision: Precision) -> float:
        weight = self.oracle.run_nodes([], {}, [name])[name]
        stored = _stored(weight, precision)
        if stored is None:
            return 0.0
        overflows = bool((torch.isinf(stored) & torch.isfinite(weight)).any())
        return math.inf if overflows else storage_loss(weight, stored)


def storage_loss(exact: Tensor, stored: Tensor | None, *, bounded: bool = False) -> float:
    """The relative error of storing ``exact`` as ``stored``, over the elements that stay finite; ``bounded``: beside 1.

    Both have one shape, any, and float dtypes. 0 for None: the precision stores ``exact`` as it is.
    """
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


def difference(exact: AnyTensor, other: AnyTensor) -> float:
    """Relative L2 norm of ``other`` − ``exact``; infinite where NaN, Inf or the shapes differ, and for no tensors."""
    return apart(other, exact) if isinstance(exact, Tensor) and isinstance(other, Tensor) else math.inf
