"""Does ``bisect`` say why a layer in FP8 or 4 bits is wrong? Seeded faults in random networks, and runs without any.

Each case is a random network (``narrow_networks.py``) one of whose products goes wrong in one of the ways in which FP8,
MXFP8, MXFP4, NVFP4 and INT4 go wrong; half of the kinds are departures from what the backend declares, the others are
declarations that do not fit the numbers. A case is right when all that is said of that layer is the right cause, and no
other layer is accused. Healthy runs (declared as computed, or with scales up to 1.5 times too large, as calibration
leaves them) must have no such finding.

    python benchmarks/narrow_faults.py                       # 216 faults, 60 healthy runs, on networks for nothing else
    python benchmarks/narrow_faults.py --tuned --faults 42   # on those that the limits were chosen on

Targets: at least 95 % right, at most 1 % wrong, nothing claimed in the healthy runs.
"""

from __future__ import annotations

import argparse
import collections
import json
import multiprocessing
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from narrow_networks import JUDGED, TUNED, Family, build
from rich.console import Console
from rich.table import Table

from cp_debug.backends.arithmetic import ARITHMETICS, FP64, Arithmetic
from cp_debug.backends.base import Program, Session
from cp_debug.backends.emulated import EmulatedBackend, ExecutorSession
from cp_debug.backends.executor import Executor
from cp_debug.backends.narrow_options import NarrowOptions
from cp_debug.backends.registry import create
from cp_debug.backends.scaling import CODECS, FixedScaling
from cp_debug.backends.spec import BackendSpec
from cp_debug.bisect.engine import bisect
from cp_debug.bisect.finding import UNKNOWN
from cp_debug.bisect.result import TestResult
from cp_debug.graph.graph import Graph
from cp_debug.graph.made_up import MadeUp

KINDS = (
    "fp8-accumulation",
    "fp8-saturated",
    "fp8-saturated to NaN",
    "fp8-underflow",
    "scale-stale, too small",
    "scale-stale, too large",
    "block-scale",
    "block-scale, declared",
    "int4-group",
    "int4-group, declared",
    "int4-outlier, declared",
    "fp4-outlier, declared",
    "fp8-underflow, declared",
)
NARROW_CAUSES = {k.partition(",")[0].partition(" ")[0] for k in KINDS}
EXCESS = 4.8
"""Introduced error of a wrong scale, in multiples of the right one's: a fifth above the verdict's limit."""
DRAWS = 80
APART = 0.15
"""Least distance of a departure from what is declared, in multiples of the error that the declaration makes."""


class DepartingBackend(EmulatedBackend):
    """Claims what its spec says; computes some nodes in other arithmetics, by name."""

    def __init__(self, spec: str, chosen: Mapping[str, Arithmetic]) -> None:
        super().__init__(BackendSpec.parse(spec))
        self._chosen = chosen

    def open(self, program: Program) -> Session:
        return ExecutorSession(program.graph, self.arithmetic, self.device, overrides=self._chosen)


@dataclass
class Case:
    """One bisect."""

    seed: int
    kind: str
    family: str
    claim: str
    computed: str
    layer: str
    said: list[str]
    elsewhere: list[str]
    text: str
    seconds: float

    @property
    def right(self) -> bool:
        wanted = self.kind.partition(",")[0].partition(" ")[0]
        return set(self.said) == {wanted} and not self.elsewhere

    @property
    def unknown(self) -> bool:
        return not self.elsewhere and set(self.said) <= {UNKNOWN}


