"""T4's metric in bootstrap draws: what ``perception_eval`` matched, counted as often as its frame was drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cp_debug.detection.boxes import Floats

FRAME_TIME = 100_000
"""Time between frames in µs, by which a detection tells its frame."""
RECALLS = np.linspace(0.0, 1.0, 101)
LEAST_RECALL, LEAST_PRECISION = 0.1, 0.1
BLOCK = 1 << 20
"""Numbers of draws × detections that are computed at once."""
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
    if not len(results):
        return np.where(objects == 0, np.nan, 0.0)
    most = max(1, BLOCK // len(results))
    blocks = [slice(start, start + most) for start in range(0, len(weights), most)]
    return np.concatenate(
        [_of_draws(gain, miss, weights[block][:, frames], objects[block]) for block in blocks]
    )  # fmt: skip


def _of_draws(gain: Floats, miss: Floats, counts: Floats, objects: Floats) -> Floats:
    """Average precision [draws] of detections [N] by falling confidence: what each gains, and whether it is false.

    ``counts`` [draws, N] is how often each detection was drawn; NaN where neither a detection nor an object was.
    """
    gained, missed = np.cumsum(counts * gain, axis=1), np.cumsum(counts * miss, axis=1)
    precision = np.divide(gained, gained + missed, out=np.zeros_like(gained), where=gained + missed > 0)
    recall = gained / np.where(objects > 0, objects, np.inf)[:, None]
    envelope = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    needed = RECALLS[round(100 * LEAST_RECALL) + 1 :]
    pairs = zip(recall, envelope, strict=True)
    at_recalls = np.array([np.interp(needed, of_draw, best, right=0) for of_draw, best in pairs])
    means = np.clip(at_recalls - LEAST_PRECISION, 0, None).mean(axis=1) / (1 - LEAST_PRECISION)
    return np.where(counts.any(axis=1), means, np.where(objects == 0, np.nan, 0.0))
