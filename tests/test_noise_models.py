"""Models of what correct implementations may be off by, against implementations written out here in FP32."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from nets import NetBuilder, node_of
from onnx import helper
from torch import Tensor

from cp_debug.api.diagnose import diagnose
from cp_debug.backends.arithmetic import ARITHMETICS, FP64, Arithmetic
from cp_debug.backends.executor import Executor
from cp_debug.bisect import operator_errors
from cp_debug.bisect.operator_errors import ANY, BY_IMPLEMENTER, ONNX_RUNTIME, TORCH, Errors, errors_of, implementer
from cp_debug.bisect.perturbation import FLIPPED, between_levels, doubt, spread
from cp_debug.bisect.summation import ROUNDING, U, _adding, _contracted, _terms, in_any_order, one_sided, summation
from cp_debug.bisect.whole_numbers import as_tensor
from cp_debug.graph.graph import Graph, Node

Array = np.ndarray


def doubted(path: Path, x: Array, by: str = "", claim: Arithmetic | None = None, last: int | None = None) -> float:
    """What the nodes up to ``last`` of a network may be off by at their end."""
    graph = Graph(path)
    nodes = graph.nodes[:last]
    return doubt(Executor(graph, FP64), nodes, {"x": x}, nodes[-1].outputs[0], by, claim)


def one_node(folder: Path, op: str, x: Array, *weights: Array, opset: int = 17, **attributes: object) -> Path:
    net = NetBuilder()
    made = net.op(op, "x", *map(net.weight, weights), name="y", **attributes)
    return net.save(folder / "net.onnx", {"x": (1, list(x.shape))}, [made], opset=opset)


def in_order(terms: Array, axis: int = -1) -> Array:
    """Sums along ``axis``, one term after the other in FP32."""
    return np.take(np.add.accumulate(terms.astype(np.float32), axis=axis), -1, axis=axis)


def test_terms_that_cancel_still_round_on_the_way() -> None:
    """Sums that are 0, of terms in random order: their partial sums are not."""
    rng = np.random.default_rng(0)
    half = rng.standard_normal((2000, 128)).astype(np.float32)
    terms = rng.permuted(np.concatenate([half, -half], axis=1), axis=1)
    squared = torch.from_numpy(np.square(terms.astype(np.float64)).sum(axis=1))
    model = U * in_any_order(torch.zeros_like(squared), squared, terms.shape[1])
    assert np.sqrt(np.square(in_order(terms)).mean()) == pytest.approx(float(model.square().mean().sqrt()), rel=0.15)


FUNCTIONS: dict[str, tuple[Callable[[Array], Array], Callable[[Array], Array]]] = {
    "ReduceL1": (np.abs, lambda total: total),
    "ReduceSumSquare": (np.square, lambda total: total),
    "ReduceL2": (np.square, np.sqrt),
    "ReduceLogSum": (lambda x: x, np.log),
}


@pytest.mark.parametrize("size", [0.02, 50.0])
@pytest.mark.parametrize("op", FUNCTIONS)
def test_a_function_of_a_sum_is_off_by_what_the_sum_is_off_by(tmp_path: Path, op: str, size: float) -> None:
    """√S moves by ΔS ÷ 2√S, ln S by ΔS ÷ S: for small results and for large ones. Terms of one sign are off by what
    the last places of the partial sums happen to be, within a factor of 3."""
    x = (size * np.random.default_rng(0).uniform(0.5, 1.5, (64, 4096))).astype(np.float32)
    into, out_of = FUNCTIONS[op]
    serial = out_of(in_order(into(x))).astype(np.float64)
    exact = out_of(into(x.astype(np.float64)).sum(axis=1))
    path = one_node(tmp_path, op, x, axes=[1], keepdims=0)
    assert doubted(path, x) / 3 < np.linalg.norm(serial - exact) < 3 * doubted(path, x)


def test_a_running_sum_is_as_long_as_its_axis(tmp_path: Path) -> None:
    x = np.random.default_rng(0).standard_normal((32, 1024)).astype(np.float32)
    path = one_node(tmp_path, "CumSum", x, np.array(1, np.int64))
    error = np.linalg.norm(np.add.accumulate(x, axis=1) - np.cumsum(x.astype(np.float64), axis=1))
    assert error < doubted(path, x) < 4 * error  # every place is given the terms of the last one


def test_what_an_inner_node_is_off_by_is_carried_to_the_end(tmp_path: Path) -> None:
    """A long product and a negation: the product's error, though the negation itself rounds nothing."""
    net, rng = NetBuilder(), np.random.default_rng(0)
    product = net.op("MatMul", "x", net.weight(rng.standard_normal((2048, 16)).astype(np.float32)))
    path = net.save(tmp_path / "net.onnx", {"x": (1, [32, 2048])}, [net.op("Neg", product)])
    x = rng.standard_normal((32, 2048)).astype(np.float32)
    assert doubted(path, x) == pytest.approx(doubted(path, x, last=1), rel=0.2)


