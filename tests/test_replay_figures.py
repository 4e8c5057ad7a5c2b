"""Figures of a replay that are known beforehand: what was inherited, what is excused, whose functions are judged."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nets import NetBuilder
from torch import nn

from cp_debug.api.diagnose import diagnose
from cp_debug.backends.arithmetic import ARITHMETICS, FP64
from cp_debug.backends.executor import Executor
from cp_debug.bisect.range_loss import RangeLoss, difference, storage_loss
from cp_debug.bisect.replay import SUSPICIOUS, Replayer
from cp_debug.bisect.replayed import EXCESS, Replay
from cp_debug.bisect.verdict import Judgement, without_emulation
from cp_debug.graph.graph import Graph

U = 2.0**-24
Values = dict[str, np.ndarray]


def saved(folder: Path, net: NetBuilder, shape: list[int], *outputs: str, opset: int = 17) -> Graph:
    return Graph(net.save(folder / "net.onnx", {"x": (1, shape)}, list(outputs), opset=opset))


def constant(net: NetBuilder, *numbers: float) -> str:
    return net.weight(np.array(numbers, np.float32))


def replays(graph: Graph, reference: Values, test: Values, precision: str = "fp32", **how: Any) -> dict[str, Replay]:
    replayer = Replayer(graph, ("fp32", precision), how.pop("oracle", "fp64"), set(test) - {"x"}, **how)
    return dict(replayer.layers(reference.__getitem__, test.__getitem__))


def test_what_was_inherited_is_relative_to_the_reference(tmp_path: Path) -> None:
    """Twice the input makes an error as large as the reference's result, not half of what the oracle makes of it."""
    net = NetBuilder()
    net.op("Neg", "x", name="y")
    x = np.linspace(1, 2, 8, dtype=np.float32)[None]
    found = replays(saved(tmp_path, net, [1, 8], "y"), {"x": x, "y": -x}, {"x": 2 * x, "y": -2 * x})
    assert found["y"].inherited == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("implementers", "of_test", "of_reference"), [(("ort", "torch"), 0.7, 2.5), (("torch", "ort"), 2.5, 0.7)]
)
def test_each_side_is_judged_by_the_functions_of_its_own_backend(
    tmp_path: Path, implementers: tuple[str, str], of_test: float, of_reference: float
) -> None:
    """ONNX Runtime's Tanh may be off by 2.5 units, torch's by 0.7: both sides are off by 4, one of them too much."""
    net = NetBuilder()
    net.op("Tanh", "x", name="y")
    graph = saved(tmp_path, net, [1, 512], "y")
    x = np.linspace(0.2, 0.9, 512, dtype=np.float32)[None]
    exact = np.tanh(x.astype(np.float64))
    for off in (4, 8):
        wrong = {"x": x, "y": exact * (1 + off * U)}
        figures = replays(graph, wrong, wrong, implementers=implementers)["y"]
        assert figures.excess == pytest.approx(off / of_test, rel=0.1)
        assert figures.reference_excess == pytest.approx(off / of_reference, rel=0.1)


@pytest.mark.parametrize(("amplifies", "asked"), [(SUSPICIOUS / 2, False), (SUSPICIOUS * 2, True)])
def test_a_reference_is_replayed_where_a_layer_seems_to_amplify_beyond_reason(
    tmp_path: Path, amplifies: float, asked: bool
) -> None:
    net = NetBuilder()
    net.op("Neg", "x", name="y")
    x = np.linspace(1, 2, 64, dtype=np.float32)[None]
    moved = (x * np.float32(1 + 2.0**-12)).astype(np.float32)
    reference = {"x": x, "y": -x * np.float32(1 + amplifies * 2.0**-12)}
    figures = replays(saved(tmp_path, net, [1, 64], "y"), reference, {"x": moved, "y": -moved})["y"]
    assert (figures.reference_excess > EXCESS) == asked


