"""What tasks share is made once, comes back whole or not at all, and changes no result."""

from __future__ import annotations

import logging
import sys
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from states import until
from test_cli import run
from test_trt_backend import X, collect
from test_trt_runner import install_counted, save_net

from cp_debug.backends.base import Program
from cp_debug.backends.registry import create
from cp_debug.backends.spec import BackendSpec, parse_backends
from cp_debug.backends.tensorrt.engine_cache import EngineCache
from cp_debug.errors import InputError
from cp_debug.graph.graph import Graph
from cp_debug.programs import export_cache
from cp_debug.store import Store
from cp_debug.sweep import bisecting, prepared, sensitivity, tasks
from cp_debug.sweep.prepared import Grid
from cp_debug.sweep.tasks import Task, run_task

if TYPE_CHECKING:
    from distributed import Client

NET = """
import torch

def net():
    torch.manual_seed(0)
    first, last = torch.nn.Linear(4, 8), torch.nn.Linear(8, 2)
    return torch.nn.Sequential(first, torch.nn.ReLU(), last).eval(), (torch.ones(1, 4),)
"""


S3 = all(find_spec(package) for package in ("s3fs", "moto", "flask"))
"""Whether an S3 server can run here: ``pip install s3fs 'moto[server]'``."""


@pytest.fixture(scope="session")
def bucket() -> Iterator[str]:
    """A bucket of a server on this machine; only where S3's packages are installed."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    logging.getLogger("werkzeug").disabled = True
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY"):
            patch.setenv(f"AWS_{name}", "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        boto3.client("s3").create_bucket(Bucket="sweeps")
        yield "s3://sweeps"
    server.stop()


@pytest.fixture(params=["folder", "memory", *["s3"] * S3])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A store's folder or URL."""
    if request.param == "s3":
        return f"{request.getfixturevalue('bucket')}/{tmp_path.name}"
    return str(tmp_path / "store") if request.param == "folder" else f"memory://{tmp_path.name}"


@pytest.fixture
def store(place: str) -> Store:
    return Store.open(place, "--shared")


def writer(
    folder: Path, text: str = "made", wait: Callable[[], object] = lambda: None
) -> tuple[Callable[[], None], list[str]]:
    """A function that fills ``folder``, and a list that grows with its calls."""
    calls: list[str] = []

    def make() -> None:
        calls.append(text)
        wait()
        folder.mkdir(exist_ok=True)
        (folder / "net.onnx").write_text(text)
        (folder / "net.alignment.json").write_text("{}")

    return make, calls


def test_the_second_gets_what_the_first_made(store: Store, tmp_path: Path) -> None:
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


@pytest.fixture
def client() -> Iterator[Client]:
    """A worker in this process that runs three tasks at a time."""
    from distributed import Client

    with Client(processes=False, n_workers=1, threads_per_worker=3, dashboard_address=None) as made:
        yield made


def test_others_wait_while_one_makes_it(place: str, tmp_path: Path, client: Client) -> None:
    folders = [tmp_path / f"come-{number}" for number in range(3)]

    def take(folder: Path) -> bool:
        folder.mkdir()
        make, calls = writer(folder, folder.name, lambda: until(lambda: len(list(tmp_path.glob("come-*"))) == 3))
        Store(place).make_once("k", folder, make)
        return bool(calls)

    made = client.gather([client.submit(take, folder) for folder in folders])
    assert sorted(made) == [False, False, True]
    maker = folders[made.index(True)].name
    assert {(folder / "net.onnx").read_text() for folder in folders} == {maker}


def test_a_lock_of_a_worker_that_died_is_given_to_another(tmp_path: Path) -> None:
    import dask
    from distributed import Client, Lock

    quick = {f"distributed.scheduler.locks.lease-{name}": "100ms" for name in ("timeout", "validation-interval")}
    with (
        dask.config.set(quick),
        Client(processes=False, n_workers=1, threads_per_worker=1, dashboard_address=None) as client,
    ):
        store = Store(str(tmp_path / "store"))
        lock = Lock(f"cpdebug {store.place} k")
        lock.acquire()
        lock.refresh_callback.stop()  # as when its process is gone
        client.submit(store.make_once, "k", tmp_path / "a", writer(tmp_path / "a")[0]).result()
        assert (tmp_path / "a/net.onnx").read_text() == "made"


def test_what_raises_holds_nobody_up(store: Store, tmp_path: Path, client: Client) -> None:
    def fail() -> None:
        raise InputError("no export")

    with pytest.raises(InputError, match="no export"):
        client.submit(store.make_once, "k", tmp_path, fail).result()
    client.submit(store.make_once, "k", tmp_path / "a", writer(tmp_path / "a")[0]).result()
    assert (tmp_path / "a/net.onnx").read_text() == "made"


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-20], lambda data: data.replace(b"made", b"fade"), lambda d: b""]
)
def test_a_damaged_entry_is_made_anew(damage: Callable[[bytes], bytes], tmp_path: Path) -> None:
    store, folder = Store(tmp_path / "store"), tmp_path / "a"
    store.make_once("k", folder, writer(folder)[0])
    entry = tmp_path / "store/k.zip"
    entry.write_bytes(damage(entry.read_bytes()))
    for expected in (1, 0):
        make, calls = writer(folder, "again")
        store.make_once("k", folder, make)
        assert len(calls) == expected
        assert (folder / "net.onnx").read_text() == "again"


