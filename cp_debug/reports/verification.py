"""A verification in a terminal, and for machines that gate a build."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

from rich.console import RenderableType
from rich.text import Text

from cp_debug.deploy.verify import ScenarioResult, TensorCheck, VerifyResult, culprits, reasons
from cp_debug.probes.distance import ratio
from cp_debug.programs.precision import coarsest
from cp_debug.reports.causes import findings
from cp_debug.reports.files import junit
from cp_debug.reports.numbers import number
from cp_debug.reports.sheet import Column, Sheet
from cp_debug.reports.sheet_terminal import Terminal
from cp_debug.reports.verdict_line import verdict_line
from cp_debug.safe_text import amount

FAR = 10.0
"""Times the limit from which on a percentage says less than a factor."""


def render(result: VerifyResult) -> Iterator[RenderableType]:
    """The parts of a result, in the order in which they are read."""
    yield Text.assemble((result.model, "bold"), f" · {amount(len(result.samples), 'sample')}")
    for note in result.notes:
        yield Text(f"note: {note}", style="yellow")
    for scenario in result.scenarios:
        yield Text()
        yield Text(scenario.name, style="bold")
        yield Terminal(tensor_table(scenario))
        if scenario.judged_as != coarsest(scenario.reference.precision, scenario.test.precision).name:
            yield Text(f"limits: those of {scenario.judged_as.upper()}, in which the files compute", "dim")
        for source, change in scenario.preprocessing.items():
            if not change.agrees or source == result.samples[0]:
                yield Text(f"voxels of {source}: {change}", style="dim" if change.agrees else "bold red")
        if scenario.detections is not None:
            yield Text(f"detections: {scenario.detections}", style="dim")
        for test in scenario.bisect.tests if scenario.bisect else ():
            yield verdict_line(test)
            yield from findings(test)
        yield verdict(scenario)


def tensor_table(scenario: ScenarioResult) -> Sheet:
    """A row for each output, of the sample on which it is worst."""

    def compared(figure: Callable[[TensorCheck], float]) -> Callable[[TensorCheck], float | None]:
        return lambda check: None if check.stats.nothing_compared else figure(check)

    used = compared(lambda check: ratio(check.stats.rel_l2, check.limit))
    columns = (
        Column("tensor", "name", of=lambda check: f"{check.component}/{check.name}"),
        Column("max |Δ|", "number", leave_out=2, of=compared(lambda check: check.stats.max_abs)),
        Column("rel. L2", "number", of=compared(lambda check: check.stats.rel_l2)),
        Column("FP32 noise", "number", leave_out=1, of=lambda check: check.floor),
        Column("limit", "number", of=lambda check: check.limit),
        Column("of the limit", "number", show=of_the_limit, of=used),
    )
    return Sheet.of(columns, scenario.checks, ruled=True, tone=lambda check: "bad" if check.why else "")


def of_the_limit(used: float) -> str:
    """A distance as a share of its limit: a percentage, or how many times the limit where it is far beyond."""
    if math.isinf(used):  # of what must be equal
        return "beyond"
    return f"{used:.0%}" if used < FAR else f"{number(used)}×"


def verdict(scenario: ScenarioResult) -> Text:
    """One line: passed, or what is wrong and whose fault it is."""
    if scenario.passed:
        count = len(scenario.checks)
        within = "the one output is within its limits" if count == 1 else f"all {count} outputs are within their limits"
        little = f" ({'; '.join(scenario.caveats)})" if scenario.caveats else ""
        return Text(f"✓ {scenario.name}: {within}{little}", style="yellow" if little else "green")
    return Text(f"✗ {scenario.name}: {'; '.join(reasons(scenario))}", style="bold red")


def render_junit(result: VerifyResult) -> str:
    """One suite for each scenario, with a test case for each output and one for the pre-processing."""
    suites = []
    for scenario in result.scenarios:
        why = "; ".join(culprits(scenario))
        cases = {f"{c.component}/{c.name}": f"{c.why}; {why}" if c.why else "" for c in scenario.checks}
        cases |= dict.fromkeys(scenario.missing, "the test lacks this output of the reference")
        cases |= {name: f"{other} takes the place of this output" for name, other in scenario.moved.items()}
        cases |= {
            f"voxels of {source}": "" if change.agrees else str(change)
            for source, change in scenario.preprocessing.items()
        }
        told = {name: ("divergence", message) for name, message in cases.items()}
        suites.append((scenario.name, scenario.test.spec, told))
    return junit(f"cpdebug verify {result.model}", suites)
