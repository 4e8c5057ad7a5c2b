"""Bodies of If, Loop and Scan, and the file's own functions: put in their place, probed, replayed, and judged."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper, parser

from cp_debug.backends.arithmetic import FP16, FP32
from cp_debug.backends.executor import Executor
from cp_debug.bisect.branches import in_words
from cp_debug.bisect.engine import Options, bisect
from cp_debug.bisect.recording import compare_captures, record
from cp_debug.bisect.result import GUILTY, INHERITED, TestResult
from cp_debug.graph import bodies
from cp_debug.graph.bodies import Endless, LoopClock, _scan_batch
from cp_debug.graph.flatten import flatten, has_control_flow
from cp_debug.graph.graph import Graph
from cp_debug.probes.capture import Capture
from cp_debug.recipes.registry import load_model

IF = """
net (float[1,8] x, float limit) => (float[N,M] y)
{
    start = MatMul (x, w0)
    mean = ReduceMean <keepdims = 0> (start)
    large = Greater (mean, limit)
    y = If (large) <
        then_branch = g1 () => (float[N,M] then_out)
        {
            t1 = MatMul (start, w1)
            t2 = Tanh (t1)
            then_out = Add (t2, start)
        },
        else_branch = g2 () => (float[N,M] else_out)
        {
            e1 = MatMul (start, w2)
            else_out = Sigmoid (e1)
        }
    >
}"""
LOOP = """
net (float[1,8] x) => (float[N,M] y, float[K,N,M] all)
{
    start = MatMul (x, w0)
    trips = Constant <value_int = 3> ()
    go = Constant <value = bool {1}> ()
    y, all = Loop (trips, go, start) <
        body = g1 (int64 i, bool c, float[1,8] state) => (bool c_out, float[1,8] next, float[1,8] seen)
        {
            c_out = Identity (c)
            m = MatMul (state, w1)
            next = Tanh (m)
            seen = Neg (next)
        }
    >
}"""
SCAN = """
net (float[1,8] x) => (float[N,M] y, float[K,L] all)
{
    rows = MatMul (x, w0)
    square = MatMul (w1, w2)
    first = Squeeze (rows)
    last, all = Scan (first, square) <
        num_scan_inputs = 1, scan_input_directions = [1],
        body = g1 (float[8] state, float[8] row) => (float[8] next, float[8] seen)
        {
            total = Add (state, row)
            next = Tanh (total)
            seen = Neg (next)
        }
    >
    y = Mul (last, rows)
}"""
WHILE = """
net (float[1,8] x, float limit) => (float[N,M] y, float[K,N,M] all)
{
    start = MatMul (x, w0)
    trips = Constant <value_int = 9> ()
    go = Constant <value = bool {1}> ()
    y, all = Loop (trips, go, start) <
        body = g1 (int64 i, bool c, float[1,8] state) => (bool c_out, float[1,8] next, float[1,8] seen)
        {
            next = MatMul (state, w1)
            size = ReduceMean <keepdims = 0> (next)
            far = Abs (size)
            c_out = Greater (far, limit)
            seen = Neg (next)
        }
    >
}"""
FUNCTION = """
net (float[1,8] x) => (float[N,M] y)
{
    a = own.block <slope = 0.25> (x, w0)
    y = own.block (a, w1)
}
<domain: "own", opset_import: ["" : 17]>
block <slope: float = 0.1> (x, w) => (y)
{
    m = MatMul (x, w)
    y = LeakyRelu <alpha: float = @slope> (m)
}"""

COUNTER = """
net (float[1,8] x) => (float[N,M] y)
{
    start = MatMul (x, w0)
    trips = Constant <value_int = 3> ()
    go = Constant <value = bool {1}> ()
    y = Loop (trips, go, start) <
        body = g1 (int64[1] i, bool c, float[N,M] state) => (bool c_out, float[N,M] next)
        {
            c_out = Identity (c)
            last = Constant <value_ints = [100]> ()
            axis = Constant <value_ints = [1]> ()
            next = Slice (state, i, last, axis)
        }
    >
}"""
"""TorchScript declares the counter with one axis, and reads it as a vector."""


def save(path: Path, text: str, faults: dict[str, float] | None = None) -> Path:
    model = parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17, "own" : 1]>\n{text}')
    rng = np.random.default_rng(0)
    for i in range(3):
        weight = 0.5 * rng.standard_normal((8, 8)).astype(np.float32) * np.float32((faults or {}).get(f"w{i}", 1.0))
        if f"w{i}" in text:
            model.graph.initializer.append(numpy_helper.from_array(weight, f"w{i}"))
    onnx.save(model, path)
    return path


def compared(
    folder: Path, text: str, faults: dict[str, float], backends: str = "ort,ort-all", limit: float = -9, seed: int = 1
) -> TestResult:
    good, bad = save(folder / "good.onnx", text), save(folder / "bad.onnx", text, faults)
    inputs = {"x": np.random.default_rng(seed).standard_normal((1, 8)).astype(np.float32)}
    if "limit" in text:
        inputs["limit"] = np.float32(limit)
    np.savez(folder / "inputs.npz", **inputs)
    return bisect(str(good), backends, test_model=bad, options=Options(inputs=folder / "inputs.npz")).tests[0]


@pytest.mark.parametrize("text", [IF, LOOP, SCAN, FUNCTION, COUNTER])
def test_the_flat_graph_computes_the_same(tmp_path: Path, text: str) -> None:
    graph = Graph(save(tmp_path / "net.onnx", text))
    rng = np.random.default_rng(1)
    x = {v.name: np.float32(rng.standard_normal([1, 8] if v.shape else [])) for v in graph.inputs}
    executor = Executor(graph, FP32)
    expected = executor.run(x)
    model, branches = flatten(graph, executor.decisions)
    onnx.checker.check_model(model)
    onnx.save(model, tmp_path / "flat.onnx")
    flat = Graph(tmp_path / "flat.onnx")
    assert not has_control_flow(flat)
    assert not flat.proto.functions
    assert [b.op for b in branches] == [n.op for n in graph.nodes if n.op in ("If", "Loop", "Scan")]
    got = Executor(flat, FP32).run(x)
    arrays = {name: np.asarray(value) for name, value in x.items()}
    for file in (graph, flat):
        by_ort = onnxruntime.InferenceSession(str(file.path)).run([*expected], arrays)
        for (name, value), other in zip(expected.items(), by_ort, strict=True):
            np.testing.assert_allclose(value.numpy(), other, rtol=1e-4, atol=1e-5, err_msg=name)
        np.testing.assert_array_equal(got[name].numpy(), value.numpy())


@pytest.mark.parametrize("backends", ["ort,ort-none", "ort,ort-all", "ort,emu-fp16"])
def test_a_fault_in_a_branch_is_named(tmp_path: Path, backends: str) -> None:
    test = compared(tmp_path, IF, {"w1": 1.05}, backends)
    assert [row.name for row in test.guilty] == ["If_3/then_branch/MatMul_0"]
    assert test.compared == test.total == 8
    assert test.observation is not None
    assert test.observation.observer_gap == 0


@pytest.mark.parametrize("backends", ["ort,ort-none", "ort,ort-all", "ort,emu-fp16"])
def test_a_healthy_body_is_innocent(tmp_path: Path, backends: str) -> None:
    for text in (IF, LOOP, SCAN, FUNCTION):
        test = compared(tmp_path, text, {}, backends)
        assert not test.guilty
        assert test.compared == test.total


def test_a_fault_in_a_loop_is_named_in_every_round(tmp_path: Path) -> None:
    test = compared(tmp_path, LOOP, {"w1": 1.05})
    assert [row.name for row in test.guilty] == [f"Loop_3/#{k}/MatMul_1" for k in range(3)]


def test_a_fault_behind_a_function_is_named(tmp_path: Path) -> None:
    test = compared(tmp_path, FUNCTION, {"w1": 1.05})
    assert [row.name for row in test.guilty] == ["block_1/MatMul_0"]


def test_the_other_branch_is_the_finding(tmp_path: Path) -> None:
    """Rounding to FP16 tips the condition over: the layer that decides did what it must, so its If is guilty."""
    good = Graph(save(tmp_path / "good.onnx", IF))
    for seed in range(20):
        x = np.random.default_rng(seed).standard_normal((1, 8)).astype(np.float32)
        single, half = (
            float(Executor(good, arithmetic).run_nodes(good.nodes[:2], {"x": x}, ["mean"])["mean"])
            for arithmetic in (FP32, FP16)
        )
        if half < single:
            break
    test = compared(tmp_path, IF, {}, "ort,emu-fp16", (single + half) / 2, seed)
    (row,) = test.guilty
    assert row.onnx == "y"
    assert "If If_3 takes" in row.why
    assert [f.cause for f in test.findings] == ["control-flow"]


def test_a_fault_that_tips_a_condition_over_stays_the_guilty_one(tmp_path: Path) -> None:
    test = compared(tmp_path, IF, {"w0": -1.0}, limit=0.0)
    assert [row.onnx for row in test.guilty] == ["start"]
    (note,) = (note for note in test.notes if "If If_3 takes" in note)
    assert note.endswith(
        "takes else_branch, on the reference it takes then_branch; what decides, large, is False for True"
    )
    assert next(row for row in test.rows if row.onnx == "y").verdict != GUILTY
    assert note in test.guilty[0].why
    assert test.guilty[0].share is None, "behind the other branch no error is carried to the outputs"


def test_a_loop_that_ends_otherwise_is_told_by_its_condition(tmp_path: Path) -> None:
    """A loop's own condition comes from what it is given: the layer in front is guilty, not the loop."""
    test = compared(tmp_path, WHILE, {"w0": 0.02}, limit=0.01)
    assert [row.onnx for row in test.guilty] == ["start"]
    (note,) = (note for note in test.notes if "Loop Loop_3 runs" in note)
    assert "what decides, Loop_3/#" in note
    assert note.endswith("is False for True")
    assert {row.verdict for row in test.rows if row.onnx in ("y", "all")} == {INHERITED}


