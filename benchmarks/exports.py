"""Does ``bisect -b torch,ort`` name the one operator that torch exports wrongly, and nobody where none is?

Single operators of ATen with unusual arguments (``exports_operators.py``), each in the middle of a network of ten
layers, are exported by both exporters. Those whose result in ONNX Runtime is not torch's are the faults, told by the
outputs of a plain run of the exported file; all others are healthy. A fault is named where all guilty layers belong to
the operator, and the region holds at most 3 operators of torch or 3 nodes.

    python benchmarks/exports.py --json FILE       # goes on where it stopped; a line of JSON a case
    python benchmarks/exports.py --only 'roll'     # these alone, told at length

Targets: of the faults at least 95 % named, none called "agrees"; of the healthy none accused.
"""

from __future__ import annotations

import argparse
import collections
import json
import tempfile
import time
import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import onnxruntime as ort
import torch
import torch.nn.functional as F
from exports_operators import OPERATORS, Operator
from rich.console import Console
from torch import Tensor, nn

from cp_debug.api.diagnose import diagnose
from cp_debug.bisect.options import Options
from cp_debug.errors import CpdebugError
from cp_debug.programs.export import EXPORTERS, export

RTOL, ATOL = 1e-4, 1e-6
"""Tolerance of FP32, by which an output is within or not."""
SMALL = 3
"""Operators of torch, or nodes, that a region may hold to count as named."""


class Middle(nn.Module):
    """The operator, as a part of its own, so that everything in it has its path."""

    def __init__(self, operator: Operator) -> None:
        super().__init__()
        self.operator = operator

    def forward(self, x: Tensor) -> Tensor:
        return self.operator(x)


class Network(nn.Module):
    """Linear, GELU, LayerNorm, Linear, the operator, Linear, GELU, LayerNorm, Linear, Tanh, Linear."""

    def __init__(self, operator: Operator) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.a, self.n1, self.b, self.op = nn.Linear(6, 16), nn.LayerNorm(16), nn.Linear(16, 16), Middle(operator)
        self.c, self.n2 = nn.LazyLinear(16), nn.LayerNorm(16)
        self.d, self.e = nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.op(self.b(self.n1(F.gelu(self.a(x))))).float()
        y = y.reshape(1, -1) if y.dim() < 2 else y
        y = self.d(self.n2(F.gelu(self.c(y))))
        result: Tensor = self.e(torch.tanh(y))
        return result


@dataclass
class Case:
    """One operator by one exporter."""

    operator: str
    exporter: str
    kind: str = ""
    """``fault``, ``healthy``, ``near`` (beyond the tolerance, below 1e-3), or why there is nothing to compare."""
    off: float | None = None
    """Relative L2 distance of the outputs of the exported file, in ONNX Runtime, from torch's."""
    agrees: bool | None = None
    guilty: list[str] = field(default_factory=list)
    sides: list[str] = field(default_factory=list)
    says: list[str] = field(default_factory=list)
    calls: int = 0
    nodes: int = 0
    seconds: float = 0.0
    right: bool | None = None


def network(name: str) -> tuple[nn.Module, Tensor]:
    """The network around an operator, and its input [2, 9, 6]."""
    module, x = Network(OPERATORS[name]).eval(), torch.randn(2, 9, 6, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        module(x)
    return module, x


def run(name: str, exporter: str) -> Case:
    """Export, run and bisect one case."""
    case = Case(name, exporter)
    try:
        module, x = network(name)
        with torch.no_grad():
            right = module(x).numpy()
    except Exception as error:
        case.kind = f"not run by torch: {type(error).__name__}: {str(error).splitlines()[0][:100]}"
        return case
    if not np.isfinite(right).all():
        case.kind = "not run by torch: NaN or Inf"
        return case
    with tempfile.TemporaryDirectory() as folder:
        try:
            path = export(
                module, (x,), Path(folder) / "n.onnx", input_names=["x"], output_names=["y"], exporter=exporter
            )
        except CpdebugError as error:
            case.kind = f"not exported: {str(error)[:160]}"
            return case
        try:
            options = ort.SessionOptions()
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
            options.intra_op_num_threads = 1
            (given,) = ort.InferenceSession(path, options).run(None, {"x": x.numpy()})
        except Exception as error:
            case.kind = f"not run by ONNX Runtime: {str(error).splitlines()[0][:160]}"
            return case
    if given.shape != right.shape:
        case.off = float("inf")
    else:
        case.off = float(np.linalg.norm(given - right) / np.linalg.norm(right))
    within = given.shape == right.shape and np.abs(given - right).max() <= ATOL + RTOL * np.abs(right).max()
    case.kind = "healthy" if within else "fault" if not case.off < 1e-3 else "near"
    start = time.perf_counter()
    try:
        result = diagnose(
            module, "torch,ort", inputs=(x,), options=Options(exporter=exporter, cache=False), progress=False
        )
    except CpdebugError as error:
        case.says, case.right = [f"{type(error).__name__}: {error}"], False
        return case
    case.seconds = round(time.perf_counter() - start, 2)
    (test,) = result.tests
    case.agrees, case.guilty = test.agrees, [row.name for row in test.guilty]
    case.sides = [row.side for row in test.guilty]
    first = test.first_divergent
    case.says = [f.headline for f in test.findings] or ([] if first is None else [first.why])
    case.calls = max((len(f.evidence.get("calls", [])) for f in test.findings), default=0)
    case.nodes = max((len(row.replay.nodes) for row in test.guilty if row.replay), default=0)
    tied = any("ties are broken differently" in says for says in case.says)
    if case.kind == "fault":
        inside = all(
            row.name == "op" or row.name.startswith(("op/", "op.")) or "(module op" in row.why for row in test.guilty
        )
        small = min(case.calls or SMALL + 1, case.nodes) <= SMALL
        case.right = not case.agrees and (tied or (bool(case.guilty) and inside and small))
    elif case.kind == "healthy":
        case.right = not case.guilty
    return case


def main() -> None:
    """Run the cases that the file lacks, and tell how many were right."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="a line for each case is added here")
    parser.add_argument("--only", help="operators that begin so")
    parser.add_argument("--exporter", choices=EXPORTERS)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    console, done = Console(width=200), {}
    if options.json and options.json.is_file():
        read = [Case(**json.loads(line)) for line in options.json.read_text().splitlines()]
        done = {(case.operator, case.exporter): case for case in read}
    for name in OPERATORS:
        for exporter in (options.exporter,) if options.exporter else EXPORTERS:
            if (name, exporter) in done or (options.only and not name.startswith(options.only)):
                continue
            case = done[name, exporter] = run(name, exporter)
            if options.json:
                with options.json.open("a") as stream:
                    stream.write(json.dumps(asdict(case), ensure_ascii=False) + "\n")
            if options.only or case.right is False:
                console.print(f"{'' if case.right else 'wrong: '}{case}", style=None if case.right else "red")
    groups = collections.defaultdict(list)
    for case in done.values():
        groups[case.kind.partition(":")[0]].append(case)
    for kind, cases in groups.items():
        right = sum(bool(case.right) for case in cases)
        says = f"{right} right, {sum(bool(c.agrees) for c in cases)} agree" if kind in ("fault", "healthy") else ""
        console.print(f"{kind}: {len(cases)} {says}")


if __name__ == "__main__":
    main()