@pytest.mark.parametrize(("roundings", "asked"), [(1.8, False), (2.2, True)])
def test_a_reference_is_not_replayed_for_its_own_rounding(tmp_path: Path, roundings: float, asked: bool) -> None:
    """Equal inputs: what is inherited is the rounding of the reference, the root of its 64 terms, however coarse the
    test."""
    net = NetBuilder()
    net.op("MatMul", "x", net.weight(np.eye(64, dtype=np.float32)), name="y")
    graph = saved(tmp_path, net, [1, 64], "y")
    x = np.linspace(1, 2, 64, dtype=np.float32)[None]
    reference = {"x": x, "y": x.astype(np.float64) * (1 + roundings * 8 * U)}
    found = replays(graph, reference, {"x": x, "y": x}, "fp16")["y"]
    assert found.inherited == pytest.approx(roundings * 8 * U, rel=1e-3)
    assert (found.reference_excess > 0) == asked


@pytest.mark.parametrize(("off", "asked"), [(7, False), (9, True)])
def test_a_reference_is_not_replayed_for_what_a_faithful_test_of_its_kind_rounds(
    tmp_path: Path, off: int, asked: bool
) -> None:
    """ONNX Runtime's Tanh is off by 4 units in the test: twice that is nothing to be asked about in the reference."""
    net = NetBuilder()
    net.op("Tanh", "x", name="y")
    graph = saved(tmp_path, net, [1, 512], "y")
    x = np.linspace(0.2, 0.9, 512, dtype=np.float32)[None]
    exact = np.tanh(x.astype(np.float64))
    reference, test = ({"x": x, "y": exact * (1 + units * U)} for units in (off, 4))
    for implementers, others in ((("ort", "ort"), False), (("torch", "ort"), True)):
        found = replays(graph, reference, test, implementers=implementers)["y"]
        assert (found.reference_excess > 0) == (asked or others)


@pytest.mark.parametrize(("nodes", "matters_in_the_end"), [(14, False), (16, True)])
def test_a_change_is_followed_through_sixteen_nodes(tmp_path: Path, nodes: int, matters_in_the_end: bool) -> None:
    """Behind them it is multiplied by 0."""
    net, value = NetBuilder(), "n"
    net.op("Neg", "x", name="n")
    for _ in range(nodes):
        value = net.op("Neg", value)
    net.op("Mul", value, constant(net, 0.0), name="y")
    graph = saved(tmp_path, net, [1, 2], "y")
    n = torch.ones(1, 2, dtype=torch.float64)
    change = ("n", n, 2 * n)
    losses = RangeLoss(graph, Executor(graph, FP64), {"n"})
    assert losses.matters({"n": n}.__getitem__, change, 1e-9) == matters_in_the_end


def test_an_fp32_oracle_is_not_trusted_about_fp32(tmp_path: Path) -> None:
    """A long sum that cancels: the FP32 oracle is off itself, and one in FP64 says what the layer may introduce."""
    net = NetBuilder()
    net.op("Sub", net.op("Add", "x", constant(net, 1e7), name="sum"), constant(net, 1e7), name="y")
    graph = saved(tmp_path, net, [1, 64], "y")
    x = np.linspace(1, 2, 64, dtype=np.float32)[None] / 3
    exact = x.astype(np.float64)
    for oracle in ("fp32", "fp64"):
        figures = replays(graph, {"x": x, "y": exact}, {"x": x, "y": exact + 1.0}, oracle=oracle)["y"]
        assert figures.excess is not None
        assert 0.5 < figures.excess < EXCESS, oracle  # a sum beside 1e7 may be off by 1


def test_what_the_fp32_oracle_is_off_by_is_not_laid_to_an_exact_layer(tmp_path: Path) -> None:
    net = NetBuilder()
    net.op("Sub", net.op("Add", "x", constant(net, 1e7), name="sum"), constant(net, 1e7), name="y")
    graph = saved(tmp_path, net, [1, 64], "y")
    x = np.linspace(1, 2, 64, dtype=np.float32)[None] / 3
    values = {"x": x, "y": x.astype(np.float64)}
    assert replays(graph, values, values, oracle="fp32")["y"].introduced == pytest.approx(0, abs=1e-9)


