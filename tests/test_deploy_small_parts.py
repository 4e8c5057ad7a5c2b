"""Small parts of a deployment and of detections, with results worked out by hand: limits, defaults, sizes, samples."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from extras import needs
from numpy.testing import assert_allclose
from onnx import TensorProto, helper, numpy_helper
from test_deploy_config import write
from typer.testing import CliRunner

from cp_debug.backends.narrow_options import NarrowOptions
from cp_debug.cli.main import app
from cp_debug.deploy import quantize_narrow
from cp_debug.deploy.bench import Latency
from cp_debug.deploy.config import load_config
from cp_debug.deploy.engines import BuiltEngine
from cp_debug.deploy.exporting import compared_outputs, resized, shapes_of, worst_output
from cp_debug.deploy.preprocessing import _cells, _in_range, _padded
from cp_debug.deploy.quantize_output import quantize_ptq
from cp_debug.detection import t4_draws
from cp_debug.detection.curves import Hits, _drawn_neighbours, _line, _running_means
from cp_debug.detection.detection_change import DetectionChange
from cp_debug.errors import InputError
from cp_debug.mixed_precision.fake_quant_runner import ErrorSum
from cp_debug.mixed_precision.goal import _excess
from cp_debug.mixed_precision.judge import _or_infinite
from cp_debug.mixed_precision.sensitivity import _loss, check_budget
from cp_debug.mixed_precision.trial import Measured
from cp_debug.recipes.registry import load_model

CALLS = "export = dict(mode='both', work_dir='w')\ndef f(n):\n  return n\n"


def product(folder: Path) -> Path:
    """An ONNX file of one product and an activation."""
    weight = numpy_helper.from_array(np.random.default_rng(0).standard_normal((4, 3)).astype(np.float32), "w")
    nodes = [helper.make_node("MatMul", ["x", "w"], ["a"], "product"), helper.make_node("Relu", ["a"], ["y"])]
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [2, size]) for n, size in (("x", 4), ("y", 3))]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], [weight])
    path = folder / "net.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


@pytest.mark.parametrize(("calls", "refused"), [(1000, False), (1001, True)])
def test_a_configuration_calls_its_functions_a_thousand_times(tmp_path: Path, calls: int, refused: bool) -> None:
    path = write(tmp_path, "deploy_config.py", CALLS + "\n".join(f"x{i} = f({i})" for i in range(calls)))
    with pytest.raises(InputError) as error:
        load_config(path)
    assert ("more than 1000 calls" in str(error.value)) is refused


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("x = 1 << 64", ""),
        ("x = 1 << 65", "expected a shift of 0 to 64"),
        ("x = 2 ** 64", ""),
        ("x = 2 ** 65", "expected a power of 0 to 64"),
        ("x = 20000 ** 2", ""),
        ("x = 20001 ** 2", "expected a power of 0 to 64"),
        ("x = 1 << 0", ""),
        (f"x = [{'None,' * 19_999}]", ""),
        (f"x = [{'None,' * 20_000}]", "unfolds to more than 20000"),
    ],
    ids=lambda text: text[:20],
)
def test_a_configuration_computes_within_limits(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(InputError) as error:
        load_config(write(tmp_path, "deploy_config.py", f"export = dict(mode='both', work_dir='w')\n{text}\n"))
    assert (says in str(error.value)) if says else ("unknown key 'x'" in str(error.value))


def test_what_awml_leaves_out_is_as_awml_has_it(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, "deploy_config.py", "export = dict(work_dir='w')\nquantization = dict()\n"))
    assert (config.export.mode, config.export.opset) == ("both", 17)
    assert (config.export.fold, config.export.simplify, config.export.rot_y_axis_reference) == (True, False, False)
    assert (config.tensorrt.precision, config.tensorrt.workspace_mib) == ("auto", 1024)
    assert (config.verify.enabled, config.verify.samples, config.verify.max_abs) == (True, 3, 0.1)
    assert (config.evaluate.enabled, config.evaluate.samples) == (False, 10)
    assert config.quantization is None
    quantized = load_config(write(tmp_path, "q.py", "export = dict(work_dir='w')\nquantization = dict(enabled=True)\n"))
    assert quantized.quantization is not None
    assert quantized.quantization.skip_layers == []
    assert quantized.quantization.samples == 100


@pytest.mark.parametrize(
    ("precision", "backend"),
    [("fp8", "ort"), ("int4", "ort"), ("mxfp8", "ort"), ("mxfp4", "emu-fp32"), ("nvfp4", "emu-fp32")],
)
def test_a_narrow_file_is_checked_by_the_runtime_that_has_its_type(precision: str, backend: str) -> None:
    assert str(quantize_narrow._runner(NarrowOptions.parse(precision)).spec).startswith(backend)


@needs("modelopt")
def test_int8_is_measured_on_four_of_the_samples(tmp_path: Path) -> None:
    result = quantize_ptq(load_model(str(product(tmp_path))), tmp_path / "out", batches=6)
    assert result.calibrated_on == "6 samples"
    assert result.measured_on == "4 of the samples"


def test_a_file_is_compared_on_three_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def noted(model: Any, programs: Any, samples: Any, *rest: Any, **more: Any) -> list[Any]:
        seen.append(len(samples))
        return []

    monkeypatch.setattr("cp_debug.deploy.file_export.export_files", noted)
    CliRunner().invoke(app, ["export", str(product(tmp_path)), "-o", str(tmp_path / "out")])
    assert seen == [3]


def test_inputs_are_halved_to_multiples_of_strides_along_free_axes() -> None:
    arrays = {"a": np.arange(40.0).reshape(1, 40), "b": np.arange(40.0)[:, None], "c": np.arange(3.0), "d": np.ones(1)}
    axes = {"a": {1: "n"}, "b": {0: "n"}, "c": {0: "m"}, "d": {0: "k"}}
    small = resized(arrays, axes)
    assert {name: array.shape for name, array in small.items()} == {"a": (1, 16), "b": (16, 1), "c": (4,), "d": (2,)}
    assert small["c"].tolist() == [0, 1, 2, 0]
    assert small["a"][0].tolist() == list(range(16))
    assert small["a"].flags.c_contiguous
    assert resized({"e": np.zeros((0, 2))}, {"e": {0: "n"}})["e"].shape == (0, 2)
    assert shapes_of(small) == "a 1×16, b 16×1, c 4, d 2"
    run = compared_outputs({"x": np.ones(2), "y": np.ones(2)}, {"x": np.full(2, 1.1), "y": np.full(2, 1.2)})
    assert worst_output(run)[0] == "y"


def test_a_latency_is_told_in_milliseconds() -> None:
    figures = Latency("net", [i / 1000 for i in range(101)]).figures()
    assert figures == pytest.approx({"mean": 50, "p50": 50, "p95": 95, "p99": 99})


@pytest.mark.parametrize(
    ("shares", "says"), [({"fp16": 0.8, "fp32": 0.2}, "fp16 80%, fp32 20%"), ({}, "types not told")]
)
def test_types_of_an_engine_in_words(shares: dict[str, float], says: str) -> None:
    assert BuiltEngine("net", "net.engine", "", "", 1.0, shares).types == says


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


def test_an_error_over_several_pairs_is_that_of_all_numbers() -> None:
    total = ErrorSum()
    assert total.relative == 0
    total.add(np.array([3.0, 0.0]), np.array([0.0, 0.0]) + 4.0)
    total.add(np.array([2.0]), np.array([1.0]))
    assert total.relative == pytest.approx(math.sqrt((1 + 16 + 1) / (16 + 16 + 1)))
    total.add(np.array([np.inf]), np.array([1.0]))
    assert total.relative == math.inf


def test_figures_beyond_a_limit() -> None:
    assert _excess(3.0, 2.0) == 1.5
    assert _excess(0.0, 0.0) == 0
    assert _excess(1e-9, 0.0) == math.inf
    assert _excess(math.nan, 1.0) == math.inf
    assert [_or_infinite(v) for v in (2.0, math.nan, math.inf, -math.inf)] == [2.0, math.inf, math.inf, math.inf]


@pytest.mark.parametrize("budget", [0.0, -1.0, math.nan])
def test_a_budget_is_positive(budget: float) -> None:
    with pytest.raises(InputError, match=r"--auto is .*; expected a positive budget"):
        check_budget(budget)
    check_budget(1e-9)


def test_a_loss_is_what_the_test_has_less_than_the_reference() -> None:
    draws = [{"mAP": np.full(3, value)} for value in (0.5, 0.6)]
    assert _loss(Measured(draws=draws[0]), Measured(draws=draws[1]))[0] == pytest.approx(0.1)
    assert tuple(_loss(Measured(outputs={"y": 0.25}), Measured())) == (0.25, 0.25, 0.25)


def test_running_means_leave_out_what_is_not_known() -> None:
    hits = Hits(np.arange(3), np.array([[1.0, 2, 1], [0, 0, 0]]), np.array([[1.0, 3, 4], [0, 0, 0]]))
    assert_allclose(_running_means(np.array([2.0, 5, 8]), hits), [[2, 4, 5], [1, 1, 1]])
    assert_allclose(_running_means(np.array([np.nan, 5, 8]), hits), [[0, 5, 6], [1, 1, 1]])


def test_gaps_lie_between_drawn_hits() -> None:
    after, before = _drawn_neighbours(np.array([[False, True, False, True]]))
    assert after.tolist() == [[1, 1, 3, 3, 3]]
    assert before.tolist() == [[1, 1, 1, 1, 3]]
    one = np.array([2.0])
    assert _line(one, np.array([1.0]), np.array([10.0]), np.array([3.0]), np.array([30.0])).tolist() == [20]
    assert _line(one, one, np.array([10.0]), one, np.array([30.0])).tolist() == [10]


def test_changes_of_detections_add_up() -> None:
    first = DetectionChange(10, 2, 1, 3, 0.1, 0.2, 0.3, 0.4, 0.05)
    second = DetectionChange(4, 2, 0, 1, 0.2, 0.1, 0.4, 0.3, -0.15)
    both = first + second
    assert (both.reference, both.lost, both.gained, both.moved) == (14, 4, 1, 4)
    assert (both.max_center, both.max_size, both.max_yaw, both.max_score) == (0.2, 0.2, 0.4, 0.4)
    assert both.mean_score == pytest.approx((0.05 * 8 - 0.15 * 2) / 10)
    assert str(first).startswith("10 boxes: 2 lost, 1 gained, 3 moved; at most 0.1 m in centre, 0.2 m in size, 0.3 rad")
    assert str(DetectionChange(3, 3, 1)) == "3 boxes: 3 lost, 1 gained"
    assert (DetectionChange() + DetectionChange()).mean_score == 0


def test_means_of_draws_leave_out_what_is_not_defined() -> None:
    values = [np.array([1.0, np.nan, np.nan]), np.array([3.0, 4.0, np.nan])]
    assert_allclose(t4_draws._mean(values), [2, 4, np.nan])
    assert t4_draws._differs(1.0, 1.0 + 3e-9)
    assert not t4_draws._differs(1.0, 1.0 + 0.5e-9)
    assert not t4_draws._differs(math.nan, math.nan)
    assert t4_draws._differs(math.nan, 1.0)


def test_an_average_precision_of_draws_by_hand() -> None:
    """All objects found without a false one: 1. Half of them: the recalls up to a half, of those above a tenth."""
    gain, miss = np.array([1.0, 1.0]), np.zeros(2)
    counts = np.array([[1.0, 1], [0, 0], [0, 0], [1, 1]])
    found = t4_draws._of_draws(gain, miss, counts, np.array([2.0, 0, 3, 4]))
    assert_allclose(found, [1, np.nan, 0, 40 / 90], atol=0.012)
