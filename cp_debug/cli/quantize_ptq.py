"""``cpdebug quantize ptq``: INT8 without training."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cp_debug.cli import reading
from cp_debug.cli.calibration import Method, check_calibration
from cp_debug.cli.flags import MOST, grouped
from cp_debug.cli.typed import refuse


@grouped
def ptq(
    model: Annotated[
        str, typer.Argument(help="A recipe (`cpdebug models`), an .onnx file, or module:callable / file.py:callable.")
    ] = "centerpoint:tiny",
    *,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for checkpoint, caches and ONNX files.")],
    checkpoint: Annotated[Path | None, typer.Option(help="Weights for the recipe: .pt or .safetensors.")] = None,
    calib_data: Annotated[
        Path | None, typer.Option(help="Info file, point files, .npz or a folder; else made-up inputs.")
    ] = None,
    batches: Annotated[int, typer.Option(min=1, max=MOST, help="Calibration samples, at most.")] = 100,
    method: Annotated[Method, typer.Option(help="How the scales are chosen.")] = Method.mse,
    skip_layers: Annotated[
        list[str] | None, typer.Option(help="Leave these layers in FP32: globs over module paths; repeatable.")
    ] = None,
    cache: Annotated[
        Path | None, typer.Option(help="Scales of an earlier run (its folder, or a file) instead of calibrating.")
    ] = None,
    opset: Annotated[int, typer.Option(min=13, max=100, help="Opset of the files; TensorRT 8 reads up to 17.")] = 17,
    json: Annotated[str | None, typer.Option(help="Write JSON to a file, or to stdout with -.")] = None,
    files: reading.ReadingFlags,
) -> None:
    """Fold BatchNorm, calibrate, and write checkpoint, calibration caches and ONNX files with Q/DQ pairs.

    Weights get a scale a channel, inputs of layers one each, both operands of a residual addition one together.
    """
    from cp_debug.cli.console import show_document, steps
    from cp_debug.errors import InputError

    refuse(("method", "batches"), unless=cache is None, why="the scales are those of --cache")
    refuse(("opset",), unless=not model.endswith(".onnx"), why=f"{model} has an opset, which its copy keeps")
    how = files.chosen(model, calib_data)
    check_calibration(model, calib_data, batches, "--batches", how)
    from cp_debug.deploy.exporting import ExportOptions
    from cp_debug.deploy.quantize_output import quantize_ptq
    from cp_debug.quantization.open_quantized import is_quantized_checkpoint
    from cp_debug.recipes.registry import load_model
    from cp_debug.reports.quantization import render

    if checkpoint and is_quantized_checkpoint(checkpoint):
        raise InputError(f"--checkpoint: {checkpoint} is quantized already; expected weights in FP32")
    with steps() as on_step:
        result = quantize_ptq(
            load_model(model, checkpoint=checkpoint, reading=how),
            output,
            inputs=calib_data,
            batches=batches,
            method=method.value,
            skip_layers=skip_layers or (),
            cache=cache,
            options=ExportOptions(opset),
            on_step=on_step,
        )
    show_document(render(result), result.to_dict(), json)
