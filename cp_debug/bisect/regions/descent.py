"""Descent into a guilty region: a few more engines, each chosen by what is known, until a node or an operator is named.

First hypotheses are emulated, which costs no engine. Where none gives the region's result, operators, then nodes with
one role, are kept in FP32 by halves, and what must stay is found without looking inside: a value that is shown would
undo the fusion. What is named at the end is kept in FP32 by itself; that this mends the region is said only where it
was seen.

``Descent`` is what is known about the inside of a region, gained engine by engine.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cp_debug.bisect.causes.segment import Segment
from cp_debug.bisect.regions.hypotheses import REPRODUCED, Hypothesis, rank
from cp_debug.bisect.regions.region import Region
from cp_debug.bisect.replayed import EXCESS
from cp_debug.errors import CpdebugError, Terminated
from cp_debug.graph.graph import Node
from cp_debug.graph.operators import MOVING, PRODUCTS
from cp_debug.probes.distance import relative_l2
from cp_debug.serialize import JsonForm

BUILDS = 6
"""Engines built for one region, unless said otherwise."""
FAILED = "failed"
"""Beginning of what is learnt from an engine that could not be built."""
NORMALIZING = (
    "LayerNormalization",
    "InstanceNormalization",
    "ReduceMean",
    "ReduceSum",
    "Pow",
    "Sqrt",
    "Reciprocal",
    "Softmax",
    "Exp",
)
"""Operators that are known to suffer in FP16, so that they are suspected before others."""

Build = Callable[[str, Sequence[str]], tuple[np.ndarray | None, float]]
"""``BuildsVariations.trial`` with the inputs given."""


class _Spent(Exception):
    """No build is left, or none works."""


@dataclass
class RegionSearch:
    """The search for the nodes of a region at fault."""

    region: Region
    segment: Segment
    """The region on its captured inputs."""
    reference: np.ndarray
    """The same value from the reference, any dtype."""
    build: Build
    inherited: float
    """The part of the distance from the reference that came in, relative L2."""
    max_builds: int
    """Engines that may be built."""
    lower: bool
    """Whether the engine is in a lower precision than FP32, so that nodes can be kept."""
    tell: Callable[[str], None]
    """Told what is known before each build."""

    def __post_init__(self) -> None:
        names = set(self.region.nodes)
        self._nodes = [n for n in self.segment.nodes if n.name in names and n.op not in MOVING]
        size = max(float(np.linalg.norm(np.nan_to_num(np.asarray(self.reference, np.float64)))), 1e-300)
        healthy = self.segment.expected / size + self.inherited
        error = self._error(self.segment.test.numpy())
        finite = error if math.isfinite(error) else 1.0
        self.descent = Descent(self.region, error, max(min(EXCESS * healthy, math.sqrt(finite * healthy)), 1e-300))
        self._suspect([n.name for n in self._nodes])

    def descend(self) -> Descent:
        """What is known in the end. Ctrl-C and failing builds end the search, what was learnt is kept."""
        try:
            self._run()
        except Terminated:
            raise
        except KeyboardInterrupt:
            self.descent.ended = "interrupted"
        except _Spent as spent:  # suspect is what is proven, where anything is
            self.descent.ended = str(spent)
            self._suspect(self.descent.kept or self.descent.suspects)
        return self.descent

    def _run(self) -> None:
        descent = self.descent
        self.tell(f"{descent.region.label}: trying hypotheses")
        descent.hypotheses = rank(self.segment)
        best = descent.reproduced
        if best is None or best.name == self.segment.context.claim.name:
            if not self.lower:
                raise _Spent("in FP32 there is no precision to keep")
            self._by_precision()
            return
        self._suspect(best.nodes)
        if self.lower:
            self._mends(best.nodes)

    def _by_precision(self) -> None:
        """Find the operators, then the roles, then the nodes that must be in FP32, by halves."""
        descent, everything = self.descent, [n.name for n in self._nodes]
        self._suspect(everything)
        self._mends(everything)  # it must be right then, if rounding is to blame
        descent.in_fp32 = descent.steps[-1].error
        kinds: dict[str, Callable[[Node], Any]] = {
            "operators": lambda node: node.op in PRODUCTS or node.op,
            "roles": self._role,
            "nodes": lambda node: node.index,
        }
        for kind, key in kinds.items():
            parts = _parts([n for n in self._nodes if n.name in descent.suspects], key)
            if len(parts) < 2:
                continue
            self._halve(parts, kind)
            if set(descent.suspects) != set(descent.kept) and not self._mends(descent.suspects):
                self._suspect(everything)
                raise _Spent(
                    "no smaller part of it in FP32 fixes it" if descent.kept else "keeping FP32 does not fix it"
                )

    def _role(self, node: Node) -> tuple[Any, ...]:
        """Operators of a node and of its neighbours: blocks of one kind repeat them."""
        graph = self.segment.graph

        def near(node: Node, down: bool) -> list[str]:
            if down:
                neighbours = [r for o in node.outputs for r in graph.consumers.get(o, ())]
            else:
                neighbours = [graph.producer[i] for i in node.inputs if i in graph.producer]
            return sorted(name for o in neighbours for name in (near(o, down) if o.op in MOVING else [o.op]))

        return (node.op, *near(node, False), "→", *near(node, True))

    def _halve(self, groups: list[list[Node]], kind: str) -> None:
        """Suspect the one of ``groups`` that must be kept in FP32, as far as builds allow."""
        while len(groups) > 1:
            half = groups[: (len(groups) + 1) // 2]
            mends = self._mends([n.name for group in half for n in group])
            step = self.descent.steps[-1]
            if step.learnt.startswith(FAILED):
                raise _Spent("a build failed")
            groups = half if mends else groups[len(half) :]
            remaining = [n.name for group in groups for n in group]
            step.learnt += f": {_nodes(len(remaining))} left, by {kind}"
            self._suspect(remaining)

    def _mends(self, names: Sequence[str]) -> bool:
        """Whether an engine with these nodes in FP32 is right; if so, that is proven of them."""
        descent, value = self.descent, None
        if len(descent.steps) >= self.max_builds:
            raise _Spent(f"{self.max_builds or 'no'} builds were allowed")
        self.tell(f"{descent.region.label}: build {len(descent.steps) + 1} of at most {self.max_builds}; {self._now()}")
        started, step = time.monotonic(), Step(list(names), 0.0)
        try:
            value, step.gap = self.build(self.segment.target, names)
        except CpdebugError as failure:
            step.learnt = f"{FAILED}: {str(failure).splitlines()[0]}"
        step.seconds = round(time.monotonic() - started, 3)
        step.error = self._error(value) if value is not None else None
        descent.steps.append(step)
        mends = step.error is not None and step.error <= descent.limit
        step.learnt = step.learnt or ("fixed" if mends else "not fixed")
        if mends and (not descent.kept or len(names) < len(descent.kept)):
            descent.kept, descent.mended = list(names), step.error
        return mends

    def _now(self) -> str:
        descent = self.descent
        if not descent.steps:
            return f"error {descent.error:.2g}"
        operators = ", ".join(descent.operators[:3])
        return f"suspect: {_nodes(len(descent.suspects))} ({operators}); {descent.steps[-1].learnt}"

    def _error(self, value: np.ndarray) -> float:
        return relative_l2(np.asarray(value, np.float64), np.asarray(self.reference, np.float64))

    def _suspect(self, names: Collection[str]) -> None:
        suspect_names = set(names)
        nodes = [n for n in self.segment.nodes if n.name in suspect_names]
        self.descent.suspects = [n.name for n in nodes]
        self.descent.operators = list(dict.fromkeys(n.op for n in nodes))


def _parts(nodes: Sequence[Node], key: Callable[[Node], Any]) -> list[list[Node]]:
    """Nodes with one key each: those that suffer in FP16 first, products last."""
    by: dict[Any, list[Node]] = {}
    for node in nodes:
        by.setdefault(key(node), []).append(node)

    def order(part: list[Node]) -> tuple[bool, int]:
        op = part[0].op
        return op in PRODUCTS, NORMALIZING.index(op) if op in NORMALIZING else len(NORMALIZING)

    return sorted(by.values(), key=order)


def _nodes(count: int) -> str:
    return "1 node" if count == 1 else f"{count} nodes"


@dataclass
class Step:
    """One engine that was built."""

    names: list[str]
    """Nodes that were kept in FP32."""
    seconds: float
    error: float | None = None
    """Relative L2 distance of the region's value from the reference's; None where the build failed."""
    gap: float | None = None
    """Relative L2 distance of the final outputs from the plain engine's."""
    learnt: str = ""


