"""T4's metric by TIER IV's package, or a sentence where it is missing; the package's place is held by a stand-in."""

from __future__ import annotations

import importlib
import io
import math
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import fake_perception_eval
import numpy as np
import pytest
from numpy.testing import assert_allclose
from rich.console import Console
from test_cli import run
from test_evaluation import record

from cp_debug.detection import t4_metric
from cp_debug.detection.boxes import Predictions
from cp_debug.detection.evaluation import (
    BackendScores,
    ConfidenceInterval,
    EvaluationOptions,
    EvaluationResult,
    score_backends,
)
from cp_debug.detection.t4_metric import FRAME_TIME, check_installed, scene_figures, t4_figures
from cp_debug.errors import InputError, MissingPackage
from cp_debug.recipes.data.base import Truth
from cp_debug.reports.evaluation import render
from cp_debug.serialize import decode

CLASSES = ("car", "truck", "trailer", "cyclist")


class Quaternion:
    """``pyquaternion``'s constructor about an axis."""

    def __init__(self, axis: tuple[float, float, float], radians: float) -> None:
        assert axis == (0, 0, 1)
        self.radians = radians


@pytest.fixture
def frames(monkeypatch: pytest.MonkeyPatch) -> list:
    for name, module in fake_perception_eval.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    pyquaternion = ModuleType("pyquaternion")
    pyquaternion.Quaternion = Quaternion  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pyquaternion", pyquaternion)
    fake_perception_eval.FRAMES.clear()
    return fake_perception_eval.FRAMES


def objects(*rows: tuple[float, ...]) -> np.ndarray:
    return np.array(rows, np.float32)


def truth(boxes: np.ndarray, labels: list[int], points: list[int]) -> Truth:
    count = len(labels)
    velocities = np.full((count, 2), np.nan, np.float32)
    return Truth(boxes, np.array(labels), velocities, np.array(points), np.full(count, "", "<U8"))


BOX = (10.0, 0.0, 1.0, 4.0, 2.0, 1.5, 0.25)
TRUTHS = [
    truth(objects(BOX, (0, 20, 1, 8, 3, 3, 0), (200, 0, 1, 4, 2, 1.5, 0)), [0, 2, 0], [5, -1, 5]),
    truth(objects(BOX, (5, 5, 1, 2, 1, 2, 0), (0, -9, 1, 4, 2, 1.5, 0)), [0, 3, 0], [5, 5, 0]),
]
FOUND = Predictions(
    objects((10.3, 0, 1, 4, 2, 1.5, 0.25, 1, 2), (0, 20, 1, 8, 3, 3, 0, 0, 0), (np.nan, 0, 0, 4, 2, 1, 0, 0, 0),
            (11.5, 0, 1, 4, 2, 1.5, 0, 0, 0)),
    np.array([0.9, 0.8, 0.7, 0.6], np.float32), np.array([0, 1, 0, 0], np.int16), np.array([3, 1]),
)  # fmt: skip

WEIGHTS = np.array([[1, 1], [2, 0], [0, 2]], float)


def test_objects_are_given_as_the_package_wants_them(frames: list) -> None:
    told: list[tuple[str, int, int]] = []
    figures, notes = t4_figures(
        {"ort": FOUND},
        TRUTHS,
        CLASSES,
        distance=120,
        min_points=1,
        weights=WEIGHTS,
        on_step=lambda *step: told.append(step),
    )
    assert told == [("T4's metric, ort", 0, 2), ("T4's metric, ort", 1, 2)]
    (first, found), (second, _) = frames
    assert [item.position for item in first.objects] == [(10, 0, 1), (0, 20, 1), (200, 0, 1)]
    assert first.objects[0].shape.size == (2, 4, 1.5), "width, length, height"
    assert first.objects[0].orientation.radians == 0.25
    assert first.objects[0].velocity == (0, 0, 0), "unknown"
    assert [item.pointcloud_num for item in first.objects] == [5, 1, 5], "an unknown number counts"
    assert [item.semantic_label.label.value for item in first.objects] == ["car", "truck", "car"], "trailers are trucks"
    assert len(second.objects) == 2, "no label for cyclists"
    assert len(found) == 2, "NaN is left out"
    assert found[0].velocity == (1, 2, 0)
    assert found[0].semantic_score == pytest.approx(0.9)
    assert found[0].pointcloud_num is None
    got = {name: draws[0] for name, draws in figures["ort"].items()}
    assert [got[f"car_AP_center_distance_bev_{limit}"] for limit in (0.5, 1.0, 2.0, 4.0)] == [0.5, 0.5, 1, 1]
    assert got["truck_AP_center_distance_bev_0.5"] == 1
    assert got["mAP_center_distance_bev"] == got["mAPH_center_distance_bev"] == 0.875
    assert list(got)[-6:-4] == ["mAP_plane_distance", "mAPH_plane_distance"]
    assert "perception_eval 1.3.6, objects and detections within 120 m, classes car, truck" in notes[0]
    assert "no intervals: perception_eval 1.3.6 averages precision in another way" in notes[1], "the stand-in does"
    assert "leaves out cyclist" in notes[2]
    with pytest.raises(InputError, match="T4's metric has no labels for the classes cyclist"):
        t4_figures({"ort": FOUND}, TRUTHS, ("cyclist",), distance=120, min_points=1, weights=WEIGHTS)


