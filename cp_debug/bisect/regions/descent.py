"""Descend into a guilty region: a few more engines, each chosen by what is known, until a node or an operator is named.

First values inside are shown. Where the error stays, each stretch between two of them is judged by itself and the worst
one is looked at next. Where showing values mends it, the fault needs the fusion: then operators, or nodes, are kept in
FP32 by halves, and what must stay is found without looking inside. What is named at the end is kept in FP32 by itself:
only when that mends the region it is called the cause.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import numpy as np

from cp_debug.bisect.causes.segment import Segment
from cp_debug.bisect.norms import distance, ratio
from cp_debug.bisect.regions.hypotheses import LARGEST, REPRODUCED, Hypothesis, largest, rank
from cp_debug.bisect.regions.marks import choose, cuts
from cp_debug.bisect.regions.region import HEAVY, MOVING, Region
from cp_debug.bisect.replay import EXCESS
from cp_debug.errors import CpdebugError, InputError
from cp_debug.probes.graph import Node

MARKS = 8
"""Values shown by one engine."""
BUILDS = 6
"""Engines built for one region, unless said otherwise."""
NORMALISING = ("LayerNormalization", "InstanceNormalization", "ReduceMean", "ReduceSum", "Pow", "Sqrt", "Reciprocal", "Softmax", "Exp")
"""Operators that are known to suffer in FP16, so that they are suspected before others."""


class Built(Protocol):
    """One more engine's results; ``cp_debug.backends.tensorrt.session.Trial``."""

    @property
    def outputs(self) -> Mapping[str, np.ndarray]: ...

    @property
    def shown(self) -> Mapping[str, np.ndarray]: ...

    @property
    def gap(self) -> float: ...


class Builder(Protocol):
    """Builds one more engine of the program and runs it once; ``EngineSession.trial``."""

    def __call__(
        self, *, marks: Collection[str] = (), wide: Collection[str] = (), keep_fp32: Collection[str] = ()
    ) -> Built: ...


@dataclass
class Step:
    """One engine that was built."""

    kind: str
    """``marks``: values were shown; ``keep``: nodes were kept in FP32."""
    names: list[str]
    """Those values, or nodes."""
    seconds: float
    error: float | None = None
    """Relative L2 distance of the region's value from the reference's; None where the build failed."""
    gap: float | None = None
    """The same distance of the final outputs from the plain engine's."""
    learnt: str = ""


