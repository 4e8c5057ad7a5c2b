"""Causes from public reports: saturated biases, ties of Resize and of equal values, INT8 that a file allows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper
from runtimes import since

from cp_debug.api.diagnose import diagnose
from cp_debug.bisect.result import TestResult


def saved(path: Path, nodes: list[Any], y: tuple[int, ...], x: tuple[int, ...], constants: dict[str, Any]) -> Path:
    float_ = TensorProto.FLOAT
    ends = [helper.make_tensor_value_info(name, float_, shape) for name, shape in (("x", x), ("y", y))]
    weights = [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()]
    graph = helper.make_graph(nodes, "net", ends[:1], ends[1:], weights)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=9), path)
    return path


def quantized_convolution(folder: Path, tiny: list[int]) -> TestResult:
    """A convolution in FP32 against its INT8 file, in which channels ``tiny`` have weights near 0 and a plain bias."""
    rng = np.random.default_rng(0)
    w = (rng.standard_normal((8, 3, 3, 3)) / 5).astype(np.float32)
    w[tiny] *= np.float32(1e-9)
    b = (rng.choice([-1, 1], 8) * rng.uniform(0.3, 0.6, 8)).astype(np.float32)
    sx = np.float32(4 / 127)
    sw = (np.abs(w).max((1, 2, 3)) / 127).astype(np.float32)
    sb = (sx * sw).astype(np.float32)
    levels = np.clip(np.round(b / sb.astype(float)), -(2**31), 2**31 - 1).astype(np.int32)
    shapes = (1, 8, 12, 12), (1, 3, 12, 12)
    conv, tail = {"name": "conv", "pads": [1] * 4}, helper.make_node("Sigmoid", ["c"], ["y"], name="sig")
    plain = [helper.make_node("Conv", ["x", "w", "b"], ["c"], **conv), tail]
    reference = saved(folder / "a.onnx", plain, *shapes, {"w": w, "b": b})
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "sx", "zx"], ["xq"]),
        helper.make_node("DequantizeLinear", ["xq", "sx", "zx"], ["xd"]),
        helper.make_node("DequantizeLinear", ["wq", "sw"], ["wd"], axis=0),
        helper.make_node("DequantizeLinear", ["bq", "sb"], ["bd"], axis=0),
        helper.make_node("Conv", ["xd", "wd", "bd"], ["c"], **conv),
        tail,
    ]
    wq = np.round(w / sw[:, None, None, None]).astype(np.int8)
    constants = {"sx": sx, "zx": np.int8(0), "wq": wq, "sw": sw, "bq": levels, "sb": sb}
    test = saved(folder / "b.onnx", nodes, *shapes, constants)
    (result,) = diagnose(reference, "ort,ort", test_model=test).tests
    return result


def test_a_bias_beyond_int32_is_the_cause_and_a_quantizer_is_none(tmp_path: Path) -> None:
    result = quantized_convolution(tmp_path, [2, 5])
    assert [row.name for row in result.guilty] == ["conv"]
    (finding,) = result.findings
    assert finding.cause == "bias-saturated"
    assert "saturates at INT32's limit in channels 2, 5" in finding.headline


def test_a_bias_that_fits_is_no_fault(tmp_path: Path) -> None:
    assert not quantized_convolution(tmp_path, []).guilty


@since((1, 30), "picks another neighbour at a tie than the mode says")
@pytest.mark.parametrize(("mode", "ties"), [("round_prefer_ceil", [5, 15]), ("round_prefer_floor", [4, 14])])
@pytest.mark.parametrize("wrong", [0, 1, 2])
def test_at_a_tie_the_declared_mode_decides(tmp_path: Path, mode: str, ties: list[int], wrong: int) -> None:
    """From 20 to 6 places there are two ties, 4.5 and 14.5; the dump picks the other neighbour at ``wrong`` of them."""
    how = {"mode": "nearest", "coordinate_transformation_mode": "half_pixel", "nearest_mode": mode}
    nodes = [
        helper.make_node("Resize", ["x", "", "", "size"], ["r"], name="resize", **how),
        helper.make_node("Neg", ["r"], ["y"], name="neg"),
    ]
    net = saved(tmp_path / "net.onnx", nodes, (1, 1, 1, 6), (1, 1, 1, 20), {"size": np.array([1, 1, 1, 6])})
    x = np.random.default_rng(0).standard_normal((1, 1, 1, 20)).astype(np.float32)
    index = np.array([1, ties[0], 8, 11, ties[1], 18])
    other = {"round_prefer_ceil": -1, "round_prefer_floor": 1}[mode]
    for place in (4, 1)[:wrong]:
        index[place] += other
    (test,) = diagnose(net, "ort", test_tensors={"x": x, "r": x[..., index], "y": -x[..., index]}).tests
    assert [row.name for row in test.guilty] == (["resize"] if wrong else [])
    if wrong == 1:
        assert "picks the other neighbour at 1 of 2 places where two are equally near" in test.findings[0].headline
    if wrong == 2:
        assert "nearest_mode" in test.findings[0].headline


@pytest.mark.parametrize("last", [0, 1])
@pytest.mark.parametrize("wrong", [0, 3])
def test_of_equal_values_onnx_says_which_is_chosen(tmp_path: Path, last: int, wrong: int) -> None:
    """Two of eight are the largest. What the index makes wrong is its own: no derivative passes it."""
    nodes = [
        helper.make_node("ArgMax", ["x"], ["i"], name="best", axis=-1, keepdims=1, select_last_index=last),
        helper.make_node("Cast", ["i"], ["f"], name="cast", to=TensorProto.FLOAT),
        helper.make_node("Neg", ["f"], ["y"], name="neg"),
    ]
    net = saved(tmp_path / "net.onnx", nodes, (5, 1), (5, 8), {})
    x = np.tile(np.array([0, 1, 2, 3, 3, 2, 1, 0], np.float32), (5, 1))
    index = np.full((5, 1), 4 if last else 3)
    index[:wrong] = 3 if last else 4
    floats = index.astype(np.float32)
    (test,) = diagnose(net, "ort", test_tensors={"x": x, "i": index, "f": floats, "y": -floats}).tests
    assert [row.name for row in test.guilty] == (["best"] if wrong else [])
    if wrong:
        (finding,) = test.findings
        wanted = "last" if last else "first"
        assert f"chooses others of equal values at {wrong} places: ONNX wants the {wanted}" in finding.headline
        assert finding.effect.share == pytest.approx(1)


def test_a_wrong_largest_value_is_no_tie(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("TopK", ["x", "k"], ["v", "i"], name="best", axis=-1),
        helper.make_node("Neg", ["v"], ["y"], name="neg"),
    ]
    net = saved(tmp_path / "net.onnx", nodes, (1, 1), (1, 3), {"k": np.array([1])})
    dump = {"v": np.float32([[2.5]]), "i": np.array([[0]]), "y": np.float32([[-2.5]])}
    (test,) = diagnose(net, "ort", test_tensors={"x": np.float32([[1.5, 0.5, 0.5]]), **dump}).tests
    assert [row.name for row in test.guilty] == ["v"]
    assert all("equal values" not in finding.headline for finding in test.findings)


def test_a_wrong_integer_is_no_rounding_where_all_others_are_0(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Div", ["x", "four"], ["d"], name="div"),
        helper.make_node("Cast", ["d"], ["i"], name="whole", to=TensorProto.INT32),
        helper.make_node("Cast", ["i"], ["f"], name="back", to=TensorProto.FLOAT),
        helper.make_node("Add", ["f", "x"], ["y"], name="add"),
    ]
    net = saved(tmp_path / "net.onnx", nodes, (2, 6), (2, 6), {"four": np.float32(4)})
    x = np.random.default_rng(0).uniform(-1, 1, (2, 6)).astype(np.float32)
    wrong = np.zeros((2, 6), np.int32)
    wrong[1, 1] = 3
    (test,) = diagnose(net, "ort", test_tensors={"x": x, "i": wrong, "y": wrong.astype(np.float32) + x}).tests
    assert [row.name for row in test.guilty] == ["whole"]


def test_maxima_of_nothing_but_infinity_are_no_fault(tmp_path: Path) -> None:
    """ONNX Runtime begins with the lowest number."""
    nodes = [
        helper.make_node("MaxPool", ["x"], ["y"], name="pool", kernel_shape=[2, 2], strides=[2, 2]),
    ]
    net = saved(tmp_path / "net.onnx", nodes, (1, 1, 2, 2), (1, 1, 4, 4), {})
    x = np.ones((1, 1, 4, 4), np.float32)
    x[..., :2, :2] = -np.inf
    lowest = np.float32([[[[np.finfo(np.float32).min, 1], [1, 1]]]])
    (test,) = diagnose(net, "ort", test_tensors={"x": x, "y": lowest}).tests
    assert not test.guilty


def test_a_kernel_that_loses_small_numbers_is_named_though_fp32_may(tmp_path: Path) -> None:
    """log(1 + exp(x)) as it stands, in FP32: what the layer does is within its precision, and makes all of it."""
    nodes = [
        helper.make_node("Softplus", ["x"], ["m"], name="plus"),
        helper.make_node("Mul", ["m", "k"], ["y"], name="mul"),
    ]
    net = saved(tmp_path / "net.onnx", nodes, (4, 8), (4, 8), {"k": np.float32(1e5)})
    x = np.random.default_rng(0).uniform(-13, -11, (4, 8)).astype(np.float32)
    m = np.log(np.float32(1) + np.exp(x))
    (test,) = diagnose(net, "ort", test_tensors={"x": x, "m": m, "y": m * np.float32(1e5)}).tests
    assert not test.agrees
    assert not test.guilty
    (finding,) = test.findings
    assert (finding.layers, finding.headline) == (
        ["plus"],
        "plus (Softplus): 100% of the final divergence comes from here: Softplus is computed as log(1 + exp(x)) in "
        "FP32, which is wrong for arguments such as -12.97",
    )


def masked(path: Path, lowest: float, rows: int) -> Path:
    """Attention whose last ``rows`` rows may look at nothing: Softmax makes NaN of −Inf alone, which becomes 0."""
    mask = np.zeros((9, 9), np.float32)
    mask[9 - rows :] = lowest
    mask[:, -1] = lowest
    nodes = [
        helper.make_node("Add", ["x", "mask"], ["a"], name="add"),
        helper.make_node("Softmax", ["a"], ["p"], name="softmax"),
        helper.make_node("IsNaN", ["p"], ["n"], name="isnan"),
        helper.make_node("Where", ["n", "zero", "p"], ["w"], name="where"),
        helper.make_node("MatMul", ["w", "v"], ["y"], name="matmul"),
    ]
    v = np.random.default_rng(0).standard_normal((9, 4)).astype(np.float32)
    return saved(path, nodes, (9, 4), (9, 9), {"mask": mask, "zero": np.float32(0), "v": v})


@pytest.mark.parametrize("rows", [0, 3])
def test_a_number_that_stands_for_infinity_is_a_fault_where_whole_rows_are_masked(tmp_path: Path, rows: int) -> None:
    files = [masked(tmp_path / f"{lowest}.onnx", lowest, rows) for lowest in (-np.inf, -3.4e38)]
    (test,) = diagnose(files[0], "ort,ort", test_model=files[1]).tests
    assert [row.name for row in test.guilty] == (["add"] if rows else [])
    if rows:
        assert test.guilty[0].why == f"NaN or Inf is lost here in {27 + 6} values"
        (finding,) = test.findings
        assert "-inf → -3.4e+38 in 33 of 81 elements" in finding.headline
        assert finding.effect.share == pytest.approx(1, abs=0.01)


def four_bits(folder: Path, level: int) -> Path:
    rng = np.random.default_rng(0)
    columns, rows = 128, 64
    how = {"K": columns, "N": rows, "bits": 4, "block_size": 32, "accuracy_level": level, "domain": "com.microsoft"}
    nodes = [
        helper.make_node("MatMulNBits", ["x", "q", "s"], ["m"], name="mm", **how),
        helper.make_node("Tanh", ["m"], ["y"], name="tanh"),
    ]
    levels = rng.integers(0, 256, (rows, columns // 32, 16), dtype=np.uint8)
    scales = rng.uniform(0.01, 0.02, rows * columns // 32).astype(np.float32)
    return saved(folder / f"{level}.onnx", nodes, (3, rows), (3, columns), {"q": levels, "s": scales})


@pytest.mark.parametrize("level", [0, 4])
def test_activations_in_int8_are_expected_where_the_file_allows_them(tmp_path: Path, level: int) -> None:
    (test,) = diagnose(four_bits(tmp_path, level), "emu-fp32,ort").tests
    row = next(row for row in test.rows if row.name == "mm")
    assert row.verdict == "ok"
    assert row.replay is not None
    assert row.replay.excess == pytest.approx(1, abs=0.9)
    assert (row.replay.expected or 0) > 1e-3 if level else (row.replay.expected or 1) < 1e-5


def test_a_wrong_weight_is_guilty_where_activations_are_in_int8(tmp_path: Path) -> None:
    net = four_bits(tmp_path, 4)
    model = onnx.load(net)
    scales = next(w for w in model.graph.initializer if w.name == "s")
    scales.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(scales) * np.float32(1.1), "s"))
    onnx.save(model, tmp_path / "wrong.onnx")
    (test,) = diagnose(net, "ort,ort", test_model=tmp_path / "wrong.onnx").tests
    assert [row.name for row in test.guilty] == ["mm"]


@pytest.mark.parametrize("beyond", ["input", "constant", ""])
def test_what_is_read_beyond_fp16_comes_before_the_accumulation(tmp_path: Path, beyond: str) -> None:
    rng = np.random.default_rng(0)
    x, w = (rng.standard_normal(shape).astype(np.float32) for shape in ((4, 8), (8, 4)))
    factors = {"input": (1e5, 1e-6), "constant": (1e-6, 1e5), "": (1, 1)}[beyond]
    x[:, 3] *= np.float32(factors[0])
    w[3] *= np.float32(factors[1])
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["m"], name="fc"),
        helper.make_node("Mul", ["m", "s"], ["y"], name="scale"),
    ]
    net = saved(tmp_path / "net.onnx", nodes, (4, 4), (4, 8), {"w": w, "s": np.float32(0.1)})
    (test,) = diagnose(net, "ort,emu-fp16", inputs={"x": x}).tests
    assert bool(test.guilty) == bool(beyond)
    if beyond:
        assert test.findings[0].cause == "fp16-overflow"
        name = {"input": "the network's input x", "constant": "the constant w"}[beyond]
        assert test.findings[0].headline.partition(": ")[2].startswith(f"{name} is beyond FP16")


@pytest.mark.parametrize("tiled", [True, False])
def test_heads_in_another_order_are_one_finding(tiled: bool, tmp_path: Path) -> None:
    """Keys and values of two heads are repeated for four heads of queries: each by itself, or as a whole."""

    def net(path: Path, whole: bool) -> Path:
        nodes = [helper.make_node(op, ["x"], [x], name=x) for op, x in (("Tanh", "k"), ("Sin", "v"))]
        for x in "kv":
            each = [
                helper.make_node("Unsqueeze", [x, "second"], [f"{x}u"], name=f"{x}u"),
                helper.make_node("Expand", [f"{x}u", "expanded"], [f"{x}e"], name=f"{x}e"),
                helper.make_node("Reshape", [f"{x}e", "shape"], [f"{x}r"], name=f"{x}_heads"),
            ]
            nodes += [helper.make_node("Concat", [x, x], [f"{x}r"], name=f"{x}_heads", axis=1)] if whole else each
        nodes.append(helper.make_node("Add", ["kr", "vr"], ["y"], name="sum"))
        constants = {"second": [2], "expanded": [1, 2, 2, 3, 5], "shape": [1, 4, 3, 5]}
        arrays = {name: np.array(value) for name, value in constants.items()}
        return saved(path, nodes, (1, 4, 3, 5), (1, 2, 3, 5), arrays)

    test = diagnose(net(tmp_path / "a.onnx", False), "ort,ort", test_model=net(tmp_path / "b.onnx", tiled)).tests[0]
    assert [sorted(f.layers) for f in test.findings] == [["k_heads", "v_heads"]] * tiled
    for finding in test.findings:
        order = "axis 1 holds slices 0, 1, 0, 1 of what is read instead of 0, 0, 1, 1"
        assert finding.says == f"{order} (repeated as a whole, not each by itself)"


@pytest.mark.parametrize(
    ("merged", "says"),
    [
        ([("Slice", {}, ([1, 0], [9, 7], [2, 3]))], "begins at (1, 0) instead of (0, 1) on axes 2, 3"),
        ([("Slice", {}, ([0, 2], [8, 9], [2, 3]))], "begins at 2 instead of 1 on axis 3"),
        (
            [("Transpose", {"perm": [0, 1, 3, 2]}, ()), ("Slice", {}, ([1, 0], [9, 7], [2, 3]))],
            " of the elements of Slice are from other places: [0",
        ),
    ],
)
def test_nodes_that_move_elements_are_told_by_where_they_take_them(
    merged: list[tuple[str, dict[str, Any], tuple[list[int], ...]]], says: str, tmp_path: Path
) -> None:
    """Two Slices in the reference; in the test one, or other operators: what counts is which elements they take."""
    shapes = (1, 2, 8, 7), (1, 2, 9, 9)
    constants = {name: np.array([value]) for name, value in {"zero": 0, "one": 1, "rows": 2, "columns": 3}.items()}
    ends = {"eight": np.array([8])}
    slices = [
        helper.make_node("Slice", ["x", "zero", "eight", "rows"], ["cut"], name="rows"),
        helper.make_node("Slice", ["cut", "one", "eight", "columns"], ["s"], name="columns"),
    ]
    tail = helper.make_node("Tanh", ["s"], ["y"], name="tanh")
    reference = saved(tmp_path / "a.onnx", [*slices, tail], *shapes, constants | ends)
    nodes, arrays, value = [], {}, "x"
    for place, (op, attributes, indices) in enumerate(merged):
        names = [f"i{place}{k}" for k in range(len(indices))]
        arrays |= {name: np.array(index) for name, index in zip(names, indices, strict=True)}
        result = "s" if place == len(merged) - 1 else f"moved{place}"
        nodes.append(helper.make_node(op, [value, *names], [result], name=f"merged{place}", **attributes))
        value = result
    other = saved(tmp_path / "b.onnx", [*nodes, tail], *shapes, arrays)
    (test,) = diagnose(reference, "ort,ort", test_model=other).tests
    (finding,) = test.findings
    assert says in finding.says


@pytest.mark.parametrize(("coarser", "guilty"), [(1, []), (16, ["m"])])
@pytest.mark.parametrize("bits", [8, 16])
def test_levels_of_16_bits_are_called_so_and_judged_as_finely(
    tmp_path: Path, bits: int, coarser: int, guilty: list[str]
) -> None:
    rng = np.random.default_rng(0)
    kind, most = (np.int8, 127) if bits == 8 else (np.int16, 32767)
    w = (rng.standard_normal((16, 16)) / 4).astype(np.float32)
    sw, sx = np.float32(np.abs(w).max() / most), np.float32(4 / most * coarser)
    constants = {"w": w, "wq": np.round(w / sw).astype(kind), "sw": sw, "sx": sx, "z": kind(0)}
    domain = {"domain": "com.microsoft"} if bits == 16 else {}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "sx", "z"], ["q"], **domain),
        helper.make_node("DequantizeLinear", ["q", "sx", "z"], ["d"], **domain),
        helper.make_node("DequantizeLinear", ["wq", "sw", "z"], ["wd"], **domain),
        helper.make_node("MatMul", ["d", "wd"], ["m"], name="m"),
        helper.make_node("Relu", ["m"], ["y"], name="relu"),
    ]
    plain = [helper.make_node("MatMul", ["x", "w"], ["m"], name="m"), nodes[-1]]
    reference = saved(tmp_path / "a.onnx", plain, (8, 16), (8, 16), constants)
    test = saved(tmp_path / "b.onnx", nodes, (8, 16), (8, 16), constants)
    (result,) = diagnose(reference, "ort,ort", test_model=test).tests
    assert [row.name for row in result.guilty] == guilty
    assert f"INT{bits} " in result.findings[0].says
    if guilty:
        assert result.findings[0].cause == "int8-coarse"
        assert ("cpdebug quantize ptq" in result.findings[0].fix) == (bits == 8)  # it writes INT8 alone


def test_a_lost_bias_beside_a_zero_point_of_its_length(tmp_path: Path) -> None:
    """Scales and zero points as long as the bias are no weights of another layer that stand in its place."""
    rng = np.random.default_rng(1)
    x = rng.standard_normal((1, 3, 12, 12)).astype(np.float32)
    scale, zero = rng.uniform(1e-3, 2e-3, 8).astype(np.float32), np.zeros(8, np.int32)
    constants: dict[str, Any] = {
        "w": (rng.standard_normal((8, 3, 3, 3)) / 5).astype(np.float32),
        "bq": rng.integers(200, 400, 8).astype(np.int32),
        "sb": scale,
        "zb": zero,
    }
    shapes = (1, 8, 12, 12), (1, 3, 12, 12)

    def network(name: str, **changed: Any) -> Path:
        nodes = [
            helper.make_node("DequantizeLinear", ["bq", "sb", "zb"], ["bd"], name="stored", axis=0),
            helper.make_node("Conv", ["x", "w", "bd"], ["c"], name="conv", pads=[1] * 4),
            helper.make_node("Sigmoid", ["c"], ["y"], name="sig"),
        ]
        return saved(tmp_path / name, nodes, *shapes, {**constants, **changed})

    lost = onnx.load(network("lost.onnx", bq=zero))
    lost.graph.output.append(helper.make_tensor_value_info("c", TensorProto.FLOAT, shapes[0]))
    y, c = ort.InferenceSession(lost.SerializeToString()).run(None, {"x": x})
    np.savez(tmp_path / "dump.npz", x=x, c=c, y=y)
    np.savez(tmp_path / "x.npz", x=x)
    files = {"inputs": tmp_path / "x.npz", "test_tensors": tmp_path / "dump.npz"}
    (test,) = diagnose(network("net.onnx"), "ort", **files).tests
    assert [row.onnx for row in test.guilty] == ["c"]
    assert test.findings[0].cause == "bias-dropped"
    assert "bias" in test.findings[0].says


@pytest.mark.parametrize("other", ["round_prefer_ceil", "ceil"])
def test_another_mode_is_named_where_fp32_alone_says_that_a_place_is_in_the_middle(other: str, tmp_path: Path) -> None:
    """1 ÷ 0.4 is 2.5 in FP32, but a little less for the number nearest to 0.4 itself: precision excuses either."""
    paths, shapes = [], ((1, 1, 2, 2), (1, 1, 5, 5))
    for mode in ("round_prefer_floor", other):
        how = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": mode}
        node = helper.make_node("Resize", ["x", "", "scales"], ["y"], name="r", **how)
        scales = {"scales": np.array([1, 1, 0.4, 0.4], np.float32)}
        paths.append(saved(tmp_path / f"{mode}.onnx", [node], *shapes, scales))
    test = diagnose(paths[0], backends="ort,ort", test_model=paths[1]).tests[0]
    (finding,) = test.findings
    assert not test.guilty
    assert not test.agrees
    assert finding.says.endswith(f"comes from here: Resize: nearest_mode is {other} instead of round_prefer_floor")
    assert "undo the difference" in finding.fix


@pytest.mark.parametrize(
    ("says", "rounds", "places"),
    [
        ("", np.rint, 0),
        ("Round takes halves away from zero at 4 places", lambda a: np.sign(a) * np.floor(np.abs(a) + 0.5), 4),
        ("Round takes halves up at 3 places", lambda a: np.floor(a + 0.5), 3),
        ("Round takes halves down at 3 places", lambda a: np.ceil(a - 0.5), 3),
        ("Round cuts fractions off at 6 places", np.trunc, 6),
    ],
)
def test_halves_are_rounded_to_the_even_number(tmp_path: Path, says: str, rounds: Any, places: int) -> None:
    x = np.array([[-7.3, -3.5, -2.5, -1.7, -0.5, -0.2, 0.5, 0.9, 1.5, 2.5, 3.2, 4.75, 6.6]], np.float32)
    nodes = [helper.make_node("Round", ["x"], ["r"], name="round"), helper.make_node("Neg", ["r"], ["y"], name="neg")]
    net = saved(tmp_path / "net.onnx", nodes, x.shape, x.shape, {})
    (test,) = diagnose(net, "ort", test_tensors={"x": x, "r": rounds(x), "y": -rounds(x)}).tests
    assert [finding.says.split(":")[0] for finding in test.findings] == [says] * bool(says)
    assert [finding.evidence.get("places") for finding in test.findings] == [places] * bool(says)


@pytest.mark.parametrize(
    ("op", "says", "rounds"),
    [
        ("Cast", "", np.trunc),
        ("Cast", "Cast takes halves to even numbers at 5 places", np.rint),
        ("Cast", "Cast rounds down at 6 places", np.floor),
        ("Div", "", np.trunc),
        ("Div", "Div rounds down at 4 places", np.floor),
    ],
)
def test_whole_numbers_are_cut_off(tmp_path: Path, op: str, says: str, rounds: Any) -> None:
    x = np.array([[-7.3, -3.5, -2.5, -1.7, -0.5, -0.2, 0.5, 0.9, 1.5, 2.0, 3.2, 4.75]], np.float32)
    read = {"Cast": x, "Div": np.arange(-6, 6).reshape(1, 12) / 3}[op]
    nodes = [helper.make_node("Cast", ["x"], ["i"], name="whole", to=TensorProto.INT64)]
    dump = {"x": x, "i": (rounds if op == "Cast" else np.trunc)(x).astype(np.int64)}
    if op == "Div":
        nodes.append(helper.make_node("Div", ["i", "three"], ["d"], name="div"))
        dump = {"x": np.arange(-6, 6, dtype=np.float32).reshape(1, 12), "i": np.arange(-6, 6).reshape(1, 12)}
        dump["d"] = rounds(read).astype(np.int64)
    nodes.append(helper.make_node("Cast", [nodes[-1].output[0]], ["y"], name="last", to=TensorProto.FLOAT))
    net = saved(tmp_path / "net.onnx", nodes, x.shape, x.shape, {"three": np.array(3)} if op == "Div" else {})
    dump["y"] = dump.get("d", dump["i"]).astype(np.float32)
    (test,) = diagnose(net, "ort", test_tensors=dump).tests
    assert [finding.says.split(":")[0] for finding in test.findings] == [says] * bool(says)


def test_another_of_two_equally_near_places_is_told(tmp_path: Path) -> None:
    """The places are (0, 0), (0.5, 3), (1.5, 2) and (3, 3): ONNX rounds to even numbers, the dump up."""
    grid = np.array([[[[-1, -1], [-2 / 3, 1]], [[0, 1 / 3], [1, 1]]]], np.float32)
    how = {"mode": "nearest", "align_corners": 1}
    node = helper.make_node("GridSample", ["x", "grid"], ["y"], name="sample", **how)
    net = saved(tmp_path / "net.onnx", [node], (1, 1, 2, 2), (1, 1, 4, 4), {"grid": grid})
    x = np.random.default_rng(0).standard_normal((1, 1, 4, 4)).astype(np.float32)
    y = x[0, 0, [0, 3, 2, 3], [0, 1, 1, 3]].reshape(1, 1, 2, 2)
    (test,) = diagnose(net, "ort", test_tensors={"x": x, "y": y}).tests
    assert test.findings[0].says.endswith("picks the other neighbour at 2 of 2 places where two are equally near")


def test_hardmax_takes_the_first_of_equal_values(tmp_path: Path) -> None:
    net = saved(tmp_path / "net.onnx", [helper.make_node("Hardmax", ["x"], ["y"], name="h")], (2, 4), (2, 4), {})
    x = np.array([[1, 3, 3, 0], [2, 1, 2, 2]], np.float32)
    (test,) = diagnose(net, "ort", test_tensors={"x": x, "y": np.eye(4, dtype=np.float32)[[2, 0]]}).tests
    assert test.findings[0].says.startswith("Hardmax chooses others of equal values at 1 place: ONNX wants the first")
