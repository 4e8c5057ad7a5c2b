"""Rarer forms of operators against ONNX Runtime, and small readers of graphs against what stands in the file."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from nets import NetBuilder
from onnx import TensorProto, helper
from test_contrib_operators import COARSE, MS, SCALE, ZERO, check, normal, whole

from cp_debug.backends.executor import Executor
from cp_debug.backends.kernels.scaled_products import Narrow, matmul
from cp_debug.graph.graph import Graph
from cp_debug.graph.input_values import _arguments
from cp_debug.graph.integer_values import constant_type
from cp_debug.graph.randomness import draws


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("Relu", []), ("Tanh", []), ("Sigmoid", []), ("LeakyRelu", [0.3]), ("Clip", [-0.4, 0.6]),
     ("HardSigmoid", [0.3, 0.4])],
    ids=str,
)  # fmt: skip
def test_a_fused_convolution_ends_with_its_activation(tmp_path: Path, name: str, parameters: list[float]) -> None:
    arrays = {"x": normal(1, 2, 5, 5), "w": normal(3, 2, 3, 3), "b": normal(3)}
    more = {"activation_params": parameters} if parameters else {}
    check(tmp_path / "net.onnx", MS + "FusedConv", list(arrays), arrays, activation=name, **more)


@pytest.mark.parametrize("mask", ["lengths", "ends and starts", "each query"])
def test_masks_of_attention_in_every_shape(tmp_path: Path, mask: str) -> None:
    arrays = {"q": normal(2, 5, 8), "k": normal(2, 5, 8), "v": normal(2, 5, 8)}
    arrays["mask"] = {
        "lengths": np.array([3, 5], np.int32),
        "ends and starts": np.array([4, 5, 1, 2], np.int32),
        "each query": np.tril(np.ones((2, 5, 5), np.int32)),
    }[mask]
    names = ["q", "k", "v", "", "mask"]
    if mask != "ends and starts":
        check(tmp_path / "net.onnx", MS + "MultiHeadAttention", names, arrays, num_heads=4)
    packed = {"x": normal(2, 5, 6), "w": normal(6, 24), "b": normal(24), "mask": arrays["mask"]}
    check(tmp_path / "net.onnx", MS + "Attention", list(packed), packed, num_heads=4)


@pytest.mark.parametrize("layout", ["queries", "keys"])
def test_packed_heads_are_cut_where_they_meet(tmp_path: Path, layout: str) -> None:
    """ONNX Runtime's CPU has none of them: the same numbers go in apart."""
    from cp_debug.backends.arithmetic import FP64
    from cp_debug.backends.executor import Executor

    q, k, v = (normal(1, 5, 4, 2) for _ in range(3))
    flat = {"q": q.reshape(1, 5, 8), "k": k.reshape(1, 5, 8), "v": v.reshape(1, 5, 8)}
    packed = {"q": np.stack([q, k, v], 3)} if layout == "queries" else {"q": flat["q"], "k": np.stack([k, v], 3)}
    found = []
    for arrays in (flat, packed):
        node = helper.make_node("MultiHeadAttention", list(arrays), ["y"], domain="com.microsoft", num_heads=4)
        given = [helper.make_tensor_value_info(n, TensorProto.FLOAT, a.shape) for n, a in arrays.items()]
        graph = helper.make_graph([node], "g", given, [onnx.ValueInfoProto(name="y")])
        opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
        onnx.save(helper.make_model(graph, opset_imports=opsets), tmp_path / "net.onnx")
        found.append(Executor(Graph(tmp_path / "net.onnx"), FP64).run(arrays)["y"])
    assert torch.allclose(torch.as_tensor(found[0]), torch.as_tensor(found[1]))


def test_maxima_of_regions(tmp_path: Path) -> None:
    rois = np.array([[0, 1, 2, 9, 7], [1, 3, 3, 3, 3], [0, -4, -4, 5, 30], [1, 14, 0, 15, 15]], np.float32)
    arrays = {"x": normal(2, 3, 8, 9), "r": rois}
    for scale in (1.0, 0.5):
        check(tmp_path / "net.onnx", "MaxRoiPool", ["x", "r"], arrays, pooled_shape=[2, 3], spatial_scale=scale)