# Elements that a type cannot hold -----------------------------------------------------------------------------------


def masked(folder: Path, size: float, behind: str) -> tuple[Graph, Values]:
    """``mask`` is −``size`` at the first 3 of 8 places, else 0; then what ``behind`` makes of it."""
    net = NetBuilder()
    net.op("Mul", "x", net.op("Neg", "x", name="n"), name="mask")
    if behind == "Softmax":
        net.op("Softmax", net.op("Add", "mask", constant(net, *np.linspace(0, 1, 8)), name="s"), name="y")
    elif behind == "Reciprocal":
        tiny = net.op("Reciprocal", net.op("Add", "mask", constant(net, 1.0), name="s"), name="r")
        net.op("Add", tiny, constant(net, 1.0), name="y")
    else:
        net.op("Mul", "mask", constant(net, 0.5), name="y")
    graph = saved(folder, net, [1, 8], "y")
    values: Values = {"x": np.array([[1, 1, 1, 0, 0, 0, 0, 0]], np.float32) * np.float32(math.sqrt(size))}
    Executor(graph, FP64).run(values, lambda name, t: values.update({name: np.asarray(t)}))
    return graph, values


@pytest.mark.parametrize(
    ("size", "behind", "captured", "excused"),
    [
        (1e9, "Softmax", -np.inf, True),
        (1e9, "Softmax", -65504.0, True),
        (40000.0, "Softmax", -np.inf, False),  # FP16 holds it
        (1e9, "Reciprocal", -np.inf, True),
        (1e9, "Reciprocal", np.inf, False),  # of the other sign, however little it does
        (66000.0, "Mul", -65504.0, False),  # 15 roundoffs at the output
    ],
)
def test_what_the_type_cannot_hold_is_excused_where_nothing_notices(
    tmp_path: Path, size: float, behind: str, captured: float, excused: bool
) -> None:
    graph, values = masked(tmp_path, size, behind)
    mask = values["mask"].copy()
    mask[0, :3] = captured
    figures = replays(graph, values, values | {"mask": mask}, "fp16")["mask"]
    assert figures.wanted == (3 if excused else 0)
    guilty = bool(figures.new_nonfinite) or (figures.excess or 0.0) > EXCESS
    assert guilty != excused


def test_a_probability_that_vanishes_is_lost_beside_1(tmp_path: Path) -> None:
    small = torch.full((4,), 1e-9)
    assert storage_loss(small, small.half(), bounded=True) == pytest.approx(1e-9)
    assert storage_loss(small, small.half()) == 1


@pytest.mark.parametrize("kept", [False, True])
def test_a_number_that_vanishes_in_fp16_is_lost_where_the_test_has_0(tmp_path: Path, kept: bool) -> None:
    """The layer may have been computed in FP32 after all, as engines do."""
    net = NetBuilder()
    net.op("Log", net.op("Exp", "x", name="p"), name="y")
    graph = saved(tmp_path, net, [1, 4], "y")
    exact: Values = {"x": np.array([[-20, 1, 2, 3]], np.float32)}
    Executor(graph, FP64).run(exact, lambda name, t: exact.update({name: np.asarray(t)}))
    captured = exact["p"].astype(np.float32 if kept else np.float16)
    assert (replays(graph, exact, exact | {"p": captured}, "fp16")["p"].range_loss == 1) != kept


def test_a_weight_beyond_the_type_is_an_endless_loss(tmp_path: Path) -> None:
    """One of 1000 weights: beside the others its own size would not show, because Inf has none."""
    net = NetBuilder()
    net.op("Mul", "x", net.weight(np.array([1.0] * 999 + [1e6], np.float32)), name="y")
    graph = saved(tmp_path, net, [1, 1000], "y")
    x = np.array([[1.0] * 999 + [1e-3]], np.float32)
    y = x * np.array([1.0] * 999 + [1e6])
    assert replays(graph, {"x": x, "y": y}, {"x": x, "y": y}, "fp16")["y"].range_loss == math.inf


