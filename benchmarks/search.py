"""Does ``search`` find the smallest set of layers to keep, and in how many trials? 30 networks with a known answer.

The same predicate, on the same emulator, is asked by plain delta debugging (ddmin) and by a linear scan, which keeps
everything and gives up one layer after the other. An evaluation is one set tried; what ``search`` computes to predict
is no evaluation and counted in passes over the network.

    python benchmarks/search.py              # 30 cases, about five minutes
    python benchmarks/search.py --cases 6    # a quick look

Targets: the known set exactly in at least 27, never more than two layers too many; at most a third of the evaluations
of either.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from search_cases import Case, Trials, ddmin, make_case

from cp_debug.backends.registry import create
from cp_debug.backends.spec import parse_backends
from cp_debug.minimize import Minimizer
from cp_debug.mixed_precision.goal import Goal
from cp_debug.mixed_precision.layers import FusionGroup
from cp_debug.mixed_precision.search import search
from cp_debug.recipes.registry import load_model


@dataclass
class Outcome:
    """One case: what was found, and what each way of looking took."""

    seed: int
    kind: str
    layers: int
    known: int
    found: int
    exact: bool
    surplus: int
    reached: bool
    exhaustive: bool
    drawn: int
    evaluations: int
    passes: float
    seconds: float
    ddmin: int
    ddmin_found: int
    ddmin_seconds: float
    linear: int
    linear_found: int
    shrink: int
    """Our minimizer without prediction, on everything."""


def run_case(case: Case) -> Outcome:
    """Search and its rivals on one case."""
    model = load_model(str(case.path))
    goal = Goal.parse(case.goal)
    backends = [create(spec) for spec in parse_backends(f"torch,{case.backend}")]
    start = time.perf_counter()
    result = search(model, backends, goal, list(model.samples(1, 0, None)))
    seconds = time.perf_counter() - start
    found = frozenset(layer.fusion_group.nodes for layer in result.kept)
    trials = Trials(case.path, case.backend)
    limit = goal.conditions[0].limit

    def rival(look: Callable[[Minimizer[FusionGroup]], list[FusionGroup]]) -> tuple[int, int, float]:
        minimizer = Minimizer[FusionGroup](lambda kept: trials.error(kept) < limit)
        begun = time.perf_counter()
        size = len(look(minimizer))
        return minimizer.asked, size, time.perf_counter() - begun

    debugged = rival(lambda minimizer: ddmin(minimizer.holds, case.groups))
    scanned = rival(lambda minimizer: scan(minimizer, case.groups))
    shrunk = rival(lambda minimizer: minimizer.minimize(case.groups))
    return Outcome(
        seed=case.seed,
        kind=case.kind,
        layers=len(case.groups),
        known=len(case.truth),
        found=len(found),
        exact=found == case.truth,
        surplus=len(found) - len(case.truth),
        reached=result.reached,
        exhaustive=case.exhaustive,
        drawn=case.drawn,
        evaluations=len(result.trials),
        passes=result.passes,
        seconds=seconds,
        ddmin=debugged[0],
        ddmin_found=debugged[1],
        ddmin_seconds=debugged[2],
        linear=scanned[0],
        linear_found=scanned[1],
        shrink=shrunk[0],
    )


def scan(minimizer: Minimizer[FusionGroup], groups: list[FusionGroup]) -> list[FusionGroup]:
    """Keep everything; give up one layer after the other where the goal holds without it."""
    kept = list(groups)
    assert minimizer.holds(kept)
    for group in groups:
        if minimizer.holds([other for other in kept if other is not group]):
            kept.remove(group)
    return kept


def table(outcomes: list[Outcome]) -> Table:
    """Sums by kind, and of all."""
    shown = Table("", "exact", "of", "most too many", "layers", "known", "evaluations", "÷ ddmin", "÷ linear",
                  "÷ shrinker", "passes", "median s", box=None)  # fmt: skip
    kinds = {kind: [o for o in outcomes if o.kind == kind] for kind in sorted({o.kind for o in outcomes})}
    for name, group in {**kinds, "all": outcomes}.items():
        spent = sum(o.evaluations for o in group)
        ratios = [f"{spent / sum(getattr(o, rival) for o in group):.2f}" for rival in ("ddmin", "linear", "shrink")]
        sizes = [f"{min(v)}–{max(v)}" for v in ([o.layers for o in group], [o.known for o in group])]
        passes, seconds = sum(o.passes for o in group), float(np.median([o.seconds for o in group]))
        shown.add_row(name, str(sum(o.exact for o in group)), str(len(group)), str(max(o.surplus for o in group)),
                      *sizes, str(spent), *ratios, f"{passes:.0f}", f"{seconds:.1f}")  # fmt: skip
    return shown


def main() -> None:
    """Run the cases, print the table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0, help="of the first case")
    parser.add_argument("--json", type=Path, help="write every case here")
    options = parser.parse_args()
    console, outcomes = Console(width=140), []
    for seed in range(options.seed, options.seed + options.cases):
        with tempfile.TemporaryDirectory(prefix="search-") as folder:
            outcomes.append(run_case(make_case(seed, Path(folder))))
        o = outcomes[-1]
        console.print(
            f"{o.seed} {o.kind}: {o.found} kept, {o.known} known of {o.layers}{'' if o.exact else ' WRONG'}; "
            f"{o.evaluations} evaluations, ddmin {o.ddmin} ({o.ddmin_found}), linear {o.linear} ({o.linear_found}), "
            f"{o.passes:.1f} passes, {o.seconds:.1f} s (ddmin {o.ddmin_seconds:.1f} s), drawn {o.drawn}"
        )
    console.print(table(outcomes))
    tried = sum(o.exhaustive for o in outcomes)
    console.print(f"every smaller set was tried and misses the goal in {tried} of {len(outcomes)} cases")
    if options.json:
        options.json.write_text(json.dumps([asdict(o) for o in outcomes], indent=1))


if __name__ == "__main__":
    main()
