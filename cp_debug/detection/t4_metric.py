"""T4's metric, which AWML reports: mAP and mAPH by TIER IV's ``perception_eval``, where that is installed.

In bootstrap draws what it matched counts as often as its frame was drawn.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from cp_debug.detection.boxes import Floats, Predictions
from cp_debug.detection.metrics import MIN_PRECISION, RECALLS
from cp_debug.display import OnStep
from cp_debug.errors import InputError, MissingPackage
from cp_debug.recipes.data.base import Truth

SOURCE = "git+https://github.com/tier4/autoware_perception_evaluation@v1.3.6"
THRESHOLDS = {"center_distance_bev_thresholds": [0.5, 1.0, 2.0, 4.0], "plane_distance_thresholds": [2.0, 4.0]}
"""Metres within which a detection finds an object, as AWML's configurations have them."""
PASS_FAIL = 2.0
"""Metres of plane distance for the verdict on single frames, which ``perception_eval`` makes besides."""
FRAME = "base_link"


def check_installed() -> None:
    """Raise MissingPackage, with the command that installs it, where ``perception_eval`` cannot be imported."""
    try:
        import perception_eval.manager  # noqa: F401
    except ImportError as error:
        here = "" if error.name == "perception_eval" else f", which cannot be imported here ({error})"
        raise MissingPackage(
            f"--t4: T4's metric needs the package perception_eval{here}: pip install '{SOURCE}' (it is not on an "
            "index; Python 3.10 to 3.12, numpy 1 and pandas 2: `pip install '.[t4]'` installs matching versions)"
        ) from None


def t4_figures(
    predictions: Mapping[str, Predictions],
    truths: Sequence[Truth],
    class_names: Sequence[str],
    *,
    distance: float,
    min_points: int,
    weights: Floats,
    on_step: OnStep = lambda text, done, total: None,
) -> tuple[dict[str, dict[str, Floats]], list[str]]:
    """Spec → figure → its value in each draw, with the names of AWML's T4MetricV2, such as ``mAP_center_distance_bev``;
    and notes.

    Objects and detections within ``distance`` m of the sensor, seen from above, count, objects from ``min_points``
    points on. Detections with NaN or Inf are left out, as T4MetricV2 leaves them out; an unknown velocity is 0. A
    figure is NaN where a class has neither objects nor detections. ``weights`` [draws, samples] says how often each
    sample was drawn, once in the first draw, which is the package's own; it is the only one where the package computes
    average precision in another way than this module. ``on_step`` is told every frame.

    Raises MissingPackage without ``perception_eval``, InputError where it knows none of the classes.
    """
    check_installed()
    from perception_eval import __version__ as version

    labels = _Labels(class_names)
    figures, total = {}, len(predictions) * len(truths)
    for number, (spec, predicted) in enumerate(predictions.items()):
        begin = partial(_told, on_step, f"T4's metric, {spec}", number * len(truths), total)
        figures[spec] = _scores(predicted, truths, labels, distance, min_points, weights, begin)
    notes = [
        f"T4's metric: perception_eval {version}, objects and detections within {distance:g} m, "
        f"classes {', '.join(labels.targets)}"
    ]
    if any(len(draws) < len(weights) for of_spec in figures.values() for draws in of_spec.values()):
        notes.append(f"T4's metric has no intervals: perception_eval {version} averages precision in another way")
    if labels.unknown:
        notes.append(f"T4's metric leaves out {', '.join(labels.unknown)}: perception_eval has no such label")
    return figures, notes


def _told(on_step: OnStep, text: str, before: int, total: int, frame: int) -> None:
    on_step(text, before + frame, total)


class _Labels:
    """Classes as ``perception_eval`` names them: several of ours may be one of its labels."""

    def __init__(self, class_names: Sequence[str]) -> None:
        from perception_eval.common.evaluation_task import EvaluationTask
        from perception_eval.common.label import AutowareLabel, Label, LabelConverter

        converter = LabelConverter(EvaluationTask.DETECTION, False, "autoware")
        known = {info.name for info in converter.label_infos}
        self.unknown = [name for name in class_names if name.lower() not in known]
        self.of_class: list[Any] = [
            Label(converter.convert_name_without_count(name), name) if name.lower() in known else None
            for name in class_names
        ]
        named = {label.label: label.name for label in reversed(self.of_class) if label is not None}
        self.targets = [name for name in class_names if name in named.values()]
        """The first of the classes that share a label."""
        if not self.targets or any(label is AutowareLabel.FP for label in named):
            raise InputError(f"--t4: T4's metric has no labels for the classes {', '.join(class_names)}")


