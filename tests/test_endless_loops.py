"""A Loop that never ends: every command gives it up with a sentence, and Ctrl-C ends ONNX Runtime in the middle."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from test_cli import run

from cp_debug.backends.base import Program
from cp_debug.backends.registry import create
from cp_debug.backends.spec import BackendSpec
from cp_debug.errors import InputError
from cp_debug.graph import onnx_runtime
from cp_debug.graph.graph import Graph

HUGE = 2**62


def value(name: str, shape: list[int] | None, kind: int = 1) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


def looping(path: Path, trips: int | None = HUGE, *, computed: bool = False, nested: bool = False) -> Path:
    """``x`` [1, 4] through a Relu and an endless Loop; ``computed``: its trip count is a node's result."""
    nodes = [helper.make_node("Identity", ["go"], ["on"]), helper.make_node("Identity", ["v"], ["w"])]
    given, made = [value("i", [], 7), value("go", [], 9), value("v", None)], [value("on", [], 9), value("w", None)]
    body = helper.make_graph(nodes, "body", given, made)
    weights = [numpy_helper.from_array(np.array(True), "yes")]
    if trips is not None:
        weights.append(numpy_helper.from_array(np.int64(trips), "trips"))
    if nested:
        inner = helper.make_node("Loop", ["trips", "go", "v"], ["w"], name="inner", body=body)
        outer_given = [value("j", [], 7), value("go", [], 9), value("v", None)]
        stay = helper.make_node("Identity", ["go"], ["stay"])
        inner.input[1], body.input[1].name, body.node[0].input[0] = "stay", "again", "again"
        body.input[2].name, body.node[1].input[0], body.node[1].output[0], body.output[1].name = "u", "u", "t", "t"
        outer = [value("stay", [], 9), value("w", None)]
        body = helper.make_graph([stay, inner], "outer", outer_given, outer)
    count = "" if trips is None else "more" if computed else "trips"
    main = [helper.make_node("Add", ["trips", "trips"], ["more"])] if computed else []
    main.append(helper.make_node("Relu", ["x"], ["r"], name="relu"))
    main.append(helper.make_node("Loop", [count, "yes", "r"], ["y"], name="loop", body=body))
    graph = helper.make_graph(main, "net", [value("x", [1, 4])], [value("y", [1, 4])], weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return path


@pytest.mark.few(1)
@pytest.mark.parametrize("command", ["bisect", "capture", "search"])
def test_a_command_gives_a_loop_up_with_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.setenv(onnx_runtime.LIMIT, "0.5")
    path = looping(tmp_path / "net.onnx")
    argv = {
        "bisect": ["-b", "ort,emu-fp16"],
        "capture": ["-b", "ort-all", "-o", tmp_path / "out"],
        "search": ["-b", "ort,emu-fp16", "--goal", "rel_l2<1"],
    }
    code, text = run(command, path, *argv[command])
    assert code == 2
    assert "no end is in sight; CPDEBUG_LOOP_SECONDS=600" in " ".join(text.split())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["net.onnx"]


@pytest.mark.few(3)
@pytest.mark.parametrize("backend", ["ort", "ort-all", "emu-fp16", "emu-fp32"])
@pytest.mark.parametrize("kind", ["huge", "no count", "nested"])
def test_a_session_gives_a_loop_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: str, kind: str) -> None:
    monkeypatch.setenv(onnx_runtime.LIMIT, "0.3")
    path = looping(tmp_path / "net.onnx", None if kind == "no count" else HUGE, nested=kind == "nested")
    x = {"x": np.ones((1, 4), np.float32)}
    for sink in (None, lambda name, tensor: None):
        with pytest.raises(onnx_runtime.Endless, match=f"{path.name}.*no end is in sight"):
            create(BackendSpec.parse(backend)).open(Program("net", Graph(path), example=x)).run(x, sink)


def test_loops_with_an_end_have_no_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(onnx_runtime.LIMIT, "1e-9")
    x = {"x": np.ones((1, 4), np.float32)}
    for backend in ("ort", "ort-all", "emu-fp32"):
        program = Program("net", Graph(looping(tmp_path / "net.onnx", 3)), example=x)
        assert create(BackendSpec.parse(backend)).open(program).run(x)["y"].tolist() == [[1, 1, 1, 1]]


