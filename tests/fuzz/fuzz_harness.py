"""Runs cases, each in a fork of a process that has imported everything, and judges what they left and said.

A fork costs hundredths of a second where a new process costs seconds, and what a case breaks ends with it.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import os
import re
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import time
import unicodedata
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fuzz_base import ANYTHING_NEW, MARK, Case

HANG = 30.0
PATIENCE = 4
"""Seconds of the processor that one command may take, and how many times that on the clock: others work here, too."""
LINES = 12
LENGTH = 6000
"""Lines and characters of an error message."""
MEMORY = 12 << 30
EXPECTED = (0, 1, 2, 3, 130, 143)
_TEXTS = {".md", ".html", ".csv", ".svg", ".xml"}
_LEFT_OVER = re.compile(r"\.partial$|^\.(export|alignment|engine|capture|work|tmp)|^tmp[a-z0-9_]{8}$|^cpdebug-")


@dataclass
class Outcome:
    """What is wrong with a case: (kind, detail). Kinds are those of the summary."""

    faults: list[tuple[str, str]] = field(default_factory=list)
    codes: list[int] = field(default_factory=list)
    seconds: float = 0.0
    stderr: str = ""


def prepare() -> None:
    """Import what commands import, so that forks need not."""
    adopt()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("NUMBA_NUM_THREADS", "1")
    os.environ["NO_COLOR"] = "1"
    import importlib
    import pkgutil

    for name in ("torch", "torch._inductor", "torch.onnx", "onnx", "onnxruntime", "pandas", "yaml", "distributed"):
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    import cp_debug

    heavy = ("centerpoint.training", "mmengine_hook", "__main__", "tensorrt.runner", "mmdet3d.runner")
    for module in pkgutil.walk_packages(cp_debug.__path__, "cp_debug."):
        if not module.name.endswith(heavy):
            with contextlib.suppress(ImportError):
                importlib.import_module(module.name)
    folder = Path(cp_debug.__file__).parent
    for file in folder.rglob("*.py"):  # folders without __init__.py
        name = ".".join(("cp_debug", *file.relative_to(folder).with_suffix("").parts)).removesuffix(".__init__")
        if not name.endswith(heavy):
            with contextlib.suppress(ImportError):
                importlib.import_module(name)
    with contextlib.suppress(ImportError):
        # Loaded or compiled when first used; the result is on disk.
        import numpy as np

        from cp_debug.probes.statistics import compare

        compare(np.ones(3, np.float32), np.ones(3, np.float32))


def adopt() -> None:
    """Have processes that cases leave come to this one, where ``judge`` sees them."""
    with contextlib.suppress(OSError, AttributeError):
        import ctypes

        ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER


def call(argv: list[str], folder: Path, temporary: Path, output: Path, *, case: Case | None = None) -> tuple[int, bool]:
    """Exit status (negative: a signal) and whether it hung. stdout and stderr go to ``output`` with ``.out``, ``.err``.

    ``temporary`` is the command's folder for temporary files and its home.
    """
    if case is not None and case.subprocess:
        return _call_installed(argv, folder, temporary, output, case)
    limited = case is not None and case.file_limit is not None
    pipes = [_pipe() for _ in range(2)] if limited else []  # files could not hold what is said
    pid = os.fork()
    if pid == 0:
        os._exit(_child(argv, folder, temporary, output, case, [write for _, write in pipes]))
    ended = _wait(pid, case)
    for (read, write), ending in zip(pipes, ("out", "err"), strict=False):
        os.close(write)
        with os.fdopen(read, "rb") as stream:
            Path(f"{output}.{ending}").write_bytes(stream.read())
    return ended


def _pipe() -> tuple[int, int]:
    read, write = os.pipe()
    fcntl.fcntl(write, 1031, 1 << 20)  # F_SETPIPE_SZ
    return read, write


def _wait(pid: int, case: Case | None) -> tuple[int, bool]:
    started = time.monotonic()
    end = started + PATIENCE * HANG
    pause = 0.002
    told = case is None or not case.signal
    while time.monotonic() < end and _processor_seconds(pid) < HANG:
        if case is not None and not told and time.monotonic() - started >= case.signal_after:
            told = True
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, case.signal)
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status), False
        time.sleep(pause)
        pause = min(pause * 1.5, 0.05)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return -signal.SIGKILL, True


def _processor_seconds(pid: int) -> float:
    """What a process and its children have used."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


