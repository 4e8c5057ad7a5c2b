"""T4's metric, which AWML reports: mAP and mAPH by TIER IV's ``perception_eval``, where that is installed."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from cp_debug.detection.boxes import Floats
from cp_debug.detection.predictions import Predictions
from cp_debug.detection.t4_draws import FRAME_TIME, scene_draws
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
    on_step: Callable[[str, int, int], None] = lambda text, done, total: None,
) -> tuple[dict[str, dict[str, Floats]], list[str]]:
    """Spec → figure → its value in each draw, with the names of AWML's T4MetricV2, such as ``mAP_center_distance_bev``;
    and notes.

    Objects and detections within ``distance`` m of the sensor, seen from above, count, objects from ``min_points``
    points on. Detections with NaN or Inf are left out, as T4MetricV2 leaves them out; an unknown velocity is 0. A
    figure is NaN where a class has neither objects nor detections. ``weights`` [draws, samples] says how often each
    sample was drawn, once in the first draw, which is the package's own; it is the only one where the package computes
    average precision in a way that ``scene_draws`` does not know. ``on_step`` is told every frame.

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


def _told(on_step: Callable[[str, int, int], None], text: str, before: int, total: int, frame: int) -> None:
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
        scene = manager.get_scene_result()
        figures = {name: np.array([value]) for name, value in _figures(scene)}
        draws = scene_draws(scene, counted, weights)
        return {name: draws[name] for name in figures} if draws else figures


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


def _figures(scene: Any) -> Iterator[tuple[str, float]]:
    """Figures of a ``MetricsScore`` by T4MetricV2's names, without its prefixes."""
    for by_mode in scene.mean_ap_values:
        mode = by_mode.matching_mode.value.lower().replace(" ", "_")
        yield f"mAP_{mode}", float(by_mode.map)
        yield f"mAPH_{mode}", float(by_mode.maph)
        for label, precisions in by_mode.label_to_aps.items():
            for precision in precisions:
                yield f"{label.value}_AP_{mode}_{precision.matching_threshold}", float(precision.ap)
