"""The queue with a real scheduler and real workers, as separate processes on loopback: whatever dies, nothing is lost
and nothing counts twice."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from states import until

from cp_debug.errors import BackendUnavailable, InputError, MissingPackage
from cp_debug.sweep.log import SweepLog
from cp_debug.sweep.run import Finished, Progress, run
from cp_debug.sweep.tasks import Task
from cp_debug.sweep.workers import ClusterLost, local_workers, remote_workers

if TYPE_CHECKING:
    from distributed import Client

pytestmark = pytest.mark.process

HERE = Path(__file__).parent
PATHS = f"{HERE}{os.pathsep}{HERE.parent}"
"""This folder, and that of the package that it tests, whatever is installed."""
ENVIRONMENT = {**os.environ, "PYTHONPATH": PATHS, "DASK_DISTRIBUTED__COMM__TIMEOUTS__CONNECT": "5s"}


def grid(kind: str, count: int, **params: Any) -> list[Task]:
    return [Task(f"sweep_tasks:{kind}", {"i": i, "label": "test", **params}) for i in range(count)]


def sweep(tasks: list[Task], path: Path, client: Client | None = None, **options: Any) -> Finished:
    """On the workers of ``client``, else on two of its own."""
    with SweepLog(path) as log:
        finished = run(lambda: tasks, log, lambda gpu: nullcontext(client) if client else local_workers(2), **options)
        _whole(tasks, finished)
        return finished


def _whole(tasks: list[Task], finished: Finished) -> None:
    """Every task once, with a result or a failure; and no result is in the log twice."""
    results, failures = list(finished.results()), finished.failures()
    assert sorted(r["key"] for r in (*results, *failures)) == sorted(task.key for task in tasks)
    assert max(Counter(r["key"] for r in finished.log if "result" in r).values(), default=1) == 1
    for record in results:
        assert record["result"] == {"square": record["params"]["i"] ** 2}
        assert tasks[record["place"]].params["i"] == record["params"]["i"]


@pytest.fixture(autouse=True, scope="module")
def importable() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", PATHS)
        yield


@pytest.fixture(scope="module")
def client(importable: None) -> Iterator[Client]:
    """Two workers for tests in which none of them dies."""
    with local_workers(2) as made:
        yield made


class Cluster:
    """``dask scheduler`` and ``dask worker`` as users start them."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._stack = folder, ExitStack()
        self.scheduler = self.start_scheduler(0)

    def start_scheduler(self, port: int, path: Path | None = None) -> subprocess.Popen[bytes]:
        file = self._folder / "scheduler.json"
        file.unlink(missing_ok=True)
        where = ["--host", "127.0.0.1", "--port", str(port), "--no-dashboard", "--scheduler-file", str(file)]
        process = self._start("scheduler", *where, path=path)
        until(lambda: file.is_file() and file.stat().st_size)
        self.address = json.loads(file.read_text())["address"]
        return process

    def start_worker(self, *flags: str, path: Path | None = None) -> subprocess.Popen[bytes]:
        """``path``: folder of modules that come before those installed."""
        where = ["--nthreads", "1", "--no-dashboard", "--host", "127.0.0.1"]
        return self._start("worker", self.address, *where, *flags, path=path)

    def _start(self, *command: str, path: Path | None = None) -> subprocess.Popen[bytes]:
        environment = ENVIRONMENT | ({"PYTHONPATH": f"{path}{os.pathsep}{PATHS}"} if path else {})
        process = subprocess.Popen(
            [sys.executable, "-m", "dask", *command], env=environment, cwd=self._folder, stderr=subprocess.DEVNULL
        )
        self._stack.callback(process.wait)
        self._stack.callback(process.kill)
        return process

    def close(self) -> None:
        self._stack.close()


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    made = Cluster(tmp_path)
    yield made
    made.close()


@contextmanager
def meanwhile(action: Callable[[], None]) -> Iterator[None]:
    """Run the action beside the block; what it raises is raised."""
    raised: list[BaseException] = []

    def guarded() -> None:
        try:
            action()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=guarded)
    thread.start()
    yield
    thread.join()
    if raised:
        raise raised[0]