def test_another_infinity_is_no_small_difference() -> None:
    finite, infinite = torch.tensor([1.0, 1.0]), torch.tensor([1.0, torch.inf])
    assert difference(finite, infinite) == difference(infinite, finite) == math.inf
    assert difference(infinite, -infinite) == difference(infinite, infinite * torch.nan) == math.inf
    assert difference(infinite, infinite) == 0
    assert difference(finite, 1.5 * finite) == pytest.approx(0.5)  # relative, and of the first
    assert difference(finite, torch.ones(3)) == math.inf


def test_a_change_that_only_an_unread_result_has_does_not_matter(tmp_path: Path) -> None:
    """Of the two halves of a Split, the caller sees the second one alone."""
    net = NetBuilder()
    net.op("Split", net.op("Neg", "x", name="n"), name="part", outputs=2, axis=1)
    net.op("Neg", "part_1", name="y")
    graph = saved(tmp_path, net, [1, 4], "y")
    losses, n = RangeLoss(graph, Executor(graph, FP64), {"n"}), torch.ones(1, 4, dtype=torch.float64)

    def told(*changed: float) -> bool:
        return losses.matters({"n": n}.__getitem__, ("n", n, torch.tensor([changed]).double()), 1e-9)

    assert not told(1, 2, 1, 1)
    assert told(1, 1, 2, 1)


# Side by side -------------------------------------------------------------------------------------------------------


def test_nobody_is_guilty_of_rounding_that_nobody_emulates_and_of_infinity_everybody() -> None:
    guilty = Judgement("guilty", False, "why")
    unknown = Replay(introduced=0.1, excess=9.0, not_emulated=("n",))
    assert without_emulation(guilty, unknown) == Judgement("divergent", False)
    assert without_emulation(guilty._replace(within=True), unknown) == Judgement("ok", True)
    unknown.new_nonfinite = 1
    assert without_emulation(guilty, unknown) == guilty
    assert without_emulation(guilty, Replay(introduced=0.1, excess=9.0)) == guilty


def test_the_nodes_without_a_kernel_are_those_of_the_tests_claim(tmp_path: Path) -> None:
    """Nobody knows what FP16 rounds inside a MelWeightMatrix; FP32 is what the oracle's library computes in."""
    net = NetBuilder()
    whole = [net.weight(np.array(n, np.int64)) for n in (4, 8, 8)]
    net.op("MelWeightMatrix", *whole, constant(net, 1.0), constant(net, 3.0), name="mel")
    net.op("Add", "mel", net.op("Neg", "x", name="n"), name="y")
    graph = saved(tmp_path, net, [5, 4], "y")
    ones: Values = {"x": np.ones((5, 4)), "mel": np.ones((5, 4)), "n": -np.ones((5, 4)), "y": np.zeros((5, 4))}
    for precisions, unknown in ((("fp32", "fp16"), ("node_mel",)), (("fp16", "fp32"), ())):
        replayer = Replayer(graph, precisions, "fp64", {"mel", "n", "y"})
        with_figures = dict(replayer.layers(ones.__getitem__, ones.__getitem__))
        assert {n: r.not_emulated for n, r in with_figures.items()} == {"mel": unknown, "n": (), "y": ()}


# Emulated tests -----------------------------------------------------------------------------------------------------


