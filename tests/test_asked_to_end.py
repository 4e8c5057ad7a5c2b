"""User code that asks Python to end, and signals that come while it runs."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from states import until
from test_cli import run

from cp_debug.cli import main as command_line
from cp_debug.cli.crash import log_crash
from cp_debug.cli.deploy import DeployLog
from cp_debug.doing import asked_to_end
from cp_debug.errors import InputError, Terminated, in_one_line, library_reason, raise_if_interrupted

slow = pytest.mark.slow
MODULE = """
import sys, time, torch
class Net(torch.nn.Module):
    calls = 0
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 3)
    def forward(self, x):
        Net.calls += 1
        if Net.calls == {call}:
            {end}
        return self.layer(x)
def build():
    {first}
    return Net(), torch.randn(2, 4)
"""


def module(folder: Path, call: int = 0, end: str = "sys.exit(0)", first: str = "pass") -> str:
    (folder / "nets.py").write_text(MODULE.format(call=call, end=end, first=first))
    return f"{folder / 'nets.py'}:build"


def script(*lines: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True)


@pytest.mark.few(2)
@pytest.mark.parametrize(
    ("call", "end"),
    [
        *((call, "sys.exit(0)") for call in (1, 2, 3, 5)),
        (3, "raise SystemExit('done')"),
        *(pytest.param(call, "raise SystemExit('done')", marks=slow) for call in (1, 2, 5)),
    ],
)
def test_a_forward_that_ends_python_decides_nothing(call: int, end: str, tmp_path: Path) -> None:
    """In whichever forward: the command's own exit code 0 would be a pass."""
    code, said = run("bisect", module(tmp_path, call, end), "-b", "torch,torch-fp64", "--json", tmp_path / "o.json")
    assert code == 2
    assert "SystemExit" in said
    assert not (tmp_path / "o.json").exists()


@pytest.mark.parametrize("call", [1, 5, *(pytest.param(call, marks=slow) for call in (2, 3))])
def test_what_no_handler_of_exceptions_takes_decides_nothing(call: int, tmp_path: Path) -> None:
    raises = "raise type('Stop', (BaseException,), {})('no more')"
    code, said = run("bisect", module(tmp_path, call, raises), "-b", "torch,torch-fp64")
    assert code == 2
    assert "Stop: no more" in said


