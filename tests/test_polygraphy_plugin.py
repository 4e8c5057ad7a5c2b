"""``polygraphy run … --cpdebug``: Polygraphy's own command, in this process, on its ONNX Runtime."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

pytest.importorskip("polygraphy")
from polygraphy.comparator import RunResults
from polygraphy.exception import PolygraphyException
from polygraphy.tools._main import main

from cp_debug.polygraphy_plugin import judge


@pytest.fixture
def net(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a file, here, of two convolutions and their activations."""
    monkeypatch.chdir(tmp_path)
    draw = np.random.default_rng(0).standard_normal
    weights = [numpy_helper.from_array((draw((4, 4, 3, 3)) / 4).astype(np.float32), f"w{i}") for i in range(2)]
    nodes, value = [], "x"
    for i in range(2):
        conv = helper.make_node("Conv", [value, f"w{i}"], [f"c{i}"], name=f"conv{i}", pads=[1] * 4)
        nodes += [conv, helper.make_node("Relu", [f"c{i}"], [f"r{i}"], name=f"relu{i}")]
        value = f"r{i}"
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 4, 8, 8]) for name in ("x", value)]
    graph = helper.make_graph(nodes, "net", ends[:1], ends[1:], weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), "net.onnx")
    return "net.onnx"


def polygraphy(*words: str, monkeypatch: pytest.MonkeyPatch) -> tuple[int, str]:
    """Exit code of the command, and what it printed."""
    monkeypatch.setattr("sys.argv", ["polygraphy", "run", *words])
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), contextlib.redirect_stderr(shown):
        try:
            code = main()
        except SystemExit as end:
            code = int(end.code or 0)
        except PolygraphyException:
            code = 1
    return code, shown.getvalue()


def test_runs_are_judged_by_the_model_and_a_page_is_written(net: str, monkeypatch: pytest.MonkeyPatch) -> None:
    words = net, "--onnxrt", "--onnx-outputs", "*", "--cpdebug", "out"
    code, shown = polygraphy(*words, monkeypatch=monkeypatch)
    assert code == 0
    assert "✓ dump: agrees" in shown
    assert "5 of 5 values" in shown
    (page,) = Path("out").glob("onnxrt-runner-*.html")
    assert f"report: {page}" in shown.replace("\n    ", "\n")


def test_a_wrong_layer_of_one_runner_is_named(net: str, monkeypatch: pytest.MonkeyPatch) -> None:
    polygraphy(net, "--onnxrt", "--onnx-outputs", "*", "--cpdebug", "out", monkeypatch=monkeypatch)
    runs = RunResults.load("out/results.json")
    ((name, (iteration,)),) = runs.items()
    wrong = dict(iteration.items())
    wrong["r1"] = wrong["r1"] * 1.5
    faulty = type(iteration)(wrong, runner_name=name)
    RunResults([(name, [iteration]), ("trt-runner-N1", [faulty])]).save("both.json")
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        assert not judge(net, "out/inputs.json", "both.json", "out", ["fp16"])
    right, _, fault = shown.getvalue().partition("trt-runner-N1")
    assert "✓ dump: agrees" in right
    assert "guilty: relu1" in fault
    assert Path("out/trt-runner-N1.html").is_file()


def test_an_engine_is_judged_by_the_precision_that_it_may_use(net: str, monkeypatch: pytest.MonkeyPatch) -> None:
    polygraphy(net, "--onnxrt", "--onnx-outputs", "*", "--cpdebug", "out", monkeypatch=monkeypatch)
    ((name, (iteration,)),) = RunResults.load("out/results.json").items()
    halves = {value: array.astype(np.float16).astype(np.float32) for value, array in iteration.items()}
    RunResults([("trt-runner-N0", [type(iteration)(halves, runner_name=name)])]).save("halves.json")
    for precisions, accused in ((["fp16"], False), (["fp16", "tf32"], False), ([], True)):
        shown = io.StringIO()
        with contextlib.redirect_stdout(shown):
            judge(net, "out/inputs.json", "halves.json", "out", precisions)
        assert ("guilty" in shown.getvalue()) == accused


def test_what_cannot_be_judged_fails_with_its_reason(net: str, monkeypatch: pytest.MonkeyPatch) -> None:
    code, shown = polygraphy(net, "--onnxrt", "--onnx-outputs", "r0", "--cpdebug", "out", monkeypatch=monkeypatch)
    assert code == 1
    assert "cpdebug cannot judge onnxrt-runner" in shown
    assert "r1" in shown
    code, shown = polygraphy("--onnxrt", "--cpdebug", "out", monkeypatch=monkeypatch)
    assert code == 1
    assert "--cpdebug: no model; expected an ONNX model" in shown


@pytest.mark.parametrize(
    ("flags", "engine"),
    [
        ((), "[]"),
        (("--fp16",), "['fp16']"),
        (("--tf32", "--bf16"), "['bf16', 'tf32']"),
        (("--int8", "--fp16"), "['int8', 'fp16']"),
    ],
)
def test_the_flags_of_an_engine_say_how_it_is_judged(
    flags: tuple[str, ...], engine: str, net: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = net, "--trt", *flags, "--cpdebug", "out", "--gen-script", "run.py"
    assert polygraphy(*words, monkeypatch=monkeypatch)[0] == 0
    assert f"engine={engine})" in Path("run.py").read_text()


def test_an_engine_that_chose_its_scales_is_not_judged(net: str, monkeypatch: pytest.MonkeyPatch) -> None:
    polygraphy(net, "--onnxrt", "--onnx-outputs", "*", "--cpdebug", "out", monkeypatch=monkeypatch)
    ((_, iterations),) = RunResults.load("out/results.json").items()
    RunResults([("trt-runner-N0", iterations)]).save("int8.json")
    for precisions, judged in ((["int8", "fp16"], False), (["fp16"], True)):
        shown = io.StringIO()
        with contextlib.redirect_stdout(shown):
            assert judge(net, "out/inputs.json", "int8.json", "out", precisions) == judged
        assert ("its results do not hold the scales of INT8" in shown.getvalue()) != judged


def test_a_script_of_polygraphys_judges_too(net: str, monkeypatch: pytest.MonkeyPatch) -> None:
    words = net, "--onnxrt", "--cpdebug", "out", "--gen-script", "run.py"
    assert polygraphy(*words, monkeypatch=monkeypatch)[0] == 0
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        exec(compile(Path("run.py").read_text(), "run.py", "exec"), {"__name__": "__main__"})
    assert "✓ dump: agrees" in shown.getvalue()
