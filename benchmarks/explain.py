"""Does ``bisect`` say the right cause? Random networks with known faults, and networks without any, in one run.

Each faulty case is a random network (``random_graphs.py``) with one to three faults of the fault library
(``random_faults.py``), or one of whose nodes is computed in another precision than the backend claims; cases are drawn
until ``--faults`` faults have been judged. A fault counts as right when the finding that names its layer has a cause
that says what was done; ``KINDS`` lists them. Noise on a whole tensor has no cause: ``unknown`` is right there. A layer
that ``bisect`` does not call guilty has nothing to be explained and is counted apart. Healthy cases must have no
finding, but that the declared precision adds up to more than the tolerance.

    python benchmarks/explain.py                 # 300 faults, 60 healthy runs
    python benchmarks/explain.py --faults 40     # a quick look
    python benchmarks/explain.py --library       # also every fault of `faults/catalog.py`, on centerpoint:tiny

Targets: at least 95 % named right, most of the rest "unknown", no cause in the healthy runs.
"""

from __future__ import annotations

import argparse
import collections
import json
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from faults.catalog import FAULTS
from faults.precision import LoweredBackend
from localise import TESTS, healthy
from random_faults import inject
from random_graphs import FAMILIES, build
from rich.console import Console
from rich.table import Table

from cp_debug.backends.kernels.fp16_accumulation import BLOCK
from cp_debug.backends.registry import create
from cp_debug.backends.spec import BackendSpec
from cp_debug.bisect.engine import bisect
from cp_debug.bisect.finding import UNKNOWN
from cp_debug.bisect.result import TestResult
from cp_debug.graph.graph import Graph, Node
from cp_debug.graph.operators import PRODUCTS

KINDS: dict[str, set[str]] = {
    "scale": {"scaled"},
    "offset": {"shifted"},
    "noise": {UNKNOWN},
    "one element": {"isolated"},
    "clip": {"saturated"},
    "int8 scale": {"int8", "int8-clipped", "int8-per-tensor"},
    "stored in fp16": {"fp16"},
    "stored in bf16": {"bf16"},
    "weight scale": {"weights-scaled"},
    "channel scale": {"channels-scaled"},
    "padding": {"padding"},
    "bias scale": {"bias-scaled"},
    "stale statistics": {"batchnorm-statistics"},
    "epsilon": {"normalization-eps"},
    "left out": {"missing-activation", "missing-operator"},
    "channels swapped": {"permuted"},
    "transposed": {"transposed"},
    "0·Inf": {"times-infinity"},
    "tf32": {"tf32"},
    "fp16": {"fp16"},
    "bf16": {"bf16"},
    "fp16acc": {"fp16-accumulation"},
}
"""Fault → the causes that say it."""
LIBRARY = {
    "weight-scale": {"weights-scaled"},
    "bn-eps": {"normalization-eps"},
    "stale-statistics": {"batchnorm-statistics"},
    "swapped-dimensions": {"permuted"},
    "features-reshaped": {"another-tensor"},
    "features-transposed": {"transposed"},
    "wrong-padding": {"padding"},
    "missing-sigmoid": {"missing-activation"},
    "fp16-overflow": {"fp16-overflow"},
    "fp16-underflow": {"fp16-underflow"},
    "zero-times-infinity": {"times-infinity"},
    "int8-clipped": {"int8-clipped"},
    "tf32": {"tf32"},
    "fp16-layer": {"fp16"},
    "bf16-layer": {"bf16"},
    "two-faults": {"weights-scaled", "channels-scaled"},
    "three-faults": {"weights-scaled", "bf16", "shifted"},
}
"""Fault of the library → its causes, all of which must be found."""


@dataclass
class Judged:
    """One fault and what was said of it."""

    seed: int
    family: str
    op: str
    shape: list[int]
    backend: str
    kind: str
    said: str
    explained: float | None
    runner_up: str | None
    runner_up_explained: float | None
    text: str
    multiple: float

    @property
    def right(self) -> bool:
        """Whether the cause says what was done."""
        return self.said in KINDS[self.kind]


@dataclass
class Case:
    """One bisect: the faults that were judged, and how many layers at fault were not called guilty."""

    faults: list[Judged]
    missed: int
    seconds: float


def edited(seed: int, folder: Path) -> Case:
    """One to three faults in the graph."""
    family, backend = list(FAMILIES)[seed % len(FAMILIES)], TESTS[seed % len(TESTS)]
    path = build(folder / f"{seed}.onnx", family, seed)
    spoilt = folder / f"{seed}.spoilt.onnx"
    injected = {f.value: (f.kind, f.multiple) for f in inject(path, spoilt, backend, seed)}
    start = time.perf_counter()
    test = bisect(str(path), f"ort,{backend}", test_model=spoilt).tests[0]
    return _case(seed, family, backend, injected, test, time.perf_counter() - start)


