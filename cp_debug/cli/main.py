"""The command line: one file a command, errors in words.

Exit codes: 0 agree, 1 divergence found, 2 bad usage or input, 3 backend unavailable.
"""

from __future__ import annotations

import os
import sys

import typer

from cp_debug.cli import (
    bench,
    bisect,
    build,
    bundle,
    capture,
    check,
    compare,
    demo,
    deploy,
    doctor,
    export,
    models,
    quantize,
    report,
    search,
    sweep,
    verify,
)
from cp_debug.cli import eval as evaluation
from cp_debug.cli.console import errors
from cp_debug.cli.typed import Command
from cp_debug.errors import CpdebugError

app = typer.Typer(
    name="cpdebug",
    help="PyTorch, ONNX Runtime and TensorRT side by side: names the first layer that its precision cannot explain.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (
    bench.bench,
    bisect.bisect,
    build.build,
    bundle.bundle,
    capture.capture,
    check.check,
    compare.compare,
    demo.demo,
    deploy.deploy,
    doctor.doctor,
    export.export,
    models.models,
    report.report,
    search.search,
    verify.verify,
):
    app.command(cls=Command)(command)
app.command("eval", cls=Command)(evaluation.evaluate)
app.add_typer(quantize.app)
app.add_typer(sweep.app)


def main() -> None:
    """Run the command line; every expected failure is one message on stderr and an exit code."""
    # Threads that wait in vain spin, and so take the cores from those they wait for when other programs run, too.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
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