def test_tasks_run_once_and_a_restart_has_nothing_to_do(tmp_path: Path, client: Client) -> None:
    tasks = grid("tiny", 40)
    assert sweep(tasks, tmp_path / "log.jsonl", client).ran == 40
    assert sweep(tasks, tmp_path / "log.jsonl", client).ran == 0
    assert sweep(grid("tiny", 50), tmp_path / "log.jsonl", client).ran == 10


def test_progress_tells_of_every_task(tmp_path: Path, client: Client) -> None:
    seen: list[tuple[int, int, int]] = []

    def look(progress: Progress) -> None:
        seen.append((progress.done, progress.failed, sum(progress.workers.values())))

    sweep(grid("failing", 11), tmp_path / "log.jsonl", client, on_progress=look)
    assert seen[0] == (0, 0, 0)
    assert seen[-1] == (6, 5, 11)


def test_failures_are_kept_and_tried_again_when_asked(tmp_path: Path, client: Client) -> None:
    tasks, path = grid("failing", 6), tmp_path / "log.jsonl"
    assert [f["error"] for f in sweep(tasks, path, client).failures()] == [f"ValueError: {i} is odd" for i in (1, 3, 5)]
    assert sweep(tasks, path, client).ran == 0
    finished = sweep(tasks, path, client, retry_failed=True)
    assert finished.ran == 3
    assert len(finished.failures()) == 3
    with pytest.raises(InputError, match=r"--retry-failed: it would do nothing here: .*log2.jsonl has no task of this"):
        sweep(tasks, tmp_path / "log2.jsonl", client, retry_failed=True)


def test_poison_is_tried_three_times_and_the_rest_completes(tmp_path: Path) -> None:
    tasks = grid("deadly", 30, folder=str(tmp_path), poison=[3, 4])
    failures = sweep(tasks, tmp_path / "log.jsonl").failures()
    assert [f["params"]["i"] for f in failures] == [3, 4]
    assert all("killed 3 workers" in f["error"] for f in failures)
    assert all((tmp_path / f"{i}.tries").read_text() == "xxx" for i in (3, 4))


def test_a_scheduler_with_its_own_number_of_tries(tmp_path: Path, cluster: Cluster) -> None:
    """Four deaths are Dask's default; the task is then asked once more, alone."""
    from distributed import Client

    cluster.start_worker()
    with Client(cluster.address) as client:
        client.wait_for_workers(1)
        client.submit(os.getpid).result()  # a nanny whose worker dies while it starts gives up
    tasks = grid("deadly", 8, folder=str(tmp_path), poison=[2])
    with SweepLog(tmp_path / "log.jsonl") as log:
        finished = run(lambda: tasks, log, lambda gpu: remote_workers(cluster.address))
        _whole(tasks, finished)
        assert [f["params"]["i"] for f in finished.failures()] == [2]


def test_a_worker_killed_in_mid_task(tmp_path: Path, cluster: Cluster) -> None:
    for _ in range(2):
        cluster.start_worker("--no-nanny")
    tasks = grid("slow", 12, folder=str(tmp_path), seconds=0.3)

    def kill() -> None:
        until((tmp_path / "4.pid").is_file)
        os.kill(int((tmp_path / "4.pid").read_text()), signal.SIGKILL)

    with SweepLog(tmp_path / "log.jsonl") as log, meanwhile(kill):
        finished = run(lambda: tasks, log, lambda gpu: remote_workers(cluster.address))
        _whole(tasks, finished)
        assert not finished.failures()


def test_a_scheduler_restarted_in_mid_sweep(tmp_path: Path, cluster: Cluster) -> None:
    cluster.start_worker()
    tasks = grid("slow", 12, folder=str(tmp_path), seconds=0.3)

    def restart() -> None:
        until((tmp_path / "5.pid").is_file)
        cluster.scheduler.kill()
        cluster.scheduler.wait()
        cluster.start_scheduler(int(cluster.address.rpartition(":")[2]))
        cluster.start_worker()

    with SweepLog(tmp_path / "log.jsonl") as log, meanwhile(restart):
        finished = run(lambda: tasks, log, lambda gpu: remote_workers(cluster.address))
        _whole(tasks, finished)
        assert not finished.failures()


