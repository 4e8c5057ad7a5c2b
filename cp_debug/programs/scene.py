"""What a model's decoder made of each backend's outputs, kept beside the captures: a report then shows the detections
without the model, its weights or the input files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cp_debug.probes.capture import Capture, CaptureWriter, Header
from cp_debug.recipes.abilities import DetectsBoxes
from cp_debug.recipes.base import Arrays, Model, Sample

FOLDER = "scene"
"""Beside the captures of the backends, none of which is called so."""
_FIELDS = ("boxes", "scores", "labels")


@dataclass(frozen=True)
class DecodedBoxes:
    """The detections of one backend. boxes: [N, 7 or more] x, y, z, length, width, height, yaw; scores, labels: [N]."""

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
    """By backend spec."""

    @classmethod
    def open(cls, folder: Path) -> SavedScene | None:
        """The scene in a sample's folder; None where the model has no detections."""
        if not (folder / FOLDER).is_dir():
            return None
        kept = Capture.open(folder / FOLDER)
        specs = dict.fromkeys(e.component for e in kept.entries if e.component)
        return cls(
            source=next(iter(kept.manifest.get("samples", [])), ""),
            class_names=tuple(kept.manifest.get("class_names", ())),
            points=kept.load("points") if "points" in kept.names() else None,
            detections={s: DecodedBoxes(*(kept.load(f, component=s) for f in _FIELDS)) for s in specs},
        )

    def class_name(self, label: int) -> str:
        """The name of a label, or its number."""
        return self.class_names[label] if 0 <= label < len(self.class_names) else str(label)


def decode(model: Model, sample: Sample, results: Mapping[str, Arrays]) -> Any | None:
    """The decoder's result, or None where there is no decoder or it cannot read what a broken backend gave it."""
    try:
        return model.decode(sample, results)
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError):
        return None


def keep_scene(folder: Path, sample: Sample, decoded: Mapping[str, Any]) -> None:
    """Write points and detections (backend spec → decoded result) of a sample, if they are detections in boxes."""
    found = {spec: d for spec, d in decoded.items() if isinstance(d, DetectsBoxes)}
    if not found:
        return
    names = next(iter(getattr(d, "class_names", ()) for d in found.values()))
    header: dict[str, Any] = {**Header(samples=[sample.source]), "class_names": list(names)}
    with CaptureWriter(folder / FOLDER, header) as writer:
        if "points" in sample.arrays:
            writer.put("points", sample.arrays["points"])
        for spec, detections in found.items():
            for field in _FIELDS:
                writer.put(field, getattr(detections, field), component=spec)
