"""Whole searches: on the emulator, on a fake TensorRT, from the command line; stopped, resumed, out of reach."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from faults.edits import Editor, rescale
from nets import NetBuilder
from test_flatten import LOOP, save
from test_trt_runner import install, save_net
from typer.testing import CliRunner

from cp_debug.backends.base import Program
from cp_debug.backends.executor import Executor
from cp_debug.backends.registry import create
from cp_debug.backends.spec import parse_backends
from cp_debug.bisect.engine import bisect
from cp_debug.cli.main import app
from cp_debug.errors import InputError
from cp_debug.graph.graph import Graph
from cp_debug.graph.half_precision import cast_surgery
from cp_debug.graph.made_up import MadeUp
from cp_debug.graph.qdq import insert_qdq, quantizable, quantized_inputs
from cp_debug.graph.scales import LayerScales
from cp_debug.mixed_precision.goal import Goal
from cp_debug.mixed_precision.layers import TrialPrecision, fusion_groups_of
from cp_debug.mixed_precision.result import MixedPrecisionResult
from cp_debug.mixed_precision.runners import EmulatedRunner
from cp_debug.mixed_precision.search import MixedPrecisionOptions, samples_for, search
from cp_debug.recipes.registry import load_model

GOAL = "rel_l2<1e-2"


def chain(path: Path, depth: int = 8) -> Path:
    """Convolutions with ReLU, ``c0`` … and ``r0`` …: ``x`` [1, 8, 16, 16] to ``y``."""
    net, x = NetBuilder(), "x"
    for i in range(depth):
        x = net.op("Relu", net.conv(x, 8, 8, name=f"c{i}"), name=f"r{i}")
    net.conv(x, 8, 4, name="y")
    return net.save(path, {"x": (1, [1, 8, 16, 16])}, ["y"])


@pytest.fixture
def overflowing(tmp_path: Path) -> Path:
    """``c2`` is beyond FP16 until ``c3`` has divided it: both must stay FP32."""
    editor = Editor(chain(tmp_path / "net.onnx"))
    rescale(editor, "c2", "c3", 2.0**18)
    return editor.save(tmp_path / "net.onnx")


def run(path: Path, backends: str = "torch,emu-fp16", goal: str = GOAL, **options: Any) -> MixedPrecisionResult:
    model = load_model(str(path))
    made = [create(spec) for spec in parse_backends(backends)]
    return search(model, made, Goal.parse(goal), list(model.samples(1, 0, None)), MixedPrecisionOptions(**options))


def names(result: MixedPrecisionResult) -> list[str]:
    return [layer.fusion_group.name for layer in result.kept]


@pytest.mark.parametrize("backend", ["emu-fp16", "emu-fp16acc"])
def test_an_overflow_needs_both_of_its_layers(overflowing: Path, backend: str) -> None:
    result = run(overflowing, f"torch,{backend}")
    assert (result.reached, result.minimal, names(result)) == (True, True, ["node_c2", "node_c3"])
    assert [layer.introduced for layer in result.kept] == [np.inf, np.inf]
    assert all(layer.without["rel_l2"] > 1e-2 for layer in result.kept)
    assert [trial.layers for trial in result.pareto] == [0, 2]
    assert len(result.trials) == 4
    assert result.keep == {"net": ["node_c2", "node_r2", "node_c3", "node_r3"]}
    assert json.loads(json.dumps(result.to_dict(), allow_nan=False))["kept"][0]["introduced"] == "Infinity"


def test_what_depends_on_no_input_can_be_kept(tmp_path: Path) -> None:
    net = NetBuilder()
    places = net.weight(np.arange(3000, 3032, dtype=np.float32)[None])
    angles = net.op("Mul", places, net.weight(np.array(0.5, np.float32)), name="angles")
    net.op("Mul", "x", net.op("Cos", angles, name="cos"), name="y")
    path = net.save(tmp_path / "rotation.onnx", {"x": (1, [8, 32])}, ["y"])
    result = run(path, "ort,emu-fp16")
    assert (result.reached, result.keep) == (True, {"rotation": ["node_angles", "node_cos"]})


def test_nothing_to_keep_is_one_trial(tmp_path: Path) -> None:
    result = run(chain(tmp_path / "net.onnx"))
    assert (result.reached, result.kept, len(result.trials)) == (True, [], 1)
    assert "holds with nothing kept" in result.verdict


def test_rounding_takes_the_layers_that_matter(tmp_path: Path) -> None:
    """Half of the rounding error: fewer layers than all, each of them needed, and the goal holds."""
    path = chain(tmp_path / "net.onnx")
    whole = run(path, goal="rel_l2<1").baseline.measured.figures["rel_l2"]
    result = run(path, goal=f"rel_l2<{whole / 2}")
    assert result.reached
    assert 0 < len(result.kept) < result.layers
    assert result.best.measured.figures["rel_l2"] < whole / 2
    assert all(layer.without["rel_l2"] >= whole / 2 for layer in result.kept)


@pytest.mark.parametrize("precision", ["fp16", "bf16", "fp16acc", "tf32"])
def test_shares_of_a_trial_add_up_to_its_divergence(tmp_path: Path, precision: str) -> None:
    """Nearly linear, so that they add up to 1; with the largest layers kept, the others' shares of less do."""
    graph = Graph(chain(tmp_path / "net.onnx"))
    program = Program("net", graph)
    model, of = load_model(str(tmp_path / "net.onnx")), TrialPrecision(precision)
    runner = EmulatedRunner(model, [program], list(model.samples(2, 0, None)), of, "cpu")
    runner.prepare()
    groups = fusion_groups_of(program, of.candidates(graph))
    for kept in (frozenset(), frozenset(groups[:3])):
        shares = runner.shares(kept)
        assert sum(shares.values()) == pytest.approx(1, abs=0.05)
        assert sum(abs(shares.get(("net", node), 0.0)) for group in kept for node in group.nodes) == 0
    assert runner.shares(frozenset(groups)) == {}


