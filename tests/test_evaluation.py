"""Scoring several backends: draws, filters, broken boxes, the comparison, the files, and the command."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import nn
from typer.testing import CliRunner

from cp_debug.backends.arithmetic import FP32
from cp_debug.backends.base import RunRecord
from cp_debug.backends.registry import create
from cp_debug.backends.spec import parse_backends
from cp_debug.cli.main import app
from cp_debug.detection.boxes import Boxes, Predictions, save_predictions
from cp_debug.detection.evaluate import _prepare, as_detector, evaluate, finite
from cp_debug.detection.evaluation import (
    NUSCENES_RANGES,
    BackendScores,
    ConfidenceInterval,
    EvaluationOptions,
    EvaluationResult,
    draw_samples,
    parse_ranges,
    score_backends,
)
from cp_debug.detection.metrics import ERRORS, match_centers, score
from cp_debug.errors import InputError
from cp_debug.recipes.base import Arrays, Component, Sample
from cp_debug.recipes.centerpoint.decode import Detections, decode
from cp_debug.recipes.centerpoint.recipe import CenterPointModel
from cp_debug.recipes.data.base import DataOptions, Truth, attributes_of
from cp_debug.recipes.data.infos import load_plain_pickle
from cp_debug.reports.evaluation import class_table, render, summary_table, verdict
from cp_debug.reports.sheet_terminal import Terminal

CLASSES = ("car", "cyclist")
EMPTY = Detections(np.zeros((0, 9), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int32))


def truth(rng: np.random.Generator, count: int = 6) -> Truth:
    boxes = np.column_stack(
        (
            rng.uniform(-20, 20, (count, 2)),
            rng.normal(0, 1, count),
            rng.uniform(1, 4, (count, 3)),
            rng.normal(0, 2, count),
        )
    ).astype(np.float32)
    velocities = rng.normal(0, 2, (count, 2)).astype(np.float32)
    labels = rng.integers(0, 2, count)
    attributes = attributes_of(np.array(CLASSES)[labels], velocities)
    return Truth(boxes, labels, velocities, rng.integers(1, 50, count), attributes)


def detections(rng: np.random.Generator, truth: Truth, noise: float = 0.3, kept: float = 1.0) -> Detections:
    """Near the objects, each with some chance of being missed, and a few false ones; z of the bottom."""
    boxes = np.column_stack((truth.boxes, truth.velocities))
    boxes[:, 2] -= boxes[:, 5] / 2
    chosen = rng.random(len(boxes)) < kept
    boxes, labels = boxes[chosen], truth.labels[chosen]
    boxes[:, :2] += rng.normal(0, noise, (len(boxes), 2))
    false = np.column_stack((rng.uniform(-20, 20, (2, 2)), np.zeros(2), np.ones((2, 3)), np.zeros((2, 3))))
    return Detections(
        np.concatenate((boxes, false)).astype(np.float32),
        rng.random(len(boxes) + 2).astype(np.float32),
        np.concatenate((labels, [0, 1])).astype(np.int32),
    )


def record(spec: str) -> RunRecord:
    return RunRecord(spec, FP32, "cpu", spec.startswith("emu"), {}, {})


def scored(found: Mapping[str, list[Detections]], truths: list[Truth], **options: Any) -> EvaluationResult:
    chosen = EvaluationOptions(**{"draws": 200, **options})
    runs = {spec: (record(spec), Predictions.gather(samples)) for spec, samples in found.items()}
    backends, notes = score_backends(runs, truths, CLASSES, chosen)
    names = [f"sample {index}" for index in range(len(truths))]
    return EvaluationResult("m", "d", names, chosen, backends, {s: p for s, (_, p) in runs.items()}, notes)


def values(result: EvaluationResult, backend: int = 0) -> dict[str, float]:
    return {name: figure.value for name, figure in result.backends[backend].summary.items()}


def as_boxes(truths: list[Truth], found: list[Detections]) -> tuple[Boxes, Boxes]:
    flat = np.concatenate([np.column_stack((each.boxes, each.velocities)) for each in truths])
    samples = np.repeat(np.arange(len(truths)), [len(each.labels) for each in truths])
    labels = np.concatenate([each.labels for each in truths])
    attributes = np.concatenate([each.attributes for each in truths])
    objects = Boxes.of(flat, samples, labels, np.ones(len(labels)), attributes)
    return Predictions.gather(found).as_boxes(CLASSES), objects


@pytest.mark.parametrize("seed", range(5))
def test_a_draw_of_some_samples_is_the_score_of_those_alone(seed: int) -> None:
    rng = np.random.default_rng(seed)
    truths = [truth(rng, int(rng.integers(0, 7))) for _ in range(8)]
    found = [detections(rng, each, kept=0.8) for each in truths]
    drawn = np.concatenate(([1, 1], rng.integers(0, 2, 6)))
    weights = np.stack((np.ones(8), drawn, 3 * drawn))
    together = score(*as_boxes(truths, found), CLASSES, weights).summary()
    chosen = np.flatnonzero(drawn)
    alone = score(
        *as_boxes([truths[i] for i in chosen], [found[i] for i in chosen]), CLASSES, np.ones((1, len(chosen)))
    ).summary()
    for name, figures in together.items():
        assert figures[1:] == pytest.approx([alone[name][0]] * 2, abs=1e-12), name


def test_draws_depend_on_the_seed_alone_and_keep_the_number_of_samples() -> None:
    weights = draw_samples(7, 50, 3)
    assert (weights[0] == 1).all()
    assert (weights.sum(axis=1) == 7).all()
    np.testing.assert_array_equal(weights, draw_samples(7, 50, 3))
    assert (weights != draw_samples(7, 50, 4)).any()
    assert ConfidenceInterval.of(np.array([0.5, *range(101)])) == pytest.approx((0.5, 2.5, 97.5))
    assert ConfidenceInterval.of(np.array([0.5])) == (0.5, 0.5, 0.5)


def test_perfect_detections_score_one() -> None:
    rng = np.random.default_rng(0)
    truths = [truth(rng) for _ in range(5)]
    boxes = [np.column_stack((each.boxes, each.velocities)) for each in truths]
    for each in boxes:
        each[:, 2] -= each[:, 5] / 2
    found = [
        Detections(b, np.ones(len(b), np.float32), t.labels.astype(np.int32))
        for b, t in zip(boxes, truths, strict=True)
    ]
    figures = values(scored({"torch": found}, truths))
    assert figures == pytest.approx({name: float(name[1:] not in ERRORS) for name in figures}, abs=1e-6)


def test_no_predictions_score_zero() -> None:
    rng = np.random.default_rng(0)
    truths = [truth(rng) for _ in range(3)]
    figures = values(scored({"torch": [EMPTY] * 3}, truths))
    assert {figures[name] for name in ("mAP", "NDS", "BEV AP@0.5", "3D AP@0.7")} == {0}
    assert {figures[name] for name in ("mATE", "mASE", "mAOE", "mAVE", "mAAE")} == {1}
    assert "torch: no detections in the evaluated range" in scored({"torch": [EMPTY] * 3}, truths).notes
    nothing = Truth(np.zeros((0, 7)), np.zeros(0, int), np.zeros((0, 2)), np.zeros(0, int), np.zeros(0, "<U1"))
    result = scored({"torch": [EMPTY] * 2, "ort": [detections(rng, truths[0])] * 2}, [nothing] * 2)
    assert values(result)["mAP"] == values(result, 1)["mAP"] == 0
    assert any("no object of car, cyclist" in note for note in result.notes)
    json.dumps(result.to_dict(), allow_nan=False)


def test_broken_boxes_count_as_false_and_broken_objects_not_at_all() -> None:
    rng = np.random.default_rng(1)
    truths = [truth(rng) for _ in range(5)]
    found = [detections(rng, each, noise=0.1) for each in truths]
    whole = scored({"torch": found}, truths)

    objects = replace(truths[0], boxes=np.concatenate((truths[0].boxes, np.full((1, 7), np.nan, np.float32))))
    objects = replace(
        objects,
        labels=np.append(truths[0].labels, 0),
        velocities=np.concatenate((truths[0].velocities, np.zeros((1, 2), np.float32))),
        num_points=np.append(truths[0].num_points, 9),
        attributes=np.append(truths[0].attributes, ""),
    )
    same = scored({"torch": found}, [objects, *truths[1:]])
    assert values(same) == values(whole)
    assert "1 objects of the ground truth hold NaN or Inf; left out" in same.notes

    broken = Detections(found[0].boxes.copy(), found[0].scores.copy(), found[0].labels)
    broken.boxes[:2, 3] = np.nan
    broken.boxes[2, 0] = np.inf
    broken.scores[3] = np.nan
    result = scored({"torch": [broken, *found[1:]]}, truths)
    assert values(result)["mAP"] < values(whole)["mAP"]
    assert any("torch: 3 detections hold NaN or Inf" in note for note in result.notes)
    json.dumps(result.to_dict(), allow_nan=False)


def test_range_and_point_filters() -> None:
    rng = np.random.default_rng(2)
    truths = [truth(rng, 12) for _ in range(4)]
    found = [detections(rng, each) for each in truths]

    def objects(**options: Any) -> int:
        return sum(each["objects"] for each in scored({"torch": found}, truths, **options).backends[0].classes.values())

    assert objects() == 48
    assert objects(min_points=10) == sum((each.num_points >= 10).sum() for each in truths)
    cars = sum(((np.linalg.norm(t.boxes[:, :2], axis=1) < 15) & (t.labels == 0)).sum() for t in truths)
    cyclists = sum(((np.abs(t.boxes[:, :2]) <= 10).all(axis=1) & (t.labels == 1)).sum() for t in truths)
    assert objects(ranges={"car": 15.0}, region=(-10, -10, 10, 10)) == cars + cyclists
    unknown = [replace(each, num_points=np.full(12, -1)) for each in truths]
    assert scored({"torch": found}, unknown, min_points=5).backends[0].classes["car"]["objects"] > 0


def test_a_clear_loss_is_found_and_noise_is_not() -> None:
    rng = np.random.default_rng(3)
    truths = [truth(rng, 10) for _ in range(40)]
    found = [detections(rng, each) for each in truths]
    lossy = [Detections(d.boxes[1:], d.scores[1:], d.labels[1:]) for d in found]  # one of ten objects is lost
    jitter = [Detections(d.boxes + np.float32(1e-4), d.scores, d.labels) for d in found]
    result = scored({"torch": found, "ort": jitter, "emu-fp16": lossy}, truths)
    assert result.worse == ["emu-fp16"]
    change = result.backends[2].difference["mAP"]
    assert change.low < change.value < -0.03
    assert change.high < 0
    assert result.backends[1].difference["mAP"].value == pytest.approx(0, abs=1e-3)
    assert scored({"torch": found, "emu-fp16": lossy}, truths, max_drop=0.5).worse == []
    assert scored({"torch": lossy, "ort": found}, truths).worse == []  # better is not worse


@pytest.mark.parametrize(
    ("change", "worse"),
    [
        ((-0.05, -0.09, -0.01), True),
        ((-0.05, -0.12, 0.02), False),
        ((-0.005, -0.009, -0.001), False),
        ((0.05, 0.01, 0.09), False),
    ],
)
def test_a_loss_that_chance_may_explain_is_none(change: tuple[float, float, float], worse: bool) -> None:
    record = RunRecord("ort", "fp32", "cpu", False)
    scores = BackendScores(record, 1, {}, {"mAP": ConfidenceInterval(*change)}, {})
    assert scores.worse(0.01) is worse
    assert not replace(scores, difference=None).worse(0.01)


def test_outputs_that_are_not_finite_are_no_plain_pass() -> None:
    rng = np.random.default_rng(3)
    truths = [truth(rng, 10) for _ in range(4)]
    found = [detections(rng, each) for each in truths]
    plain = scored({"torch": found, "ort": found, "ort-all": found}, truths)
    reference, same, more = (
        replace(each, not_finite=number) for each, number in zip(plain.backends, (1, 1, 2), strict=True)
    )
    result = replace(plain, backends=[reference, same, more])
    assert plain.worse == []
    assert result.worse == ["ort-all"]
    lines = [text.plain for text in verdict(result)]
    assert lines[0].endswith("as good as torch; but its outputs hold NaN or Inf on 1 of 4 samples, those of torch on 1")
    assert lines[1].endswith("on 2 of 4 samples, those of torch on 1")
    assert [text.style for text in verdict(result)] == ["yellow", "bold red"]
    assert [text.style for text in verdict(plain)] == ["green", "green"]
    assert result.to_dict()["backends"][2]["not_finite"] == 2


def test_tables_and_figures_for_other_programs() -> None:
    rng = np.random.default_rng(3)
    truths = [truth(rng, 10) for _ in range(20)]
    found = [detections(rng, each) for each in truths]
    lossy = [Detections(d.boxes[1:], d.scores[1:], d.labels[1:]) for d in found]
    result = scored({"torch": found, "emu-fp16": lossy}, truths)
    out = Console(file=io.StringIO(), width=160)
    for part in render(result):
        out.print(part)
    text = out.file.getvalue()  # type: ignore[attr-defined]
    assert "m · d · 20 samples" in text
    assert "emu-fp16 (emulated)" in text
    lost = result.backends[1].difference["mAP"].value
    assert f"{lost:+.4f}" in text
    assert "worse by more than 0.01" in text
    frame = result.to_pandas()
    assert frame[["backend", "class"]].apply(tuple, axis=1).tolist() == [
        (spec, name) for spec in ("torch", "emu-fp16") for name in (*CLASSES, "all")
    ]
    assert frame["Δ mAP"].iloc[-1] == lost
    read = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert read["worse"] == ["emu-fp16"]
    assert read["backends"][1]["difference"]["mAP"]["value"] == lost


@pytest.mark.parametrize("width", [60, 80, 100, 120, 200])
def test_both_tables_fit_the_terminal(width: int) -> None:
    rng = np.random.default_rng(3)
    truths = [truth(rng, 10) for _ in range(4)]
    found = [detections(rng, each) for each in truths]
    result = scored({"torch": found, "emu-fp16": found}, truths)
    out = Console(file=io.StringIO(), width=width)
    for table in (summary_table(result), class_table(result)):
        out.print(Terminal(table))
    lines = out.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert max(map(len, lines)) <= width
    for spec, scores in zip(("torch", "emu-fp16"), result.backends, strict=True):
        for name in CLASSES:
            figures = scores.classes[name]
            share = f"{figures['found']}/{figures['objects']}"
            assert any(spec in line and share in line and f"{figures['AP'].value:.3f}" in line for line in lines)
    assert "…" not in "".join(lines)
    if width >= 80:  # two backends are one row for each metric
        values = [f"{each.summary['mAP'].value:.3f}" for each in result.backends]
        assert any(line.startswith("mAP") and all(value in line for value in values) for line in lines)
    else:  # each backend has a row of its own
        first = next(i for i, line in enumerate(lines) if line.startswith("mAP"))
        for line, spec, scores in zip(lines[first:], ("torch", "emu-fp16"), result.backends, strict=False):
            assert f" {spec} " in f"{line} "
            assert f" {scores.summary['mAP'].value:.3f}" in line
        assert "[" in lines[first + 1], "a difference stands beside its backend"
    assert "emulated: emu-fp16" in "".join(lines)


def test_predictions_come_back_from_their_file(tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    found = [detections(rng, truth(rng)), EMPTY, detections(rng, truth(rng))]
    predictions = {"torch": Predictions.gather(found), "ort@cpu": Predictions.gather([EMPTY] * 3)}
    save_predictions(tmp_path / "p.npz", ["a", "b", "c"], predictions)
    read = np.load(tmp_path / "p.npz", allow_pickle=False)
    assert read["samples"].tolist() == ["a", "b", "c"]
    assert len(read.files) == 1 + 2 * 4
    for spec, expected in predictions.items():
        for field in ("boxes", "scores", "labels", "counts"):
            np.testing.assert_array_equal(read[f"{spec}/{field}"], getattr(expected, field))
    assert [path.name for path in tmp_path.iterdir()] == ["p.npz"]


def test_ranges_on_the_command_line() -> None:
    assert parse_ranges("model", CLASSES) == {}
    assert parse_ranges("nuscenes", CLASSES) == NUSCENES_RANGES
    assert parse_ranges("30", CLASSES) == {"car": 30, "cyclist": 30}
    assert parse_ranges("car=40.5", CLASSES) == {"car": 40.5}
    with pytest.raises(InputError, match="the model has no class 'bus'; its classes are car, cyclist"):
        parse_ranges("car=1,bus=2", CLASSES)
    with pytest.raises(InputError, match="expected model, nuscenes, metres"):
        parse_ranges("far", CLASSES)


class Peaks(nn.Module):
    """A heatmap that is a blurred copy of the picture; what FP16 does to it is not seen at this size."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 3, padding=1, bias=False)
        nn.init.constant_(self.conv.weight, 0.05)
        with torch.no_grad():
            self.conv.weight[0, 0, 1, 1] = 0.6

    def forward(self, picture: torch.Tensor) -> torch.Tensor:
        return self.conv(picture)