@pytest.mark.parametrize(("claim", "kind"), [("fp16", np.float16), ("bf16", None)])
def test_a_claim_of_a_narrow_type_is_doubted_by_its_rounding(tmp_path: Path, claim: str, kind: type | None) -> None:
    x = np.random.default_rng(0).uniform(1, 16, (1, 4096)).astype(np.float32)
    exact = x.astype(np.float64) * np.float32(1.1)
    narrow = exact.astype(kind) if kind else torch.from_numpy(exact).to(torch.bfloat16).double().numpy()
    path = one_node(tmp_path, "Mul", x, np.array(1.1, np.float32))
    found = doubted(path, x, claim=ARITHMETICS[claim])
    assert np.linalg.norm(narrow.astype(np.float64) - exact) == pytest.approx(found, rel=0.2)


def test_a_variance_in_one_pass_loses_what_the_mean_hides(tmp_path: Path) -> None:
    """The mean of squares less the squared mean, as ONNX Runtime has it, beside two passes, as torch has it."""
    rng = np.random.default_rng(0)
    x = (100 + rng.standard_normal((64, 8, 2, 2))).astype(np.float32)
    scale, bias = np.ones(8, np.float32), np.zeros(8, np.float32)
    path = one_node(tmp_path, "GroupNormalization", x, scale, bias, opset=21, num_groups=2)
    rows = x.reshape(128, 16)
    exact = (rows - rows.mean(1, dtype=np.float64, keepdims=True)) / np.sqrt(
        rows.var(1, dtype=np.float64)[:, None] + 1e-5
    )
    mean = rows.mean(1, keepdims=True)  # pairwise, in FP32
    variance = (rows * rows).mean(1, keepdims=True) - mean * mean
    one_pass = (rows - mean) / np.sqrt(variance + np.float32(1e-5))
    error = np.linalg.norm(one_pass - exact)
    assert doubted(path, x, "torch") < error < 4 * doubted(path, x, "ort")
    assert doubted(path, x, "ort") > 3 * doubted(path, x, "torch")


@pytest.mark.parametrize("length", [256, 300])
def test_fourier_transforms_are_fast_for_powers_of_two_and_sums_elsewhere(tmp_path: Path, length: int) -> None:
    """ONNX Runtime's DFT of 300 numbers is a plain sum: off by much more than its own of 256, and than torch's."""
    x = np.random.default_rng(0).standard_normal((4, length, 1)).astype(np.float32)
    path = one_node(tmp_path, "DFT", x, axis=1)
    exact = np.fft.fft(x.astype(np.float64)[..., 0], axis=1)
    (of_ort,) = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"x": x})
    of_torch = torch.fft.fft(torch.from_numpy(x[..., 0]), dim=1).numpy()
    for by, result in (("ort", of_ort[..., 0] + 1j * of_ort[..., 1]), ("torch", of_torch)):
        error = np.linalg.norm(result.astype(np.complex128) - exact)
        assert 0.05 * doubted(path, x, by) < error < doubted(path, x, by), by


def elementwise(op: str) -> Node:
    net = NetBuilder()
    domain, _, name = op.rpartition(".")
    net.op(name, "x", name="y", **({"domain": domain} if domain else {}))
    return Node.of(0, net.nodes[0])


def test_of_an_unknown_backend_the_wider_errors_are_believed() -> None:
    x = torch.linspace(-3, 3, 64, dtype=torch.float64)
    for op in sorted(ANY):
        if op == "BatchNormalization":
            continue  # of five inputs
        node, widths = elementwise(op), {}
        for by in ("", *BY_IMPLEMENTER.keys() - {"openvino"}):
            if (errors := errors_of(node, by)) is not None:
                widths[by] = errors.spread(node, [x], torch.tanh(x))
        assert all(bool((widths[""] >= width).all()) for width in widths.values()), op


