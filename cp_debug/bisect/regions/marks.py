"""Choice of the values inside a region to show next: few, where few others cross, that part the suspect nodes."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from cp_debug.graph.graph import Graph, Node
from cp_debug.graph.operators import MOVING

WIDE = 8
"""A cut that so many values cross says little about its nodes."""


def cuts(graph: Graph, nodes: Sequence[Node], starts: Collection[str], target: str) -> dict[str, int]:
    """Value → how many values are alive when it has been computed, itself included, in execution order.

    Only values that hang on ``starts`` count: constants can be computed anywhere. A value of which the count is 1 parts
    the region in two.
    """
    inside = {node.index for node in nodes}
    last: dict[str, int] = {}
    for node in nodes:
        last.update(dict.fromkeys(node.inputs, node.index))
    maker_of: dict[str, int] = dict.fromkeys(starts, -1)
    width: dict[str, int] = {}
    for node in nodes:
        if not any(name in maker_of for name in node.inputs):
            continue
        maker_of.update(dict.fromkeys(node.outputs, node.index))
        alive = [v for v in maker_of if v == target or any(r.index in inside for r in graph.consumers.get(v, ()))]
        alive = [v for v in alive if v == target or last.get(v, -1) > node.index]
        for value in node.outputs:
            if value in alive and value != target and node.op not in MOVING:
                width[value] = len(alive)
    return width


def choose(width: dict[str, int], nodes: Sequence[Node], suspects: Collection[str], count: int) -> list[str]:
    """At most ``count`` of the values in ``width``, in execution order, that part the suspect nodes evenly.

    Of those near to where a part would end the one is taken that fewest other values cross.
    """
    weight, passed = {}, 0
    for node in nodes:
        passed += node.name in suspects and node.op not in MOVING
        weight.update(dict.fromkeys(node.outputs, passed))
    usable = {v: weight[v] for v in width if 0 < weight[v] < passed and width[v] <= WIDE}
    chosen: list[str] = []
    for place in range(1, count + 1):
        target, reach = passed * place / (count + 1), passed / (2 * (count + 1))
        near = {v: w for v, w in usable.items() if abs(w - target) <= max(reach, 1.0)}
        if near:
            chosen.append(min(near, key=lambda v: (width[v], abs(near[v] - target))))
    order = {v: i for i, v in enumerate(width)}
    return sorted(set(chosen), key=order.__getitem__)