@dataclass
class Pictures:
    """Objects are the bright pixels of random pictures: one in metres each way."""

    count: int
    with_truth: bool = True
    name = "pictures"
    notes = ()

    def __len__(self) -> int:
        return self.count

    def sample(self, index: int) -> Sample:
        picture = np.zeros((1, 1, 16, 16), np.float32)
        at = np.random.default_rng(index).permutation(64)[:5]
        rows, columns = at // 8 * 2, at % 8 * 2
        picture[0, 0, rows, columns] = np.linspace(0.5, 1, 5)
        boxes = np.column_stack((columns, rows, np.full((5, 1), 0.5), np.ones((5, 3)), np.zeros(5))).astype(np.float32)
        known = Truth(boxes, np.zeros(5, int), np.zeros((5, 2), np.float32), np.ones(5, int), np.full(5, "still"))
        return Sample({"picture": picture}, f"picture {index}", known if self.with_truth else None)


class PictureModel:
    """The smallest detector: one convolution, a box at every bright pixel."""

    name, class_names, region = "pictures", ("dot",), (-1.0, -1.0, 17.0, 17.0)

    def __init__(self) -> None:
        self.components = [Component("net", ("picture",), ("heat",), Peaks().eval())]

    def samples(self, count: int, seed: int, inputs: Path | None) -> Iterator[Sample]:
        return map(Pictures(count).sample, range(seed, seed + count))

    def data(self, inputs: Path | None, count: int, seed: int, options: DataOptions) -> Pictures:
        return Pictures(count)

    def feed(self, component: Component, sample: Sample, results: Mapping[str, Arrays]) -> dict[str, np.ndarray]:
        return sample.arrays

    def decode(self, sample: Sample, results: Mapping[str, Arrays]) -> Detections:
        heat = results["net"]["heat"][0, 0].astype(np.float32)
        rows, columns = np.nonzero(heat > 0.25)
        boxes = np.column_stack((columns, rows, np.zeros(len(rows)), np.ones((len(rows), 3)), np.zeros((len(rows), 3))))
        return Detections(boxes.astype(np.float32), heat[rows, columns], np.zeros(len(rows), np.int32))