@pytest.mark.parametrize(
    ("family", "device", "by"),
    [
        ("ort", "cpu", "ort"), ("ort", "cuda:1", "ort@cuda"), ("torch", "cuda:0", "torch@cuda"),
        ("emu", "cpu", "torch"), ("emu", "cuda:0", "torch@cuda"), ("trt", "cuda:0", "trt"), ("mine", "cpu", "mine"),
    ],
)  # fmt: skip
def test_functions_are_judged_by_who_computes_them_and_where(family: str, device: str, by: str) -> None:
    """Emulation computes with torch, and what nobody has measured by its own name."""
    backend: Any = SimpleNamespace(spec=SimpleNamespace(family=family), device=device)
    assert implementer(backend) == by


GPU_ERRORS = Path(__file__).parents[1] / "docs" / "gpu" / "data" / "h200-operators.json"


@pytest.mark.parametrize("by", ["ort@cuda", "torch@cuda"])
def test_errors_measured_on_a_gpu_are_within_their_models(by: str) -> None:
    """In each half octave: the root mean square, and the largest error within 3 times the model."""
    document = json.loads(GPU_ERRORS.read_text())
    tried = 0
    for name, measured in document["measured"].items():
        if by not in measured or name in ("Gelu tanh", "LeakyRelu", "ThresholdedRelu"):
            continue
        node, worst = elementwise(name.split()[0]), 0.0
        errors = errors_of(node, by)
        assert errors is not None
        for low, y, rms, largest, relative, largest_relative in measured[by]:
            if abs(y) > 1e-30:  # numbers of a half octave may differ by far: either way to look at them will do
                allowed = float(errors.spread(node, [torch.tensor([low]).double()], torch.tensor([abs(y)]).double()))
                of_size = max(rms, largest / 3) / allowed
                worst = max(worst, min(of_size, max(relative, largest_relative / 3) / errors.relative))
        assert worst < 1.15, name
        tried += 1
    assert tried > 20


def test_a_softplus_of_a_gpu_s_onnx_runtime_loses_what_the_sum_with_1_rounds_away() -> None:
    """log(1 + exp(−20)) is 0 there and 2e-9 elsewhere."""
    x, node = torch.tensor([-20.0]).double(), elementwise("Softplus")
    y = torch.nn.functional.softplus(x)
    off = {by: float(errors.spread(node, [x], y)) * U for by in BY_IMPLEMENTER if (errors := errors_of(node, by))}
    assert {by for by, error in off.items() if 4 * error > float(y)} == {"ort@cuda", "openvino"}


def test_a_rounding_is_off_by_what_the_models_say() -> None:
    """0.4 units of the rounded number, root mean square, where mantissas are evenly spread."""
    numbers = np.random.default_rng(0).uniform(1, 2, 100_000)
    off = (numbers.astype(np.float32) - numbers) / numbers
    assert math.sqrt(np.square(off).mean()) / U == pytest.approx(ROUNDING, rel=0.05)


# Terms, by counting ones ---------------------------------------------------------------------------------------------

PRODUCTS: list[tuple[str, tuple[int, ...], tuple[int, ...], dict[str, object]]] = [
    ("Conv", (1, 6, 5, 5), (4, 3, 3, 3), {"group": 2}),
    ("ConvTranspose", (1, 6, 4, 4), (6, 2, 3, 3), {}),
    ("ConvTranspose", (1, 6, 4, 4), (6, 2, 2, 2), {"strides": [2, 2]}),
    ("MatMul", (2, 5, 7), (7, 3), {}),
    ("Gemm", (4, 6), (6, 3), {}),
    ("Gemm", (6, 4), (6, 3), {"transA": 1}),
    ("Gemm", (4, 6), (3, 6), {"transB": 1}),
    ("Einsum", (2, 3, 5), (2, 5, 4), {"equation": "bik,bkj->bij"}),
    ("Einsum", (2, 3, 5), (2, 5, 4), {"equation": "bik, bkj"}),  # what stands twice is summed
    ("Einsum", (2, 3, 4, 5), (5, 6), {"equation": "...k,kj->...j"}),
    ("Einsum", (4, 5), (4, 5), {"equation": "ij,ij->"}),
]


@pytest.mark.parametrize(("op", "shape", "weight", "attributes"), PRODUCTS)
def test_a_product_of_ones_counts_its_terms(
    tmp_path: Path, op: str, shape: tuple[int, ...], weight: tuple[int, ...], attributes: dict[str, object]
) -> None:
    path = one_node(tmp_path, op, np.ones(shape, np.float32), np.ones(weight, np.float32), **attributes)
    graph = Graph(path)
    oracle, inputs = Executor(graph, FP64), {"x": torch.ones(shape).double(), "w_0": torch.ones(weight).double()}
    counts = torch.as_tensor(oracle.run_nodes(graph.nodes, inputs, ["y"])["y"])
    found = summation(oracle, graph.nodes[0], inputs, counts)
    assert found is not None
    torch.testing.assert_close(found, in_any_order(counts, counts, float(counts.mean())))


