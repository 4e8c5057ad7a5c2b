"""Healthy networks on real backends: how large is the excess of layers in which nothing is wrong?

Every network runs on ONNX Runtime at three levels of optimization with one thread and with two, and random torch
networks on torch. Each backend is a test of its own: ``emu-fp32`` is the reference, but the excess does not depend on
it. Emulated tests are not among them: what they are expected to introduce is what they introduced, so their excess is
at most 1 whatever happens.

    python benchmarks/healthy.py --networks 16                 # 16 random networks, 8 torch networks, the operators
    python benchmarks/healthy.py --model net.onnx net.npz      # a network and its inputs besides, any number
    python benchmarks/healthy.py --json docs/data/healthy.json  # what is printed, by backend and operator
    python benchmarks/healthy.py --backends torch@cuda,ort@cuda,trt-fp16    # on a GPU: these instead
"""

from __future__ import annotations

import argparse
import collections
import json
import math
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from random_graphs import FAMILIES, build, torch_net
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from healthy_operators import CASES, write

from cp_debug.backends.base import Backend
from cp_debug.backends.kernels import KERNELS
from cp_debug.backends.ort_backend import OrtBackend
from cp_debug.backends.registry import create
from cp_debug.backends.spec import BackendSpec
from cp_debug.bisect.engine import Options, bisect
from cp_debug.bisect.result import TestResult
from cp_debug.errors import CpdebugError
from cp_debug.recipes.base import Model
from cp_debug.recipes.torch_callable import TorchModel

LEVELS = ("ort-none", "ort-basic", "ort-all")
THREADS = (1, 2)
SETS = ("random networks", "hard operators", "networks given")


def networks(count: int, folder: Path, given: list[list[str]]) -> Iterator[tuple[str, str, Path | None]]:
    """(which set, model, inputs)."""
    for seed in range(5000, 5000 + count):
        family = list(FAMILIES)[seed % len(FAMILIES)]
        yield SETS[0], str(build(folder / f"{seed}.onnx", family, seed)), None
    for index, name in enumerate(CASES):
        path, x = write(name, folder / f"case{index}.onnx")
        np.savez(folder / f"case{index}.npz", x=x)
        yield SETS[1], str(path), folder / f"case{index}.npz"
    for model, inputs in given:
        yield SETS[2], model, Path(inputs)


def judged(model: str | Model, inputs: Path | None, tests: list[Backend]) -> list[TestResult]:
    """The tests of one network against ``emu-fp32``, one after the other: specs must differ within a run."""
    options = Options(inputs=inputs, explain=False)
    reference = create(BackendSpec.parse("emu-fp32"))
    return [bisect(model, [reference, test], options=options).tests[0] for test in tests]


def rounds(op: str) -> bool:
    """Whether an operator computes anything: what only moves data has an excess of 0, and would dilute the figures."""
    return op != "input" and (op not in KERNELS or KERNELS[op].rounds)


def figures(excesses: list[float]) -> dict[str, float]:
    """Count, median, 99th percentile and largest, and how many are beyond 2."""
    return {
        "n": len(excesses),
        "median": float(np.median(excesses)),
        "p99": float(np.quantile(excesses, 0.99)),
        "max": max(excesses),
        "beyond_2": sum(e > 2 for e in excesses),
    }


def main() -> None:
    """Run the networks and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", type=int, default=16, help="random networks; half as many torch networks")
    parser.add_argument("--model", nargs=2, action="append", default=[], metavar=("ONNX", "NPZ"))
    parser.add_argument("--backends", help="specs, each a test by itself, instead of ONNX Runtime's levels and torch")
    parser.add_argument("--first", type=int, help="the first so many networks of each set alone")
    parser.add_argument("--minutes", type=float, default=1e9, help="begin no network after so many")
    parser.add_argument("--json", type=Path, help="write the tables here, after each network")
    options = parser.parse_args()
    start = time.monotonic()
    found: dict[tuple[str, str], list[float]] = collections.defaultdict(list)
    operators: dict[str, list[float]] = collections.defaultdict(list)
    runs, accused = collections.Counter[tuple[str, str]](), list[dict[str, Any]]()
    failed: list[dict[str, str]] = []

    def add(group: str, backend: str, name: str, result: TestResult) -> None:
        runs[group, backend] += 1
        for row in result.rows:
            if row.replay is not None and row.replay.excess is not None and rounds(row.op):
                found[group, backend].append(row.replay.excess)
                operators[row.op].append(row.replay.excess)
        accused.extend(
            {"network": name, "backend": backend, "layer": row.name, "op": row.op, "why": row.why, "side": row.side}
            for row in result.guilty
        )

    def save() -> None:
        if options.json:
            document = {
                "runs": {f"{g}: {b}": n for (g, b), n in runs.items()},
                **{title: {label: figures(values) for label, values in groups.items()} for title, groups in tables()},
                "accused": accused,
                "failed": failed,
            }
            options.json.write_text(json.dumps(document, indent=1) + "\n")

    def tables() -> list[tuple[str, dict[str, list[float]]]]:
        by_backend = {f"{g}: {b}": v for (g, b), v in found.items() if v}
        return [("backend", by_backend), ("operator", dict(sorted(operators.items())))]

    torch.manual_seed(0)
    with tempfile.TemporaryDirectory(prefix="healthy-") as folder:
        tests: list[Backend] = [OrtBackend(BackendSpec.parse(s), threads=n) for n in THREADS for s in LEVELS]
        labels = [f"{level}, {n} thread{'s' * (n > 1)}" for n in THREADS for level in LEVELS]
        of_modules = ["torch"]
        if options.backends:
            labels = options.backends.split(",")
            tests = [create(BackendSpec.parse(s)) for s in labels]
            of_modules = [s for s in labels if s.startswith("torch")]
        counts = collections.Counter[str]()
        for group, model, inputs in networks(options.networks, Path(folder), options.model):
            counts[group] += 1
            if (options.first or math.inf) < counts[group] or time.monotonic() - start > 60 * options.minutes:
                continue
            for label, test in zip(labels, tests, strict=True):
                try:
                    add(group, label, Path(model).stem, *judged(model, inputs, [test]))
                except CpdebugError as error:  # an operator that a backend lacks
                    failed.append({"network": Path(model).stem, "backend": label, "error": str(error)[:300]})
            save()
        for seed in range(options.networks // 2):
            module, example = torch_net(seed * 10 + 5)
            name = f"torch{seed}"
            for spec in of_modules:
                add(
                    SETS[0],
                    spec,
                    name,
                    *judged(TorchModel(name, module, example), None, [create(BackendSpec.parse(spec))]),
                )
    console = Console(width=120)
    for title, groups in tables():
        table = Table(title, "layers", "median", "99 %", "largest", "beyond 2", box=None)
        for label, values in groups.items():
            f = figures(values)
            table.add_row(label, str(f["n"]), *(f"{f[k]:.2f}" for k in ("median", "p99", "max")), str(f["beyond_2"]))
        console.print(table)
    console.print(f"{sum(runs.values())} runs, {len(accused)} layers accused, {len(failed)} runs refused")
    for entry in (*accused, *failed):
        console.print(entry, style="red")
    save()


if __name__ == "__main__":
    main()
