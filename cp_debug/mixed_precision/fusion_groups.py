"""Fusion groups: layers that keep their precision as a whole, an operator and what is fused into it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from cp_debug.backends.base import Program
from cp_debug.graph.graph import Graph, Node
from cp_debug.graph.operators import ACTIVATIONS, PRODUCTS
from cp_debug.programs.layers import layer_name

_JOINING = ACTIVATIONS | {"Add", "BatchNormalization", "Div", "Mul", "Sub"}
"""Operators that join the layer before them, where they read nothing else but constants."""


@dataclass(frozen=True)
class FusionGroup:
    """Nodes of one component that keep their precision together."""

    component: str
    nodes: tuple[str, ...]
    name: str = field(metadata={"key": "layer"})
    """Torch path of its first value, or the node's name."""
    engine_layer: str = field(default="", metadata={"key": "group"})
    """Name of the engine's layer, where the backend tells."""


Kept = frozenset[FusionGroup]


def nodes_of(groups: Iterable[FusionGroup], component: str) -> frozenset[str]:
    """The nodes of a component that a set of groups holds."""
    return frozenset(node for group in groups if group.component == component for node in group.nodes)


def fusion_groups_of(program: Program, candidates: Collection[str]) -> list[FusionGroup]:
    """The ``candidates`` (nodes by name) of a program in groups, in execution order.

    An activation, a normalization or arithmetic with constants joins the layer that it alone reads from.
    """
    graph = program.graph
    groups: dict[int, list[Node]] = {}
    home: dict[str, int] = {}
    for node in graph.nodes:
        if node.name not in candidates:
            continue
        before = _joined(graph, node)
        place = home.get(before.name, node.index) if before is not None else node.index
        groups.setdefault(place, []).append(node)
        home[node.name] = place
    return [
        FusionGroup(program.name, tuple(n.name for n in nodes), layer_name(program, nodes[0].outputs[0]))
        for nodes in groups.values()
    ]


def fused(
    groups: Sequence[FusionGroup], programs: Iterable[Program], layers: Mapping[str, Sequence[Mapping]]
) -> list[FusionGroup]:
    """The groups regrouped as an engine fused them. ``layers``: component → ``name`` and ``nodes`` of its layers.

    An engine layer of several convolutions or products (TensorRT's compiler for transformers makes such) says nothing
    of them, and nodes that no layer holds stay as they are.
    """
    regrouped: list[FusionGroup] = []
    for program in programs:
        component_groups = [group for group in groups if group.component == program.name]
        nodes = {node.name: node for node in program.graph.nodes}
        group_nodes = {node for group in component_groups for node in group.nodes}
        placed: set[str] = set()
        new_groups: list[FusionGroup] = []
        for layer in layers.get(program.name, ()):
            inside = sorted(group_nodes.intersection(layer["nodes"]) - placed, key=lambda name: nodes[name].index)
            if inside and sum(nodes[name].op in PRODUCTS for name in inside) <= 1:
                placed.update(inside)
                name = layer_name(program, nodes[inside[0]].outputs[0])
                new_groups.append(FusionGroup(program.name, tuple(inside), name, layer["name"]))
        for group in component_groups:
            if remaining := tuple(node for node in group.nodes if node not in placed):
                new_groups.append(
                    replace(group, nodes=remaining, name=layer_name(program, nodes[remaining[0]].outputs[0]))
                )
        regrouped += sorted(new_groups, key=lambda group: nodes[group.nodes[0]].index)
    return regrouped


def _joined(graph: Graph, node: Node) -> Node | None:
    """The node to which this one belongs; None where it begins a layer."""
    data = [name for name in node.inputs if name in graph.producer and graph.producer[name].op != "Constant"]
    if node.op not in _JOINING or len(data) != 1 or any(v.name in node.inputs for v in graph.inputs):
        return None
    (value,) = data
    alone = len(graph.consumers[value]) == 1 and all(v.name != value for v in graph.outputs)
    return graph.producer[value] if alone else None
