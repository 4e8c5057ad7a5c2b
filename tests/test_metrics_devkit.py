"""Every figure of the nuScenes metrics against the nuScenes devkit itself, where it is installed."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
from extras import needs

from cp_debug.detection.boxes import Boxes
from cp_debug.detection.metrics import ERRORS, THRESHOLDS, score
from cp_debug.recipes.data.base import NAMES

pytestmark = needs("nuscenes")

CLASSES = (
    "car", "truck", "bus", "trailer", "construction_vehicle",
    "pedestrian", "motorcycle", "bicycle", "traffic_cone", "barrier",
)  # fmt: skip
SAMPLES = 12


def random_boxes(rng: np.random.Generator, count: int, classes: int) -> Boxes:
    """Crowded enough that matches are contested, with unknown velocities and attributes, and equal scores."""
    velocities = rng.normal(0, 3, (count, 2))
    velocities[rng.random(count) < 0.1] = np.nan
    return Boxes(
        centers=rng.uniform(-12, 12, (count, 2)),
        samples=rng.integers(0, SAMPLES, count),
        labels=rng.integers(0, classes, count),
        scores=rng.integers(1, 60, count) / 60,
        heights=rng.normal(0, 1, count),
        sizes=rng.uniform(0.4, 6, (count, 3)),
        yaws=rng.uniform(-7, 7, count),
        velocities=velocities,
        attributes=np.array(NAMES)[rng.integers(0, len(NAMES), count)],
    )


def jittered(rng: np.random.Generator, truth: Boxes, count: int) -> Boxes:
    """Predictions near objects that were drawn with repetition, some of another class."""
    chosen = truth.take(rng.integers(0, len(truth), count))
    others = random_boxes(rng, count, 10)
    return Boxes(
        centers=chosen.centers + rng.normal(0, 1.2, (count, 2)),
        samples=chosen.samples,
        labels=np.where(rng.random(count) < 0.85, chosen.labels, others.labels),
        scores=others.scores,
        heights=chosen.heights,
        sizes=chosen.sizes * rng.uniform(0.7, 1.3, (count, 3)),
        yaws=chosen.yaws + rng.normal(0, 0.5, count),
        velocities=chosen.velocities + rng.normal(0, 1, (count, 2)),
        attributes=np.where(rng.random(count) < 0.7, chosen.attributes, others.attributes),
    )


def in_devkit(boxes: Boxes):
    from nuscenes.eval.common.data_classes import EvalBoxes
    from nuscenes.eval.detection.data_classes import DetectionBox

    found = EvalBoxes()
    for sample in range(SAMPLES):
        found.add_boxes(str(sample), [])
    for i in range(len(boxes)):
        length, width, height = boxes.sizes[i]
        name = CLASSES[boxes.labels[i]]
        box = DetectionBox(
            sample_token=str(boxes.samples[i]),
            translation=(*boxes.centers[i], boxes.heights[i]),
            size=(width, length, height),
            rotation=(math.cos(boxes.yaws[i] / 2), 0, 0, math.sin(boxes.yaws[i] / 2)),
            velocity=tuple(boxes.velocities[i]),
            num_pts=1,
            detection_name=name,
            detection_score=float(boxes.scores[i]),
            attribute_name=str(boxes.attributes[i]),
        )
        found.add_boxes(box.sample_token, [box])
    return found


def by_devkit(predicted: Boxes, truth: Boxes):
    from nuscenes.eval.common.config import config_factory
    from nuscenes.eval.detection.algo import accumulate, calc_ap, calc_tp
    from nuscenes.eval.detection.constants import TP_METRICS
    from nuscenes.eval.detection.data_classes import DetectionMetrics

    config = config_factory("detection_cvpr_2019")
    metrics = DetectionMetrics(config)
    ours, theirs = in_devkit(predicted), in_devkit(truth)
    for name in CLASSES:
        data = {th: accumulate(theirs, ours, name, config.dist_fcn_callable, th) for th in config.dist_ths}
        for threshold, curve in data.items():
            metrics.add_label_ap(name, threshold, calc_ap(curve, config.min_recall, config.min_precision))
        for kind in TP_METRICS:
            undefined = {"traffic_cone": ("attr_err", "vel_err", "orient_err"), "barrier": ("attr_err", "vel_err")}
            if kind in undefined.get(name, ()):
                metrics.add_label_tp(name, kind, np.nan)
            else:
                metrics.add_label_tp(name, kind, calc_tp(data[config.dist_th_tp], config.min_recall, kind))
    return metrics


def assert_equal(predicted: Boxes, truth: Boxes) -> None:
    """With the predictions sample by sample, which is how the devkit breaks ties."""
    predicted = predicted.take(np.argsort(predicted.samples, kind="stable"))
    ours, theirs = score(predicted, truth, CLASSES, np.ones((1, SAMPLES))), by_devkit(predicted, truth)
    kinds: Sequence[str] = ("trans_err", "scale_err", "orient_err", "vel_err", "attr_err")
    for label, name in enumerate(CLASSES):
        expected = [theirs.get_label_ap(name, threshold) for threshold in THRESHOLDS]
        np.testing.assert_allclose(ours.precisions[0, label], expected, rtol=0, atol=1e-9)
        expected = [theirs.get_label_tp(name, kind) for kind in kinds]
        np.testing.assert_allclose(ours.errors[0, label], expected, rtol=0, atol=1e-9)
    summary = {name: float(value[0]) for name, value in ours.summary().items()}
    assert summary["mAP"] == pytest.approx(theirs.mean_ap, abs=1e-9)
    assert summary["NDS"] == pytest.approx(theirs.nd_score, abs=1e-9)
    for name, kind in zip(ERRORS, kinds, strict=True):
        assert summary[f"m{name}"] == pytest.approx(theirs.tp_errors[kind], abs=1e-9)


@pytest.mark.few(2)
@pytest.mark.parametrize("seed", range(6))
def test_equal_to_the_devkit(seed: int) -> None:
    rng = np.random.default_rng(seed)
    truth = random_boxes(rng, 400, 10 if seed % 2 else 7)  # with 7, three classes have no object
    assert_equal(jittered(rng, truth, 500), truth)


def test_equal_to_the_devkit_where_little_is_found() -> None:
    rng = np.random.default_rng(11)
    truth = random_boxes(rng, 300, 10)
    assert_equal(random_boxes(rng, 60, 10), truth)
    assert_equal(truth.take(np.zeros(0, dtype=int)), truth)
    assert_equal(truth, truth.take(np.zeros(0, dtype=int)))
    assert_equal(truth, truth)