@pytest.mark.parametrize("text", [IF, LOOP, SCAN, FUNCTION])
def test_captures_hold_what_is_in_bodies(tmp_path: Path, text: str) -> None:
    path = save(tmp_path / "net.onnx", text)
    captures = [captured(path, backend) for backend in ("ort", "torch", "emu-tf32")]
    inside = [name for name in captures[0].names(component="net") if "/" in name]
    assert len(inside) >= 2
    for other in captures[1:]:
        result = compare_captures(captures[0], other).tests[0]
        assert result.agrees
        assert result.compared == result.total


def test_captures_of_other_branches_say_so(tmp_path: Path) -> None:
    paths = [save(tmp_path / name, IF, faults) for name, faults in (("good.onnx", {}), ("bad.onnx", {"w0": -1.0}))]
    good, bad = (captured(path, "ort", limit=0.0) for path in paths)
    test = compare_captures(good, bad, force=True).tests[0]
    (note,) = (note for note in test.notes if note.startswith("If If_3 takes"))
    assert note.endswith("what decides, large, is False for True")
    assert next(row for row in test.rows if row.onnx == "y").why == note


def captured(path: Path, backend: str, limit: float = -9) -> Capture:
    inputs = {"x": np.random.default_rng(1).standard_normal((1, 8)).astype(np.float32), "limit": np.float32(limit)}
    np.savez(path.with_suffix(".npz"), **{v.name: inputs[v.name] for v in Graph(path).inputs})  # type: ignore[arg-type]
    return record(
        load_model(str(path)),
        backend,
        path.with_name(f"{path.stem}-{backend}"),
        inputs=path.with_suffix(".npz"),
        samples=1,
        seed=0,
        exporter=None,
        folded=True,
        on_step=lambda what, done, total: None,
    )


