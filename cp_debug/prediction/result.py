"""Result of a prediction: an interval for each layer and output, detections, and layers to keep in FP32."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from cp_debug.detection.changes import DetectionChange
from cp_debug.display import Shown
from cp_debug.errors import InputError
from cp_debug.files import write_text
from cp_debug.mixed_precision.result import Named
from cp_debug.programs.precision import PRECISIONS
from cp_debug.reading import json_text, read_json
from cp_debug.safe_text import amount
from cp_debug.serialize import JsonForm, decode

SCHEMA = "cpdebug.prediction/1"

OVERFLOWS, CLOSE, VANISHES = "overflows", "close", "vanishes"
"""Effects of FP16's range on a layer: results beyond 65504; within a factor of 8 of that on this sample; results that
lose more when stored than rounding explains."""


@dataclass(frozen=True)
class Interval:
    """Relative L2 errors over the plausible kernels, widened by the spread that was seen beyond them; infinite where a
    result is not finite."""

    low: float
    expected: float
    """Error with the most likely kernel."""
    high: float

    @classmethod
    def around(cls, expected: float, all_of: Iterable[float], spread: float) -> Interval:
        """The interval of the kernels' errors, the most likely one's first; ``spread`` is a factor of at least 1."""
        errors = [expected, *all_of]
        return cls(min(errors) / spread, expected, max(errors) * spread)

    def joined(self, other: Interval) -> Interval:
        """The smallest interval that holds this one and ``other``, with the larger of the expected errors."""
        ends = min(self.low, other.low), max(self.expected, other.expected), max(self.high, other.high)
        return Interval(*ends)


@dataclass
class PredictedLayer:
    """One group of nodes as the target is expected to compute it."""

    component: str
    name: str
    """The torch path of its result, or the node's name."""
    value: str
    """Name of its result in the ONNX graph."""
    nodes: list[str]
    ops: list[str]
    reads: list[str]
    """The values that it reads and that depend on the model's input."""
    error: Interval
    """Error of its result against FP32, from everything above it and itself."""
    introduced: Interval | None = None
    """Error that it introduces by itself, on its own inputs; None where it only moves numbers."""
    inside: dict[str, Interval] = field(default_factory=dict)
    """Value inside the group → its error: a target that does not fuse the group shows it."""
    largest: float = 0.0
    """The largest magnitude of what any of its nodes gives in FP32."""
    range: str = ""
    """``overflows``, ``close`` or ``vanishes`` where FP16's range is likely to be left."""
    excess: float = 0.0
    """The upper end of ``introduced`` ÷ what rounding each operator's result introduces."""
    may_stay: bool = False
    """Whether the target may leave it in FP32, which its interval includes (``undecided``)."""
    keep: str = ""
    """Reason to keep it in FP32; empty where there is none."""


@dataclass
class PredictedOutput:
    """One final output, or an output of a component before the last."""

    component: str
    name: str
    error: Interval


@dataclass(repr=False)
class Prediction(JsonForm, Shown):
    """Expected effects of a precision on a target, for the worst of some samples."""

    schema = SCHEMA
    derives = ("schema", "verdict")
    model: str
    target: str
    precision: str
    kernels: dict[str, str]
    """Name of each way that was emulated → what it does; the most likely first."""
    spread: float
    """Factor by which the intervals are wider than these kernels' errors."""
    weak: bool
    """Whether the target may leave any layer in FP32: its error is then below the interval."""
    samples: list[str]
    layers: list[PredictedLayer]
    outputs: list[PredictedOutput]
    detections: dict[str, DetectionChange] = field(default_factory=dict)
    """Kernel → changes of the reference's boxes; empty for models without boxes."""
    largest_changes: dict[str, Interval] = field(default_factory=dict)
    """``center`` and ``size`` in metres, ``yaw`` in radians, ``score`` → interval of the largest change of a box, over
    kernels that were not emulated too (``prediction/box_changes.py``)."""
    keep: dict[str, list[str]] = field(default_factory=dict)
    """Component → nodes to keep in FP32."""
    goal: str = ""
    """Goal that keeping them must reach: the one asked for, else the tolerance, where it is left."""
    reached: bool | None = None
    """Whether the goal holds with them kept, on the emulator."""
    measured: dict[str, float] = field(default_factory=dict)
    """Figures of all outputs with them kept (``rel_l2``, ``max_abs``, counts of boxes), on ``measured_by``."""
    measured_by: str = ""
    named: Named = field(default_factory=Named)
    """The files in which the nodes have these names."""
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def passes(self) -> bool:
        """Whether nothing must stay in FP32, a goal that was asked for is reached, and no output is expected to be
        further off than the precision's tolerance."""
        return self.near and self.reached is not False and not any(layer.keep for layer in self.layers)

    @property
    def near(self) -> bool:
        """Whether no output is expected to be further off than the precision's tolerance."""
        return all(output.error.expected <= PRECISIONS[self.precision].rtol for output in self.outputs)

    @property
    def verdict(self) -> str:
        """The outcome in a sentence."""
        computing = [layer for layer in self.layers if layer.introduced is not None]
        worst = max(self.outputs, key=lambda o: o.error.expected, default=None)
        parts = [f"{amount(len(computing), 'layer')} in {self.precision} on {self.target}"]
        if worst is not None:
            e = worst.error
            off = f"off by about {e.expected:.2g} ({e.low:.2g} to {e.high:.2g})"
            parts.append(f"worst output {worst.name} {off if math.isfinite(e.expected) else 'holds NaN or Inf'}")
        else:
            parts.append("no output has a relative error")
        if out := [layer for layer in self.layers if layer.range == OVERFLOWS]:
            parts.append(f"{len(out)} beyond FP16's range")
        if keep_count := sum(bool(layer.keep) for layer in self.layers):
            parts.append(f"{keep_count} to keep in FP32")
        return ", ".join(parts)

    def save(self, path: Path) -> None:
        """Write the JSON document, complete or not at all."""
        write_text(json_text(self.to_dict(), indent=1) + "\n", path)

    @classmethod
    def open(cls, path: Path | str) -> Prediction:
        """Read what ``save`` or ``cpdebug predict --json`` wrote. Raises InputError naming the file and the field."""
        document = read_json(Path(path), what="prediction")
        schema = document.get("schema") if isinstance(document, dict) else None
        if isinstance(document, dict) and schema != SCHEMA:
            raise InputError(f"{path}: field 'schema' is {schema!r}; this version reads {SCHEMA!r}")
        return decode(cls, document, str(path))