SUMMED: list[tuple[str, tuple[int, ...], list[Array], dict[str, object], float]] = [
    ("ReduceSum", (3, 16, 4), [np.array([1], np.int64)], {}, 16),
    ("ReduceMean", (3, 16, 4), [], {"axes": [1, 2]}, 64),
    ("GlobalAveragePool", (1, 2, 8, 4), [], {}, 32),
    ("AveragePool", (1, 2, 8, 8), [], {"kernel_shape": [4, 2], "strides": [4, 2]}, 8),
    ("CumSum", (64, 16), [np.array(1, np.int64)], {}, 16),
    ("CumSum", (64, 16), [np.array(-2, np.int64)], {}, 64),
]


@pytest.mark.parametrize(("op", "shape", "weights", "attributes", "terms"), SUMMED)
def test_a_sum_of_ones_counts_its_terms(
    tmp_path: Path, op: str, shape: tuple[int, ...], weights: list[Array], attributes: dict[str, object], terms: float
) -> None:
    """A mean is off by what its sum is off by, divided; and is rounded itself."""
    graph = Graph(one_node(tmp_path, op, np.ones(shape, np.float32), *weights, **attributes))
    oracle, inputs = Executor(graph, FP64), {"x": torch.ones(shape).double()}
    inputs |= {f"w_{i}": torch.from_numpy(w) for i, w in enumerate(weights)}
    result = torch.as_tensor(oracle.run_nodes(graph.nodes, inputs, ["y"])["y"])
    found = summation(oracle, graph.nodes[0], inputs, result)
    assert found is not None
    sums = result * (terms if bool((result == 1).all()) else 1)
    off = in_any_order(sums, sums, terms) * result / sums
    torch.testing.assert_close(found, torch.hypot(off, ROUNDING * result))


# Elementwise models, by hand -----------------------------------------------------------------------------------------

BY_HAND: list[tuple[str, str, list[list[float]], float, float]] = [
    ("Exp", "torch", [[2.0]], 7.0, 0.7 * 7),
    ("Gelu", "torch", [[-40.0]], -3.0, math.hypot(3.0, 2 * 32)),
    ("Gelu", "torch", [[-4.0]], -3.0, math.hypot(3.0, 2 * 4)),
    ("Elu", "ort", [[-4.0]], -1.0, math.hypot(0.6, 0.6)),
    ("Elu", "ort", [[4.0]], 4.0, 0.6 * 4),
    ("LogSoftmax", "torch", [[5.0]], -2.0, math.hypot(2.0, 1 + 7)),
    ("ReduceLogSumExp", "torch", [[1.0, 2.0, 3.0, 4.0]], 6.0, math.hypot(6.0, 1 + 6 + math.log(4))),
    # x, scale, bias, mean, variance: a is 3 ÷ √4; |5·1.5| + |−7·1.5| + |−2|
    ("BatchNormalization", "torch", [[5.0], [3.0], [-2.0], [-7.0], [3.99999]], 16.0, math.hypot(8.0, 0.5 * 20)),
]


@pytest.mark.parametrize(("op", "by", "inputs", "result", "expected"), BY_HAND)
def test_an_error_is_a_part_of_the_result_and_one_of_what_it_refers_to(
    op: str, by: str, inputs: list[list[float]], result: float, expected: float
) -> None:
    errors = errors_of(elementwise(op), by)
    assert errors is not None
    shaped = [torch.tensor(v).double() if i else torch.tensor(v).double()[None] for i, v in enumerate(inputs)]
    found = errors.spread(elementwise(op), shaped, torch.tensor([[result]]).double())
    assert found.flatten().tolist() == pytest.approx([expected], rel=1e-5)


# One operator spelled in two ways -------------------------------------------------------------------------------------


def test_a_normalization_over_two_axes_is_one_over_all_their_elements(tmp_path: Path) -> None:
    x = np.random.default_rng(0).standard_normal((4, 8, 16)).astype(np.float32)
    scale, bias = (np.random.default_rng(i).uniform(1, 2, (8, 16)).astype(np.float32) for i in (1, 2))
    two = doubted(one_node(tmp_path, "LayerNormalization", x, scale, bias, axis=1), x)
    flat = one_node(tmp_path, "LayerNormalization", x.reshape(4, 128), scale.ravel(), bias.ravel())
    assert two == pytest.approx(doubted(flat, x.reshape(4, 128)), rel=1e-6)


