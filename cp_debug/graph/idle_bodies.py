"""Branches of If and bodies of Loop and Scan that no sample ran, so nothing in them was compared."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

from cp_debug.graph.bodies import Body
from cp_debug.graph.control_flow import IdleBody
from cp_debug.graph.flatten import Decision
from cp_debug.graph.graph import Graph, Node
from cp_debug.graph.operators import BODIES

_PASS = re.compile(r"/#\d+/")


def decisions_by_node(decisions: Iterable[Mapping[str, Decision]]) -> dict[str, set[Decision]]:
    """Path of a control flow node, without the numbers of passes → all that it decided in runs."""
    taken: dict[str, set[Decision]] = {}
    for run in decisions:
        for path, decision in run.items():
            taken.setdefault(_PASS.sub("/", path), set()).add(decision)
    return taken


def idle_bodies(graph: Graph, taken: Mapping[str, set[Decision]], fixed: Iterable[str] = ()) -> list[IdleBody]:
    """The bodies of ``graph`` that did not run, as ``taken`` (by ``decisions_by_node``) says, outermost ones alone.

    ``fixed``: values that no input reaches; what does not run because of them never runs.
    """
    functions = {(f.domain, f.name): f for f in graph.proto.functions}
    constant = set(fixed)

    def walk(nodes: Sequence[Node], path: str) -> Iterator[IdleBody]:
        for node in nodes:
            place = path + node.name
            function = functions.get((node.proto.domain, node.proto.op_type))
            if function is not None:
                yield from walk(Body.of_function(function, node).nodes, f"{place}/")
            if node.op not in BODIES or not (ran := taken.get(place)):
                continue
            for attribute in node.proto.attribute:
                if attribute.name not in ("then_branch", "else_branch", "body"):
                    continue
                if ran == {0} or (node.op == "If" and attribute.name not in ran):
                    if path or not constant.issuperset(_deciding(node)):
                        yield IdleBody(place, node.op, attribute.name)
                    continue
                inner = Body.of_graph(attribute.g, graph.opsets).nodes
                yield from walk(inner, f"{place}/{attribute.name}/" if node.op == "If" else f"{place}/")

    return list(walk(graph.nodes, ""))


def _deciding(node: Node) -> Sequence[str]:
    """The values by which a node runs its bodies: a condition, a trip count and a condition, a sequence."""
    inputs = node.proto.input
    return inputs[-1:] if node.op == "Scan" else [name for name in inputs[: 2 if node.op == "Loop" else 1] if name]