def _child(argv: list[str], folder: Path, temporary: Path, output: Path, case: Case | None, pipes: list[int]) -> int:
    os.setsid()
    if pipes:
        os.dup2(pipes[0], 1)
        os.dup2(pipes[1], 2)
    else:
        _to_files(output)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.chdir(folder)
    os.environ.pop("XDG_STATE_HOME", None)
    os.environ["TMPDIR"] = os.environ["HOME"] = os.environ["XDG_CACHE_HOME"] = str(temporary)
    import tempfile

    tempfile.tempdir = None
    encoding = "ascii" if case is not None and case.ascii else "utf-8"
    sys.stdin = open(os.devnull, encoding="utf-8")  # noqa: PTH123, SIM115
    _spoil("" if case is None else case.streams)
    sys.stdout = _stream(1, encoding, "strict")
    sys.stderr = _stream(2, encoding, "backslashreplace")
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if case is not None:
        for name, number in case.limits.items():
            resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (number, number))
        os.environ.update(case.environment)
        if case.file_limit is not None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (case.file_limit, case.file_limit))
    sys.argv = ["cpdebug", *argv]
    code = 0
    try:
        if case is not None and case.program:
            runpy.run_path(case.program, run_name="__main__")
        elif case is not None and case.guarded:
            from cp_debug.__main__ import main as guarded

            guarded()
        else:
            from cp_debug.cli.main import main

            main()
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(bool(stop.code))
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 70
    with contextlib.suppress(BaseException):
        sys.stdout.flush()
        sys.stderr.flush()
    with contextlib.suppress(BaseException):
        import weakref

        weakref.finalize._exitfunc()  # temporary folders, as at the end of a process
    return code & 0xFF


def _spoil(streams: str) -> None:
    """Make stdout and stderr as the case has them."""
    which, _, how = streams.partition(" ")
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        if which not in (name, "both"):
            continue
        if how == "closed":
            os.close(descriptor)
            continue
        read, write = os.pipe() if how == "unread" else (None, os.open("/dev/full", os.O_WRONLY))
        os.dup2(write, descriptor)
        if read is not None:
            os.close(read)
        os.close(write)


def _stream(descriptor: int, encoding: str, errors: str) -> Any:
    """As Python opens a standard stream: None for one that is closed."""
    with contextlib.suppress(OSError):
        return io.TextIOWrapper(io.FileIO(descriptor, "w"), encoding, errors=errors, write_through=True)
    return None


def _to_files(output: Path) -> None:
    with Path(f"{output}.out").open("wb") as out, Path(f"{output}.err").open("wb") as err:
        os.dup2(out.fileno(), 1)
        os.dup2(err.fileno(), 2)


def _call_installed(argv: list[str], folder: Path, temporary: Path, output: Path, case: Case) -> tuple[int, bool]:
    home = {"TMPDIR": str(temporary), "HOME": str(temporary), "XDG_CACHE_HOME": str(temporary)}
    if case.ascii:
        home |= {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii:strict"}
    command = [str(Path(sys.executable).with_name("cpdebug")), *argv]
    with Path(f"{output}.out").open("wb") as out, Path(f"{output}.err").open("wb") as err:
        try:
            process = subprocess.Popen(
                command,
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                start_new_session=True,
                env={**os.environ, **home, **case.environment},
            )
        except (ValueError, OSError):  # no command line can say this
            return 2, False
    return _wait_process(process)


def _wait_process(process: subprocess.Popen[bytes]) -> tuple[int, bool]:
    try:
        return process.wait(PATIENCE * HANG), False
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return process.wait(), True


def judge(case: Case, folder: Path) -> Outcome:
    """Run the case, whose files are in ``folder / "work"``, and say what is wrong."""
    work, temporary = folder / "work", folder / "tmp"
    temporary.mkdir(exist_ok=True)
    outside = folder / "outside"
    outside.mkdir(exist_ok=True)
    (outside / "x").write_text("stays")
    outcome = Outcome()
    before, own = _listing(folder), _children()
    for index, argv in enumerate(case.commands):
        started = time.monotonic()
        output = folder / f"said-{index}"
        code, hung = call(argv, work, temporary, output, case=case)
        outcome.seconds += time.monotonic() - started
        outcome.codes.append(code)
        out, err = (Path(f"{output}.{kind}").read_bytes() for kind in ("out", "err"))
        outcome.stderr += err.decode("utf-8", "replace")
        faults = judged_streams(_told(code, case), hung, out, err, temporary)
        outcome.faults += [
            fault
            for fault in faults
            if not (case.prints and fault[0] == "control") and not (case.streams and fault[0] == "message")
        ]
    if case.signal and outcome.codes[-1] in (130, 143):
        case = replace(case, writes=())  # what was interrupted has written nothing
    if case.unchanged and outcome.codes[-1] in (2, 3, 70):
        case = replace(case, writes=())
    outcome.faults += _judged_files(case, work, folder, before)
    outcome.faults += [("outside", f"a process is left: {name}") for name in _left(_children() - own)]
    return outcome


def _told(code: int, case: Case) -> int:
    """The exit status, with 130 for those that a signal to this case, or a reader that has gone, explains."""
    ends = (-signal.SIGKILL, -signal.SIGHUP, 128 + signal.SIGHUP)
    return 130 if (case.signal and code in ends) or (case.streams and code == 141) else code


def _children() -> set[int]:
    with contextlib.suppress(OSError):
        return {int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()}
    return set()


def _left(processes: set[int]) -> Iterator[str]:
    """The command lines of those that do not end by themselves; they are ended."""
    for pid in processes:
        with contextlib.suppress(OSError):
            for _ in range(40):
                if os.waitpid(pid, os.WNOHANG)[0]:
                    break
                time.sleep(0.05)
            else:
                yield Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")[:100]
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)


