"""Decoded detections of each backend, kept beside the captures.

A report then shows the detections without the model, its weights or the input files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cp_debug.probes.capture import Capture, CaptureWriter, Header
from cp_debug.recipes.abilities import DetectsBoxes, HasClasses
from cp_debug.recipes.base import Arrays, Model, Sample

FOLDER = "scene"
"""Folder beside the captures of the backends, none of which has this name."""
_FIELDS = ("boxes", "scores", "labels")


@dataclass(frozen=True)
class DecodedBoxes:
    """Detections of one backend.

    boxes: [N, 7 or more] x, y, z, length, width, height in metres, yaw in radians. scores, labels: [N].
    """

    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True)
class SavedScene:
    """One sample as people see it."""

    source: str
    class_names: tuple[str, ...]
    points: np.ndarray | None
    """[N, 2 or more]: x, y, … in metres."""
    detections: Mapping[str, DecodedBoxes]
    """Backend spec → detections."""

    @classmethod
    def open(cls, folder: Path) -> SavedScene | None:
        """The scene in a sample's folder; None where the model has no detections.

        Raises InputError for a broken one.
        """
        if not (folder / FOLDER).is_dir():
            return None
        capture = Capture.open(folder / FOLDER)
        specs = dict.fromkeys(e.component for e in capture.entries if e.component)
        return cls(
            source=next(iter(capture.manifest.get("samples", [])), ""),
            class_names=tuple(capture.manifest.get("class_names", ())),
            points=capture.load("points") if "points" in capture.names() else None,
            detections={s: DecodedBoxes(*(capture.load(f, component=s) for f in _FIELDS)) for s in specs},
        )

    def class_name(self, label: int) -> str:
        """The name of a label, or its number."""
        return self.class_names[label] if 0 <= label < len(self.class_names) else str(label)


def decode(model: Model, sample: Sample, results: Mapping[str, Arrays]) -> Any | None:
    """The decoder's result, or None where there is no decoder or it cannot read what a broken backend gave it.

    ``results``: component → output name → array in the dtype that the graph declares.
    """
    try:
        return model.decode(sample, results)
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError):
        return None


def keep_scene(folder: Path, sample: Sample, decoded: Mapping[str, Any]) -> None:
    """Write points and detections (backend spec → decoded result) of a sample, if they are detections in boxes."""
    boxes_by_backend = {spec: d for spec, d in decoded.items() if isinstance(d, DetectsBoxes)}
    if not boxes_by_backend:
        return
    names = next(iter(d.class_names if isinstance(d, HasClasses) else () for d in boxes_by_backend.values()))
    header: dict[str, Any] = {**Header(samples=[sample.source]), "class_names": list(names)}
    with CaptureWriter(folder / FOLDER, header) as writer:
        if "points" in sample.arrays:
            writer.put("points", sample.arrays["points"])
        for spec, detections in boxes_by_backend.items():
            for field in _FIELDS:
                writer.put(field, getattr(detections, field), component=spec)