def test_what_another_process_adds_is_seen(store: Store, place: str, tmp_path: Path) -> None:
    other = Store(place)
    with store._files.open(store._place("notes"), "wb") as stream:
        stream.write(b"x")
    if not other._is_folder:
        other._files.ls(other._root)  # stores remember such lists
    store.make_once("k", tmp_path / "a", writer(tmp_path / "a")[0])
    make, calls = writer(tmp_path / "b")
    (tmp_path / "b").mkdir()
    other.make_once("k", tmp_path / "b", make)
    assert not calls


class Broken:
    """A store that answers ``working`` calls and then only with errors."""

    def __init__(self, files: Any, working: int) -> None:
        self._files, self._left = files, working

    def __getattr__(self, name: str) -> Any:
        self._left -= 1
        if self._left < 0:
            raise ConnectionError("reset by peer")
        return getattr(self._files, name)


@pytest.mark.parametrize("working", [0, 1, 2, 3, 4])
def test_a_store_that_fails_is_done_without(working: int, tmp_path: Path) -> None:
    said: list[str] = []
    store = Store.open(tmp_path / "store", "--shared", on_say=said.append)
    store._files = Broken(store._files, working)
    for name in ("a", "b"):
        make, calls = writer(tmp_path / name)
        store.make_once("k", tmp_path / name, make)
        assert (tmp_path / name / "net.onnx").read_text() == "made"
    assert Store(tmp_path / "store").get("k", tmp_path) or calls, "whole, or made by each"
    url = tmp_path / "store"
    assert said == [f"{url}: not used from now on, because it failed: ConnectionError: reset by peer"]


class Repeating(Broken):
    """A store that does everything twice."""

    def __init__(self, files: Any) -> None:
        super().__init__(files, sys.maxsize)

    def __getattr__(self, name: str) -> Any:
        there = super().__getattr__(name)

        def twice(*given: Any, **more: Any) -> Any:
            there(*given, **more)
            return there(*given, **more)

        def opened_twice(place: str, mode: str) -> Any:
            with there(place, mode) as stream:
                stream.read() if mode == "rb" else stream.write(b"half")
            return there(place, mode)

        return {"makedirs": twice, "open": opened_twice}.get(name, there)


def test_a_store_that_repeats_itself_gives_the_same(store: Store, tmp_path: Path) -> None:
    store._files = Repeating(store._files)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        make, calls = writer(tmp_path / name)
        store.make_once("k", tmp_path / name, make)
        assert (len(calls), (tmp_path / name / "net.onnx").read_text()) == (name == "a", "made")
    assert store._works


@pytest.mark.process
def test_the_client_is_told_once_that_a_store_failed(tmp_path: Path) -> None:
    from distributed import Client

    from cp_debug.sweep.log import SweepLog
    from cp_debug.sweep.run import Progress, Queue

    with (
        Client(processes=False, n_workers=1, threads_per_worker=1, dashboard_address=None) as client,
        SweepLog(tmp_path / "log.jsonl") as log,
    ):
        queue = Queue(client, log, Progress(1), lambda progress: None)
        for text in ("first", "second"):
            client.submit(tasks._tell_client, text).result()
        until(lambda: queue.progress.store)
        assert queue.progress.store == "first"
    tasks._tell_client("of no worker")


def files_in(folder: Path) -> dict[str, bytes]:
    """The files of a cache, and those in its entries."""
    found = {}
    for file in folder.iterdir():
        if file.suffix == ".zip":
            with zipfile.ZipFile(file) as entry:
                found |= {f"{file.stem}/{name}": entry.read(name) for name in entry.namelist()}
        else:
            found[file.name] = file.read_bytes()
    return found


@pytest.mark.few(1)
def test_another_machine_takes_engines_with_their_timings(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = install_counted("8.6.0", monkeypatch)
    graph, shown = Graph(save_net(tmp_path)), []
    for machine in ("a", "b", "b"):
        cache = EngineCache.open(tmp_path / machine, asked=True, behind=Store(place))
        backend = create(BackendSpec.parse("trt-fp16"), cache=cache)
        session = backend.open(Program("net", graph))
        shown.append(collect(session, {"x": X})[0])
        session.close()
    assert len(built) == 3, "plain, again, and with probes: all by the first"
    for name, array in shown[0].items():
        np.testing.assert_array_equal(shown[1][name], array)
        np.testing.assert_array_equal(shown[2][name], array)
    kept, taken = (files_in(tmp_path / machine) for machine in ("a", "b"))
    assert kept == taken
    assert {Path(name).suffix for name in kept} == {"", ".json", ".timings"}


def test_what_is_no_engine_in_a_store_is_built_anew(tmp_path: Path) -> None:
    store, key, engine, said = Store(tmp_path / "store"), "k" * 64, tmp_path / "work/net.engine", list[str]()
    (tmp_path / "f").mkdir()
    store.make_once(key, tmp_path / "f", writer(tmp_path / "f")[0])  # whole, but something else
    cache = EngineCache.open(tmp_path / "cache", asked=True, behind=store, on_say=said.append)
    assert cache is not None
    engine.parent.mkdir()

    def build() -> dict[str, Any]:
        engine.write_bytes(b"engine")
        return {"seconds": 1.0}

    assert cache.make_once(key, engine, None, build) == {"seconds": 1.0}
    assert engine.read_bytes() == b"engine"
    assert len(said) == 1


def fresh() -> None:
    """Forget what this process holds, as if it were another worker."""
    for kept in (prepared.opened, prepared._export, prepared._quantize, sensitivity._bench):
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
    how = {"batches": 2, "method": "mse"}
    (task,) = sensitivity.tasks(Grid(["centerpoint:tiny"], parse_backends("torch,torch-fp64"), samples=1, how=how), ())
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