def test_every_backend_sees_every_sample() -> None:
    steps: list[tuple[str, int, int]] = []
    model = as_detector(PictureModel())
    backends = [create(spec) for spec in parse_backends("torch,ort,emu-fp16")]
    result = evaluate(
        model, backends, Pictures(4), EvaluationOptions(draws=20), on_step=lambda *step: steps.append(step)
    )
    assert result.samples == [f"picture {index}" for index in range(4)]
    assert [each.backend.spec for each in result.backends] == ["torch", "ort", "emu-fp16"]
    for index in range(3):
        assert values(result, index)["mAP"] == pytest.approx(1)
        assert result.backends[index].classes["dot"]["found"] == 20
    assert result.options.region == model.region
    assert steps[-1] == ("scoring", 12, 12)
    assert set(result.seconds) == {"export", "load", "forward", "decode", "score"}


def test_data_without_truth_and_models_without_boxes_are_refused(tmp_path: Path) -> None:
    backends = [create(spec) for spec in parse_backends("torch,emu-fp16")]
    with pytest.raises(InputError, match=r"picture 0: has no ground truth; expected an info file \(\.pkl\)"):
        evaluate(as_detector(PictureModel()), backends, Pictures(1, with_truth=False), EvaluationOptions())

    class Plain:
        name = "net.onnx"

    with pytest.raises(InputError, match=r"MODEL: net\.onnx decodes no boxes"):
        as_detector(Plain())  # type: ignore[arg-type]


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cp_debug.quantization.quantized_programs.load_model", lambda *_, **__: PictureModel())
    files = [str(tmp_path / name) for name in ("e.json", "e.csv", "p.npz")]
    (tmp_path / "pictures.py").write_text("def make(): ...")
    wanted = ["eval", f"{tmp_path / 'pictures.py'}:make", "-b", "torch,emu-fp16", "-n", "3", "--draws", "10"]
    done = CliRunner().invoke(app, [*wanted, "--json", files[0], "--csv", files[1], "--predictions", files[2]])
    assert done.exit_code == 0, done.output
    assert "as good as torch" in done.stdout
    assert json.loads(Path(files[0]).read_text())["backends"][0]["summary"]["mAP"]["value"] == pytest.approx(1)
    assert Path(files[1]).read_text().count("\n") == 5
    assert np.load(files[2])["samples"].tolist() == ["picture 0", "picture 1", "picture 2"]

    blind = PictureModel()
    blind.decode = lambda sample, results: (  # type: ignore[method-assign]
        EMPTY if results["net"]["heat"].dtype == np.float16 else PictureModel.decode(blind, sample, results)
    )
    monkeypatch.setattr("cp_debug.quantization.quantized_programs.load_model", lambda *_, **__: blind)
    wanted[3] = "torch,torch-fp16"
    done = CliRunner().invoke(app, [*wanted, "--json", "-"])
    assert done.exit_code == 1, done.output
    assert json.loads(done.stdout)["worse"] == ["torch-fp16"]


