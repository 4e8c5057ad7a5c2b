"""The parts of TIER IV's ``perception_eval`` 1.3 that T4's metric calls, with the same names and parameters.

Its average precision is the share of objects that some detection of their label is near enough to.
"""

from __future__ import annotations

import enum
import math
from types import ModuleType, SimpleNamespace
from typing import Any

FRAMES: list[tuple[Any, Any]] = []
"""Ground truth and detections of every frame that was added."""


class EvaluationTask(enum.Enum):
    DETECTION = "detection"


class AutowareLabel(enum.Enum):
    UNKNOWN = "unknown"
    CAR = "car"
    TRUCK = "truck"
    PEDESTRIAN = "pedestrian"
    FP = "false_positive"


class Label:
    def __init__(self, label: Any, name: str, attributes: list[str] | None = None) -> None:
        self.label, self.name, self.attributes = label, name, attributes or []


class LabelConverter:
    def __init__(
        self, evaluation_task: Any, merge_similar_labels: bool, label_prefix: str, count_label_number: bool = False
    ) -> None:
        assert label_prefix == "autoware"
        pairs = (("car", "car"), ("truck", "truck"), ("trailer", "truck"), ("pedestrian", "pedestrian"))
        self.label_infos = [SimpleNamespace(name=name, label=AutowareLabel(label)) for name, label in pairs]

    def convert_name_without_count(self, name: str) -> AutowareLabel:
        found = (info.label for info in self.label_infos if info.name == name.lower())
        return next(found, AutowareLabel.UNKNOWN)


class FrameID(enum.Enum):
    BASE_LINK = "base_link"

    @classmethod
    def from_value(cls, name: str) -> FrameID:
        return cls(name)


class ShapeType(enum.Enum):
    BOUNDING_BOX = "bounding_box"


class Shape:
    def __init__(self, shape_type: Any, size: tuple[float, float, float], footprint: Any = None) -> None:
        self.type, self.size = shape_type, size


class DynamicObject:
    def __init__(
        self,
        unix_time: int,
        frame_id: Any,
        position: tuple[float, float, float],
        orientation: Any,
        shape: Any,
        velocity: Any,
        semantic_score: float,
        semantic_label: Any,
        pointcloud_num: int | None = None,
    ) -> None:
        self.position, self.orientation, self.shape, self.velocity = position, orientation, shape, velocity
        self.semantic_score, self.semantic_label, self.pointcloud_num = semantic_score, semantic_label, pointcloud_num


class FrameGroundTruth:
    def __init__(
        self, unix_time: int, frame_name: str, objects: list[Any], transforms: Any = None, raw_data: Any = None
    ) -> None:
        self.frame_name, self.objects = frame_name, objects


class PerceptionEvaluationConfig:
    def __init__(
        self,
        dataset_paths: list[str],
        frame_id: str,
        result_root_directory: str,
        evaluation_config_dict: dict[str, Any],
        load_raw_data: bool = False,
    ) -> None:
        self.settings = evaluation_config_dict


class CriticalObjectFilterConfig:
    def __init__(
        self,
        evaluator_config: Any,
        target_labels: list[str],
        ignore_attributes: Any = None,
        max_x_position_list: Any = None,
        max_y_position_list: Any = None,
        max_distance_list: list[float] | None = None,
        min_distance_list: list[float] | None = None,
    ) -> None:
        assert len(max_distance_list or ()) == len(target_labels)


class PerceptionPassFailConfig:
    def __init__(
        self,
        evaluator_config: Any,
        target_labels: list[str] | None,
        matching_threshold_list: list[float] | None = None,
        confidence_threshold_list: list[float] | None = None,
    ) -> None:
        assert matching_threshold_list is not None


class PerceptionEvaluationManager:
    def __init__(
        self, evaluation_config: Any, load_ground_truth: bool = True, metric_output_dir: str | None = None
    ) -> None:
        assert not load_ground_truth
        self._settings = evaluation_config.settings
        self._frames: list[tuple[list[Any], list[Any]]] = []

    def add_frame_result(
        self,
        unix_time: int,
        ground_truth_now_frame: Any,
        estimated_objects: list[Any],
        critical_object_filter_config: Any,
        frame_pass_fail_config: Any,
    ) -> Any:
        def near(item: Any) -> bool:
            return math.hypot(*item.position[:2]) < self._settings["max_distance"]

        least = self._settings["min_point_numbers"]
        truth = [item for item in ground_truth_now_frame.objects if near(item) and item.pointcloud_num >= least]
        self._frames.append((truth, list(filter(near, estimated_objects))))
        FRAMES.append((ground_truth_now_frame, estimated_objects))
        return SimpleNamespace(frame_ground_truth=SimpleNamespace(objects=truth))

    def get_scene_result(self) -> Any:
        modes = {"Center Distance BEV": "center_distance_bev_thresholds", "Plane Distance": "plane_distance_thresholds"}
        return SimpleNamespace(mean_ap_values=[self._mode(name, self._settings[key]) for name, key in modes.items()])

    def _mode(self, name: str, thresholds: list[float]) -> Any:
        aps = {
            AutowareLabel(label): [
                SimpleNamespace(matching_threshold=limit, ap=self._found(label, limit), object_results=[])
                for limit in thresholds
            ]
            for label in self._settings["target_labels"]
        }
        known = [each.ap for each_label in aps.values() for each in each_label if not math.isnan(each.ap)]
        mean = sum(known) / len(known) if known else math.nan
        mode = SimpleNamespace(value=name)
        return SimpleNamespace(matching_mode=mode, map=mean, maph=mean, label_to_aps=aps, label_to_aphs=aps)

    def _found(self, label: str, limit: float) -> float:
        hits = [
            any(
                math.dist(item.position[:2], other.position[:2]) < limit
                for other in found
                if other.semantic_label.label.value == label
            )
            for truth, found in self._frames
            for item in truth
            if item.semantic_label.label.value == label
        ]
        return sum(hits) / len(hits) if hits else math.nan


def modules() -> dict[str, ModuleType]:
    """The package as ``sys.modules`` has it."""
    places = {
        "perception_eval": {"__version__": "1.3.6"},
        "perception_eval.common": {},
        "perception_eval.common.dataset": {"FrameGroundTruth": FrameGroundTruth},
        "perception_eval.common.evaluation_task": {"EvaluationTask": EvaluationTask},
        "perception_eval.common.label": {
            "AutowareLabel": AutowareLabel,
            "Label": Label,
            "LabelConverter": LabelConverter,
        },
        "perception_eval.common.object": {"DynamicObject": DynamicObject},
        "perception_eval.common.schema": {"FrameID": FrameID},
        "perception_eval.common.shape": {"Shape": Shape, "ShapeType": ShapeType},
        "perception_eval.config": {"PerceptionEvaluationConfig": PerceptionEvaluationConfig},
        "perception_eval.evaluation": {},
        "perception_eval.evaluation.result": {},
        "perception_eval.evaluation.result.perception_frame_config": {
            "CriticalObjectFilterConfig": CriticalObjectFilterConfig,
            "PerceptionPassFailConfig": PerceptionPassFailConfig,
        },
        "perception_eval.manager": {"PerceptionEvaluationManager": PerceptionEvaluationManager},
    }
    made = {}
    for name, members in places.items():
        made[name] = ModuleType(name)
        made[name].__path__ = []  # type: ignore[attr-defined]
        vars(made[name]).update(members)
    return made
