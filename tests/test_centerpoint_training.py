"""Targets and loss against their definitions, and the shipped weights against held-out scenes."""

from __future__ import annotations

import json
import math
import re
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import typer
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from train_tiny import main, score_table
from typer.testing import CliRunner

from cp_debug.quantization.qat_centerpoint import Example, evaluate
from cp_debug.recipes.centerpoint.config import HEAD_CHANNELS, OUTPUT_ORDER, TINY
from cp_debug.recipes.centerpoint.decode import decode
from cp_debug.recipes.centerpoint.loss import centerpoint_loss, gaussian_focal_loss, gaussian_radius, make_targets
from cp_debug.recipes.centerpoint.model import build_model
from cp_debug.recipes.centerpoint.recipe import WEIGHTS
from cp_debug.recipes.centerpoint.scenes import CLASSES, HELD_OUT_SEED, generate_scene
from cp_debug.recipes.checkpoint import load_checkpoint

app = typer.Typer()
app.command()(main)


def perfect_outputs(targets, batch_size):
    """The maps that a model without error would give for these targets."""
    outputs = {}
    names = iter(TINY.output_names)
    for task in targets:
        values = task.values.split(list(HEAD_CHANNELS.values()), dim=1)
        heads = dict(zip(HEAD_CHANNELS, values, strict=True))
        for head in OUTPUT_ORDER:
            if head == "heatmap":
                outputs[next(names)] = torch.logit(task.heatmap, eps=1e-6)
                continue
            canvas = torch.zeros(batch_size, HEAD_CHANNELS[head], *task.heatmap.shape[2:])
            canvas[task.sample, :, task.row, task.column] = heads[head]
            outputs[next(names)] = canvas
    return outputs


def test_classes_are_those_of_the_model():
    assert tuple(CLASSES) == TINY.class_names


def test_targets_decode_to_the_boxes_they_were_made_from():
    examples = [Example.of(generate_scene(seed)) for seed in (3, 4)]
    targets = make_targets([each.boxes for each in examples], [each.labels for each in examples], TINY)
    for example, found in zip(examples, decode(perfect_outputs(targets, 2), TINY), strict=True):
        best = found.scores > 0.99  # cells beside a peak score less
        boxes, labels = found.boxes[best], found.labels[best]
        boxes[:, 2] += boxes[:, 5] / 2
        expected, wanted = np.lexsort((example.boxes[:, 0],)), np.lexsort((boxes[:, 0],))
        np.testing.assert_allclose(boxes[wanted], example.boxes.numpy()[expected], atol=1e-4)
        assert labels[wanted].tolist() == example.labels[torch.from_numpy(expected)].tolist()


def test_heatmap_of_one_box():
    """A car of 4.8 by 2 m in the cell (column 40, row 24) of 0.8 m: written out by hand from CornerNet's formulas."""
    box = torch.tensor([[6.5, -6.1, -1.0, 4.8, 2.0, 1.6, 0.3, 1.0, 2.0]])
    car, others = make_targets([box], [torch.tensor([0])], TINY)
    assert others.heatmap.max() == 0 and len(others.values) == 0  # noqa: PT018
    length, width = 4.8 / 0.8, 2.0 / 0.8
    radius = max(2, int(gaussian_radius(torch.tensor([length]), torch.tensor([width]))))
    heatmap = car.heatmap[0, 0]
    assert (heatmap > 0).sum() == (2 * radius + 1) ** 2
    assert heatmap[24, 40] == 1
    assert heatmap[25, 42] == pytest.approx(math.exp(-5 / (2 * ((2 * radius + 1) / 6) ** 2)))
    assert car.heatmap[0, 1].max() == 0
    expected = [0.125, 0.375, -1.0, math.log(4.8), math.log(2), math.log(1.6), math.sin(0.3), math.cos(0.3), 1, 2]
    assert car.values[0].tolist() == pytest.approx(expected, abs=1e-5)


@given(st.floats(0.5, 40), st.floats(0.5, 40))
def test_gaussian_radius_is_the_smallest_of_cornernets_roots(length, width):
    radius = float(gaussian_radius(torch.tensor([length]), torch.tensor([width])))
    total, area = length + width, length * width
    roots = [
        (total + math.sqrt(total**2 - 4 * area * 0.9 / 1.1)) / 2,
        (2 * total + math.sqrt(4 * total**2 - 16 * 0.9 * area)) / 2,
        (-0.2 * total + math.sqrt(0.04 * total**2 + 1.6 * 0.9 * area)) / 2,
    ]
    assert radius == pytest.approx(min(roots), rel=1e-4)


def test_focal_loss_by_hand():
    target = torch.tensor([1.0, 0.5, 0.0])
    score = torch.tensor([0.8, 0.3, 0.2])
    expected = (
        -math.log(0.8) * 0.2**2 - math.log(0.7) * 0.3**2 * 0.5**4 - math.log(0.8) * 0.2**2
    )  # one peak: divided by 1
    assert float(gaussian_focal_loss(torch.logit(score), target)) == pytest.approx(expected, rel=1e-5)