def test_a_scale_of_each_group_is_one_of_each_of_its_channels(tmp_path: Path) -> None:
    """Opsets 18 to 20 have one scale a group, 21 one a channel."""
    x = np.random.default_rng(0).standard_normal((2, 6, 4, 4)).astype(np.float32)
    scale, bias = np.array([0.5, 4], np.float32), np.array([1, -3], np.float32)
    old = doubted(one_node(tmp_path, "GroupNormalization", x, scale, bias, opset=18, num_groups=2), x)
    weights = (np.repeat(scale, 3), np.repeat(bias, 3))
    assert old == pytest.approx(
        doubted(one_node(tmp_path, "GroupNormalization", x, *weights, opset=21, num_groups=2), x), rel=1e-6
    )


@pytest.mark.parametrize("op", ["LayerNormalization", "InstanceNormalization"])
def test_an_epsilon_is_that_of_the_node(tmp_path: Path, op: str) -> None:
    """x, ε and 2·x, 4·ε give the same result, off by the same."""
    x = np.random.default_rng(0).standard_normal((2, 8, 8)).astype(np.float32)
    weights = np.ones(8, np.float32), np.zeros(8, np.float32)
    one = doubted(one_node(tmp_path, op, x, *weights, epsilon=1.0), x)
    assert doubted(one_node(tmp_path, op, 2 * x, *weights, epsilon=4.0), 2 * x) == pytest.approx(one, rel=1e-6)
    assert doubted(one_node(tmp_path, op, x, *weights, epsilon=1e-5), x) > 1.2 * one


@pytest.mark.parametrize("axis", [1, -1])
def test_a_softmax_sums_along_its_axis(tmp_path: Path, axis: int) -> None:
    x = np.zeros((1, 1024), np.float32) if axis == -1 else np.zeros((1, 1024, 3), np.float32)
    found = spread_of(one_node(tmp_path, "Softmax", x, axis=axis), x)
    y = 1 / 1024
    expected = y * math.hypot(1.5, 1 + ROUNDING * math.sqrt(1024 / 3))
    assert found.flatten().tolist() == pytest.approx([expected] * x.size, rel=1e-3)


@pytest.mark.parametrize("opset", [11, 17])
def test_what_all_numbers_of_a_row_have_in_common_moves_no_softmax(tmp_path: Path, opset: int) -> None:
    """The largest number is subtracted exactly from what is near it; a row of −3.4e38 is as sure as one of 0."""
    x = np.random.default_rng(0).integers(-8, 8, (2, 16)).astype(np.float32)
    path = one_node(tmp_path, "Softmax", x, opset=opset)
    near = spread_of(path, x)
    assert torch.allclose(spread_of(path, x + 4096), near, rtol=1e-6)
    masked = np.full((2, 16), np.finfo(np.float32).min, np.float32)
    assert torch.allclose(spread_of(path, masked), spread_of(path, 0 * x), rtol=1e-6)
    masked[:, 3] = 0
    assert torch.isfinite(spread_of(path, masked)).all()


def spread_of(path: Path, x: Array, by: str = "", claim: Arithmetic | None = None) -> torch.Tensor:
    """The model of a network's only node, in unit roundoffs."""
    graph = Graph(path)
    oracle, values = Executor(graph, FP64), {"x": torch.from_numpy(x).double()}
    result = torch.as_tensor(oracle.run_nodes(graph.nodes, values, ["y"])["y"])
    return spread(oracle, graph.nodes[0], values, result, "y", by, claim)


def test_an_enlarged_map_is_off_by_its_slope_times_its_coordinate(tmp_path: Path) -> None:
    """A ramp of 3 a pixel that reaches 0 at its end, where the coordinate 63 is off by a roundoff of its size."""
    x = (3 * (np.arange(64, dtype=np.float32) - 63))[None, None, None]
    scales = np.array([1, 1, 1, 4], np.float32)
    path = one_node(tmp_path, "Resize", x, np.array([], np.float32), scales, mode="linear")
    found = spread_of(path, x).flatten()
    assert float(found[4 * 63]) == pytest.approx(3 * 63, rel=0.05)
    assert float(found[0]) == pytest.approx(1.5 * 3 * 63, rel=0.05)  # the result's own rounding, no coordinate


