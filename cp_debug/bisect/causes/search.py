"""Choice of the candidate that explains a layer: evidence first, and of equal evidence the simplest."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass

from cp_debug.bisect.causes.base import CAUSES, Candidate, Cause
from cp_debug.bisect.causes.segment import Segment

ENOUGH = 0.9
"""Share of the introduced error that an approximate cause must explain; and as much of the captured result's own
variation, lest anything small explain an error that is the loss of a large exact result."""
EXACT = 0.995
"""Share that all others must explain, where the rounding that is left behind leaves room for it."""
ROUNDING = 2.0
"""A cause is complete when it leaves no more than this many times what the claimed precision must introduce: what is
put behind a rounded result is rounded once more."""
CLOSE = 1.6
"""Explanations whose residuals are within this factor of the best one are equally good: the simplest is taken."""
SMALL = 1 << 16
"""Elements of a result up to which structural families are asked, too, where something cheap explains the layer without
a fitted number: another cause may do so as well."""
NEARLY_ALL = 0.999
"""Share of the introduced error from which a complete cause stands beside one that fits many more numbers and leaves
less: what many numbers gain there is a part of the rounding."""
FEW = 2
"""Fitted numbers up to which an explanation is simple: only structural families are asked of the costly ones then."""
TRIED = 300.0
"""Hypotheses that a layer is tried against: each may fit by chance."""
CHANCE = 1e-3
"""Probability that one of them does, up to which a claim is made."""


@dataclass
class Explanation:
    """A cause with its evidence.

    ``cause`` is None where nothing explains the layer; ``runner_up`` came nearest then.
    """

    cause: Candidate | None
    explained: float
    runner_up: Candidate | None
    runner_up_explained: float
    graphs_differ: tuple[str, ...] = ()
    """Differences of the test's graph at the layer, in words, where no cause was found."""
    equals: tuple[Candidate, ...] = ()
    """Other causes, each as simple, that explain the layer equally well: nothing in the captured values tells them
    from ``cause``."""
    alike: tuple[str, ...] = ()
    """Other operators of which ``cause`` holds as well: a saturated Tanh and a saturated Sigmoid give one result."""


@dataclass
class _Tried:
    candidate: Candidate
    family: Cause
    explained: float
    residual: float
    """Never below the claimed rounding: nothing can be learnt from what is left there."""
    complete: bool
    """Whether no more is left than rounding."""
    accepted: bool
    alternatives: int = 1
    """Candidates of its family: of equal explanations the one that had the fewest others beside it is preferred."""


def explain(
    segment: Segment,
    first: Collection[Cause] = (),
    on_failure: Callable[[Exception], None] = lambda error: None,
    families: Collection[Cause] | None = None,
) -> tuple[Explanation, Cause | None]:
    """Try the causes on one layer; also returns the family that won.

    ``first``: families that explained worse layers of the run. When one of them explains this layer, too, without a
    fitted number, the others are not tried. The costly ones are tried unless something cheap explains all but rounding
    without a fitted number; with few of them, only the structural ones are. A family that raises is left at that, and
    ``on_failure`` is told. ``families``: no others are tried.
    """
    asked = CAUSES if families is None else families

    def all_of(some: Collection[Cause]) -> list[_Tried]:
        judged = []
        for family in some:
            try:
                judged += _try(segment, family)
            except Exception as error:
                on_failure(error)
        return judged

    results = all_of([c for c in first if c in asked])
    if not any(t.accepted and not t.candidate.parameters for t in results):
        results += all_of([c for c in asked if not c.costly and c not in first])
        fewest = min((t.candidate.parameters for t in results if t.accepted and t.complete), default=None)
        if fewest != 0 or segment.test.numel() <= SMALL:
            many = fewest is None or fewest > FEW
            results += all_of([c for c in asked if c.costly and (many or c.structural) and c not in first])
    return _chosen(results)


def _chosen(results: list[_Tried]) -> tuple[Explanation, Cause | None]:
    if not results:
        return Explanation(None, 0.0, None, 0.0), None
    first = min(results, key=lambda t: t.residual)
    best = first.residual
    equal = [t for t in results if t.residual <= CLOSE * best or _simpler(t, first)]
    chosen = min(equal, key=_rank)
    if chosen.accepted:
        others = [t for t in results if t.candidate.cause != chosen.candidate.cause and t.residual > CLOSE * best]
        # Equal to a thousandth, the simpler one: which of two is nearer by a rounding depends on the processor.
        second = max(sorted(others, key=_rank), key=lambda t: round(t.explained, 3), default=None)
        explanation = _explanation(chosen, second, _equals(chosen, equal))
        explanation.alike = _alike(chosen, equal)
        return explanation, chosen.family
    if likely := max((t for t in results if t.candidate.by_magnitude), key=lambda t: t.explained, default=None):
        return _explanation(likely, chosen), likely.family
    return Explanation(None, 0.0, chosen.candidate, chosen.explained), None