def test_an_emulated_layer_introduces_what_it_rounds_and_nothing_where_it_only_chooses(tmp_path: Path) -> None:
    """In FP16 the emulation rounds inputs, constants and new results; the larger of two of its own values is one."""
    net = NetBuilder()
    net.op("Neg", "x", name="n")
    net.op("Mul", "n", "n", name="product")
    net.op("Max", "n", "product", name="larger")
    net.op("Max", "n", constant(net, 0.1), name="bounded")
    net.op("Relu", "x", name="relu")
    names = ["larger", "bounded", "relu"]
    graph = saved(tmp_path, net, [1, 64], *names)
    x = np.linspace(-2, 2, 64, dtype=np.float32)[None] / 3
    reference: Values = {"x": x, "n": -x, "product": x * x, "larger": np.maximum(-x, x * x)}
    reference |= {"bounded": np.maximum(-x, np.float32(0.1)), "relu": np.maximum(x, 0)}
    test: Values = {"x": x}
    Executor(graph, ARITHMETICS["fp16"]).run({"x": x}, lambda name, t: test.update({name: np.asarray(t)}))
    found = replays(graph, reference, test, "fp16", oracle="fp32", emulated=True)
    assert found["larger"].introduced == 0
    from_oracle = {
        "product": test["n"] * test["n"],
        "bounded": np.maximum(test["n"], np.float32(0.1)),
        "relu": reference["relu"],
    }
    for name, exact in from_oracle.items():
        off = np.linalg.norm((test[name] - exact).astype(np.float64)) / np.linalg.norm(exact.astype(np.float64))
        assert off > 0
        assert found[name].introduced == pytest.approx(off, rel=1e-6), name
        assert 0 < found[name].excess <= 1, name


def test_an_emulated_file_introduces_what_its_own_narrow_types_round(tmp_path: Path) -> None:
    """In FP32, but for a value that the file itself holds in FP16."""
    net = NetBuilder()
    net.op("Neg", "x", name="n")
    net.op("Abs", "n", name="y")
    graph = saved(tmp_path, net, [1, 64], "y")
    x = np.linspace(1, 2, 64, dtype=np.float32)[None] / 3
    half = x.astype(np.float16).astype(np.float32)
    test: Values = {"x": x, "n": -half, "y": half}
    found = replays(
        graph, {"x": x, "n": -x, "y": x}, test, oracle="fp32", emulated=True, narrow=({}, {"n": "fp16"})
    )  # fmt: skip
    assert found["n"].introduced == pytest.approx(np.linalg.norm(half - x) / np.linalg.norm(x), rel=1e-4)
    assert found["y"].introduced == 0


# Several inputs -----------------------------------------------------------------------------------------------------


def test_a_layer_amplifies_what_all_its_inputs_together_are_off_by(tmp_path: Path) -> None:
    """‖(3, 4)‖ on ‖(30, 40)‖ is a tenth; the difference of the two is off by 7 on 10: sevenfold."""
    net = NetBuilder()
    net.op("Neg", "x", name="a")
    net.op("Abs", "x", name="b")
    net.op("Sub", "a", "b", name="y")
    graph = saved(tmp_path, net, [1, 1], "y")
    one = np.ones((1, 1), np.float32)
    reference: Values = {"x": one, "a": 40 * one, "b": 30 * one, "y": 10 * one}
    test: Values = {"x": one, "a": 44 * one, "b": 27 * one, "y": 17 * one}
    found = replays(graph, reference, test)["y"]
    assert found.inherited == pytest.approx(0.7)
    assert found.amplification == pytest.approx(7)
    assert found.introduced == 0
    assert found.nodes == ("node_y",)
    assert found.precision == "fp32"


def test_what_an_input_is_off_by_is_taken_from_the_comparison_only_where_it_is_alone(tmp_path: Path) -> None:
    net = NetBuilder()
    net.op("Neg", "x", name="a")
    net.op("Neg", "a", name="b")
    net.op("Sub", "a", "b", name="y")
    graph = saved(tmp_path, net, [1, 1], "y")
    one = np.ones((1, 1), np.float32)
    reference: Values = {"x": one, "a": -one, "b": one, "y": -2 * one}
    test: Values = {"x": one, "a": -1.5 * one, "b": 1.5 * one, "y": -3 * one}
    replayer = Replayer(graph, ("fp32", "fp32"), "fp64", {"a", "b", "y"})
    found = dict(replayer.layers(reference.__getitem__, test.__getitem__, {"a": 0.25, "b": 0.25}))
    assert found["b"].amplification == pytest.approx(0.5 / 0.25)  # as it was told
    assert found["y"].amplification == pytest.approx(1)  # of both inputs, computed