def test_t4s_figures_stand_in_table_and_json(frames: list) -> None:
    options = EvaluationOptions(draws=10, region=(-50, -50, 50, 50), t4=True)
    runs = {spec: (record(spec), FOUND) for spec in ("torch", "ort")}
    backends, notes = score_backends(runs, TRUTHS, CLASSES, options)
    result = EvaluationResult("m", "d", ["a", "b"], options, backends, notes=notes)
    console = Console(width=160, file=io.StringIO())
    for part in render(result):
        console.print(part)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "mAPH_center_distance_bev" in text
    assert "within 50 m" in text
    document = result.to_dict()
    assert document["backends"][1]["t4"]["mAP_center_distance_bev"] == 0.875
    (again,) = (decode(type(each), each.to_dict(), "scores").t4 for each in backends[:1])
    assert again == pytest.approx(backends[0].t4, nan_ok=True)
    plain, _ = score_backends(runs, TRUTHS, CLASSES, replace(options, t4=False))
    assert "t4" not in plain[0].to_dict()


def test_a_class_without_objects_has_no_figure(frames: list) -> None:
    figures, _ = t4_figures({"ort": FOUND}, TRUTHS, CLASSES, distance=1, min_points=1, weights=WEIGHTS)
    assert all(math.isnan(draws[0]) for draws in figures["ort"].values())


@pytest.mark.parametrize("there", [None, ModuleType("perception_eval")])
def test_a_missing_package_is_one_sentence_with_its_command(
    there: ModuleType | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in list(fake_perception_eval.modules()):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "perception_eval", there)  # None: import raises
    code, text = run("eval", "centerpoint:tiny", "-b", "torch,ort", "-n", "1", "--t4")
    assert code == 3
    words = " ".join(text.split())
    assert "pip install 'git+https://github.com/tier4/autoware_perception_evaluation@v1.3.6'" in words
    assert words.count("error:") <= 1


def scored(found: list[tuple[int, float, bool]], ap: float, gain: float = 1.0) -> SimpleNamespace:
    """An ``Ap`` of the package: of each detection its frame, its score, and whether it is right."""
    results = [
        SimpleNamespace(
            estimated_object=SimpleNamespace(unix_time=frame * FRAME_TIME, semantic_score=score),
            ground_truth_object=object() if right else None,
            is_label_correct=right,
        )
        for frame, score, right in found
    ]
    metrics = SimpleNamespace(get_value=lambda result: gain)
    return SimpleNamespace(object_results=results, tp_metrics=metrics, ap=ap, matching_threshold=2.0)


def scene(aps: list[SimpleNamespace], aphs: list[SimpleNamespace]) -> SimpleNamespace:
    mode, car = SimpleNamespace(value="Plane Distance"), fake_perception_eval.AutowareLabel.CAR
    own = {"map": aps[0].ap, "maph": aphs[0].ap}
    by_mode = SimpleNamespace(matching_mode=mode, label_to_aps={car: aps}, label_to_aphs={car: aphs}, **own)
    return SimpleNamespace(mean_ap_values=[by_mode])


