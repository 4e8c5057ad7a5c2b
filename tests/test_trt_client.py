"""The runner's protocol against interpreters that keep it, break it, crash, hang and babble."""

from __future__ import annotations

import importlib
import io
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from nets import second_like
from states import gone, until

from cp_debug.backends.tensorrt.answers import Facts
from cp_debug.backends.tensorrt.client import ENVIRONMENT, RunnerClient
from cp_debug.backends.tensorrt.engine_runs import EngineRuns
from cp_debug.errors import BackendUnavailable, InputError
from cp_debug.graph.graph import Graph

STEPS = [{"command": "build", "onnx": "net.onnx"}]
ANSWER = '(folder / "result.json").write_text(json.dumps({"results": [{"seconds": 1}]}))'
SAY = 'print(json.dumps({"event": "step", "index": 0, "of": 1, "command": "build"}), flush=True)'


def interpreter(folder: Path, *lines: str) -> str:
    """An executable that runs Python code like this interpreter, and ``lines`` in place of a runner."""
    body = folder / "body.py"
    header = "import json, os, signal, sys, time\nfrom pathlib import Path\nfolder = Path(sys.argv[1])\n"
    body.write_text(header + "\n".join(lines) + "\n")
    script = folder / "python"
    script.write_text(f'#!/bin/sh\n[ "$1" = -c ] && exec {sys.executable} "$@"\nexec {sys.executable} {body} "$2"\n')
    script.chmod(0o755)
    return str(script)


def test_results_and_events_arrive(tmp_path: Path) -> None:
    events = []
    lines = [SAY, 'print("hello from a library")', "job = json.loads((folder / 'job.json').read_text())"]
    lines += ["assert job['steps'][0]['onnx'] == 'net.onnx'", ANSWER]
    client = RunnerClient(interpreter(tmp_path, *lines), on_event=events.append)
    assert client.execute(STEPS) == [{"seconds": 1}]
    assert [event["event"] for event in events] == ["step", "output"]


def test_blank_lines_are_no_events(tmp_path: Path) -> None:
    events = []
    client = RunnerClient(interpreter(tmp_path, 'print("\\n" * 2000)', SAY, ANSWER), on_event=events.append)
    client.execute(STEPS)
    assert [event["event"] for event in events] == ["step"]


@pytest.mark.parametrize("runner", ["cp_debug.backends.tensorrt.runner", "cp_debug.recipes.mmdet3d.runner"])
def test_an_event_has_a_line_of_its_own_whatever_a_library_left_open(
    runner: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Glued to what was printed it would be no event, and the client would wait for the job's end."""
    module = importlib.import_module(runner)

    def execute(job: Any, emit: Any, *more: Any) -> dict[str, Any]:
        print("loading ", end="")
        emit({"event": "log", "text": "built"})
        print("unloading ", end="")
        return {"results": []}

    monkeypatch.setattr(module, "execute", execute)
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    (tmp_path / "job.json").write_text("{}")
    assert module.main(tmp_path, *([True] if "tensorrt" in runner else [])) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line]
    assert lines == ["loading ", '{"event": "log", "text": "built"}', "unloading ", '{"event": "done"}']


@pytest.mark.parametrize("through_a_shell", [False, True])
def test_a_crash_names_the_signal_and_the_last_words(tmp_path: Path, through_a_shell: bool) -> None:
    kill = "os.kill(os.getpid(), signal.SIGSEGV)"
    if through_a_shell:
        kill = f'sys.exit(__import__("subprocess").run([sys.executable, "-c", "import os, signal; {kill}"]) and 139)'
    client = RunnerClient(interpreter(tmp_path, SAY, 'print("tuning conv 7", flush=True)', kill), spec="trt-fp16")
    with pytest.raises(
        BackendUnavailable, match=r"(?s)died: Segmentation fault \(in build\).*\| tuning conv 7"
    ) as caught:
        client.execute(STEPS)
    assert caught.value.exit_code == 3
    assert "emu-fp16acc" in str(caught.value)