def test_loops_in_each_other_are_counted_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(onnx_runtime.LIMIT, "0.2")
    monkeypatch.setattr("cp_debug.graph.bodies.MOST_PASSES", 100)
    path = looping(tmp_path / "net.onnx", 2000, nested=True)
    assert onnx_runtime.time_limit(Graph(path)) == 0.2
    assert onnx_runtime.time_limit(Graph(looping(tmp_path / "few.onnx", 200, nested=True))) is None
    program = Program("net", Graph(path))
    with pytest.raises(onnx_runtime.Endless, match="end is in sight"):
        create(BackendSpec.parse("emu-fp32")).open(program).run({"x": np.ones((1, 4), np.float32)})


def test_a_computed_trip_count_is_given_more_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(onnx_runtime.LIMIT, "2")
    assert onnx_runtime.time_limit(Graph(looping(tmp_path / "a.onnx"))) == 2
    assert onnx_runtime.time_limit(Graph(looping(tmp_path / "b.onnx", computed=True))) == 20
    assert onnx_runtime.time_limit(Graph(looping(tmp_path / "c.onnx", 3))) is None


@pytest.mark.parametrize("text", ["soon", "0", "-1", "nan", "inf", "1e300"])
def test_a_limit_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv(onnx_runtime.LIMIT, text)
    with pytest.raises(InputError, match=onnx_runtime.LIMIT):
        onnx_runtime.loop_seconds()


@pytest.mark.process
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_onnx_runtime_in_the_middle(tmp_path: Path, number: int, code: int) -> None:
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    looping(tmp_path / "net.onnx")
    script = f"""
import os, sys, threading, time
from cp_debug.cli.main import main
from cp_debug.graph import onnx_runtime
run = onnx_runtime.run
def announced(*given):
    def kill():
        spent = time.process_time  # of the thread that counts the loop, too
        before = spent()
        while spent() < before + 0.2: time.sleep(0.01)
        os.kill(os.getpid(), {int(number)})
    threading.Thread(target=kill).start()
    return run(*given)
onnx_runtime.run = announced
sys.argv = ["cpdebug", "bench", "net.onnx", "-b", "ort-all"]
main()
"""
    environment = {**os.environ, "TMPDIR": str(temporary), onnx_runtime.LIMIT: "3000"}
    ended = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert ended.returncode == code, ended.stderr
    assert "Traceback" not in ended.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["net.onnx", "tmp"]
    assert not list(temporary.iterdir())


def test_onnx_runtime_logs_when_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(onnx_runtime.LOG, "fatal")  # so that what the command sets is taken back
    monkeypatch.delenv(onnx_runtime.LOG)
    monkeypatch.setenv(onnx_runtime.LIMIT, "0.2")
    path = looping(tmp_path / "net.onnx")
    run("bench", path, "-b", "ort")  # others first compute in which bodies values lie, and give the loop up then
    assert "onnxruntime:" not in capfd.readouterr().err
    run("--verbose", "bench", path, "-b", "ort")
    assert "onnxruntime:" in capfd.readouterr().err


def test_a_log_that_is_none_and_one_without_effect_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, text = run("--verbose", "models")
    assert code == 2
    assert "it would do nothing here: models runs no model" in text
    monkeypatch.setenv(onnx_runtime.LOG, "loud")
    code, text = run("capture", looping(tmp_path / "net.onnx", 2), "-b", "ort", "-o", tmp_path / "out")
    assert code == 2
    assert "CPDEBUG_ORT_LOG: 'loud'; expected verbose, info, warning, error, fatal" in text


def test_a_weight_in_segments_is_refused_in_words(tmp_path: Path) -> None:
    path = looping(tmp_path / "net.onnx", 2)
    model = onnx.load(path)
    model.graph.initializer[0].segment.begin = 1
    onnx.save(model, path)
    code, text = run("check", path)
    assert (code, "is stored in segments" in text) == (2, True)
