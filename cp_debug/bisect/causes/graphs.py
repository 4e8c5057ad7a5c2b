"""With the programs of both sides at hand: what differs between the two graphs at the layer, proved by computing it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from cp_debug.backends.executor import Executor
from cp_debug.bisect.causes.base import Candidate
from cp_debug.bisect.causes.segment import Segment, as_double
from cp_debug.errors import InputError
from cp_debug.graph.graph import Graph, Node
from cp_debug.graph.node_differences import NodeDifference, Pieces

SHOWN = 3
"""Differences in one line."""
_FIX = "make {layers} equal in both programs: "


@dataclass
class OtherProgram:
    """The graph that the test runs where it is another than the reference's, with what was captured of it."""

    graph: Graph
    names: Mapping[str, str]
    """Its values → the reference's."""
    load: Callable[[str], Any]
    """A captured value by the reference's name."""
    executor: Executor

    def piece(self, target: str, known: set[str]) -> tuple[str, list[Node], list[str]] | None:
        """(own name, nodes, values they start from) of what makes ``target``; None where it has no such value."""
        own = next((own for own, name in self.names.items() if name == target and own in self.graph.producer), None)
        if own is None:
            own = target if target in self.graph.producer and target not in self.names else None
        if own is None:
            return None
        inside = {o for o in self.graph.values if self.names.get(o, o) in known}
        nodes, starts = self.graph.segment([own], inside)
        return own, nodes, starts


def difference(segment: Segment, other: OtherProgram, known: set[str]) -> tuple[Candidate | None, list[NodeDifference]]:
    """What the two graphs have different at a layer, and the test's own nodes computed on the oracle as its proof.

    No candidate where they are equal, where the test's cannot be computed, or where it only adds nodes: what those do
    has better names.
    """
    piece = other.piece(segment.target, known)
    if piece is None or not segment.nodes:
        return None, []
    own, nodes, starts = piece
    found = Pieces(segment.graph, segment.nodes, other.graph, nodes, other.names).differences()
    if not found:
        return None, []
    value = _computed(segment, other, own, nodes, starts)
    telling = [d for d in found if not d.added]
    if value is None or value.shape != segment.test.shape or not telling:
        return None, found
    first = telling[0]
    evidence = {"node": first.node, **first.evidence, "read_off": "the difference of the two graphs"}
    if len(found) > 1:
        evidence["differences"] = [d.says for d in found[:8]]
    return Candidate(first.cause, _says(found), value, 0, evidence, _FIX + first.says), found


def added(segment: Segment, other: OtherProgram, known: set[str], found: Sequence[NodeDifference]) -> Candidate | None:
    """The nodes that the test has besides, where nothing else explains the layer."""
    piece = other.piece(segment.target, known)
    value = _computed(segment, other, *piece) if piece is not None and found else None
    if value is None or value.shape != segment.test.shape:
        return None
    first = found[0]
    evidence = {"node": first.node, **first.evidence, "read_off": "the difference of the two graphs"}
    return Candidate(first.cause, _says(found), value, 0, evidence, _FIX + first.says)


def _says(found: Sequence[NodeDifference]) -> str:
    more = f"; and {len(found) - SHOWN} more differences" if len(found) > SHOWN else ""
    return "; ".join(d.says for d in found[:SHOWN]) + more


def _computed(
    segment: Segment, other: OtherProgram, own: str, nodes: Sequence[Node], starts: Sequence[str]
) -> Tensor | None:
    try:
        given = {s: other.load(other.names.get(s, s)) for s in starts}
        return as_double(other.executor.run_nodes(nodes, given, [own])[own])
    except InputError:  # an operator that nobody here can compute
        return None