@dataclass
class Descent(JsonForm):
    """Knowledge about the inside of a region."""

    region: Region
    error: float
    """Relative L2 distance of its value from the reference's, on the plain engine."""
    limit: float
    """Distance up to which the region counts as mended."""
    hypotheses: list[Hypothesis] = field(default_factory=list, metadata={"written": False})
    steps: list[Step] = field(default_factory=list)
    suspects: list[str] = field(default_factory=list)
    """Nodes that are still suspect, in execution order."""
    operators: list[str] = field(default_factory=list)
    """Operators of the suspects."""
    kept: list[str] = field(default_factory=list)
    """Nodes of which it is proven that keeping them in FP32 mends the region."""
    mended: float | None = None
    """Error that is left with the kept nodes in FP32."""
    in_fp32: float | None = None
    """The error with the whole region kept in FP32, where that was tried: large says that rounding is not to blame."""
    ended: str = ""
    """Reason why nothing more was built."""

    @property
    def reproduced(self) -> Hypothesis | None:
        """The best hypothesis, where it gives the region's result by itself and is not what was expected anyway."""
        best = next(iter(self.hypotheses), None)
        return best if best is not None and best.explained >= REPRODUCED else None

    @property
    def says(self) -> str:
        """One line about the present state of knowledge."""
        ops = f"{', '.join(self.operators[:4])}{' …' if len(self.operators) > 4 else ''}"
        who = self.suspects[0] if len(self.suspects) == 1 else f"{len(self.suspects)} of its nodes ({ops})"
        parts = []
        if (best := self.reproduced) is not None:
            parts.append(f"{best.says}: reproduces {best.explained:.1%} of its error")
        elif self.mended is None:
            parts.append(f"its error of {self.error:.2g} arises in {who}")
        if self.mended is not None:
            kept_nodes = self.kept[0] if len(self.kept) == 1 else f"{len(self.kept)} nodes"
            at = "" if best is not None or set(self.kept) != set(self.suspects) else f" ({ops})"
            parts.append(f"{kept_nodes}{at} in FP32 reduces its error from {self.error:.2g} to {self.mended:.2g}")
        if self.in_fp32 is not None and self.in_fp32 > self.limit:
            parts.append("even entirely in FP32 it is wrong, so the fusion is at fault, not the rounding")
        if self.ended:
            parts.append(self.ended)
        return "; ".join(parts)

    def derived(self) -> dict[str, Any]:
        """The best eight hypotheses."""
        return {"hypotheses": self.hypotheses[:8]}