@pytest.mark.parametrize("last", [0, 1])
@pytest.mark.parametrize("op", ["QLinearAveragePool", "QLinearGlobalAveragePool"])
def test_means_of_levels(tmp_path: Path, op: str, last: int) -> None:
    arrays = {"x": whole(0, 256, 1, 6, 6, 2) if last else whole(0, 256, 1, 2, 6, 6), "xs": SCALE, "xz": ZERO}
    arrays |= {"ys": np.array(0.03, np.float32), "yz": np.array(100, np.uint8)}
    more: dict[str, Any] = {} if "Global" in op else {"kernel_shape": [3, 2], "strides": [2, 1]}
    check(tmp_path / "net.onnx", MS + op, list(arrays), arrays, levels=1, channels_last=last, **more)


@pytest.mark.parametrize("kind", ["float zeros", "bias"])
def test_packed_weights_with_more_inputs(tmp_path: Path, kind: str) -> None:
    arrays: dict[str, np.ndarray] = {"a": normal(3, 32), "b": whole(0, 256, 6, 2, 8), "s": np.abs(normal(12))}
    names = list(arrays)
    if kind == "float zeros":
        arrays["z"] = normal(12) + 8
        names.append("z")
    else:
        arrays["bias"] = normal(6)
        names += ["", "", "bias"]
    check(tmp_path / "net.onnx", MS + "MatMulNBits", names, arrays, tolerance=2e-3, K=32, N=6, bits=4, block_size=16)


def test_zero_points_of_rows_and_columns(tmp_path: Path) -> None:
    arrays = {"a": whole(0, 256, 4, 8), "b": whole(0, 256, 8, 6), "az": ZERO, "bz": whole(0, 256, 6)}
    check(tmp_path / "net.onnx", "MatMulInteger", list(arrays), arrays)
    columns = {"a": arrays["a"], "as": SCALE, "az": ZERO, "b": arrays["b"], "bs": np.abs(normal(6)), "bz": arrays["bz"]}
    check(
        tmp_path / "net.onnx", "QLinearMatMul", [*columns, "ys", "yz"], columns | {"ys": COARSE, "yz": ZERO}, levels=1
    )


class Plain:
    """Encodes nothing."""

    segment = None

    def encode(self, x: torch.Tensor, axes: Any, place: int) -> Any:
        return SimpleNamespace(
            coarse=torch.tensor(1.0), multiplied=x, mapped=lambda change: self.encode(change(x), axes, place)
        )


@pytest.mark.parametrize(
    ("left", "right"),
    [((3, 4), (4, 5)), ((2, 3, 4), (4, 5)), ((2, 1, 3, 4), (6, 4, 5)), ((4,), (4, 5)), ((3, 4), (4,)), ((4,), (4,)),
     ((6, 4, 5), (5,)), ((4,), (6, 4, 5))],
    ids=str,
)  # fmt: skip
def test_products_of_scaled_operands_have_numpys_shapes(left: tuple[int, ...], right: tuple[int, ...]) -> None:
    a, b = normal(*left), normal(*right)
    summing: Any = SimpleNamespace(matmul=torch.matmul)
    found = matmul(torch.from_numpy(a), torch.from_numpy(b), Narrow(Plain(), summing))  # type: ignore[arg-type]
    expected = np.matmul(a, b)
    assert found.shape == expected.shape
    assert np.allclose(found, expected, atol=1e-5)


