"""Files with FP8 and 4-bit Q/DQ nodes on ONNX Runtime: values shown, and what is refused."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx import TensorProto as T
from runtimes import since
from test_cli import run
from test_executor import random

from cp_debug.backends.base import Program
from cp_debug.backends.executor import Executor
from cp_debug.backends.registry import create
from cp_debug.backends.spec import BackendSpec
from cp_debug.backends.tensorrt.config import decide
from cp_debug.errors import BackendUnavailable, InputError
from cp_debug.graph import narrow_qdq
from cp_debug.graph.graph import Graph
from cp_debug.graph.narrow_qdq import DataCodes, NarrowLayer, StoredWeight, narrow_kinds, needed_opset
from cp_debug.graph.onnx_runtime import to_numpy, to_ort

pytest.importorskip("onnxruntime")
FP8 = {T.FLOAT8E4M3FN: ml_dtypes.float8_e4m3fn, T.FLOAT8E5M2: ml_dtypes.float8_e5m2}


def net(folder: Path, kind: int, *, weights: int = 0, opset: int = 19, scale: float = 0.02) -> Graph:
    """x → Q/DQ in ``kind`` → MatMul with a weight in ``weights`` (``kind``, if 0) → Relu."""
    codes = (random(64, 32) / np.float32(0.01)).astype(FP8[weights or kind])
    constants = [numpy_helper.from_array(np.array(s, np.float32), n) for n, s in (("sx", scale), ("sw", 0.01))]
    constants += [helper.make_tensor(n, k, [], b"\0", raw=True) for n, k in (("zx", kind), ("zw", weights or kind))]
    constants.append(helper.make_tensor("wq", weights or kind, [64, 32], codes.tobytes(), raw=True))
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "sx", "zx"], ["xq"], "quantize"),
        helper.make_node("DequantizeLinear", ["xq", "sx", "zx"], ["xd"], "dequantize"),
        helper.make_node("DequantizeLinear", ["wq", "sw", "zw"], ["wd"], "weight"),
        helper.make_node("MatMul", ["xd", "wd"], ["m"]),
        helper.make_node("Relu", ["m"], ["y"]),
    ]
    return saved(folder, nodes, constants, opset)


def saved(folder: Path, nodes: list[Any], constants: list[Any], opset: int) -> Graph:
    x, y = (helper.make_tensor_value_info(n, T.FLOAT, s) for n, s in (("x", [8, 64]), ("y", [8, 32])))
    graph = helper.make_graph(nodes, "g", [x], [y], constants)
    file = folder / "net.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10), file)
    return Graph(file)


@pytest.mark.parametrize("kind", FP8)
def test_fp8_levels_of_onnx_runtime_are_those_of_the_executor(tmp_path: Path, kind: int) -> None:
    graph, inputs = net(tmp_path, kind), {"x": random(8, 64, seed=2)}
    shown: dict[str, Any] = {}
    session = create(BackendSpec.parse("ort")).open(Program("net", graph))
    session.run(inputs, lambda n, v: shown.update({n: np.asarray(v)}))
    assert shown["xq"].dtype == FP8[kind]
    ours: dict[str, Any] = {}
    Executor(graph).run(inputs, lambda n, v: ours.update({n: np.asarray(v)}))
    np.testing.assert_array_equal(ours["xq"].view(np.uint8), shown["xq"].view(np.uint8))
    np.testing.assert_allclose(ours["y"], shown["y"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "numpy_type", "limits"),
    [
        (T.INT4, ml_dtypes.int4, (-8, 7)),
        (T.UINT4, ml_dtypes.uint4, (0, 15)),
        pytest.param(T.INT2, ml_dtypes.int2, (-2, 1), marks=since((1, 30), "has no INT2")),
        pytest.param(T.UINT2, ml_dtypes.uint2, (0, 3), marks=since((1, 30), "has no INT2")),
    ],
)
def test_values_of_four_and_two_bits_are_unpacked(
    tmp_path: Path, kind: int, numpy_type: type, limits: tuple[int, int]
) -> None:
    import onnxruntime

    node = helper.make_node("Cast", ["x"], ["y"], to=kind)
    x, y = helper.make_tensor_value_info("x", T.FLOAT, [3, 5]), helper.make_tensor_value_info("y", kind, [3, 5])
    opset, ir_version = (21, 10) if "4" in numpy_type.__name__ else (25, 13)
    model = helper.make_model(
        helper.make_graph([node], "g", [x], [y]),
        opset_imports=[helper.make_opsetid("", opset)],
        ir_version=ir_version,
    )
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    data = np.resize(np.arange(limits[0], limits[1] + 1, dtype=np.float32), (3, 5))
    given = {"x": onnxruntime.OrtValue.ortvalue_from_numpy(data)}
    levels = to_numpy(session.run_with_ort_values(["y"], given)[0])
    assert levels.dtype == numpy_type
    np.testing.assert_array_equal(levels.astype(np.float32), data)


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param("float8_e8m0fnu", marks=since((1, 30), "has no E8M0")),
        "float8_e5m2",
        "float8_e5m2fnuz",
        "float8_e4m3fn",
        "float8_e4m3fnuz",
        "bfloat16",
    ],
)
def test_values_of_every_narrow_type_go_to_onnx_runtime_and_back(kind: str) -> None:
    values = np.array([[1, 2, 4], [8, 0.5, 0.25]]).astype(getattr(ml_dtypes, kind))
    back = to_numpy(to_ort({"x": values})["x"])
    assert back.dtype == values.dtype
    np.testing.assert_array_equal(back.astype(np.float32), values.astype(np.float32))


@pytest.mark.parametrize("kind", [T.UINT4, T.BFLOAT16])
def test_a_search_takes_inputs_of_types_that_torch_lacks(tmp_path: Path, kind: int) -> None:
    x, w = helper.make_tensor_value_info("x", kind, [4]), helper.make_tensor_value_info("w", T.FLOAT, [4])
    y = helper.make_tensor_value_info("y", T.FLOAT, [4])
    nodes = [helper.make_node("Cast", ["x"], ["wide"], to=T.FLOAT), helper.make_node("Mul", ["wide", "w"], ["y"])]
    model = helper.make_model(
        helper.make_graph(nodes, "g", [x, w], [y]), opset_imports=[helper.make_opsetid("", 21)], ir_version=10
    )
    (tmp_path / "net.onnx").write_bytes(model.SerializeToString())
    code, text = run("search", str(tmp_path / "net.onnx"), "-b", "emu-fp32,emu-fp16", "--goal", "rel_l2<1e-2")
    assert code == 0, text


@pytest.mark.parametrize("spec", ["ort", "emu-fp32"])
@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"weights": T.FLOAT8E5M2}, "one FP8 type"),
        ({"opset": 17}, "needs opset 19; the file has opset 17"),
        ({"scale": 0.0}, "scale 'sx' holds 0;"),
        ({"scale": -0.5}, "scale 'sx' holds -0.5;"),
        ({"scale": np.inf}, "scale 'sx' holds inf;"),
        ({"scale": np.nan}, "scale 'sx' holds nan;"),
    ],
)
def test_files_that_no_runtime_computes_as_meant_are_refused(
    tmp_path: Path, spec: str, change: dict[str, Any], says: str
) -> None:
    graph = net(tmp_path, T.FLOAT8E4M3FN, **change)
    with pytest.raises(InputError, match=says) as error:
        create(BackendSpec.parse(spec)).open(Program("net", graph))
    assert "net.onnx" in str(error.value)
    assert "\n" not in str(error.value)


def test_weights_in_int4_blocks_agree_with_onnx_runtime(tmp_path: Path) -> None:
    levels = np.arange(64 * 32).reshape(64, 32) % 15 - 7
    constants = [
        helper.make_tensor("wq", T.INT4, [64, 32], levels.flatten().tolist()),
        helper.make_tensor("zw", T.INT4, [2, 32], [0] * 64),
        numpy_helper.from_array(abs(random(2, 32)) + np.float32(0.1), "sw"),
    ]
    nodes = [
        helper.make_node("DequantizeLinear", ["wq", "sw", "zw"], ["wd"], axis=0, block_size=32),
        helper.make_node("MatMul", ["x", "wd"], ["y"]),
    ]
    graph, inputs = saved(tmp_path, nodes, constants, 21), {"x": random(8, 64, seed=2)}
    theirs = create(BackendSpec.parse("ort")).open(Program("net", graph)).run(inputs)
    ours = Executor(graph).run(inputs)
    np.testing.assert_allclose(ours["y"].numpy(), theirs["y"], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    ("version", "kind", "flags"),
    [
        ("8.6.0", "FP8", None),
        ("10.0.1", "FP8", {"FP8"}),
        ("10.0.1", "INT4", set()),
        ("10.3.0", "INT4", {"INT4"}),
        ("10.3.0", "FP4", None),
        ("10.8.0.43", "FP4", {"FP4"}),
        ("11.4.0", "FP8", set()),
    ],
)
def test_tensorrt_takes_narrow_types_where_it_has_them(version: str, kind: str, flags: set[str] | None) -> None:
    """None: refused in one sentence, before anything is built. Strongly typed networks need no flag."""
    if flags is None:
        with pytest.raises(BackendUnavailable, match=f"{kind} Q/DQ nodes, and TensorRT {version} does not"):
            decide("fp32", version, narrow={kind})
        return
    assert {f for f in decide("fp32", version, narrow={kind}).set_flags if f in ("FP8", "INT4", "FP4")} == flags


def test_kinds_of_narrow_types(tmp_path: Path) -> None:
    assert narrow_kinds(net(tmp_path, T.FLOAT8E4M3FN)) == {"FP8"}
    assert narrow_kinds(net(tmp_path, T.FLOAT8E5M2)) == {"FLOAT8E5M2"}
    with pytest.raises(InputError, match="one FP8 type"):
        narrow_kinds(net(tmp_path, T.FLOAT8E4M3FN, weights=T.FLOAT8E5M2))


def floats(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.float32)


def noted(**notes: str) -> Any:
    node = helper.make_node("DequantizeLinear", ["q", "s"], ["d"])
    for key, text in notes.items():
        node.metadata_props.add(key=narrow_qdq.BITS if key == "bits" else key, value=text)
    return SimpleNamespace(proto=node)


def test_bits_are_those_that_a_node_states() -> None:
    stated = [narrow_qdq.stated_bits(noted(bits=text)) for text in ("3", "16", "0", "17", "-3", "x")]
    assert stated == [3, 16, None, None, None, None]
    assert narrow_qdq.stated_bits(noted(other="3")) is None


def test_the_oldest_opset_is_that_of_the_newest_type() -> None:
    fp8, int4, fp4 = TensorProto.FLOAT8E4M3FN, TensorProto.INT4, TensorProto.FLOAT4E2M1

    def weight(kind: int, block: int = 0) -> StoredWeight:
        return StoredWeight(kind, floats(1), floats(1), block=block)

    assert needed_opset({}) == 19
    assert needed_opset({"a": NarrowLayer(weight(fp8), None)}) == 19
    assert needed_opset({"a": NarrowLayer(weight(fp8, 32), None)}) == 21
    assert needed_opset({"a": NarrowLayer(weight(int4), None)}) == 21
    assert needed_opset({"a": NarrowLayer(weight(fp8), DataCodes(fp4)), "b": NarrowLayer(weight(fp8), None)}) == 23
    assert (StoredWeight(fp8, floats(1), floats(1)).axis, DataCodes(fp8).axis, DataCodes(fp8).rule) == (0, -1, "amax")
