"""Two sets of detections in a few figures: boxes lost, gained and moved, and the largest differences of the rest."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np

from cp_debug.detection.changes import GAINED, LOST, MOVED_BOX, changes
from cp_debug.recipes.abilities import DetectsBoxes


@dataclass
class DetectionChange:
    """Changes from the reference's detections to the test's, in metres and radians; 0 where no box is matched."""

    reference: int = 0
    """Boxes of the reference."""
    lost: int = 0
    gained: int = 0
    moved: int = 0
    """Matched boxes whose place or score changed visibly (``changes.MOVED``, ``changes.RESCORED``)."""
    max_center: float = 0.0
    max_size: float = 0.0
    max_yaw: float = 0.0
    max_score: float = 0.0
    mean_score: float = 0.0
    """Mean change of the score over matched boxes, signed."""

    def __str__(self) -> str:
        counts = f"{self.reference} boxes: {self.lost} lost, {self.gained} gained"
        if self.lost == self.reference:
            return counts
        return (
            f"{counts}, {self.moved} moved; at most {self.max_center:.2g} m in centre, {self.max_size:.2g} m in size, "
            f"{self.max_yaw:.2g} rad in yaw, {self.max_score:.2g} in score ({self.mean_score + 0.0:+.2g} on average)"
        )

    def __add__(self, other: DetectionChange) -> DetectionChange:
        """The changes of both together: counts add up, the largest differences stay."""
        matched, other_matched = self.reference - self.lost, other.reference - other.lost
        return DetectionChange(
            self.reference + other.reference,
            self.lost + other.lost,
            self.gained + other.gained,
            self.moved + other.moved,
            max(self.max_center, other.max_center),
            max(self.max_size, other.max_size),
            max(self.max_yaw, other.max_yaw),
            max(self.max_score, other.max_score),
            (self.mean_score * matched + other.mean_score * other_matched) / max(matched + other_matched, 1),
        )


def compare_detections(reference: DetectsBoxes, test: DetectsBoxes) -> DetectionChange:
    """Match two sets of detections and sum up their differences.

    ``boxes`` [N, 7 or more] are x, y, z, length, width, height in metres, yaw in radians.
    """
    listed = changes(reference, test)
    kinds = Counter(change.kind for change in listed)
    summary = DetectionChange(len(reference.scores), kinds[LOST], kinds[GAINED], kinds[MOVED_BOX])
    pairs = [(c.reference, c.test) for c in listed if c.reference is not None and c.test is not None]
    if pairs:
        ours, theirs = (np.array(side) for side in zip(*pairs, strict=True))
        gap = test.boxes[theirs].astype(np.float64) - reference.boxes[ours]
        scores = test.scores[theirs].astype(np.float64) - reference.scores[ours]
        summary.max_center = float(np.linalg.norm(gap[:, :3], axis=1).max())
        summary.max_size = float(np.abs(gap[:, 3:6]).max())
        summary.max_yaw = float(np.abs((gap[:, 6] + np.pi) % (2 * np.pi) - np.pi).max())
        summary.max_score, summary.mean_score = float(np.abs(scores).max()), float(scores.mean())
    return summary
