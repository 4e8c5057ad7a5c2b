"""T4's metric in bootstrap draws: what ``perception_eval`` matched, counted as often as its frame was drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cp_debug.detection.boxes import Floats

FRAME_TIME = 100_000
"""Time between frames in µs, by which a detection tells its frame."""
RECALLS = np.linspace(0.0, 1.0, 101)
LEAST_RECALL, LEAST_PRECISION = 0.1, 0.1
CLOSE = 1e-9
"""Largest difference of an average precision from the package's own at which the two are the same metric."""


def scene_draws(scene: Any, truths: Sequence[Mapping[Any, int]], weights: Floats) -> dict[str, Floats] | None:
    """Figure → its value in each draw, float64 [draws], by T4MetricV2's names without its prefixes.

    ``scene`` is the package's ``MetricsScore`` of all frames, ``truths`` has the number of objects by label for each
    frame, and ``weights`` [draws, frames] how often each frame was drawn, once in the first draw. None where the first
    draw is not what the package itself computed, in a version with another average precision.
    """
    figures: dict[str, Floats] = {}
    for by_mode in scene.mean_ap_values:
        mode = by_mode.matching_mode.value.lower().replace(" ", "_")
        means: dict[str, Floats] = {}
        for figure, by_label in (("mAP", by_mode.label_to_aps), ("mAPH", by_mode.label_to_aphs)):
            of_labels = []
            for label, scored in by_label.items():
                objects = weights @ np.array([truth.get(label, 0) for truth in truths], float)
                draws = [_average_precisions(each, objects, weights) for each in scored]
                if any(_differs(each.ap, values[0]) for each, values in zip(scored, draws, strict=True)):
                    return None
                of_labels.append(_mean(draws))
                if figure == "mAP":
                    names = (f"{label.value}_AP_{mode}_{each.matching_threshold}" for each in scored)
                    figures |= dict(zip(names, draws, strict=True))
            means[f"{figure}_{mode}"] = _mean(of_labels)
        figures |= means
    return figures


def _differs(theirs: float, ours: float) -> bool:
    return not np.isclose(theirs, ours, rtol=0, atol=CLOSE, equal_nan=True)


def _mean(values: Sequence[Floats]) -> Floats:
    """The mean [draws] of those that are defined; NaN where none is."""
    stacked = np.array(values)
    known = ~np.isnan(stacked)
    count = known.sum(axis=0)
    return np.where(count > 0, np.where(known, stacked, 0).sum(axis=0) / np.maximum(count, 1), np.nan)


def _average_precisions(scored: Any, objects: Floats, weights: Floats) -> Floats:
    """The average precision [draws] of an ``Ap`` of the package, after ``Ap._calculate_ap``: NaN without anything.

    ``objects`` [draws] is the number of objects in each draw.
    """
    results = scored.object_results
    confidences = np.array([result.estimated_object.semantic_score for result in results], float)
    order = np.argsort(confidences)[::-1]
    hit = np.array([result.ground_truth_object is not None and result.is_label_correct for result in results], bool)
    gains = [
        scored.tp_metrics.get_value(result) if is_hit else 0.0 for result, is_hit in zip(results, hit, strict=True)
    ]
    gain, miss = np.array(gains, float)[order], (~hit).astype(float)[order]
    frames = np.array([result.estimated_object.unix_time // FRAME_TIME for result in results], int)[order]
    return np.array(
        [_average_precision(gain * row[frames], miss * row[frames], row[frames].any(), count)
         for row, count in zip(weights, objects, strict=True)]
    )  # fmt: skip


def _average_precision(gain: NDArray[Any], miss: NDArray[Any], found: bool, objects: float) -> float:
    """Average precision of detections by falling confidence: what each gains, and whether it is false, with weights."""
    if not found:
        return np.nan if objects == 0 else 0.0
    gained, missed = np.cumsum(gain), np.cumsum(miss)
    precision = np.divide(gained, gained + missed, out=np.zeros_like(gained), where=gained + missed > 0)
    recall = gained / objects if objects else np.zeros_like(gained)
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    at_recalls = np.interp(RECALLS, recall, envelope, right=0)[round(100 * LEAST_RECALL) + 1 :]
    return float(np.clip(at_recalls - LEAST_PRECISION, 0, None).mean() / (1 - LEAST_PRECISION))
