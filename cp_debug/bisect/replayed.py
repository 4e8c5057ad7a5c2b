"""What the replay of one layer found: plain figures, as results hold them."""

from __future__ import annotations

from dataclasses import dataclass, field

EXCESS = 4.0
"""A layer whose introduced error is this many times the expected one is guilty: ``docs/thresholds.md`` has the
measurements."""


@dataclass
class Replay:
    """What one layer did, all relative L2 norms except where said. None: could not be computed, see ``skipped``."""

    nodes: tuple[str, ...] = ()
    """The ONNX nodes of the segment, the fused ones included."""
    introduced: float | None = None
    inherited: float | None = None
    amplification: float | None = None
    expected: float | None = None
    excess: float | None = None
    oracle_error: float = 0.0
    """Bound of the oracle's own rounding, relative."""
    new_nonfinite: int = field(default=0, metadata={"key": "born_nonfinite"})
    """Elements that are NaN or Inf here although the oracle, from the same inputs, says they are finite."""
    wanted: int = 0
    """Elements beyond the type's range that became Inf, or its largest number, and change nothing that reads them."""
    unread: bool = False
    """Neither a node nor the caller reads the value: a mask of Dropout, a state that is thrown away."""
    range_loss: float = 0.0
    """Relative error of merely storing the segment's weights and result in the test's precision: large where they
    overflow or vanish; 0 where that changes nothing that is computed from them."""
    reference_excess: float = 0.0
    """The same question asked of the reference, for layers that amplify suspiciously."""
    declared: float | None = None
    """Of a layer in INT8: the error that the graph's own scales make of the same inputs."""
    deviation_from_scales: float | None = field(default=None, metadata={"key": "departs"})
    """How far the captured result is from what those scales say."""
    channel_excess: float | None = None
    """Of a layer in INT8: introduced ÷ expected in its worst channels, however small, see ``balanced``."""
    clipped: float | None = None
    """Share of the layer's input that lies beyond its scale."""
    step: float | None = None
    """That scale: the distance of two levels."""
    precision: str | None = None
    """What the test claims to be here, where that is known: its backend's precision, or a coarser one that its program
    declares for these nodes."""
    instead: str = ""
    """Of whole numbers that are not what the inputs make, nor what emulation makes of them: both, in words."""
    not_emulated: tuple[str, ...] = ()
    """Nodes of the segment that have no kernel in the claimed arithmetic: ``expected`` says nothing of them."""
    skipped: str | None = None
