"""``cpdebug bundle``: the failing piece, ready for a bug report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cp_debug.cli.given import check_saved


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
    from cp_debug.cli.console import console, steps

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
