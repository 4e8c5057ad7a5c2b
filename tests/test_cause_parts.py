"""Candidates of causes by themselves: which are tried, where, and what they would make of a layer."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from onnx import helper

from cp_debug.bisect.causes.schema import EPSILONS, _shifted, epsilon_of_a_composite
from cp_debug.programs.scene import FOLDER, keep_scene
from cp_debug.recipes.base import Sample


def node(op: str, *inputs: str) -> Any:
    return SimpleNamespace(op=op, name="node", outputs=["y"], proto=helper.make_node(op, inputs, ["y"]))


@pytest.mark.parametrize(
    ("reader", "declared", "tried"),
    [("Sqrt", 1e-5, True), ("Pow", 1e-5, True), ("Reciprocal", 1e-5, True), ("Relu", 1e-5, False), ("Sqrt", 0.0, False),
     ("Sqrt", max(EPSILONS), True), ("Sqrt", 2 * max(EPSILONS), False)],
)  # fmt: skip
def test_another_epsilon_is_tried_where_a_number_is_added_before_a_root(
    reader: str, declared: float, tried: bool
) -> None:
    edits = []

    def edited(own: Any, inputs: dict[int, torch.Tensor]) -> torch.Tensor:
        edits.append({place: float(value) for place, value in inputs.items()})
        return torch.zeros(1)

    segment: Any = SimpleNamespace(
        nodes=[node("Mul", "a", "b"), node("Add", "x", "eps")],
        graph=SimpleNamespace(consumers={"y": [node(reader, "y")]}),
        weight=lambda own, place: torch.tensor(declared, dtype=torch.float64) if place == 1 else None,
        edited=edited,
    )
    found = list(epsilon_of_a_composite(segment))
    expected = [eps for eps in EPSILONS if eps != declared] if tried else []
    assert [candidate.evidence for candidate in found] == [{"eps": e, "instead_of": declared} for e in expected]
    assert len(edits) == (len(EPSILONS) if tried else 0)
    assert all(list(edit) == [1] for edit in edits)


def moved(op: str, **constants: list[int]) -> list[tuple[dict[int, list[int]], str]]:
    values = {name: torch.tensor(numbers) for name, numbers in constants.items()}

    class Known(dict[str, torch.Tensor]):
        holds = dict.__contains__

    segment: Any = SimpleNamespace(context=SimpleNamespace(constants=Known(values)), given={}, input=None)
    found = _shifted(segment, node(op, "x", *constants))
    return [({place: value.tolist() for place, value in inputs.items()}, says) for inputs, says in found]


def test_indices_are_tried_one_later_and_one_earlier() -> None:
    assert moved("Gather", indices=[3, 5]) == [({1: [4, 6]}, "one later"), ({1: [2, 4]}, "one earlier")]
    assert moved("Slice", starts=[2], ends=[9]) == [
        ({1: [3], 2: [10]}, "one later"), ({1: [3]}, "begins one later"), ({2: [10]}, "ends one later"),
        ({1: [1], 2: [8]}, "one earlier"), ({1: [1]}, "begins one earlier"), ({2: [8]}, "ends one earlier"),
    ]  # fmt: skip
    assert moved("Pad", pads=[0, 1, 0, 2]) == [
        ({1: [1, 1, -1, 2]}, "axis 0, one later"), ({1: [-1, 1, 1, 2]}, "axis 0, one earlier"),
        ({1: [0, 2, 0, 1]}, "axis 1, one later"), ({1: [0, 0, 0, 3]}, "axis 1, one earlier"),
    ]  # fmt: skip
    assert moved("Relu", indices=[1]) == []


class Boxes:
    """Detections as a model decodes them."""

    class_names = ("car", "bus")

    def __init__(self, x: float) -> None:
        self.boxes = np.full((1, 7), x, np.float32)
        self.scores, self.labels = np.float32([0.5]), np.array([1])


def test_a_scene_keeps_points_and_the_boxes_of_each_backend(tmp_path: Path) -> None:
    from cp_debug.probes.capture import Capture

    sample = Sample({"points": np.ones((2, 4), np.float32)}, "cloud.bin")
    keep_scene(tmp_path, sample, {"torch": "no boxes"})
    assert not (tmp_path / FOLDER).exists()
    keep_scene(tmp_path, sample, {"torch": Boxes(1.0), "ort": Boxes(2.0), "other": "no boxes"})
    capture = Capture.open(tmp_path / FOLDER)
    assert capture.load("points").shape == (2, 4)
    assert [float(capture.load("boxes", component=spec)[0, 0]) for spec in ("torch", "ort")] == [1.0, 2.0]
    assert capture.manifest["class_names"] == ["car", "bus"]
    assert capture.manifest["samples"] == ["cloud.bin"]