def _simpler(tried: _Tried, best: _Tried) -> bool:
    """Whether nothing but rounding is left, and what is left least fits many numbers more."""
    more = best.candidate.parameters - tried.candidate.parameters
    return more > FEW and tried.complete and tried.explained >= NEARLY_ALL


def _rank(judged: _Tried) -> tuple[bool, bool, int, int, int, float]:
    candidate = judged.candidate
    rarity = round(math.log2(judged.alternatives))
    plain = candidate.parameters, candidate.degenerate, rarity
    return not judged.accepted, not candidate.heard, *plain, judged.residual


def _equals(chosen: _Tried, equal: list[_Tried]) -> tuple[Candidate, ...]:
    """The other causes that explain as much with no more numbers, one candidate each.

    Where FP16 is declared and a constant vanishes in it, ``x + c`` gives ``x`` as if the addition had been left out,
    which is no second explanation.
    """
    if chosen.candidate.located or chosen.candidate.declared:
        return ()
    found: dict[str, _Tried] = {}
    for tried in sorted(equal, key=_rank):
        candidate = tried.candidate
        if tried.accepted and candidate.parameters <= chosen.candidate.parameters and not candidate.observed:
            found.setdefault(candidate.cause, tried)
    return tuple(t.candidate for name, t in found.items() if name != chosen.candidate.cause)


def _alike(chosen: _Tried, equal: list[_Tried]) -> tuple[str, ...]:
    """Operators that the same cause with no more numbers may name as well."""
    own = chosen.candidate
    same = (
        t.candidate for t in equal if t.accepted and t.candidate.cause == own.cause and "op" in t.candidate.evidence
    )
    ops = dict.fromkeys(str(c.evidence["op"]) for c in same if c.parameters <= own.parameters)
    return tuple(op for op in ops if "op" in own.evidence and op != own.evidence["op"])


def _explanation(chosen: _Tried, second: _Tried | None, equals: tuple[Candidate, ...] = ()) -> Explanation:
    named, share = (second.candidate, second.explained) if second is not None else (None, 0.0)
    return Explanation(chosen.candidate, chosen.explained, named, share, equals=equals)


def _try(segment: Segment, family: Cause) -> list[_Tried]:
    judged = [tried for each in family(segment) if (tried := _judged(segment, each, family)) is not None]
    for tried in judged:
        tried.alternatives = len(judged)
    return judged


def accepted(segment: Segment, candidate: Candidate) -> Explanation | None:
    """The explanation of a layer by one candidate that is known beforehand; None where it does not reproduce it."""
    judged = _judged(segment, candidate, None)
    return _explanation(judged, None) if judged is not None and judged.accepted else None


def _judged(segment: Segment, candidate: Candidate, family: Cause | None) -> _Tried | None:
    """``family`` None: the candidate was read off, and is the only one. None for what is no candidate."""
    if candidate.value is None:
        return None
    explained, residual = segment.explained(segment.held(candidate.value))
    candidate.value = segment.exact  # free the large tensor; the figures are kept
    segment.context.trimmer.freed(segment.exact.nbytes)
    if segment.strange:
        return _Tried(candidate, family or CAUSES[0], explained, residual, explained == 1, explained >= ENOUGH)
    complete = residual <= ROUNDING * segment.expected and residual < segment.introduced / 2
    share = ENOUGH if family is None or family.approximate else EXACT
    near = residual <= (1 - share) * min(segment.introduced, segment.contrast)
    claimed = (near or complete) and (family is None or not _by_chance(segment, candidate, residual))
    return _Tried(candidate, family or CAUSES[0], explained, max(residual, segment.expected), complete, claimed)


def _by_chance(segment: Segment, candidate: Candidate, residual: float) -> bool:
    """Whether one of so many hypotheses may come so near in so few wrong elements without being true.

    A hypothesis that has nothing to do with the error comes within the share r of it in n elements with a probability
    of about r^n.
    """
    if candidate.located or candidate.observed or candidate.declared or not segment.introduced:
        return False
    free = segment.wrong - candidate.parameters
    if candidate.parameters and free < 1:
        return True  # as many numbers as there are to explain
    share = max(residual / segment.introduced, 1e-15)
    return free * math.log(share) + math.log(TRIED) > math.log(CHANCE)