def test_a_scheduler_that_stays_away_and_the_same_command_again(
    tmp_path: Path, cluster: Cluster, client: Client
) -> None:
    import dask

    cluster.start_worker()
    tasks, path = grid("slow", 8, folder=str(tmp_path), seconds=0.3), tmp_path / "log.jsonl"

    def kill() -> None:
        until((tmp_path / "3.pid").is_file)
        cluster.scheduler.kill()

    with SweepLog(path) as log, meanwhile(kill), dask.config.set({"distributed.comm.timeouts.connect": "1s"}):
        with pytest.raises(ClusterLost, match="the same command goes on"):
            run(lambda: tasks, log, lambda gpu: remote_workers(cluster.address))
        done = sum("result" in record for record in log)
    assert 0 < done < 8
    assert sweep(tasks, path, client).ran == 8 - done


def test_interrupted_as_by_the_keyboard(tmp_path: Path, client: Client) -> None:
    """Ctrl-C goes to the workers too; the log stays usable."""
    script = (
        "import sys; from pathlib import Path; import test_sweep_queue as t\n"
        "if __name__ == '__main__':\n"
        "    t.sweep(t.grid('slow', 30, folder=sys.argv[1], seconds=0.2), Path(sys.argv[1], 'log.jsonl'))\n"
    )
    file = tmp_path / "sweep_script.py"
    file.write_text(script)
    process = subprocess.Popen(
        [sys.executable, str(file), str(tmp_path)], env=ENVIRONMENT, stderr=subprocess.PIPE, start_new_session=True
    )
    until((tmp_path / "6.pid").is_file)
    os.killpg(process.pid, signal.SIGINT)
    said = process.communicate()[1].decode()
    assert "KeyboardInterrupt" in said
    tasks = grid("slow", 30, folder=str(tmp_path), seconds=0.2)
    with SweepLog(tmp_path / "log.jsonl") as log:
        done = len(list(log))
    assert 0 < done < 30
    assert sweep(tasks, tmp_path / "log.jsonl", client).ran == 30 - done


_STARTS = """
import signal, sys
from pathlib import Path
from cp_debug.__main__ import _end
from cp_debug.cli.main import _Ending
from cp_debug.sweep import workers

if __name__ == "__main__":
    signal.signal(signal.SIGINT, _Ending())
    try:
        with workers.local_workers(2):
            Path(sys.argv[1], "up").touch()
            {inside}
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    finally:
        _end()  # Python itself lets a signal kill it while it ends
else:  # a worker, which imports the script that started it
    import time
    Path(sys.argv[1], "starts").touch()
    time.sleep(1)
"""


@pytest.mark.parametrize(
    ("when", "inside"),
    [("starts", "pass"), pytest.param("up", "import time; time.sleep(1000)")],
)
def test_ctrl_c_for_all_processes_while_workers_start_says_one_line(tmp_path: Path, when: str, inside: str) -> None:
    """The terminal sends it to the whole group; the second one comes while the workers are ended."""
    file = tmp_path / "starting.py"
    file.write_text(_STARTS.format(inside=inside))
    process = subprocess.Popen(
        [sys.executable, str(file), str(tmp_path)], env=ENVIRONMENT, stderr=subprocess.PIPE, start_new_session=True
    )
    until((tmp_path / when).is_file)
    for _ in range(2):
        os.killpg(process.pid, signal.SIGINT)
    assert process.communicate()[1].decode() == "interrupted\n"
    assert process.returncode == 130
    until(lambda: not _in_group(process.pid))


