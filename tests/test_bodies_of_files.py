"""Branches, loop bodies and functions of two files: their constants, and those that no sample runs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from cp_debug.bisect.engine import bisect
from cp_debug.bisect.options import Options
from cp_debug.graph.control_flow import ControlFlow, IdleBody, idle_on_both
from cp_debug.graph.flatten import decisions_by_node, idle_bodies
from cp_debug.graph.graph import Graph
from cp_debug.programs.pipeline import prepare
from cp_debug.programs.unroll import Unroller
from cp_debug.programs.weight_differences import weight_differences
from cp_debug.recipes.base import Sample
from cp_debug.recipes.registry import load_model

FLOAT, INT64, BOOL = TensorProto.FLOAT, TensorProto.INT64, TensorProto.BOOL


def with_bodies(path: Path, changed: str = "", trips: int = 2) -> Path:
    """An If by the sum of ``x``, a Loop and a function, with a weight each; that of ``changed`` is 1.05 times as large.

    The then branch holds an initializer and another If, the others a Constant node each.
    """
    rng = np.random.default_rng(0)

    def weight(owner: str) -> onnx.TensorProto:
        array = rng.standard_normal((8, 8)).astype(np.float32)
        return numpy_helper.from_array(array * np.float32(1.05 if owner == changed else 1), f"w_{owner}")

    def product(owner: str, source: str) -> list[onnx.NodeProto]:
        name = f"w_{owner}"
        return [
            helper.make_node("Constant", [], [name], name=f"constant_{owner}", value=weight(owner)),
            helper.make_node("MatMul", [source, name], [f"mm_{owner}"], name=f"node_{owner}"),
            helper.make_node("Tanh", [f"mm_{owner}"], [f"o_{owner}"], name=f"tanh_{owner}"),
        ]

    def value(name: str, kind: int = FLOAT, shape: tuple[int, ...] = (2, 8)) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, kind, shape)

    inner = [helper.make_graph(product(f"inner_{b}", "t"), b, [], [value(f"o_inner_{b}")]) for b in ("then", "else")]
    then_nodes = [
        helper.make_node("MatMul", ["h", "w_then"], ["t"], name="node_then"),
        helper.make_node("If", ["above"], ["u"], name="inner", then_branch=inner[0], else_branch=inner[1]),
    ]
    then = helper.make_graph(then_nodes, "then", [], [value("u")], [weight("then")])
    other = helper.make_graph(product("else", "h"), "else", [], [value("o_else")])
    loop_nodes = [*product("loop", "s"), helper.make_node("Identity", ["c"], ["go_on"], name="again")]
    loop = helper.make_graph(
        loop_nodes,
        "body",
        [value("i", INT64, ()), value("c", BOOL, ()), value("s")],
        [value("go_on", BOOL, ()), value("o_loop")],
    )
    opsets = [helper.make_opsetid("", 17)]
    function = helper.make_function("own", "Dense", ["a"], ["o_function"], product("function", "a"), opsets)
    nodes = [
        helper.make_node("MatMul", ["x", "w_main"], ["h"], name="node_main"),
        helper.make_node("ReduceSum", ["x"], ["sum"], name="sum", keepdims=0),
        helper.make_node("Greater", ["sum", "zero"], ["above"], name="compare"),
        helper.make_node("If", ["above"], ["chosen"], name="choose", then_branch=then, else_branch=other),
        helper.make_node("Loop", ["trips", "", "chosen"], ["looped"], name="repeat", body=loop),
        helper.make_node("Dense", ["looped"], ["y"], name="dense", domain="own"),
    ]
    constants = [weight("main"), *(numpy_helper.from_array(np.array(n, t), name) for name, n, t in scalars(trips))]
    graph = helper.make_graph(nodes, "net", [value("x")], [value("y")], constants)
    opsets.append(helper.make_opsetid("own", 1))
    model = helper.make_model(graph, opset_imports=opsets, functions=[function], ir_version=9)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)
    return path


def scalars(trips: int) -> list[tuple[str, float, type]]:
    return [("zero", 0, np.float32), ("trips", trips, np.int64)]


@pytest.mark.parametrize(
    ("changed", "where"),
    [
        ("main", "w_main"),
        ("then", "choose/then_branch/w_then"),
        ("inner_else", "choose/then_branch/inner/else_branch/w_inner_else"),
        ("else", "choose/else_branch/w_else"),
        ("loop", "repeat/body/w_loop"),
        ("function", "Dense/w_function"),
    ],
)
def test_a_changed_constant_in_a_body_is_told(tmp_path: Path, changed: str, where: str) -> None:
    ours, theirs = with_bodies(tmp_path / "ours.onnx"), with_bodies(tmp_path / "theirs.onnx", changed)
    found = weight_differences(Graph(ours), Graph(theirs))
    assert [d.says for d in found.differing] == [f"{where}, × 1.05"]
    assert (found.missing, found.added) == ([], [])
    assert not weight_differences(Graph(ours), Graph(ours)).differing


def test_a_fix_names_a_constant_of_a_loop_as_the_file_does(tmp_path: Path) -> None:
    ours, theirs = with_bodies(tmp_path / "ours.onnx"), with_bodies(tmp_path / "theirs.onnx", "loop")
    (test,) = bisect(str(ours), "ort,ort", test_model=theirs).tests
    assert "use the same repeat/body/w_loop on both sides" in [finding.fix for finding in test.findings]


def test_bodies_whose_nodes_are_called_otherwise_are_paired_by_what_they_hold(tmp_path: Path) -> None:
    ours, theirs = with_bodies(tmp_path / "ours.onnx"), with_bodies(tmp_path / "theirs.onnx", "loop")
    model = onnx.load(theirs)
    for node in model.graph.node:
        node.name = f"other_{node.name}"
    onnx.save(model, theirs)
    found = weight_differences(Graph(ours), Graph(theirs))
    assert [d.says for d in found.differing] == ["repeat/body/w_loop, × 1.05"]


def samples(folder: Path, *signs: int) -> Path:
    """A folder of samples of ones, each with a sign."""
    folder.mkdir()
    for i, sign in enumerate(signs):
        np.savez(folder / f"{i}.npz", x=np.full((2, 8), sign, np.float32))
    return folder


@pytest.mark.parametrize(
    ("signs", "trips", "idle"),
    [
        ([-1], 2, ["the then branch of If choose"]),
        ([1], 2, ["the else branch of If choose/then_branch/inner", "the else branch of If choose"]),
        ([1, -1], 2, ["the else branch of If choose/then_branch/inner"]),
        ([-1], 0, ["the then branch of If choose"]),  # a trip count that is a constant: no input runs the body
    ],
)
def test_what_did_not_run_is_told(tmp_path: Path, signs: list[int], trips: int, idle: list[str]) -> None:
    ours, theirs = (with_bodies(tmp_path / f"{name}.onnx", trips=trips) for name in ("ours", "theirs"))
    inputs = samples(tmp_path / "inputs", *signs)
    result = bisect(str(ours), "ort,ort", test_model=theirs, options=Options(inputs=inputs, samples=len(signs)))
    (test,) = result.tests
    assert sorted(test.not_run) == sorted(idle)
    assert test.agrees
    assert "did not run with these inputs; try others with --inputs" in str(result).replace("\n", " ")


def test_tests_in_one_arithmetic_on_one_file_share_what_is_decided(tmp_path: Path) -> None:
    model = load_model(str(with_bodies(tmp_path / "net.onnx")))
    asked: list[str] = []

    def given() -> Iterator[Sample]:
        asked.append("samples")
        yield from model.samples(1, 0, None)

    unroller = Unroller(tmp_path)
    programs = prepare(model, next(iter(model.samples(1, 0, None))), tmp_path)
    first, second, other = (unroller.unrolled(programs, model, given, name) for name in ("fp32", "fp32", "fp16"))
    assert first is second is other
    assert len(asked) == 2


def test_each_pass_of_a_loop_counts_for_the_branches_in_it() -> None:
    runs = [{"loop": 2, "loop/#0/if": "then_branch", "loop/#1/if": "else_branch"}, {"loop": 0}]
    assert decisions_by_node(runs) == {"loop": {2, 0}, "loop/if": {"then_branch", "else_branch"}}


def test_what_no_input_reaches_is_not_asked_of_inputs(tmp_path: Path) -> None:
    graph = Graph(with_bodies(tmp_path / "ours.onnx"))
    taken = decisions_by_node([{"choose": "else_branch", "repeat": 2}])
    assert [str(body) for body in idle_bodies(graph, taken)] == ["the then branch of If choose"]
    assert idle_bodies(graph, taken, {"above"}) == []
    taken["repeat"] = {0}
    assert [str(body) for body in idle_bodies(graph, taken, {"above"})] == ["the body of Loop repeat"]
    assert idle_bodies(graph, taken, {"above", "trips"}) == []


def test_what_one_side_ran_is_judged_there() -> None:
    """The way that only one side took is guilty of it; what one side alone has is told."""
    then, other = (IdleBody("choose", "If", f"{name}_branch") for name in ("then", "else"))
    only = IdleBody("own", "If", "then_branch")
    ran = frozenset({"choose"})
    assert idle_on_both(ControlFlow(ran, (then,)), ControlFlow(ran, (then,))) == [then]
    assert idle_on_both(ControlFlow(ran, (then,)), ControlFlow(ran, (other,))) == []
    assert idle_on_both(ControlFlow(ran, (then,)), ControlFlow(frozenset({"own"}), (only,))) == [then, only]
