"""``cpdebug diff``: two kept results, and what got better or worse."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cp_debug.cli.flags import JsonFile
from cp_debug.cli.given import check_saved


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
    from cp_debug.cli.console import command_line, show_document
    from cp_debug.errors import InputError
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
