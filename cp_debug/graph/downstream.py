"""Values that depend on others: the walk along a graph, from values to all that is computed from them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator

from cp_debug.graph.graph import Graph, Node


def data_values(graph: Graph) -> list[str]:
    """The values that depend on an input's elements: no constants, no arithmetic on shapes."""
    return from_inputs(graph, {"Shape", "Size"})


def from_inputs(graph: Graph, cut: Collection[str] = ()) -> list[str]:
    """Values that are reached from the graph's inputs, in execution order, stopping at operators in ``cut``."""
    return downstream(graph.nodes, (info.name for info in graph.inputs), cut)


def downstream(nodes: Iterable[Node], sources: Iterable[str], cut: Collection[str] = ()) -> list[str]:
    """Values that are computed from ``sources``, in execution order, stopping at operators in ``cut``.

    ``nodes`` stand in execution order. The sources themselves are left out unless one is computed from another.
    """
    reached = set(sources)
    values: list[str] = []
    for node in nodes:
        if node.op not in cut and not reached.isdisjoint(node.inputs):
            reached.update(node.outputs)
            values.extend(node.outputs)
    return values


def readers(graph: Graph, value: str, passes: Callable[[Node, str], bool]) -> Iterator[tuple[Node, str]]:
    """(Node, the name that it reads) of every node that reads ``value``, or results of nodes that pass it on.

    ``passes``: whether a node does so with what it reads by a name.
    """
    waiting, seen = [value], {value}
    while waiting:
        name = waiting.pop()
        for node in graph.consumers.get(name, []):
            yield node, name
            if passes(node, name):
                waiting += [result for result in node.outputs if result not in seen]
                seen.update(node.outputs)
