"""``cpdebug predict``: effects of a precision, before there is an engine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cp_debug.cli import reading
from cp_debug.cli.bisect import Exporter
from cp_debug.cli.flags import MOST, JsonFile, MadeSeed, ModelName, grouped
from cp_debug.loading import load_torch


@grouped
def predict(
    model: ModelName = "centerpoint:tiny",
    precision: Annotated[str, typer.Option(help="fp16, bf16, tf32; int8 for a file with Q/DQ pairs.")] = "fp16",
    target: Annotated[str, typer.Option(help="The runtime: trt-8.6, trt-10, trt-11.")] = "trt-8.6",
    builder_level: Annotated[
        int | None,
        typer.Option(min=0, max=5, help="The builder's optimization level; at 0 any layer may stay in FP32."),
    ] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="Weights for the recipe: .pt or .safetensors.")] = None,
    inputs: Annotated[Path | None, typer.Option(help=reading.INPUTS_HELP)] = None,
    samples: Annotated[int, typer.Option("--samples", "-n", min=1, max=MOST, help="How many samples.")] = 1,
    seed: MadeSeed = 0,
    goal: Annotated[str | None, typer.Option(help="As in search: also name the layers to keep in FP32 for it.")] = None,
    device: Annotated[str, typer.Option(help="Where to emulate: cpu, cuda, cuda:1.")] = "cpu",
    show_all: Annotated[bool, typer.Option("--all", help="Every layer, not only the largest errors.")] = False,
    exporter: Annotated[Exporter, typer.Option(help="For torch models; auto: what the target reads.")] = Exporter.auto,
    json: JsonFile = None,
    *,
    files: reading.ReadingFlags,
) -> None:
    """Predict what a precision will do, without an engine. Each layer's error with an interval, values beyond
    FP16's range, the effect on outputs and detections.

    Nothing is built: the network is emulated in the ways in which the target's kernels may compute it. Exit code 1 when
    some layer should stay in FP32, or an output is expected to be further off than the goal, or the tolerance, allows.
    """
    from cp_debug.cli.console import show_document, steps
    from cp_debug.mixed_precision.goal import Goal
    from cp_debug.prediction.targets import target_of

    target_of(target, precision)
    if goal is not None:
        Goal.parse(goal)
    how = files.checked(model, inputs, samples, checkpoint=checkpoint)
    load_torch()
    from cp_debug.prediction.predict import PredictOptions
    from cp_debug.prediction.predict import predict as run
    from cp_debug.reports.prediction import render

    options = PredictOptions(checkpoint, inputs, samples, seed, exporter.chosen, device, goal, how, builder_level)
    with steps() as on_step:
        result = run(model, precision, target, options=options, on_step=on_step)
    show_document(render(result, show_all=show_all), result.to_dict(), json)
    raise typer.Exit(int(not result.passes))
