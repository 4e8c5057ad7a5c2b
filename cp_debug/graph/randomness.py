"""Nodes that draw random numbers: two runs of one program differ there, and no oracle knows what they draw."""

from __future__ import annotations

from collections.abc import Iterable

from cp_debug.errors import InputError
from cp_debug.graph.free_axes import scalar
from cp_debug.graph.graph import Graph, Node

DRAWS = {"Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"}

DRAWS_NUMBERS = "draws random numbers"
"""Phrase for a node of ``DRAWS``; the reason why one was not replayed ends with it."""


def draws(node: Node, graph: Graph) -> bool:
    """Whether ``node`` draws: a random operator, or a Dropout that is not known to be off."""
    if node.op in DRAWS:
        return True
    if node.op != "Dropout":
        return False
    version = graph.opsets.get("", 1)
    if version < 7:
        return not bool(node.attribute("is_test", 0))
    training = node.proto.input[2] if version >= 12 and len(node.proto.input) > 2 else ""
    return bool(training) and scalar(graph, training) != 0


def drawing(graph: Graph) -> list[Node]:
    """The nodes of the main graph that draw random numbers."""
    return [node for node in graph.nodes if draws(node, graph)]


def drawing_note(node: Node) -> str:
    """A sentence about a node that draws, and about its seed, where it has one."""
    seed = node.attribute("seed", None)
    fixed = "" if seed is None else f" (seed {seed:g}; each runtime has its own generator)"
    return f"{node.name} ({node.op}) {DRAWS_NUMBERS}{fixed}: what depends on it differs from run to run"


def refuse_random(graphs: Iterable[Graph], what: str) -> None:
    """Raise InputError where a graph draws random numbers: two runs of it differ, whoever computes them.

    ``what`` says in the message what cannot be told then, such as ``no goal can be judged``.
    """
    for graph in graphs:
        for node in drawing(graph):
            raise InputError(f"{graph}: {drawing_note(node)}, and {what}")
