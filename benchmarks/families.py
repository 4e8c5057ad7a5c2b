"""What each family of causes costs and what it wins: seconds, layers that it was asked about, and explanations.

The layers are those of ``explain.py`` (random faults, lowered precisions), of ``localise_int8.py`` (wrong scales) and
of the fault library on the built-in network. What the difference of two graphs tells is not asked here, as it is not
there for an engine or a dump. A family that wins nothing and takes time is one to look at; that none of
these seeds a rare fault (``docs/causes.md``) is no reason to delete what finds it.

    python benchmarks/families.py                          # 300 faults, 30 INT8 files, the library: about 10 minutes
    python benchmarks/families.py --faults 40 --int8 6     # a quick look
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import explain
import localise_int8
from rich.console import Console
from rich.table import Table

from cp_debug.bisect.causes import search
from cp_debug.bisect.causes.base import CAUSES, Cause
from cp_debug.bisect.causes.graphs import GraphReader
from cp_debug.bisect.causes.segment import Segment


@dataclass
class Price:
    """Figures of one family."""

    seconds: float = 0.0
    """Of the processor, so that what else runs does not count."""
    asked: int = 0
    """Layers that it was asked about."""
    accepted: int = 0
    """Candidates that explained their layer."""
    wins: int = 0
    """Layers whose explanation is of this family."""


def name_of(family: Cause) -> str:
    """``module.function`` of a family."""
    emulate: Any = family.emulate  # type: ignore[attr-defined]
    return f"{emulate.__module__.rpartition('.')[2]}.{emulate.__name__}"


def watched(prices: dict[str, Price]) -> None:
    """Count in ``prices`` whatever the search of causes tries from now on."""
    tried, chosen = search._try, search._chosen

    def timed(segment: Segment, family: Cause) -> list[Any]:
        price, start = prices[name_of(family)], time.process_time()
        try:
            judged = tried(segment, family)
        finally:
            price.seconds += time.process_time() - start
            price.asked += 1
        price.accepted += sum(each.accepted for each in judged)
        return judged

    def counted(results: list[Any]) -> Any:
        explanation, family = chosen(results)
        if explanation.cause is not None and family is not None:
            prices[name_of(family)].wins += 1
        return explanation, family

    search._try, search._chosen = timed, counted  # type: ignore[assignment]
    GraphReader._other = lambda self, component: None  # type: ignore[method-assign]


def main() -> None:
    """Run the cases, print the table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=300, help="cases of explain.py")
    parser.add_argument("--int8", type=int, default=30, help="files with a wrong scale")
    parser.add_argument("--seed", type=int, default=0, help="of the first case")
    parser.add_argument("--json", type=Path, help="write everything here")
    options = parser.parse_args()
    console, prices = Console(), defaultdict[str, Price](Price)
    for family in CAUSES:
        prices[name_of(family)] = Price()
    watched(prices)
    start = time.process_time()
    with tempfile.TemporaryDirectory(prefix="families-") as name:
        for seed in range(options.seed, options.seed + options.faults):
            (explain.lowered if seed % 4 == 3 else explain.edited)(seed, Path(name))
        for seed in range(options.seed, options.seed + options.int8):
            localise_int8.faulty(seed, Path(name))
    explain.library(console)
    whole = time.process_time() - start
    table = Table("family", "seconds", "asked", "ms each", "accepted", "wins", box=None)
    for family_name, price in sorted(prices.items(), key=lambda item: -item[1].seconds):
        each = f"{1000 * price.seconds / price.asked:.1f}" if price.asked else ""
        figures = f"{price.seconds:.2f}", str(price.asked), each, str(price.accepted), str(price.wins)
        table.add_row(family_name, *figures, style=None if price.wins else "yellow")
    console.print(table)
    told = sum(price.seconds for price in prices.values())
    idle = [price for price in prices.values() if not price.wins]
    spent = sum(price.seconds for price in idle)
    console.print(f"{len(prices)} families, {told:.0f} s of {whole:.0f}; {len(idle)} won nothing, {spent:.1f} s")
    if options.json:
        options.json.write_text(json.dumps({n: asdict(p) for n, p in prices.items()} | {"whole_s": whole}, indent=1))


if __name__ == "__main__":
    main()
