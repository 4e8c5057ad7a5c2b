"""Results of a deployment and of its verification, in a terminal and for gates; latency and memory of backends."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

from rich.console import RenderableType
from rich.text import Text

from cp_debug.deploy.bench import WHOLE, BackendBench
from cp_debug.deploy.exporting import Exported
from cp_debug.deploy.runner import StageRecord
from cp_debug.deploy.verify import ScenarioResult, TensorCheck, VerifyResult, culprits, reasons
from cp_debug.detection.evaluation import EvaluationResult
from cp_debug.files import write_text
from cp_debug.probes.distance import ratio
from cp_debug.programs.precision import coarsest
from cp_debug.reports.causes import findings
from cp_debug.reports.evaluation import summary_table
from cp_debug.reports.files import junit
from cp_debug.reports.numbers import number
from cp_debug.reports.page import rendered
from cp_debug.reports.sheet import Cell, Column, Row, Sheet
from cp_debug.reports.sheet_terminal import Terminal
from cp_debug.reports.verdict_line import verdict_line
from cp_debug.safe_text import amount
from cp_debug.serialize import decode


def export_lines(exported: Sequence[Exported]) -> Iterator[Text]:
    """Lines about each file written and its check."""
    for each in exported:
        graph, alignment = each.program.graph, each.program.alignment
        yield Text.assemble((str(graph.path), "bold"), f": {len(graph.nodes)} nodes, opset {graph.opsets['']}")
        yield Text(f"  {', '.join(map(str, graph.inputs))} → {', '.join(v.name for v in graph.outputs)}")
        if each.source is not None:
            kept = sum(value in set(graph.values) for value in each.source.values)
            yield Text(
                f"  alignment: {kept} of {len(each.source.values)} values of {each.source.path} keep their names"
            )
        else:
            yield Text(f"  alignment: {alignment.coverage() if alignment else 'none'}")
        runs = [f"{f'{count} samples of ' if count > 1 else ''}{size}" for size, count in Counter(each.sizes).items()]
        says = f" ({'; '.join(each.caveats)})" if each.caveats else ""
        distance = "nothing was compared" if each.error is None else f"relative L2 at most {each.error:.2g}"
        yield Text(f"  {each.checked_by} on {' and '.join(runs)}: {distance}{says}")


def stage_table(records: Sequence[StageRecord]) -> Sheet:
    """A row for each stage."""
    columns = (
        Column("stage", "mark", of=lambda record: record.name),
        Column("", "mark", of=lambda record: Cell("✓", "good") if record.passed else Cell("✗", "worst")),
        Column("seconds", "number", leave_out=1, of=lambda record: f"{record.seconds:.1f}"),
        Column("outcome", of=lambda record: record.line + (" (done before)" if record.resumed else "")),
    )
    return Sheet.of(columns, records, ruled=True)


def _files_table(components: Sequence[Mapping[str, Any]]) -> Sheet:
    """A row for each exported file, from the document of the stage ``export``."""

    def checked(each: Mapping[str, Any]) -> str:
        return (
            f"{' and '.join(each['checked_on'])}, by {each['checked_by']}" if each["checked_on"] else "used unchanged"
        )

    columns = (
        Column("file", "name", of=itemgetter("file")),
        Column("opset", "mark", of=itemgetter("opset")),
        Column("nodes", "mark", of=itemgetter("nodes")),
        Column("inputs", of=lambda each: ", ".join(map(str, each["inputs"]))),
        Column("checked on", of=checked),
        Column("relative L2", "number", of=itemgetter("error")),
        Column("SHA-256", "mark", of=lambda each: each["sha256"][:12]),
    )
    return Sheet.of(columns, components, "Files")


def _output_table(scenario: Mapping[str, Any]) -> Sheet:
    """A row for each output of a scenario, from the document of the stage ``verify``."""
    columns = (
        Column("tensor", "name", of=lambda e: (f"{e['component']}/{e['name']}", *([e["why"]] if e["why"] else ()))),
        Column("max |Δ|", "number", of=lambda each: float(each["max_abs"])),
        Column("relative L2", "number", of=lambda each: float(each["rel_l2"])),
        Column("limit", "number", of=itemgetter("limit")),
        Column("sample", of=itemgetter("source")),
    )
    title = (
        "Each output on the sample where it is worst; the limit is a multiple of the noise that rounding makes there"
    )
    return Sheet.of(columns, scenario["tensors"], title, tone=lambda each: "worst" if each["why"] else "")


def write_summary(records: Sequence[StageRecord], title: str, command: str, target: Path) -> None:
    """Write the page: verdict, stages, files, tensors and findings of each scenario, metrics side by side."""
    documents = {record.name: record.document for record in records}
    scores = documents.get("evaluate")
    page = rendered(
        "deploy",
        title=title,
        records=records,
        passed=all(record.passed for record in records),
        files=_files_table(documents.get("export", {}).get("components", [])),
        scenarios=[(each, _output_table(each)) for each in documents.get("verify", {}).get("scenarios", [])],
        metrics=summary_table(decode(EvaluationResult, scores, "evaluate")) if scores else None,
        command=command,
    )
    write_text(page, target)


def latency_table(results: Sequence[BackendBench], title: str) -> Sheet:
    """All backends in one table, a block each."""
    columns = (
        Column("backend", "name"),
        Column("part", "name"),
        Column("mean ms", "number", show=_milliseconds),
        Column("p50", "number", leave_out=3, show=_milliseconds),
        Column("p95", "number", leave_out=2, show=_milliseconds),
        Column("p99", "number", leave_out=4, show=_milliseconds),
        Column("× reference", "number", leave_out=1, show=lambda ratio: f"{ratio:.2f}"),
        Column("memory MiB", "number", leave_out=5, show=lambda size: f"{size:.0f}"),
    )
    reference = {latency.part: latency.figures()["mean"] for latency in results[0].parts}
    rows = []
    for result in results:
        name = f"{result.backend.spec} (emulated)" if result.backend.emulated else result.backend.spec
        for place, latency in enumerate(result.parts):
            figures, last = latency.figures(), latency.part == WHOLE
            base = reference.get(latency.part)
            ratio = figures["mean"] / base if base else ""
            values = ["" if place else name, latency.part, *figures.values(), ratio]
            rows.append(Row([*values, result.memory_mib if last else ""], "strong" if last else "", ends=last))
    return Sheet(columns, rows, title, ruled=True)


def _milliseconds(value: float) -> str:
    return f"{value:.2f}"


FAR = 10.0
"""Times the limit from which on a percentage says less than a factor."""


def render_verification(result: VerifyResult) -> Iterator[RenderableType]:
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
