"""``cpdebug ui``: a folder of results in the browser, served to this machine alone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def ui(
    folder: Annotated[Path, typer.Argument(help="A folder that contains results of `bisect --save` or `--json`.")],
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port on 127.0.0.1; 0 takes a free one.")] = 8650,
    browser: Annotated[bool, typer.Option("--browser", help="Open the list in a browser.")] = False,
) -> None:
    """Browse a folder of results. Read-only, on 127.0.0.1; Ctrl-C ends it."""
    import webbrowser

    from cp_debug.cli.console import console
    from cp_debug.errors import InputError, Terminated
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