def judged_streams(code: int, hung: bool, out: bytes, err: bytes, temporary: Path) -> Iterator[tuple[str, str]]:
    """What is wrong with an exit status and with what was said; ``temporary`` is where the log of an error lies."""
    told = _COLOURED.sub(r"\1", err.decode("utf-8", "replace"))
    shown = out.decode("utf-8", "replace")
    if hung:
        yield "hang", f"more than {HANG:g} s"
        return
    for text in (told, shown):
        if "Traceback (most recent call last)" in text:
            yield "traceback", last_frame(text)
            return
    if code == 70:
        logs = sorted(temporary.glob(".local/state/cpdebug/*.log"))
        yield "traceback", last_frame(logs[-1].read_text(errors="replace")) if logs else f"exit 70: {told[:300]}"
        return
    if code not in EXPECTED:
        yield "traceback", f"exit {code}: {told.strip()[-200:]}"
        return
    for stream, text in (("stderr", told), ("stdout", shown)):
        if bad := sorted({c for c in text if _is_control(c)}):
            where = next(line for line in text.split("\n") if bad[0] in line)
            yield "control", f"{stream} has {[hex(ord(c)) for c in bad]}: {where[:150]!r}"
        if f"{MARK}{MARK}" in text:
            yield "control", f"{stream}: markup was interpreted"
    if code in (2, 3):
        message = told.strip() or ""
        if not message:
            yield "message", f"exit {code} without a word"
        lines = [line for line in message.splitlines() if line and not _LOGGED.match(line)]  # --verbose asks for those
        message = "\n".join(lines)
        if len(lines) > LINES:
            yield "message", f"{len(lines)} lines: {message[:300]!r}"
        elif len(message) > LENGTH:
            yield "message", f"{len(message)} characters: {message[:200]!r}"
    elif len(told.splitlines()) > 10 * LINES:
        yield "message", f"{len(told.splitlines())} lines on stderr: {told[:200]!r}"
    if shown.startswith(("::error", "::warning", "::notice")):
        yield from _judged_annotations(shown)


_LOGGED = re.compile(r"\d{4}-\d\d-\d\d [\d:.]+ \[\w:onnxruntime")
"""A line of ONNX Runtime's log."""
_COLOURED = re.compile(rf"\x1b\[0;\d+m({_LOGGED.pattern}.*)\x1b\[m")
"""The same as ONNX Runtime colours it, into pipes, too."""


def _judged_annotations(text: str) -> Iterator[tuple[str, str]]:
    if "::injected" in [line.partition(" ")[0] for line in text.splitlines()] or any(
        re.match(r"::(error|warning)( file=x,line=1)?::injected", line) for line in text.splitlines()
    ):
        yield "control", "an annotation was injected"
    for line in text.splitlines():
        if line and not line.startswith("::"):
            yield "control", f"an annotation broke into lines: {line[:100]!r}"
            return


