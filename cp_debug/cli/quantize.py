"""``cpdebug quantize``: INT8, calibrated, measured layer by layer, fine-tuned."""

from __future__ import annotations

import typer

from cp_debug.cli import quantize_ptq, quantize_qat, quantize_sensitivity

app = typer.Typer(
    name="quantize",
    help="INT8: calibrate a model, measure what each layer costs, fine-tune it.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(quantize_ptq.ptq)
app.command()(quantize_sensitivity.sensitivity)
app.command()(quantize_qat.qat)
