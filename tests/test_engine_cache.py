"""Engines that a person can wait for: few of them, kept for the next time, stopped at a limit, their progress told."""

from __future__ import annotations

import errno
import json
import os
import zipfile
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_trt_backend import X, collect
from test_trt_runner import install_counted, save_net
from typer.testing import CliRunner

from cp_debug.backends.base import Program
from cp_debug.backends.registry import create
from cp_debug.backends.spec import BackendSpec
from cp_debug.backends.tensorrt import runner
from cp_debug.backends.tensorrt.client import BuildTimedOut
from cp_debug.backends.tensorrt.engine_cache import ENGINE, FACTS, EngineCache
from cp_debug.bisect.engine import Options, bisect
from cp_debug.bisect.result import TestResult
from cp_debug.cli.main import app
from cp_debug.cli.plain_steps import FASTER, Builds
from cp_debug.errors import InputError
from cp_debug.files import key_of
from cp_debug.graph.graph import Graph
from cp_debug.reports.tables import engine_lines
from cp_debug.store import Store, cache_folder, fill


@pytest.fixture(autouse=True)
def tensorrt(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """TensorRT 8.6 whose builds are counted: the engine files of those that ran."""
    return install_counted("8.6.0", monkeypatch)


def cache_in(folder: Path) -> EngineCache:
    cache = EngineCache.open(folder, asked=True)
    assert cache is not None
    return cache


def shown(folder: Path, **options: Any) -> dict[str, np.ndarray]:
    session = create(BackendSpec.parse("trt-fp16"), **options).open(Program("net", Graph(save_net(folder))))
    seen, _ = collect(session, {"x": X})
    session.close()
    return seen


def test_the_same_engines_are_built_once(tmp_path: Path, tensorrt: list[str]) -> None:
    cache = cache_in(tmp_path / "cache")
    first = shown(tmp_path, cache=cache)
    assert len(tensorrt) == 3
    again = shown(tmp_path, cache=cache)
    assert len(tensorrt) == 3
    for name, array in first.items():
        np.testing.assert_array_equal(again[name], array)


@pytest.mark.few(1)
@pytest.mark.parametrize(
    "change",
    [
        {"builder_level": 1},
        {"keep_fp32": frozenset({"/c2/Conv"})},
        {"workspace_mib": 64},
        {"tactic_sources": ("+EDGE_MASK_CONVOLUTIONS",)},
    ],
)
def test_other_settings_are_other_engines(tmp_path: Path, tensorrt: list[str], change: dict[str, Any]) -> None:
    cache = cache_in(tmp_path / "cache")
    shown(tmp_path, cache=cache)
    shown(tmp_path, cache=cache, **change)
    assert len(tensorrt) == 6


def test_engines_of_another_gpu_are_not_taken(
    tmp_path: Path, tensorrt: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = cache_in(tmp_path / "cache")
    shown(tmp_path, cache=cache)
    from fake_tensorrt import FakeCuda

    facts = FakeCuda().describe()
    monkeypatch.setattr(FakeCuda, "describe", lambda self: {**facts, "name": "Another"})
    shown(tmp_path, cache=cache)
    assert len(tensorrt) == 6


def test_a_damaged_engine_is_built_again(tmp_path: Path, tensorrt: list[str]) -> None:
    cache = cache_in(tmp_path / "cache")
    shown(tmp_path, cache=cache)
    for file in (tmp_path / "cache").glob("*.zip"):
        file.write_bytes(b"cut short")
    shown(tmp_path, cache=cache)
    assert len(tensorrt) == 6


def truncated(entry: Path) -> None:
    entry.write_bytes(entry.read_bytes()[:-30])


def empty(entry: Path) -> None:
    entry.write_text("")


def changed(entry: Path) -> None:
    with zipfile.ZipFile(entry) as opened:
        engine = opened.read(ENGINE)
    entry.write_bytes(entry.read_bytes().replace(engine, engine[::-1], 1))


def with_facts(entry: Path, facts: bytes) -> None:
    """Facts that have their own sum, as of another version."""
    with zipfile.ZipFile(entry) as opened:
        files, key = {name: opened.read(name) for name in opened.namelist()}, opened.comment
    with zipfile.ZipFile(entry, "w") as opened:
        opened.comment = key
        for name, content in {**files, FACTS: facts}.items():
            opened.writestr(name, content)


def nested(entry: Path) -> None:
    with_facts(entry, b"[" * 5000)


def without_facts(entry: Path) -> None:
    with_facts(entry, b"{}")


def of_another_key(entry: Path) -> None:
    with zipfile.ZipFile(entry, "a") as opened:
        opened.comment = b"0" * 64


def linked(entry: Path) -> None:
    entry.rename(entry.parent.parent / f"elsewhere-{entry.name}")
    entry.symlink_to(entry.parent.parent / f"elsewhere-{entry.name}")


def looping(entry: Path) -> None:
    entry.unlink()
    entry.symlink_to(entry.name)


def a_fifo(entry: Path) -> None:
    entry.unlink()
    os.mkfifo(entry)


def a_folder(entry: Path) -> None:
    entry.unlink()
    entry.mkdir()


@pytest.mark.few(3)
@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "spoil",
    [truncated, empty, changed, nested, without_facts, of_another_key, linked, looping, a_fifo, a_folder],
)
def test_an_entry_that_is_not_as_it_was_written_is_built_anew_and_told(
    tmp_path: Path, tensorrt: list[str], spoil: Callable[[Path], None]
) -> None:
    said: list[str] = []
    cache = EngineCache.open(tmp_path / "cache", asked=True, on_say=said.append)
    first = shown(tmp_path, cache=cache)
    kept = sorted((tmp_path / "cache").glob("*.zip"))
    for entry in kept:
        spoil(entry)
    again = shown(tmp_path, cache=cache)
    assert len(tensorrt) == 6
    assert len(said) == len(kept)
    assert all(line.startswith("engine cache: made again: ") and "\n" not in line for line in said)
    for name, array in first.items():
        np.testing.assert_array_equal(again[name], array)
    shown(tmp_path, cache=cache)
    assert len(tensorrt) == 6, "kept anew"


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"--cache: .*file cannot be written"):
        EngineCache.open(tmp_path / "file", asked=True)
    assert EngineCache.open(tmp_path / "file", asked=False) is None, "the default folder is no reason to stop"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    assert cache_folder("engines") == tmp_path / "home" / "cpdebug" / "engines"


