"""Kernels of recurrent layers, of ``com.microsoft`` operators and of integer arithmetic, against ONNX Runtime."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from draws import RNG, begin
from onnx import TensorProto, helper
from runtimes import since

from cp_debug.backends.arithmetic import FP16, FP32, FP64, TF32, round_tf32
from cp_debug.backends.executor import Executor
from cp_debug.graph.graph import Graph
from cp_debug.reports.environment import int8_sums_saturate

Arrays = Mapping[str, np.ndarray]


def normal(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def whole(low: int, high: int, *shape: int, dtype: type = np.uint8) -> np.ndarray:
    return RNG.integers(low, high, shape).astype(dtype)


def one_node(
    path: Path,
    op: str,
    inputs: Sequence[str],
    arrays: Arrays,
    outputs: Sequence[str],
    version: int = 17,
    **attributes: Any,
) -> Graph:
    domain, _, name = op.rpartition(".")
    kinds = {n: helper.np_dtype_to_tensor_dtype(a.dtype) for n, a in arrays.items()}
    given = [helper.make_tensor_value_info(n, kinds[n], a.shape) for n, a in arrays.items()]
    made = [helper.make_tensor_value_info(o, TensorProto.UNDEFINED, None) for o in outputs if o]
    node = helper.make_node(name, inputs, outputs, domain=domain, **attributes)
    graph = helper.make_graph([node], "net", given, made)
    for output in graph.output:
        output.ClearField("type")
    opsets = [helper.make_opsetid("", version), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=9), path)
    return Graph(path)


def check(
    path: Path,
    op: str,
    inputs: Sequence[str],
    arrays: Arrays,
    outputs: Sequence[str] = ("y",),
    tolerance: float = 2e-5,
    version: int = 17,
    levels: int = 0,
    **attributes: Any,
) -> None:
    """The executor in FP64 gives what ONNX Runtime gives; integers within ``levels``."""
    graph = one_node(path, op, inputs, arrays, outputs, version, **attributes)
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [o for o in outputs if o]
    expected = dict(zip(names, session.run(names, dict(arrays)), strict=True))
    executor = Executor(graph, FP64)
    got = executor.run(arrays)
    emulator = Executor(graph, TF32)
    emulator.run(arrays)
    assert not emulator.not_emulated
    for name, want in expected.items():
        have = np.asarray(got[name])
        assert have.shape == want.shape
        if want.dtype.kind in "iu":
            assert np.abs(have.astype(np.int64) - want.astype(np.int64)).max(initial=0) <= levels
        else:
            np.testing.assert_allclose(have, want, rtol=tolerance, atol=tolerance)


GATES = {"RNN": (1, 1), "GRU": (3, 2), "LSTM": (4, 3)}
ACTIVATIONS = ["Relu", "Tanh", "Sigmoid", "LeakyRelu", "HardSigmoid", "Elu", "Softsign"]


@since((1, 30), "aborts in some recurrent layers")
@pytest.mark.parametrize("seed", range(40))
def test_recurrent_layers(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    op = list(GATES)[seed % 3]
    gates, functions = GATES[op]
    direction = str(rng.choice(["forward", "reverse", "bidirectional"]))
    ways = 2 if direction == "bidirectional" else 1
    time, batch, size, hidden = (int(rng.integers(1, n)) for n in (6, 4, 5, 6))

    def values(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    attributes: dict[str, Any] = {"hidden_size": hidden, "direction": direction}
    if op == "GRU":
        attributes["linear_before_reset"] = int(rng.integers(2))
    if op == "LSTM" and rng.random() < 0.3:
        attributes["input_forget"] = 1
    if rng.random() < 0.3:
        attributes["clip"] = float(rng.uniform(0.2, 2))
    if rng.random() < 0.5:
        attributes["activations"] = [str(a) for a in rng.choice(ACTIVATIONS, functions * ways)]
        count = sum(a in ("LeakyRelu", "HardSigmoid", "Elu") for a in attributes["activations"])
        if count:
            attributes["activation_alpha"] = [float(v) for v in rng.uniform(0.1, 1, count)]
    arrays = {
        "x": values(time, batch, size),
        "w": values(ways, gates * hidden, size),
        "r": values(ways, gates * hidden, hidden),
    }
    optional = {
        "b": lambda: values(ways, 2 * gates * hidden),
        "l": lambda: rng.integers(1, time + 1, batch).astype(np.int32),
        "h": lambda: values(ways, batch, hidden),
        "c": lambda: values(ways, batch, hidden),
        "p": lambda: values(ways, 3 * hidden),
    }
    names = ["x", "w", "r"]
    for name in list(optional)[: 5 if op == "LSTM" else 3]:
        names.append(name if rng.random() < 0.5 else "")
        if names[-1]:
            arrays[name] = optional[name]()
    outputs = ["y", "yh", "yc"][: 3 if op == "LSTM" else 2]
    check(tmp_path / "net.onnx", op, names, arrays, outputs, 1e-4, int(rng.choice([7, 14, 22])), **attributes)


def test_products_inside_the_recurrence_are_rounded(tmp_path: Path) -> None:
    """TF32 by hand: what the multiplier reads of x, h and the weights is rounded at every step."""
    rng = np.random.default_rng(1)  # its own: over so many steps a rounding that flips shows
    x, w, r = (rng.standard_normal(shape, np.float32) for shape in ((64, 2, 16), (1, 64, 16), (1, 64, 16)))
    x, b = x * 2, np.zeros((1, 128), np.float32)
    arrays = {"x": x, "w": w, "r": r, "b": b}
    graph = one_node(tmp_path / "net.onnx", "LSTM", list(arrays), arrays, ["y"], hidden_size=16)
    exact, tf32, half = (Executor(graph, a).run(arrays)["y"].double() for a in (FP32, TF32, FP16))
    [round_tf32(torch.from_numpy(matrix[0])) for matrix in (w, r)]
    h = c = torch.zeros(2, 16)
    for step in torch.from_numpy(x):
        gates = (
            round_tf32(step) @ round_tf32(torch.from_numpy(w[0])).T
            + round_tf32(h) @ round_tf32(torch.from_numpy(r[0])).T
        )
        i, o, f, g = gates.chunk(4, 1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
    torch.testing.assert_close(tf32[-1, 0].float(), h, rtol=1e-4, atol=1e-5)
    errors = [float((y - exact).norm() / exact.norm()) for y in (tf32, half)]
    assert all(1e-4 < error < 0.3 for error in errors)


MS = "com.microsoft."


@pytest.mark.parametrize(
    ("op", "shapes", "attributes"),
    [
        ("Gelu", [(2, 3, 8)], {}),
        ("BiasGelu", [(2, 3, 8), (8,)], {}),
        ("FastGelu", [(2, 3, 8), (8,)], {}),
        ("FastGelu", [(2, 3, 8)], {}),
        ("QuickGelu", [(2, 3, 8)], {"alpha": 1.5}),
        ("QuickGelu", [(2, 3, 8)], {}),
        ("FusedMatMul", [(2, 3, 4, 5), (2, 3, 6, 5)], {"transB": 1, "alpha": 0.25}),
        ("FusedMatMul", [(2, 3, 5, 4), (2, 3, 5, 6)], {"transA": 1}),
        ("FusedGemm", [(4, 5), (5, 6), (6,)], {"activation": "LeakyRelu", "activation_alpha": 0.2, "alpha": 0.5}),
        ("FusedConv", [(1, 4, 8, 8), (6, 4, 3, 3), (6,)], {"activation": "Relu", "pads": [1, 1, 1, 1]}),
        ("FusedConv", [(1, 4, 8, 8), (6, 4, 3, 3), (6,)], {"activation": "Clip", "activation_params": [-0.5, 0.5]}),
        ("FusedConv", [(1, 4, 8, 8), (6, 4, 1, 1), (6,), (1, 6, 8, 8)], {"activation": "Relu"}),
        ("FusedConv", [(1, 4, 8, 8), (6, 4, 1, 1)], {"activation": "HardSigmoid", "activation_params": [0.3, 0.4]}),
        ("SkipLayerNormalization", [(2, 3, 8), (2, 3, 8), (8,), (8,), (8,)], {"epsilon": 1e-5}),
        ("SkipLayerNormalization", [(2, 3, 8), (2, 3, 8), (8,)], {"epsilon": 1e-5}),
        ("SkipSimplifiedLayerNormalization", [(2, 3, 8), (2, 3, 8), (8,), (8,)], {"epsilon": 1e-5}),
    ],
)
def test_fused_float_operators(
    tmp_path: Path, op: str, shapes: Sequence[tuple[int, ...]], attributes: Mapping[str, Any]
) -> None:
    arrays = {f"i{k}": normal(*shape) for k, shape in enumerate(shapes)}
    check(tmp_path / "net.onnx", MS + op, list(arrays), arrays, **attributes)


def test_batches_behind_the_rows(tmp_path: Path) -> None:
    arrays = {"a": normal(4, 2, 3, 5), "b": normal(2, 3, 5, 6)}
    check(tmp_path / "net.onnx", MS + "FusedMatMul", ["a", "b"], arrays, transBatchA=1)


def test_rms_norm_under_its_old_name(tmp_path: Path) -> None:
    arrays = {"x": normal(2, 3, 8), "s": normal(8)}
    check(tmp_path / "net.onnx", "SimplifiedLayerNormalization", ["x", "s"], arrays, axis=-1, epsilon=1e-5)
    check(tmp_path / "net.onnx", "LayerNormalization", ["x", "s"], arrays, version=14)


def test_sums_of_a_skip_normalization(tmp_path: Path) -> None:
    arrays = {n: normal(2, 3, 8) for n in ("x", "skip")} | {n: normal(8) for n in ("g", "b", "bias")}
    op = MS + "SkipLayerNormalization"
    check(tmp_path / "net.onnx", op, list(arrays), arrays, ["y", "", "", "sum"], epsilon=1e-5)


def test_embeddings(tmp_path: Path) -> None:
    arrays = {"ids": whole(0, 10, 2, 5, dtype=np.int32), "segments": whole(0, 2, 2, 5, dtype=np.int32)}
    arrays |= {"words": normal(10, 8), "places": normal(5, 8), "kinds": normal(2, 8), "g": normal(8), "b": normal(8)}
    arrays["mask"] = whole(0, 2, 2, 5, dtype=np.int32)
    op = MS + "EmbedLayerNormalization"
    check(tmp_path / "net.onnx", op, list(arrays), arrays, ["y", "mask_index", "sum"], epsilon=1e-5)
    check(tmp_path / "net.onnx", op, list(arrays)[:-1], {n: a for n, a in arrays.items() if n != "mask"}, ["y", "m"])


@pytest.mark.parametrize("kind", ["plain", "causal", "padding", "lengths", "added", "past", "sizes"])
def test_attention(tmp_path: Path, kind: str) -> None:
    width = 12 if kind != "sizes" else 20
    arrays = {
        "x": normal(2, 5, 8),
        "w": normal(8, 3 * width if kind != "sizes" else 32),
        "b": normal(3 * width if kind != "sizes" else 32),
    }
    names, attributes, outputs = ["x", "w", "b"], {"num_heads": 4, "unidirectional": int(kind == "causal")}, ["y"]
    if kind == "padding":
        arrays["mask"] = np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], np.int32)
    if kind == "lengths":
        arrays["mask"] = np.array([3, 5], np.int32)
    if kind == "sizes":
        attributes["qkv_hidden_sizes"] = [12, 12, 8]
    names += ["mask"] if "mask" in arrays else []
    if kind == "added":
        arrays["added"] = normal(2, 4, 5, 5)
        names += ["", "", "added"]
    if kind == "past":
        arrays["past"] = normal(2, 2, 4, 3, 3)
        names += ["", "past"]
        outputs = ["y", "present"]
    check(tmp_path / "net.onnx", MS + "Attention", names, arrays, outputs, **attributes)


@pytest.mark.parametrize("kind", ["plain", "bias", "padding", "added", "past", "cross", "causal"])
def test_multi_head_attention(tmp_path: Path, kind: str) -> None:
    arrays = {"q": normal(2, 5, 8), "k": normal(2, 5, 8), "v": normal(2, 5, 8)}
    names, outputs = ["q", "k", "v"], ["y"]
    if kind == "bias":
        arrays["b"] = normal(24)
        names.append("b")
    if kind == "padding":
        arrays["mask"] = np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], np.int32)
        names += ["", "mask"]
    if kind == "added":
        arrays["added"] = normal(1, 4, 5, 5)
        names += ["", "", "added"]
    if kind == "past":
        arrays |= {"pk": normal(2, 4, 3, 2), "pv": normal(2, 4, 3, 2)}
        names += ["", "", "", "pk", "pv"]
        outputs = ["y", "nk", "nv"]
    if kind == "cross":
        arrays |= {"k": normal(2, 4, 7, 2), "v": normal(2, 4, 7, 2)}
    check(
        tmp_path / "net.onnx",
        MS + "MultiHeadAttention",
        names,
        arrays,
        outputs,
        num_heads=4,
        unidirectional=int(kind == "causal"),
    )


WINDOW = pytest.param("window", marks=since((1, 30), "counts a local window otherwise"))


@pytest.mark.parametrize("kind", ["prompt", "token", "packed", "rotary", WINDOW, "softcap"])
def test_group_query_attention(tmp_path: Path, kind: str) -> None:
    length, past = (1, 6) if kind in ("token", "rotary") else (5, 0)
    size = 16 if kind == "rotary" else 8
    arrays = {"q": normal(1, length, size * (8 if kind == "packed" else 4))}
    names = ["q", "", ""]
    if kind != "packed":
        arrays |= {"k": normal(1, length, 2 * size), "v": normal(1, length, 2 * size)}
        names = ["q", "k", "v"]
    arrays |= {"pk": normal(1, 2, past, size), "pv": normal(1, 2, past, size)}
    arrays |= {"last": np.array([length + past - 1], np.int32), "total": np.array([length + past], np.int32)}
    names += ["pk", "pv", "last", "total"]
    attributes: dict[str, Any] = {"num_heads": 4, "kv_num_heads": 2}
    if kind == "rotary":
        angles = np.arange(16)[:, None] / 10 ** (np.arange(8) / 8)
        arrays |= {"cos": np.cos(angles).astype(np.float32), "sin": np.sin(angles).astype(np.float32)}
        names += ["cos", "sin"]
        attributes["do_rotary"] = 1
    if kind == "window":
        attributes["local_window_size"] = 2
    if kind == "softcap":
        attributes["softcap"] = 1.5
    check(tmp_path / "net.onnx", MS + "GroupQueryAttention", names, arrays, ["y", "nk", "nv"], **attributes)


@pytest.mark.parametrize("interleaved", [0, 1])
@pytest.mark.parametrize("layout", ["rows", "heads", "partial", "offset"])
def test_rotary_embedding(tmp_path: Path, interleaved: int, layout: str) -> None:
    arrays = {"x": normal(2, 4, 5, 8) if layout == "heads" else normal(2, 5, 32)}
    arrays["p"] = np.array([3], np.int64) if layout == "offset" else whole(0, 10, 2, 5, dtype=np.int64)
    half = 2 if layout == "partial" else 4
    arrays |= {"c": normal(12, half), "s": normal(12, half)}
    attributes = {"interleaved": interleaved}
    if layout == "partial":
        attributes |= {"rotary_embedding_dim": 4, "num_heads": 4}
    check(tmp_path / "net.onnx", MS + "RotaryEmbedding", ["x", "p", "c", "s"], arrays, **attributes)


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_packed_weights(tmp_path: Path, bits: int, zeros: bool) -> None:
    rows, columns, block = 6, 48, 16
    blocks = columns // block
    arrays = {
        "a": normal(3, columns),
        "b": whole(0, 256, rows, blocks, block * bits // 8),
        "s": np.abs(normal(rows * blocks)),
    }
    if zeros:
        arrays["z"] = whole(0, 256, rows * -(-blocks * bits // 8))
    sizes = {"K": columns, "N": rows, "bits": bits, "block_size": block}
    check(tmp_path / "net.onnx", MS + "MatMulNBits", list(arrays), arrays, tolerance=2e-3, **sizes)


SCALE = np.array(0.05, np.float32)
ZERO = np.array(128, np.uint8)
COARSE, DOUBLE = np.array(1.5, np.float32), np.array(0.1, np.float32)


def test_quantized_products(tmp_path: Path) -> None:
    a, b = whole(0, 256, 4, 8), whole(0, 256, 8, 6)
    arrays = {"a": a, "as": SCALE, "az": ZERO, "b": b, "bs": SCALE, "bz": ZERO, "ys": COARSE, "yz": ZERO}
    check(tmp_path / "net.onnx", "QLinearMatMul", list(arrays), arrays, levels=1)
    x, w = whole(0, 256, 1, 3, 8, 8), whole(0, 256, 4, 3, 3, 3)
    conv = {"x": x, "xs": SCALE, "xz": ZERO, "w": w, "ws": SCALE, "wz": ZERO, "ys": COARSE, "yz": ZERO}
    conv["bias"] = whole(-900, 900, 4, dtype=np.int32)
    check(tmp_path / "net.onnx", "QLinearConv", list(conv), conv, levels=1, pads=[1, 1, 1, 1])
    check(
        tmp_path / "net.onnx", "MatMulInteger", ["a", "b", "az", "bz"], {n: arrays[n] for n in ("a", "b", "az", "bz")}
    )
    check(tmp_path / "net.onnx", "ConvInteger", ["x", "w", "xz", "wz"], {n: conv[n] for n in ("x", "w", "xz", "wz")})
    floats = {"a": a, "b": b, "as": SCALE, "bs": SCALE, "az": ZERO, "bz": ZERO, "bias": normal(6)}
    check(tmp_path / "net.onnx", MS + "MatMulIntegerToFloat", list(floats), floats)
    dynamic = {"a": normal(4, 8), "b": b, "bs": SCALE, "bz": ZERO, "bias": normal(6)}
    check(tmp_path / "net.onnx", MS + "DynamicQuantizeMatMul", list(dynamic), dynamic, tolerance=1e-3)
    check(tmp_path / "net.onnx", "DynamicQuantizeLinear", ["a"], {"a": normal(4, 8)}, ["y", "s", "z"])
    gemm = {"a": a, "as": SCALE, "az": ZERO, "b": b, "bs": SCALE, "bz": ZERO}
    gemm |= {"c": whole(-900, 900, 6, dtype=np.int32), "ys": COARSE, "yz": ZERO}
    check(tmp_path / "net.onnx", MS + "QGemm", list(gemm), gemm, levels=1)


@pytest.mark.few(6)
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    ("directions", "by_channel", "lengths"), [(1, False, False), (2, True, False), (1, True, True), (2, False, True)]
)
def test_dynamic_quantized_lstm(tmp_path: Path, directions: int, by_channel: bool, lengths: bool, seed: int) -> None:
    """Steps behind the end of the sequence are not quantized with the others; sums may saturate on this processor."""
    begin(seed)
    size, given, steps = 5, 7, 6
    grid = (directions, 4 * size) if by_channel else (directions,)
    arrays = {
        "x": normal(steps, 1, given),
        "w": whole(-127, 128, directions, given, 4 * size, dtype=np.int8),
        "r": whole(-127, 128, directions, size, 4 * size, dtype=np.int8),
        "b": normal(directions, 8 * size),
        "ws": (0.002 + 0.004 * np.abs(normal(*grid))).astype(np.float32),
        "wz": np.zeros(grid, np.int8),
        "rs": (0.002 + 0.004 * np.abs(normal(*grid))).astype(np.float32),
        "rz": np.zeros(grid, np.int8),
    }
    if lengths:
        arrays["l"] = np.array([4], np.int32)
    inputs = ["x", "w", "r", "b", "l" if lengths else "", "", "", "", "ws", "wz", "rs", "rz"]
    direction = "bidirectional" if directions == 2 else "forward"
    attributes = {"hidden_size": size, "direction": direction}
    constants = {n: a for n, a in arrays.items() if n not in ("x", "l")}
    path = tmp_path / "net.onnx"
    one_node(path, MS + "DynamicQuantizeLSTM", inputs, arrays, ["y", "h", "c"], **attributes)
    model = onnx.load(path)
    model.graph.initializer.extend(onnx.numpy_helper.from_array(a, n) for n, a in constants.items())
    free = [v for v in model.graph.input if v.name not in constants]
    del model.graph.input[:]
    model.graph.input.extend(free)
    onnx.save(model, path)
    fed = {n: a for n, a in arrays.items() if n not in constants}
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for arithmetic in (FP32, FP64):
        here = replace(arithmetic, paired_sums=int8_sums_saturate())
        got = Executor(Graph(path), here).run(fed)
        for name, want in zip("yhc", session.run(list("yhc"), fed), strict=True):
            np.testing.assert_allclose(np.asarray(got[name]), want, atol=1e-6)


@pytest.mark.parametrize(
    "op",
    [
        "QLinearAdd",
        "QLinearMul",
        "QLinearSigmoid",
        "QLinearLeakyRelu",
        "QLinearGlobalAveragePool",
        "QLinearConcat",
        "QLinearSoftmax",
    ],
)
def test_quantized_elementwise_operators(tmp_path: Path, op: str) -> None:
    a, b = whole(0, 256, 1, 4, 6, 6), whole(0, 256, 1, 4, 6, 6)
    first = {"a": a, "as": SCALE, "az": ZERO}
    output = {"ys": np.array(0.1, np.float32), "yz": ZERO}
    attributes: dict[str, Any] = {}
    if op in ("QLinearAdd", "QLinearMul"):
        arrays = first | {"b": b, "bs": DOUBLE, "bz": ZERO} | output
    elif op == "QLinearConcat":
        arrays, attributes = output | first | {"b": b, "bs": DOUBLE, "bz": ZERO}, {"axis": 1}
    else:
        arrays = first | output
        attributes = {"QLinearLeakyRelu": {"alpha": 0.1}, "QLinearGlobalAveragePool": {"channels_last": 0}}.get(op, {})
        if op == "QLinearSoftmax":
            arrays = first | {"ys": np.array(1 / 256, np.float32), "yz": np.array(0, np.uint8)}
            attributes = {"axis": -1, "opset": 13}
    check(tmp_path / "net.onnx", MS + op, list(arrays), arrays, levels=1, **attributes)


def test_an_operator_has_one_kernel() -> None:
    from cp_debug.backends.kernels.registry import kernel

    with pytest.raises(ValueError, match="two kernels of MatMul;"):
        kernel("MatMul")(lambda call, a, b: a)


def run(folder: Path, op: str, arrays: dict[str, np.ndarray], outputs: int = 1, **attributes: Any) -> list[np.ndarray]:
    """Outputs of one ``com.microsoft`` node in FP64."""
    names = [f"y{i}" for i in range(outputs)]
    node = helper.make_node(op, list(arrays), names, name="node", domain="com.microsoft", **attributes)
    given = [
        helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(a.dtype), a.shape) for n, a in arrays.items()
    ]
    graph = helper.make_graph([node], "g", given, [onnx.ValueInfoProto(name=n) for n in names])
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets), folder / "one.onnx")
    results = Executor(Graph(folder / "one.onnx"), FP64).run(arrays)
    return [results[n].numpy() for n in names]


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def test_a_gated_gelu_takes_the_second_half_as_the_gate(tmp_path: Path) -> None:
    x, bias = normal(1, 3, 8), normal(8)
    left, right = np.split(torch.from_numpy((x + bias).astype(np.float64)).numpy(), 2, -1)
    gate = torch.nn.functional.gelu(torch.from_numpy(right)).numpy()
    (found,) = run(tmp_path, "BiasSplitGelu", {"x": x, "bias": bias})
    assert np.allclose(found, left * gate, atol=1e-6)


@pytest.mark.parametrize(("shape", "inner"), [((2, 1, 1, 4), 0), ((2, 4), 1), ((1, 1, 3, 4), 0)])
def test_a_softmax_adds_its_bias_first(tmp_path: Path, shape: tuple[int, ...], inner: int) -> None:
    x, bias = normal(2, 5, 3, 4), normal(*shape)
    attributes = {"axis": 1 if inner else 3, "is_inner_broadcast": inner}
    (found,) = run(tmp_path, "BiasSoftmax", {"x": x, "bias": bias}, **attributes)
    wide = bias.reshape(2, 1, 1, 4) if inner else bias  # along the outermost axis and the innermost one
    want = softmax((x + wide).reshape(2 if inner else -1, 60 if inner else 4)).reshape(x.shape)
    assert np.allclose(found, want, atol=1e-6)


@pytest.mark.parametrize("last", [0, 1])
@pytest.mark.parametrize("activation", [0, 1])
def test_groups_are_normalized_in_either_layout(tmp_path: Path, last: int, activation: int) -> None:
    x, gamma, beta = normal(2, 6, 3, 3), normal(6), normal(6)
    groups = x.astype(np.float64).reshape(2, 3, -1)
    normed = (groups - groups.mean(-1, keepdims=True)) / np.sqrt(groups.var(-1, keepdims=True) + 1e-2)
    want = normed.reshape(x.shape) * gamma[:, None, None] + beta[:, None, None]
    want = want / (1 + np.exp(-want)) if activation else want
    given = x.transpose(0, 2, 3, 1) if last else x
    attributes = {"groups": 3, "channels_last": last, "activation": activation, "epsilon": 1e-2}
    (found,) = run(tmp_path, "GroupNorm", {"x": given, "gamma": gamma, "beta": beta}, **attributes)
    assert np.allclose(found.transpose(0, 3, 1, 2) if last else found, want, atol=1e-5)
    skip = normal(*given.shape)
    arrays = {"x": given - skip, "gamma": gamma, "beta": beta, "skip": skip}
    found, total = run(tmp_path, "SkipGroupNorm", arrays, outputs=2, **attributes)
    assert np.allclose(total, given, atol=1e-6)
    assert np.allclose(found.transpose(0, 3, 1, 2) if last else found, want, atol=1e-5)


def test_levels_are_chosen_as_the_numbers_that_they_stand_for(tmp_path: Path) -> None:
    def number(value: float) -> np.ndarray:
        return np.float32(value).reshape(())

    def zero(value: int) -> np.ndarray:
        return np.uint8(value).reshape(())

    arrays = {
        "condition": np.array([True, False]), "a": np.uint8([12, 12]), "a_scale": number(0.5), "a_zero": zero(10),
        "b": np.uint8([5, 5]), "b_scale": number(2.0), "b_zero": zero(3), "y_scale": number(0.25), "y_zero": zero(1),
    }  # fmt: skip
    (found,) = run(tmp_path, "QLinearWhere", arrays)
    assert found.tolist() == [5, 17]  # 1.0 and 4.0, in quarters above 1