def test_loss_of_perfect_boxes_is_zero_and_velocity_weighs_a_fifth():
    example = Example.of(generate_scene(5))
    targets = make_targets([example.boxes], [example.labels], TINY)
    outputs = perfect_outputs(targets, 1)
    assert float(centerpoint_loss(outputs, targets).box) == 0
    outputs["task0.vel"] += 1.0
    assert float(centerpoint_loss(outputs, targets).box) == pytest.approx(0.25 * 2 * 0.2, rel=1e-3)
    outputs["task1.reg"] += 1.0
    assert float(centerpoint_loss(outputs, targets).box) == pytest.approx(0.25 * (2 * 0.2 + 2), rel=1e-3)


def test_loss_without_objects_is_finite():
    empty = make_targets([torch.zeros(0, 9)], [torch.zeros(0, dtype=torch.long)], TINY)
    outputs = perfect_outputs(empty, 1)
    assert torch.isfinite(centerpoint_loss(outputs, empty).total)


@settings(deadline=None, max_examples=10)
@given(st.integers(0, 1000))
def test_augmentation_moves_points_and_boxes_alike(seed):
    """In each box's own frame its points keep their (mirrored, scaled) places; a step along the velocity stays one."""
    scene = generate_scene(7)
    example = Example.of(scene)
    changed = example.augmented(np.random.default_rng(seed))
    scale = float(changed.boxes[0, 3] / example.boxes[0, 3])
    assert 0.95 <= scale <= 1.05
    for index in range(len(example.boxes)):
        before, after = (in_box_frame(each, scene.source == index, index) for each in (example, changed))
        np.testing.assert_allclose(after[:, [0, 2]], before[:, [0, 2]] * scale, atol=1e-3)
        np.testing.assert_allclose(np.abs(after[:, 1]), np.abs(before[:, 1]) * scale, atol=1e-3)
        heading = torch.tensor([changed.boxes[index, 6].cos(), changed.boxes[index, 6].sin()])
        speed = example.boxes[index, 7:9].norm() * scale
        np.testing.assert_allclose(changed.boxes[index, 7:9], heading * speed, atol=1e-3)


def in_box_frame(example, chosen, index):
    box = example.boxes[index].double().numpy()
    offset = example.points[torch.from_numpy(chosen), :3].double().numpy() - box[:3]
    cos, sin = math.cos(box[6]), math.sin(box[6])
    return offset @ np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]])


@pytest.mark.slow
def test_shipped_weights_detect_what_they_never_saw():
    model = build_model(TINY)
    weights = WEIGHTS / "tiny.safetensors"
    load_checkpoint(model, weights)
    assert weights.stat().st_size < 4e6
    examples = [Example.of(generate_scene(HELD_OUT_SEED + index)) for index in range(12)]
    assert evaluate(model, examples).mean() >= 0.8
    assert evaluate(build_model(TINY), examples).mean() < 0.2  # it is the weights that detect


@pytest.mark.slow
def test_training_lowers_the_loss_and_its_file_loads(tmp_path):
    """The command itself, from scenes to file, at the smallest size."""
    out = tmp_path / "tiny.safetensors"
    arguments = ["--out", str(out), "--scenes", "2", "--held-out", "1", "--epochs", "4", "--batch", "1"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    losses = [float(text) for text in re.findall(r"mean loss ([\d.]+)", result.output)]
    assert losses[-1] < losses[0]
    load_checkpoint(build_model(TINY), out)
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.safetensors"]
    with safe_open(out, "pt") as file:
        assert json.loads(file.metadata()["training"])["scenes"] == 2


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "either --out or --evaluate"),
        (["--out", "a", "--evaluate", "b"], "either --out or --evaluate"),
        (["--out", "no/such/folder/a.safetensors"], "no such folder"),
        (["--out", "a", "--device", "tpu9"], "device"),
        (["--evaluate", "missing.safetensors"], "missing.safetensors"),
    ],
)
def test_bad_usage_is_refused_before_any_work(arguments, sentence):
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})
    assert result.exit_code == 2
    assert sentence in result.output


def test_the_table_of_scores_has_a_row_for_each_class() -> None:
    config: Any = SimpleNamespace(class_names=("car", "bus"))
    table = score_table(np.array([[0.1, 0.2, 0.3, 0.4], [1.0, 1.0, 0.5, 0.5]]), config, 7)
    columns = [list(column.cells) for column in table.columns]
    assert columns[0] == ["car", "bus"]
    assert columns[-1] == ["0.250", "0.750"]
    assert columns[2] == ["0.200", "1.000"]
    assert table.title == "7 held-out scenes: mAP 0.500"