def drawn(kind: str, seed: int, families: Mapping[str, Family], folder: Path) -> Case | None:
    """One case; None where this draw makes too small a fault."""
    rng = np.random.default_rng([seed, 11])
    name = list(families)[int(rng.integers(len(families)))]
    pick = lambda *words: str(words[rng.integers(len(words))])  # noqa: E731
    treatment, only = "", ""
    if kind == "fp8-accumulation":
        claim = pick("fp8", "fp8:channel", "fp8:block", "mxfp8", "fp8:e5m2", "fp8:acc=fp22:promote=128")
        computed = f"{claim.removesuffix(':acc=fp22:promote=128')}:acc={pick('fp22', 'fp22', 'fp16', '12-bit')}"
        treatment = "one sign"
    elif kind.startswith("fp8-saturated"):
        claim, treatment = pick("fp8", "fp8:channel", "fp8:block"), "edge" if "NaN" in kind else "large"
    elif kind == "fp8-underflow":
        claim, treatment = pick("fp8", "fp8:channel", "fp8:block"), "small"
    elif kind.startswith("scale-stale"):
        claim, treatment = pick("fp8", "fp8:channel", "fp8:e5m2"), ""
    elif kind.startswith("block-scale"):
        declared = kind.endswith("declared")
        claim, treatment = ("fp8" if declared else pick("fp8:block", "fp8:block", "fp8:channel")), "channels"
        computed, only = pick("fp8", "fp8:channel") if claim == "fp8:block" else "fp8", "MatMul"
    elif kind.startswith("int4-outlier"):
        claim, treatment, only = pick("int4:g128", "int4:g64", "int4:g32:asym"), "hot", "MatMul"
    elif kind.startswith("int4"):
        claim = (
            pick("int4:g128", "int4:g256")
            if kind.endswith("declared")
            else pick("int4:g32", "int4:g16", "int4:g32:asym")
        )
        computed = claim.replace("g32", pick("g128", "g256")).replace("g16", pick("g64", "g128"))
        treatment, only = "groups", "MatMul"
    elif kind.startswith("fp4"):
        claim, treatment = pick("mxfp4", "nvfp4", "mxfp4:up"), "hot"
    else:
        claim, treatment = pick("mxfp8", "fp8:block"), "mixed"
    if only and name == "backbone":
        return None
    path, node = build(
        folder / f"{kind}{seed}.onnx".replace(" ", "_").replace(",", ""), families[name], seed, treatment, only
    )
    graph = Graph(path)
    chosen: dict[str, Arithmetic] = {}
    if kind.endswith("declared"):
        computed = claim
    elif kind.startswith(("fp8-saturated", "fp8-underflow", "scale-stale")):
        layer = _layer(graph, node, claim)
        if layer is None:
            return None
        fits = float(layer.x.abs().max()) / CODECS[NarrowOptions.parse(claim).element].largest
        scale = 1.0
        if kind.startswith("scale-stale"):
            scale = fits * float(2.0 ** (-rng.uniform(2, 6) if kind.endswith("small") else rng.uniform(13.5, 17.5)))
        fixed = FixedScaling(NarrowOptions.parse(claim), (scale, None), "NaN" not in kind)
        computed = f"{claim} with a scale of {scale:.3g} for numbers up to {float(layer.x.abs().max()):.3g}"
        chosen[node] = Arithmetic(claim, scaling=fixed)
    else:
        chosen[node] = ARITHMETICS[computed]
    if chosen and not _notable(graph, node, claim, chosen[node], kind):
        return None
    backend = DepartingBackend(f"emu-{claim}", chosen) if chosen else create(BackendSpec.parse(f"emu-{claim}"))
    start = time.perf_counter()
    test = bisect(str(path), [create(BackendSpec.parse("ort")), backend]).tests[0]
    return _case(seed, kind, name, claim, computed, node, graph, test, time.perf_counter() - start)


@dataclass
class _Layer:
    x: torch.Tensor
    given: dict[str, torch.Tensor]
    value: str


def _layer(graph: Graph, name: str, claim: str) -> _Layer | None:
    """The layer with the inputs that it has under the claim."""
    node = next(n for n in graph.nodes if n.name == name)
    values = {n: torch.from_numpy(a) for n, a in MadeUp(graph).sample([0, 0]).items()}
    Executor(graph, ARITHMETICS[claim]).run(dict(values), lambda n, t: values.update({n: t}))
    given = {n: values[n] for n in node.inputs if n in values}
    return _Layer(values[node.proto.input[0]].double(), given, node.outputs[0])


def _notable(graph: Graph, name: str, claim: str, computed: Arithmetic, kind: str) -> bool:
    """Whether what is done differs enough from what is declared."""
    layer = _layer(graph, name, claim)
    if layer is None:
        return False
    node = next(n for n in graph.nodes if n.name == name)
    results = [
        Executor(graph, a).run_nodes([node], layer.given, [layer.value])[layer.value].double()
        for a in (FP64, ARITHMETICS[claim], computed)
    ]
    exact, declared, done = results
    if "NaN" in kind:
        return bool(done.isnan().any()) and not bool(done.isnan().all())
    expected = max(float((declared - exact).norm()), 1e-30)
    if kind.startswith(("scale-stale", "fp8-saturated", "fp8-underflow")):
        return bool(torch.isfinite(done).all()) and EXCESS * max(expected, 0.03 * float(exact.norm())) < float(
            (done - exact).norm()
        )
    return float((done - declared).norm()) > APART * expected


