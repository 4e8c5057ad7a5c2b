"""``compare`` against Polygraphy's default comparison and against reading the same bytes: ratios of one run.

48 float32 tensors with the shapes of SECOND on a 512×512 canvas (16 × convolution, batch norm, ReLU), in two runs:
856 MB, in memory. The rounds are interleaved and the best of each is kept, so that a busy machine spoils all alike.
The raw read is one numpy sum. Extra memory is
the peak of the resident set during a comparison less what was resident before (Linux only).

Targets: at least 10 times faster than Polygraphy, at most 32 MiB of extra memory. A compiled pass was 100 times faster,
and a whole bisect no shorter for it: loading the compiler took as long as it saved.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import polygraphy
from polygraphy.comparator import Comparator, IterationResult, RunResults
from rich.console import Console
from rich.table import Table

from cp_debug.probes.statistics import compare

BLOCKS = ((4, 64, 256), (6, 128, 128), (6, 256, 64))
"""SECOND with a canvas of 512×512: convolutions, channels, side of the feature map."""
Run = dict[str, np.ndarray]
FASTER = 10.0
"""How many times faster than Polygraphy the comparison is to be."""


def make_runs() -> tuple[Run, Run]:
    """Two runs of 48 tensors that differ by about 1e-3 of their size; half of what follows a ReLU is zero."""
    rng = np.random.default_rng(0)
    ref: Run = {}
    test: Run = {}
    for block, (convolutions, channels, side) in enumerate(BLOCKS):
        for layer in range(convolutions):
            for kind in ("conv", "bn", "relu"):
                values = rng.standard_normal((1, channels, side, side), np.float32)
                noise = rng.standard_normal(values.shape, np.float32)
                name = f"blocks.{block}.{layer}.{kind}"
                ref[name], test[name] = values, values + np.float32(1e-3) * noise
                if kind == "relu":
                    for run in (ref, test):
                        np.maximum(run[name], 0, out=run[name])
    return ref, test


def by_cpdebug(ref: Run, test: Run) -> None:
    """What is measured."""
    for name in ref:
        compare(ref[name], test[name])


def by_polygraphy(ref: Run, test: Run) -> None:
    """Polygraphy's default comparison; its report goes nowhere."""
    results = RunResults()
    for runner, run in (("ref", ref), ("test", test)):
        results.append((runner, [IterationResult(outputs=run, runner_name=runner)]))
    with (
        Path(os.devnull).open("w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        Comparator.compare_accuracy(results)


def read_plainly(ref: Run, test: Run) -> None:
    """One sum a tensor."""
    for run in (ref, test):
        for array in run.values():
            array.sum()


def extra_memory(method: Callable[[], None]) -> int | None:
    """Bytes by which the resident set grows at most while ``method`` runs, or None where the kernel does not tell."""
    status = Path("/proc/self/status")
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    except OSError:
        return None

    def read(field: str) -> int:
        return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith(field))

    before = read("VmRSS")
    method()
    return read("VmHWM") - before


def measure(rounds: int) -> dict[str, Any]:
    """Everything that is printed."""
    ref, test = make_runs()
    methods = {
        "cpdebug": (by_cpdebug, 5),
        "raw read": (read_plainly, 5),
        "polygraphy": (by_polygraphy, 1),
    }
    extra = {name: extra_memory(partial(method, ref, test)) for name, (method, _) in methods.items()}
    seconds = dict.fromkeys(methods, float("inf"))
    for _ in range(rounds):
        for name, (method, times) in methods.items():
            for _ in range(times):
                start = time.perf_counter()
                method(ref, test)
                seconds[name] = min(seconds[name], time.perf_counter() - start)
    faster, raw_reads = seconds["polygraphy"] / seconds["cpdebug"], seconds["cpdebug"] / seconds["raw read"]
    return {
        "tensors": len(ref),
        "bytes": sum(array.nbytes for run in (ref, test) for array in run.values()),
        "cpus": os.cpu_count(),
        "polygraphy": polygraphy.__version__,
        "seconds": seconds,
        "extra_bytes": extra,
        "faster_than_polygraphy": faster,
        "raw_reads": raw_reads,
        "met": faster >= FASTER and (extra["cpdebug"] or 0) <= 32 * 2**20,
    }


def main() -> None:
    """Measure and print a table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2, help="how often each method has its turn (default 2)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    options = parser.parse_args()
    result = measure(options.rounds)
    if options.json:
        print(json.dumps(result, indent=1))
        return
    table = Table(title=f"{result['tensors']} tensor pairs, {result['bytes'] / 1e6:.0f} MB, {result['cpus']} CPUs")
    for column in ("method", "seconds", "× cpdebug", "extra memory"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for name, value in result["seconds"].items():
        extra = result["extra_bytes"][name]
        memory = "?" if extra is None else f"{extra / 2**20:.1f} MiB"
        table.add_row(name, f"{value:.3f}", f"{value / result['seconds']['cpdebug']:.2f}", memory)
    console = Console()
    console.print(table)
    verdict = "met" if result["met"] else "MISSED"
    console.print(
        f"{result['faster_than_polygraphy']:.0f} times faster than Polygraphy {polygraphy.__version__} "
        f"(target {FASTER:g}), {result['raw_reads']:.1f} times one read of the tensors: {verdict}."
    )


if __name__ == "__main__":
    main()