def run(folder: Path, **options: Any) -> TestResult:
    path = save_net(folder)
    np.savez(folder / "x.npz", x=X)
    backends = [create(BackendSpec.parse("ort-none")), create(BackendSpec.parse("trt-fp16"), **options)]
    return bisect(str(path), backends, options=Options(inputs=folder / "x.npz")).tests[0]


def test_a_healthy_network_costs_one_engine(tmp_path: Path, tensorrt: list[str]) -> None:
    test = run(tmp_path, probes="auto")
    assert test.agrees
    assert tensorrt == ["shapes-0.engine"]
    (line,) = engine_lines(test.backend)
    assert "nothing diverges, so no engine was built to show values inside" in str(line)


def test_a_network_that_diverges_costs_a_second_one(
    tmp_path: Path, tensorrt: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fake_tensorrt.REGION", {"/c2/Conv", "/y/Add"})
    monkeypatch.setattr("fake_tensorrt.FAULTY", {"/c2/Conv": 1.5})
    test = run(tmp_path, probes="auto")
    assert not test.agrees
    assert "r1" in [row.onnx for row in test.rows], "values inside were shown"
    assert tensorrt == ["shapes-0.engine", "shapes-0-probed.engine"]


def test_no_engine_is_built_twice_where_marks_change_it(
    tmp_path: Path, tensorrt: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fake_tensorrt.SHY", {"r1"})
    session = create(BackendSpec.parse("trt-fp16"), probes="auto").open(Program("net", Graph(save_net(tmp_path))))
    session.diverges = lambda inputs, outputs: "y is off"
    collect(session, {"x": X})
    first = ["shapes-0.engine", "shapes-0-probed.engine", "shapes-0-rebuilt.engine"]
    assert tensorrt[:3] == first
    assert tensorrt[3:] == first[1:2], "with fewer marks"


def test_builds_have_a_limit_and_what_was_learnt_is_kept(
    tmp_path: Path, tensorrt: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second build takes too long: the outputs of the first engine are judged all the same."""
    from cp_debug.backends.tensorrt.client import RunnerClient

    real = RunnerClient.execute

    def execute(self: RunnerClient, steps: Any, build_timeout: float | None = None) -> Any:
        if build_timeout is not None and "probed" in steps[0]["engine"]:
            raise BuildTimedOut("net.onnx: the build was stopped after 5 s (--build-timeout); it was at 'timing', 3")
        return real(self, steps, build_timeout)

    monkeypatch.setattr(RunnerClient, "execute", execute)
    test = run(tmp_path, build_timeout=5.0)
    assert [row.onnx for row in test.outputs] == ["y"]
    assert "the build was stopped after 5 s" in str(next(engine_lines(test.backend)))


def test_a_first_build_that_takes_too_long_says_how_far_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def build(job: Any, step: dict[str, Any]) -> Any:
        job.emit({"event": "progress", "phase": "timing /c1/Conv", "done": 7, "steps": 0})
        raise runner.RunnerFailure("time", "the build was stopped at its time limit")

    monkeypatch.setitem(runner.COMMANDS, "build", build)
    with pytest.raises(BuildTimedOut, match=r"stopped after 2 s \(--build-timeout\); it was at timing /c1/Conv \(7\)"):
        shown(tmp_path, build_timeout=2.0)


def test_a_builder_that_reports_nothing_is_counted_from_its_log(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[dict[str, Any]] = []
    job = runner.Job(events.append)
    job.count_tactics = True
    for place in range(3):
        job.log("VERBOSE", f"--------------- Timing Runner: /c{place}/Conv (CaskConvolution[0x80000009])")
        job.told = 0.0
    job.log("VERBOSE", "Tactic: 0x1 Time: 0.01")
    assert [(e["phase"], e["done"]) for e in events] == [(f"timing /c{i}/Conv", i + 1) for i in range(3)]


def test_a_builder_that_reports_nothing_is_shown_by_the_layers_that_fusing_left() -> None:
    from rich.console import Console
    from rich.progress import Progress

    from cp_debug.cli.console import Steps
    from cp_debug.cli.plain_steps import PlainSteps

    slow = PlainSteps(print, clock=lambda: 0.0)
    with Progress(console=Console(file=StringIO(), force_terminal=True, width=120)) as bars:
        shown = Steps(bars, slow)
        shown("opening the backends", 1, 7)
        job = runner.Job(shown.on_event)
        job.count_tactics = True
        job.log("VERBOSE", "After vertical fusions: 9 layers")
        job.log("VERBOSE", "After final dead-layer removal: 4 layers")
        for name in ("/c0/Conv", "/c0/Conv", "/c1/Conv + /r/Relu", "Optimizer Reformat(<in> -> x)"):
            job.told = 0.0
            job.log("VERBOSE", f"--------------- Timing Runner: {name} (CaskConvolution[0x80000009])")
        assert slow.line == "0 s: timing Optimizer Reformat(<in> -> x) (layer 2 of 4, 4 kernels so far)"
        assert "--builder-level" in slow.stopped
        (bar,) = [task for task in bars.tasks if task.total == 4]
        assert bar.visible
        assert bar.completed == 2
        shown("capturing", 2, 7)
        assert "--builder-level" not in slow.stopped


def test_ctrl_c_says_what_the_job_was_at(capsys: pytest.CaptureFixture[str]) -> None:
    from cp_debug.cli.console import steps

    def job() -> None:
        event = {"event": "progress", "phase": "timing /c/Conv", "done": 3, "steps": 0, "layer": 2, "layers": 9}
        with steps() as shown:
            shown("opening the backends", 1, 7)
            shown.on_event(event)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        job()
    said = capsys.readouterr().err
    assert "stopped after 0 s: timing /c/Conv (layer 2 of 9, 3 kernels so far); --builder-level 0 to 2" in said
    assert "the next run continues from about here" in said


def test_long_builds_say_what_is_known() -> None:
    """The first engine takes 60 s, the one that shows values inside 5 s."""
    said: list[str] = []
    now = 0.0
    known = Builds(said.append, clock=lambda: now)
    timing = {"event": "progress", "phase": "timing /c/Conv", "done": 3, "steps": 0, "layer": 2, "layers": 9}

    def at(seconds: float, event: dict[str, Any]) -> list[str]:
        nonlocal now
        now = seconds
        said.clear()
        known.on_event(event)
        return [*said]

    for seconds, event in ((5.0, {"event": "building", "level": None}), (25.0, timing)):
        assert not at(seconds, event)
    far = "21 s of builds, 0 engines built: no output is compared yet; now timing /c/Conv (layer 2 of 9, 3 kernels so "
    assert at(26.0, timing) == [far + "far)", FASTER]
    for seconds, event in ((27.0, timing), (65.0, {"event": "built"}), (90.0, {"event": "output"})):
        assert not at(seconds, event)
    (line,) = at(90.0, {"event": "compared", "text": "y is off"})
    assert line.startswith("60 s of builds, 1 engine built: y is off; one or two more engines will show where")
    for event in ({"event": "building", "level": None}, timing, {"event": "built"}):
        assert not at(95.0, event)


@pytest.mark.parametrize(
    ("level", "first", "second", "says"),
    [(3, 11.0, 0.0, True), (None, 9.0, 8.0, False), (None, 9.0, 12.0, True), (2, 11.0, 0.0, False)],
)
def test_builds_that_will_be_long_say_it_once_the_outputs_are_compared(
    level: int | None, first: float, second: float, says: bool
) -> None:
    said: list[str] = []
    now = 0.0
    known = Builds(said.append, clock=lambda: now)
    timing = {"event": "progress", "phase": "timing /c/Conv", "done": 3, "steps": 0}
    building = {"event": "building", "level": level}
    for seconds, event in ((0.0, building), (first, timing), (0.0, {"event": "built"})):
        now += seconds
        known.on_event(event)
    for seconds, event in ((0.0, {"event": "compared", "text": "y is off"}), (9.0, building), (second, timing)):
        now += seconds
        known.on_event(event)
    assert ("y is off" in "".join(said)) == (first + second > 20 or 2 * first > 20)
    assert (FASTER in said) == says


def test_the_outputs_are_compared_before_what_is_inside_is_built_and_ctrl_c_judges_them(
    tmp_path: Path, tensorrt: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fake_tensorrt.REGION", {"/c2/Conv", "/y/Add"})
    monkeypatch.setattr("fake_tensorrt.FAULTY", {"/c2/Conv": 1.5})
    real, told = runner.COMMANDS["build"], []

    def build(job: Any, step: dict[str, Any]) -> dict[str, Any]:
        if "probed" in step["engine"]:
            raise KeyboardInterrupt
        return real(job, step)

    monkeypatch.setitem(runner.COMMANDS, "build", build)
    test = run(tmp_path, probes="auto", on_event=told.append)
    assert [row.onnx for row in test.outputs] == ["y"]
    assert not test.agrees
    assert "stopped by Ctrl-C: only the outputs are judged" in str(next(engine_lines(test.backend)))
    told = [event for event in told if event["event"] not in ("log", "step", "progress")]
    assert [event["event"] for event in told] == ["building", "built", "compared", "building", "stopped"]
    assert told[2]["text"].startswith("trt-fp16: y is off by ")


def test_the_command_line_keeps_engines(tmp_path: Path, tensorrt: list[str]) -> None:
    save_net(tmp_path)
    np.savez(tmp_path / "x.npz", x=X)
    command = ["bisect", str(tmp_path / "net.onnx"), "-b", "ort-none,trt-fp16", "--inputs", str(tmp_path / "x.npz")]
    for _ in range(2):
        done = CliRunner().invoke(app, [*command, "--cache", str(tmp_path / "c"), "--json", str(tmp_path / "r.json")])
        assert done.exit_code == 0, done.output
    assert tensorrt == ["shapes-0.engine"]
    settings = json.loads((tmp_path / "r.json").read_text())["backends"][1]["settings"]
    assert settings["cached"]
    done = CliRunner().invoke(app, [*command, "--cache", str(tmp_path / "net.onnx")])
    assert done.exit_code != 0
    done = CliRunner().invoke(app, [*command, "--cache", str(tmp_path / "c"), "--no-cache"])
    assert done.exit_code != 0
    done = CliRunner().invoke(app, ["bisect", str(tmp_path / "net.onnx"), "-b", "ort-none,ort", "--max-builds", "2"])
    assert done.exit_code != 0


def test_an_entry_that_another_process_removes_stops_nobody(tmp_path: Path) -> None:
    """A link to nothing is what a listed entry is that is gone when its size is asked for."""
    store, made = Store(tmp_path / "cache", most=1 << 20), tmp_path / "made"
    made.mkdir()
    (made / "engine").write_bytes(b"engine")
    os.utime(made / "engine", (0, 0))  # a machine without a clock; ZIP knows no time before 1980
    (tmp_path / "cache").mkdir()
    (tmp_path / f"cache/{'0' * 64}.zip").symlink_to("nowhere")
    store.put(key_of({"net": "one"}), made)
    assert store.get(key_of({"net": "one"}), tmp_path)


def test_the_least_recently_used_entries_go_when_there_are_too_many(tmp_path: Path) -> None:
    store, made, keys = Store(tmp_path / "cache", most=2500), tmp_path / "made", [c * 64 for c in "abc"]
    made.mkdir()
    (made / "engine").write_bytes(bytes(1000))
    for age, key in enumerate(keys[:2]):
        store.put(key, made)
        os.utime(tmp_path / f"cache/{key}.zip", (age, age))
    assert store.get(keys[0], tmp_path)
    store.put(keys[2], made)
    assert sorted(path.stem for path in (tmp_path / "cache").iterdir()) == [keys[0], keys[2]]


def test_a_file_system_without_links_gets_copies_and_a_full_disk_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, folder, store = tmp_path / "net.engine", tmp_path / "entry", Store(tmp_path / "cache", most=1 << 20)
    engine.write_bytes(b"engine")
    folder.mkdir()

    def refused(*paths: Any) -> None:
        raise OSError(errno.ENOSPC, "no space left")

    monkeypatch.setattr(os, "link", refused)
    fill(folder, {ENGINE: engine, FACTS: "{}"})
    assert sorted(file.name for file in folder.iterdir()) == [ENGINE, FACTS]
    for file in folder.iterdir():
        file.unlink()
    monkeypatch.setattr("shutil.copyfile", refused)
    fill(folder, {FACTS: "{}", ENGINE: engine})
    store.put("k" * 64, folder)
    assert not list(folder.iterdir())
    assert not (tmp_path / "cache").exists()