def _case(
    seed: int,
    kind: str,
    family: str,
    claim: str,
    computed: str,
    node: str,
    graph: Graph,
    test: TestResult,
    seconds: float,
) -> Case:
    value = next(n for n in graph.nodes if n.name == node).outputs[0]
    rows = {row.name: row.onnx for row in test.rows}
    said, elsewhere, texts = [], [], []
    for finding in test.findings:
        narrow = finding.cause in NARROW_CAUSES or not finding.evidence.get("declared")
        for name in finding.layers:
            if rows[name] == value and narrow:
                said.append(finding.cause)
                texts.append(finding.says)
            elif narrow:
                elsewhere.append(f"{name}: {finding.cause}")
    return Case(seed, kind, family, claim, computed, value, said, elsewhere, " | ".join(texts), seconds)


def healthy(seed: int, families: Mapping[str, Family], folder: Path) -> Case:
    """A network without a special layer: declared as computed, or with scales as calibration leaves them."""
    rng = np.random.default_rng([seed, 12])
    name = list(families)[int(rng.integers(len(families)))]
    path, node = build(folder / f"healthy{seed}.onnx", families[name], seed)
    graph = Graph(path)
    claims = (
        "fp8",
        "fp8:block",
        "mxfp8",
        "mxfp4",
        "nvfp4",
        "int4:g64",
        "int4",
        "fp8:acc=fp22:promote=128",
        "fp8:channel",
    )
    claim, chosen = claims[seed % len(claims)], {}
    if seed % 3 == 0:
        claim = "fp8"
        for each in (n for n in graph.nodes if n.op in ("MatMul", "Conv", "ConvTranspose")):
            layer = _layer(graph, each.name, claim)
            scale = float(layer.x.abs().max()) / 448 * float(rng.uniform(0.95, 1.5)) if layer else 1.0
            chosen[each.name] = Arithmetic(claim, scaling=FixedScaling(NarrowOptions.parse(claim), (scale, None)))
    backend = DepartingBackend(f"emu-{claim}", chosen)
    start = time.perf_counter()
    test = bisect(str(path), [create(BackendSpec.parse("ort")), backend]).tests[0]
    return _case(seed, "healthy", name, claim, "as declared", node, graph, test, time.perf_counter() - start)


def fault(index: int, kinds: Sequence[str], base: int, families: Mapping[str, Family], folder: Path) -> Case:
    """Case number ``index``, drawn until it is large enough."""
    kind = kinds[index % len(kinds)]
    for attempt in range(DRAWS):
        if (case := drawn(kind, base + 1000 * index + attempt, families, folder)) is not None:
            return case
    raise SystemExit(f"no fault of kind {kind!r} in {DRAWS} draws")


@contextmanager
def workers(jobs: int) -> Iterator[Any]:
    """What maps a function over cases: this process, or several."""
    if jobs == 1:
        yield SimpleNamespace(map=map)
        return
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        yield pool


def main() -> None:
    """Run the cases, print the table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=210)
    parser.add_argument("--healthy", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0, help="of the first case")
    parser.add_argument("--kind", choices=KINDS, help="only this one")
    parser.add_argument("--tuned", action="store_true", help="on the networks that the limits were chosen on")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--json", type=Path, help="write everything here")
    options = parser.parse_args()
    console, families = Console(width=200), TUNED if options.tuned else JUDGED
    kinds = (options.kind,) if options.kind else KINDS
    cases: list[Case] = []
    with tempfile.TemporaryDirectory(prefix="narrow-") as name, workers(options.jobs) as pool:
        folder = Path(name)
        one = partial(fault, kinds=kinds, base=options.seed, families=families, folder=folder)
        for case in pool.map(one, range(options.faults)):
            cases.append(case)
            if not case.right:
                console.print(f"{'unknown' if case.unknown else 'wrong'}: {case}", style="red")
        sound = partial(healthy, families=families, folder=folder)
        calm = list(pool.map(sound, range(options.seed, options.seed + options.healthy)))
    table = Table("", "right", "unknown", "wrong", "of", box=None)
    groups: dict[str, list[Case]] = collections.defaultdict(list)
    for case in cases:
        for key in (case.kind, case.family, "all"):
            groups[key].append(case)
    for key, group in sorted(groups.items(), key=lambda item: item[0] == "all"):
        right, unknown = sum(c.right for c in group), sum(c.unknown and not c.right for c in group)
        table.add_row(key, str(right), str(unknown), str(len(group) - right - unknown), str(len(group)))
    console.print(table)
    claimed = [c for c in calm if c.said or c.elsewhere]
    for case in claimed:
        console.print(f"claimed in a healthy run: {case}", style="red")
    times = [c.seconds for c in cases]
    console.print(f"{len(claimed)} of {len(calm)} healthy runs with a claim; median {np.median(times):.2f} s a case")
    if options.json:
        document = [asdict(c) | {"right": c.right} for c in (*cases, *calm)]
        options.json.write_text(json.dumps({"seed": options.seed, "cases": document}, indent=1))


if __name__ == "__main__":
    main()
