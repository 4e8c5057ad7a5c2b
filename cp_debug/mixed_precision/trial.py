"""A trial: a model with some layers kept in higher precision, and the figures measured with it.

Layers are groups of ONNX nodes in a search (``graph_runners``), and the calibrated layers in a sensitivity profile
(``layer_runner``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from cp_debug.detection.bootstrap import ConfidenceInterval
from cp_debug.mixed_precision.fusion_groups import Kept
from cp_debug.serialize import JsonForm


@dataclass(frozen=True)
class Measured:
    """Figures of one set of kept layers, against the reference."""

    figures: dict[str, float] = field(default_factory=dict)
    """``rel_l2`` of the worst output; on graphs also ``max_abs`` and figures of detections that the goal asks for."""
    outputs: dict[str, float] = field(default_factory=dict)
    """Final output → relative L2 distance, infinite where it is not finite: on graphs of the worst sample, under fake
    quantizers over all samples."""
    draws: Mapping[str, np.ndarray] = field(default_factory=dict, compare=False, metadata={"omit": True})
    """mAP and NDS in each draw of the samples [1 + draws], where the runner scores them."""

    @property
    def error(self) -> float:
        """Root mean square over the outputs, so that each counts alike whatever its unit."""
        return math.sqrt(sum(value**2 for value in self.outputs.values()) / len(self.outputs))

    def change(self, name: str, before: Measured) -> ConfidenceInterval:
        """Rise of a score over ``before``, drawn on the same samples."""
        return ConfidenceInterval.of(self.draws[name] - before.draws[name])


@dataclass(frozen=True)
class Trial(JsonForm):
    """One set of kept layers and its figures."""

    nodes: frozenset[tuple[str, str]] = field(metadata={"key": "kept"})
    """(Component, node) of everything that was kept."""
    layers: int
    emulated: bool
    """Whether it ran on the emulator in place of the backend."""
    measured: Measured = field(metadata={"inline": True})
    seconds: float
    latency: float | None = None
    """Duration of a pass on the device in seconds, where the backend tells."""
    error: str = ""
    """Reason why it could not be built; then nothing was measured."""


def nodes_in(kept_groups: Kept) -> frozenset[tuple[str, str]]:
    """(Component, node) of a set of layers: its name in the log, however layers are grouped."""
    return frozenset((group.component, node) for group in kept_groups for node in group.nodes)
