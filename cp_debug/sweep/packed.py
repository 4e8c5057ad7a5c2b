"""Scenes in the records of a log, what is detected in them and what is there: plain lists of numbers, and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from cp_debug.detection.evaluate import Detector
from cp_debug.detection.evaluation import EvaluationOptions
from cp_debug.programs.scene import DecodedBoxes
from cp_debug.recipes.abilities import DetectsBoxes, Remarks
from cp_debug.recipes.base import Sample
from cp_debug.recipes.data.base import Truth

BOX = ("x", "y", "z", "length", "width", "height", "yaw", "vx", "vy")
"""Columns of a detection; metres, radians, m/s; z of the bottom centre."""
_DETECTED = ("boxes", "scores", "labels")


def pack_detections(detected: DetectsBoxes) -> dict[str, Any]:
    """Detections of one sample as lists: boxes [N, 9] in metres, radians and m/s; scores and labels [N]."""
    return {name: np.asarray(getattr(detected, name)).tolist() for name in _DETECTED}


def detections_from(plain: Mapping[str, Any]) -> DecodedBoxes:
    """Detections from the lists of a record: boxes [N, 9] float32 in metres, scores [N] float32, labels [N] int64."""
    boxes = np.array(plain["boxes"], dtype=np.float32).reshape(-1, len(BOX))
    return DecodedBoxes(boxes, np.array(plain["scores"], dtype=np.float32), np.array(plain["labels"], dtype=np.int64))


def pack_scene(model: Detector, sample: Sample, detected: DetectsBoxes) -> dict[str, Any]:
    """One sample with what is detected in it as lists, by the fields of ``Truth`` in its units where it has any."""
    remarks, truth = Remarks(model), sample.truth
    remarks.see(sample)
    return {
        "sample": sample.source,
        "classes": list(model.class_names),
        "region": list(model.region),
        "remarks": remarks.sentences,
        "detected": pack_detections(detected),
        "truth": None
        if truth is None
        else {field.name: getattr(truth, field.name).tolist() for field in fields(Truth)},
    }


@dataclass(frozen=True)
class LoggedScenes:
    """What records tell of one model's samples."""

    names: list[str]
    classes: list[str]
    options: EvaluationOptions
    """Those of the sweep, in the model's region."""
    notes: list[str]
    detected: list[DecodedBoxes]
    truths: list[Truth]
    """None but where every sample has some."""

    @classmethod
    def of(cls, results: Sequence[Mapping[str, Any]], options: EvaluationOptions) -> LoggedScenes:
        """The scenes of ``pack_scene``, by sample; velocities that are unknown, "NaN" there, are NaN again."""
        remarks, first = Remarks(), results[0]
        for result in results:
            remarks.add(result["remarks"])
        known = all(result["truth"] is not None for result in results)
        return cls(
            [result["sample"] for result in results],
            first["classes"],
            replace(options, region=tuple(first["region"])),
            remarks.sentences,
            [detections_from(result["detected"]) for result in results],
            [_truth_from(result["truth"]) for result in results] if known else [],
        )


def _truth_from(plain: Mapping[str, Any]) -> Truth:
    return Truth(
        boxes=np.array(plain["boxes"], dtype=np.float32).reshape(-1, 7),
        labels=np.array(plain["labels"], dtype=np.int64),
        velocities=np.array(plain["velocities"], dtype=object).reshape(-1, 2).astype(np.float32),
        num_points=np.array(plain["num_points"], dtype=np.int64),
        attributes=np.array(plain["attributes"], dtype=np.str_),
    )
