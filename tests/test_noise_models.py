"""Models of what correct implementations may be off by, against implementations written out here in FP32."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from nets import NetBuilder

from cp_debug.backends.arithmetic import ARITHMETICS, FP64, Arithmetic
from cp_debug.backends.executor import Executor
from cp_debug.bisect.operator_errors import ANY, BY_FAMILY, errors_of
from cp_debug.bisect.perturbation import doubt
from cp_debug.bisect.summation import ROUNDING, U, in_any_order
from cp_debug.graph.graph import Graph, Node

Array = np.ndarray


def doubted(path: Path, x: Array, family: str = "", claim: Arithmetic | None = None, last: int | None = None) -> float:
    """What the nodes up to ``last`` of a network may be off by at their end."""
    graph = Graph(path)
    nodes = graph.nodes[:last]
    return doubt(Executor(graph, FP64), nodes, {"x": x}, nodes[-1].outputs[0], family, claim)


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
    for family, result in (("ort", of_ort[..., 0] + 1j * of_ort[..., 1]), ("torch", of_torch)):
        error = np.linalg.norm(result.astype(np.complex128) - exact)
        assert 0.05 * doubted(path, x, family) < error < doubted(path, x, family), family


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
        for family in ("", *BY_FAMILY):
            if (errors := errors_of(node, family)) is not None:
                widths[family] = errors.spread(node, [x], torch.tanh(x))
        assert all(bool((widths[""] >= width).all()) for width in widths.values()), op
        assert torch.equal(widths.get("emu", x), widths.get("torch", x))  # emulation computes with torch


def test_a_rounding_is_off_by_what_the_models_say() -> None:
    """0.4 units of the rounded number, root mean square, where mantissas are evenly spread."""
    numbers = np.random.default_rng(0).uniform(1, 2, 100_000)
    off = (numbers.astype(np.float32) - numbers) / numbers
    assert math.sqrt(np.square(off).mean()) / U == pytest.approx(ROUNDING, rel=0.05)
