"""Candidates of causes by themselves: which are tried, where, and what they would make of a layer."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from nets import NetBuilder
from onnx import helper

from cp_debug.bisect.both_sides import Side
from cp_debug.bisect.causes.findings import _unexplained
from cp_debug.bisect.causes.schema import EPSILONS, _shifted, epsilon_of_a_composite
from cp_debug.bisect.options import Options
from cp_debug.bisect.result import GUILTY, INHERITED
from cp_debug.bisect.sides import _OWN_INPUTS, counts_told
from cp_debug.graph.graph import Graph
from cp_debug.graph.made_up import MadeUp
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


def test_what_nothing_explains_is_told_with_what_the_graphs_say() -> None:
    says = "no known cause explains what these layers introduce"
    for differ, told in (([], says), (["a", "b"], f"{says}; the two graphs differ there: a; b")):
        explanation: Any = SimpleNamespace(graphs_differ=differ)
        assert _unexplained(explanation) == told


def test_counts_that_hang_on_values_are_told_of_layers_that_inherit_theirs() -> None:
    def row(index: int, name: str, verdict: str, why: str) -> Any:
        stats = SimpleNamespace(shape=(3,), shape_test=(5,))
        return SimpleNamespace(index=index, name=name, op="NonZero", verdict=verdict, why=why, stats=stats)

    own = "another shape" + _OWN_INPUTS
    rows: Any = dict(
        enumerate([row(2, "b", INHERITED, own), row(1, "a", INHERITED, own), row(0, "c", GUILTY, own),
                   row(3, "d", INHERITED, "another shape")])
    )  # fmt: skip
    told = counts_told(rows)
    assert [line.split(" gives ")[0] for line in told] == ["a (NonZero)", "b (NonZero)"]
    assert told[0].startswith("a (NonZero) gives [5], the reference [3]: how many results it has hangs on the values")


def test_trials_of_made_up_inputs_have_the_first_seed(tmp_path: Path) -> None:
    net = NetBuilder()
    net.op("Neg", "x", name="y")
    made = MadeUp(Graph(net.save(tmp_path / "n.onnx", {"x": (1, [2, 3])}, ["y"])))
    trial = made.make(made._chosen)["x"]
    assert np.array_equal(trial, made._make(made._chosen, 0)["x"])
    assert not np.array_equal(trial, made._make(made._chosen, 1)["x"])


@pytest.mark.parametrize("parts", [None, {}, {"net": "in INT8"}])
def test_a_side_says_where_its_int8_is_from(monkeypatch: pytest.MonkeyPatch, parts: Any) -> None:
    monkeypatch.setattr("cp_debug.bisect.both_sides.load_quantized", lambda name, *how: (name, parts))
    side = Side.load("net.onnx", Path("a.pt"), Options())
    assert side.model == "net.onnx"
    assert (side.parts, side.how) == ((parts, "quantized as in a.pt") if parts else (None, ""))