def _scores(
    predicted: Predictions,
    truths: Sequence[Truth],
    labels: _Labels,
    distance: float,
    min_points: int,
    weights: Floats,
    begin: Callable[[int], None],
) -> dict[str, Floats]:
    """Figure → its value in each draw; ``begin`` is told the number of each frame."""
    from perception_eval.common.dataset import FrameGroundTruth
    from perception_eval.config import PerceptionEvaluationConfig
    from perception_eval.evaluation.result.perception_frame_config import (
        CriticalObjectFilterConfig,
        PerceptionPassFailConfig,
    )
    from perception_eval.manager import PerceptionEvaluationManager

    names = labels.targets
    with tempfile.TemporaryDirectory(prefix="cpdebug-") as folder:
        config = PerceptionEvaluationConfig(
            dataset_paths=[],
            frame_id=FRAME,
            result_root_directory=folder,  # it makes folders for logs and pictures there
            evaluation_config_dict={
                "evaluation_task": "detection",
                "target_labels": names,
                "label_prefix": "autoware",
                **THRESHOLDS,
                "iou_2d_thresholds": None,
                "iou_3d_thresholds": None,
                "min_distance": 0.0,
                "max_distance": distance,
                "min_point_numbers": min_points,
                "matching_class_agnostic_fps": False,
            },
            load_raw_data=False,
        )
        manager = PerceptionEvaluationManager(evaluation_config=config, load_ground_truth=False)
        count = len(names)
        critical = CriticalObjectFilterConfig(
            config, names, max_distance_list=[distance] * count, min_distance_list=[0.0] * count
        )
        pass_fail = PerceptionPassFailConfig(config, names, matching_threshold_list=[PASS_FAIL] * count)
        counted = []
        starts = np.concatenate(([0], np.cumsum(predicted.counts)))
        for index, truth in enumerate(truths):
            begin(index)
            found = slice(starts[index], starts[index + 1])
            points = np.where(truth.num_points >= 0, truth.num_points, min_points)  # unknown numbers count
            boxes = np.column_stack((truth.boxes, np.nan_to_num(truth.velocities)))
            objects = _objects(index, boxes, truth.labels, np.ones(len(boxes)), labels, points)
            time = index * FRAME_TIME
            frame = manager.add_frame_result(
                unix_time=time,
                ground_truth_now_frame=FrameGroundTruth(unix_time=time, frame_name=str(index), objects=list(objects)),
                estimated_objects=list(
                    _objects(index, predicted.boxes[found], predicted.labels[found], predicted.scores[found], labels)
                ),
                critical_object_filter_config=critical,
                frame_pass_fail_config=pass_fail,
            )
            counted.append(Counter(item.semantic_label.label for item in frame.frame_ground_truth.objects))
        return scene_figures(manager.get_scene_result(), counted, weights)


def _objects(
    index: int,
    boxes: np.ndarray,
    class_indices: np.ndarray,
    scores: np.ndarray,
    labels: _Labels,
    points: np.ndarray | None = None,
) -> Iterator[Any]:
    """Boxes [N, 9] (z of the gravity centre) as objects of ``perception_eval``; those with NaN or Inf are left out."""
    from perception_eval.common.object import DynamicObject
    from perception_eval.common.schema import FrameID
    from perception_eval.common.shape import Shape, ShapeType
    from pyquaternion import Quaternion

    for row, (box, label, score) in enumerate(zip(boxes.astype(float), class_indices, scores, strict=True)):
        if labels.of_class[label] is None or not np.isfinite([*box, score]).all():
            continue
        x, y, z, length, width, height, yaw, vx, vy = box.tolist()
        yield DynamicObject(
            unix_time=index * FRAME_TIME,
            frame_id=FrameID.from_value(FRAME),
            position=(x, y, z),
            orientation=Quaternion(axis=(0, 0, 1), radians=yaw),
            shape=Shape(shape_type=ShapeType.BOUNDING_BOX, size=(width, length, height)),
            velocity=(vx, vy, 0.0),
            semantic_score=float(score),
            semantic_label=labels.of_class[label],
            pointcloud_num=None if points is None else int(points[row]),
        )


FRAME_TIME = 100_000
"""Time between frames in µs, by which a detection tells its frame."""
BLOCK = 1 << 20
"""Numbers of draws × detections that are computed at once."""
CLOSE = 1e-9
"""Largest difference of an average precision from the package's own at which the two are the same metric."""


def scene_figures(scene: Any, truths: Sequence[Mapping[Any, int]], weights: Floats) -> dict[str, Floats]:
    """Figure → its value in each draw, float64 [draws], by T4MetricV2's names without its prefixes.

    ``scene`` is the package's ``MetricsScore`` of all frames, ``truths`` has the number of objects by label for each
    frame, and ``weights`` [draws, frames] how often each frame was drawn, once in the first draw. Where that one is not
    what the package itself computed, in a version with another average precision, its own value alone [1].
    """
    own: dict[str, float] = {}
    drawn: dict[str, Floats] = {}
    differs = False
    for by_mode in scene.mean_ap_values:
        mode = by_mode.matching_mode.value.lower().replace(" ", "_")
        own |= {f"mAP_{mode}": float(by_mode.map), f"mAPH_{mode}": float(by_mode.maph)}
        for figure, by_label in (("mAP", by_mode.label_to_aps), ("mAPH", by_mode.label_to_aphs)):
            means = []
            for label, scored in by_label.items():
                objects = weights @ np.array([truth.get(label, 0) for truth in truths], float)
                draws = [_average_precisions(each, objects, weights) for each in scored]
                differs |= any(_differs(each.ap, values[0]) for each, values in zip(scored, draws, strict=True))
                means.append(_mean(draws))
                if figure == "mAP":
                    names = [f"{label.value}_AP_{mode}_{each.matching_threshold}" for each in scored]
                    own |= {name: float(each.ap) for name, each in zip(names, scored, strict=True)}
                    drawn |= dict(zip(names, draws, strict=True))
            drawn[f"{figure}_{mode}"] = _mean(means)
    return {name: np.array([value]) if differs else drawn[name] for name, value in own.items()}


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
    pairs = zip(recall, envelope, strict=True)
    at_recalls = np.array([np.interp(RECALLS, of_draw, best, right=0) for of_draw, best in pairs])
    means = np.clip(at_recalls - MIN_PRECISION, 0, None).mean(axis=1) / (1 - MIN_PRECISION)
    return np.where(counts.any(axis=1), means, np.where(objects == 0, np.nan, 0.0))
