"""``quantize ptq --precision``: files in FP8, block-scaled types and INT4 compute what the emulation computes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto as T
from onnx import helper, numpy_helper
from test_cli import run
from test_executor import random

from cp_debug.backends.arithmetic import FP32
from cp_debug.backends.executor import Executor
from cp_debug.backends.narrow_options import NarrowOptions
from cp_debug.backends.scaling import floor_log2
from cp_debug.deploy import quantize_narrow
from cp_debug.deploy.exporting import low_error
from cp_debug.deploy.quantize_narrow import FILE_ERROR
from cp_debug.errors import InputError
from cp_debug.graph.graph import Graph
from cp_debug.graph.narrow_qdq import insert_narrow_qdq
from cp_debug.probes.distance import relative_l2
from cp_debug.quantization.narrow_layers import narrow_layers

NETS: dict[str, tuple[str, dict[str, Any], tuple[int, ...], tuple[int, ...]]] = {
    "matmul": ("MatMul", {}, (3, 5, 200), (200, 48)),
    "batched": ("MatMul", {}, (3, 5, 72), (3, 72, 16)),
    "gemm": ("Gemm", {"transA": 1, "transB": 1}, (72, 7), (16, 72)),
    "conv": ("Conv", {"pads": [1, 1, 1, 1]}, (2, 72, 6, 5), (16, 72, 3, 3)),
    "grouped": ("Conv", {"group": 4}, (2, 64, 4, 5), (16, 16, 3, 3)),
    "deconv": ("ConvTranspose", {"strides": [2, 2]}, (2, 72, 4, 3), (72, 16, 2, 2)),
}
"""Operator, attributes, shapes of data and of the weight; 72 and 200 are no multiples of a block."""
ON_ORT = ("fp8", "fp8:e5m2", "fp8:channel", "fp8:block", "mxfp8", "mxfp8:up", "int4", "int4:g32", "int4:asym")


def net(folder: Path, kind: str, opset: int = 17, weight: np.ndarray | None = None) -> tuple[Path, np.ndarray]:
    """A file with one layer, ``m``, from x to y, and data for it, some of which is 0."""
    op, attributes, shape, weight_shape = NETS[kind]
    x, w = random(*shape, seed=1), random(*weight_shape)
    x, w = x * np.exp(random(*shape, seed=2)), w * np.exp(random(*weight_shape, seed=3)) if weight is None else weight
    x.flat[: shape[-1]] = 0
    graph = helper.make_graph(
        [helper.make_node(op, ["x", "w"], ["y"], "m", **attributes)],
        "g",
        [helper.make_tensor_value_info("x", T.FLOAT, shape)],
        [helper.make_tensor_value_info("y", T.FLOAT, [None] * len(shape))],
        [numpy_helper.from_array(w.astype(np.float32), "w")],
    )
    file = folder / "net.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8), file)
    return file, x.astype(np.float32)


def on_ort(file: Path, inputs: dict[str, np.ndarray]) -> np.ndarray:
    ort = pytest.importorskip("onnxruntime")
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"]).run(None, inputs)[0]


def compared(folder: Path, kind: str, precision: str) -> tuple[float, float, Path, np.ndarray] | None:
    """Distance of the written file, run by the executor, from the emulation; that of the emulation from FP32."""
    file, x = net(folder, kind)
    graph, options = Graph(file), NarrowOptions.parse(precision)
    layers = narrow_layers(graph, options, {"m": float(np.abs(x).max())})
    if not layers.layers:
        return None
    written = insert_narrow_qdq(graph, layers.layers, folder / "narrow.onnx", precision)
    onnx.checker.check_model(str(written), full_check=True)
    emulated = Executor(graph, FP32, overrides=layers.emulated()).run({"x": x})["y"]
    exact = Executor(graph, FP32).run({"x": x})["y"]
    own = Executor(Graph(written), FP32).run({"x": x})["y"]
    return relative_l2(own, emulated), relative_l2(emulated, exact), written, emulated.numpy()


@pytest.mark.parametrize(
    ("precision", "kind"),
    [
        ("fp8", "conv"),
        ("fp8:channel", "matmul"),
        ("fp8:block", "gemm"),
        ("mxfp8", "matmul"),
        ("mxfp8:up", "grouped"),
        ("int4:g32", "matmul"),
        ("int4:asym", "gemm"),
        ("int4:sym:g16", "batched"),
        ("nvfp4", "gemm"),
        ("mxfp4", "conv"),
    ],
)
def test_a_file_computes_what_the_emulation_computes(tmp_path: Path, precision: str, kind: str) -> None:
    found = compared(tmp_path, kind, precision)
    assert found is not None
    error, cost, written, emulated = found
    assert error < 1e-6 < 0.01 < cost
    if not precision.startswith(("nvfp4", "mxfp4")):
        assert relative_l2(on_ort(written, {"x": net(tmp_path, kind)[1]}), emulated) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("precision", [*ON_ORT, "int4:sym:g32", "mxfp4", "nvfp4"])
def test_every_operator_in_every_precision(tmp_path: Path, precision: str) -> None:
    taken = 0
    for kind in NETS:
        found = compared(tmp_path, kind, precision)
        if found is None:
            assert precision.startswith("int4")
            assert "onv" in NETS[kind][0]
            continue
        taken += 1
        assert found[0] < 1e-6, kind
        if precision in ON_ORT:
            assert relative_l2(on_ort(found[2], {"x": net(tmp_path, kind)[1]}), found[3]) < 1e-6, kind
    assert taken >= 3


def test_e8m0_scales_in_a_graph_are_exact_next_to_powers_of_two(tmp_path: Path) -> None:
    powers = 2.0 ** np.arange(-100, 100, dtype=np.float64)
    largest = np.stack([powers, powers * (1 - 2**-24), powers * (1 + 2**-23), powers * 1.7]).astype(np.float32)
    x = np.zeros((*largest.shape, 32), np.float32)
    x[..., 7] = -largest
    width = 32 * largest.shape[1]
    weight = helper.make_tensor_value_info("x", T.FLOAT, [4, width])
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"], "m")],
        "g",
        [weight],
        [helper.make_tensor_value_info("y", T.FLOAT, [4, 1])],
        [numpy_helper.from_array(np.ones((width, 1), np.float32), "w")],
    )
    file = tmp_path / "net.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), file)
    layers = narrow_layers(Graph(file), NarrowOptions.parse("mxfp8"), {})
    written = onnx.load(insert_narrow_qdq(Graph(file), layers.layers, tmp_path / "narrow.onnx", "mxfp8"))
    scale = next(n for n in written.graph.node if n.op_type == "QuantizeLinear").input[1]
    del written.graph.output[:]
    written.graph.output.append(helper.make_tensor_value_info(scale, T.FLOAT, [4, width // 32]))
    onnx.save(written, file)
    made = on_ort(file, {"x": x.reshape(4, width)})
    expected = torch.exp2(floor_log2(torch.from_numpy(largest)).double() - 8)
    np.testing.assert_array_equal(made, expected.numpy())


def test_the_command_writes_a_file_that_is_checked(tmp_path: Path) -> None:
    file, _ = net(tmp_path, "matmul")
    target = tmp_path / "result.json"
    code, text = run("quantize", "ptq", file, "-o", tmp_path / "out", "--precision", "fp8", "--json", target)
    assert code == 0, text
    document = json.loads(target.read_text())
    assert document["precision"] == "fp8"
    (component,) = document["components"].values()
    assert component["layers"] == ["m"]
    assert component["error"] < 1e-6
    (sqnr,) = document["sqnr_db"].values()
    assert 20 < sqnr < 45
    (written,) = map(Path, document["files"])
    kinds = {tensor.data_type for tensor in onnx.load(written).graph.initializer}
    assert T.FLOAT8E4M3FN in kinds
    assert "w" not in {tensor.name for tensor in onnx.load(written).graph.initializer}


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--precision", "fp7"], "--precision: 'fp7'; expected int8 or one of fp8"),
        (["--precision", "fp8:acc=fp22"], "a file cannot set accumulation"),
        (["--precision", "int4:g33"], "a group of 33; expected one of"),
        (["--precision", "int4:sym:asym"], "expected one of asym and sym"),
        (["--precision", "fp8", "--opset", "17"], "--opset: 17; fp8 needs 19"),
        (["--precision", "nvfp4", "--method", "mse"], "--method: mse: nvfp4 takes max or percentile"),
        (["--precision", "mxfp8", "--method", "max"], "mxfp8 has no scale that is calibrated"),
        (["--precision", "fp8", "--cache", "x"], "scales of an earlier run are of INT8"),
        (["--precision", "fp8", "--skip-layers", "*"], "that leaves no layer to quantize"),
        (["--precision", "fp8", "--skip-layers", "other"], "other"),
    ],
)
def test_bad_flags_are_refused_in_a_sentence(tmp_path: Path, flags: list[str], says: str) -> None:
    file, _ = net(tmp_path, "matmul", opset=21)
    if "--opset" in flags:
        file = Path("centerpoint:tiny")
    code, text = run("quantize", "ptq", file, "-o", tmp_path / "out", *flags)
    assert code == 2
    assert says in " ".join(text.split())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("kind", "change", "says"),
    [
        ("matmul", np.nan, "node 'm': its weight 'w' holds NaN"),
        ("matmul", np.inf, "node 'm': its weight 'w' holds Inf"),
        ("conv", None, "no layer of"),
    ],
)
def test_bad_models_are_refused_in_a_sentence(tmp_path: Path, kind: str, change: float | None, says: str) -> None:
    weight = random(*NETS[kind][3])
    if change is not None:
        weight.flat[3] = change
    file, _ = net(tmp_path, kind, weight=weight)
    code, text = run("quantize", "ptq", file, "-o", tmp_path / "out", "--precision", "int4")
    assert code == 2
    assert says in " ".join(text.split()) or "has no layer with a weight that int4 takes" in " ".join(text.split())
    assert not (tmp_path / "out").exists()


def test_an_earlier_run_is_replaced_as_a_whole_and_only_if_that_is_said(tmp_path: Path) -> None:
    (file, _), out = net(tmp_path, "matmul"), tmp_path / "out"
    assert run("quantize", "ptq", file, "-o", out, "--batches", "1")[0] == 0
    stale = out / f"{file.stem}.calibration.safetensors"
    assert stale.exists()
    code, text = run("quantize", "ptq", file, "-o", out, "--precision", "mxfp8")
    assert (code, "of an earlier run; --overwrite replaces it" in " ".join(text.split())) == (2, True)
    code, text = run("quantize", "ptq", file, "-o", out, "--precision", "mxfp8", "--overwrite")
    assert code == 0, text
    assert not stale.exists()


def test_what_is_quantized_already_is_refused(tmp_path: Path) -> None:
    file, x = net(tmp_path, "matmul")
    layers = narrow_layers(Graph(file), NarrowOptions.parse("fp8"), {"m": float(np.abs(x).max())})
    narrow = insert_narrow_qdq(Graph(file), layers.layers, tmp_path / "narrow.onnx", "fp8")
    code, text = run("quantize", "ptq", narrow, "-o", tmp_path / "out", "--precision", "mxfp8")
    assert code == 2
    assert "is quantized already" in " ".join(text.split())
    code, text = run("quantize", "ptq", narrow, "-o", tmp_path, "--precision", "mxfp8")
    assert code == 2


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp8", "fp8:channel", "mxfp8", "mxfp4", "nvfp4", "int4:g32:sym"])
def test_modelopt_reads_the_recipe_and_switches_the_quantizers_that_it_names(tmp_path: Path, precision: str) -> None:
    import yaml

    from cp_debug.deploy.quantize_narrow import modelopt_recipe

    quantization = pytest.importorskip("modelopt.torch.quantization")
    recipes = pytest.importorskip("modelopt.recipe")
    file = tmp_path / "modelopt.yaml"
    file.write_text(yaml.safe_dump(modelopt_recipe(NarrowOptions.parse(precision), ["1"]), sort_keys=False))
    config = recipes.load_recipe(str(file)).quantize.model_dump()
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64))
    quantization.quantize(model, config, lambda m: m(torch.randn(4, 64)))
    on = {
        name: q.is_enabled for name, q in model.named_modules() if name.endswith(("weight_quantizer", "put_quantizer"))
    }
    assert on["0.weight_quantizer"]
    assert on["0.input_quantizer"] == (not precision.startswith("int4"))
    assert not any(state for name, state in on.items() if name.startswith("1.") or "output" in name)


@pytest.mark.parametrize(
    ("precision", "backend"),
    [("fp8", "ort"), ("int4", "ort"), ("mxfp8", "ort"), ("mxfp4", "emu-fp32"), ("nvfp4", "emu-fp32")],
)
def test_a_narrow_file_is_checked_by_the_runtime_that_has_its_type(precision: str, backend: str) -> None:
    assert str(quantize_narrow._runner(NarrowOptions.parse(precision)).spec).startswith(backend)


def test_a_file_may_be_off_by_what_its_precision_costs_and_an_emulated_one_by_a_little_more() -> None:
    low, exact = ({name: np.full(4, value) for name in "ab"} for value in (1.0, 1.0))
    outputs = {name: np.full(4, 1.0 + 0.4 * FILE_ERROR) for name in "ab"}
    assert low_error("net", outputs, low, exact, "FP8", FILE_ERROR) == pytest.approx(0.4 * FILE_ERROR)
    with pytest.raises(InputError, match=r"net: . is 4e-05 .* from INT8, which is itself 0 from FP32"):
        low_error("net", outputs, low, exact, "INT8")
    with pytest.raises(InputError, match="the graph computes something else"):
        low_error("net", {name: np.full(4, 1.0 + FILE_ERROR) for name in "ab"}, low, exact, "FP8", FILE_ERROR)