def test_a_sampled_image_is_off_by_its_slope_wherever_its_coordinates_are_small(tmp_path: Path) -> None:
    """The coordinate 0 is the middle of the image: it is off by a part of the image, not of itself."""
    image = np.broadcast_to(np.arange(9, dtype=np.float32) - 4, (1, 1, 9, 9)).copy()
    net = NetBuilder()
    net.op("GridSample", net.weight(image), "x", name="y", align_corners=1)
    grid = np.zeros((1, 16, 16, 2), np.float32)
    path = net.save(tmp_path / "net.onnx", {"x": (1, list(grid.shape))}, ["y"])
    found = spread_of(path, grid)
    assert float(found.square().mean().sqrt()) == pytest.approx(4, rel=0.3)  # 4 pixels, each of slope 1, are half of it


# Claims and levels ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("claim", ["tf32", "fp16", "bf16"])
def test_a_product_is_doubted_by_the_rounding_of_its_operands(tmp_path: Path, claim: str) -> None:
    rng = np.random.default_rng(0)
    x, weight = (rng.standard_normal(shape).astype(np.float32) for shape in ((32, 64), (64, 32)))
    path = one_node(tmp_path, "MatMul", x, weight)
    exact, rounded = (
        np.asarray(Executor(Graph(path), arithmetic).run({"x": x})["y"], np.float64)
        for arithmetic in (FP64, ARITHMETICS[claim])
    )
    assert np.linalg.norm(rounded - exact) == pytest.approx(doubted(path, x, claim=ARITHMETICS[claim]), rel=0.25)


def test_levels_are_doubted_by_what_lies_between_two(tmp_path: Path) -> None:
    """0.3 of a level each, whether they are shown as levels or as what they stand for."""
    net = NetBuilder()
    scale, zero = net.weight(np.array(0.25, np.float32)), net.weight(np.array(3, np.uint8))
    levels = net.op("QuantizeLinear", net.op("Neg", "x"), scale, zero, name="levels")
    net.op("DequantizeLinear", levels, scale, zero, name="y")
    x = np.random.default_rng(0).standard_normal((1, 400)).astype(np.float32)
    path = net.save(tmp_path / "net.onnx", {"x": (1, [1, 400])}, ["levels", "y"])
    assert doubted(path, x, last=2) == pytest.approx(FLIPPED * 20)
    assert doubted(path, x) == pytest.approx(FLIPPED * 0.25 * 20, rel=1e-3)
    read = Graph(path)
    given = {"levels": np.asarray(Executor(read, FP64).run({"x": x})["levels"])}
    # Levels that were given are nobody's doubt.
    assert doubt(Executor(read, FP64), read.nodes[2:], given, "y") < 1e-4


def test_sizes_are_not_doubted(tmp_path: Path) -> None:
    """A factor of 2.9999999 would give a map of another size."""
    net = NetBuilder()
    factors = net.op("Mul", net.weight(np.array([1, 1, 3, 3], np.float32)), "s", name="factors")
    net.op("Resize", "x", "", factors, name="y", mode="nearest")
    inputs = {"x": (1, [1, 1, 4, 4]), "s": (1, [4])}
    graph = Graph(net.save(tmp_path / "net.onnx", inputs, ["y"]))
    given = {"x": np.ones((1, 1, 4, 4), np.float32), "s": np.ones(4, np.float32)}
    assert 0 <= doubt(Executor(graph, FP64), graph.nodes, given, "y") < 1e-4


def test_terms_of_sums() -> None:
    def count(op: str, shapes: dict[str, tuple[int, ...]], result: tuple[int, ...], **attributes: Any) -> float:
        inputs: dict[str, Tensor] = {name: torch.zeros(shape) for name, shape in shapes.items()}
        return _terms(node_of(op, [*shapes], **attributes), inputs, torch.zeros(result))

    assert count("Conv", {"x": (1, 4, 8, 8), "w": (6, 4, 3, 3)}, (1, 6, 6, 6)) == 36
    assert count("ConvTranspose", {"x": (1, 4, 2, 2), "w": (4, 6, 2, 2)}, (1, 6, 4, 4)) == 16 * 24 / 96
    assert count("MatMul", {"x": (5, 7), "w": (7, 3)}, (5, 3)) == 7
    assert count("Gemm", {"x": (5, 7), "w": (7, 3)}, (5, 3)) == 7
    assert count("Einsum", {"x": (2, 3, 4), "w": (4, 5)}, (2, 3, 5), equation="bij,jk->bik") == 4
    assert count("AveragePool", {"x": (1, 1, 4, 4)}, (1, 1, 2, 2), kernel_shape=[2, 2]) == 4
    assert count("ReduceSum", {"x": (2, 6)}, (2, 1)) == 6
    running = {"x": torch.zeros(2, 9), "a": torch.tensor(1)}
    assert _terms(node_of("CumSum", ["x", "a"]), running, torch.zeros(2, 9)) == 9
    scalar = {"x": torch.tensor(1.0), "a": torch.tensor(0)}
    assert _terms(node_of("CumSum", ["x", "a"]), scalar, torch.tensor(1.0)) == 1


