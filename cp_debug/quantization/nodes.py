"""The ONNX nodes that compute the modules that were calibrated."""

from __future__ import annotations

import dataclasses

from cp_debug.errors import InputError
from cp_debug.graph.downstream import data_values
from cp_debug.graph.graph import Graph, Node
from cp_debug.graph.operators import PRODUCTS
from cp_debug.graph.scales import Scales
from cp_debug.probes.alignment import Alignment


def scales_by_node(scales: Scales, alignment: Alignment, graph: Graph) -> Scales:
    """The scales of modules under the names of the nodes of ``graph`` that compute them.

    A module that is called twice gives its scales to two nodes. Modules of which nothing reaches an output are left
    out, as exporters do. Raises InputError naming the layers that have no node.
    """
    nodes = nodes_by_layer(scales, alignment, graph)
    if lost := [path for path in nodes if not nodes[path] and path not in alignment.unused]:
        raise InputError(f"{graph}: no {', '.join(PRODUCTS)} or Add computes {', '.join(lost)}; export it again")
    layers = {node: layer for path, layer in scales.layers.items() for node in nodes[path]}
    residual_adds = {node: amax for path, amax in scales.residual_adds.items() for node in nodes[path]}
    return dataclasses.replace(scales, layers=layers, residual_adds=residual_adds)


def nodes_by_layer(scales: Scales, alignment: Alignment | None, graph: Graph) -> dict[str, list[str]]:
    """Layer and residual addition of ``scales`` → the nodes that compute it, one for each call; without an alignment
    the scales are those of nodes."""
    if alignment is None:
        return {name: [name] for name in (*scales.layers, *scales.residual_adds)}
    finder = _NodeFinder(alignment, graph)
    found = {path: finder.nodes(path, PRODUCTS) for path in scales.layers}
    return found | {path: finder.nodes(path, ("Add",)) for path in scales.residual_adds}


class _NodeFinder:
    def __init__(self, alignment: Alignment, graph: Graph) -> None:
        self._alignment, self._graph = alignment, graph
        self._data = set(data_values(graph))
        self._calls: dict[str, list[str]] = {}
        for call in alignment.modules:
            self._calls.setdefault(call.partition("@")[0], []).append(call)

    def nodes(self, path: str, operators: tuple[str, ...]) -> list[str]:
        """The nodes behind the calls of a module, or behind a function in one."""
        names = []
        for call in self._calls.get(path, [path]):
            layer = self._alignment.absorbed.get(call, call)  # a Conv under the name of the BatchNorm folded into it
            values = self._alignment.onnx_for(layer)
            nodes = [node for value in values if (node := self._before(value, operators))]
            names += [node.name for node in nodes[:1]]
        return names

    def _before(self, value: str, operators: tuple[str, ...]) -> Node | None:
        """The last node of ``operators`` before a value, with nothing but a chain of operators between."""
        while (node := self._graph.producer.get(value)) is not None and node.op not in operators:
            sources = [name for name in node.inputs if name in self._data]
            if len(sources) != 1:
                return None
            (value,) = sources
        return node
