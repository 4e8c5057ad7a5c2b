"""Fates of detections when another backend computed them: kept, moved, lost or gained."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cp_debug.detection.boxes import Objects
from cp_debug.detection.matching import match_centers
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
