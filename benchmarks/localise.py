"""Does ``bisect`` name the layers that were spoilt, those and no others? Random networks with known faults, in one run.

Each faulty case is a random network (``random_graphs.py``) of which one to three layers are spoilt
(``random_faults.py``): the set of guilty layers must equal the set of injected ones. Each healthy case runs a network
on a backend with nothing injected: no layer may be guilty. Nobody gives a tolerance.

    python benchmarks/localise.py                 # 300 faulty and 100 healthy cases
    python benchmarks/localise.py --cases 20      # a quick look
    python benchmarks/localise.py --polygraphy 2  # also Polygraphy's `debug reduce` on 2 cases (minutes)
    python benchmarks/localise.py --cost          # only the cost of a bisect, on a SECOND network

Targets: at least 99 % of the faulty cases exactly right, no guilty layer in the healthy ones.
"""

from __future__ import annotations

import argparse
import collections
import json
import multiprocessing
import os
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from localise_cost import measure_cost
from localise_polygraphy import INSIDE, debug_reduce
from random_faults import Injected, inject
from random_graphs import FAMILIES, build, torch_net
from rich.console import Console
from rich.table import Table

from cp_debug.bisect.engine import bisect
from cp_debug.bisect.result import TestResult
from cp_debug.graph.graph import Graph
from cp_debug.programs.precision import PRECISIONS
from cp_debug.recipes.torch_callable import TorchModel

TESTS = ("ort-none", "ort-none", "emu-fp16", "emu-tf32", "emu-bf16")
"""Backends of faulty cases, in turn; the reference is ONNX Runtime without optimization."""
HEALTHY = ("ort-none", "ort-basic", "ort-all", "emu-fp32", "emu-tf32", "emu-bf16", "emu-fp16", "emu-fp16acc")
"""Backends of healthy cases, in turn; every tenth case is a torch network on torch against ONNX Runtime."""


@dataclass
class Case:
    """One case and its outcome."""

    seed: int
    family: str
    nodes: int
    backend: str
    injected: list[str]
    kinds: list[str]
    multiples: list[float]
    """Size of each fault, in multiples of the layer's expected rounding."""
    guilty: list[str]
    seconds: float

    @property
    def right(self) -> bool:
        """Whether exactly the injected layers are guilty."""
        return set(self.guilty) == set(self.injected)


def faulty(seed: int, folder: Path) -> Case:
    """A network with one to three faults, on one backend."""
    family, backend = list(FAMILIES)[seed % len(FAMILIES)], TESTS[seed % len(TESTS)]
    path = build(folder / f"{seed}.onnx", family, seed)
    found = inject(path, spoilt := _spoilt(folder, seed), backend, seed)
    start = time.perf_counter()
    result = bisect(str(path), f"ort,{backend}", test_model=spoilt).tests[0]
    return _case(seed, family, path, backend, found, result, time.perf_counter() - start)


def _spoilt(folder: Path, seed: int) -> Path:
    return folder / f"{seed}.spoilt.onnx"


