"""Detections and ground truth in the records of a log: plain lists of numbers, and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import numpy as np

from cp_debug.detection.changes import Detected
from cp_debug.programs.scene import DecodedBoxes
from cp_debug.recipes.data.base import Truth

BOX = ("x", "y", "z", "length", "width", "height", "yaw", "vx", "vy")
"""Columns of a detection; metres, radians, m/s; z of the bottom centre."""
_DETECTED = ("boxes", "scores", "labels")


def pack_detections(detected: Detected) -> dict[str, Any]:
    """Detections of one sample as lists: boxes [N, 9] in metres, radians and m/s; scores and labels [N]."""
    return {name: np.asarray(getattr(detected, name)).tolist() for name in _DETECTED}


def detections_from(plain: Mapping[str, Any]) -> DecodedBoxes:
    """Detections from the lists of a record: boxes [N, 9] float32 in metres, scores [N] float32, labels [N] int64."""
    boxes = np.array(plain["boxes"], dtype=np.float32).reshape(-1, len(BOX))
    return DecodedBoxes(boxes, np.array(plain["scores"], dtype=np.float32), np.array(plain["labels"], dtype=np.int64))


def pack_truth(truth: Truth) -> dict[str, Any]:
    """Objects of one sample as lists, by the fields of ``Truth``, in its units."""
    return {field.name: getattr(truth, field.name).tolist() for field in fields(Truth)}


def truth_from(plain: Mapping[str, Any]) -> Truth:
    """Objects of one sample, in the units and dtypes of ``Truth``; "NaN" for unknown velocities becomes NaN again."""
    return Truth(
        boxes=np.array(plain["boxes"], dtype=np.float32).reshape(-1, 7),
        labels=np.array(plain["labels"], dtype=np.int64),
        velocities=np.array(plain["velocities"], dtype=object).reshape(-1, 2).astype(np.float32),
        num_points=np.array(plain["num_points"], dtype=np.int64),
        attributes=np.array(plain["attributes"], dtype=np.str_),
    )
