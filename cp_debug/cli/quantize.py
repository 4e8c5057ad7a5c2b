"""``cpdebug quantize``: INT8, calibrated, measured layer by layer, fine-tuned."""

from __future__ import annotations

import typer

from cp_debug.cli import quantize_ptq, quantize_qat, quantize_sensitivity
from cp_debug.cli.typed import Command

app = typer.Typer(
    name="quantize",
    help="Quantize to INT8: calibrate, measure each layer, fine-tune.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command(cls=Command)(quantize_ptq.ptq)
app.command(cls=Command)(quantize_sensitivity.sensitivity)
app.command(cls=Command)(quantize_qat.qat)
