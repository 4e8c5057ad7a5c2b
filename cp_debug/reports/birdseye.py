"""Detections of two backends over the points, seen from above, and what changed between them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cp_debug.detection.changes import GAINED, KEPT, LOST, MOVED_BOX, BoxChange, changes
from cp_debug.programs.scene import DecodedBoxes, SavedScene
from cp_debug.reports.svg import Canvas, Scale, opacity_png

SIZE, PIXELS = 720, 420
LEFT, BOTTOM = 58, 46
GREY = (120, 128, 140)


@dataclass(frozen=True)
class SceneView:
    """One test backend on one sample."""

    source: str
    counts: dict[str, int]
    """Objects kept, moved, lost and gained."""
    changed: list[tuple[BoxChange, str]]
    """(change, class name), the worst first, kept ones left out."""
    canvas: Canvas


def birdseye(scene: SavedScene, reference: str, test: str) -> SceneView | None:
    """The view of ``test`` against ``reference``, both backend specs; None when one of them kept no detections."""
    if reference not in scene.detections or test not in scene.detections:
        return None
    reference_boxes, test_boxes = scene.detections[reference], scene.detections[test]
    all_changes = changes(reference_boxes, test_boxes)
    changed = sorted((c for c in all_changes if c.kind != KEPT), key=lambda c: c.severity, reverse=True)
    return SceneView(
        source=scene.source,
        counts={kind: sum(c.kind == kind for c in all_changes) for kind in (KEPT, MOVED_BOX, LOST, GAINED)},
        changed=[(c, _class(scene, (reference_boxes, c.reference), (test_boxes, c.test))) for c in changed],
        canvas=_draw(scene, reference_boxes, test_boxes, all_changes),
    )


def _class(scene: SavedScene, *sides: tuple[DecodedBoxes, int | None]) -> str:
    return next(scene.class_name(int(boxes.labels[index])) for boxes, index in sides if index is not None)


def _draw(
    scene: SavedScene, reference_boxes: DecodedBoxes, test_boxes: DecodedBoxes, all_changes: list[BoxChange]
) -> Canvas:
    middle, reach = _extent(scene.points, reference_boxes, test_boxes)
    x = Scale(middle[0] - reach, middle[0] + reach, LEFT, SIZE)
    y = Scale(middle[1] - reach, middle[1] + reach, SIZE - BOTTOM, SIZE - BOTTOM - (SIZE - LEFT))
    canvas = Canvas(
        SIZE + 8, SIZE, f"{len(reference_boxes.scores)} and {len(test_boxes.scores)} boxes over the points", "birdseye"
    )
    if scene.points is not None:
        canvas.image(_density(scene.points, x, y), x.start, y.end, x.end - x.start, y.start - y.end)
    canvas.axes(x, y, "x, metres", "y, metres")
    for change in all_changes:
        if change.reference is not None:
            kind = {KEPT: "kept", MOVED_BOX: "before"}.get(change.kind, change.kind)
            _box(canvas, x, y, scene, reference_boxes, change.reference, kind)
        if change.test is not None and change.kind != KEPT:
            _box(canvas, x, y, scene, test_boxes, change.test, change.kind)
    return canvas


def _box(canvas: Canvas, x: Scale, y: Scale, scene: SavedScene, side: DecodedBoxes, index: int, kind: str) -> None:
    """The outline of a box and a line to its front; a title for whoever points at it."""
    centre_x, centre_y, _, length, width, _, yaw = side.boxes[index, :7].astype(float)
    if not np.isfinite((centre_x, centre_y, length, width, yaw)).all():
        return
    ahead, aside = (np.cos(yaw), np.sin(yaw)), (-np.sin(yaw), np.cos(yaw))
    corners = [
        (centre_x + a * length / 2 * ahead[0] + b * width / 2 * aside[0],
         centre_y + a * length / 2 * ahead[1] + b * width / 2 * aside[1])
        for a, b in ((1, 1), (1, -1), (-1, -1), (-1, 1))
    ]  # fmt: skip
    front = (centre_x + length / 2 * ahead[0], centre_y + length / 2 * ahead[1])
    outline = [(x(px), y(py)) for px, py in corners]
    route = "M" + "L".join(f"{px:g} {py:g}" for px, py in outline) + "Z"
    route += f"M{x(centre_x):g} {y(centre_y):g}L{x(front[0]):g} {y(front[1]):g}"
    title = f"{kind}: {scene.class_name(int(side.labels[index]))}, score {side.scores[index]:.3f}"
    canvas.add('<path d="{}" class="box {}"><title>{}</title></path>', route, kind, title)


def _extent(points: np.ndarray | None, *sides: DecodedBoxes) -> tuple[np.ndarray, float]:
    """Centre and half width, metres, of a square around all boxes and all but the most remote points."""
    places = np.concatenate([side.boxes[:, :2] for side in sides])
    if points is not None and len(points):
        places = np.concatenate((places, np.percentile(points[:, :2], (0.2, 99.8), axis=0)))
    places = places[np.isfinite(places).all(axis=1)]
    if not len(places):
        return np.zeros(2), 10.0
    low, high = places.min(axis=0), places.max(axis=0)
    return (low + high) / 2, float((high - low).max()) / 2 + 3


def _density(points: np.ndarray, x: Scale, y: Scale) -> str:
    """Number of points in each pixel as a data URI; row 0 is the top."""
    limits = ((y.low, y.high), (x.low, x.high))
    counts = np.histogram2d(points[:, 1], points[:, 0], PIXELS, limits)[0][::-1]
    return opacity_png(np.minimum(np.sqrt(counts) / 3, 1) * 0.9, GREY)
