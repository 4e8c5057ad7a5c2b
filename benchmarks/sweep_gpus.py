"""A sweep on one GPU and on several: wall time, the same bits, and what happens when a process dies in the middle.

    python benchmarks/sweep_gpus.py OUT.json [--kind eval|bisect] [--scenes 600] [--gpus 1,2] [--kill worker,card]
    python benchmarks/sweep_gpus.py OUT.json --backends torch,torch-fp64 --gpus 1,2   # without a GPU: processes instead

Of each number of GPUs: seconds until all processes answer, seconds of one scene of every kind of task on each (imports,
loading, export), and seconds of all tasks after that. "With start-up" is the sum of the three. ``--kill worker``: one
worker is killed (SIGKILL) after a quarter of the tasks, its nanny starts another; ``--kill card``: nanny and worker of
one GPU are killed and stay away, on a cluster of a scheduler and workers of their own. Both on the largest number of
GPUs. ``--only-kill`` leaves the undisturbed runs out; ``--same-as FILE`` compares the bits with an earlier OUT.
``--serial``: the tasks one after the other in this process, without Dask, for the same bits. ``--share N``: N worker
processes on the first GPU.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from cp_debug.backends.spec import parse_backends
from cp_debug.sweep import bisecting, evaluating
from cp_debug.sweep.log import SweepLog
from cp_debug.sweep.prepared import Grid
from cp_debug.sweep.run import Progress, run
from cp_debug.sweep.tasks import Task, run_task
from cp_debug.sweep.workers import local_workers, remote_workers

INT8 = {"data": None, "samples": 8, "method": "mse", "skip_layers": []}
HOW: dict[str, dict[str, Any]] = {
    "bisect": {"rtol": None, "atol": None, "explain": True, "calibration": INT8},
    "eval": {"data_root": None, "sweeps": 9, "skip_missing": False, "calibration": INT8},
}
WARM = 100_000
"""Index of the scene on which workers warm up; none of those that are measured."""


def tasks_of(args: argparse.Namespace) -> list[Task]:
    """The grid's tasks."""
    grid = Grid([args.model], parse_backends(args.backends), samples=args.scenes, how=HOW[args.kind])
    return list({"bisect": bisecting, "eval": evaluating}[args.kind].tasks(grid))


def warm_up(tasks: list[tuple[str, dict[str, Any]]]) -> list[dict[str, Any]]:
    """Run tasks on this worker."""
    return [run_task(kind, params) for kind, params in tasks]


def warm_tasks(tasks: list[Task]) -> list[tuple[str, dict[str, Any]]]:
    """One task of each backend, on a scene that is not measured."""
    firsts = {str(task.params["backends"]): task for task in reversed(tasks)}
    return [(t.kind, replace(t, params={**t.params, "index": WARM}).params) for t in firsts.values()]  # type: ignore[misc]


def digest_of(records: dict[str, Any]) -> str:
    """Equal for equal bits of all results, whatever their order."""
    return hashlib.sha256(json.dumps(records, sort_keys=True).encode()).hexdigest()


