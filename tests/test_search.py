"""The parts of a search: goals, layers, the strategy, the log, what is emitted."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given
from hypothesis import strategies as st
from nets import NetBuilder, residual, second_like
from onnx import TensorProto, helper, numpy_helper

from cp_debug.backends.arithmetic import ARITHMETICS
from cp_debug.backends.base import Program
from cp_debug.backends.emulated import EmulatedBackend
from cp_debug.backends.registry import create
from cp_debug.backends.spec import BackendSpec
from cp_debug.cli.precision import parse_duration
from cp_debug.errors import InputError
from cp_debug.graph.graph import Graph
from cp_debug.graph.made_up import MadeUp
from cp_debug.graph.qdq import insert_qdq, quantizable, quantized_inputs, remove_qdq
from cp_debug.graph.scales import LayerScales
from cp_debug.minimize import smallest
from cp_debug.mixed_precision.goal import Goal
from cp_debug.mixed_precision.layers import TrialPrecision, _joined, fused, fusion_groups_of, precision_of
from cp_debug.mixed_precision.result import Named, arguments, deploy_fragment
from cp_debug.mixed_precision.runners import MixedExecutor
from cp_debug.mixed_precision.trials import Measured, Trial, TrialLog

# ---- goals


def test_goals_join_conditions() -> None:
    goal = Goal.parse(" rel_l2 < 1e-3 and boxes_lost==0, map_drop<=0.2")
    assert str(goal) == "rel_l2<0.001 and boxes_lost==0 and map_drop<=0.2"
    figures = {"rel_l2": 1e-4, "boxes_lost": 0.0, "map_drop": 0.2}
    assert goal.holds(figures)
    for broken in ({"rel_l2": 1e-3}, {"rel_l2": np.nan}, {"boxes_lost": 1.0}, {"map_drop": 0.21}, {"map_drop": np.inf}):
        assert not goal.holds({**figures, **broken})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is not a condition; expected FIGURE<LIMIT"),
        ("rel_l2", "is not a condition"),
        ("rel_l2<", "is not a condition"),
        ("rel_l2<1e-3 and", "'' in 'rel_l2<1e-3 and' is not a condition"),
        ("rel_l3<1", "no figure 'rel_l3'; known are .*did you mean rel_l2"),
        ("rel_l2>1", "limited with <, <= or ==, not with >"),
        ("rel_l2<nan", "no limit that can be kept"),
        ("rel_l2<-1", "no limit"),
        ("boxes_lost<0", "no limit"),
        ("rel_l2<small", "no limit"),
        ("max_abs==0", "== is for counts"),
    ],
)
def test_goals_that_are_none(text: str, said: str) -> None:
    with pytest.raises(InputError, match=f"--goal: .*{said}"):
        Goal.parse(text)


@given(st.lists(st.tuples(st.sampled_from(["rel_l2", "max_abs", "map_drop"]), st.floats(1e-9, 1e9)), min_size=1))
def test_goals_are_read_as_they_are_written(parts: list[tuple[str, float]]) -> None:
    goal = Goal.parse(", ".join(f"{figure}<={limit!r}" for figure, limit in parts))
    assert [(c.figure, c.limit) for c in goal.conditions] == parts
    limits: dict[str, float] = {}
    for figure, limit in parts:
        limits[figure] = min(limit, limits.get(figure, limit))
    assert goal.holds(limits)
    assert goal.excess(limits) <= 1
    assert not goal.holds({figure: limit * 1.01 for figure, limit in limits.items()})


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("30m", 1800), ("1.5h", 5400), ("12", 12)])
def test_budgets(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "0", "-3m", "3 days", "m"])
def test_budgets_that_are_none(text: str) -> None:
    with pytest.raises(InputError, match="--budget"):
        parse_duration(text)


# ---- layers


def program_of(path: Path) -> Program:
    return Program(path.stem, Graph(path))


def test_activations_and_normalizations_belong_to_their_layer(tmp_path: Path) -> None:
    program = program_of(second_like(tmp_path / "net.onnx", depth=1))
    candidates = TrialPrecision("fp16").candidates(program.graph)
    groups = fusion_groups_of(program, candidates)
    ops = {n.name: n.op for n in program.graph.nodes}
    kinds = [tuple(ops[n] for n in u.nodes) for u in groups]
    whole = ("BatchNormalization", "Relu")
    assert kinds == [("Conv", *whole)] * 4 + [("ConvTranspose", *whole)] + [("Conv", *whole)] * 3 + [("Conv",)] + [
        ("Conv", *whole)
    ] + [("Conv",)]
    assert sorted(n for u in groups for n in u.nodes) == sorted(candidates)
    assert not any(ops[n] == "Concat" for n in candidates), "what only moves numbers follows its input"


def test_a_layer_ends_where_others_read_it(tmp_path: Path) -> None:
    program = program_of(residual(tmp_path / "net.onnx"))
    groups = fusion_groups_of(program, TrialPrecision("fp16").candidates(program.graph))
    ops = {n.name: n.op for n in program.graph.nodes}
    kinds = [tuple(ops[n] for n in u.nodes) for u in groups]
    assert ("Add", "Relu") in kinds, "two branches meet: a layer of its own"
    assert ("Conv", "Relu") in kinds


def test_engine_layers_regroup(tmp_path: Path) -> None:
    program = program_of(second_like(tmp_path / "net.onnx", depth=0))
    groups = fusion_groups_of(program, TrialPrecision("fp16").candidates(program.graph))
    first, second, *rest = groups
    everything = [n for u in groups for n in u.nodes]
    layers = [
        {"name": "a + b", "nodes": [*second.nodes, first.nodes[2]]},
        {"name": "foreign", "nodes": everything},
    ]
    found = fused(groups, [program], {program.name: [layers[0]]})
    assert [u.nodes for u in found[:2]] == [first.nodes[:2], (first.nodes[2], *second.nodes)]
    assert found[1].engine_layer == "a + b"
    assert found[2:] == rest
    assert fused(groups, [program], {program.name: [layers[1]]}) == groups, "many convolutions in one say nothing"
    assert fused(groups, [program], {}) == groups


def test_which_backends_can_be_searched() -> None:
    assert precision_of(create(BackendSpec.parse("emu-bf16")), False).name == "bf16"
    assert precision_of(create(BackendSpec.parse("ort")), True).name == "int8"
    for spec, why in (("emu-fp32", "FP32 already"), ("ort", "FP32 already"), ("torch-fp16", "cannot be kept one by")):
        with pytest.raises(InputError, match=why):
            precision_of(create(BackendSpec.parse(spec)), False)


# ---- two arithmetics in one graph


@pytest.mark.parametrize("precision", ["fp16", "fp16acc", "bf16", "tf32"])
def test_mixed_runs_are_those_of_the_emulated_backend(tmp_path: Path, precision: str) -> None:
    program = program_of(second_like(tmp_path / "net.onnx", depth=1, size=16))
    graph, rules = program.graph, TrialPrecision(precision)
    groups = fusion_groups_of(program, rules.candidates(graph))
    inputs = MadeUp(graph).sample(3)
    mixed = MixedExecutor(graph, ARITHMETICS[precision], "cpu")
    rng = np.random.default_rng(0)
    known = [mixed.run(inputs, frozenset(n.name for n in graph.nodes))]
    for _ in range(4):
        kept = [n for u in groups if rng.random() < 0.5 for n in u.nodes]
        high = rules.high(graph, kept)
        known.append(mixed.run(inputs, high, known))
        backend = EmulatedBackend(BackendSpec.parse(f"emu-{precision}"), overrides=dict.fromkeys(high, "fp32"))
        expected = backend.open(program).run(inputs)
        for name, array in mixed.outputs(known[-1]).items():
            np.testing.assert_array_equal(array, expected[name])
    assert mixed.executed < 5 * len(graph.nodes), "what did not change is not computed again"


def test_nothing_kept_is_the_plain_backend_and_everything_fp32(tmp_path: Path) -> None:
    program = program_of(second_like(tmp_path / "net.onnx", depth=0, size=16))
    inputs = MadeUp(program.graph).sample(3)
    mixed = MixedExecutor(program.graph, ARITHMETICS["fp16acc"], "cpu")
    for spec, high in (("emu-fp16acc", ()), ("emu-fp32", [n.name for n in program.graph.nodes])):
        found = mixed.outputs(mixed.run(inputs, frozenset(high)))
        expected = create(BackendSpec.parse(spec)).open(program).run(inputs)
        for name, array in found.items():
            np.testing.assert_array_equal(array, expected[name])


def test_an_overflow_is_introduced_by_the_layer_and_by_its_reader(tmp_path: Path) -> None:
    net = NetBuilder()
    big = net.op("Mul", net.conv("x", 4, 4), net.weight(np.array(1e6, np.float32)))
    net.op("Relu", net.conv(net.op("Mul", big, net.weight(np.array(1e-6, np.float32))), 4, 4), name="y")
    graph = Graph(net.save(tmp_path / "net.onnx", {"x": (1, [1, 4, 8, 8])}, ["y"]))
    mixed = MixedExecutor(graph, ARITHMETICS["fp16"], "cpu")
    exact = mixed.run(MadeUp(graph).sample(0), frozenset(n.name for n in graph.nodes))
    errors = [mixed.local_error([node.name], exact) for node in graph.nodes]
    assert np.isinf(errors).tolist() == [False, True, True, False, False]
    assert 1e-5 < errors[0] < 1e-3


# ---- INT8


def quantized(folder: Path) -> Graph:
    graph = Graph(second_like(folder / "net.onnx", depth=0, size=16))
    layers = {}
    for node in quantizable(graph):
        weight = np.abs(graph.initializer(node.proto.input[1]))
        layers[node.name] = LayerScales(4.0, weight.max((0, 2, 3) if node.op == "ConvTranspose" else (1, 2, 3)))
    return Graph(insert_qdq(graph, layers, folder / "int8.onnx"))


def test_removing_pairs_gives_what_never_had_them(tmp_path: Path) -> None:
    graph = quantized(tmp_path)
    pairs = quantized_inputs(graph)
    plain = Graph(remove_qdq(graph, pairs, tmp_path / "again.onnx"))
    original = Graph(tmp_path / "net.onnx")
    assert [n.proto for n in plain.nodes] == [n.proto for n in original.nodes]
    assert plain.initializers == original.initializers
    some = list(pairs)[1:3]
    part = Graph(remove_qdq(graph, some, tmp_path / "part.onnx"))
    assert quantized_inputs(part).keys() == pairs.keys() - set(some)
    with pytest.raises(InputError, match="no node 'nobody' that reads from DequantizeLinear"):
        remove_qdq(graph, ["nobody"], tmp_path / "x.onnx")
    assert not (tmp_path / "x.onnx").exists()


def test_kept_layers_run_as_without_their_pairs(tmp_path: Path) -> None:
    graph = quantized(tmp_path)
    inputs = MadeUp(graph).sample(1)
    mixed = MixedExecutor(graph, ARITHMETICS["int8"], "cpu")
    run = None
    for count in (0, 2, len(quantized_inputs(graph))):
        kept = list(quantized_inputs(graph))[:count]
        run = mixed.run(inputs, frozenset(kept), [run] if run else [])
        file = remove_qdq(graph, kept, tmp_path / f"{count}.onnx")
        expected = create(BackendSpec.parse("emu-fp32")).open(program_of(file)).run(inputs)
        for name, array in mixed.outputs(run).items():
            np.testing.assert_array_equal(array, expected[name])


# ---- strategy


@given(st.sets(st.integers(0, 30), max_size=6), st.permutations(range(31)), st.sets(st.integers(0, 30), max_size=4))
def test_what_is_needed_is_found_from_any_order(needed: set[int], order: list[int], seed: set[int]) -> None:
    asked: list[frozenset[int]] = []

    def holds(kept: frozenset[int]) -> bool:
        asked.append(kept)
        return needed <= kept

    found = smallest(holds, lambda grown: [i for i in order if i not in grown][: max(1, len(grown))], seed)
    assert set(found) == needed
    assert len(asked) == len(set(asked)), "no set twice"


@given(st.sets(st.frozensets(st.integers(0, 5)), max_size=20))
def test_any_predicate_gives_a_set_of_which_nothing_can_be_left_out(true_sets: set[frozenset[int]]) -> None:
    found = smallest(lambda kept: kept in true_sets, lambda grown: [i for i in range(6) if i not in grown][:1])
    prefixes = [frozenset(range(n)) for n in range(7)]
    assert (found is None) == true_sets.isdisjoint(prefixes)
    if found is not None:
        assert frozenset(found) in true_sets
        assert not any(frozenset(found) - {i} in true_sets for i in found)


def test_a_right_prediction_costs_one_question_a_layer() -> None:
    asked = []
    needed = frozenset({3, 40, 77})
    found = smallest(lambda kept: asked.append(kept) or needed <= kept, lambda grown: [40, 3, 77])
    assert set(found) == needed
    assert len(asked) == 2 + len(needed)


# ---- log

ABOUT = {"model": {"net": "abc"}, "backend": "emu-fp16", "goal": "rel_l2<0.001", "inputs": "def"}
TRIAL = Trial(
    frozenset({("net", "a"), ("net", "b")}), 1, False, Measured({"rel_l2": np.inf}, {"y": np.nan}), 0.5, 1e-3, ""
)


def test_a_log_gives_its_trials_back(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    TrialLog(path, ABOUT).add(TRIAL)
    again = TrialLog(path, ABOUT)
    (found,) = again.trials.values()
    assert (found.nodes, found.measured.figures, found.latency) == (TRIAL.nodes, TRIAL.measured.figures, 1e-3)
    assert np.isnan(found.measured.outputs["y"])
    again.add_engine({"net": [{"name": "a + b", "nodes": ("a", "b"), "tactic": "x"}]})
    assert TrialLog(path, ABOUT).engine == {"net": [{"name": "a + b", "nodes": ["a", "b"]}]}
    with pytest.raises(InputError, match="-: expected the name of a file"):
        TrialLog(Path("-"), ABOUT)


def test_a_torn_line_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    TrialLog(path, ABOUT).add(TRIAL)
    path.write_bytes(path.read_bytes() + b'{"kept": [["net"')
    log = TrialLog(path, ABOUT)
    assert len(log.trials) == 1
    log.add(Trial(frozenset(), 0, True, TRIAL.measured, 0.1))
    assert len(TrialLog(path, ABOUT).trials) == 2
    log.add(Trial(frozenset({("net", "failed")}), 1, True, Measured(), 0.1, error="it ran out of memory"))
    assert len(TrialLog(path, ABOUT).trials) == 3
    log.add(Trial(frozenset({("net", "lost")}), 1, True, Measured(), 0.1))
    with pytest.raises(InputError, match="a trial lacks the figure rel_l2"):
        TrialLog(path, ABOUT)


def test_foreign_logs_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    TrialLog(path, ABOUT)
    with pytest.raises(InputError, match=r"belongs to another search \(goal 'rel_l2<0.001', now 'max_abs<1'\)"):
        TrialLog(path, {**ABOUT, "goal": "max_abs<1"})
    for text in ("not json\n", '{"schema": "other/1"}\n', "[]\n", '"a"\n{}\n'):
        path.write_text(text)
        with pytest.raises(InputError, match=r"--log: .*log\.jsonl (is not the log|belongs)"):
            TrialLog(path, ABOUT)
        assert path.read_text() == text
    with pytest.raises(InputError, match="cannot be written"):
        TrialLog(tmp_path / "no" / "log.jsonl", ABOUT)
    with pytest.raises(InputError, match="is a folder; expected a log"):
        TrialLog(tmp_path, ABOUT)


def test_a_log_that_died_within_its_first_line_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    TrialLog(path, ABOUT)
    path.write_bytes((whole := path.read_bytes())[:9])
    TrialLog(path, ABOUT).add(TRIAL)
    assert path.read_bytes().startswith(whole)
    assert len(TrialLog(path, ABOUT).trials) == 1


# ---- emitted forms

NAMES = st.text(st.characters(codec="ascii", exclude_categories=["C", "Z"], exclude_characters=",:'\""), min_size=1)


@given(st.lists(NAMES, min_size=1, unique=True), st.sampled_from(["fp16", "fp16acc", "bf16"]))
def test_arguments_name_exactly_the_nodes(nodes: list[str], precision: str) -> None:
    told = arguments({"net": nodes, "other": []}, precision, Named({"net": "net.onnx", "other": "other.onnx"}))
    assert list(told) == ["net"]
    words = {tool: shlex.split(line) for tool, line in told["net"].items()}
    flag = precision.removesuffix("acc")
    assert f"--{flag}" in words["polygraphy"]
    at = words["polygraphy"].index("--layer-precisions")
    assert words["polygraphy"][at + 1 :] == [f"{node}:float32" for node in nodes]
    given = dict(w.split("=", 1) for w in words["trtexec"] if "=" in w)
    assert given["--layerPrecisions"] == given["--layerOutputTypes"] == ",".join(f"{node}:fp32" for node in nodes)
    assert given["--precisionConstraints"] == "obey"
    patterns = words["autocast"][words["autocast"].index("--nodes_to_exclude") + 1 :]
    for pattern, node in zip(patterns, nodes, strict=True):
        assert [n for n in [*nodes, f"{node}x", f"x{node}"] if re.match(pattern, n)] == [node]


def test_the_fragment_is_a_configuration(tmp_path: Path) -> None:
    from cp_debug.deploy.config import load_config

    path = tmp_path / "deploy.yaml"
    fragment = deploy_fragment({"a": ["/b0/Conv", "no"], "b": ["123"]}, "fp16acc")
    path.write_text(f"model: centerpoint:tiny\nwork_dir: {tmp_path}\n{fragment}")
    config = load_config(path).tensorrt
    assert (config.precision, config.keep_fp32) == ("fp16", ["a//b0/Conv", "a/no", "b/123"])
    assert '- "/层/Conv"' in deploy_fragment({"a": ["/层/Conv"]}, "fp16")
    assert deploy_fragment({"a": ["n"]}, "tf32") == ""


def test_mixed_graphs_run_and_keep_every_name(tmp_path: Path) -> None:
    from cp_debug.mixed_precision.result import write_onnx
    from cp_debug.recipes.registry import load_model

    path = second_like(tmp_path / "net.onnx", depth=0, size=16)
    program, model = program_of(path), load_model(str(path))
    kept = {"net": [n.name for n in program.graph.nodes if n.op == "Conv"][:2]}
    write_onnx(model, [], [program], kept, "fp16", tmp_path / "out" / "mixed.onnx")
    mixed = Graph(tmp_path / "out" / "mixed.onnx")
    onnx.checker.check_model(str(mixed.path), full_check=True)
    assert {n.name for n in program.graph.nodes} <= {n.name for n in mixed.nodes}
    assert set(program.graph.values) <= set(mixed.values)
    session = ort.InferenceSession(str(mixed.path), providers=["CPUExecutionProvider"])
    inputs = MadeUp(program.graph).sample(0)
    expected = create(BackendSpec.parse("emu-fp32")).open(program).run(inputs)
    for value, array in zip(session.get_outputs(), session.run(None, inputs), strict=True):
        np.testing.assert_allclose(array, expected[value.name], rtol=0.1, atol=0.05)
    write_onnx(model, [], [program, Program("two", program.graph)], {**kept, "two": []}, "bf16", tmp_path / "both")
    assert sorted(p.name for p in (tmp_path / "both").iterdir()) == ["net.onnx", "two.onnx"]


def test_what_belongs_to_the_layer_before_it(tmp_path: Path) -> None:
    """An activation of a product's only result belongs to it; one of an output, or of a result read twice, does not."""
    weight = numpy_helper.from_array(np.zeros((4, 4), np.float32), "w")
    reads = [("MatMul", ["x", "w"]), ("Relu", ["n0"]), ("MatMul", ["n1", "w"]), ("Sigmoid", ["n2"]), ("Tanh", ["n2"])]
    reads += [("Add", ["n3", "n4"]), ("Relu", ["x"]), ("Relu", ["n5"])]
    nodes = [helper.make_node(op, inputs, [f"n{i}"], f"n{i}") for i, (op, inputs) in enumerate(reads)]
    outputs = [helper.make_empty_tensor_value_info(name) for name in ("n5", "n6", "n7")]
    given = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [4, 4])]
    graph = helper.make_graph(nodes, "g", given, outputs, [weight])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), tmp_path / "g.onnx")
    opened = Graph(tmp_path / "g.onnx")
    joined = [_joined(opened, each) for each in opened.nodes]
    assert [each.name if each else None for each in joined] == [None, "n0", None, None, None, None, None, None]