@pytest.mark.parametrize(
    ("equation", "count"), [("bij,bjk->bik", 3), ("bij,bjk", 6), ("...ij,...jk->...ik", 3), ("b i j, b j k -> i k", 6)]
)
def test_indices_that_an_einsum_sums(equation: str, count: int) -> None:
    inputs = {"x": torch.zeros(2, 5, 3), "w": torch.zeros(2, 3, 7)}
    assert _contracted(node_of("Einsum", ["x", "w"], equation=equation), inputs) == count


def test_sums_of_terms_rounded_at_the_same_place() -> None:
    """16 terms of 1 + u are each rounded by up to half of the last place of their sum, 2⁻¹⁹, all to the same side."""
    terms = torch.full((1, 16), 1 + 2.0**-22)
    total = terms.double().sum(1)
    worst = one_sided(terms, lambda t: t.sum(1), total, terms.double().square().sum(1))
    lost = abs(round((1 + 2.0**-22) * 2**19) / 2**19 - (1 + 2.0**-22)) * 16
    assert float(worst) >= lost / U
    assert float(worst) == pytest.approx(64)
    assert one_sided(torch.zeros(1, 4), lambda t: t.sum(1), torch.zeros(1), torch.zeros(1)).tolist() == [0]
    mean = _adding(node_of("ReduceMean", ["x"], axes=[1], keepdims=0))
    assert (mean.op, mean.inputs[0], mean.index < -(10**8)) == ("ReduceSum", "x", True)


def test_errors_of_operators_by_hand() -> None:
    x, result = torch.tensor([[-40.0, 3.0]]), torch.tensor([[-50.0, 1.0]])
    any_node = node_of("X", ["x"])
    assert operator_errors._unit(any_node, [x], result).tolist() == [[1, 1]]
    assert operator_errors._argument(any_node, [x], result).tolist() == [[32, 3]]
    assert operator_errors._below_zero(any_node, [torch.tensor([-1.0, 0, 1])], torch.zeros(3)).tolist() == [1, 0, 0]
    assert operator_errors._normalizer(any_node, [x], result).tolist() == [[11, 3]]
    found = operator_errors._logarithm_of_sum(any_node, [torch.zeros(2, 8)], torch.tensor([-2.0, 3.0]))
    assert found.tolist() == pytest.approx([3 + math.log(8), 4 + math.log(8)])
    parts = [
        torch.tensor([[-2.0, 1.0]]),
        *(torch.tensor(v) for v in ([2.0, -3.0], [1.0, -1.0], [3.0, 5.0], [3.0, 8.0])),
    ]
    norm = operator_errors._terms_of_batch_norm(node_of("BatchNormalization", ["x"], epsilon=1.0), parts, parts[0])
    assert norm.tolist() == [[2 * 1 + 3 * 1 + 1, 1 * 1 + 5 * 1 + 1]]
    usual = operator_errors._terms_of_batch_norm(node_of("BatchNormalization", ["x"]), parts, parts[0])
    assert float(usual[0, 0]) == pytest.approx((2 + 3) * 2 / math.sqrt(3 + 1e-5) + 1)
    wide = operator_errors._wider(Errors(1.0, 0.5), Errors(2.0, 0.25))
    assert (wide.relative, wide.absolute) == (2.0, 0.5)


def test_errors_of_unknown_implementations_are_no_smaller_than_those_that_were_measured() -> None:
    for op, known in ANY.items():
        for table in (ONNX_RUNTIME, TORCH):
            one = table.get(op)
            if one is not None:
                assert known.relative >= one.relative, op
                assert known.absolute >= one.absolute, op
                assert not one.absolute or known.of == (ONNX_RUNTIME[op].of if ONNX_RUNTIME[op].absolute else one.of), (
                    op
                )


