"""``cpdebug compare``: two captures, from two machines or two environments."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cp_debug.cli.flags import Atol, JsonFile, Rtol
from cp_debug.cli.typed import refuse


def compare(
    reference: Annotated[Path, typer.Argument(help="A capture.")],
    test: Annotated[Path, typer.Argument(help="A capture of the same model and inputs.")],
    rtol: Rtol = None,
    atol: Atol = None,
    force: Annotated[bool, typer.Option("--force", help="Compare even if models or inputs differ.")] = False,
    maps: Annotated[
        list[str] | None,
        typer.Option("--map", help="REFERENCE=TEST: compare these two tensors; OUTPUT=: leave one out; repeatable."),
    ] = None,
    show_all: Annotated[bool, typer.Option("--all", help="Every tensor.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Only the verdict, one line for each test.")] = False,
    json: JsonFile = None,
    csv: Annotated[Path | None, typer.Option(help="Write the table as CSV; - is stdout.")] = None,
) -> None:
    """Compare two captures tensor by tensor."""
    from cp_debug.probes.capture import Capture

    captures = Capture.open(reference), Capture.open(test)
    why = "both captures are of one model and the same inputs"
    refuse(("force",), unless=bool(captures[0].differences(captures[1])), why=why)
    for text in maps or ():
        refuse(("maps",), unless=not _is_identity(text), why=f"{text}: tensors of one name are compared as it is")
    from cp_debug.bisect.recording import compare_captures
    from cp_debug.cli.console import show

    result = compare_captures(*captures, rtol=rtol, atol=atol, force=force, maps=maps or ())
    show(result, json=json, csv=csv, show_all=show_all, quiet=quiet)
    raise typer.Exit(0 if result.agrees else 1)


def _is_identity(text: str) -> bool:
    """Whether a text pairs a name with itself; names may hold a ``=``, too."""
    middle = len(text) // 2
    return text[:middle] + "=" + text[:middle] == text