@dataclass
class Descent:
    """What is known of the inside of a region."""

    region: Region
    error: float
    """Relative L2 distance of its value from the reference's, on the plain engine."""
    limit: float
    """Up to which it counts as mended."""
    hypotheses: list[Hypothesis] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    suspects: list[str] = field(default_factory=list)
    """Nodes that are still suspect, in execution order."""
    operators: list[str] = field(default_factory=list)
    """Their operators."""
    kept: list[str] = field(default_factory=list)
    """Nodes of which it is proven that keeping them in FP32 mends the region."""
    mended: float | None = None
    """The error that is left then."""
    ended: str = ""
    """Why nothing more was built."""

    @property
    def reproduced(self) -> Hypothesis | None:
        """The best hypothesis, where it gives the region's result by itself and is not what was expected anyway."""
        best = next(iter(self.hypotheses), None)
        return best if best is not None and best.explained >= REPRODUCED else None

    @property
    def says(self) -> str:
        """What is known now, in a line."""
        many = f"{len(self.suspects)} of {len(self.region.nodes)} nodes"
        what = f"{', '.join(self.operators[:4])}{' …' if len(self.operators) > 4 else ''}"
        who = self.suspects[0] if len(self.suspects) == 1 else f"{many} ({what})"
        if self.mended is not None:
            return f"{who} in FP32 brings its error from {self.error:.2g} to {self.mended:.2g}"
        if self.reproduced is not None:
            return f"{self.reproduced.says}: reproduces {self.reproduced.explained:.0%} of its error"
        return f"its error of {self.error:.2g} arises in {who}, not narrowed down further: {self.ended or 'no build yet'}"

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe but for infinities."""
        told = {k: v for k, v in asdict(self).items() if k not in ("region", "hypotheses")}
        return {**told, "region": self.region.to_dict(), "hypotheses": [h.to_dict() for h in self.hypotheses[:8]]}


def descend(
    region: Region,
    segment: Segment,
    reference: np.ndarray,
    build: Builder,
    *,
    inherited: float = 0.0,
    max_builds: int = BUILDS,
    tell: Callable[[str], None] = lambda text: None,
) -> Descent:
    """Find the nodes of ``region`` at fault, in at most ``max_builds`` engines.

    ``segment``: the region on its captured inputs. ``reference``: the same value from the reference, any dtype;
    ``inherited``: the part of the distance from it that came in, relative L2. ``tell`` is told what is known before
    each build. Ctrl-C and failing builds end the search, what was learnt is kept.
    """
    search = _Search(region, segment, reference, build, inherited, max_builds, tell)
    try:
        search.run()
    except KeyboardInterrupt:
        search.found.ended = "interrupted"
    except _Spent as spent:
        search.found.ended = str(spent)
    return search.found


class _Spent(Exception):
    """No build is left, or none works."""


class _Search:
    def __init__(
        self,
        region: Region,
        segment: Segment,
        reference: np.ndarray,
        build: Builder,
        inherited: float,
        max_builds: int,
        tell: Callable[[str], None],
    ) -> None:
        self._segment, self._reference, self._build = segment, reference, build
        self._max, self._tell = max_builds, tell
        names = set(region.nodes)
        self._nodes = [n for n in segment.nodes if n.name in names and n.op not in MOVING]
        whole = max(float(np.linalg.norm(np.nan_to_num(np.asarray(reference, np.float64)))), 1e-300)
        healthy = segment.expected / whole + inherited
        error = self._error(segment.test.numpy())
        finite = error if math.isfinite(error) else 1.0
        self.found = Descent(region, error, max(min(EXCESS * healthy, math.sqrt(finite * healthy)), 1e-300))
        self._suspect([n.name for n in self._nodes])
        self._top = largest(segment)

    def run(self) -> None:
        found = self.found
        self._tell(f"{found.region.label}: trying hypotheses")
        found.hypotheses = rank(self._segment)
        if self._max < 1:
            raise _Spent("no build allowed")
        if (best := found.reproduced) is not None and len(best.nodes) < len(self._nodes):
            self._suspect(best.nodes)
            if self._verify(best.nodes):
                return
            self._suspect([n.name for n in self._nodes])
        if self._by_marks():
            return
        self._by_precision()

    # ------------------------------------------------------------ showing values

    def _by_marks(self) -> bool:
        """Narrow the suspects by showing values; True when that ended it, False when the fault hides from marks."""
        segment = self._segment
        width = cuts(segment.graph, segment.nodes, segment.given, segment.target)
        shown: dict[str, np.ndarray] = {}
        while len(self.found.suspects) > 1:
            fresh = {v: w for v, w in width.items() if v not in shown}
            marks = choose(fresh, segment.nodes, self.found.suspects, MARKS)
            if not marks:
                break
            wide = [v for v in marks if self._top.get(v, 0.0) > LARGEST]
            step, built = self._trial("marks", marks, marks=[*segment.given, *marks], wide=wide)
            if built is None:
                return False
            if step.error is not None and step.error <= self.found.limit:
                step.learnt = "showing these values mends it: the fault needs them fused away"
                return False
            shown |= {v: built.shown[v] for v in marks if v in built.shown}
            guilty = self._judge(shown, built)
            if not guilty:
                step.learnt = "no stretch between these values is at fault by itself"
                return False
            ops = {tuple(sorted({n.op for n in nodes})) for nodes in guilty}
            self._suspect([n.name for n in guilty[0]])
            step.learnt = f"{len(guilty)} stretches are at fault, the first of {len(guilty[0])} nodes"
            if len(guilty) > 1 and len(ops) == 1 and len(guilty[0]) <= 2:
                break
        return self._name()

    def _judge(self, shown: Mapping[str, np.ndarray], built: Built) -> list[list[Node]]:
        """The suspect nodes of each stretch between known values that introduces too much, in execution order."""
        segment, suspects = self._segment, set(self.found.suspects)
        values: dict[str, Any] = {**segment.given, **{k: v for k, v in built.shown.items() if k in segment.given}, **shown}
        if segment.target in built.outputs:
            values[segment.target] = built.outputs[segment.target]
        elif segment.target in built.shown:
            values[segment.target] = built.shown[segment.target]
        guilty = []
        for value in [o for node in segment.nodes for o in node.outputs if o in values]:
            try:
                part = Segment.of(segment.lab, value, values.keys(), values.__getitem__)
            except InputError:
                continue
            inside = [n for n in part.nodes if n.name in suspects]
            if inside and (part.strange or part.introduced > EXCESS * part.expected):
                guilty.append(inside)
        return guilty

    # ------------------------------------------------------------ keeping precision

    def _by_precision(self) -> None:
        """Find the operators, then the nodes, that must be in FP32, by halves."""
        groups = self._groups(self._nodes)
        group = self._halve(groups, "operators")
        self._suspect([n.name for n in group])
        if len(group) > 1 and len(groups) > 1:
            self._confirm(group)
            self._halve([[n] for n in group], "nodes")
        if self.found.mended is None:
            self._verify(self.found.suspects)

    def _groups(self, nodes: Sequence[Node]) -> list[list[Node]]:
        """Nodes by operator, what suffers in FP16 first, products last."""
        by: dict[str, list[Node]] = {}
        for node in nodes:
            by.setdefault("products" if node.op in HEAVY else node.op, []).append(node)

        def order(op: str) -> tuple[int, int]:
            known = NORMALISING.index(op) if op in NORMALISING else len(NORMALISING)
            return (op == "products", known)

        return [by[op] for op in sorted(by, key=order)]

    def _halve(self, groups: list[list[Node]], what: str) -> list[Node]:
        """The one of ``groups`` that must be kept, as far as builds allow; what is certain goes into ``found``."""
        while len(groups) > 1:
            half = groups[: (len(groups) + 1) // 2]
            names = [n.name for group in half for n in group]
            step, built = self._trial("keep", names, keep_fp32=names)
            if built is None:
                raise _Spent("a build failed")
            mends = step.error is not None and step.error <= self.found.limit
            if mends:
                self._prove(names, step)
            groups = half if mends else groups[len(half) :]
            rest = [n for group in groups for n in group]
            step.learnt = f"{'mended' if mends else 'not mended'}: {len(rest)} nodes are left, by {what}"
            self._suspect([n.name for n in rest])
        return groups[0]

    def _confirm(self, group: Sequence[Node]) -> None:
        if {n.name for n in group} != set(self.found.kept) and not self._verify([n.name for n in group]):
            raise _Spent("no operator by itself mends it in FP32: it takes several, or it is not a matter of precision")

    def _name(self) -> bool:
        """Whether keeping the cornered nodes mends the region; else all of the region with the same operators."""
        names = list(self.found.suspects)
        if self._verify(names):
            return True
        ops = {n.op for n in self._nodes if n.name in names}
        alike = [n.name for n in self._nodes if n.op in ops]
        if len(alike) > len(names) and self._verify(alike):
            self._suspect(alike)
            return True
        return False

    def _verify(self, names: Sequence[str]) -> bool:
        step, built = self._trial("keep", list(names), keep_fp32=names)
        mends = built is not None and step.error is not None and step.error <= self.found.limit
        step.learnt = "mended" if mends else "not mended"
        if mends:
            self._prove(names, step)
        return mends

    def _prove(self, names: Collection[str], step: Step) -> None:
        if not self.found.kept or len(names) < len(self.found.kept):
            self.found.kept, self.found.mended = list(names), step.error

    # ------------------------------------------------------------ engines

    def _trial(self, kind: str, names: Sequence[str], **asked: Any) -> tuple[Step, Built | None]:
        found, target = self.found, self._segment.target
        if len(found.steps) >= self._max:
            raise _Spent(f"{self._max} builds were allowed")
        self._tell(f"{found.region.label}: build {len(found.steps) + 1} of at most {self._max}; {self._now()}")
        started = time.monotonic()
        asked["marks"] = list(dict.fromkeys([*asked.get("marks", ()), target]))
        try:
            built = self._build(**asked)
        except CpdebugError as error:
            step = Step(kind, list(names), time.monotonic() - started, learnt=f"failed: {str(error).splitlines()[0]}")
            found.steps.append(step)
            return step, None
        value = built.outputs.get(target, built.shown.get(target))
        error = self._error(value) if value is not None else None
        step = Step(kind, list(names), round(time.monotonic() - started, 3), error, built.gap)
        found.steps.append(step)
        return step, built

    def _now(self) -> str:
        found = self.found
        if not found.steps:
            return f"error {found.error:.2g}"
        return f"suspect are {len(found.suspects)} nodes ({', '.join(found.operators[:3])}); {found.steps[-1].learnt}"

    def _error(self, value: np.ndarray) -> float:
        if np.shape(value) != np.shape(self._reference):
            return math.inf
        difference, whole, born = distance(np.asarray(value, np.float64), np.asarray(self._reference, np.float64))
        return math.inf if born else ratio(difference, whole)

    def _suspect(self, names: Collection[str]) -> None:
        wanted = set(names)
        nodes = [n for n in self._nodes if n.name in wanted]
        self.found.suspects = [n.name for n in nodes]
        self.found.operators = list(dict.fromkeys(n.op for n in nodes))
