"""Candidate causes, and the registry of the families that propose them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from cp_debug.bisect.causes.segment import Segment


@dataclass
class Candidate:
    """One possible cause, and what the layer would give if it were the only thing wrong."""

    cause: str
    """Name of the cause: the same for every layer with it, and in the JSON."""
    says: str
    """One line for people."""
    value: Tensor | None
    """Result that the layer would give, of the captured result's shape, float64; None where it gives no such result,
    which makes this no candidate."""
    parameters: int = 0
    """Count of numbers fitted to the captured result: of two equal explanations the simpler is preferred."""
    evidence: dict[str, Any] = field(default_factory=dict)
    """Further figures, JSON-safe."""
    fix: str = ""
    """A command or a code line, ``{layers}`` standing for the layers."""
    by_magnitude: bool = False
    """Only the size of the error speaks for it: taken where nothing else explains the layer, and said so."""
    heard: bool = False
    """Whether numbers leave a range, by the verdict or altogether: it goes before what explains the layer as well."""
    declared: bool = False
    """Whether the value is what the declared precision itself gives: nothing of the same effect stands beside it."""
    degenerate: int = 0
    """Rank by what it leaves of the layer: 0, more than whole numbers; 1, whole numbers; 2, nothing but zeros. The
    lowest goes first of causes that explain as much with as few numbers."""
    observed: bool = False
    """Whether this only describes the captured result: nothing was emulated, so nothing is said to be explained."""
    located: bool = False
    """Whether it says no more than where the error lies: the wrong elements are copied, so chance has no part in it."""


Emulate = Callable[["Segment"], Iterator[Candidate]]


@dataclass(frozen=True)
class Cause:
    """A family of causes that are emulated alike."""

    emulate: Emulate
    costly: bool = False
    """Asked only when nothing cheap explains the layer."""
    structural: bool = False
    """Fits nothing and is about what the graph says: asked, too, where all that explains the layer was fitted."""

    by_node: bool = False
    """Whether it changes one node after the other and computes the layer again each time, which a region of many nodes
    is not asked: it has hypotheses of its own."""
    approximate: bool = False
    """Emulates arithmetic whose details differ from kernel to kernel (order of sums, ties): a part of the error may be
    left. What emulates anything else must leave no more than rounding."""

    def __call__(self, segment: Segment) -> Iterator[Candidate]:
        """Every candidate of this family that applies to the layer; none, where it makes no sense there."""
        return self.emulate(segment)


CAUSES: list[Cause] = []
"""Families in the order in which they are asked; of equally simple explanations the first is taken."""


def cause(
    *, costly: bool = False, structural: bool = False, by_node: bool = False, approximate: bool = False
) -> Callable[[Emulate], Emulate]:
    """Decorator that registers a family of causes, with the fields of ``Cause``."""

    def register(emulate: Emulate) -> Emulate:
        CAUSES.append(Cause(emulate, costly, structural, by_node, approximate))
        return emulate

    return register
