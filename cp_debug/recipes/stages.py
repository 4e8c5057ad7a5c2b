"""Coarse cuts of an ONNX graph that comes without a recipe: its name scopes, or the tensors that everything passes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import pairwise

from cp_debug.graph.graph import Graph, Node, from_inputs
from cp_debug.recipes.base import Stage

MOST_STAGES = 12
_SCOPES = "pkg.torch.onnx.name_scopes"
"""Metadata key of a node's module path in torch's dynamo exporter; the older one puts it into the node's name."""


def stages_of(graph: Graph) -> list[Stage]:
    """Stages in execution order, each at one value, at most ``MOST_STAGES`` unless the graph has more outputs.

    Module scopes as deep as that number allows; where nodes carry none, cut points evenly chosen, then the outputs.
    """
    scopes = {node.index: scope_of(node) for node in graph.nodes}
    chosen: dict[str, str] = {}
    for depth in range(max(map(len, scopes.values()), default=0) + 1):
        ends = _ends(graph, {index: _key(scope, depth) for index, scope in scopes.items()})
        if len(ends) > MOST_STAGES:
            break
        if len(ends) > 1:
            chosen = ends
    return [Stage(name, value) for name, value in (chosen or _cuts_and_outputs(graph)).items()]


def scope_of(node: Node) -> tuple[str, ...]:
    """Module scopes, outermost first: ``("backbone", "blocks.0")``; empty at the top level and without scopes."""
    recorded = next((p.value for p in node.proto.metadata_props if p.key == _SCOPES), None)
    if recorded is not None:
        paths = ["", *(path for path in re.findall(r"'([^']*)'", recorded)[:-1] if path)]
        return tuple(path.removeprefix(f"{parent}.") for parent, path in pairwise(paths))
    parts = node.name.split("/")
    return tuple(parts[1:-1]) if node.name.startswith("/") else ()


def _key(scope: tuple[str, ...], depth: int) -> str:
    """The scope's name at a depth; depth 0 takes the members of a module list together."""
    if not scope:
        return ""
    if depth == 0:
        return re.sub(r"(\.\d+)+$", "", scope[0])
    return "/".join(scope[:depth])


def _ends(graph: Graph, keys: dict[int, str]) -> dict[str, str]:
    """Scope → its last value, in execution order of those values."""
    last: dict[str, str] = {}
    for node in _data_nodes(graph):
        if key := keys[node.index]:
            last.pop(key, None)
            last[key] = node.outputs[0]
    return last


def _cuts_and_outputs(graph: Graph) -> dict[str, str]:
    """Cut points, thinned evenly to ``MOST_STAGES`` with the outputs, then the outputs: name → value."""
    outputs = [v.name for v in graph.outputs if v.name in graph.producer]
    cuts = [v for v in _cut_points(graph) if v not in outputs]
    room = min(len(cuts), max(0, MOST_STAGES - len(outputs)))
    thinned = [cuts[(i + 1) * len(cuts) // (room + 1)] for i in range(room)] if room < len(cuts) else cuts
    return {value: value for value in [*thinned, *outputs]}


def _cut_points(graph: Graph) -> Iterator[str]:
    """Values that are the only one still needed at their time: whatever comes later comes through them."""
    last_reader = {name: readers[-1].index for name, readers in graph.consumers.items()}
    outputs = {v.name for v in graph.outputs}
    live = {v.name for v in graph.inputs}
    for node in _data_nodes(graph):
        live = {v for v in live if last_reader.get(v, -1) > node.index or v in outputs}
        live |= {o for o in node.outputs if o in last_reader or o in outputs}
        if len(live) == 1:
            yield next(iter(live))


def _data_nodes(graph: Graph) -> Iterator[Node]:
    """The nodes that depend on the graph's inputs."""
    fed = set(from_inputs(graph))
    return (node for node in graph.nodes if not fed.isdisjoint(node.outputs))