class Ran:
    """One run of the tasks on a client, its figures and its results."""

    def __init__(self, tasks: list[Task], client: Any, on_progress: Callable[[Progress], None] | None = None) -> None:
        start = time.perf_counter()
        warmed = client.run(warm_up, warm_tasks(tasks))
        self.warm = time.perf_counter() - start
        failed = [each["error"] for found in warmed.values() for each in found if "error" in each]
        assert not failed, failed[0]
        with tempfile.TemporaryDirectory() as folder, SweepLog(Path(folder) / "log.jsonl") as log:
            finished = run(
                lambda: tasks, log, lambda gpu: nullcontext(client), on_progress=on_progress or (lambda progress: None)
            )
            records = list(finished.results())
            self.failures = [each["error"] for each in finished.failures()]
        self.seconds = finished.seconds
        self.count, self.digest = len(records), digest_of({each["key"]: each["result"] for each in records})
        self.each = sorted(each["seconds"] for each in records)
        self.workers = len({each["worker"] for each in records})

    def figures(self) -> dict[str, Any]:
        """JSON-safe."""
        median = round(self.each[len(self.each) // 2], 4) if self.each else None
        return {
            "tasks": self.count, "failed": self.failures[:3], "warm_seconds": round(self.warm, 2),
            "seconds": round(self.seconds, 2), "median_task_seconds": median,
            "busy_seconds": round(sum(self.each), 2), "workers_that_finished_tasks": self.workers,
            "sha256": self.digest,
        }  # fmt: skip


def undisturbed(args: argparse.Namespace, tasks: list[Task], count: int) -> dict[str, Any]:
    """All tasks on ``count`` GPUs of this machine."""
    start = time.perf_counter()
    with workers_here(args, count) as client:
        client.wait_for_workers(count, timeout=120)
        started = time.perf_counter() - start
        ran = Ran(tasks, client)
    found = ran.figures()
    total = round(started + ran.warm + ran.seconds, 2)
    return {"gpus": count, "start_seconds": round(started, 2), **found, "with_start_up_seconds": total}


def serial(args: argparse.Namespace, tasks: list[Task], count: int) -> dict[str, Any]:
    """All tasks in this process, without Dask."""
    warm_up(warm_tasks(tasks))
    start = time.perf_counter()
    outcomes = {task.key: run_task(task.kind, task.params) for task in tasks}
    seconds = time.perf_counter() - start
    failed = [each["error"] for each in outcomes.values() if "error" in each]
    digest = digest_of({key: each.get("result") for key, each in outcomes.items()})
    return {"tasks": len(outcomes), "failed": failed[:3], "seconds": round(seconds, 2), "sha256": digest}


def sharing(args: argparse.Namespace, tasks: list[Task], count: int) -> dict[str, Any]:
    """All tasks by ``count`` processes that share the first GPU."""
    start = time.perf_counter()
    with cluster(args, count, share=True) as (address, _), remote_workers(address) as client:
        client.wait_for_workers(count, timeout=120)
        started = time.perf_counter() - start
        ran = Ran(tasks, client)
    return {"gpus": 1, "processes": count, "start_seconds": round(started, 2), **ran.figures()}


def workers_here(args: argparse.Namespace, count: int) -> Any:
    """One process a GPU, or as many processes where no backend needs one."""
    return local_workers(None, gpu=True, gpus=count) if "cuda" in args.backends else local_workers(count)


class Once:
    """Does something once, when a quarter of the tasks are done."""

    def __init__(self, tasks: int, act: Callable[[], None]) -> None:
        self._after, self._act, self.at = tasks // 4, act, 0

    def __call__(self, progress: Progress) -> None:
        """Act if it is time."""
        if not self.at and progress.done >= max(1, self._after):
            self.at = progress.done
            self._act()


def killed_worker(args: argparse.Namespace, tasks: list[Task], count: int) -> dict[str, Any]:
    """SIGKILL for one worker process; its nanny starts another."""
    with workers_here(args, count) as client:
        client.wait_for_workers(count, timeout=120)
        pid = next(iter(client.run(os.getpid).values()))
        once = Once(len(tasks), lambda: os.kill(pid, signal.SIGKILL))
        ran = Ran(tasks, client, once)
    return {"gpus": count, "killed_after_tasks": once.at, **ran.figures()}


@contextmanager
def cluster(
    args: argparse.Namespace, count: int, share: bool = False
) -> Iterator[tuple[str, list[subprocess.Popen[bytes]]]]:
    """A scheduler and ``count`` workers, each with a nanny and a process group of its own; ``share``: all on one."""
    gpu = "cuda" in args.backends
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))

        def started(*words: str, **environment: str) -> subprocess.Popen[bytes]:
            command = [sys.executable, "-m", *words, "--no-dashboard"]
            environment = {**os.environ, "DASK_DISTRIBUTED__WORKER__DAEMON": "False", **environment}
            process = subprocess.Popen(
                command, env=environment, start_new_session=True, cwd=folder, stderr=subprocess.DEVNULL
            )
            stack.callback(end, process)
            return process

        file = folder / "scheduler.json"
        started("distributed.cli.dask_scheduler", "--port", "0", "--scheduler-file", str(file))
        resources = ["--resources", "GPU=1"] if gpu else []
        workers = [
            started(
                "distributed.cli.dask_worker", "--scheduler-file", str(file), "--nthreads", "1", *resources,
                **({"CUDA_VISIBLE_DEVICES": str(0 if share else index)} if gpu else {}),
            )
            for index in range(count)
        ]  # fmt: skip
        until = time.monotonic() + 60
        while not file.is_file() and time.monotonic() < until:
            time.sleep(0.2)
        time.sleep(0.5)
        yield json.loads(file.read_text())["address"], workers


