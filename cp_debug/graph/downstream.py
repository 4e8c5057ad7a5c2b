"""Values that depend on a graph's inputs."""

from __future__ import annotations

from cp_debug.graph.graph import Graph


def data_values(graph: Graph) -> list[str]:
    """The values that depend on an input's elements: no constants, no arithmetic on shapes."""
    return downstream(graph, {"Shape", "Size"})


def downstream(graph: Graph, cut: set[str]) -> list[str]:
    """Values that are reached from the graph's inputs, in execution order, stopping at operators in ``cut``."""
    reached = {info.name for info in graph.inputs}
    values: list[str] = []
    for node in graph.nodes:
        if node.op not in cut and not reached.isdisjoint(node.inputs):
            reached.update(node.outputs)
            values.extend(node.outputs)
    return values
