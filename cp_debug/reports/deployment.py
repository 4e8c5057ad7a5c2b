"""Results of a deployment, in a terminal and as one HTML page."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from rich import box
from rich.text import Text

from cp_debug.deploy.exporting import Exported
from cp_debug.deploy.state import StageRecord
from cp_debug.files import write_text
from cp_debug.reports.page import environment, page_parts
from cp_debug.reports.safe_table import Table
from cp_debug.version import __version__


def export_lines(exported: Sequence[Exported]) -> Iterator[Text]:
    """Lines about each file written and its check."""
    for each in exported:
        graph, alignment = each.program.graph, each.program.alignment
        yield Text.assemble((str(graph.path), "bold"), f": {len(graph.nodes)} nodes, opset {graph.opsets['']}")
        yield Text(f"  {', '.join(map(str, graph.inputs))} → {', '.join(v.name for v in graph.outputs)}")
        yield Text(f"  alignment: {alignment.coverage() if alignment else 'none'}")
        yield Text(f"  {each.checked_by} on {' and '.join(each.sizes)}: relative L2 at most {each.error:.2g}")


def stage_table(records: Sequence[StageRecord]) -> Table:
    """A row for each stage."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for header in ("stage", "", "seconds", "outcome"):
        table.add_column(header, justify="right" if header == "seconds" else "left", overflow="fold")
    for record in records:
        mark = Text("✓", style="green") if record.passed else Text("✗", style="bold red")
        note = Text(" (done before)", style="dim") if record.resumed else Text()
        table.add_row(record.name, mark, f"{record.seconds:.1f}", Text(record.line).append_text(note))
    return table


def write_summary(records: Sequence[StageRecord], title: str, command: str, target: Path) -> None:
    """Write the page: verdict, stages, files, tensors and findings of each scenario, metrics side by side."""
    documents = {record.name: record.document for record in records}
    page = (
        environment()
        .get_template("deploy.html.j2")
        .render(
            title=title,
            records=records,
            passed=all(record.passed for record in records),
            components=documents.get("export", {}).get("components", []),
            scenarios=documents.get("verify", {}).get("scenarios", []),
            backends=documents.get("evaluate", {}).get("backends", []),
            command=command,
            version=__version__,
            **page_parts(),
        )
    )
    write_text(page, target)
