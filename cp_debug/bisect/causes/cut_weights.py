"""Weights that lost something on the way to the file: the small ones, or the large ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from cp_debug.bisect.causes.base import Candidate, cause
from cp_debug.bisect.causes.constant_changes import constants_of
from cp_debug.bisect.causes.segment import Segment
from cp_debug.bisect.causes.single_numbers import search
from cp_debug.graph.graph import Node

FEWEST = 32
"""Weights of a constant from which a threshold among them is searched for."""
SHARES = (0.0, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
"""Starts of the search: shares of the weights, the smallest, that are zero."""
BOUNDS = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1.0)
"""Starts of the search: largest weights as shares of the declared largest one."""


@cause(costly=True)
def thresholds(segment: Segment) -> Iterator[Candidate]:
    """Candidates: weights below some size are zero, or beyond some size cut off at it."""
    if segment.strange or segment.test.shape != segment.exact.shape or not segment.introduced:
        return
    for node, place, weight in _weights(segment):
        sizes = weight.abs()
        ranked, largest = sizes.flatten().sort().values, float(sizes.max())

        def pruned(share: float, ranked: Tensor = ranked, weight: Tensor = weight) -> Tensor | None:
            count = round(share * ranked.numel())
            return torch.where(weight.abs() < ranked[count], 0.0, weight) if 0 <= count < ranked.numel() else None

        def clipped(share: float, largest: float = largest, weight: Tensor = weight) -> Tensor | None:
            return weight.clamp(-share * largest, share * largest) if share > 0 else None

        said = {
            "weights-pruned": lambda n: f"the smallest {n:.3g} of the weights of {node.op} are zero",  # noqa: B023
            "weights-clipped": lambda n: f"the weights of {node.op} are cut off at ±{n * largest:.4g}",  # noqa: B023
        }
        for name, own, starts, change in (
            ("weights-pruned", 0.0, SHARES, pruned),
            ("weights-clipped", 1.0, BOUNDS, clipped),
        ):
            if (fit := search(segment, own, _emulated(segment, node, place, change), starts)) is not None:
                number, value = fit
                evidence = {"constant": node.proto.input[place], "share": number}
                yield Candidate(name, said[name](number), value, 1, evidence, "export the weights of {layers} again")


def _emulated(
    segment: Segment, node: Node, place: int, change: Callable[[float], Tensor | None]
) -> Callable[[float], Tensor | None]:
    def emulate(number: float) -> Tensor | None:
        changed = change(number)
        return None if changed is None else segment.edited(node, inputs={place: changed})

    return emulate


def _weights(segment: Segment) -> Iterator[tuple[Node, int, Tensor]]:
    for node in segment.nodes:
        for place, weight in constants_of(segment, node, FEWEST).items():
            if weight.dim() > 1 and bool(torch.isfinite(weight).all()):
                yield node, place, weight
