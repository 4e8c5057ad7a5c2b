"""A library that ends the process leaves a sentence and an exit code."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from extras import needs
from states import gone, until

pytestmark = [pytest.mark.process, pytest.mark.skipif(sys.platform != "linux", reason="the guard is for Linux")]

GUARDED = """
import os, signal, sys, tempfile
from cp_debug.cli.guard import guarded
from cp_debug.doing import doing

def command():
    {}

guarded(command)
"""


def started(body: str, **options: object) -> "subprocess.Popen[str]":
    """A process whose command has this body."""
    script = GUARDED.format(body)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", script], **(pipes | options))  # type: ignore[call-overload, no-any-return]


def ended(body: str, **options: object) -> tuple[int, str]:
    """Exit code of a guarded command, and what stands on stderr."""
    process = started(body, **options)
    _, said = process.communicate()
    return process.returncode, said


def test_a_library_that_aborts_on_a_file_is_bad_input() -> None:
    code, said = ended("with doing('onnx read net.onnx'): os.abort()")
    assert code == 2
    assert said == "error: a library ended the process (SIGABRT) while onnx read net.onnx: nothing was decided\n"


def test_a_crash_of_nothing_known_is_unexpected() -> None:
    code, said = ended("os.kill(os.getpid(), signal.SIGSEGV)")
    assert (code, said) == (70, "error: a library ended the process (SIGSEGV): nothing was decided\n")


def test_what_was_done_before_is_not_blamed() -> None:
    code, said = ended("with doing('onnx read net.onnx'): pass\n    os.abort()")
    assert code == 70
    assert "net.onnx" not in said


def test_leaving_without_a_word_is_told() -> None:
    code, said = ended("with doing('Net ran'): os._exit(0)")
    assert code == 2
    assert said == "error: the process was ended from within (os._exit(0)) while Net ran: nothing was decided\n"


def test_a_crash_after_the_end_changes_nothing() -> None:
    assert ended("import atexit; atexit.register(os.abort); sys.exit(1)") == (1, "")


@pytest.mark.parametrize(("body", "code"), [("sys.exit(3)", 3), ("pass", 0), ("sys.exit('no')", 1), ("1 / 0", 1)])
def test_other_ends_are_as_without_it(body: str, code: int) -> None:
    assert ended(body)[0] == code


@pytest.mark.parametrize("group", [False, True])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_command_once(group: bool, number: signal.Signals, tmp_path: Path) -> None:
    body = f"""
    from cp_debug.cli.main import _Ending
    import time
    signal.signal({int(number)}, _Ending())
    try:
        open({str(tmp_path / "ready")!r}, "w").close()
        time.sleep(60)
    finally:
        time.sleep(0.1)
        open({str(tmp_path / "tidied")!r}, "w").close()"""
    process = started(body, start_new_session=True)
    until((tmp_path / "ready").exists)
    (os.killpg if group else os.kill)(process.pid, number)
    process.communicate()
    assert process.returncode == 128 + number
    assert (tmp_path / "tidied").exists()


def test_signals_within_a_second_are_one_and_later_ones_are_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    from cp_debug.cli import main

    now, heard = 0.0, []
    monkeypatch.setattr(main.time, "monotonic", lambda: now)
    monkeypatch.setattr(main._Ending, "asked", None)
    ending = main._Ending()
    for now in (100, 100.6, 101.2, 101.8, 102.4):
        try:
            ending(signal.SIGINT, None)
        except KeyboardInterrupt:
            heard.append(now)
    assert heard == [100, 101.2, 102.4]


ENDING = """
import atexit, os, signal, sys
sys.argv = ["cpdebug", "--version"]
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup leaves it ignored
from cp_debug import __main__
atexit.register(lambda: os.kill(os.getpid(), signal.{name}))
__main__.main()"""
"""A command that gets signals while Python ends."""


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_signals_while_python_ends_say_nothing_and_change_nothing(name: str) -> None:
    script = ENDING.format(name=name)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_killed_guard_takes_the_command_along(tmp_path: Path) -> None:
    note = tmp_path / "pid"
    process = started(f"""
    import time
    open({str(note)!r}, "w").write(str(os.getpid()))
    time.sleep(1000)""")
    command = int(until(lambda: note.exists() and note.read_text()))
    process.kill()
    process.wait()
    until(lambda: gone(command))


@pytest.mark.slow
def test_the_command_names_the_file_on_which_onnx_aborts(tmp_path: Path) -> None:
    """Shape inference of onnx 1.23 fails an assertion on a Slice that counts backwards from a negative start."""
    process = subprocess.run(
        [
            sys.executable,
            "-c",
            """
import onnx, os
onnx.shape_inference.infer_shapes = lambda model: os.abort()
from cp_debug.__main__ import main
import sys; sys.argv = ["cpdebug", "check", "net.onnx"]
from onnx import TensorProto, helper
x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n"]) for name in "xy")
graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", [x], [y])
onnx.save(helper.make_model(graph), "net.onnx")
main()
""",
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 2
    assert process.stderr == (
        "error: a library ended the process (SIGABRT) while onnx inferred the shapes of net.onnx: nothing was decided\n"
    )


def test_ctrl_c_before_the_command_begins_says_so() -> None:
    script = """
import os, signal
from cp_debug import __main__
from cp_debug.cli import guard

guard._die_with = lambda parent: os.kill(os.getpid(), signal.SIGINT)  # while it is blocked
__main__.run = lambda: print("ran")
__main__.main()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")


@needs("modelopt")
def test_whatever_runs_of_the_user_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its callable, its forward wherever one runs: where that ends the process, the message says so."""
    from cp_debug import doing
    from cp_debug.programs.walk import Walk, run_module
    from cp_debug.quantization.models import quantize_model
    from cp_debug.recipes.registry import load_model

    (tmp_path / "net.py").write_text(
        "import torch\n"
        "from cp_debug.doing import last\n"
        "told = []\n"
        "class Net(torch.nn.Sequential):\n"
        "    def forward(self, x):\n"
        "        told.append(last())\n"
        "        return super().forward(x)\n"
        "def build():\n"
        "    told.append(last())\n"
        "    return Net(torch.nn.Linear(4, 4)), torch.ones(2, 4)\n"
    )
    monkeypatch.setattr(doing, "_page", None)
    doing.share()
    model = load_model(f"{tmp_path / 'net.py'}:build")
    told = sys.modules[type(model.components[0].module).__module__].told
    sample = next(iter(model.samples(1, 0, None)))
    for step in Walk(model, sample):
        step.outputs = run_module(step.component, step.inputs)
    quantize_model(model, iter([sample]), method="max")
    assert told
    assert all(text.endswith((" ran", "() was called")) for text in told), told


def test_a_terminal_that_goes_ends_the_command_as_sigterm_does(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib

    entry = importlib.import_module("cp_debug.cli.main")

    def run(standalone_mode: bool) -> None:
        os.kill(os.getpid(), signal.SIGHUP)
        until(lambda: False)

    monkeypatch.setattr(entry, "application", lambda first: run)
    monkeypatch.setattr(entry._Ending, "asked", None)
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    before = [signal.signal(number, signal.SIG_DFL) for number in numbers]
    try:
        with pytest.raises(SystemExit) as end:
            entry.main()
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
    assert end.value.code == 129