@pytest.mark.slow
def test_the_parity_checkpoint_finds_47_of_50_objects(shared: Path, tmp_path: Path) -> None:
    """One to one within 0.5 m in the class's own order of confidence; of the frame's 69 annotations count those of a
    known class, with at least one point, whose centre is in the model's range."""
    info = load_plain_pickle(shared / "data/nuscenes_frame.pkl")["data_list"][0]
    (tmp_path / info["lidar_points"]["lidar_path"]).symlink_to(shared / "data/nuscenes_frame.pcd.bin")
    (tmp_path / "infos.pkl").symlink_to(shared / "data/nuscenes_frame.pkl")
    model = CenterPointModel("nus-pillar02", checkpoint=shared / "parity/state_dict_overfit.pt")
    sample = model.data(tmp_path / "infos.pkl", 1).sample(0)
    with torch.inference_mode():
        found = decode(model.network([torch.from_numpy(sample.arrays["points"])]), model.config)
    runs = {"torch": (record("torch"), Predictions.gather(found))}
    (scores,), _ = score_backends(runs, [sample.truth], model.class_names, EvaluationOptions(region=model.region))
    assert sum(figures["objects"] for figures in scores.classes.values()) == 50
    assert sum(figures["found"] for figures in scores.classes.values()) == 47
    boxes = Predictions.gather(found).as_boxes(model.class_names)
    _, objects = as_boxes([sample.truth], [EMPTY])
    near = [match_centers(boxes.of_class(c), objects.of_class(c), [0.5]) for c in range(10)]
    assert sum((matched >= 0).sum() for matched in near) == 47


