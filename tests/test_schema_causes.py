"""Causes in what an operator was told: other attributes, another order of operands, indices and epsilons near by."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from nets import node_of
from onnx import helper
from torch import Tensor

from cp_debug.bisect.causes import schema, single_numbers
from cp_debug.bisect.causes.batchnorm_parameters import EPSILONS
from cp_debug.bisect.causes.schema import _shifted
from cp_debug.graph.graph import Node
from cp_debug.programs.tensor_change import describe, exchanges, regated


def node(op: str, *inputs: str) -> Any:
    return SimpleNamespace(op=op, name="node", outputs=["y"], proto=helper.make_node(op, inputs, ["y"]))


@pytest.mark.parametrize(
    ("reader", "declared", "told"),
    [("Sqrt", 1e-5, True), ("Pow", 1e-5, True), ("Reciprocal", 1e-5, True), ("Relu", 1e-5, False), ("Sqrt", 0.0, False),
     ("Sqrt", max(EPSILONS), True), ("Sqrt", 2 * max(EPSILONS), False)],
)  # fmt: skip
def test_another_epsilon_is_tried_where_a_number_is_added_before_a_root(
    reader: str, declared: float, told: bool
) -> None:
    graph, context = (
        SimpleNamespace(consumers={"y": [node(reader, "y")]}),
        SimpleNamespace(constants={"eps": torch.ones(1)}),
    )
    segment: Any = SimpleNamespace(graph=graph, context=context, edited=lambda node, inputs: inputs[1])
    number = single_numbers._scalar(segment, node("Add", "x", "eps"), 1, declared)
    assert tuple(number.usual) == (EPSILONS if told else ())
    found = number.candidate(1e-3)
    assert found.cause == ("normalization-eps" if told else "constant-differs")
    assert found.evidence["instead_of"] == declared
    assert found.value is not None
    assert found.value.tolist() == pytest.approx([1e-3])
    other = single_numbers._scalar(segment, node("Mul", "x", "eps"), 1, 1e-5)
    assert not other.usual


def test_usual_numbers_of_attributes() -> None:
    segment: Any = None
    alphas = single_numbers._attribute(segment, node("Elu", "x"), "alpha", 0.5).usual
    assert 0.5 not in alphas
    assert {0.0, 1.0, 0.25, -0.5} <= set(alphas)


def moved(op: str, **constants: list[int]) -> list[tuple[dict[int, list[int]], str]]:
    values = {name: torch.tensor(numbers) for name, numbers in constants.items()}

    class Known(dict[str, torch.Tensor]):
        holds = dict.__contains__

    segment: Any = SimpleNamespace(context=SimpleNamespace(constants=Known(values)), given={}, input=None)
    found = _shifted(segment, node(op, "x", *constants))
    return [({place: value.tolist() for place, value in inputs.items()}, says) for inputs, says in found]


def test_indices_are_tried_one_later_and_one_earlier() -> None:
    assert moved("Gather", indices=[3, 5]) == [({1: [4, 6]}, "one later"), ({1: [2, 4]}, "one earlier")]
    assert moved("Slice", starts=[2], ends=[9]) == [
        ({1: [3], 2: [10]}, "one later"), ({1: [3]}, "begins one later"), ({2: [10]}, "ends one later"),
        ({1: [1], 2: [8]}, "one earlier"), ({1: [1]}, "begins one earlier"), ({2: [8]}, "ends one earlier"),
    ]  # fmt: skip
    assert moved("Pad", pads=[0, 1, 0, 2]) == [
        ({1: [1, 1, -1, 2]}, "axis 0, one later"), ({1: [-1, 1, 1, 2]}, "axis 0, one earlier"),
        ({1: [0, 2, 0, 1]}, "axis 1, one later"), ({1: [0, 0, 0, 3]}, "axis 1, one earlier"),
    ]  # fmt: skip
    assert moved("Relu", indices=[1]) == []


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
    assert list(schema._orders(node_of(op, ["a", "b"]), count)) == orders
    assert len(list(schema._orders(node_of("Concat", ["a"]), 4))) == 23
    assert [exchanges(order)[1] for order in ((0, 1), (1, 0), (0, 2, 1))] == [0, 2, 2]


def test_a_value_is_mixed_up_with_others_of_its_shape() -> None:
    """At most 48 of them are tried, wherever they stand; values of another shape do not count."""
    own, edits = torch.ones(2, 4), []

    def edited(at: Node, inputs: dict[int, Tensor]) -> Tensor:
        edits.append((at.op, inputs))
        return next(iter(inputs.values()))

    same = [(f"same{i}", lambda i=i: torch.full((2, 4), float(i))) for i in range(50)]
    others = [(f"flat{i}", lambda: torch.ones(8)) for i in range(60)]
    segment: Any = SimpleNamespace(
        nodes=[node_of("Add", ["w", "x"]), node_of("Conv", ["x", "w"])],
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
        nodes=[node_of("Add", ["x", "w"])],
        given={"x": None},
        input=lambda name: torch.ones(count),
        others=[("other", lambda: torch.zeros(count))],
        edited=lambda at, inputs: inputs[0],
    )
    assert bool(list(schema.another_operand(segment))) is tried


def test_gates_are_moved_in_each_part_of_a_bias() -> None:
    bias = np.arange(8.0).reshape(1, 8)  # two parts of two gates of two units
    moved = [[2, 3, 0, 1, 6, 7, 4, 5]]
    assert regated(bias, (1, 0)).tolist() == moved
    assert regated(bias[..., None], (1, 0)).ravel().tolist() == [4, 5, 6, 7, 0, 1, 2, 3]  # two gates of four
    found = describe(bias, np.array(moved, np.float64), 2)
    assert found is not None
    assert (found.kind, found.evidence) == ("gates-permuted", {"order": [1, 0]})
