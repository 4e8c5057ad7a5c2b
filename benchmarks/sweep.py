"""What a sweep costs: speed-up of two workers over one, the same bits, the price of a task, and the client's memory.

    python benchmarks/sweep.py                       # everything, about ten minutes on two quiet cores
    python benchmarks/sweep.py --kind bisect -n 4    # another kind, fewer scenes
    python benchmarks/sweep.py --only queue          # the queue alone: 1,000 and 10,000 tiny tasks
    python benchmarks/sweep.py --only resumed        # 100,000 of them, the client killed when 40,000 are done
    python benchmarks/sweep.py --only start-up --model centerpoint:nus-pillar02 --from int8/model.pt

Targets: two workers at least 1.8 times as fast as one on an 8-scene sensitivity sweep; results identical to the serial
run bit for bit; 10,000 tiny tasks finish; the client's memory does not grow with their number.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from cp_debug.backends.spec import parse_backends
from cp_debug.sweep import bisecting, evaluating, sensitivity
from cp_debug.sweep.log import SweepLog
from cp_debug.sweep.prepared import Grid
from cp_debug.sweep.run import run
from cp_debug.sweep.tasks import Task, run_task
from cp_debug.sweep.workers import local_workers, remote_workers

WARM = 100
"""Index of the scene on which workers warm up; none of those that are measured."""


def tiny(params: dict[str, Any]) -> dict[str, Any]:
    """Nothing."""
    return {"i": params["i"]}


def tiny_tasks(count: int) -> Iterator[Task]:
    """``count`` calls of ``tiny``."""
    return (Task("sweep:tiny", {"i": i, "label": "tiny"}) for i in range(count))


def tasks_of(kind: str, model: str, quantized: Path | None, scenes: int) -> list[Task]:
    """A sweep of one model; of a quantized checkpoint where there is one."""
    int8 = {"data": None, "samples": 8, "method": "mse", "skip_layers": []}
    how: dict[str, dict[str, Any]] = {
        "bisect": {"rtol": None, "atol": None, "explain": True, "calibration": int8},
        "eval": {"data_root": None, "sweeps": 9, "skip_missing": False, "calibration": int8},
        "sensitivity": {"batches": 8, "method": "mse"},
    }
    grid = Grid([model], parse_backends("torch,emu-fp16"), samples=scenes, how=how[kind])
    if kind == "sensitivity":
        return list(sensitivity.tasks(grid, [quantized] if quantized else ()))
    return list({"bisect": bisecting, "eval": evaluating}[kind].tasks(grid))


def measured(tasks: list[Task], workers: int, warm: Task | None = None) -> tuple[float, str, list[float]]:
    """Seconds, the results as text, seconds of each task; after ``warm`` on every worker, else with their start.

    Workers share exports and calibrations, as those of the command do.
    """
    with ExitStack() as stack:
        shared = stack.enter_context(tempfile.TemporaryDirectory())
        tasks = [replace(task, params={**task.params, "shared": shared}) for task in tasks]
        log = stack.enter_context(SweepLog(Path(stack.enter_context(tempfile.TemporaryDirectory())) / "log.jsonl"))
        if warm is None:
            finished = run(lambda: tasks, log, lambda gpu: local_workers(workers, gpu=gpu))
        else:
            client = stack.enter_context(local_workers(workers))
            client.run(run_task, warm.kind, {**warm.params, "shared": shared})
            finished = run(lambda: tasks, log, lambda gpu: nullcontext(client))
        assert not finished.failures(), finished.failures()[0]
        found = {record["key"]: record for record in finished.results()}
    return finished.seconds, as_text({k: r["result"] for k, r in found.items()}), [r["seconds"] for r in found.values()]


def as_text(results: dict[str, Any]) -> str:
    """Equal for equal bits."""
    return json.dumps(results, sort_keys=True)


def start_up(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """The command with two workers against one, from the shell's prompt to the next: all that a user waits for.

    The load of the machine is told, as other processes on the same cores make both figures worthless.
    """
    found: dict[str, Any] = {"scenes": options.scenes, "kind": options.kind, "model": options.model, "runs": []}
    command = "from cp_debug.cli.main import main; main()"
    flags = [options.model, "-n", options.scenes]
    if options.kind == "sensitivity":
        flags += ["--from", options.quantized] if options.quantized else ["--calib-samples", 8]
    else:
        flags += ["-b", "torch,emu-fp16"]
    results = set()
    for workers in (1, 2):
        with tempfile.TemporaryDirectory() as folder:
            log, load, start = Path(folder) / "log.jsonl", os.getloadavg()[0], time.perf_counter()
            where = ["--workers", workers, "--log", log, "--json", Path(folder) / "sweep.json"]
            line = [sys.executable, "-c", command, "sweep", options.kind, *flags, *where]
            done = subprocess.run([str(each) for each in line], capture_output=True, text=True)
            seconds = time.perf_counter() - start
            assert done.returncode in (0, 1), done.stderr
            records = [json.loads(text) for text in log.read_text().splitlines()[1:]]
        results.add(as_text({record["key"]: record["result"] for record in records}))
        found["runs"].append(
            {
                "workers": workers,
                "seconds": round(seconds, 2),
                "in_tasks": round(sum(record["seconds"] for record in records), 2),
                "load_before": round(load, 2),
            }
        )
    one, two = (run["seconds"] for run in found["runs"])
    found |= {"ratio": round(one / two, 3), "same_bits": len(results) == 1}
    console.print(found)
    return found


def scaling(tasks: list[Task], title: str, console: Console) -> None:
    """Two workers against one, and both against a loop in this process."""
    torch.set_num_threads(1)  # as on the workers
    warm = replace(tasks[0], params={**tasks[0].params, "index": WARM})
    run_task(warm.kind, warm.params)
    start = time.perf_counter()
    serial = as_text({task.key: run_task(task.kind, task.params)["result"] for task in tasks})
    loop = time.perf_counter() - start
    cold = {workers: measured(tasks, workers) for workers in (1, 2)}
    warmed = {workers: measured(tasks, workers, warm) for workers in (1, 2)}
    same = all(text == serial for found in (cold, warmed) for _, text, _ in found.values())
    table = Table(title, "with start-up", "without", "one task")
    table.add_row("a loop, no queue", "", f"{loop:.1f} s", f"{loop / len(tasks):.2f} s")
    for workers, (seconds, _, each) in warmed.items():
        name = f"{workers} worker{'s' if workers > 1 else ''}"
        table.add_row(name, f"{cold[workers][0]:.1f} s", f"{seconds:.1f} s", f"{sum(each) / len(each):.2f} s")
    table.add_row("2 against 1", *(f"{found[1][0] / found[2][0]:.2f}×" for found in (cold, warmed)))
    console.print(table)
    console.print(f"results identical to the loop, bit for bit: {'yes' if same else 'NO'}")


def queue(count: int, address: str | None, path: Path | None = None) -> dict[str, float]:
    """Tiny tasks in this process, which is the client: seconds a task, processor seconds of client and scheduler, and
    resident memory before and at its highest. ``path``: a log that stays, and is gone on with."""
    import psutil

    process, highest = psutil.Process(), 0

    def look(progress: object) -> None:
        nonlocal highest
        highest = max(highest, process.memory_info().rss)

    with tempfile.TemporaryDirectory() as folder, SweepLog(path or Path(folder) / "log.jsonl") as log:
        with remote_workers(address) if address else local_workers(2) as client:
            warm = [Task("sweep:tiny", {"i": -i - 1, "label": "warm"}) for i in range(200)]
            run(lambda: warm, log, lambda gpu: nullcontext(client))
            before, used = process.memory_info().rss, (time.process_time(), client.run_on_scheduler(time.process_time))
            finished = run(lambda: tiny_tasks(count), log, lambda gpu: nullcontext(client), on_progress=look)
            own, scheduler = time.process_time() - used[0], client.run_on_scheduler(time.process_time) - used[1]
        assert sum(1 for _ in finished.results()) == count
    ran = finished.ran
    cost = {"seconds": finished.seconds / ran, "client": own / ran, "scheduler": scheduler / ran}
    return {**cost, "before": before / 2**20, "highest": highest / 2**20, "ran": ran}


def queue_table(console: Console) -> None:
    """Each row in a fresh process: the scheduler in the client, as ``--workers`` has it, and elsewhere."""
    headers = ("a task", "client's processor", "scheduler's", "client's memory before", "highest")
    table = Table("tiny tasks", "scheduler", *headers, box=None)
    for where in ("in the client", "a process"):
        for count in (1000, 10_000):
            with cluster() if where == "a process" else nullcontext("") as address:
                command = [sys.executable, __file__, "--one", str(count), "--address", address]
                found = json.loads(subprocess.run(command, check=True, capture_output=True).stdout.splitlines()[-1])
            costs = [f"{1e3 * found[name]:.2f} ms" for name in ("seconds", "client", "scheduler")]
            if where == "in the client":
                costs[-1] = "the same"
            memory = (f"{found[name]:.0f} MiB" for name in ("before", "highest"))
            table.add_row(f"{count:,}", where, *costs, *memory)
    console.print(table)


def resumed(count: int, console: Console) -> dict[str, Any]:
    """``count`` tiny tasks by a client that is killed when two fifths of them are done, and by one that goes on."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "log.jsonl"
        command = [sys.executable, __file__, "--one", str(count), "--log", str(path)]
        start = time.perf_counter()
        first = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)
        while not path.is_file() or path.read_bytes().count(b"\n") < 0.4 * count:
            time.sleep(2)
        os.killpg(first.pid, signal.SIGKILL)
        first.wait()
        killed, logged = time.perf_counter() - start, path.read_bytes().count(b"\n")
        done = subprocess.run(command, check=True, capture_output=True)
        after = json.loads(done.stdout.splitlines()[-1])
        found = {
            "tasks": count, "killed_after_seconds": round(killed, 1), "logged_when_killed": logged,
            "ran_afterwards": after.pop("ran"), "afterwards": after, "log_bytes": path.stat().st_size,
            "load": os.getloadavg()[0],
        }  # fmt: skip
    console.print(found)
    return found


