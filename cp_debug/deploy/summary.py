"""What a deployment did, in a terminal and as one HTML page."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.text import Text

from cp_debug.deploy.exporting import Exported


def export_lines(exported: Sequence[Exported]) -> Iterator[Text]:
    """What was written, and what the check said."""
    for each in exported:
        graph, alignment = each.program.graph, each.program.alignment
        yield Text.assemble((str(graph.path), "bold"), f": {len(graph.nodes)} nodes, opset {graph.opsets['']}")
        yield Text(f"  {', '.join(map(str, graph.inputs))} → {', '.join(v.name for v in graph.outputs)}")
        yield Text(f"  alignment: {alignment.coverage() if alignment else 'none'}")
        yield Text(f"  {each.checked_by} on {' and '.join(each.sizes)}: relative L2 at most {each.error:.2g}")
