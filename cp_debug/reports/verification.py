"""A verification in a terminal, and for machines that gate a build."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Iterator

from rich import box
from rich.console import RenderableType
from rich.text import Text

from cp_debug.deploy.reasons import culprits, reasons
from cp_debug.deploy.verify import ScenarioResult, VerifyResult
from cp_debug.reports.causes import findings
from cp_debug.reports.gates import document, fail
from cp_debug.reports.numbers import number
from cp_debug.reports.safe_table import Table
from cp_debug.reports.tables import verdict_line


def render(result: VerifyResult) -> Iterator[RenderableType]:
    """The parts of a result, in the order in which they are read."""
    yield Text.assemble((result.model, "bold"), f" · {len(result.samples)} samples")
    for scenario in result.scenarios:
        yield Text()
        yield Text(scenario.name, style="bold")
        yield tensor_table(scenario)
        for source, change in scenario.preprocessing.items():
            if not change.agrees or source == result.samples[0]:
                yield Text(f"voxels of {source}: {change}", style="dim" if change.agrees else "bold red")
        if scenario.detections is not None:
            yield Text(f"detections: {scenario.detections}", style="dim")
        for test in scenario.bisect.tests if scenario.bisect else ():
            yield verdict_line(test)
            yield from findings(test)
        yield verdict(scenario)


def tensor_table(scenario: ScenarioResult) -> Table:
    """A row for each output, of the sample on which it is worst."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for index, header in enumerate(("tensor", "max |Δ|", "rel. L2", "FP32 noise", "limit", "of the limit")):
        table.add_column(header, justify="right" if index else "left", no_wrap=True)
    for check in scenario.checks:
        used = check.stats.rel_l2 / check.limit
        numbers = (number(v) for v in (check.stats.max_abs, check.stats.rel_l2, check.floor, check.limit))
        table.add_row(f"{check.component}/{check.name}", *numbers, f"{used:.0%}", style="red" if check.why else None)
    return table


def verdict(scenario: ScenarioResult) -> Text:
    """One line: passed, or what is wrong and whose fault it is."""
    if scenario.passed:
        return Text(f"✓ {scenario.name}: all {len(scenario.checks)} outputs are within their limits", style="green")
    return Text(f"✗ {scenario.name}: {'; '.join(reasons(scenario))}", style="bold red")


def render_junit(result: VerifyResult) -> str:
    """One suite for each scenario, with a test case for each output and one for the pre-processing."""
    root = ET.Element("testsuites", name=f"cpdebug verify {result.model}")
    for scenario in result.scenarios:
        why = "; ".join(culprits(scenario))
        cases = {f"{c.component}/{c.name}": f"{c.why}; {why}" if c.why else "" for c in scenario.checks}
        cases |= {
            f"voxels of {source}": "" if change.agrees else str(change)
            for source, change in scenario.preprocessing.items()
        }
        failures = sum(bool(message) for message in cases.values())
        counts = {"tests": str(len(cases)), "failures": str(failures), "errors": "0"}
        suite = ET.SubElement(root, "testsuite", {"name": scenario.name, **counts})
        for name, message in cases.items():
            case = ET.SubElement(suite, "testcase", classname=scenario.test.spec, name=name, time="0")
            if message:
                fail(case, "divergence", message)
    return document(root)
