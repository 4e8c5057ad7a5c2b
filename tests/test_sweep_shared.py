"""What tasks share is made once, comes back whole or not at all, and changes no result."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_cli import run

from cp_debug.backends.spec import parse_backends
from cp_debug.errors import InputError
from cp_debug.programs import export_cache
from cp_debug.sweep import bisecting, prepared, sensitivity, shared
from cp_debug.sweep.grid import Grid
from cp_debug.sweep.shared import SharedStore
from cp_debug.sweep.tasks import Task, run_task

NET = """
import torch

def net():
    torch.manual_seed(0)
    first, last = torch.nn.Linear(4, 8), torch.nn.Linear(8, 2)
    return torch.nn.Sequential(first, torch.nn.ReLU(), last).eval(), (torch.ones(1, 4),)
"""


@pytest.fixture(params=["folder", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> SharedStore:
    found = SharedStore(str(tmp_path / "store") if request.param == "folder" else f"memory://{tmp_path.name}")
    found.check()
    return found


def writer(folder: Path, text: str = "made", seconds: float = 0.0) -> tuple[Callable[[], None], list[str]]:
    """A function that fills ``folder``, and a list that grows with its calls."""
    calls: list[str] = []

    def make() -> None:
        calls.append(text)
        time.sleep(seconds)
        folder.mkdir(exist_ok=True)
        (folder / "net.onnx").write_text(text)
        (folder / "net.alignment.json").write_text("{}")

    return make, calls


def test_the_second_gets_what_the_first_made(store: SharedStore, tmp_path: Path) -> None:
    for name, text in (("a", "first"), ("b", "second")):
        folder = tmp_path / name
        folder.mkdir()
        make, calls = writer(folder, text)
        store.make_once("k", folder, make)
        assert (folder / "net.onnx").read_text() == "first"
        assert (folder / "net.alignment.json").read_text() == "{}"
        assert len(calls) == (name == "a")
    make, calls = writer(tmp_path / "b")
    store.make_once("other", tmp_path / "b", make)
    assert calls, "another key"


def test_others_wait_while_one_makes_it(store: SharedStore, tmp_path: Path) -> None:
    made, folders = [], [tmp_path / str(number) for number in range(3)]

    def take(folder: Path, first: bool) -> None:
        folder.mkdir()
        time.sleep(0.0 if first else 0.15)
        make, calls = writer(folder, folder.name, 0.4)
        store.make_once("k", folder, make)
        made.extend(calls)

    threads = [threading.Thread(target=take, args=(folder, folder == folders[0])) for folder in folders]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == ["0"]
    assert {(folder / "net.onnx").read_text() for folder in folders} == {"0"}


def test_a_claim_of_a_process_that_died_is_taken_over(
    store: SharedStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared, "STALE", 0.3)
    store._files.pipe_file(store._place("k.claim"), b"gone 3")
    make, calls = writer(tmp_path / "a")
    store.make_once("k", tmp_path / "a", make)
    assert calls
    assert not store._files.exists(store._place("k.claim"))


def test_what_raises_leaves_no_claim(store: SharedStore, tmp_path: Path) -> None:
    def fail() -> None:
        raise InputError("no export")

    with pytest.raises(InputError, match="no export"):
        store.make_once("k", tmp_path, fail)
    make, calls = writer(tmp_path / "a")
    start = time.monotonic()
    store.make_once("k", tmp_path / "a", make)
    assert calls
    assert time.monotonic() - start < 5


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-600], lambda data: data[:700] + b"x" + data[701:], lambda d: b""]
)
def test_a_damaged_entry_is_made_anew(damage: Callable[[bytes], bytes], tmp_path: Path) -> None:
    store, folder = SharedStore(str(tmp_path / "store")), tmp_path / "a"
    store.check()
    store.make_once("k", folder, writer(folder)[0])
    entry = tmp_path / "store/k.tar"
    entry.write_bytes(damage(entry.read_bytes()))
    for expected in (1, 0):
        make, calls = writer(folder, "again")
        store.make_once("k", folder, make)
        assert len(calls) == expected
        assert (folder / "net.onnx").read_text() == "again"


class Broken:
    """A store that answers ``working`` calls and then only with errors."""

    def __init__(self, files: Any, working: int) -> None:
        self._files, self._left = files, working

    def __getattr__(self, name: str) -> Any:
        self._left -= 1
        if self._left < 0:
            raise ConnectionError("reset by peer")
        return getattr(self._files, name)


@pytest.mark.parametrize("working", [0, 1, 2, 3, 4, 5, 6, 8])
def test_a_store_that_fails_is_done_without(working: int, tmp_path: Path) -> None:
    store = SharedStore(str(tmp_path / "store"))
    store.check()
    store._files = Broken(store._files, working)
    for name in ("a", "b"):
        make, calls = writer(tmp_path / name)
        store.make_once("k", tmp_path / name, make)
        assert (tmp_path / name / "net.onnx").read_text() == "made"
    assert SharedStore(str(tmp_path / "store"))._get("k", tmp_path) or calls, "whole, or made by each"


def fresh() -> None:
    """Forget what this process holds, as if it were another worker."""
    for kept in (prepared._load, prepared._export, prepared._quantize, sensitivity._bench):
        kept.cache_clear()


@pytest.mark.slow
def test_a_task_takes_the_export_of_another_worker(
    tmp_path: Path, exports: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.py").write_text(NET)
    how = {"rtol": None, "atol": None, "explain": False, "calibration": None}
    grid = Grid(
        [f"{tmp_path / 'mine.py'}:net"], parse_backends("torch,ort"), samples=1, exporter="torchscript", how=how
    )
    (task,) = bisecting.tasks(grid)
    sharing = replace(task, params={**task.params, "shared": str(tmp_path / "store")})
    assert sharing.key == task.key
    monkeypatch.setattr(export_cache, "_put_surroundings", lambda digest: None)  # pytest's own global values change
    results = []
    for one in (task, sharing, sharing):
        fresh()
        results.append(run_task(one.kind, one.params))
    assert [result.get("error") for result in results] == [None] * 3
    assert results[0]["result"] == results[1]["result"] == results[2]["result"]
    assert len(exports) == 2, "alone, and for the store"
    (tmp_path / "mine.py").write_text(NET.replace("ReLU", "GELU"))
    (task,) = bisecting.tasks(grid)
    fresh()
    changed = run_task(task.kind, {**task.params, "shared": str(tmp_path / "store")})
    assert [layer["op"] for layer in changed["result"]["layers"]] != [
        row["op"] for row in results[0]["result"]["layers"]
    ]


@pytest.mark.slow
def test_a_task_takes_the_calibration_of_another_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    how = {"batches": 2, "method": "mse", "draws": 0}
    (task,) = sensitivity.tasks(
        Grid(["centerpoint:tiny"], parse_backends("torch,torch-fp64"), samples=1, how=how), (), by_layers=False
    )
    calibrations: list[None] = []
    whole = sensitivity.open_quantized

    def counted(*given: Any, **more: Any) -> Any:
        calibrations.append(None)
        return whole(*given, **more)

    monkeypatch.setattr(sensitivity, "open_quantized", counted)
    monkeypatch.setattr(export_cache, "_put_surroundings", lambda digest: None)
    results = []
    for params in (task.params, *[{**task.params, "shared": str(tmp_path)}] * 2):
        fresh()
        results.append(run_task(task.kind, params))
    assert results[0]["result"] == results[1]["result"] == results[2]["result"]
    assert len(calibrations) == 2


@pytest.mark.parametrize(
    ("place", "says"),
    [("nonsense://there", "nonsense"), ("{file}/store", "cannot be written"), ("{file}", "cannot be")],
)
def test_a_store_that_cannot_be_used_is_refused(place: str, says: str, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    code, text = run(
        "sweep", "bisect", "centerpoint:tiny", "--shared", place.format(file=file), "--log", str(tmp_path / "log.jsonl")
    )
    assert code == 2
    assert "--shared" in text
    assert says in text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


@pytest.mark.parametrize(
    "words",
    [
        ["bisect", "nowhere.onnx", "-b", "ort,ort-all"],
        ["search", "centerpoint:tiny"],
        ["sensitivity", "centerpoint:tiny", "--from", "nowhere"],
    ],
    ids=lambda words: words[0],
)
def test_a_store_that_nothing_goes_into_is_refused(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, text = run("sweep", *words, "--shared", "store")
    assert code == 2
    assert "--shared: it would do nothing here" in text
    assert not list(tmp_path.iterdir())


def test_tasks_of_the_command_name_the_store() -> None:
    assert Task("bisect", {"files": {}, "shared": "a"}).key == Task("bisect", {"files": {}, "shared": "b"}).key
