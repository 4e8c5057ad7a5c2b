"""Trials of a search, on runs whose figures are known beforehand: what is built again, timed, grouped, kept."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from nets import NetBuilder

from cp_debug.backends.base import Program
from cp_debug.backends.spec import BackendSpec
from cp_debug.bisect.options import Options
from cp_debug.graph.graph import Graph
from cp_debug.mixed_precision.goal import Goal
from cp_debug.mixed_precision.layers import FusionGroup, TrialPrecision, fused, nodes_of
from cp_debug.mixed_precision.result import MixedPrecisionResult
from cp_debug.mixed_precision.runners import BackendRunner
from cp_debug.mixed_precision.search import MixedPrecisionOptions, _MixedPrecisionSearch
from cp_debug.mixed_precision.trials import Measured, Trial, nodes_in
from cp_debug.recipes.base import Component, Sample


def chain(folder: Path, name: str) -> Program:
    net = NetBuilder()
    net.op("Relu", net.op("Neg", "x", name=f"{name}_mid"), name="y")
    return Program(name, Graph(net.save(folder / f"{name}.onnx", {"x": (1, [1, 2])}, ["y"])))


class Backend:
    """Multiplies by 10, or where anything is kept by 100; a session takes 1 s, of kept ones 5 s."""

    def __init__(self, *, timed: bool = True) -> None:
        self.kept: frozenset[str] = frozenset()
        self.opened: list[tuple[str, tuple[str, ...]]] = []
        self.timed = timed

    def keeping(self, nodes: frozenset[str]) -> Backend:
        other = Backend(timed=self.timed)
        other.kept, other.opened = nodes, self.opened
        return other

    def open(self, program: Program) -> Any:
        self.opened.append((program.name, tuple(sorted(self.kept))))
        factor, seconds = (100.0, 5.0) if self.kept else (10.0, 1.0)
        session = SimpleNamespace(run=lambda inputs: {"y": factor * inputs["x"]}, close=lambda: None)
        if self.timed:
            session.timings = lambda inputs, count: [9.0, seconds, seconds]
        return session


@pytest.fixture
def trials(tmp_path: Path) -> tuple[Any, Backend]:
    programs = [chain(tmp_path, name) for name in ("first", "second")]
    components = [Component(name, ["x"], ["y"]) for name in ("first", "second")]

    def feed(component: Component, sample: Sample, results: Any) -> Any:
        return {"x": results["first"]["y"] if component.name == "second" else sample.arrays["x"]}

    model: Any = SimpleNamespace(components=components, feed=feed)
    samples = [Sample({"x": np.full((1, 2), value, np.float32)}, "s") for value in (1, 2)]
    backend = Backend()
    return BackendRunner(model, programs, samples, TrialPrecision("fp16acc"), backend, tmp_path), backend


def kept(component: str, node: str) -> frozenset[FusionGroup]:
    return frozenset([FusionGroup(component, (node,), node)])


def test_a_component_is_built_again_when_its_own_layers_change(trials: tuple[Any, Backend]) -> None:
    runner, backend = trials
    outputs = [[r["second"]["y"][0, 0] for r in runner.run(frozenset())]]
    assert (runner.builds, runner.latency()) == (2, 2.0)
    node = runner._programs["second"].graph.nodes[0].name
    outputs.append([r["second"]["y"][0, 0] for r in runner.run(kept("second", node))])
    assert (runner.builds, runner.latency()) == (3, 6.0)  # the first component is as it was
    node = runner._programs["first"].graph.nodes[0].name
    outputs.append([r["second"]["y"][0, 0] for r in runner.run(kept("first", node))])
    assert (runner.builds, runner.latency()) == (5, 6.0)
    assert outputs == [[100, 200], [1000, 2000], [1000, 2000]]
    assert [name for name, _ in backend.opened] == ["first", "second", "second", "first", "second"]


def test_a_trial_has_no_time_where_a_part_tells_none(trials: tuple[Any, Backend]) -> None:
    runner, backend = trials
    backend.timed = False
    runner.run(frozenset())
    assert runner.latency() is None


def test_nodes_of_a_set_are_those_of_the_component() -> None:
    groups = [FusionGroup("a", ("x", "y"), "x"), FusionGroup("b", ("z",), "z")]
    assert nodes_of(groups, "a") == {"x", "y"}
    assert nodes_of(groups, "b") == {"z"}


def test_an_engines_layers_regroup_what_they_hold(tmp_path: Path) -> None:
    program = chain(tmp_path, "net")
    mid, last = (node.name for node in program.graph.nodes)
    groups = [FusionGroup("net", (n,), n) for n in (mid, last)]
    (one,) = fused(groups, [program], {"net": [{"name": "fused", "nodes": [last, mid]}]})
    assert (one.nodes, one.engine_layer) == ((mid, last), "fused")
    first, second = fused(groups, [program], {"net": [{"name": "half", "nodes": [last]}]})
    assert (first.nodes, first.engine_layer, second.nodes, second.engine_layer) == ((mid,), "", (last,), "half")
    assert fused(groups, [program], {}) == groups


def result(**fields: Any) -> MixedPrecisionResult:
    trial = Trial(frozenset(), 2, False, Measured({"rel_l2": 0.01}), 1.0)
    given: dict[str, Any] = {
        "model": "m", "reference": "torch", "backend": "trt", "emulated": False, "precision": "fp16",
        "goal": "rel_l2<1", "layers": 9, "reached": True, "kept": [None, None], "minimal": True, "best": trial,
        "baseline": trial, "trials": [], "keep": {},
    }  # fmt: skip
    return MixedPrecisionResult(**(given | fields))


def test_the_outcome_of_a_search_in_a_sentence() -> None:
    assert result().verdict == "rel_l2<1 holds with 2 of 9 layers kept; none of them can be left out"
    said = result(minimal=False, stopped="stopped after 9 s").verdict
    assert said == "rel_l2<1 holds with 2 of 9 layers kept; some may not be needed: stopped after 9 s"
    assert result(kept=[]).verdict == "rel_l2<1 holds with nothing kept"
    missed = result(reached=False, stopped="why")
    assert missed.verdict == "rel_l2<1 was not reached: the closest was rel_l2 0.01 with 2 of 9 layers kept (why)"
    refused = result(reached=False, best=Trial(frozenset(), 2, False, Measured(), 1.0, error="no kernel"))
    assert refused.verdict == "rel_l2<1 was not reached: the closest was no kernel with 2 of 9 layers kept"


def test_networks_are_folded_unless_told_otherwise() -> None:
    assert MixedPrecisionOptions().folded
    assert Options().folded


@pytest.mark.parametrize(
    ("layers", "best"), [({1: 0.9, 2: 0.1, 3: 0.2}, 2), ({1: 0.9, 2: 0.8, 3: 0.8}, 2), ({1: 0.1, 2: 0.4, 3: 0.2}, 1)]
)
def test_where_a_search_is_stopped_the_fewest_layers_that_hold_are_the_best_else_those_that_come_closest(
    layers: Mapping[int, float], best: int
) -> None:
    groups = [FusionGroup("net", (n,), n) for n in "abc"]
    trials = {}
    for count, error in {0: 1.0, **layers}.items():
        nodes = nodes_in(frozenset(groups[:count]))
        trials[False, nodes] = Trial(nodes, count, False, Measured({"rel_l2": error}), 1.0)
    refused = nodes_in(frozenset(groups[1:2]))
    trials[False, refused] = Trial(refused, 1, False, Measured(), 1.0, error="no kernel")
    search: Any = object.__new__(_MixedPrecisionSearch)
    search._model, search._reference, search._tests, search._notes = SimpleNamespace(name="m"), "torch", [], []
    search._backend, search._exporter = SimpleNamespace(spec=BackendSpec("ort-fp16"), emulated=False), "dynamo"
    search.precision, search._goal, search.groups = TrialPrecision("fp16"), Goal.parse("rel_l2<0.5"), groups
    search.log, search._started = SimpleNamespace(trials=trials), 0.0
    search.runner, search.emulator = SimpleNamespace(builds=4), SimpleNamespace(passes=0)
    search._kept_layer = lambda group, kept_groups, predictor: group
    found = search._result(None, None, "stopped after 9 s")
    assert found.best.layers == best
    assert found.kept == groups[:best]
    assert found.baseline.layers == 0
    assert found.reached == (min(layers.values()) < 0.5)
    assert not found.minimal


def test_int4_is_of_products_with_stored_weights(tmp_path: Path) -> None:
    net = NetBuilder()
    stored = net.op("MatMul", "x", net.weight(np.ones((4, 4), np.float32)), name="stored")
    gemm = net.op("Gemm", stored, net.weight(np.ones((4, 4), np.float32)), name="gemm")
    net.op("MatMul", gemm, net.op("Transpose", stored, perm=[1, 0]), name="y")
    graph = Graph(net.save(tmp_path / "n.onnx", {"x": (1, [2, 4])}, ["y"]))
    assert TrialPrecision("int4:weights").candidates(graph) == {"node_stored", "node_gemm"}
    assert TrialPrecision("tf32").candidates(graph) == {"node_stored", "node_gemm", "node_y"}