@contextmanager
def cluster() -> Iterator[str]:
    """``dask scheduler`` and two workers, as processes of their own; gives the address."""
    with ExitStack() as stack:
        file = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "scheduler.json"

        def start(*command: str) -> None:
            dask = [sys.executable, "-m", "dask", *command, "--scheduler-file", str(file)]
            process = subprocess.Popen(dask, stderr=subprocess.DEVNULL, cwd=Path(__file__).parent)
            stack.callback(process.wait)
            stack.callback(process.kill)

        start("scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard")
        while not file.is_file() or not file.stat().st_size:
            time.sleep(0.1)
        for _ in range(2):
            start("worker", "--nthreads", "1", "--no-nanny", "--no-dashboard")
        yield json.loads(file.read_text())["address"]


def main() -> None:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=("sensitivity", "bisect", "eval"), default="sensitivity")
    parser.add_argument("-n", "--scenes", type=int, default=8)
    parser.add_argument("--model", default="centerpoint:tiny")
    parser.add_argument("--from", dest="quantized", type=Path, help="Quantized checkpoint, for sensitivity.")
    parser.add_argument("--only", choices=("scaling", "start-up", "queue", "resumed"))
    parser.add_argument("--json", type=Path, help="Of start-up and resumed, the figures.")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--address", help=argparse.SUPPRESS)
    parser.add_argument("--log", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(queue(options.one, options.address, options.log)))
        return
    console = Console()
    if options.only in ("start-up", "resumed"):
        found = start_up(options, console) if options.only == "start-up" else resumed(100_000, console)
        if options.json:
            options.json.write_text(json.dumps(found, indent=1) + "\n")
        return
    if options.only != "queue":
        tasks = tasks_of(options.kind, options.model, options.quantized, options.scenes)
        scaling(tasks, f"{options.kind}, {options.scenes} scenes", console)
    if options.only in (None, "queue"):
        queue_table(console)


if __name__ == "__main__":
    main()