def test_engines_are_scored_in_the_interpreter_that_is_named(tmp_path: Path) -> None:
    nothing = tmp_path / "python"
    done = CliRunner().invoke(app, ["eval", "-b", "torch,trt-fp16", "-n", "1", "--trt-python", str(nothing)])
    assert done.exit_code != 0
    assert str(nothing) in str(done.exception) + done.output


def test_backends_in_int8_run_what_quantize_made_and_the_others_the_export(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cp_debug.detection.evaluate.prepare", lambda *given, **how: ["plain"])
    monkeypatch.setattr("cp_debug.detection.evaluate.wants_int8", lambda backend: backend == "int8")
    model: Any = SimpleNamespace(samples=lambda count, seed, inputs: ["s"])
    asked: list[Any] = []

    def quantize(programs: Any, folder: Path) -> Any:
        asked.append((programs, folder))
        return ["in INT8"], "by mse"

    made: Any = lambda *backends: _prepare(model, backends, Path("f"), None, True, quantize)  # type: ignore[arg-type]  # noqa: E731
    assert made("torch", "ort") == ([["plain"], ["plain"]], "")
    assert not asked
    assert made("torch", "int8", "ort") == ([["plain"], ["in INT8"], ["plain"]], "by mse")
    assert asked == [(["plain"], Path("f/int8"))]


def test_each_backends_samples_that_are_not_finite_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"ort": [1.0, np.nan, 3.0], "torch": [1.0, 2.0, 3.0]}
    seen: list[dict[str, int]] = []

    class Running:
        """Stands in for a pipeline that gives one number for each sample."""

        def __init__(self, model: Any, programs: Any, backend: Any) -> None:
            self.backend = backend

        def __enter__(self) -> Any:
            return self

        def __exit__(self, *error: object) -> None: ...

        def run(self, sample: Sample) -> Any:
            return {"net": {"y": np.float32([given[self.backend.spec][int(sample.source)]])}}

        def record(self) -> Any:
            return self.backend

    def scored(runs: Any, truths: Any, names: Any, options: Any, strange: Any, on_step: Any) -> Any:
        seen.append(dict(strange))
        return [], []

    samples = [SimpleNamespace(source=str(i), truth="boxes", arrays={}) for i in range(3)]
    for name, stub in {
        "Pipeline": Running, "score_backends": scored, "Predictions": SimpleNamespace(gather=list),
        "iterate": iter, "Remarks": lambda model: SimpleNamespace(see=lambda sample: None, sentences=[]),
    }.items():  # fmt: skip
        monkeypatch.setattr(f"cp_debug.detection.evaluate.{name}", stub)
    model: Any = SimpleNamespace(
        name="m", components=[SimpleNamespace(name="net")], class_names=["car"], decode=lambda sample, results: results
    )
    backends: Any = [SimpleNamespace(spec=spec) for spec in given]

    class Data(list[Any]):
        name, notes = "data", ()

    options: Any = SimpleNamespace(region=(0, 0, 1, 1))
    found = evaluate(model, backends, Data(samples), options, programs=[])  # type: ignore[arg-type]
    assert seen == [{"ort": 1, "torch": 0}]
    assert found.samples == ["0", "1", "2"]


def test_outputs_are_finite_where_every_float_is() -> None:
    whole, good = np.array([2**40]), np.float32([1, 2])
    assert finite({"a": good, "b": whole, "c": np.array([True])})
    assert finite({})
    for strange in (np.nan, np.inf, -np.inf):
        assert not finite({"a": good, "b": np.float32([1, strange])})


def test_figures_of_a_result_come_back_as_intervals() -> None:
    document = {"backend": "ort", "summary": {"mAP": {"value": 0.5, "low": 0.4, "high": 0.6}}, "not_finite": 2}
    found = BackendScores.fields_from(document)
    assert found["not_finite"] == 2
    assert found["backend"] == "ort"
    assert (found["summary"]["mAP"].value, found["summary"]["mAP"].low, found["summary"]["mAP"].high) == (0.5, 0.4, 0.6)
    assert "difference" not in found