@pytest.mark.process
def test_a_hang_ends_at_the_limit_with_its_children(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    note = tmp_path / "child"
    child = f"p = __import__('subprocess').Popen(['sleep', '60']); Path({str(note)!r}).write_text(str(p.pid))"
    client = RunnerClient(interpreter(tmp_path, SAY, child, "time.sleep(1000)"), time_limit=1.5)
    monkeypatch.setattr("cp_debug.interpreter.time", SimpleNamespace(monotonic=lambda: 2.0 * note.exists()))
    with pytest.raises(BackendUnavailable, match=r"did not end within 1\.5 s \(last command: build\)"):
        client.execute(STEPS)
    until(lambda: gone(int(note.read_text())))


@pytest.mark.process
def test_ctrl_c_kills_the_process(tmp_path: Path) -> None:
    note = tmp_path / "pid"
    client = RunnerClient(
        interpreter(tmp_path, f"Path({str(note)!r}).write_text(str(os.getpid()))", "time.sleep(1000)")
    )

    def interrupt() -> None:
        until(lambda: note.exists() and note.read_text())
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        client.execute(STEPS)
    thread.join()
    until(lambda: gone(int(note.read_text())))


@pytest.mark.parametrize(
    "line",
    [
        "print('not a runner')",
        "(folder / 'result.json').write_text('{\"results\": 7}')",
        "(folder / 'result.json').write_bytes(b'\\xff\\x00')",
        "(folder / 'result.json').write_text('[]')",
        "sys.exit(5)",
    ],
)
def test_garbage_is_no_result(tmp_path: Path, line: str) -> None:
    with pytest.raises(BackendUnavailable, match="left no result"):
        RunnerClient(interpreter(tmp_path, line)).execute(STEPS)


@pytest.mark.parametrize(
    "fields", ['"layer": "\\u001b[2J"', '"layers": [1]', '"done": NaN', '"steps": 1e400', '"done": 1e99']
)
def test_progress_in_numbers_that_no_bar_can_show_is_output(tmp_path: Path, fields: str) -> None:
    events: list[str] = []
    line = '{"event": "progress", "phase": "p", "done": 1, "steps": 0, ' + fields + "}"
    script = [f"print({line!r})", "(folder / 'result.json').write_text('{\"results\": [{}]}')"]
    RunnerClient(interpreter(tmp_path, *script), on_event=lambda event: events.append(event["event"])).execute(STEPS)
    assert events == ["output"]


def test_a_huge_log_is_passed_on_and_not_kept(tmp_path: Path) -> None:
    count, longest = 0, 0

    def on_event(event) -> None:
        nonlocal count, longest
        count, longest = count + 1, max(longest, len(event.get("text", "")))

    lines = ["for i in range(100_000): print('noise', i)", "sys.stdout.write('x' * (1 << 22)); sys.stdout.flush()"]
    client = RunnerClient(interpreter(tmp_path, *lines, "os.write(1, b'\\xff\\xfe\\n')", ANSWER), on_event=on_event)
    assert client.execute(STEPS) == [{"seconds": 1}]
    assert count > 100_000
    assert longest <= 1 << 17


@pytest.mark.parametrize(
    ("kind", "error", "text"),
    [
        ("parse", InputError, r"net\.onnx: TensorRT cannot parse it"),
        ("kernel", InputError, r"no kernel for /up/ConvTranspose in this precision"),
        ("memory", InputError, "lower the workspace limit"),
        ("engine", InputError, "build it again"),
        ("time", InputError, r"net\.onnx"),
        ("build", InputError, "cannot build it"),
        ("input", InputError, r"net\.onnx"),
        ("import", BackendUnavailable, "CPDEBUG_TRT_PYTHON"),
        ("unsupported", BackendUnavailable, "nearest"),
        ("device", BackendUnavailable, "nearest"),
        ("internal", BackendUnavailable, "failed in build"),
    ],
)
def test_errors_say_what_to_do(tmp_path: Path, kind: str, error: type[Exception], text: str) -> None:
    told = {"results": [], "error": {"kind": kind, "message": "because", "nodes": ["/up/ConvTranspose"]}}
    client = RunnerClient(
        interpreter(tmp_path, f"(folder / 'result.json').write_text(json.dumps({told!r}))", "sys.exit(1)")
    )
    with pytest.raises(error, match=text) as caught:
        client.execute(STEPS)
    assert "because" in str(caught.value)


def test_the_place_of_an_error_in_the_runner_is_told_in_words(tmp_path: Path) -> None:
    frames = 'Traceback (most recent call last):\n  File "/a/x.py", line 3, in main\n    f()\n'
    frames += '  File "/a/runner.py", line 12, in _run\n    1 / 0\nZeroDivisionError: because\n'
    error = {"kind": "internal", "message": "because", "nodes": [], "traceback": frames}
    told = {"results": [], "error": error}
    client = RunnerClient(
        interpreter(tmp_path, f"(folder / 'result.json').write_text(json.dumps({told!r}))", "sys.exit(1)")
    )
    with pytest.raises(BackendUnavailable, match=r"because\nin _run of runner\.py, line 12") as caught:
        client.execute(STEPS)
    assert "File" not in str(caught.value)


def test_a_library_for_plug_ins_that_cannot_be_loaded_is_left_out_by_a_setting(tmp_path: Path) -> None:
    because = "3: SymbolAddress for cublasGetProperty could not be loaded, check function name against library symbol"
    told = {"results": [], "error": {"kind": "build", "message": because, "nodes": []}}
    client = RunnerClient(
        interpreter(tmp_path, f"(folder / 'result.json').write_text(json.dumps({told!r}))", "sys.exit(1)")
    )
    with pytest.raises(InputError, match="--tactic-sources=-CUBLAS,-CUBLAS_LT,-CUDNN builds without"):
        client.execute(STEPS)


def test_where_there_is_no_tensorrt(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(ENVIRONMENT, raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        BackendUnavailable, match=r"(?s)pip install.*CPDEBUG_TRT_PYTHON.*nearest.*emu-fp16acc"
    ) as caught:
        RunnerClient(spec="trt-fp16@cuda:0")
    assert caught.value.exit_code == 3
    with pytest.raises(BackendUnavailable, match="cannot be run"):
        RunnerClient(str(tmp_path / "nothing"))
    with pytest.raises(BackendUnavailable, match="is not a Python interpreter"):
        RunnerClient("/bin/echo")
    monkeypatch.setenv(ENVIRONMENT, "/bin/false")
    with pytest.raises(BackendUnavailable, match="/bin/false is not a Python interpreter"):
        RunnerClient()


@pytest.mark.process
def test_what_answers_without_end_is_no_interpreter(tmp_path: Path) -> None:
    program = tmp_path / "endless"
    program.write_text("#!/bin/sh\nexec yes\n")
    program.chmod(0o755)
    with pytest.raises(BackendUnavailable, match="endless is not a Python interpreter"):
        RunnerClient(str(program))
    program.write_text("#!/bin/sh\nexec yes cpdebug 3 11\n")
    with pytest.raises(BackendUnavailable, match="endless writes without end and does not run"):
        RunnerClient(str(program)).probe()
    program.write_text('#!/bin/sh\n[ "$1" = -c ] && exec echo cpdebug 3 11\nexec yes | tr -d "\\n"\n')
    with pytest.raises(BackendUnavailable, match="endless writes without end and does not run"):
        RunnerClient(str(program)).probe()


@pytest.mark.process
def test_a_child_that_holds_the_output_is_not_waited_for(tmp_path: Path) -> None:
    """An interpreter that has ended: what it left in the background has its pipe."""
    program = tmp_path / "python"
    lines = ["#!/bin/sh", '[ "$1" = -c ] && exec echo cpdebug 3 11', "sleep 60 &", f"echo $! > {tmp_path / 'child'}"]
    program.write_text("\n".join([*lines, "printf 'the last word'", "exit 1"]) + "\n")
    program.chmod(0o755)
    with pytest.raises(BackendUnavailable, match=r"left no result \(exit status 1[\s\S]*the last word"):
        RunnerClient(str(program)).probe()
    until(lambda: gone(int((tmp_path / "child").read_text())))


def test_an_interpreter_that_lacks_tensorrt(tmp_path: Path) -> None:
    """The real runner, in a real Python of its own that sees no packages but numpy."""
    site = tmp_path / "site"
    site.mkdir()
    (site / "tensorrt.py").write_text("raise ModuleNotFoundError(\"No module named 'tensorrt'\", name='tensorrt')\n")
    script = tmp_path / "python"
    script.write_text(f'#!/bin/sh\nPYTHONPATH={site} exec {sys.executable} "$@"\n')
    script.chmod(0o755)
    with pytest.raises(BackendUnavailable, match=r"has no package 'tensorrt'"):
        RunnerClient(str(script)).probe()


def test_the_runner_leaves_no_half_written_result(tmp_path: Path) -> None:
    """``python runner.py FOLDER`` by hand, as a team would try it in a container."""
    from cp_debug.backends.tensorrt import runner

    (tmp_path / "job.json").write_text('{"steps": []}')
    done = subprocess.run([sys.executable, runner.__file__, str(tmp_path)], check=True, capture_output=True)
    assert done.stdout == b""
    assert sorted(p.name for p in tmp_path.iterdir()) == ["job.json", "result.json"]


@pytest.mark.process
def test_one_process_takes_job_after_job_until_it_dies(tmp_path: Path) -> None:
    note = tmp_path / "starts"
    lines = [
        f"open({str(note)!r}, 'a').write('x')",
        "while True:",
        f"    {ANSWER}",
        '    print(\'{"event": "done"}\', flush=True)',
    ]
    lines += ["    folder = Path(sys.stdin.readline().strip())"]
    client = RunnerClient(interpreter(tmp_path, *lines))
    for _ in range(3):
        assert client.execute(STEPS) == [{"seconds": 1}]
    assert note.read_text() == "x"
    assert client._interpreter.process is not None
    pid = client._interpreter.process.pid
    os.kill(pid, signal.SIGKILL)
    client._interpreter.process.wait()
    assert client.execute(STEPS) == [{"seconds": 1}]
    assert note.read_text() == "xx"
    pid = client._interpreter.process.pid
    client.close()
    until(lambda: gone(pid))


@pytest.mark.parametrize("version", ["", "x", "10", "8.x", "99999.1", "\x1b[31m8.6"])
def test_a_version_that_tells_nothing_is_refused(tmp_path: Path, version: str) -> None:
    facts = {
        "tensorrt": "8.6.0",
        "python": "3.10",
        "device": {"name": "a", "compute_capability": "8.6", "cuda_driver": 12020},
        "builder_flags": [],
        **dict.fromkeys(["layer_precision", "calibrator", "debug_tensors", "unfused_debug_tensors"], True),
    }
    client = RunnerClient(interpreter(tmp_path))
    assert client.checked(Facts, [facts])[0]["tensorrt"] == "8.6.0"
    with pytest.raises(BackendUnavailable, match=r"answer cannot be read.*tensorrt"):
        client.checked(Facts, [facts | {"tensorrt": version}])


@pytest.mark.parametrize("seconds", [[], [0.1], [0.1] * 9, [float("nan")] * 3, [-1.0] * 3])
def test_times_that_fit_no_runs_are_refused(tmp_path: Path, seconds: list[float]) -> None:
    graph = Graph(second_like(tmp_path / "net.onnx"))
    inputs = {
        value.name: np.zeros([size if isinstance(size, int) else 1 for size in value.shape or ()], value.dtype)
        for value in graph.inputs
    }
    client = RunnerClient(interpreter(tmp_path))

    def execute(steps: list[dict[str, str]]) -> list[dict[str, object]]:
        files = [
            {"name": v.name, "file": str(Path(steps[0]["folder"]) / "0.npy"), "dtype": "FLOAT"} for v in graph.outputs
        ]
        return [{"tensors": files, "seconds": given}]

    client.execute = execute  # type: ignore[method-assign, assignment]
    runs = EngineRuns(client, graph, 0)
    given = [0.5, 0.25, 0.125]
    assert runs.timings(tmp_path / "e", inputs, 2) == [0.25, 0.125]
    given = seconds
    with pytest.raises(BackendUnavailable, match="answer cannot be"):
        runs.timings(tmp_path / "e", inputs, 2)