def end(process: subprocess.Popen[bytes]) -> None:
    """Kill a process with all that it started."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def cut_card(args: argparse.Namespace, tasks: list[Task], count: int) -> dict[str, Any]:
    """SIGKILL for nanny and worker of one GPU, which do not come back."""
    with cluster(args, count) as (address, processes), remote_workers(address) as client:
        client.wait_for_workers(count, timeout=120)
        once = Once(len(tasks), lambda: end(processes[0]))
        ran = Ran(tasks, client, once)
    return {"gpus": count, "cut_after_tasks": once.at, **ran.figures()}


def main() -> None:
    """Run what was asked for; the file is rewritten after every part."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", default="centerpoint:tiny")
    parser.add_argument("--kind", choices=sorted(HOW), default="eval")
    parser.add_argument("--backends", default="torch@cuda,torch-tf32@cuda,torch-fp16@cuda")
    parser.add_argument("--scenes", type=int, default=600)
    parser.add_argument("--gpus", default="1,2")
    parser.add_argument("--kill", default="")
    parser.add_argument("--only-kill", action="store_true")
    parser.add_argument("--same-as", type=Path)
    parser.add_argument("--serial", action="store_true")
    parser.add_argument("--share", type=int, default=0)
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # workers end with this process
    counts, tasks = [int(count) for count in args.gpus.split(",")], tasks_of(args)
    command = "python benchmarks/sweep_gpus.py " + " ".join(sys.argv[1:])
    found: dict[str, Any] = {"command": command, "cores": os.cpu_count(), "tasks": len(tasks), "runs": []}
    if "cuda" in args.backends:
        import torch

        found |= {"device": torch.cuda.get_device_name(), "torch": str(torch.__version__)}
    jobs: list[tuple[str, Callable[..., dict[str, Any]], int]] = []
    if not args.only_kill:
        jobs += [("undisturbed", undisturbed, count) for count in counts]
    jobs += [("serial", serial, 0)] if args.serial else []
    jobs += [("sharing one GPU", sharing, args.share)] if args.share else []
    ways = {"worker": killed_worker, "card": cut_card}
    jobs += [(name, ways[name], max(counts)) for name in args.kill.split(",") if name]
    digests = {json.loads(args.same_as.read_text())["runs"][0]["sha256"]} if args.same_as else set()
    for name, job, count in jobs:
        try:
            one = {"run": name, **job(args, tasks, count)}
            digests.add(one["sha256"])
        except Exception:
            one = {"run": name, "gpus": count, "error": traceback.format_exc()[-3000:]}
        found["runs"].append(one)
        found["the_same_bits"] = len(digests) == 1 and not any("error" in each for each in found["runs"])
        args.out.write_text(json.dumps(found, indent=1))
        print(json.dumps(one), flush=True)
    plain = {one["gpus"]: one for one in found["runs"] if one["run"] == "undisturbed" and "error" not in one}
    if len(plain) > 1:
        first, last = min(plain), max(plain)
        for key in ("seconds", "with_start_up_seconds"):
            found[f"speed_up_{key}"] = round(plain[first][key] / plain[last][key], 3)
    args.out.write_text(json.dumps(found, indent=1))
    print({k: v for k, v in found.items() if k != "runs"}, flush=True)


if __name__ == "__main__":
    main()