# Graphs -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("opset", "training", "random"),
    [(17, None, False), (17, "false", False), (17, "true", True), (17, "false node", False), (17, "true node", True),
     (17, "input", True), (11, None, False), (6, None, True), (6, "test", False)],
)  # fmt: skip
def test_dropout_draws_unless_it_is_known_to_be_off(
    tmp_path: Path, opset: int, training: str | None, random: bool
) -> None:
    net = NetBuilder()
    inputs, attributes = ["x"], {"is_test": 1} if training == "test" else {}
    if training and opset > 6:
        value = np.array(training.startswith("true"))
        if "node" in training:
            inputs += ["", net.op("Constant", name="t", value=onnx.numpy_helper.from_array(value))]
        else:
            inputs += ["", "t" if training == "input" else net.weight(value, name="t")]
    net.op("Dropout", *inputs, name="y", **attributes)
    given = {"x": (1, [1, 4])} | ({"t": (9, [])} if training == "input" else {})
    graph = Graph(net.save(tmp_path / "n.onnx", given, ["y"], opset=opset))  # type: ignore[arg-type]
    assert draws(graph.nodes[-1], graph) == random


def test_a_constant_has_the_type_that_the_file_says(tmp_path: Path) -> None:
    net = NetBuilder()
    stored = net.weight(np.int8([1, 2]), name="w")
    node = net.op("Constant", name="c", value=onnx.numpy_helper.from_array(np.uint8([1])))
    net.op("Constant", name="f", value_float=1.0)
    net.op("Neg", "x", name="y")
    graph = Graph(net.save(tmp_path / "n.onnx", {"x": (1, [1])}, ["y", "c", "f"]))
    found = [constant_type(graph, name) for name in (stored, node, "f", "y", "x")]
    assert found == [TensorProto.INT8, TensorProto.UINT8, None, None, None]


@pytest.mark.parametrize(
    ("op", "place", "says"),
    [("Reshape", 1, ["-1, 1, 1 …", "1"]), ("Slice", 1, ["0", "1"]), ("Slice", 2, ["8", "1"]),
     ("Slice", 3, ["0, 1, 2 …", "1"]), ("Range", 0, ["0", "1"]), ("Range", 1, ["8", "1"]), ("Range", 2, ["1"]),
     ("Pad", 1, ["0", "1"]), ("OneHot", 1, ["8", "1"]), ("Resize", 3, ["8", "1"]), ("Loop", 0, ["3", "1"]),
     ("NonMaxSuppression", 2, ["8", "1"]), ("NonMaxSuppression", 3, ["0.5", "1"]), ("Tile", 1, ["1"])],
)  # fmt: skip
def test_arguments_get_values_that_their_operator_takes(op: str, place: int, says: list[str]) -> None:
    proto = helper.make_node(op, ["a", "b", "c", "d"], ["y"], name="node")
    node: Any = SimpleNamespace(op=op, name="node", proto=proto)
    assert [way.says.partition(":")[0] for way in _arguments(node, place)] == says


def test_a_fill_of_no_sizes_is_a_number(tmp_path: Path) -> None:
    """Without axes, though the value that it is filled with has one."""
    for name, value in (("bool", np.array([True])), ("float", np.array([0.5], np.float32)), ("none", None)):
        fill = {} if value is None else {"value": onnx.numpy_helper.from_array(value)}
        arrays = {"sizes": np.zeros(0, np.int64)}
        check(tmp_path / f"{name}.onnx", "ConstantOfShape", ["sizes"], arrays, **fill)


@pytest.mark.parametrize("time", [0, 1])
def test_sequences_are_reversed_up_to_their_lengths_and_pass_derivatives_on(tmp_path: Path, time: int) -> None:
    arrays = {"x": normal(*((4, 3) if time == 0 else (3, 4)), 2), "lengths": np.array([1, 4, 2])}
    check(tmp_path / "net.onnx", "ReverseSequence", list(arrays), arrays, time_axis=time, batch_axis=1 - time)
    graph = Graph(tmp_path / "net.onnx")
    x = torch.from_numpy(arrays["x"]).requires_grad_()
    given = {"x": x, "lengths": torch.from_numpy(arrays["lengths"])}
    (result,) = Executor(graph).run_nodes(graph.nodes, given, [graph.outputs[0].name], differentiable=True).values()
    (gradient,) = torch.autograd.grad(result[0, 0].sum(), x)
    assert int(gradient.sum()) == 2
