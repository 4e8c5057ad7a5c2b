"""How a sweep would scale to 1,000 workers: a simulation of the queue from the prices that ``sweep.py`` measures.

The client and the scheduler are one server that handles one task at a time, ``--overhead`` seconds each (submit, send,
gather, log), in the order in which the workers ask. A worker first asks after ``--start`` seconds (imports, the model,
its export), then whenever its task is done; the seconds of a task are drawn around ``--task`` with ``--spread``
(log-normal), as scenes differ. Ideal is the work divided by the workers.

    python benchmarks/sweep_scale.py
    python benchmarks/sweep_scale.py --task 0.3 --overhead 0.003    # tasks too small for many workers
"""

from __future__ import annotations

import argparse
import heapq

import numpy as np
from rich.console import Console
from rich.table import Table

WORKERS = (1, 2, 8, 64, 256, 1000)


def simulate(workers: int, seconds: np.ndarray, overhead: float, start: float) -> float:
    """Seconds until the last result is handled."""
    free = [start] * workers  # when each worker asks
    server = 0.0
    for task in seconds:
        asked = heapq.heappop(free)
        server = max(server, asked) + overhead
        heapq.heappush(free, server + task)
    return max(free)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", type=float, default=3.0, help="Median seconds of a task.")
    parser.add_argument("--spread", type=float, default=0.3, help="Standard deviation of its logarithm.")
    parser.add_argument("--overhead", type=float, default=0.0033, help="Seconds of the client and scheduler a task.")
    parser.add_argument("--start", type=float, default=20.0, help="Seconds until a worker is ready.")
    parser.add_argument("--tasks", type=int, default=100_000)
    options = parser.parse_args()
    seconds = options.task * np.exp(options.spread * np.random.default_rng(0).standard_normal(options.tasks))
    console = Console()
    console.print(
        f"{options.tasks:,} tasks of {options.task:g} s, {1e3 * options.overhead:g} ms of the queue each, "
        f"start {options.start:g} s; the queue is full from {options.task / options.overhead:,.0f} workers on"
    )
    table = Table("workers", "hours", "speed-up", "of ideal", "10 × longer tasks")
    for workers in WORKERS:
        took = simulate(workers, seconds, options.overhead, options.start)
        longer = simulate(workers, 10 * seconds, options.overhead, options.start)
        speed = seconds.sum() / took
        ideal = f"{10 * seconds.sum() / longer / workers:.0%}"
        table.add_row(f"{workers:,}", f"{took / 3600:.2f}", f"{speed:,.0f}×", f"{speed / workers:.0%}", ideal)
    console.print(table)


if __name__ == "__main__":
    main()
