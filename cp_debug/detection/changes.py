"""Changes of detections when another backend computed them: box by box, and in a few figures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from cp_debug.detection.boxes import Objects
from cp_debug.detection.metrics import match_centers
from cp_debug.recipes.abilities import DetectsBoxes

MATCHING = 2.0
"""Metres within which two boxes of one class are the same object: the middle one of nuScenes' distances."""
MOVED = 0.1
"""Metres from which a box counts as moved."""
RESCORED = 0.05
"""Change of score from which a box counts as moved."""

KEPT, MOVED_BOX, LOST, GAINED = "kept", "moved", "lost", "gained"


@dataclass(frozen=True)
class BoxChange:
    """One object; ``reference`` and ``test`` are indices of its boxes, None on the side that lacks it."""

    kind: str
    reference: int | None
    test: int | None
    distance: float = 0.0
    """Metres between the two centres."""
    score: float = 0.0
    """Score of the test minus that of the reference; an absent box has score 0."""

    @property
    def severity(self) -> tuple[bool, float]:
        """Sort key, larger is worse: appeared or vanished before moved, then the change of score or place."""
        return self.kind in (LOST, GAINED), max(abs(self.score), self.distance)


def changes(reference: DetectsBoxes, test: DetectsBoxes) -> list[BoxChange]:
    """Every object of either side once. Boxes match within their class, those of high score first.

    Distances in metres, angles in radians.
    """
    first, second = (Objects(s.boxes[:, :2], s.labels, s.labels, s.scores) for s in (reference, test))
    matched = match_centers(second, first, [MATCHING])[0]
    listed = []
    for index, twin in enumerate(matched):
        score = float(test.scores[index])
        if twin < 0:
            listed.append(BoxChange(GAINED, None, index, score=score))
            continue
        distance = float(np.linalg.norm(test.boxes[index, :2] - reference.boxes[twin, :2]))
        score -= float(reference.scores[twin])
        kind = MOVED_BOX if distance >= MOVED or abs(score) >= RESCORED else KEPT
        listed.append(BoxChange(kind, int(twin), index, distance, score))
    lost = np.setdiff1d(np.arange(len(reference.scores)), matched)
    return listed + [BoxChange(LOST, int(i), None, score=-float(reference.scores[i])) for i in lost]


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
    if found := box_changes(listed, reference, test):
        apart = np.array([*found.values()])
        summary.mean_score = float(apart[:, 3].mean())
        summary.max_center, summary.max_size, summary.max_yaw, summary.max_score = np.abs(apart).max(axis=0).tolist()
    return summary


BoxChanges = dict[int, tuple[float, float, float, float]]
"""Index of a box of the reference → metres between the centres, largest difference of a size in metres, that of the yaw
in radians, and the score of the test minus that of the reference."""


def box_changes(listed: Iterable[BoxChange], reference: DetectsBoxes, test: DetectsBoxes) -> BoxChanges:
    """Changes of the ``listed`` boxes that are on both sides. Boxes [N, 7 or more]: x, y, z, three sizes, yaw."""
    found: BoxChanges = {}
    for each in listed:
        if each.reference is not None and each.test is not None:
            gap = test.boxes[each.test].astype(np.float64) - reference.boxes[each.reference]
            yaw = abs((gap[6] + np.pi) % (2 * np.pi) - np.pi)
            found[each.reference] = float(np.linalg.norm(gap[:3])), float(np.abs(gap[3:6]).max()), yaw, each.score
    return found
