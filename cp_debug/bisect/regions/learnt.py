"""Knowledge about the inside of a region, gained engine by engine."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from cp_debug.bisect.regions.hypotheses import REPRODUCED, Hypothesis
from cp_debug.bisect.regions.region import Region
from cp_debug.serialize import JsonForm


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