def test_a_goal_out_of_reach_is_said(tmp_path: Path) -> None:
    result = run(chain(tmp_path / "net.onnx", depth=3), "torch-fp64,emu-fp16", "rel_l2<1e-12")
    assert not result.reached
    assert not result.minimal
    assert len(result.kept) == result.layers
    assert "rel_l2<1e-12 was not reached: the closest was rel_l2" in result.verdict
    assert "keeping every layer does not reach it" in result.verdict


def test_the_limit_on_trials_leaves_what_was_verified(overflowing: Path) -> None:
    one = run(overflowing, max_builds=1)
    assert (one.reached, one.kept, one.stopped) == (False, [], "stopped after 1 trial")
    two = run(overflowing, max_builds=2)
    assert (two.reached, two.minimal, names(two)) == (True, False, ["node_c2", "node_c3"])
    assert "some may not be needed: stopped after 2 trials" in two.verdict
    late = run(overflowing, budget=1e-9)
    assert (late.reached, len(late.trials)) == (False, 1)


def test_a_search_goes_on_from_its_log(overflowing: Path, tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    first = run(overflowing, max_builds=2, log=log)
    lines = log.read_text().splitlines()
    assert len(lines) == 1 + len(first.trials)
    second = run(overflowing, max_builds=2, log=log)
    assert (second.minimal, names(second)) == (True, ["node_c2", "node_c3"])
    assert log.read_text().splitlines()[: len(lines)] == lines
    third = run(overflowing, max_builds=1, log=log)
    assert (third.minimal, names(third)) == (True, names(second))
    with pytest.raises(InputError, match="belongs to another search"):
        run(overflowing, log=log, goal="rel_l2<0.5")
    with pytest.raises(InputError, match="belongs to another search"):
        run(chain(tmp_path / "other.onnx"), log=log)


def test_interrupted_searches_leave_a_log(overflowing: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cp_debug.mixed_precision.trials import Judge

    log, measure, calls = tmp_path / "log.jsonl", Judge.measure, []

    def interrupted(self: Judge, results: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return measure(self, results)

    with monkeypatch.context() as patched:
        patched.setattr(Judge, "measure", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(overflowing, log=log)
    assert len(log.read_text().splitlines()) == 3
    assert run(overflowing, log=log).minimal


def test_mixed_onnx_has_what_was_found_in_it(overflowing: Path, tmp_path: Path) -> None:
    """Its casts alone round to FP16, in FP32 arithmetic; with half of the set they overflow."""
    target = tmp_path / "mixed.onnx"
    run(overflowing, onnx=target)
    half = cast_surgery(Graph(overflowing), "fp16", ["node_c2", "node_r2"], tmp_path / "half.onnx")
    inputs = MadeUp(Graph(overflowing)).sample([0, 0])
    expected, good, bad = (Executor(Graph(path)).run(inputs)["y"] for path in (overflowing, target, half))
    assert (good - expected).norm() < 1e-2 * expected.norm()
    assert not bad.isfinite().all()


def test_clipped_int8_layers_are_left_unquantized(tmp_path: Path) -> None:
    graph = Graph(chain(tmp_path / "net.onnx"))
    layers = {}
    for node in quantizable(graph):
        weight = np.abs(graph.initializer(node.proto.input[1])).max((1, 2, 3))
        layers[node.name] = LayerScales(0.1 if node.name in ("node_c1", "node_c5") else 6.0, weight)
    quantized = insert_qdq(graph, layers, tmp_path / "int8.onnx")
    alone = run(quantized, "torch,emu-int8", "rel_l2<0.15")
    assert (alone.minimal, names(alone)) == (True, ["node_c1", "node_c5"])
    beside = run(graph.path, "torch,ort", "rel_l2<0.15", test_model=quantized, onnx=tmp_path / "kept.onnx")
    assert (beside.minimal, names(beside), beside.precision) == (True, names(alone), "int8")
    assert beside.builds == 4, "nothing, the predicted set, and each layer of it left out"
    pairs = {n.proto.input[0] for n in Graph(tmp_path / "kept.onnx").nodes if n.op == "DequantizeLinear"}
    assert len(pairs) == 2 * (9 - 2)


@pytest.mark.parametrize("backend", ["emu-int8", "ort-int8"])
def test_what_is_not_quantized_is_quantized_first(tmp_path: Path, backend: str) -> None:
    path = chain(tmp_path / "net.onnx")
    whole = run(path, f"torch,{backend}", "rel_l2<1")
    assert "quantized on the fly: mse on 8 samples" in whole.notes
    limit = whole.baseline.measured.figures["rel_l2"] / 2
    result = run(path, f"torch,{backend}", f"rel_l2<{limit}", onnx=tmp_path / "kept.onnx")
    assert result.minimal
    assert 0 < len(result.kept) < result.layers == 9
    assert len(quantized_inputs(Graph(tmp_path / "kept.onnx"))) == 9 - len(result.kept)


EVERY_LAYER = [("/c1/Conv", "/r1/Relu"), ("/c2/Conv",), ("/y/Add",)]


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("version", "needed"), [("8.6.0", EVERY_LAYER[2:]), ("10.3.0", EVERY_LAYER[2:]), ("11.4.0", EVERY_LAYER)]
)
def test_real_builds_confirm_and_correct_the_emulation(
    version: str, needed: list[tuple[str, ...]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The emulator keeps every layer for this goal. A weakly typed fake engine rounds only what leaves it, so its last
    layer is all that must be kept; a strongly typed one has the casts in its graph."""
    monkeypatch.delenv("CPDEBUG_TRT_PYTHON", raising=False)
    install(version, monkeypatch)
    log = tmp_path / "log.jsonl"
    result = run(save_net(tmp_path), "ort,trt-fp16", "rel_l2<1e-6", log=log)
    assert (result.reached, result.minimal, result.emulated) == (True, True, False)
    assert [layer.fusion_group.nodes for layer in result.kept] == needed
    assert sum(trial.emulated for trial in result.trials) >= 2
    assert result.builds == sum(not trial.emulated for trial in result.trials) <= 5
    assert result.best.latency is not None
    groups = {layer["name"] for layer in json.loads(log.read_text().splitlines()[2])["engine"]["net"]}
    assert "/c1/Conv + /r1/Relu" in groups
    again = run(save_net(tmp_path), "ort,trt-fp16", "rel_l2<1e-6", log=log)
    assert (again.builds, [layer.fusion_group.nodes for layer in again.kept]) == (0, needed)
    stopped = run(save_net(tmp_path), "ort,trt-fp16", "rel_l2<1e-6", max_builds=2)
    assert (stopped.builds, stopped.minimal) == (2, False)


@pytest.mark.parametrize(
    ("backends", "options", "said"),
    [
        ("torch,emu-fp16,emu-bf16", {}, "expected a reference and one test"),
        ("torch,emu-fp32", {}, "FP32 already"),
        ("torch,torch-fp64", {}, "FP64"),
        ("torch,emu-tf32", {"onnx": Path("x.onnx")}, "TF32 is not in an ONNX graph"),
        ("torch,emu-fp16", {"goal": "boxes_lost==0"}, "decodes no boxes"),
        ("torch,torch-int8", {}, "cannot be kept one by one; try emu-fp16acc, emu-int8"),
    ],
)
def test_refusals(tmp_path: Path, backends: str, options: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        run(chain(tmp_path / "net.onnx", depth=1), backends, **options)


def test_a_model_with_nothing_to_keep(tmp_path: Path) -> None:
    net = NetBuilder()
    net.op("Reshape", "x", net.weight(np.array([2, 8], np.int64)), name="y")
    with pytest.raises(InputError, match=r"no layer of .*net\.onnx computes in fp16 on emu-fp16"):
        run(net.save(tmp_path / "net.onnx", {"x": (1, [4, 4])}, ["y"]))


def test_samples_fit_the_goal(tmp_path: Path) -> None:
    model = load_model(str(chain(tmp_path / "net.onnx", depth=1)))
    everything = {"inputs": None, "data": None, "count": 2, "seed": 0}
    assert len(samples_for(model, Goal.parse(GOAL), **everything)) == 2
    with pytest.raises(InputError, match="decodes no boxes, so it cannot be scored"):
        samples_for(model, Goal.parse("map_drop<1"), **everything)
    with pytest.raises(InputError, match="give an info file with --data"):
        samples_for(model, Goal.parse("map_drop<1"), **{**everything, "inputs": tmp_path})
    with pytest.raises(InputError, match="--data is for goals on map_drop"):
        samples_for(model, Goal.parse(GOAL), **{**everything, "data": tmp_path})


@pytest.mark.slow
def test_detections_and_map_are_measured() -> None:
    model = load_model("centerpoint:tiny")
    goal = Goal.parse("boxes_lost==0 and boxes_gained==0 and map_drop<0.2")
    samples = samples_for(model, goal, inputs=None, data=None, count=2, seed=0)
    made = [create(spec) for spec in parse_backends("torch,emu-fp16")]
    result = search(model, made, goal, samples)
    assert result.reached
    assert set(result.baseline.measured.figures) == {"rel_l2", "max_abs", "boxes_lost", "boxes_gained", "map_drop"}
    assert abs(result.baseline.measured.figures["map_drop"]) < 0.2


CLI = CliRunner()


def test_the_command(overflowing: Path, tmp_path: Path) -> None:
    target = tmp_path / "out.json"
    arguments = ["search", str(overflowing), "-b", "torch,emu-fp16", "--goal", GOAL]
    done = CLI.invoke(app, [*arguments, "--json", str(target), "--onnx", str(tmp_path / "mixed.onnx")])
    assert done.exit_code == 0, done.output
    assert "2 of 9 layers kept; none of them can be left out" in done.output
    for expected in ("--precision-constraints obey", "--layerPrecisions=node_c2:fp32", "'^node_c2$'", "keep_fp32:"):
        assert expected in done.output
    document = json.loads(target.read_text())
    assert (document["schema"], document["minimal"]) == ("cpdebug.search/2", True)
    assert Graph(tmp_path / "mixed.onnx").precision == "fp16"
    stopped = CLI.invoke(app, [*arguments, "--max-builds", "1", "--onnx", str(tmp_path / "none.onnx")])
    assert stopped.exit_code == 1
    assert "was not reached" in stopped.output
    assert not (tmp_path / "none.onnx").exists()
    assert isinstance(CLI.invoke(app, [*arguments, "--budget", "soon"]).exception, InputError)


def test_what_a_loop_runs_is_rounded_in_an_emulated_search(tmp_path: Path) -> None:
    """Its layers are searched by their own names, and what nothing kept gives is what a bisect gives."""
    file = save(tmp_path / "net.onnx", LOOP)
    result = run(file, "ort,emu-bf16", "rel_l2<1e-6")
    (test,) = bisect(str(file), "ort,emu-bf16").tests
    ends = [row.stats.finite_rel_l2 for row in test.rows if row.kind == "data"]
    assert 0.3 * max(ends) < result.baseline.measured.figures["rel_l2"] <= max(ends)
    assert any("/#1/" in name for name in names(result))
    assert result.arguments == {}
    assert not result.to_dict()["deploy"]
    with pytest.raises(InputError, match="--onnx: what If, Loop and Scan ran was tried in a graph without them"):
        run(file, "ort,emu-bf16", onnx=tmp_path / "mixed.onnx")