@pytest.mark.parametrize("shown", ["levels", "y"])
def test_levels_are_settled_but_between_two(tmp_path: Path, shown: str) -> None:
    """Half a level may go either way, and what the rounding of x leaves open; a level that was cut off may not."""
    net = NetBuilder()
    scale, zero = net.weight(np.array(0.1, np.float32)), net.weight(np.array(3, np.uint8))
    net.op("DequantizeLinear", net.op("QuantizeLinear", "x", scale, zero, name="levels"), scale, zero, name="y")
    graph = Graph(net.save(tmp_path / "net.onnx", {"x": (1, [1, 6])}, ["levels", "y"]))
    x = np.array([[0.25, 0.25, 0.2500001, 0.2500001, 0.28, 0.28]], np.float32)
    nodes = graph.nodes[: 1 if shown == "levels" else 2]
    captured = np.array([[5, 6, 5, 6, 6, 5]], np.uint8)
    if shown == "y":
        captured = (captured.astype(np.float32) - 3) * np.float32(0.1)
    oracle = Executor(graph, FP64)
    exact = torch.as_tensor(oracle.run_nodes(nodes, {"x": x}, [shown])[shown])
    settled = between_levels(oracle, nodes, {"x": x}, shown, captured, exact, 2.0**-24)
    assert settled is not None
    off = (settled.double() - torch.as_tensor(captured).double()).abs().flatten()
    assert (off > 1e-6).tolist() == [False, False, False, False, False, True]
    net = NetBuilder()
    net.op("QuantizeLinear", net.op("Neg", "x"), net.weight(np.array(0.1, np.float32)), name="levels")
    graph = Graph(net.save(tmp_path / "other.onnx", {"x": (1, [1, 6])}, ["levels"]))
    assert between_levels(Executor(graph, FP64), graph.nodes, {"x": x}, "levels", captured, exact, 2.0**-24) is None


@pytest.mark.parametrize("levels", ["UINT8", "INT16", "UINT16", "INT4", "UINT4", "FLOAT8E4M3FN", "FLOAT8E5M2"])
@pytest.mark.parametrize("floats", ["FLOAT", "FLOAT16", "BFLOAT16"])
def test_levels_of_all_types_are_settled(tmp_path: Path, levels: str, floats: str) -> None:
    """NumPy and torch have not all of these types; what a test shows has them."""
    x_type, level_type = (getattr(onnx.TensorProto, name) for name in (floats, levels))
    constants = helper.make_tensor("s", x_type, [], [0.25]), helper.make_tensor("z", level_type, [], [0])
    ends = [helper.make_tensor_value_info(name, kind, [1, 8]) for name, kind in (("x", x_type), ("q", level_type))]
    node = helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"])
    made = helper.make_graph([node], "net", ends[:1], ends[1:], constants)
    onnx.save(helper.make_model(made, opset_imports=[helper.make_opsetid("", 21)]), tmp_path / "net.onnx")
    graph = Graph(tmp_path / "net.onnx")
    x = np.linspace(0.3, 1.5, 8).reshape(1, 8).astype(helper.tensor_dtype_to_np_dtype(x_type))
    oracle = Executor(graph, FP64)
    exact = as_tensor(oracle.run_nodes(graph.nodes, {"x": x}, ["q"])["q"])
    captured = exact.numpy().astype(helper.tensor_dtype_to_np_dtype(level_type))
    captured[0, 7] = 0
    settled = between_levels(oracle, graph.nodes, {"x": x}, "q", captured, exact, 2.0**-24)
    assert settled is not None
    assert torch.equal(settled, exact.double())
    assert float(settled[0, 7]) == 6


def test_levels_that_are_cut_off_are_found(tmp_path: Path) -> None:
    """Their error is but twice that of rounding, so no limit of 4 tells it."""
    nets = []
    for name in ("right", "wrong"):
        net = NetBuilder()
        scale = net.weight(np.array(0.05, np.float32))
        x = net.op("Sigmoid", "x", name="before")
        if name == "right":
            net.op("DequantizeLinear", net.op("QuantizeLinear", x, scale, name="levels"), scale, name="y")
        else:
            net.op("Mul", net.op("Floor", net.op("Div", x, scale), name="levels"), scale, name="y")
        nets.append(net.save(tmp_path / f"{name}.onnx", {"x": (1, [1, 400])}, ["y"]))
    test = diagnose(str(nets[0]), "ort", test_model=str(nets[1])).tests[0]
    assert [row.onnx for row in test.guilty] == ["levels"]
    assert diagnose(str(nets[0]), "ort", test_model=str(nets[0])).tests[0].guilty == []
