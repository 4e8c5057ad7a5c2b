"""What happened to weights and activations, read off the result of one layer that is too small to fit all of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from nets import NetBuilder
from torch import Tensor

from cp_debug.backends.arithmetic import FP32, FP64
from cp_debug.backends.base import Program
from cp_debug.backends.executor import Executor
from cp_debug.bisect.causes.search import Explanation, explain
from cp_debug.bisect.causes.segment import Segment, SegmentContext
from cp_debug.graph.graph import Graph
from cp_debug.programs.tensor_change import describe

ROWS, WIDE, HIDDEN = 12, 48, 8


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> Graph:
    """Layers of ``x`` [12, 48], none with enough rows to tell all its weights, and what follows the product."""
    net = NetBuilder(3)
    net.op("MatMul", "x", net.weight(net.rng.standard_normal((WIDE, 16)).astype(np.float32)), name="product")
    net.op("Relu", "product", name="relu")
    net.op("Add", "product", net.weight(net.rng.standard_normal(16).astype(np.float32)), name="sum")
    shape = net.weight(np.array([1, WIDE, 3, 4]))
    net.op("Reshape", net.op("Transpose", "x", perm=[1, 0]), shape, name="map")
    net.conv("map", WIDE, 6, name="conv")
    net.op("Reshape", "x", net.weight(np.array([4, 3, WIDE])), name="steps")
    weights = [net.rng.standard_normal(s).astype(np.float32) * 0.3 for s in ((1, 24, WIDE), (1, 24, HIDDEN), (1, 48))]
    net.op("GRU", "steps", *map(net.weight, weights), name="recurrent", hidden_size=HIDDEN)
    outputs = ["relu", "sum", "conv", "recurrent"]
    return Graph(net.save(tmp_path_factory.mktemp("causes") / "net.onnx", {"x": (1, [ROWS, WIDE])}, outputs))


def _segment(graph: Graph, target: str) -> Segment:
    given = {"x": torch.randn(ROWS, WIDE, generator=torch.Generator().manual_seed(4))}
    values: dict[str, Tensor] = dict(given)
    Executor(graph, FP32).run(given, lambda name, value: values.__setitem__(name, value))
    context = SegmentContext(Program("net", graph), Executor(graph, FP64), "fp32")
    return Segment.of(context, target, [v for v in graph.values if v != target], lambda name: values[name])


def _explained(found: Segment, test: Tensor) -> Explanation:
    return explain(Segment(found.context, found.nodes, found.target, found.given, test.float()))[0]


def _levels(weight: Tensor, bits: int) -> Tensor:
    step = weight.abs().max() / (2 ** (bits - 1) - 1)
    return (weight / step).round() * step


def _short(weight: Tensor, bits: int) -> Tensor:
    mantissa, exponent = torch.frexp(weight)
    return torch.ldexp((mantissa * 2 ** (bits + 1)).round() / 2 ** (bits + 1), exponent)


def _flipped_bit(weight: Tensor) -> Tensor:
    changed = weight.clone()
    changed.view(-1)[121] *= 4
    return changed


def _copied(weight: Tensor) -> Tensor:
    """Output channel 4 holds the weights of channel 2."""
    axis = 0 if weight.dim() > 2 else 1
    order = torch.arange(weight.shape[axis])
    order[4] = 2
    return weight.index_select(axis, order)


CHANGES: list[tuple[str, str, int, Callable[[Tensor], Tensor]]] = [
    ("weights-pruned", "pruned", 1, lambda w: torch.where(w.abs() < w.abs().flatten().quantile(0.37), 0.0, w)),
    ("weights-clipped", "clipped", 1, lambda w: w.clamp(-float(w.std()), float(w.std()))),
    ("coarse-weights", "coarse", 0, lambda w: _levels(w, 4)),
    ("coarse-weights", "coarse", 0, lambda w: _short(w, 5)),
    ("other-weights", "elements", 2, _flipped_bit),
    ("weight-layout", "copied", 1, _copied),
    ("weight-layout", "permuted", 0, lambda w: torch.cat([w[::2], w[1::2]])),
]


@pytest.mark.few(3)
@pytest.mark.parametrize("target", ["product", pytest.param("conv", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("cause", "kind", "parameters", "change"), CHANGES, ids=lambda v: v if str(v) == v else "")
def test_what_happened_to_weights_is_told_without_a_fit(
    net: Graph, target: str, cause: str, kind: str, parameters: int, change: Callable[[Tensor], Tensor]
) -> None:
    found = _segment(net, target)
    node = found.nodes[-1]
    weight = found.weight(node, 1)
    assert weight is not None
    test = found.edited(node, inputs={1: change(weight)})
    assert test is not None
    best = _explained(found, test).cause
    assert best is not None
    # Outputs in another order, and copies of others where no bias is added.
    same_for_outputs = (target, kind) in {("conv", "permuted"), ("product", "copied")}
    assert best.cause in ({"permuted", cause} if same_for_outputs else {cause})
    assert same_for_outputs or best.parameters == parameters
    both = describe(weight.float().numpy(), change(weight).float().numpy())
    assert both is not None
    assert both.kind == kind


@pytest.mark.parametrize(
    ("says", "order"), [("rolled by 1", (31, *range(31))), ("2 × 16", (*range(0, 32, 2), *range(1, 32, 2)))]
)
def test_an_order_with_a_rule_is_one_number(tmp_path: Path, says: str, order: tuple[int, ...]) -> None:
    """Of 32 numbers in an arbitrary order nothing is left to prove it with; a rule explains them all."""
    net = NetBuilder(3)
    net.op("Sigmoid", "x", name="y")
    graph = Graph(net.save(tmp_path / "net.onnx", {"x": (1, [1, 32])}, ["y"]))
    given = {"x": torch.randn(1, 32, generator=torch.Generator().manual_seed(0))}
    context = SegmentContext(Program("net", graph), Executor(graph, FP64), "fp32")
    found = Segment(context, graph.nodes, "y", given, context.oracle.run(given)["y"])
    best = _explained(found, found.exact[:, list(order)]).cause
    assert best is not None
    assert (best.cause, best.parameters) == ("permuted", 1)
    assert says in best.says
    shuffled = torch.randperm(32, generator=torch.Generator().manual_seed(1))
    assert _explained(found, found.exact[:, shuffled]).cause is None


@pytest.mark.slow
def test_the_gates_of_a_recurrent_layer_are_each_transposed(net: Graph) -> None:
    found = _segment(net, "recurrent")
    state = found.weight(found.nodes[-1], 2)
    assert state is not None
    turned = torch.cat([gate.mT for gate in state.split(HIDDEN, 1)], 1)
    test = found.edited(found.nodes[-1], inputs={2: turned})
    assert test is not None
    best = _explained(found, test).cause
    assert best is not None
    assert (best.cause, best.evidence["blocks"]) == ("weight-layout", 3)
    both = describe(state.float().numpy(), turned.float().numpy())
    assert both is not None
    assert (both.kind, both.evidence["blocks"]) == ("transposed", 3)


@pytest.mark.parametrize(
    ("target", "cause", "says", "change"),
    [
        ("sum", "extra-activation", "Abs", torch.abs),
        ("sum", "extra-activation", "Softmax along axis 1", lambda x: x.softmax(1)),
        ("relu", "other-operator", "LeakyRelu with alpha = 0.053", None),
        ("sum", "other-operator", "Max", None),
    ],
)
def test_functions_are_named(
    net: Graph, target: str, cause: str, says: str, change: Callable[[Tensor], Tensor] | None
) -> None:
    found = _segment(net, target)
    if change is not None:
        test: Tensor | None = change(found.exact)
    elif target == "relu":
        test = found.edited(found.nodes[-1], op="LeakyRelu", alpha=0.053)
    else:
        test = found.edited(found.nodes[-1], op="Max")
    assert test is not None
    best = _explained(found, test).cause
    assert best is not None
    assert best.cause == cause
    assert says in best.says


@pytest.mark.slow
@pytest.mark.parametrize("target", ["product", "conv", "recurrent", "relu", "sum"])
def test_noise_is_none_of_them(net: Graph, target: str) -> None:
    found = _segment(net, target)
    for size in (1e-3, 0.3):
        noise = torch.randn(found.exact.shape, generator=torch.Generator().manual_seed(2)).double() * size
        assert _explained(found, found.exact + noise).cause is None
