"""Findings: a cause, where it struck, on what evidence, what it does to the result, and how to undo it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from cp_debug.detection.changes import DetectionChange
from cp_debug.serialize import JsonForm

UNKNOWN = "unknown"
MISSING_CASTS = "missing-casts"
"""The cause where a compiler does not round between the operators of one kernel, as eager does."""

ROUNDED_SCALAR = "rounded-scalar"
"""The cause where one side rounds a Python scalar to the type of the tensor that it meets, and the other does not."""


@dataclass
class Element:
    """One element: its index, what the layer gave and what the oracle makes of the same inputs."""

    index: list[int]
    value: float
    oracle: float


@dataclass
class Where:
    """Place of the error within a layer."""

    layer: str
    channels: dict[int, float] = field(default_factory=dict)
    """Share of the squared error by channel, the largest first; empty without a channel axis."""
    region: list[list[int]] = field(default_factory=list)
    """For each axis the first and last index between which all errors above a tenth of the largest lie."""
    concentrated: float = 1.0
    """The share of the tensor that the region covers."""
    worst: list[Element] = field(default_factory=list)


@dataclass
class Effect:
    """Effect of a finding's layers on the final result, by themselves."""

    share: float | None = None
    """Share of the final divergence."""
    detections: DetectionChange | None = None
    """The reference's detections against those with only this error added to its outputs; None where not computed."""


@dataclass
class Finding(JsonForm):
    """One cause and the layers that it explains; ``cause`` is ``unknown`` where nothing explains them."""

    cause: str
    says: str
    """One line: the cause and its figures, for the layer that is worst."""
    layers: list[str]
    ops: list[str]
    side: str = field(default="test", metadata={"one_of": ("test", "reference", "export")})
    """Side whose result is at fault: ``test``, ``reference``, or ``export``, which made the graph."""
    explained: float | None = None
    """Share of the introduced error that the cause explains, over all its layers; None for observations."""
    runner_up: str | None = None
    """The best of the other causes, and what it explains."""
    runner_up_explained: float | None = None
    evidence: dict[str, Any] = field(default_factory=dict)
    where: list[Where] = field(default_factory=list)
    effect: Effect = field(default_factory=Effect)
    fix: str = ""
    source: str = ""
    """Line of the torch module that computes the first of its layers that has one, where the export tells."""
    inside: dict[str, Any] | None = None
    """For a region: the findings about its inside (``cp_debug.bisect.regions.descent.Descent``)."""

    def __repr__(self) -> str:
        return f"<Finding {self.cause}: {self.headline}>"

    @property
    def headline(self) -> str:
        """``16 layers (Conv): sums are accumulated in FP16``."""
        if not self.layers:
            return self.says
        ops = ", ".join(dict.fromkeys(self.ops))
        who = self.layers[0] if len(self.layers) == 1 else f"{len(self.layers)} layers"
        at = " of the reference" if self.side == "reference" else ""
        return f"{who} ({ops}){at}: {self.says}"

    @classmethod
    def fields_from(cls, document: dict[str, Any]) -> dict[str, Any]:
        """The entry of ``findings``, also of a file that says no more than the cause."""
        return {"says": document.get("cause"), "layers": [], "ops": []} | document
