"""Consequences of a change of one value, followed through its readers until it is gone or reaches an output.

Numbers that leave a type's range need not be a defect: a mask of −3.4e38 becomes −Inf in FP16, and the Softmax behind
it gives the same zeros; an ε of 1e-6 loses digits, and vanishes beside a variance of 1; a product of 1e-9 is flushed to
zero, and is added to 1. A change counts only if it reaches an output.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence

from torch import Tensor

from cp_debug.backends.base import Tensor as AnyTensor
from cp_debug.backends.executor import Executor
from cp_debug.errors import InputError
from cp_debug.graph.graph import Graph, Node
from cp_debug.probes.distance import apart

FURTHEST = 16
"""Number of nodes that a change is followed through before it counts as one that stays."""

Load = Callable[[str], AnyTensor]


def matters(
    graph: Graph,
    oracle: Executor,
    known: Collection[str],
    load: Load,
    change: tuple[str, Tensor, Tensor],
    negligible: float,
    furthest: int = FURTHEST,
) -> bool:
    """Whether a change of a value, (its name, as it is, as it would be), changes what is computed from it.

    Its readers are followed, on ``oracle``, until the relative L2 change is ``negligible`` everywhere, or is none that
    will go away: at an output of the graph, after ``furthest`` nodes, where nothing can be computed. NaN or Inf that
    only one of both has is never negligible. ``load`` gives the values that are ``known``. Both tensors of the change
    have one shape and dtype.
    """
    name, exact, changed = change
    before: dict[str, AnyTensor] = {name: exact}
    after: dict[str, AnyTensor] = {name: changed}
    outputs = {v.name for v in graph.outputs}
    if name in outputs and difference(exact, changed) > negligible:
        return True
    followed = 0
    for node in graph.nodes:
        if before.keys().isdisjoint(node.inputs):
            continue
        followed += 1
        try:
            sides = [_computed(graph, oracle, known, load, node, values) for values in (before, after)]
        except InputError:
            return True
        for value in node.outputs:
            value_before, value_after = (side[value] for side in sides)
            size = difference(value_before, value_after)
            if size <= negligible:
                continue
            if value in outputs or followed >= furthest:
                return True
            before[value], after[value] = value_before, value_after
    return False


def difference(exact: AnyTensor, other: AnyTensor) -> float:
    """Relative L2 norm of ``other`` − ``exact``; infinite where NaN, Inf or the shapes differ, and for no tensors."""
    return apart(other, exact) if isinstance(exact, Tensor) and isinstance(other, Tensor) else math.inf


def _computed(
    graph: Graph,
    oracle: Executor,
    known: Collection[str],
    load: Load,
    node: Node,
    changed: Mapping[str, AnyTensor],
) -> dict[str, Tensor]:
    """Outputs of ``node`` when some values are changed and all others are as captured, or computed from those."""
    missing = [n for n in node.inputs if n in graph.producer and n not in known and n not in changed]
    nodes: Sequence[Node] = []
    starts: Sequence[str] = []
    if missing:
        nodes, starts = graph.segment(missing, {*known, *changed})
    inputs = {v.name for v in graph.inputs}
    to_load = [n for n in (*starts, *node.inputs) if n not in changed and (n in known or n in inputs)]
    return oracle.run_nodes([*nodes, node], {**{n: load(n) for n in to_load}, **changed}, node.outputs)
