"""Ablation: the layer that costs boxes brings them back when it has its exact values, and no other does."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pandas as pd
import pytest
import torch
from nets import NetBuilder
from test_cli import run as cli
from test_evaluation import PictureModel, Pictures
from test_sweep import INT8, records

from cp_debug.backends.registry import create
from cp_debug.backends.spec import BackendSpec, parse_backends
from cp_debug.detection.boxes import Boxes, Predictions
from cp_debug.detection.evaluation import EvaluationOptions, Rings, by_class, by_distance, rings_of
from cp_debug.errors import InputError
from cp_debug.programs.pipeline import Export, prepare
from cp_debug.recipes.base import Component
from cp_debug.recipes.centerpoint.decode import Detections
from cp_debug.recipes.data.base import DataOptions, Truth
from cp_debug.reports.sweep import render_page, section
from cp_debug.serialize import decode
from cp_debug.sweep import ablating
from cp_debug.sweep.ablating import Ablation
from cp_debug.sweep.prepared import Grid
from cp_debug.sweep.run import SweepResult

HOW = {"data_root": None, "sweeps": 9, "skip_missing": False, "calibration": INT8, "layers": 12}
OPTIONS = EvaluationOptions(draws=20)


def net(path: Path) -> Path:
    """Three convolutions that hand the picture on; the weight of the second is nothing in FP16, and 2e-8 in FP32."""
    builder = NetBuilder()

    def hand_on(x: str, weight: float, name: str) -> str:
        kernel = builder.weight(np.full((1, 1, 1, 1), weight, np.float32))
        return builder.op("Conv", x, kernel, name=name, kernel_shape=[1, 1])

    x = hand_on("picture", 1.5, "before")
    x = hand_on(x, 2e-8, "faulty")
    x = builder.op("Mul", x, builder.weight(np.float32(1e4)), name="larger")
    x = builder.op("Mul", x, builder.weight(np.float32(5e3)), name="largest")
    x = hand_on(x, 0.7, "heat")
    return builder.save(path, {"picture": (onnx.TensorProto.FLOAT, [1, 1, 16, 16])}, [x])


class Faulty(PictureModel):
    """``PictureModel`` of that network."""

    def __init__(self, path: Path, *, with_truth: bool = True) -> None:
        self.components = [Component("picture_net", ("picture",), ("heat",), onnx_path=path)]
        self.with_truth = with_truth

    def data(self, inputs: Path | None, count: int, seed: int, options: DataOptions) -> Pictures:
        return Pictures(count, with_truth=self.with_truth)

    def decode(self, sample: Any, results: Mapping[str, Any]) -> Detections:
        return super().decode(sample, {"net": results["picture_net"]})


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def grid_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, with_truth: bool = True, backends: str = "ort,emu-fp16acc"
) -> Grid:
    model = Faulty(net(tmp_path / "net.onnx"), with_truth=with_truth)
    monkeypatch.setattr("cp_debug.quantization.quantized_programs.load_model", lambda *_, **__: model)
    monkeypatch.setattr("cp_debug.sweep.prepared.WITHOUT_BOXES", ())  # this callable's model does detect
    (tmp_path / "pictures.py").write_text("def make(): ...")
    return Grid([f"{tmp_path / 'pictures.py'}:make"], parse_backends(backends), samples=3, how=HOW)


def test_the_faulty_layer_brings_all_boxes_back_and_no_other_any(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = records(ablating.tasks(grid_of(tmp_path, monkeypatch)))
    assert json.dumps(found)
    (group,) = ablating.merge(reversed(found), OPTIONS, [8.0])
    assert (group.boxes, group.lost.value, group.gained.value, group.layers) == (15, 15, 0, 3)
    assert {row.layers[0]: row.back.value for row in group.single} == {
        "picture_net/node_faulty": 15,
        "picture_net/node_before": 0,
        "picture_net/node_heat": 0,
    }
    assert group.single[0].layers == ["picture_net/node_faulty"]
    best = group.single[0]
    assert best.back.low == best.back.high == 15  # five in every sample, whichever are drawn
    assert (best.lost.value, best.share) == (0, pytest.approx(1, abs=1e-3))
    assert best.scores["mAP"].value == pytest.approx(1)
    assert group.scores["mAP"].value == pytest.approx(-1)
    assert best.error is not None
    assert best.error.worst < 1e-3
    assert [row.kind for row in group.together] == ["first", "all"]
    assert all(row.back.value == 15 for row in group.together)
    assert [(part.part, part.boxes) for part in group.classes] == [("dot", 15)]
    assert sum(part.boxes for part in group.distances) == 15
    assert {name: figure.value for name, figure in best.distances.items()} == {
        part.part: part.lost.value for part in group.distances
    }
    assert not group.outliers


def test_what_it_says_is_read_back_and_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = records(ablating.tasks(grid_of(tmp_path, monkeypatch)))
    groups = ablating.merge(found, OPTIONS)
    result = SweepResult("ablate", 3, 3, 1.0, groups, [], "log.jsonl")
    document = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert decode(SweepResult, document, "it").to_dict() == document
    shown = section(groups[0])
    assert "picture_net/node_faulty alone brings 15 [15, 15] back" in shown.sentence
    assert "Boxes by distance" in [sheet.title for sheet in shown.sheets]
    assert "picture_net/node_faulty" in render_page(result)
    flat = pd.DataFrame(groups[0].rows())
    assert flat["back"].tolist() == [15, 0, 0, 15, 15]
    table = pd.DataFrame([row for record in found for row in ablating.rows(record)])
    assert set(table.columns) == set(ablating.COLUMNS)
    assert table.groupby("layers").back.sum()["picture_net/node_faulty"] == 15


def test_without_truth_boxes_are_counted_and_nothing_is_scored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (group,) = ablating.merge(records(ablating.tasks(grid_of(tmp_path, monkeypatch, with_truth=False))), OPTIONS)
    assert (group.scores, group.single[0].scores) == ({}, {})
    assert group.single[0].back.value == 15
    assert any("without ground truth" in note for note in group.notes)


def test_a_model_without_boxes_is_refused_before_anything_is_queued(tmp_path: Path) -> None:
    file = net(tmp_path / "net.onnx")
    for kind, goal in (("ablate", ()), ("eval", ()), ("search", ("--goal", "boxes_lost==0"))):
        log = tmp_path / f"{kind}.jsonl"
        code, text = cli("sweep", kind, file, "-b", "ort,emu-fp16acc", "--log", log, *goal)
        assert (code, "decodes no boxes" in text) == (2, True)
        assert "task" not in text
        assert not log.exists() or not log.read_text()


def test_every_task_has_the_first_sample_to_rank_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = list(ablating.tasks(grid_of(tmp_path, monkeypatch)))
    assert [task.params["index"] for task in tasks] == [0, 1, 2]
    assert {task.params["first"]["index"] for task in tasks} == {0}
    other = ablating.tasks(replace(grid_of(tmp_path, monkeypatch), how=HOW | {"layers": 1}))
    assert not {task.key for task in tasks} & {task.key for task in other}


def test_fewer_layers_are_those_with_the_largest_shares(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grid = replace(grid_of(tmp_path, monkeypatch), how=HOW | {"layers": 1})
    (group,) = ablating.merge(records(ablating.tasks(grid)), OPTIONS)
    assert [row.layers for row in group.single] == [["picture_net/node_faulty"]]
    assert [row.kind for row in group.together] == ["all"]


def test_a_backend_whose_layers_cannot_be_told_apart_is_refused(tmp_path: Path) -> None:
    model: Any = Faulty(net(tmp_path / "net.onnx"))
    (example,) = model.samples(1, 0, None)
    programs = prepare(model, example, tmp_path, how=Export("dynamo"), folded=True)
    with pytest.raises(InputError, match="its layers cannot be kept one by one"):
        Ablation(model, programs, create(BackendSpec("torch-fp16")))
    log = tmp_path / "log.jsonl"
    code, text = cli("sweep", "ablate", "centerpoint:tiny", "-b", "torch,torch-fp16", "--log", log)
    assert (code, "its layers cannot be kept one by one" in " ".join(text.split())) == (2, True)
    code, text = cli("sweep", "ablate", "centerpoint:tiny", "-b", "emu-int8,emu-fp16", "--log", log)
    assert (code, "cannot be in INT8" in " ".join(text.split())) == (2, True)
    code, text = cli("sweep", "ablate", "centerpoint:tiny", "--distances", "40,20", "--log", log)
    assert (code, "expected metres that rise" in " ".join(text.split())) == (2, True)
    assert not log.exists()


# By class and by distance -------------------------------------------------------------------------------------------


def truth_at(places: list[tuple[float, float]], labels: list[int]) -> Truth:
    boxes = np.zeros((len(places), 7), np.float32)
    boxes[:, :2], boxes[:, 3:6] = places, 1
    count = len(places)
    return Truth(boxes, np.array(labels), np.zeros((count, 2), np.float32), np.full(count, 9), np.full(count, ""))


def detected(truth: Truth, kept: list[int]) -> Detections:
    boxes = np.zeros((len(kept), 9), np.float32)
    boxes[:, :7] = truth.boxes[kept]
    return Detections(boxes, np.linspace(0.9, 0.5, len(kept)).astype(np.float32), truth.labels[kept].astype(np.int32))


def test_metrics_in_parts_tell_where_objects_are_lost() -> None:
    """The test misses the far car of every sample: nothing else changes."""
    truths = [truth_at([(5, 0), (30, 0), (0, 6)], [0, 0, 1])] * 4
    predictions = {
        "exact": Predictions.gather([detected(truth, [0, 1, 2]) for truth in truths]),
        "test": Predictions.gather([detected(truth, [0, 2]) for truth in truths]),
    }
    names = ["car", "bus", "tram"]
    car, bus, tram = by_class(predictions, truths, names, OPTIONS)
    assert [(each.part, each.objects) for each in (car, bus, tram)] == [("car", 8), ("bus", 4), ("tram", 0)]
    assert car.differences["test"]["AP"].value < -0.4
    assert bus.differences["test"]["AP"] == (0, 0, 0)
    near, far = by_distance(predictions, truths, names, OPTIONS, Rings((20.0, 50.0)))
    assert [(near.part, near.objects), (far.part, far.objects)] == [("0–20 m", 8), ("20–50 m", 4)]
    assert near.figures["exact"]["mAP"].value == pytest.approx(1)  # of the classes that are there
    assert near.differences["test"]["mAP"] == (0, 0, 0)
    assert far.differences["test"]["mAP"] == pytest.approx((-1, -1, -1))


def test_rings() -> None:
    assert rings_of([], EvaluationOptions(region=(-54.0, -54.0, 54.0, 54.0))).edges == (18.0, 36.0)
    assert rings_of([], EvaluationOptions()).edges == (20.0, 40.0)
    rings = rings_of([10.0, 25.0], EvaluationOptions())
    assert rings.names == ["0–10 m", "10–25 m", "from 25 m"]
    assert rings.of([(0, 0), (10, 0), (0, -24.9), (30, 30), (math.nan, 0)]).tolist() == [0, 1, 1, 2, 2]
    empty = Boxes.of(np.zeros((0, 9)), np.zeros(0, int), [], [], np.zeros(0, np.str_))
    assert rings.of(empty.centers).tolist() == []
    for edges in ([0.0, 5.0], [5.0, 5.0], [-1.0]):
        with pytest.raises(InputError, match="expected metres that rise"):
            rings_of(edges, EvaluationOptions())