def _is_control(character: str) -> bool:
    return character != "\n" and unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp")


def _judged_files(
    case: Case, work: Path, folder: Path, before: dict[str, tuple[int, int]]
) -> Iterator[tuple[str, str]]:
    after = _listing(folder)
    for name in sorted(before.keys() | after.keys()):
        if name.startswith("said-") or before.get(name) == after.get(name):
            continue
        if name.startswith("tmp/"):
            if _LEFT_OVER.search(name.split("/")[1]) and case.signal != signal.SIGKILL:
                yield "outside", f"left behind: {name}"
            continue
        relative = name.removeprefix("work/")
        fresh = ANYTHING_NEW in case.writes and name.startswith("work/") and name not in before
        if not fresh and (
            relative == name
            or not any(
                relative == w or relative.startswith(f"{w}/") or w.startswith(f"{relative}/")
                for w in map(os.path.normpath, case.writes)
            )
        ):
            if "__pycache__" not in name:
                yield "outside", f"{'changed' if name in before else 'written'}: {name[:200]}"
        elif _LEFT_OVER.search(Path(name).name) and name not in before and case.signal != signal.SIGKILL:
            yield "outside", f"left behind: {name}"
        elif name in after and Path(name).suffix in _TEXTS:
            yield from judged_text(folder / name)


def judged_text(file: Path) -> Iterator[tuple[str, str]]:
    """What foreign text did in a report."""
    text = file.read_bytes().decode("utf-8", "replace")
    kind = file.suffix
    if bad := sorted({c for c in text if _is_control(c) and c not in "\r\t"}):
        yield "control", f"{file.name} has {[hex(ord(c)) for c in bad]}"
    attack = r"<script>alert|<img src=x|<svg onload"
    attack += {".md": "|^# heading", ".html": r"|[^=]\"onmouseover=", ".svg": r"|[^=]\"onmouseover="}.get(kind, "")
    shown = re.sub(r"```+sh.*?```", "", text, flags=re.S)
    if kind == ".md":  # what stands in a code block or span is shown as it is
        shown = re.sub(r"^(`{3,})[^`\n]*\n.*?^\1`*[ ]*$", "", shown, flags=re.S | re.M)
        shown = re.sub(r"`[^`\n]*`", "", shown)
    if kind in (".md", ".html", ".svg") and re.search(attack, shown, re.M):
        yield "control", f"{file.name}: markup got through"
    if kind == ".csv":
        import csv

        for row in csv.reader(io.StringIO(text)):
            for cell in row:
                if cell[:1] in ("=", "+", "-", "@", "\t", "\r") and not _is_number(cell):
                    yield "control", f"{file.name}: a cell is a formula: {cell[:40]!r}"
                    return


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _listing(folder: Path) -> dict[str, tuple[int, int]]:
    """File or folder → size and time of change; folders have neither."""
    found = {}
    for root, folders, files in os.walk(folder):
        for name in folders:
            found[os.path.relpath(f"{root}/{name}", folder)] = (0, 0)
        for name in files:
            status = os.lstat(f"{root}/{name}")
            found[os.path.relpath(f"{root}/{name}", folder)] = (status.st_size, status.st_mtime_ns)
    return found


def last_frame(text: str) -> str:
    """Error and the innermost frames within the project, to tell tracebacks apart."""
    frames = re.findall(r'File "[^"]*?(cp_debug/[^"]+)", line (\d+), in (\S+)', text)
    error = next((line for line in reversed(text.strip().splitlines()) if re.match(r"\S*?\w+(:|$)", line)), "?")
    where = " < ".join(f"{file}:{line} {name}" for file, line, name in reversed(frames[-3:]))
    return f"{error[:160]} @ {where}"


def summary(seed: str, count: int, found: Counter[str], seconds: float) -> str:
    """One line: how many of each."""
    kinds = ("traceback", "hang", "control", "outside", "message")
    names = ("tracebacks", "hangs", "control characters or markup", "writes outside or left over", "bad messages")
    told = ", ".join(f"{found[kind]} {name}" for kind, name in zip(kinds, names, strict=True))
    return f"seed {seed}, {count} cases in {seconds:.0f} s: {told}"


def clear(folder: Path) -> None:
    """Remove a case's folder, whatever lies in it."""
    shutil.rmtree(folder, ignore_errors=True)
