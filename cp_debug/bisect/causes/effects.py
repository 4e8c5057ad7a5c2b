"""Effects of the layers of a finding on the final divergence and on the detections."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np

from cp_debug.bisect.finding import Effect
from cp_debug.bisect.result import LayerRow
from cp_debug.bisect.shares import Shares
from cp_debug.detection.changes import compare_detections
from cp_debug.errors import InputError
from cp_debug.programs.pipeline import Key
from cp_debug.programs.scene import decode
from cp_debug.recipes.abilities import DetectsBoxes
from cp_debug.recipes.base import Arrays, Model, Sample

TRIED = 4
"""Layers that are carried to the end by themselves, of those with the largest shares and of those that spread most."""


@dataclass
class Effects:
    """Computes the effect of layers by themselves, whose rows have their shares."""

    model: Model
    sample: Sample
    shares: Shares
    results: Mapping[str, Arrays]
    """The reference's outputs, by component."""

    def costliest(self, rows: Mapping[Key, LayerRow]) -> dict[Key, float]:
        """Layers → relative L2 that the outputs are off by a layer's introduced error alone, the largest first.

        Errors cancel, and many together saturate what one of them would not: a share says what became of a layer here,
        this what it costs. Tried are those with the largest shares and spreads.
        """
        measures = ({key: abs(row.share or 0.0) for key, row in rows.items()}, self.shares.spreads)
        first = [key for sizes in measures for key in sorted(rows, key=lambda key: -sizes.get(key, 0.0))[:TRIED]]
        found: dict[Key, float] = {}
        for key in dict.fromkeys(first):
            with suppress(InputError):
                found[key] = self.shares.alone(key, self.results)
        return dict(sorted(found.items(), key=lambda item: -item[1]))

    def of(self, rows: Sequence[LayerRow]) -> Effect:
        """The effect of the layers of ``rows`` together.

        Their shares add up; so, to first order, do the changes of the outputs that are decoded.
        """
        shares = [row.share for row in rows if row.share is not None]
        effect = Effect(sum(shares) if shares else None)
        detected: Any = decode(self.model, self.sample, self.results)
        shared = [row for row in rows if row.share is not None]
        if not isinstance(detected, DetectsBoxes) or len(shared) < len(rows):
            return effect
        last = self.model.components[-1].name
        outputs: dict[str, np.ndarray] = {n: v.astype(np.float32) for n, v in self.results[last].items()}
        for row in shared:
            try:
                changed = self.shares.change(Key(row.component, row.onnx))
            except InputError:
                return effect
            outputs = {n: v + changed[n].astype(np.float32) for n, v in outputs.items()}
        decoded = decode(self.model, self.sample, {**self.results, last: outputs})
        if decoded is not None:
            effect.detections = compare_detections(detected, decoded)
        return effect