@pytest.mark.parametrize("code", [0, 1, None, "text"])
def test_any_other_request_to_end_decides_nothing(
    code: object, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def ends(**options: object) -> None:
        raise SystemExit(code)

    monkeypatch.setattr(command_line, "application", lambda first: ends)
    monkeypatch.setattr(signal, "signal", lambda *of: None)
    with pytest.raises(SystemExit) as ended:
        command_line.main()
    assert ended.value.code == 2
    assert f"the program was asked to end (SystemExit: {code}): nothing was decided" in capsys.readouterr().err


@pytest.mark.process
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("place", ["first", "end"])
def test_a_signal_while_user_code_runs_is_no_fault_of_the_code(number: int, place: str, tmp_path: Path) -> None:
    waits = f"open({str(tmp_path / 'there')!r}, 'w').close(); time.sleep(60)"
    model = module(tmp_path, 1, **{"end": "pass", place: waits})
    # nohup leaves a signal ignored, which is not this test's case
    heard = "import signal; signal.signal(signal.SIGHUP, signal.SIG_DFL); from cp_debug.__main__ import main; main()"
    command = [sys.executable, "-c", heard, "bisect", model, "-b", "torch,torch-fp64"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    until((tmp_path / "there").exists)
    process.send_signal(number)
    _, said = process.communicate()
    assert (process.returncode, said) == (128 + number, "")


@pytest.mark.process
@pytest.mark.parametrize(("number", "expected"), [(signal.SIGINT, (130, "interrupted\n")), (signal.SIGTERM, (143, ""))])
@pytest.mark.parametrize("failure", ["RuntimeError('lost')", "InputError('lost')", "OSError(5, 'lost')"])
def test_a_library_that_swallows_a_request_to_end_and_fails(
    number: int, expected: tuple[int, str], failure: str
) -> None:
    lines = [
        "import os, signal",
        "from cp_debug.cli import main",
        "from cp_debug.errors import InputError",
        "def command(**options):",
        "    try:",
        f"        os.kill(os.getpid(), {int(number)})",
        "    except BaseException:",
        "        pass",
        f"    raise {failure}",
        "main.application = lambda first: command",
        "main.main()",
    ]
    done = script(*lines)
    assert (done.returncode, done.stderr) == expected


def test_what_the_users_code_prints_when_python_ends_is_made_visible() -> None:
    lines = [
        "import atexit, sys",
        "from cp_debug import __main__",
        "import cp_debug.safe_text",
        "atexit.register(lambda: [print('\\x1b[2J', file=stream) for stream in (sys.stdout, sys.stderr)])",
        "__main__._end()",
    ]
    done = script(*lines)
    assert (done.stdout, done.stderr) == ("\\x1b[2J\n", "\\x1b[2J\n")


@pytest.mark.process
def test_ctrl_c_twice_while_the_command_is_loaded_is_told_once() -> None:
    lines = [
        "import os, signal, sys, types",
        "from cp_debug import __main__",
        "class Loading(types.ModuleType):",
        "    def __getattr__(self, name): raise KeyboardInterrupt",
        "sys.modules['cp_debug.cli.guard'] = Loading('guard')",
        "import atexit; atexit.register(lambda: os.kill(os.getpid(), signal.SIGINT))",
        "__main__.main()",
    ]
    done = script(*lines)
    assert (done.returncode, done.stderr) == (130, "interrupted\n")


@pytest.mark.process
def test_a_request_to_end_that_the_parser_takes_for_ctrl_c_has_its_own_code() -> None:
    lines = [
        "import os, signal, typer",
        "from cp_debug.cli import main",
        "def callback():",
        f"    os.kill(os.getpid(), {int(signal.SIGTERM)})",
        "group = typer.Typer()",
        "group.callback(invoke_without_command=True)(callback)",
        "main.application = lambda first: typer.main.get_command(group)",
        "import sys; sys.argv = ['cpdebug']",
        "main.main()",
    ]
    done = script(*lines)
    assert (done.returncode, done.stderr) == (143, "")


@pytest.mark.process
def test_a_reader_of_the_help_that_goes_is_no_error() -> None:
    command = [sys.executable, "-m", "cp_debug", "bisect", "--help"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert (process.wait(), process.stderr.read()) == (141, "")
    process.stderr.close()


def test_a_request_to_end_is_known_behind_other_errors() -> None:
    try:
        try:
            raise Terminated(143)
        except Terminated as end:
            raise InputError("a library's own") from end
    except InputError as error:
        with pytest.raises(Terminated) as found:
            raise_if_interrupted(error)
    assert found.value.code == 143


def test_an_error_that_cannot_be_printed_is_told_by_its_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))

    class Mute(Exception):
        def __str__(self) -> str:
            raise ZeroDivisionError

    for told in (in_one_line(Mute()), library_reason(Mute()), asked_to_end(Mute()), log_crash(Mute())):
        assert "ZeroDivision" not in told
    assert in_one_line(Mute()) == "Mute: "


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_log_that_the_disk_has_no_room_for_is_told_in_a_line(tmp_path: Path) -> None:
    (tmp_path / "d.toml").write_text("model = 'centerpoint:tiny'\nlog_file = '/dev/full'\nwork_dir = 'w'\n")
    command = [sys.executable, "-m", "cp_debug", "deploy", str(tmp_path / "d.toml")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, "Traceback" in done.stderr) == (2, False)
    assert "/dev/full: the log cannot be written" in done.stderr
    with pytest.raises(InputError, match="/dev/full: the log cannot be written"):
        DeployLog(Path("/dev/full")).stage("export", None)


@pytest.mark.process
@pytest.mark.skipif(sys.platform != "linux", reason="glibc's heaps")
@pytest.mark.parametrize("limited", [False, True])
def test_where_addresses_are_limited_threads_share_a_heap(limited: bool) -> None:
    """Each one's own would be 64 MiB at least."""
    done = script(
        "import resource, threading",
        "from cp_debug.__main__ import _spare_addresses",
        "def size(): return int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize() >> 20",
        f"resource.setrlimit(resource.RLIMIT_AS, (1 << 36,) * 2) if {limited} else None",
        "_spare_addresses()",
        "before, wait = size(), threading.Event()",
        "threading.stack_size(1 << 20)",
        "def work(): held = [bytes(5000 + i) for i in range(99)]; wait.wait()",
        "threads = [threading.Thread(target=work) for _ in range(6)]",
        "[t.start() for t in threads]",
        "print(size() - before); wait.set()",
    )
    assert (int(done.stdout) < 100) == limited, done.stderr