@pytest.mark.parametrize(("op", "weight", "terms"), [("MatMul", (64, 9), 64), ("Conv", (6, 16, 1, 1), 16)])
def test_the_oracle_itself_is_off_by_the_root_of_its_terms(
    tmp_path: Path, op: str, weight: tuple[int, ...], terms: int
) -> None:
    net = NetBuilder()
    net.op(op, "x", net.weight(np.ones(weight, np.float32)), name="y")
    shape = [1, 64] if op == "MatMul" else [1, 16, 2, 2]
    graph = saved(tmp_path, net, shape, "y")
    x = np.ones(shape, np.float32)
    y = np.full((1, 9) if op == "MatMul" else (1, 6, 2, 2), float(terms), np.float32)
    for oracle, roundoff in (("fp32", U), ("fp64", 2.0**-53)):
        found = replays(graph, {"x": x, "y": y}, {"x": x, "y": y}, oracle=oracle)["y"]
        assert found.oracle_error == pytest.approx(roundoff * math.sqrt(terms))


def test_the_introduced_error_is_the_test_less_the_oracle(tmp_path: Path) -> None:
    net = NetBuilder()
    net.op("Neg", "x", name="y")
    net.op("Cast", net.op("Neg", "x", name="n"), name="whole", to=7)
    graph = saved(tmp_path, net, [1, 2], "y", "whole")
    test: Values = {"x": np.array([[1, 2]], np.float32), "y": np.array([[-1, -1.5]], np.float32)}
    test |= {"n": np.array([[-1, -2]], np.float32), "whole": np.array([[2, -2]], np.int64)}
    replayer = Replayer(graph, ("fp32", "fp32"), "fp64", set(test) - {"x"})
    for name, error, exact in (("y", [0, 0.5], [-1, -2]), ("whole", [3, 0], [-1, -2])):
        introduced, oracle = replayer.introduced(name, test.__getitem__)
        assert introduced.tolist() == [error]
        assert oracle.tolist() == [exact]


def test_an_input_that_glue_made_is_held_against_the_right_one(tmp_path: Path) -> None:
    """The test's input is off by 0.5 on 5 of what its glue should have made, and that by 5 on 10 of the reference's;
    FP16 held in the program allows for its own rounding."""
    net = NetBuilder()
    net.op("Neg", "x", name="y")
    graph = saved(tmp_path, net, [1, 2], "y")
    exact, test = np.array([[3, 4]], np.float32), np.array([[3, 4.5]], np.float32)
    reference = np.array([[6, 8]], np.float32)
    for narrow, roundoff in (({}, 2.0**-24), ({"x": "fp16"}, 2.0**-11)):
        replayer = Replayer(graph, ("bf16", "fp32"), "fp64", {"y"}, narrow=({}, narrow))
        found = replayer.given("x", exact, {"x": reference}.__getitem__, {"x": test}.__getitem__)
        assert found.introduced == pytest.approx(0.1)
        assert found.inherited == pytest.approx(0.5)
        assert found.expected == pytest.approx(roundoff / 2)
        assert found.amplification is None


@pytest.mark.slow
def test_the_operator_that_computes_is_named_and_its_excess_is_far_from_the_limit() -> None:
    """A GroupNorm is exported as Reshape, InstanceNormalization, Reshape; ONNX Runtime rounds it several times."""
    torch.manual_seed(5)
    module = nn.Sequential(nn.GroupNorm(4, 16, affine=False), nn.Conv2d(16, 4, 1)).eval()
    x = torch.randn(1, 16, 64, 64) + 3
    (test,) = diagnose(module, "torch,ort", inputs=x, progress=False).tests
    (row,) = (row for row in test.rows if row.name == "0/Reshape")
    assert row.replay is not None
    assert row.replay.introduced is not None
    assert row.replay.introduced > 2 * 2**-24
    assert (row.op, row.verdict) == ("InstanceNormalization", "ok")
    assert (row.replay.excess or 0) < 2
