"""Faults of range: numbers that are none, and peaks that a quantizer cuts off."""

from __future__ import annotations

from faults.edits import quantize, zero_times_infinity
from faults.seeding import edited

from cp_debug.bisect.demos import Fault

RANGES = (
    Fault("zero-times-infinity", "a scale overflowed to Inf: 0·Inf is NaN", "NaN in every output",
          lambda: edited("pts_neck.deblocks.1.2 × Inf", {"pts_neck.deblocks.1.2": zero_times_infinity})),
    Fault("int8-clipped", "an INT8 scale four times too small cuts the peaks off", "confident objects lose their score",
          lambda: edited("INT8 quantizer saturating at 4.0 behind pts_neck.deblocks.0.2",
                         {"pts_neck.deblocks.0.2": lambda editor, value: quantize(editor, value, 4.0)})),
)  # fmt: skip
