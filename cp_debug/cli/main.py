"""The command line: one file a command, errors in words, exit codes 0 agree, 1 divergence, 2 bad input, 3 unavailable."""

from __future__ import annotations

import sys

import typer

from cp_debug.cli import bisect, capture, compare, doctor, models
from cp_debug.cli.console import errors
from cp_debug.errors import CpdebugError

app = typer.Typer(
    name="cpdebug",
    help="Names the first layer whose result its precision cannot explain: PyTorch, ONNX Runtime and TensorRT side by side.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (bisect.bisect, capture.capture, compare.compare, doctor.doctor, models.models):
    app.command()(command)


def main() -> None:
    """Run the command line; every expected failure is one message on stderr and an exit code."""
    try:
        app()
    except CpdebugError as error:
        errors.print(f"[bold red]error:[/] {_escape(str(error))}", highlight=False)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        errors.print("interrupted")
        sys.exit(130)


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)
