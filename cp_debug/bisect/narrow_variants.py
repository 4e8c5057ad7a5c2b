"""Arithmetics that a layer in FP8 or 4 bits may have been computed in instead of the one that was declared."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache

import torch

from cp_debug.backends.arithmetic import ARITHMETICS
from cp_debug.backends.base import Tensor as AnyTensor
from cp_debug.backends.executor import Executor
from cp_debug.backends.narrow_options import GRANULARITIES, GROUPS, Granularity, NarrowOptions
from cp_debug.graph.graph import Graph, Node
from cp_debug.graph.operators import CONTRACTIONS
from cp_debug.probes.arrays import as_numpy, as_torch
from cp_debug.probes.distance import difference_norm, distance

SUMS: tuple[tuple[int | None, bool, int | None], ...] = (
    (14, False, None),
    (14, False, 128),
    (11, True, None),
    (12, False, None),
    (10, False, None),
)
"""Running sums that are tried: significant bits, whether FP16 with its range, products until it is promoted."""
APART = 0.1
"""Distance from the declared arithmetic, in units of what that introduces, up to which nothing is asked: it adds less
than one percent to the error."""
FITS = 0.1
"""Share of that distance that another arithmetic may leave: the same operands in the same blocks leave nothing but the
order of sums."""
MOST_WORK = 1 << 27
"""Products of a layer up to which narrow sums are tried: they are emulated one after the other."""


def variants(options: NarrowOptions) -> Iterator[tuple[str, NarrowOptions]]:
    """(Cause, options) of every arithmetic that is worse than ``options`` in one respect, cheap ones first."""
    if options.family == "fp8":
        granularity: Granularity
        for granularity in GRANULARITIES[: GRANULARITIES.index(options.granularity)]:
            yield "block-scale", replace(options, granularity=granularity)
    if options.family in ("fp8", "mxfp8") and options.element == "e4m3":
        yield "fp8-element", replace(options, element="e5m2")
    if options.family == "int4":
        for group in GROUPS:
            if group > options.group:
                yield "int4-group", replace(options, group=group)
    else:
        for bits, half, promote in SUMS:
            other = replace(options, significant=bits, half_sum=half, nearest=half, promote=promote)
            if _narrower(other, options):
                yield "fp8-accumulation", other


def _narrower(other: NarrowOptions, options: NarrowOptions) -> bool:
    """Whether a running sum keeps less than the declared one."""
    width, declared = (24 if o.significant is None else o.significant for o in (other, options))
    if width != declared:
        return width < declared
    return options.promote is not None and other.promote is None


class NarrowDepartures:
    """Finds layers that compute in another narrow arithmetic than the one that is declared for a graph."""

    def __init__(self, graph: Graph, claim: str, device: torch.device | str) -> None:
        """``claim``: a narrow precision with its options; ``device``: where layers are computed again."""
        self._graph = graph
        self._options = NarrowOptions.parse(claim)
        self._executor = cache(lambda name: Executor(graph, ARITHMETICS[name], device))

    def find(
        self,
        nodes: Sequence[Node],
        given: Mapping[str, AnyTensor],
        target: str,
        captured: AnyTensor,
        claimed: AnyTensor,
        exact: torch.Tensor,
    ) -> str:
        """Name of the arithmetic that reproduces ``captured`` where the declared one does not; empty without one.

        ``claimed`` is the result in the declared arithmetic, ``exact`` the oracle's; all have the value's shape.
        """
        if tuple(captured.shape) != tuple(exact.shape) or not any(n.op in CONTRACTIONS for n in nodes):
            return ""
        apart, allowed = distance(captured, claimed), difference_norm(claimed, exact)
        if apart.new_nonfinite or apart.difference <= APART * allowed + 1e-5 * apart.whole:
            return ""
        for cause, options in variants(self._options):
            if cause == "fp8-accumulation" and work(nodes, given, exact, self._graph) > MOST_WORK:
                continue
            result = self._executor(str(options)).run_nodes(nodes, given, [target])[target]
            near = difference_norm(captured, result) <= FITS * apart.difference
            if near and not distance(result, captured).new_nonfinite:
                return str(options)
        return ""


def spread(given: Mapping[str, AnyTensor], captured: AnyTensor, claimed: AnyTensor) -> bool:
    """Whether NaN and Inf in a result come from those in its inputs: a scale found in them spreads them to all else.

    ``captured`` and ``claimed`` have the value's shape; any float dtypes.
    """
    if distance(captured, claimed).new_nonfinite:
        return False
    read = (as_torch(as_numpy(value)) for value in given.values())
    return not all(bool(torch.isfinite(value).all()) for value in read if value.is_floating_point())


def work(nodes: Sequence[Node], given: Mapping[str, AnyTensor], result: torch.Tensor, graph: Graph) -> int:
    """Number of products that a segment sums: elements of ``result``, of any shape, times the length of a sum."""
    lengths = [1]
    for node in nodes:
        if node.op not in CONTRACTIONS:
            continue
        for name in node.proto.input[1:2]:
            shape = (
                tuple(graph.weight(name).dims)
                if name in graph.initializers
                else tuple(getattr(given.get(name), "shape", ()))
            )
            if len(shape) > 1:
                convolves = node.op in ("Conv", "ConvTranspose")
                lengths.append(torch.Size(shape[1:]).numel() if convolves else shape[-2])
    return result.numel() * max(lengths)