def test_a_loop_is_ended_after_its_time_and_not_before(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(bodies.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(bodies, "loop_seconds", lambda: 10.0)
    clock = LoopClock()
    clock.tick(endless=True)
    assert (clock.passes, clock.started) == (1, 100.0)
    now[0] = 110.0
    clock.tick(endless=True)
    now[0] = 110.5
    clock.tick(endless=False)  # it has an end, and few passes
    with pytest.raises(Endless, match="after 4 passes, 10 s"):
        clock.tick(endless=True)
    clock.passes = bodies.MOST_PASSES - 1
    clock.tick(endless=False)
    with pytest.raises(Endless):
        clock.tick(endless=False)


def test_results_of_a_loop_are_stacked_along_a_new_first_axis() -> None:
    assert bodies._stacked([]).shape == (0,)
    assert bodies._stacked([torch.tensor([1, 2]), torch.tensor([3, 4])]).tolist() == [[1, 2], [3, 4]]
    with pytest.raises(ValueError, match=r"\[\[1\], \[2\]\]"):
        bodies._stacked([torch.zeros(2), torch.zeros(1)])


def test_scan_of_opset_8_goes_over_each_entry_of_the_batch_by_itself() -> None:
    """Running sums; the second entry is two long, one input is read backwards."""

    def execute(body: Any, values: Any) -> Any:
        total, forward, backward = values
        return [total + forward, total * 10 + backward]

    body: Any = SimpleNamespace(outputs=["total", "mixed"])
    x = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    attributes: Any = {"num_scan_inputs": 2, "directions": [0, 1]}
    total, mixed = _scan_batch(body, execute, attributes, torch.tensor([3, 2]), [torch.tensor([0.0, 1.0]), x, x])
    assert total.tolist() == [6, 10]
    assert mixed.tolist() == [[3, 12, 31], [15, 54, 0]]
    attributes["directions"] = None
    total, mixed = _scan_batch(body, execute, attributes, None, [torch.tensor([0.0, 1.0]), x, x])
    assert total.tolist() == [6, 16]
    assert mixed.tolist() == [[1, 12, 33], [14, 55, 106]]


def test_control_flow_is_told_by_branches_and_by_counts() -> None:
    assert in_words("If", "/a", "then_branch", "else_branch") == (
        "If /a takes else_branch, on the reference it takes then_branch"
    )
    assert in_words("Loop", "/b", 3, 4) == "Loop /b runs 4 times, on the reference it runs 3 times"


def test_a_functions_arguments_reach_its_bodies(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    text = """<ir_version: 9, opset_import: ["" : 17, "own" : 1]>
        net (float[2] x, bool c) => (float[2] y) { y = own.leak <slope=0.5> (x, c) }
        <domain: "own", opset_import: ["" : 17]>
        leak <slope> (x, c) => (y) {
            y = If (c) <then_branch = t () => (a) { a = LeakyRelu <alpha: float = @slope> (x) },
                        else_branch = e () => (b) { b = Neg (x) }>
        }"""
    onnx.save(parser.parse_model(text), path)
    x = np.array([-1, 1], np.float32)
    np.savez(tmp_path / "x.npz", x=x, c=np.array(True))
    assert bisect(str(path), "ort,ort-all", options=Options(inputs=tmp_path / "x.npz")).agrees
    outputs = Executor(Graph(path), FP32).run({"x": torch.from_numpy(x), "c": torch.tensor(True)})
    assert outputs["y"].tolist() == [-0.5, 1]
