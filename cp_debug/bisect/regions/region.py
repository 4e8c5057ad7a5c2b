"""A region: many ONNX nodes that an engine computes as one, between values that it shows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from cp_debug.backends.tensorrt.inspector import EngineLayer
from cp_debug.graph.graph import Graph, Node, data_values
from cp_debug.graph.operators import MOVING, PRODUCTS
from cp_debug.serialize import JsonForm

MANY = 8
"""Nodes that compute, from which on a group is a region: Conv + BatchNorm + Add + activation is still a layer."""


@dataclass(frozen=True)
class Region(JsonForm):
    """Nodes that stand or fall together, in execution order."""

    derives = ("label",)
    nodes: tuple[str, ...]
    """ONNX nodes by name; what constants and shapes are computed from is left out."""
    kind: str = ""
    """The engine's word for the layer (``Myelin``); ``3 layers`` where none of these holds most of it; empty where no
    layer is known."""
    layer: str = ""
    """Name of the engine's layer that holds most of it, or that writes its result."""
    kernels: Mapping[str, int] = field(default_factory=dict)
    """What the engine's layers compute in → number of layers, where these are several: see ``computes_in``."""

    @property
    def label(self) -> str:
        """``fused region of 289 nodes (/b.0/n1 … /fc/Gemm)``."""
        return f"fused region of {len(self.nodes)} nodes ({self.nodes[0]} … {self.nodes[-1]})"


def region_of(nodes: Iterable[str], value: str, graph: Graph, layers: Sequence[EngineLayer] = ()) -> Region | None:
    """The region that the ``nodes`` of the segment of ``value`` make on an engine of these ``layers``.

    None where they are an ordinary layer. The segment decides, not the engine's layer: the nodes between two values
    that are seen are judged as one, whether the engine fused them, its inspector tells no nodes, or marks on values
    inside were taken back.
    """
    node_names, data = set(nodes), set(data_values(graph))
    inside = [node for node in graph.nodes if node.name in node_names and not data.isdisjoint(node.outputs)]
    if not is_many(inside):
        return None
    writers = [layer for layer in layers if layer.kind != "Reformat" and any(t.name == value for t in layer.outputs)]
    names = {node.name for node in inside}
    holders = [layer for layer in layers if 2 * len(names.intersection(layer.nodes)) > len(names)] or writers
    kind, layer = (holders[0].kind, holders[0].name) if holders else ("", "")
    involved = [each for each in layers if each.kind != "Reformat" and not names.isdisjoint(each.nodes)]
    if holders and holders is writers and len(involved) > 1:
        kind = f"{len(involved)} layers"
    kernels = Counter(filter(None, (each.computes_in for each in involved))) if len(involved) > 1 else {}
    return Region(tuple(node.name for node in inside), kind, layer, dict(kernels))


def is_many(nodes: Sequence[Node]) -> bool:
    """Whether so many nodes compute that naming one of them would mislead."""
    computing = [node for node in nodes if node.op not in MOVING]
    return len(computing) > MANY or sum(node.op in PRODUCTS for node in computing) > 1
