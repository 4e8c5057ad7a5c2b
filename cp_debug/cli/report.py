"""``cpdebug report``: a saved result for people, trackers and machines."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from cp_debug.cli.given import check_saved


class Format(str, Enum):
    """Formats of a report."""

    html = "html"
    markdown = "markdown"
    junit = "junit"
    github = "github"
    onnx = "onnx"
    csv = "csv"
    parquet = "parquet"


def report(
    result: Annotated[Path, typer.Argument(help="A folder of `bisect --save`, or its result.json (without tensors).")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File to write; a folder for onnx, if there are components.")
    ] = None,
    kind: Annotated[
        Format, typer.Option("--format", "-f", help="Text formats go to stdout without --output.")
    ] = Format.html,
    charts: Annotated[
        list[str] | None,
        typer.Option(help="Add charts for this layer: a name, or a pattern such as 'backbone.*'; '*' takes all."),
    ] = None,
) -> None:
    """Show a saved result as HTML, Markdown, CI annotations or ONNX."""
    from cp_debug.cli.console import console
    from cp_debug.errors import InputError
    from cp_debug.files import write_text

    if charts and kind is not Format.html:
        raise InputError(f"--charts: it would do nothing here: {kind.value} has no charts")
    check_saved(result)
    from cp_debug.reports.files import csv_text, layer_frame, write_parquet
    from cp_debug.reports.saved import SavedResult

    saved = SavedResult.open(result)
    default = {Format.html: "report.html", Format.parquet: "layers.parquet"}.get(kind)
    if kind is Format.onnx:
        default = "annotated" if len(saved.graphs) > 1 else "annotated.onnx"
    target = output or (Path(default) if default else None)
    paths = [target] if target else []
    earlier = {target, *target.glob("*")} if target and target.exists() else set()
    if kind is Format.html:
        from cp_debug.reports.page import write_page

        write_page(saved, paths[0], charts or ())
    elif kind is Format.onnx:
        from cp_debug.reports.files import write_annotated

        paths = write_annotated(saved, paths[0])
    elif kind is Format.parquet:
        write_parquet(saved.result, paths[0])
    elif kind is Format.csv:
        write_text(csv_text(layer_frame(saved.result)), output)
    elif kind is Format.markdown:
        from cp_debug.reports.summary import render_markdown

        write_text(render_markdown(saved), output)
    else:
        from cp_debug.reports.files import render_github, render_junit

        write_text(render_junit(saved) if kind is Format.junit else render_github(saved), output)
    for path in paths:
        replaced = ", replaces an earlier file" if path in earlier else ""
        console.print(f"{path}: {path.stat().st_size / 1024:.0f} KiB{replaced}")
