"""NaN and Inf on both sides, empty clouds, clouds out of range, columns of point files: never a plain pass."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from test_cli import run

from cp_debug.backends.base import RunRecord
from cp_debug.backends.registry import create
from cp_debug.backends.spec import BackendSpec
from cp_debug.bisect.engine import Options, bisect
from cp_debug.bisect.result import BisectResult, TestResult, undecided
from cp_debug.deploy.interface_checks import _cells, _in_range, _padded, compare_voxels, voxelize_on
from cp_debug.deploy.verify import ScenarioResult, TensorCheck, reasons, what_is_wrong
from cp_debug.detection.evaluate import evaluate
from cp_debug.detection.evaluation import EvaluationOptions
from cp_debug.probes.distance import distance, relative_l2
from cp_debug.probes.statistics import compare
from cp_debug.probes.statistics_reduce import reduce_pair
from cp_debug.recipes.base import Sample
from cp_debug.recipes.centerpoint.config import CONFIGS
from cp_debug.recipes.centerpoint.recipe import CenterPointModel
from cp_debug.recipes.data.open_data import FolderData
from cp_debug.recipes.data.points import read_points
from cp_debug.reports.tables import layer_table
from cp_debug.reports.verdict_line import verdict_line
from cp_debug.serialize import decode

CONSTANTS = {"hundred": 100.0, "zero": 0.0, "minus": -1.0, "nan": float("nan"), "inf": float("inf")}
FEATURES = ("x", "y", "z", "intensity", "dt")


def net(
    folder: Path, ops: list[tuple[str, list[str], str]], outputs: list[str], name: str = "net.onnx", **others: float
) -> Path:
    """``x`` [1, 4] through operators (type, inputs, result); ``CONSTANTS`` and ``others`` are known."""
    nodes = [helper.make_node(op, inputs, [made], name=f"node_{made}") for op, inputs, made in ops]
    given = [helper.make_tensor_value_info("x", 1, [1, 4])]
    shown = [helper.make_tensor_value_info(name, 1, [1, 4]) for name in outputs]
    read = {name for _, names, _ in ops for name in names}
    held = {n: value for n, value in (CONSTANTS | others).items() if n in read}
    constants = [numpy_helper.from_array(np.full(1, value, np.float32), n) for n, value in held.items()]
    graph = helper.make_graph(nodes, "net", given, shown, constants)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), folder / name)
    return folder / name


def judged(path: Path, x: list[float], backends: str = "ort,ort-all") -> TestResult:
    np.savez(path.with_name("x.npz"), x=np.array([x], np.float32))
    return bisect(str(path), backends, options=Options(inputs=path.with_name("x.npz"))).tests[0]


def test_nan_that_both_sides_mask_is_said_and_passes(tmp_path: Path) -> None:
    ops = [
        ("Sub", ["x", "hundred"], "s"),
        ("Log", ["s"], "l"),
        ("IsNaN", ["l"], "n"),
        ("Where", ["n", "zero", "l"], "y"),
    ]
    test = judged(net(tmp_path, ops, ["y"]), [1, 2, 3, 4])
    assert test.agrees
    assert "NaN first appears at node_l (Log) on both sides; it reaches no output" in test.notes


def test_nan_on_both_sides_is_no_pass_and_is_traced_to_its_birth(tmp_path: Path) -> None:
    path = net(tmp_path, [("Sub", ["x", "hundred"], "s"), ("Log", ["s"], "l"), ("Add", ["l", "x"], "y")], ["y"])
    test = judged(path, [1, 2, 3, 4])
    assert not test.agrees
    assert not test.guilty
    text = verdict_line(test).plain
    assert text.startswith("✗ ort-all: nothing is decided")
    assert "output node_y is not finite (reference 4 NaN; test 4 NaN; of 4 elements)" in text
    assert "NaN first appears at node_l (Log) on both sides" in text
    assert test.to_dict()["not_finite"] == test.not_finite


def test_nan_of_the_input_is_said_to_come_in(tmp_path: Path) -> None:
    path = net(tmp_path, [("Add", ["x", "hundred"], "y")], ["y"])
    test = judged(path, [1, float("nan"), 3, 4])
    assert not test.agrees
    assert "NaN comes in with the input x on both sides" in test.not_finite


@pytest.mark.parametrize("x", [[1, -2, 3, -4], [1, 2, 3, 4], [-1, -2, -3, 4]])
def test_inf_at_the_same_places_passes_where_the_rest_is_finite_and_is_said(tmp_path: Path, x: list[float]) -> None:
    path = net(tmp_path, [("Div", ["x", "zero"], "d"), ("Max", ["d", "x"], "y")], ["y"])
    test = judged(path, x)
    nothing = min(x) > 0  # Inf everywhere
    assert test.agrees != nothing
    text = verdict_line(test)
    assert text.plain.startswith("✗ ort-all: nothing is decided" if nothing else "✓ ort-all: agrees")
    assert ("no number of the final outputs could be compared" in text.plain) == nothing
    assert "Inf first appears at node_d (Div) on both sides" in text.plain
    assert "green" not in str(text.spans[0].style)


def test_inf_that_only_one_side_has_never_passes(tmp_path: Path) -> None:
    """Even without a tolerance: an infinite one lets through what is finite."""
    assert undecided(row_of([1.0, np.inf], [1.0, 2.0]))
    assert undecided(row_of([1.0, np.inf], [1.0, -np.inf]))
    assert not undecided(row_of([1.0, -np.inf], [1.0, -np.inf]))
    assert undecided(row_of([-np.inf], [-np.inf]))


def row_of(reference: list[float], test: list[float]) -> SimpleNamespace:
    return SimpleNamespace(stats=compare(np.array(reference), np.array(test)), index=0, name="y", op="")


@pytest.mark.parametrize(
    ("ops", "outputs", "says"),
    [
        (
            [("Sqrt", ["minus"], "s"), ("Add", ["x", "s"], "y")],
            ["y"],
            "NaN first appears at node_s (Sqrt) on both sides",
        ),
        ([("Add", ["x", "nan"], "y")], ["y"], "NaN comes in with the constant nan on both sides"),
        ([("Abs", ["x"], "z"), ("Max", ["z", "inf"], "y")], ["y", "z"], "Inf comes in with the constant inf on both"),
    ],
)
@pytest.mark.parametrize("backends", ["ort,ort-all", "torch,ort", "ort,emu-fp32"])
def test_constants_and_nodes_that_read_nothing_else_are_named_as_origin(
    tmp_path: Path, ops: list[tuple[str, list[str], str]], outputs: list[str], says: str, backends: str
) -> None:
    net(tmp_path, ops, outputs)
    np.savez(tmp_path / "x.npz", x=np.array([[1, 2, 3, 4]], np.float32))
    result = bisect(str(tmp_path / "net.onnx"), backends, options=Options(inputs=tmp_path / "x.npz"))
    read = decode(BisectResult, result.to_dict(), "result.json")
    assert says in verdict_line(result.tests[0]).plain
    assert says in verdict_line(read.tests[0]).plain


def test_what_is_nan_on_both_sides_has_no_figures_and_no_share(tmp_path: Path) -> None:
    ops = [("Mul", ["x", "hundred"], "m"), ("Sqrt", ["minus"], "s"), ("Add", ["m", "s"], "y")]
    path = net(tmp_path, ops, ["y"])
    other = net(tmp_path, ops, ["y"], name="other.onnx", hundred=300)
    test = bisect(str(path), "ort,ort", test_model=other).tests[0]
    assert [(row.onnx, row.share) for row in test.guilty] == [("m", None)]
    text = " ".join([verdict_line(test).plain, *map(str, layer_table(test).rows)])
    assert "nan%" not in text
    assert "differ by 0" not in text
    assert "no number of the final outputs could be compared" in text
    assert "not compared" in text


def test_an_output_that_is_partly_nan_leaves_the_shares_of_the_rest(tmp_path: Path) -> None:
    ops = [("Mul", ["x", "hundred"], "m"), ("Sqrt", ["x"], "s"), ("Add", ["m", "s"], "y")]
    path = net(tmp_path, ops, ["y"])
    other = net(tmp_path, ops, ["y"], name="other.onnx", hundred=300)
    np.savez(tmp_path / "x.npz", x=np.array([[1, 2, -3, 4]], np.float32))
    result = bisect(str(path), "ort,ort", test_model=other, options=Options(inputs=tmp_path / "x.npz"))
    assert result.tests[0].guilty[0].share == pytest.approx(1, abs=0.05)


def test_minus_inf_that_masks_inside_the_network_is_fine(tmp_path: Path) -> None:
    ops = [("Div", ["x", "zero"], "mask"), ("Min", ["mask", "zero"], "m"), ("Add", ["m", "x"], "s")]
    test = judged(net(tmp_path, [*ops, ("Softmax", ["s"], "y")], ["y"]), [1, -2, 3, -4])
    assert test.agrees
    assert not test.not_finite
    assert verdict_line(test).plain.startswith("✓")


@pytest.mark.parametrize("op", ["Div", "Log"])
def test_every_face_says_that_an_output_is_not_finite(tmp_path: Path, op: str) -> None:
    inputs = ["x", "zero"] if op == "Div" else ["x"]
    path = net(tmp_path, [(op, inputs, "d"), ("Relu", ["x"], "z")], ["d", "z"])
    np.savez(tmp_path / "x.npz", x=np.array([[1, -2, 3, -4]], np.float32))
    kept, page = tmp_path / "kept", tmp_path / "page.html"
    argv = ["bisect", path, "-b", "ort,ort-all", "--inputs", tmp_path / "x.npz", "--save", kept, "--html", page]
    code, text = run(*argv)
    assert code == 1
    assert "nothing is decided" in text
    document = json.loads((kept / "result.json").read_text())
    assert document["agrees"] is False
    assert "is not finite" in document["not_finite"]
    shown = page.read_text(encoding="utf-8")
    assert "✗ not finite" in shown
    assert "✓ agrees" not in shown
    for kind, part in (("markdown", "nothing is decided"), ("junit", 'failures="1"'), ("github", "::error")):
        code, text = run("report", kept, "-f", kind)
        assert part in text, kind


def test_a_search_by_outputs_that_are_not_finite_is_refused(tmp_path: Path) -> None:
    path = net(tmp_path, [("Div", ["x", "zero"], "y")], ["y"])
    np.savez(tmp_path / "x.npz", x=np.ones((1, 4), np.float32))
    code, text = run("search", path, "-b", "ort,emu-fp16", "--goal", "rel_l2<0.1", "--inputs", tmp_path / "x.npz")
    assert code == 2
    assert "no goal can be judged: y is NaN or Inf everywhere" in text
    np.savez(tmp_path / "x.npz", x=np.array([[1, 0, 2, 3]], np.float32))
    code, text = run("search", path, "-b", "ort,emu-fp16", "--goal", "rel_l2<0.1", "--inputs", tmp_path / "x.npz")
    assert code == 2
    assert "the reference's output y holds 1 NaN of 4 elements" in text


def test_what_is_finite_says_nothing(tmp_path: Path) -> None:
    test = judged(net(tmp_path, [("Relu", ["x"], "y")], ["y"]), [1, -2, 3, 4])
    assert test.agrees
    assert not test.not_finite


def test_the_command_ends_with_1(tmp_path: Path) -> None:
    path = net(tmp_path, [("Sub", ["x", "hundred"], "s"), ("Sqrt", ["s"], "y")], ["y"])
    np.savez(tmp_path / "x.npz", x=np.ones((1, 4), np.float32))
    code, text = run("bisect", path, "-b", "ort,emu-fp32", "--inputs", tmp_path / "x.npz")
    assert code == 1
    assert "nothing is decided" in text


def test_verification_does_not_blame_the_export_for_the_models_own_nan() -> None:
    record = RunRecord("ort", "fp32", "cpu", False, {}, {})

    def said(reference: np.ndarray, test: np.ndarray) -> str:
        stats = compare(reference, test)
        check = TensorCheck("net", "y", stats, 0.0, 1.0, "x.npz", what_is_wrong(stats, 1.0, None))
        return "; ".join(reasons(ScenarioResult(record, record, [check], {}, None, {})))

    nan, ones = np.array([np.nan, 1], np.float32), np.ones(2, np.float32)
    assert "1 NaN or Inf; the reference has the same 1 NaN or Inf: they come from the model or its input" in said(
        nan, nan
    )
    assert "the reference has" not in said(ones, nan)
    assert "the reference holds 1 NaN or Inf, the test none" in said(nan, ones)
    inf = np.array([np.inf, 1], np.float32)
    assert said(inf, inf) == ""
    assert "1 NaN or Inf" in said(inf, -inf)
    assert "the reference holds 1 NaN or Inf, the test none" in said(inf, ones)
    assert "2 NaN or Inf" in said(inf[[0, 0]], inf[[0, 0]])


@pytest.mark.parametrize(
    ("points", "said"),
    [
        (np.zeros((0, 5)), ["the cloud is empty"]),
        (np.full((7, 5), 1e4), ["none of the 7 points is in the model's range"]),
        (np.array([[1, 1, 0, np.nan, 0], [2, 2, 0, 1, 0]]), ["1 of 2 points hold NaN or Inf"]),
        (np.ones((3, 5)), []),
    ],
)
def test_odd_clouds_get_a_remark(tmp_path: Path, points: np.ndarray, said: list[str]) -> None:
    np.save(tmp_path / "cloud.npy", points.astype(np.float32))
    model = CenterPointModel("tiny")
    (sample,) = model.samples(1, 0, tmp_path / "cloud.npy")
    remarks = model.remarks(sample)
    assert len(remarks) == len(said)
    assert all(text in remark for text, remark in zip(said, remarks, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize(
    "argv",
    [
        pytest.param(["check"], marks=pytest.mark.slow),
        pytest.param(["predict", "--precision", "fp16"], marks=pytest.mark.slow),
        ["verify", "--no-explain", "--scenario", "torch,ort"],
    ],
)
def test_every_command_remarks_on_an_empty_cloud(tmp_path: Path, argv: list[str]) -> None:
    np.save(tmp_path / "cloud.npy", np.zeros((0, 5), np.float32))
    command, *options = argv
    given = ["centerpoint:tiny", "--inputs", tmp_path / "cloud.npy"]
    _, text = run(command, *given, *options)
    assert "the cloud is empty" in " ".join(text.split())


@pytest.mark.slow
def test_an_evaluation_remarks_on_empty_clouds_and_on_outputs_that_are_not_finite() -> None:
    model = CenterPointModel("tiny")
    (scene,) = model.samples(1, 0, None)
    empty = [Sample({"points": np.zeros((0, 5), np.float32)}, f"{i}.npy", scene.truth) for i in range(10)]

    class Clouds:
        name = "clouds"
        notes: tuple[str, ...] = ()

        def __len__(self) -> int:
            return len(empty)

        def sample(self, index: int) -> Sample:
            return empty[index]

    module = model.components[-1].module
    assert module is not None
    *_, (_, last) = module.named_parameters()
    with torch.no_grad():
        last[:] = torch.nan
    backends = [create(BackendSpec.parse(spec)) for spec in ("torch", "ort")]
    result = evaluate(model, backends, Clouds(), EvaluationOptions(draws=0))
    assert sum("the cloud is empty" in note for note in result.notes) == 8
    assert "and 2 more notes of this kind on other samples" in result.notes
    assert f"{backends[1].spec}: the outputs hold NaN or Inf on 10 of 10 samples" in result.notes


def test_no_pillars_are_compared_without_a_traceback() -> None:
    config, points = CONFIGS["tiny"], np.zeros((0, 5), np.float32)
    voxels = voxelize_on(points, config, "cpu")
    change = compare_voxels(voxels, voxels, points, config)
    assert change.agrees
    assert str(change).startswith("no pillar on either side: the cloud is empty, or none of its points is in range")


def cloud(columns: int, rows: int = 40) -> np.ndarray:
    rng = np.random.default_rng(0)
    made = rng.uniform(-50, 50, (rows, columns)).astype(np.float32)
    made[:, 3] = rng.integers(0, 256, rows)
    if columns == 5:
        made[:, 4] = rng.integers(0, 32, rows)
    return made


@pytest.mark.parametrize(("name", "columns"), [("a.bin", 4), ("a.bin", 5), ("a.pcd.bin", 4), ("a.pcd.bin", 5)])
def test_a_size_that_fits_both_widths_is_decided_by_content(tmp_path: Path, name: str, columns: int) -> None:
    made = cloud(columns)
    made.tofile(tmp_path / name)
    np.testing.assert_array_equal(read_points(tmp_path / name, FEATURES)[:, :4], made[:, :4])
    source = FolderData(tmp_path, FEATURES, 1).sample(0).source
    unusual = columns != (5 if ".pcd" in name else 4)
    assert source.endswith(f" ({columns} columns, by its content)") == unusual


def test_a_coordinate_that_fp32_cannot_hold_is_inf_without_a_warning(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    np.save(tmp_path / "a.npy", np.full((3, 5), 1e300))
    assert np.isinf(read_points(tmp_path / "a.npy", FEATURES)).all()
    assert not recwarn.list


def test_a_cloud_that_could_be_either_is_read_by_its_ending(tmp_path: Path) -> None:
    np.zeros((20, 4), np.float32).tofile(tmp_path / "zeros.bin")
    assert read_points(tmp_path / "zeros.bin", FEATURES).shape == (20, 5)
    assert "5 fit its size, too, and its content does not tell" in FolderData(tmp_path, FEATURES, 1).sample(0).source
    (tmp_path / "zeros.bin").rename(tmp_path / "zeros.pcd.bin")
    assert read_points(tmp_path / "zeros.pcd.bin", FEATURES).shape == (16, 5)
    assert "5 columns, by its ending; 4 fit its size, too" in FolderData(tmp_path, FEATURES, 1).sample(0).source


def test_a_fifth_column_may_be_the_age_of_points_and_intensity_may_be_nan(tmp_path: Path) -> None:
    made = cloud(5)
    made[:, 4] = np.repeat(np.arange(4) * 0.05, 10)
    made[7, 3] = np.nan
    made.tofile(tmp_path / "sweeps.bin")
    np.testing.assert_array_equal(read_points(tmp_path / "sweeps.bin", FEATURES), made)
    source = FolderData(tmp_path, FEATURES, 1).sample(0).source
    assert source.endswith(" (5 columns, the last as dt, by its content)")


@pytest.mark.parametrize("size", [3, 5000])
def test_inf_of_the_other_sign_is_born_wherever_it_is_measured(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = (torch.ones(size, dtype=torch.float64) for _ in range(2))
    ours[:2], theirs[:2] = torch.tensor([-torch.inf, torch.inf]), torch.inf
    for dtype in (torch.float64, torch.float32, torch.float16):
        x, y = ours.to(dtype), theirs.to(dtype)
        for device in ("cpu", "cpu:0"):  # the second is taken for a device
            monkeypatch.setattr("cp_debug.probes.arrays.device_of", lambda tensor, device=device: device)
            assert distance(x, y).new_nonfinite == 1
            assert relative_l2(x, y) == math.inf
    for totals in (reduce_pair(theirs.numpy(), ours.numpy()), reduce_pair(theirs, ours)):
        assert (totals.whole.mismatched, totals.max_abs) == (1, math.inf)


def test_a_layer_that_makes_inf_of_the_other_sign_is_guilty(tmp_path: Path) -> None:
    """The reference divides by zero, the test by minus zero; the layer behind it is innocent."""
    ops = [("Add", ["x", "one"], "a"), ("Div", ["a", "zero"], "d"), ("Identity", ["d"], "y")]
    right = net(tmp_path, ops, ["y"], zero=0.0, one=1.0)
    wrong = net(tmp_path, ops, ["y"], "wrong.onnx", zero=-0.0, one=1.0)
    np.savez(tmp_path / "x.npz", x=np.array([[1.0, 2.0, 3.0, 4.0]], np.float32))
    options = Options(inputs=tmp_path / "x.npz")
    test = bisect(str(right), "ort,ort-none", test_model=wrong, options=options).tests[0]
    assert not test.agrees
    assert [row.onnx for row in test.guilty] == ["d"]


def test_pillars_are_numbered_by_cell_and_padded_behind() -> None:
    config: Any = SimpleNamespace(
        grid=(10, 20, 1), point_cloud_range=(-1.0, -2.0, -3.0, 1.0, 2.0, 3.0), voxel_size=(0.2, 0.2, 6.0)
    )
    import torch

    voxels: Any = SimpleNamespace(coors=torch.tensor([[0, 0, 0, 3], [0, 0, 2, 1], [0, 1, 0, 0]]))
    assert _cells(voxels, config).tolist() == [3, 21, 200]
    assert _padded(np.ones((1, 2, 3)), 4).sum(axis=2).tolist() == [[3, 3, 0, 0]]
    points = np.array(
        [[-1, -2, -3, 9], [0.99, 1.99, 2.9, 0], [1, 0, 0, 0], [0, 2, 0, 0], [0, 0, 3, 0], [-1.01, 0, 0, 0]]
    )
    assert _in_range(points.astype(np.float32), config) == 2
