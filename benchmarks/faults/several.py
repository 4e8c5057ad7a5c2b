"""Several faults at once: each is a finding, with its share of the final divergence."""

from __future__ import annotations

from faults.edits import add, scale_channel, scale_weights, store_as
from faults.seeding import Edit, edited

from cp_debug.bisect.demos import Fault

_SCALED: dict[str, Edit] = {"pts_backbone.blocks.0.7": lambda editor, value: scale_weights(editor, value, 0.02)}
_CHANNEL: dict[str, Edit] = {"pts_neck.deblocks.1.1": lambda editor, value: scale_channel(editor, value, -0.5)}
_HALF: dict[str, Edit] = {"pts_backbone.blocks.2.5": lambda editor, value: store_as(editor, value, "bf16")}
_OFFSET: dict[str, Edit] = {"pts_bbox_head.task_heads.1.reg.1": lambda editor, value: add(editor, value, 0.05)}

SEVERAL = (
    Fault("two-faults", "a wrong weight scale, and one wrong channel further on", "fixing one does not fix it",
          lambda: edited("blocks.0.6 × 1.02; channel 0 of deblocks.1.0 × 0.5", _SCALED | _CHANNEL)),
    Fault("three-faults", "a weight scale, a BF16 tensor and an offset in a head", "fixing two does not fix it",
          lambda: edited("blocks.0.6 × 1.02; blocks.2.5 stored in BF16; 0.05 added to task 1's reg",
                         _SCALED | _HALF | _OFFSET)),
)  # fmt: skip
