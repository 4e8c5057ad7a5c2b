"""Choice of the candidate that explains a layer: evidence first, and of equal evidence the simplest."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

from cp_debug.bisect.causes.base import CAUSES, Candidate, Cause
from cp_debug.bisect.causes.segment import Segment

ENOUGH = 0.9
"""Share of the introduced error that a cause must explain; and as much of the captured result's own variation, lest
anything small explain an error that is the loss of a large exact result."""
ROUNDING = 2.0
"""A cause is complete when it leaves no more than this many times what the claimed precision must introduce: what is
put behind a rounded result is rounded once more."""
CLOSE = 1.6
"""Explanations whose residuals are within this factor of the best one are equally good: the simplest is taken."""
FEW = 2
"""Fitted numbers up to which an explanation is simple: only structural families are asked of the costly ones then."""


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


@dataclass
class _Tried:
    candidate: Candidate
    explained: float
    residual: float
    """Never below the claimed rounding: nothing can be learnt from what is left there."""
    accepted: bool


def explain(
    segment: Segment,
    first: Collection[Cause] = (),
    on_failure: Callable[[Exception], None] = lambda error: None,
    families: Collection[Cause] | None = None,
) -> tuple[Explanation, Cause | None]:
    """Try the causes on one layer; also returns the family that won.

    ``first``: families that explained worse layers of the run. When one of them explains this layer, too, without a
    fitted number, the others are not tried. The costly ones are tried only where nothing cheap explains it.
    A family that raises is left at that, and ``on_failure`` is told. ``families``: no others are tried.
    """
    asked = CAUSES if families is None else families

    def all_of(some: Collection[Cause]) -> list[tuple[_Tried, Cause]]:
        judged = []
        for family in some:
            try:
                judged += [(t, family) for t in _try(segment, family)]
            except Exception as error:
                on_failure(error)
        return judged

    results = all_of([c for c in first if c in asked])
    if not any(t.accepted and not t.candidate.parameters for t, _ in results):
        results += all_of([c for c in asked if not c.costly and c not in first])
        fewest = min((t.candidate.parameters for t, _ in results if t.accepted), default=None)
        if fewest != 0:
            many = fewest is None or fewest > FEW
            results += all_of([c for c in asked if c.costly and (many or c.structural) and c not in first])
    if not results:
        return Explanation(None, 0.0, None, 0.0), None
    best = min(t.residual for t, _ in results)
    equal = [(t, family) for t, family in results if t.residual <= CLOSE * best]
    chosen, family = min(equal, key=lambda p: _rank(p[0]))
    if chosen.accepted:
        others = [t for t, _ in results if t.candidate.cause != chosen.candidate.cause and t.residual > CLOSE * best]
        second = max(others, key=lambda t: t.explained, default=None)
        return _explanation(chosen, second), family
    if likely := max((p for p in results if p[0].candidate.by_magnitude), key=lambda p: p[0].explained, default=None):
        return _explanation(likely[0], chosen), likely[1]
    return Explanation(None, 0.0, chosen.candidate, chosen.explained), None


def _rank(judged: _Tried) -> tuple[bool, bool, int, float]:
    candidate = judged.candidate
    return not judged.accepted, not candidate.heard, candidate.parameters, judged.residual


def _explanation(chosen: _Tried, second: _Tried | None) -> Explanation:
    if second is None:
        return Explanation(chosen.candidate, chosen.explained, None, 0.0)
    return Explanation(chosen.candidate, chosen.explained, second.candidate, second.explained)


def _try(segment: Segment, family: Cause) -> Iterator[_Tried]:
    for candidate in family(segment):
        yield _judged(segment, candidate)


def accepted(segment: Segment, candidate: Candidate) -> Explanation | None:
    """The explanation of a layer by one candidate that is known beforehand; None where it does not reproduce it."""
    judged = _judged(segment, candidate)
    return _explanation(judged, None) if judged.accepted else None


def _judged(segment: Segment, candidate: Candidate) -> _Tried:
    explained, residual = segment.explained(candidate.value)
    candidate.value = segment.exact  # free the large tensor; the figures are kept
    segment.context.trimmer.freed(segment.exact.nbytes)
    if segment.strange:
        return _Tried(candidate, explained, residual, explained >= ENOUGH)
    complete = residual <= ROUNDING * segment.expected and residual < segment.introduced / 2
    near = residual <= (1 - ENOUGH) * min(segment.introduced, segment.contrast)
    return _Tried(candidate, explained, max(residual, segment.expected), near or complete)