def test_python_s_tracker_of_resources_outlives_signals_to_the_group() -> None:
    """Else what it would remove stays, and it says so in a traceback; this process hears them as before."""
    script = """
import os, signal, time
from multiprocessing.resource_tracker import _resource_tracker as tracker
from cp_debug.sweep.workers import _start_tracker
_start_tracker()
for number in (signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2):
    os.kill(tracker._pid, number)
time.sleep(0.5)
print(os.waitpid(tracker._pid, os.WNOHANG), signal.pthread_sigmask(signal.SIG_BLOCK, ()))
"""
    done = subprocess.run([sys.executable, "-c", script], env=ENVIRONMENT, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("(0, 0) set()\n", "")


def _in_group(group: int) -> bool:
    with suppress(ChildProcessError):  # a process that adopts orphans, as the fuzzer's harness makes it, buries them
        while os.waitpid(-group, os.WNOHANG)[0]:
            pass
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_tasks_that_need_a_gpu_go_to_workers_that_have_one(tmp_path: Path, cluster: Cluster) -> None:
    cluster.start_worker("--no-nanny")
    tasks = [
        Task(t.kind, t.params, gpu=t.params["i"] % 2 == 0) for t in grid("slow", 6, folder=str(tmp_path), seconds=0.0)
    ]
    waited: list[bool] = []

    def look(progress: Progress) -> None:
        waited.append(progress.waiting_for_gpu)

    def add() -> None:
        until(lambda: True in waited)
        cluster.start_worker("--no-nanny", "--resources", "GPU=1", "--name", "gpu")

    with SweepLog(tmp_path / "log.jsonl") as log, meanwhile(add):
        finished = run(lambda: tasks, log, lambda gpu: remote_workers(cluster.address), on_progress=look)
        _whole(tasks, finished)
        ran_by = {r["params"]["i"]: r["worker"] for r in finished.results()}
    assert len({ran_by[i] for i in (0, 2, 4)}) == 1
    assert ran_by[0] != ran_by[1]


def test_local_workers_on_gpus_see_one_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    with local_workers(4, gpu=True) as client:
        seen = client.run(os.getenv, "CUDA_VISIBLE_DEVICES")
        resources = [worker["resources"] for worker in client.scheduler_info()["workers"].values()]
    assert sorted(seen.values()) == ["0", "1"]
    assert resources == [{"GPU": 1}, {"GPU": 1}]


def test_gpus_are_those_that_this_process_may_see(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4, 2,GPU-8932f937")
    with local_workers(None, gpu=True, gpus=2) as client:
        assert sorted(client.run(os.getenv, "CUDA_VISIBLE_DEVICES").values()) == ["2", "4"]
    with pytest.raises(BackendUnavailable, match="sees 3 CUDA devices here, --gpus asks for 4"):
        local_workers(None, gpu=True, gpus=4).__enter__()


@pytest.fixture
def other_code(tmp_path: Path) -> Path:
    """A copy of the package in which one file differs."""
    folder = tmp_path / "other"
    shutil.copytree(HERE.parent / "cp_debug", folder / "cp_debug", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "cp_debug/sweep/spread.py").write_text("")
    return folder


def test_workers_with_other_code_get_no_tasks(tmp_path: Path, cluster: Cluster, other_code: Path) -> None:
    cluster.start_worker("--no-nanny", path=other_code)
    missing = tmp_path / "missing/cp_debug"
    missing.mkdir(parents=True)
    (missing / "__init__.py").write_text("raise ModuleNotFoundError('no module named cp_debug')")
    cluster.start_worker("--no-nanny", path=missing.parent)
    tasks, told = grid("tiny", 12), []
    with remote_workers(cluster.address) as client:
        client.wait_for_workers(2)
        with pytest.raises(InputError) as refused:
            sweep(tasks, tmp_path / "log.jsonl", client)
        assert "with other code than here" in str(refused.value)
        assert "cpdebug cannot be imported there (ModuleNotFoundError" in str(refused.value)
        cluster.start_worker("--no-nanny")
        client.wait_for_workers(3)
        finished = sweep(tasks, tmp_path / "log.jsonl", client, on_progress=lambda now: told.append(now.refused))
        assert len(list(finished.results())) == 12
        assert len({record["worker"] for record in finished.results()}) == 1
    assert "with other code than here" in told[-1]


def test_a_scheduler_of_another_version_of_dask(tmp_path: Path, cluster: Cluster) -> None:
    cluster.scheduler.kill()
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.metadata as metadata\n"
        "version = metadata.version\n"
        "metadata.version = lambda name: '2000.1.0' if name == 'distributed' else version(name)\n"
    )
    cluster.start_scheduler(0, path=tmp_path)
    with (
        pytest.raises(InputError, match=r"is of Dask 2000\.1\.0, here is .* pip install 'distributed==2000\.1\.0'"),
        remote_workers(cluster.address),
    ):
        pass


def test_something_else_that_listens_is_not_waited_for() -> None:
    import dask

    with socket.create_server(("127.0.0.1", 0)) as deaf:
        address = f"tcp://127.0.0.1:{deaf.getsockname()[1]}"
        with (
            dask.config.set({"distributed.comm.timeouts.connect": "200ms"}),
            pytest.raises(InputError, match=r"no scheduler answers at .*; expected tcp://HOST:PORT"),
            remote_workers(address),
        ):
            pass


def test_something_else_that_answers_is_no_scheduler() -> None:
    """What it says is read as the lengths of a message, which has no room in memory."""

    def answer(listening: socket.socket) -> None:
        with suppress(OSError):
            while True:
                listening.accept()[0].sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n" + b"\xff" * 64)

    with socket.create_server(("127.0.0.1", 0)) as web:
        threading.Thread(target=answer, args=(web,), daemon=True).start()
        address = f"tcp://127.0.0.1:{web.getsockname()[1]}"
        with pytest.raises(InputError, match=r"no scheduler answers at .*; expected tcp"), remote_workers(address):
            pass


def test_a_worker_that_dies_while_it_starts(tmp_path: Path) -> None:
    """As it does when a script that starts a sweep has no guard: its workers import it and would start their own."""
    file = tmp_path / "unguarded.py"
    file.write_text("from cp_debug.sweep.workers import local_workers\nwith local_workers(1):\n    print('started')\n")
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    environment = {**ENVIRONMENT, "TMPDIR": str(scratch)}
    done = subprocess.run([sys.executable, str(file)], env=environment, capture_output=True, text=True)
    assert not [path.name for path in scratch.iterdir() if "dask" in path.name or "cpdebug" in path.name]
    assert done.returncode != 0
    assert "started" not in done.stdout
    assert "only if __name__ == '__main__'" in done.stderr


def test_workers_here_that_are_gone_are_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cp_debug.sweep.run.PATIENCE", 0.5)
    monkeypatch.setattr("cp_debug.sweep.run._LOOK", 0.1)
    tasks = grid("slow", 8, folder=str(tmp_path), seconds=0.2)
    with SweepLog(tmp_path / "log.jsonl") as log, local_workers(1) as client:

        def look(progress: Progress) -> None:
            if progress.done == 2 and client.cluster.workers:
                client.cluster.scale(0)

        with pytest.raises(ClusterLost, match=r"all worker processes died.* of 8 tasks are in .*the same command"):
            run(lambda: tasks, log, lambda gpu: nullcontext(client), on_progress=look)


def test_no_gpu_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    with pytest.raises(BackendUnavailable, match="no CUDA device"), local_workers(1, gpu=True):
        pass


def test_a_grid_that_has_a_task_twice(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="twice in the sweep"):
        sweep(grid("tiny", 3) * 2, tmp_path / "log.jsonl")


def test_no_scheduler_there(monkeypatch: pytest.MonkeyPatch) -> None:
    import dask

    with (
        dask.config.set({"distributed.comm.timeouts.connect": "300ms"}),
        pytest.raises(InputError, match=r"no scheduler answers at tcp://127\.0\.0\.1:9 \(connection refused\)"),
        remote_workers("tcp://127.0.0.1:9"),
    ):
        pass


def test_without_dask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(MissingPackage, match=r"pip install '\.\[dask\]'"), local_workers(1):
        pass