def healthy(seed: int, folder: Path) -> tuple[Case, TestResult]:
    """A network as it is, on one backend."""
    family, backend = list(FAMILIES)[seed % len(FAMILIES)], HEALTHY[seed // len(FAMILIES) % len(HEALTHY)]
    path = build(folder / f"healthy{seed}.onnx", family, seed)
    start = time.perf_counter()
    if seed % 10 == 9:
        backend = ("ort-none", "ort-all")[seed // 10 % 2]
        module, example = torch_net(seed)
        result = bisect(TorchModel(f"torch{seed}", module, example), f"torch,{backend}").tests[0]
        family = type(module).__name__
    else:
        result = bisect(str(path), f"ort,{backend}").tests[0]
    return _case(seed, family, path, backend, [], result, time.perf_counter() - start), result


def _case(
    seed: int, family: str, path: Path, backend: str, found: list[Injected], result: TestResult, seconds: float
) -> Case:
    return Case(
        seed=seed,
        family=family,
        nodes=len(Graph(path).nodes),
        backend=backend,
        injected=[f.value for f in found],
        kinds=[f.kind for f in found],
        multiples=[f.multiple for f in found],
        guilty=[row.onnx for row in result.guilty],
        seconds=seconds,
    )


def excesses(results: list[TestResult]) -> dict[str, dict[str, float]]:
    """Excess of healthy layers by operator: count, median, 99th percentile, maximum; largest range loss, in unit
    roundoffs."""
    found = collections.defaultdict(list)
    for result in results:
        roundoff = PRECISIONS[result.backend.precision].roundoff
        for row in result.rows:
            if row.replay is not None and row.replay.excess:
                found[row.op].append((row.replay.excess, row.replay.range_loss / roundoff))
    tables = {}
    for op, pairs in sorted(found.items()):
        excess, loss = np.array(pairs).T
        tables[op] = {
            "n": len(pairs),
            "median": float(np.median(excess)),
            "p99": float(np.quantile(excess, 0.99)),
            "max": float(excess.max()),
            "range_max": float(loss.max()),
        }
    return tables


def summary(cases: list[Case], title: str) -> Table:
    """Right cases by backend, by family, by number of faults, by kind, and in all."""
    table = Table("", "right", "of", "median s", title=title, box=None)
    groups: dict[str, list[Case]] = collections.defaultdict(list)
    for case in cases:
        close = ["a fault below 30×"] if any(m < 30 for m in case.multiples) else []
        faults = f"{len(case.injected)} fault(s)"
        for name in (case.backend, case.family, faults, *sorted(set(case.kinds)), *close, "all"):
            groups[name].append(case)
    for name, group in sorted(groups.items()):
        seconds = float(np.median([c.seconds for c in group]))
        table.add_row(name, str(sum(c.right for c in group)), str(len(group)), f"{seconds:.2f}")
    return table


def main() -> None:
    """Run the cases, print the tables, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=300, help="faulty cases; a third as many healthy ones")
    parser.add_argument("--seed", type=int, default=0, help="of the first case")
    parser.add_argument("--polygraphy", type=int, default=0, metavar="N", help="also debug reduce on N cases")
    parser.add_argument("--cost", action="store_true", help="only measure the cost of a bisect")
    parser.add_argument("--size", type=int, default=256, help="side of the input for --cost")
    parser.add_argument("--json", type=Path, help="write everything here")
    options = parser.parse_args()
    console = Console()
    if options.cost:
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command line does, before torch is loaded
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            cost = pool.apply(measure_cost, (options.size,))
        console.print_json(json.dumps(cost))
        return
    torch.manual_seed(options.seed)
    with tempfile.TemporaryDirectory(prefix="localise-") as name:
        folder = Path(name)
        cases = [faulty(options.seed + i, folder) for i in range(options.cases)]
        console.print(summary(cases, "faulty cases"))
        runs = [healthy(options.seed + i, folder) for i in range(-(-options.cases // 3))]
        calm, spread = [case for case, _ in runs], excesses([result for _, result in runs])
        console.print(summary(calm, "healthy cases"))
        for case in (c for c in (*cases, *calm) if not c.right):
            console.print(f"wrong: {case}", style="red")
        names = ("median", "p99", "max", "range_max")
        table = Table("operator", "n", *names, title="excess of healthy layers", box=None)
        for op, v in spread.items():
            table.add_row(op, str(v["n"]), *(f"{v[n]:.2f}" for n in names))
        console.print(table)
        shared = [c for c in cases if c.backend == "ort-none" and INSIDE.issuperset(c.kinds)][: options.polygraphy]
        rivals = [
            r for c in shared for r in debug_reduce(folder / f"{c.seed}.onnx", _spoilt(folder, c.seed), c.injected)
        ]
        for rival in rivals:
            console.print(rival)
    right, calm_right = sum(c.right for c in cases), sum(c.right for c in calm)
    console.print(
        f"{right} of {len(cases)} faulty cases exactly right, {calm_right} of {len(calm)} healthy ones silent"
    )
    if options.json:
        document = {
            "faulty": [asdict(c) | {"right": c.right} for c in cases],
            "healthy": [asdict(c) | {"right": c.right} for c in calm],
            "excess": spread,
            "polygraphy": [asdict(r) for r in rivals],
        }
        options.json.write_text(json.dumps(document, indent=1))


if __name__ == "__main__":
    main()
