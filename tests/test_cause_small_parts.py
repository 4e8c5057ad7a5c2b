"""Small parts of the search for causes, with results worked out by hand: orders, shares, limits, sums, wordings."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from onnx import helper
from torch import Tensor

from cp_debug.bisect import operator_errors, perturbation, preflight, worst_samples
from cp_debug.bisect.causes import constant_changes, fits, layout, ranges, scales, schema, search
from cp_debug.bisect.file_weights import _standardized, product_of
from cp_debug.bisect.import_dump import _other_dtypes, _other_shapes
from cp_debug.bisect.observe import Observation
from cp_debug.bisect.operator_errors import Errors
from cp_debug.bisect.regions import hypotheses
from cp_debug.bisect.summation import U, _adding, _contracted, _terms, one_sided
from cp_debug.graph.graph import Node, ValueInfo


def node(op: str, inputs: list[str], outputs: list[str] | None = None, index: int = 3, **attributes: Any) -> Node:
    return Node.of(index, helper.make_node(op, inputs, outputs or ["y"], f"n{index}", **attributes))


@pytest.mark.parametrize(
    ("order", "says"),
    [
        ([1, 2, 3, 4, 0], "rolled by 4"),
        ([4, 0, 1, 2, 3], "rolled by 1"),
        ([1, 2, 3, 0], ""),
        ([0, 2, 4, 1, 3, 5], "3 × 2 slices are read as 2 × 3"),
        ([0, 3, 1, 4, 2, 5], "2 × 3 slices are read as 3 × 2"),
        ([0, 2, 1, 3], "2 × 2 slices are read as 2 × 2"),
        ([1, 0, 2, 3, 4], ""),
    ],
)
def test_an_order_in_words(order: list[int], says: str) -> None:
    assert layout._rule(order) == says


def test_the_inverse_of_a_transposition_reads_the_same_numbers_as_another_shape() -> None:
    exact = torch.arange(6.0).reshape(2, 3)
    expected = exact.reshape(3, 2).permute(1, 0)
    assert torch.equal(layout._inverse(exact, [1, 0]), expected)
    three = torch.arange(24.0).reshape(2, 3, 4)
    assert layout._inverse(three, [1, 2, 0]).shape == three.shape
    assert torch.equal(layout._inverse(three, [1, 2, 0]), three.reshape(3, 4, 2).permute(2, 0, 1))


def test_slices_go_to_the_nearest_and_stay_where_nothing_is_nearer() -> None:
    exact = torch.tensor([[1.0, 0], [0, 1], [1, 0]])
    test = torch.tensor([[0.0, 1], [0.9, 0], [1, 0]])
    assert layout._nearest(exact, test).tolist() == [1, 0, 2]


@pytest.mark.parametrize(("factor", "same"), [(1.0, True), (1.099, True), (1.11, False)])
def test_a_value_is_the_same_within_a_tenth(factor: float, same: bool) -> None:
    segment: Any = SimpleNamespace(exact=torch.tensor([3.0, 4.0]))
    assert layout._same(factor * segment.exact, segment) is same


def test_rows_have_changed_beyond_the_fits_own_uncertainty() -> None:
    change = torch.tensor([[10.0], [4.9], [5.1], [0.0], [0.009]])
    noise = torch.tensor([[1.0], [1.0], [1.0], [1.0], [0.001]])
    assert constant_changes._off(change, noise).tolist() == [True, False, True, False, False]
    assert constant_changes._off(change, noise / 1e6).tolist() == [True, True, True, False, False]


def test_rows_in_another_order_are_each_used_once() -> None:
    rows = torch.eye(3)
    every = torch.tensor([True, True, True])
    found = constant_changes._order(rows, rows[[1, 2, 0]], every)
    assert found is not None
    assert found.tolist() == [1, 2, 0]
    assert constant_changes._order(rows, rows, every) is None
    assert constant_changes._order(rows, rows[[1, 1, 0]], every) is None
    assert constant_changes._order(rows, rows[[1, 0, 2]], torch.tensor([True, False, False])) is None


@pytest.mark.parametrize(
    ("places", "axis", "dims", "says"),
    [
        ([2], 0, 1, "element 2"),
        ([0, 1], 0, 2, "rows 0, 1"),
        ([3], 1, 2, "column 3"),
        ([1], 0, 4, "channel 1"),
        ([1, 2, 3, 4], 1, 4, "input channels 1, 2, 3, 4"),
        ([1, 2, 3, 4, 5], 1, 4, "input channels 1, 2, 3, 4, …"),
        ([7], 2, 4, "slice of axis 2 7"),
    ],
)
def test_places_have_the_names_of_their_axis(places: list[int], axis: int, dims: int, says: str) -> None:
    assert constant_changes._named(torch.tensor(places), axis, dims) == says


def values(name: str, value: Any) -> list[Any]:
    return list(schema._values(name, value))


def test_other_values_of_attributes() -> None:
    assert values("keepdims", 1) == [0]
    assert values("keepdims", 0) == [1]
    assert values("axis", 1) == [-1, 0, 2, 3, 4]
    assert values("blocksize", 4) == [3, 5, 8, 2, 0, 1]
    assert values("group", 4) == []
    assert values("perm", [1, 0]) == [[0, 1]]
    assert len(values("perm", [0, 1, 2, 3, 4])) == 119
    assert values("perm", [0, 1, 2, 3, 4, 5]) == []
    assert values("strides", [2, 2]) == [[1, 1], [3, 3]]
    assert values("output_padding", [0, 1]) == [[1, 1], [0, 0], [0, 2]]
    assert values("axes", [0, 1])[:3] == [[0, 2], [0, 3], [0, 4]]
    assert len(values("axes", [0, 1])) == 9
    alphas = values("alpha", 0.5)
    assert 0.5 not in alphas
    assert {0.0, 1.0, 0.25, -0.5} <= set(alphas)
    assert all(
        len(each) == 2 and each != ["Sigmoid", "Tanh"] for each in values("activations", ["Sigmoid", "Tanh"])[:2]
    )


@pytest.mark.parametrize(
    ("op", "count", "orders"),
    [
        ("Sub", 2, [(1, 0)]),
        ("Sub", 3, []),
        ("Clip", 3, [(0, 2, 1)]),
        ("Where", 2, []),
        ("LSTM", 4, [(0, 2, 1, 3)]),
        ("LSTM", 2, []),
        ("Concat", 2, [(1, 0)]),
        ("Concat", 5, [(1, 0, 2, 3, 4), (0, 2, 1, 3, 4), (0, 1, 3, 2, 4), (0, 1, 2, 4, 3), (4, 3, 2, 1, 0)]),
    ],
)
def test_orders_of_operands(op: str, count: int, orders: list[tuple[int, ...]]) -> None:
    assert list(schema._orders(node(op, ["a", "b"]), count)) == orders
    assert len(list(schema._orders(node("Concat", ["a"]), 4))) == 23
    assert [schema._moved(order) for order in ((0, 1), (1, 0), (0, 2, 1))] == [0, 2, 2]


def test_a_value_is_mixed_up_with_others_of_its_shape() -> None:
    """At most 48 of them are tried, wherever they stand; values of another shape do not count."""
    own, edits = torch.ones(2, 4), []

    def edited(at: Node, inputs: dict[int, Tensor]) -> Tensor:
        edits.append((at.op, inputs))
        return next(iter(inputs.values()))

    same = [(f"same{i}", lambda i=i: torch.full((2, 4), float(i))) for i in range(50)]
    others = [(f"flat{i}", lambda: torch.ones(8)) for i in range(60)]
    segment: Any = SimpleNamespace(
        nodes=[node("Add", ["w", "x"]), node("Conv", ["x", "w"])],
        given={"x": own},
        input=lambda name: own,
        others=[*others, ("x", lambda: own), *same, *others],
        edited=edited,
    )
    found = list(schema.another_operand(segment))
    assert [c.parameters for c in found] == [0] * 48
    assert [c.evidence for c in found] == [{"of": f"same{i}", "instead_of": "x"} for i in range(48)]
    assert {(op, *inputs) for op, inputs in edits} == {("Add", 1)}
    assert all(torch.equal(c.value, torch.full((2, 4), float(i)).double()) for i, c in enumerate(found))


@pytest.mark.parametrize(("count", "tried"), [(7, False), (8, True)])
def test_few_numbers_are_like_too_many_others_to_be_told_apart(count: int, tried: bool) -> None:
    segment: Any = SimpleNamespace(
        nodes=[node("Add", ["x", "w"])],
        given={"x": None},
        input=lambda name: torch.ones(count),
        others=[("other", lambda: torch.zeros(count))],
        edited=lambda at, inputs: inputs[0],
    )
    assert bool(list(schema.another_operand(segment))) is tried


def test_gates_are_moved_in_each_part() -> None:
    weight = torch.arange(8.0).reshape(1, 8, 1)  # two parts of two gates of two units
    assert schema._regated(weight, (1, 0), 2).flatten().tolist() == [2, 3, 0, 1, 6, 7, 4, 5]


def test_least_squares_by_channel() -> None:
    x = torch.tensor([[1.0, 2, 3, 9], [1, 2, 3, 9]], dtype=torch.float64)
    y = torch.tensor([[3.0, 5, 7, 0], [0, 0, 0, 0]], dtype=torch.float64)
    mask = torch.tensor([[True, True, True, False]] * 2)
    count, gram, right = fits._sums(y, [x, torch.ones_like(x)], mask, [1])
    assert count.tolist() == [3, 3]
    assert gram[0].tolist() == [[14, 6], [6, 3]]
    assert right[0].tolist() == [34, 15]
    assert torch.allclose(
        fits._solve(count, gram, right), torch.tensor([[2.0, 1], [0, 0]], dtype=torch.float64), atol=1e-9
    )


def test_what_is_wrong_with_int8_scales_of_weights() -> None:
    conv, weight = node("Conv", ["x", "w"]), torch.zeros(6, 4, 3, 3)

    def told(scale: list[float], axis: int) -> str:
        grid: Any = SimpleNamespace(scale=torch.tensor(scale), axis=axis)
        return scales._of_weight(conv, weight, grid)[0]

    assert told([1.0], 1) == "int8-per-tensor"
    assert told([1.0, 2.0], 1) == "int8-axis"
    assert told([1.0, 2.0], 0) == "int8-weights"
    assert scales._of_weight(conv, weight, None)[0] == "int8-weights"
    assert "along axis 0" in scales._of_weight(conv, weight, SimpleNamespace(scale=torch.ones(2), axis=1))[2]  # type: ignore[arg-type]


def candidate(cause: str = "a", parameters: int = 0, **fields: Any) -> Any:
    given = {"located": False, "declared": False, "observed": False, "evidence": {}}
    return SimpleNamespace(cause=cause, parameters=parameters, **{**given, **fields})


@pytest.mark.parametrize(
    ("wrong", "parameters", "residual", "chance"),
    [
        (100, 0, 0.5, False),
        (3, 0, 0.5, True),
        (2, 0, 1e-6, False),
        (2, 2, 1e-6, True),
        (5, 2, 0.5, True),
        (0, 0, 0.5, True),
        (18, 0, 0.5, True),
        (19, 0, 0.5, False),
    ],
)
def test_few_wrong_elements_may_fit_by_chance(wrong: int, parameters: int, residual: float, chance: bool) -> None:
    """300 hypotheses, each with a share of 0.5 in n elements: 300 · 0.5¹⁸ is above a thousandth, 0.5¹⁹ below."""
    segment: Any = SimpleNamespace(wrong=wrong, introduced=1.0)
    assert search._by_chance(segment, candidate(parameters=parameters), residual) is chance
    assert not search._by_chance(segment, candidate(parameters=parameters, located=True), residual)
    assert not search._by_chance(segment, candidate(parameters=parameters, observed=True), residual)


def test_fewer_numbers_that_leave_rounding_alone_are_simpler() -> None:
    best: Any = SimpleNamespace(candidate=candidate(parameters=8))
    for parameters, complete, explained, simpler in (
        (5, True, 0.9995, True),
        (6, True, 0.9995, False),
        (5, False, 0.9995, False),
        (5, True, 0.998, False),
    ):
        tried: Any = SimpleNamespace(candidate=candidate(parameters=parameters), complete=complete, explained=explained)
        assert search._simpler(tried, best) is simpler


def test_operators_that_the_same_cause_may_name_as_well() -> None:
    def tried(op: str, cause: str = "a", parameters: int = 1, accepted: bool = True) -> Any:
        return SimpleNamespace(candidate=candidate(cause, parameters, evidence={"op": op}), accepted=accepted)

    chosen = tried("Relu")
    others = [
        tried("Relu"),
        tried("Clip"),
        tried("Tanh", "b"),
        tried("Elu", parameters=2),
        tried("Abs", accepted=False),
    ]
    assert search._alike(chosen, others) == ("Clip",)
    chosen.candidate.evidence = {}
    assert search._alike(chosen, others) == ()


@pytest.mark.parametrize(("largest", "found"), [(1e-8, True), (2.0**-126, True), (2.0**-127, False), (1e-4, False)])
def test_a_result_below_all_of_fp16_vanishes(largest: float, found: bool) -> None:
    segment: Any = SimpleNamespace(exact=torch.tensor([largest, largest / 2], dtype=torch.float64), nodes=[])
    assert [c.cause for c in ranges._undeclared(segment)] == ["fp16-underflow"] * found


def test_a_rounding_is_measured() -> None:
    for kind in (torch.float16, torch.bfloat16):
        measured = perturbation._roundoff(lambda x, kind=kind: x.to(kind).float())
        assert measured == torch.finfo(kind).eps / 2
    assert perturbation._is_some(torch.tensor([0.0, 1e-30]))
    assert not perturbation._is_some(torch.zeros(2))
    assert not perturbation._is_some(None)


def test_levels_are_rounded_here_where_a_node_of_the_segment_makes_them() -> None:
    dequantize, quantize = node("DequantizeLinear", ["q", "s"]), node("QuantizeLinear", ["x", "s"], ["q"])
    assert perturbation._rounded_here(dequantize, [quantize, dequantize], {"x": torch.ones(1)})
    assert not perturbation._rounded_here(dequantize, [quantize, dequantize], {"q": torch.ones(1)})
    assert not perturbation._rounded_here(dequantize, [dequantize], {})


@pytest.mark.parametrize(
    ("numbers", "stays"),
    [
        ([1.0, 2.0], True),
        ([65519.0], True),
        ([65520.0], False),
        ([-65520.0], False),
        ([1e-7], False),
        ([math.nan], False),
        ([], True),
    ],
)
def test_what_fp16_holds(numbers: list[float], stays: bool) -> None:
    assert preflight._stays_half(torch.tensor(numbers)) is stays


def observation(**fields: Any) -> Observation:
    return Observation(**{"noise_floor": 0.0, "observer_gap": 0.0, "first_unsteady": None} | fields)


def test_notes_of_an_observation() -> None:
    def notes(kind: Any, **fields: Any) -> list[str]:
        return list(kind("ort", observation(**fields), draws=False))

    gap, noise = worst_samples._gap, worst_samples._noise
    assert notes(gap, observer_gap=0.2, noise_floor=0.1)[0].startswith("observer gap 0.2: with probes ort runs")
    assert notes(gap, observer_gap=0.1, noise_floor=0.1) == []
    assert list(gap("ort", observation(observer_gap=0.2), draws=True)) == []
    assert list(gap("ort", None, draws=False)) == []
    told = notes(noise, first_unsteady="conv", noise_floor=0.125, repeats=True)
    assert told == ["ort: another thread count changes its sums, first at conv (noise floor 0.12)"]
    assert "it is not deterministic" in notes(noise, first_unsteady="conv", repeats=False)[0]
    assert "draws random numbers" in next(iter(noise("ort", observation(first_unsteady="c"), draws=True)))
    assert notes(noise) == []
    assert worst_samples._standing_out(observation(observer_gap=0.3, noise_floor=0.1)) == (pytest.approx(0.2), 0.1)
    assert worst_samples._standing_out(observation(observer_gap=0.1, noise_floor=0.3)) == (0, 0.3)


def test_nodes_stand_behind_what_they_read() -> None:
    nodes = [
        node("A", ["b"], ["a"], 0),
        node("B", ["c"], ["b"], 1),
        node("C", ["x"], ["c"], 2),
        node("D", ["a"], ["d"], 3),
    ]
    assert [n.op for n in hypotheses._ordered(nodes)] == ["C", "B", "A", "D"]


def test_partial_sums_of_fp16_and_its_range() -> None:
    x = torch.tensor([[2048.0, 1, 1], [1, 1, 2048]])
    assert hypotheses._sum(x, [1]).tolist() == [[2048], [2050]]
    assert hypotheses._sum(x, [-1]).shape == (2, 1)
    assert hypotheses._sum(x, [0, 1]).shape == (1, 1)
    assert hypotheses._saturate(torch.tensor([1e6, -1e6, 1.0])).tolist() == [65504, -65504, 1]
    assert hypotheses._saturate(torch.tensor([1 << 20])).tolist() == [1 << 20]
    call: Any = {"axis": None}
    large = torch.tensor([[12.0, 12.0]])
    assert hypotheses._softmax(True)(call, [large]).tolist() == [[0.5, 0.5]]
    assert not torch.isfinite(hypotheses._softmax(False)(call, [large])).all()


def test_terms_of_sums() -> None:
    def count(op: str, shapes: dict[str, tuple[int, ...]], result: tuple[int, ...], **attributes: Any) -> float:
        inputs: dict[str, Tensor] = {name: torch.zeros(shape) for name, shape in shapes.items()}
        return _terms(node(op, [*shapes], **attributes), inputs, torch.zeros(result))

    assert count("Conv", {"x": (1, 4, 8, 8), "w": (6, 4, 3, 3)}, (1, 6, 6, 6)) == 36
    assert count("ConvTranspose", {"x": (1, 4, 2, 2), "w": (4, 6, 2, 2)}, (1, 6, 4, 4)) == 16 * 24 / 96
    assert count("MatMul", {"x": (5, 7), "w": (7, 3)}, (5, 3)) == 7
    assert count("Gemm", {"x": (5, 7), "w": (7, 3)}, (5, 3)) == 7
    assert count("Einsum", {"x": (2, 3, 4), "w": (4, 5)}, (2, 3, 5), equation="bij,jk->bik") == 4
    assert count("AveragePool", {"x": (1, 1, 4, 4)}, (1, 1, 2, 2), kernel_shape=[2, 2]) == 4
    assert count("ReduceSum", {"x": (2, 6)}, (2, 1)) == 6
    running = {"x": torch.zeros(2, 9), "a": torch.tensor(1)}
    assert _terms(node("CumSum", ["x", "a"]), running, torch.zeros(2, 9)) == 9
    scalar = {"x": torch.tensor(1.0), "a": torch.tensor(0)}
    assert _terms(node("CumSum", ["x", "a"]), scalar, torch.tensor(1.0)) == 1


@pytest.mark.parametrize(
    ("equation", "count"), [("bij,bjk->bik", 3), ("bij,bjk", 6), ("...ij,...jk->...ik", 3), ("b i j, b j k -> i k", 6)]
)
def test_indices_that_an_einsum_sums(equation: str, count: int) -> None:
    inputs = {"x": torch.zeros(2, 5, 3), "w": torch.zeros(2, 3, 7)}
    assert _contracted(node("Einsum", ["x", "w"], equation=equation), inputs) == count


def test_sums_of_terms_rounded_at_the_same_place() -> None:
    """16 terms of 1 + u are each rounded by up to half of the last place of their sum, 2⁻¹⁹, all to the same side."""
    terms = torch.full((1, 16), 1 + 2.0**-22)
    total = terms.double().sum(1)
    worst = one_sided(terms, lambda t: t.sum(1), total, terms.double().square().sum(1))
    lost = abs(round((1 + 2.0**-22) * 2**19) / 2**19 - (1 + 2.0**-22)) * 16
    assert float(worst) >= lost / U
    assert float(worst) == pytest.approx(64)
    assert one_sided(torch.zeros(1, 4), lambda t: t.sum(1), torch.zeros(1), torch.zeros(1)).tolist() == [0]
    mean = _adding(node("ReduceMean", ["x"], axes=[1], keepdims=0))
    assert (mean.op, mean.inputs[0], mean.index < -(10**8)) == ("ReduceSum", "x", True)


def test_errors_of_operators_by_hand() -> None:
    x, result = torch.tensor([[-40.0, 3.0]]), torch.tensor([[-50.0, 1.0]])
    any_node = node("X", ["x"])
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
    norm = operator_errors._terms_of_batch_norm(node("BatchNormalization", ["x"], epsilon=1.0), parts, parts[0])
    assert norm.tolist() == [[2 * 1 + 3 * 1 + 1, 1 * 1 + 5 * 1 + 1]]
    usual = operator_errors._terms_of_batch_norm(node("BatchNormalization", ["x"]), parts, parts[0])
    assert float(usual[0, 0]) == pytest.approx((2 + 3) * 2 / math.sqrt(3 + 1e-5) + 1)
    wide = operator_errors._wider(Errors(1.0, 0.5), Errors(2.0, 0.25))
    assert (wide.relative, wide.absolute) == (2.0, 0.5)


def test_rows_without_their_mean_have_length_one() -> None:
    rows = _standardized(torch.tensor([[1.0, 3.0], [10.0, 30.0], [5.0, 1.0]]))
    assert torch.allclose(rows[0], rows[1])
    assert torch.allclose(rows.norm(dim=1), torch.ones(3))
    assert torch.allclose(rows[2], -rows[0])
    nodes = [node("Conv", ["x", "w"], index=0), node("Relu", ["y"], index=1)]
    assert product_of(nodes, "Conv") is nodes[0]
    assert product_of([*nodes, nodes[0]], "Conv") is None
    assert product_of(nodes, "Relu") is None


def test_tensors_of_a_dump_that_are_not_as_declared(monkeypatch: pytest.MonkeyPatch) -> None:
    value = ValueInfo("x", np.dtype(np.float32), (2, 3))
    graph: Any = SimpleNamespace(inputs=[value], outputs=[])
    monkeypatch.setattr(
        "cp_debug.bisect.import_dump.known_shape", lambda graph, name, types: (2, 3) if name == "x" else None
    )
    tensors = {"x": np.zeros((3, 2), np.float16), "z": np.zeros(1)}
    assert _other_dtypes(graph, tensors) == {"x": "float16, declared float32"}
    assert _other_shapes(graph, tensors, {}) == {"x": "[3, 2], the graph's is [2, 3]"}
    assert _other_dtypes(graph, {"x": np.zeros((2, 3), np.float32)}) == {}
    assert _other_shapes(graph, {"x": np.zeros((2, 3))}, {}) == {}
