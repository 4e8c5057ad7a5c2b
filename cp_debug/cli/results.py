"""``cpdebug report``, ``diff``, ``bundle`` and ``ui``: saved results for people, trackers and machines."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from cp_debug.cli.console import command_line, console, show_document, steps
from cp_debug.cli.flags import JsonFile
from cp_debug.cli.given import check_saved
from cp_debug.errors import InputError, Terminated

Format = Literal["html", "markdown", "junit", "github", "onnx", "csv", "parquet"]
"""Formats of a report."""


def report(
    result: Annotated[Path, typer.Argument(help="A folder of `bisect --save`, or its result.json (without tensors).")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File to write; a folder for onnx, if there are components.")
    ] = None,
    kind: Annotated[
        Format, typer.Option("--format", "-f", help="Text formats go to stdout without --output.")
    ] = "html",
    charts: Annotated[
        list[str] | None,
        typer.Option(help="Add charts for this layer: a name, or a pattern such as 'backbone.*'; '*' takes all."),
    ] = None,
) -> None:
    """Show a saved result as HTML, Markdown, CI annotations or ONNX."""
    from cp_debug.files import write_text

    if charts and kind != "html":
        raise InputError(f"--charts: it would do nothing here: {kind} has no charts")
    check_saved(result)
    from cp_debug.reports import files
    from cp_debug.reports.saved import SavedResult
    from cp_debug.reports.summary import render_markdown

    saved = SavedResult.open(result)
    default = {"html": "report.html", "parquet": "layers.parquet"}.get(kind)
    if kind == "onnx":
        default = "annotated" if len(saved.graphs) > 1 else "annotated.onnx"
    target = output or (Path(default) if default else None)
    paths = [target] if target else []
    earlier = {target, *target.glob("*")} if target and target.exists() else set()
    if kind == "html":
        from cp_debug.reports.page import write_page

        write_page(saved, paths[0], charts or ())
    elif kind == "onnx":
        paths = files.write_annotated(saved, paths[0])
    elif kind == "parquet":
        files.write_parquet(saved.result, paths[0])
    elif kind == "csv":
        write_text(files.csv_text(files.layer_frame(saved.result)), output)
    else:
        texts = {"markdown": render_markdown, "junit": files.render_junit, "github": files.render_github}
        write_text(texts[kind](saved), output)
    for path in paths:
        replaced = ", replaces an earlier file" if path in earlier else ""
        console.print(f"{path}: {path.stat().st_size / 1024:.0f} KiB{replaced}")


def diff(
    before: Annotated[Path, typer.Argument(help="A folder of `bisect --save`, or a JSON file of `bisect --json`.")],
    after: Annotated[Path, typer.Argument(help="The other one: today's engine, the next version, the fixed file.")],
    factor: Annotated[
        float, typer.Option(min=1.0, help="An error beyond rounding counts as changed from this factor on.")
    ] = 2.0,
    json: JsonFile = None,
    html: Annotated[Path | None, typer.Option(help="Write the page: one file, works offline.")] = None,
) -> None:
    """Compare two results: what got worse, better, or is new.

    Exit code 1 when a test no longer agrees, a layer became guilty, or an output left its tolerance.
    """
    check_saved(before)
    check_saved(after)
    from cp_debug.bisect.result_diff import diff_results
    from cp_debug.reports.result_diff import render, write_page
    from cp_debug.reports.saved import open_result

    results = open_result(before), open_result(after)
    try:
        result = diff_results(*results, factor=factor)
    except InputError as error:
        raise InputError(f"{before}, {after}: {error}") from None
    show_document(render(result), result.to_dict(), json)
    if html:
        write_page(result, html, command_line())
    raise typer.Exit(1 if result.worse else 0)


def bundle(
    result: Annotated[Path, typer.Argument(help="The folder that `cpdebug bisect --save` wrote.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="A new folder, or a .zip.")] = Path("bundle"),
    layer: Annotated[str | None, typer.Option(help="Layer, node or value; default: the first guilty one.")] = None,
    backend: Annotated[str | None, typer.Option(help="The test backend, if there are several.")] = None,
    redact: Annotated[
        bool, typer.Option("--redact", help="Random weights and inputs, if the fault survives them.")
    ] = False,
    seconds: Annotated[
        float, typer.Option(min=0, help="Time for reducing it; 0: keep the layer or region whole.")
    ] = 120.0,
) -> None:
    """Pack the guilty layer as a self-contained bug report. It is cut out with its captured inputs, made
    smaller while it still fails, and run once more."""
    check_saved(result)
    from cp_debug.reports.bundle.make import bundle as make
    from cp_debug.reports.saved import SavedResult

    with steps() as on_step:
        printed = make(
            SavedResult.open(result),
            output,
            layer=layer,
            backend=backend,
            redact=redact,
            seconds=seconds,
            on_text=lambda text: on_step(text, 0, 1),
        )
    console.print(printed.strip())
    console.print(f"written: {output}")


def ui(
    folder: Annotated[Path, typer.Argument(help="A folder that contains results of `bisect --save` or `--json`.")],
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port on 127.0.0.1; 0 takes a free one.")] = 8650,
    browser: Annotated[bool, typer.Option("--browser", help="Open the list in a browser.")] = False,
) -> None:
    """Browse a folder of results. Read-only, on 127.0.0.1; Ctrl-C ends it."""
    import webbrowser

    from cp_debug.safe_text import no_command, visible

    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    from cp_debug.reports.server import ResultServer

    with ResultServer(folder, port) as server:
        try:
            # Written here and not by rich, which prints a line again that Ctrl-C interrupts.
            console.file.write(no_command(visible(f"{server.url} shows {folder}; Ctrl-C ends it")) + "\n")
            console.file.flush()
            if browser:
                webbrowser.open(server.url)
            server.serve_forever(poll_interval=0.2)
        except Terminated:
            raise
        except KeyboardInterrupt:
            console.print("ended")
