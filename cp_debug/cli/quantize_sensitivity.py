"""``cpdebug quantize sensitivity``: layers that suffer from INT8, and those to leave in FP32."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cp_debug.cli.calibration import Method, check_calibration
from cp_debug.cli.flags import LAST_SEED, MOST, JsonFile, check_made_up
from cp_debug.cli.given import check_given
from cp_debug.cli.quantize_ptq import narrow_options
from cp_debug.cli.typed import refuse
from cp_debug.loading import load_torch


def sensitivity(
    model: Annotated[
        str, typer.Argument(help="A recipe (`cpdebug models`), module:callable or .onnx file.")
    ] = "centerpoint:tiny",
    quantized: Annotated[
        Path | None, typer.Option("--from", help="Checkpoint of `quantize ptq` or `qat`; default: calibrate now.")
    ] = None,
    precision: Annotated[
        str,
        typer.Option(help="int8, or fp8, mxfp8, mxfp4, nvfp4, int4 with options, emulated."),
    ] = "int8",
    checkpoint: Annotated[Path | None, typer.Option(help="Weights for the recipe: .pt or .safetensors.")] = None,
    calib_data: Annotated[
        Path | None, typer.Option(help="Info file, point files or a folder; else held-out synthetic scenes.")
    ] = None,
    batches: Annotated[int, typer.Option(min=1, max=MOST, help="Calibration samples.")] = 20,
    method: Annotated[Method, typer.Option(help="How the scales are chosen.")] = Method.mse,
    skip_layers: Annotated[
        list[str] | None, typer.Option(help="Layers that stay in FP32 anyway: globs; repeatable.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Data to measure on: an info file (.pkl); else held-out synthetic scenes.")
    ] = None,
    samples: Annotated[int, typer.Option("--samples", "-n", min=1, max=MOST, help="At most this many samples.")] = 20,
    data_root: Annotated[Path | None, typer.Option(help="Folder that paths in the info file are relative to.")] = None,
    seed: Annotated[
        int, typer.Option(min=0, max=LAST_SEED, help="Seed of generated inputs; first synthetic scene to measure on.")
    ] = 0,
    auto: Annotated[
        float | None,
        typer.Option(
            min=0.0, help="Choose what stays in FP32 so that at most this mAP is lost (no detector: output error)."
        ),
    ] = None,
    draws: Annotated[int, typer.Option(min=0, max=MOST, help="Bootstrap draws for the intervals.")] = 200,
    show_all: Annotated[bool, typer.Option("--all", help="Show every layer.")] = False,
    json: JsonFile = None,
    csv: Annotated[Path | None, typer.Option(help="Write a row for each layer as CSV; - is stdout.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write chart and table as one HTML file.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write the chart as SVG.")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for sensitivity.json, .csv, .html and .svg.")
    ] = None,
) -> None:
    """Tell what each layer in INT8 makes of the outputs' error; leave the worst out one by one: error, mAP and NDS.

    Exit code 1 when all in INT8 loses more than --auto.
    """
    from cp_debug.cli.console import command_line, show_document, steps
    from cp_debug.mixed_precision.goal import check_budget
    from cp_debug.recipes.data.base import DataOptions

    if auto is not None:
        check_budget(auto)
    refuse(("calib_data", "batches", "method"), unless=quantized is None, why="the scales are those of --from")
    narrow = narrow_options(precision)
    why = f"scales of {precision} are computed from the current numbers, and every layer with a weight is measured"
    refuse(("quantized", "calib_data", "batches", "method", "skip_layers"), unless=narrow is None, why=why)
    refuse(("data_root",), unless=data is not None, why="without --data, the samples are synthetic scenes")
    check_made_up(samples, data, given_by="--data")
    check_calibration(model, calib_data, batches, "--batches")
    read = DataOptions(data_root)
    check_given(model, inputs=data, samples=samples, checkpoint=checkpoint, options=read, flag="--data")
    load_torch()
    from cp_debug.mixed_precision.sensitivity import (
        check_samples,
        int8_runner,
        narrow_runner,
        profile_of,
        scored_samples,
    )
    from cp_debug.quantization.open_quantized import open_quantized
    from cp_debug.recipes.registry import load_model
    from cp_debug.reports.sensitivity import render, write_chart, write_page

    with steps() as on_step:
        loaded = load_model(model, checkpoint=checkpoint, seed=seed)
        source, chosen_samples = scored_samples(loaded, data, samples, seed, read)
        check_samples(chosen_samples)
        if narrow is not None:
            runner = narrow_runner(loaded, str(narrow), chosen_samples[0])
        else:
            skip, how = skip_layers or (), method.value
            opened = open_quantized(
                loaded, quantized, calib_data, batches, method=how, skip_layers=skip, on_step=on_step
            )
            runner = int8_runner(loaded, opened, chosen_samples[0])
        profile = profile_of(runner, chosen_samples, data=source, budget=auto, draws=draws, on_step=on_step)
    if output:
        output.mkdir(parents=True, exist_ok=True)
        json, csv = json or str(output / "sensitivity.json"), csv or output / "sensitivity.csv"
        html, plot = html or output / "sensitivity.html", plot or output / "sensitivity.svg"
    show_document(render(profile, show_all=show_all), profile.to_dict(), json, csv, profile.to_pandas)
    if html:
        write_page(profile, command_line(), html)
    if plot:
        write_chart(profile, plot)
    raise typer.Exit(1 if profile.choice is not None and profile.choice.skipped else 0)