def test_draws_count_frames_as_often_as_they_were_drawn() -> None:
    """Of two frames with an object each, the second's is missed.

    Of the 90 recalls from 0.11 on 39 have precision 1, and the fortieth, 0.5, that of both detections. A heading that
    is worth half ends at recall 0.25.
    """
    half, heading = (39 + (1 / 2 - 0.1) / 0.9) / 90, (14 + (1 / 3 - 0.1) / 0.9) / 90
    car, found = fake_perception_eval.AutowareLabel.CAR, [(0, 0.9, True), (1, 0.2, False)]
    truths = [{car: 1}, {car: 1}]
    own = scene_figures(scene([scored(found, half)], [scored(found, half, 0.5)]), truths, WEIGHTS)
    assert list(own) == ["mAP_plane_distance", "mAPH_plane_distance", "car_AP_plane_distance_2.0"]
    assert all(figure == [half] for figure in own.values()), "mAPH is not what the package says"
    draws = scene_figures(scene([scored(found, half)], [scored(found, heading, 0.5)]), truths, WEIGHTS)
    assert draws["car_AP_plane_distance_2.0"] == pytest.approx([half, 1, 0])
    assert draws["mAP_plane_distance"] == pytest.approx([half, 1, 0])
    assert draws["mAPH_plane_distance"][2] == 0
    many = np.concatenate((WEIGHTS, np.tile(WEIGHTS, (20, 1))))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(t4_metric, "BLOCK", 14)  # seven draws of the two detections at once
        in_blocks = scene_figures(scene([scored(found, half)], [scored(found, heading, 0.5)]), truths, many)
    assert in_blocks["mAP_plane_distance"] == pytest.approx(np.tile([half, 1, 0], 21))
    nothing = scene_figures(scene([scored([], math.nan)], [scored([], math.nan)]), [{}, {}], WEIGHTS)
    assert np.isnan(nothing["mAP_plane_distance"]).all()


def test_a_drop_of_t4s_metric_decides_too() -> None:
    def scores(value: float, high: float) -> BackendScores:
        changes = {"mAP_plane_distance": ConfidenceInterval(value, value, high), "car_AP_x_2.0": WORSE}
        same = {"mAP": ConfidenceInterval(0, 0, 0)}
        return BackendScores(record("ort"), 1, same, same, {}, t4={}, t4_difference=changes)

    assert scores(-0.05, -0.02).dropped(0.01) == ["mAP_plane_distance"]
    assert scores(-0.05, -0.02).worse(0.01)
    assert not scores(-0.05, 0.01).worse(0.01), "by chance"
    assert not scores(-0.05, -0.02).worse(0.1), "allowed"


WORSE = ConfidenceInterval(-1, -1, -1)


def test_means_of_draws_leave_out_what_is_not_defined() -> None:
    values = [np.array([1.0, np.nan, np.nan]), np.array([3.0, 4.0, np.nan])]
    assert_allclose(t4_metric._mean(values), [2, 4, np.nan])
    assert t4_metric._differs(1.0, 1.0 + 3e-9)
    assert not t4_metric._differs(1.0, 1.0 + 0.5e-9)
    assert not t4_metric._differs(math.nan, math.nan)
    assert t4_metric._differs(math.nan, 1.0)


def test_an_average_precision_of_draws_by_hand() -> None:
    """All objects found without a false one: 1. Half of them: the recalls up to a half, of those above a tenth."""
    gain, miss = np.array([1.0, 1.0]), np.zeros(2)
    counts = np.array([[1.0, 1], [0, 0], [0, 0], [1, 1]])
    found = t4_metric._of_draws(gain, miss, counts, np.array([2.0, 0, 3, 4]))
    assert_allclose(found, [1, np.nan, 0, 40 / 90], atol=0.012)


def test_a_metric_that_cannot_be_imported_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [n for n in sys.modules if n.partition(".")[0] == "perception_eval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    importlib.invalidate_caches()
    with pytest.raises(MissingPackage, match=r"needs the package perception_eval: pip install"):
        check_installed()
    (tmp_path / "perception_eval").mkdir()
    (tmp_path / "perception_eval" / "__init__.py").write_text("")
    (tmp_path / "perception_eval" / "manager.py").write_text("import nowhere")
    importlib.invalidate_caches()
    with pytest.raises(
        MissingPackage, match=r"perception_eval, which cannot be imported here \(No module named 'nowhere'"
    ):
        check_installed()
    monkeypatch.delitem(sys.modules, "perception_eval")
