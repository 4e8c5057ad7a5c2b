"""The search for a wrong scale of a quantized file: what is better without it, by the layer's own nodes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from cp_debug.backends.executor import Executor
from cp_debug.bisect.causes.segment import as_double
from cp_debug.bisect.file_weights import BETTER
from cp_debug.graph.graph import Node
from cp_debug.probes.distance import relative_l2


@dataclass(frozen=True)
class WrongScale:
    """A scale of a layer's file that is not that of its numbers, or several along an axis."""

    cause: str
    says: str
    fix: str
    evidence: dict[str, Any]


def worst_scale(
    executor: Executor,
    nodes: Sequence[Node],
    starts: Mapping[str, Any],
    target: str,
    exact: Tensor,
    repairs: Iterable[tuple[str, Tensor, WrongScale]],
) -> WrongScale | None:
    """The scale without which ``target`` would be much nearer to ``exact``, with both errors; None where there is none.

    ``nodes`` of the file compute ``target`` from ``starts``; ``repairs``: a value of theirs, what it would be with
    another scale, and the scale. Tensors have the shapes of their values, in any float type. Raises InputError where
    nobody can compute the nodes.
    """

    def error(values: Mapping[str, Tensor]) -> float:
        rest = [node for node in nodes if values.keys().isdisjoint(node.outputs)]
        return relative_l2(as_double(executor.run_nodes(rest, {**starts, **values}, [target])[target]), exact)

    now = error({})
    found = [(error({value: better}), wrong) for value, better, wrong in repairs]
    then, worst = min(found, key=lambda pair: pair[0], default=(now, None))
    if worst is None or not now > BETTER * then:
        return None
    worst.evidence.update(error=now, error_then=then)
    return worst