def lowered(seed: int, folder: Path) -> Case:
    """One node in another precision than FP32."""
    rng = np.random.default_rng([seed, 2])
    family = list(FAMILIES)[seed // len(TESTS) % len(FAMILIES)]
    path = build(folder / f"{seed}.onnx", family, seed)
    nodes = [n for n in Graph(path).nodes if n.op in PRODUCTS]
    node, precision = nodes[rng.integers(len(nodes))], str(rng.choice(["tf32", "fp16", "bf16", "fp16acc"]))
    if precision == "fp16acc" and _reduction(Graph(path), node) <= BLOCK:
        precision = "fp16"  # a sum of one block is rounded once: the bits are the same
    backends = [create(BackendSpec.parse("ort")), LoweredBackend(lambda program: {node.name: precision})]
    start = time.perf_counter()
    test = bisect(str(path), backends).tests[0]
    injected = {node.outputs[0]: (precision, 1.0)}
    return _case(seed, family, "emu-fp32", injected, test, time.perf_counter() - start)


def _reduction(graph: Graph, node: Node) -> int:
    """How many products an element sums, where a weight tells; 0 for a product of two activations."""
    weights = [graph.initializer(i) for i in node.inputs[1:2] if i in graph.initializers]
    if not weights:
        return 0
    return len(weights[0]) if node.op in ("MatMul", "Gemm", "ConvTranspose") else weights[0][0].size


def _case(
    seed: int, family: str, backend: str, injected: dict[str, tuple[str, float]], test: TestResult, seconds: float
) -> Case:
    rows = {row.name: row for row in test.rows}
    judged = []
    for finding in test.findings:
        for name in finding.layers:
            row = rows[name]
            if row.onnx in injected:
                kind, multiple = injected.pop(row.onnx)
                near = (finding.explained, finding.runner_up, finding.runner_up_explained, finding.says)
                about = (seed, family, row.op, list(row.stats.shape), backend, kind)
                judged.append(Judged(*about, finding.cause, *near, multiple))
    return Case(judged, len(injected), seconds)


def library(console: Console) -> tuple[int, int]:
    """Every fault of the library on the built-in model; (right, all)."""
    right = 0
    for name, fault in FAULTS.items():
        seeded = fault.seed()
        test = bisect(seeded.model, seeded.backends, test_model=seeded.test_model).tests[0]
        said = {finding.cause for finding in test.findings}
        right += said == LIBRARY[name]
        console.print(f"{name}: {', '.join(sorted(said))}", style=None if said == LIBRARY[name] else "red")
    return right, len(FAULTS)


def summary(faults: list[Judged]) -> Table:
    """Right, unknown and wrong by kind of fault and in all."""
    table = Table("", "right", "unknown", "wrong", "of", box=None)
    groups: dict[str, list[Judged]] = collections.defaultdict(list)
    for fault in faults:
        for name in (fault.kind, fault.backend, fault.family, "all"):
            groups[name].append(fault)
    for name, group in sorted(groups.items(), key=lambda item: item[0] == "all"):
        right = sum(f.right for f in group)
        unknown = sum(not f.right and f.said == UNKNOWN for f in group)
        table.add_row(name, str(right), str(unknown), str(len(group) - right - unknown), str(len(group)))
    return table


def main() -> None:
    """Run the cases, print the table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=300, help="faults to judge; a fifth as many healthy runs")
    parser.add_argument("--seed", type=int, default=0, help="of the first case")
    parser.add_argument("--library", action="store_true", help="also the fault library on centerpoint:tiny (minutes)")
    parser.add_argument("--json", type=Path, help="write everything here")
    options = parser.parse_args()
    console = Console()
    cases: list[Case] = []
    with tempfile.TemporaryDirectory(prefix="explain-") as name:
        folder, seed = Path(name), options.seed
        while sum(len(c.faults) for c in cases) < options.faults:
            cases.append(lowered(seed, folder) if seed % 4 == 3 else edited(seed, folder))
            seed += 1
        calm = [healthy(options.seed + i, folder)[1] for i in range(options.faults // 5)]
    faults = [fault for case in cases for fault in case.faults]
    console.print(summary(faults))
    for fault in (f for f in faults if not f.right):
        console.print(f"{'unknown' if fault.said == UNKNOWN else 'wrong'}: {fault}", style="red")
    claimed = [finding for test in calm for finding in test.findings if not finding.evidence.get("declared")]
    for finding in claimed:
        console.print(f"claimed on a healthy run: {finding.cause} {finding.layers[:3]}", style="red")
    right = sum(fault.right for fault in faults)
    console.print(
        f"{right} of {len(faults)} causes right ({right / len(faults):.1%}); {sum(c.missed for c in cases)} further "
        f"faults in layers that are not guilty; {len(claimed)} causes claimed in {len(calm)} healthy runs; "
        f"median {np.median([c.seconds for c in cases]):.2f} s a case"
    )
    if options.library:
        found = library(console)
        console.print(f"{found[0]} of {found[1]} faults of the library explained right")
    if options.json:
        document = [asdict(fault) | {"right": fault.right} for fault in faults]
        options.json.write_text(json.dumps(document, indent=1))


if __name__ == "__main__":
    main()
