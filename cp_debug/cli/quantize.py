"""``cpdebug quantize``: INT8 and narrower types, calibrated, measured layer by layer, fine-tuned."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from cp_debug.cli import flags
from cp_debug.cli.console import command_line, show_document, steps
from cp_debug.cli.flags import LAST_SEED, MOST, check_calibration, check_made_up, grouped
from cp_debug.cli.given import check_given, check_new
from cp_debug.cli.typed import Command, refuse, typed
from cp_debug.errors import InputError
from cp_debug.loading import load_torch

if TYPE_CHECKING:
    from cp_debug.backends.narrow_options import NarrowOptions


@grouped
def ptq(
    model: flags.ModelName = "centerpoint:tiny",
    *,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for checkpoint, caches and ONNX files.")],
    checkpoint: flags.PlainCheckpoint = None,
    calib_data: flags.CalibData = None,
    batches: Annotated[int, typer.Option(min=1, max=MOST, help="Calibration samples, at most.")] = 100,
    precision: Annotated[
        str, typer.Option(help="int8, fp8, mxfp8, mxfp4, nvfp4 or int4, with options: fp8:channel, int4:g32:sym.")
    ] = "int8",
    method: Annotated[
        flags.Method, typer.Option(help="How the scales are chosen. Other than int8: max (default) or percentile.")
    ] = "mse",
    skip_layers: flags.SkipLayers = None,
    cache: Annotated[
        Path | None, typer.Option(help="Scales of an earlier run (its folder, or a file) instead of calibrating.")
    ] = None,
    opset: Annotated[
        int, typer.Option(min=13, max=100, help="Opset of the files; TensorRT 8 reads up to 17; FP8 needs 19, INT4 21.")
    ] = 17,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier run's files in --output.")] = False,
    json: flags.JsonFile = None,
    files: flags.ReadingFlags,
) -> None:
    """Fold BatchNorm, calibrate, and write checkpoint, calibration caches and ONNX files with Q/DQ pairs.

    Weights get a scale a channel, inputs of layers one each, both operands of a residual addition one together.

    Other precisions: standard Q/DQ nodes with weights in codes, as the emulated backend of the same name computes, and
    a recipe for ModelOpt.
    """
    refuse(("method", "batches"), unless=cache is None, why="the scales are those of --cache")
    refuse(("opset",), unless=not model.endswith(".onnx"), why=f"{model} has an opset, which its copy keeps")
    narrow = _narrow(precision, method, opset)
    how = files.chosen(model, calib_data)
    check_calibration(model, calib_data, batches, "--batches", how)
    check_given(model, checkpoint=checkpoint)
    load_torch()
    from cp_debug.deploy.exporting import ExportOptions
    from cp_debug.deploy.quantize_narrow import quantize_narrow
    from cp_debug.deploy.quantize_output import quantize_ptq
    from cp_debug.display import terminal
    from cp_debug.quantization.open_quantized import is_quantized_checkpoint
    from cp_debug.recipes.registry import load_model

    if checkpoint and is_quantized_checkpoint(checkpoint):
        raise InputError(f"--checkpoint: {checkpoint} is quantized already; expected weights in FP32")
    job: dict[str, Any] = {"inputs": calib_data, "batches": batches, "skip_layers": skip_layers or ()}
    with steps() as on_step:
        loaded = load_model(model, checkpoint=checkpoint, reading=how)
        job |= {"overwrite": overwrite, "on_step": on_step}
        if narrow is None:
            job |= {"method": method, "options": ExportOptions(opset)}
            result: Any = quantize_ptq(loaded, output, cache=cache, **job)
        else:
            job["method"] = method if typed(("method",)) else "max"
            job["options"] = ExportOptions(opset if typed(("opset",)) else 21)
            result = quantize_narrow(loaded, output, narrow, **job)
    show_document(terminal(result), result.to_dict(), json)


def narrow_options(precision: str) -> NarrowOptions | None:
    """The options of a precision other than ``int8``; None for it. Raises InputError for one that nobody knows."""
    if precision == "int8":
        return None
    from cp_debug.backends.narrow_options import FAMILIES, NarrowOptions, is_narrow

    if not is_narrow(precision):
        raise InputError(f"--precision: {precision!r}; expected int8 or one of {', '.join(FAMILIES)}")
    return NarrowOptions.parse(precision)


def _narrow(precision: str, method: flags.Method, opset: int) -> NarrowOptions | None:
    """The options of a precision, checked with the flags that mean less there; None for ``int8``."""
    options = narrow_options(precision)
    if options is None:
        return None
    from cp_debug.deploy.quantize_narrow import check_method
    from cp_debug.quantization.narrow_layers import calibrated, check_exportable, opset_of

    check_exportable(options)
    refuse(("cache",), unless=False, why="scales of an earlier run are of INT8")
    refuse(("method", "batches"), unless=calibrated(options), why=f"{options} has no scale that is calibrated")
    if typed(("method",)):
        check_method(options, method)
    if typed(("opset",)) and opset < opset_of(options):
        raise InputError(f"--opset: {opset}; {options} needs {opset_of(options)}")
    return options


def sensitivity(
    model: flags.ModelName = "centerpoint:tiny",
    quantized: Annotated[
        Path | None, typer.Option("--from", help="Checkpoint of `quantize ptq` or `qat`; default: calibrate now.")
    ] = None,
    precision: Annotated[
        str,
        typer.Option(help="int8, or fp8, mxfp8, mxfp4, nvfp4, int4 with options, emulated."),
    ] = "int8",
    checkpoint: flags.PlainCheckpoint = None,
    calib_data: flags.CalibData = None,
    batches: Annotated[int, typer.Option(min=1, max=MOST, help="Calibration samples.")] = 20,
    method: Annotated[flags.Method, typer.Option(help="How the scales are chosen.")] = "mse",
    skip_layers: flags.SkipLayers = None,
    data: Annotated[
        Path | None, typer.Option(help="Data to measure on: an info file (.pkl); else held-out synthetic scenes.")
    ] = None,
    samples: Annotated[int, typer.Option("--samples", "-n", min=1, max=MOST, help="At most this many samples.")] = 20,
    data_root: flags.DataRoot = None,
    seed: flags.SceneSeed = 0,
    auto: Annotated[
        float | None,
        typer.Option(
            min=0.0, help="Choose what stays in FP32 so that at most this mAP is lost (no detector: output error)."
        ),
    ] = None,
    draws: Annotated[int, typer.Option(min=0, max=MOST, help="Bootstrap draws for the intervals.")] = 200,
    show_all: Annotated[bool, typer.Option("--all", help="Show every layer.")] = False,
    json: flags.JsonFile = None,
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
            skipped, how = skip_layers or (), method
            opened = open_quantized(
                loaded, quantized, calib_data, batches, method=how, skip_layers=skipped, on_step=on_step
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


def qat(
    model: Annotated[str, typer.Argument(help="A CenterPoint (`cpdebug models`).")] = "centerpoint:tiny",
    *,
    start: Annotated[Path, typer.Option("--from", help="Checkpoint of `quantize ptq`.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The fine-tuned checkpoint.")],
    data: Annotated[
        Path | None, typer.Option(help="Training data: an info file (.pkl); else synthetic training scenes.")
    ] = None,
    scenes: Annotated[int, typer.Option(min=1, max=MOST, help="Training scenes, at most.")] = 400,
    val_data: Annotated[
        Path | None, typer.Option(help="Held out: an info file (.pkl); else held-out synthetic scenes.")
    ] = None,
    val_scenes: Annotated[int, typer.Option(min=1, max=MOST, help="Held-out scenes, at most.")] = 12,
    data_root: flags.DataRoot = None,
    epochs: Annotated[
        int | None, typer.Option(min=1, max=MOST, help="Passes over the training scenes, instead of --steps.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, max=MOST, help="Optimizer steps, at most.")] = 300,
    batch: Annotated[int, typer.Option(min=1, max=MOST, help="Scenes per step.")] = 2,
    lr: Annotated[float, typer.Option(min=1e-12, max=1.0, help="Learning rate of Adam; decays to 0.")] = 5e-4,
    interval: Annotated[int, typer.Option(min=1, max=MOST, help="Steps between validations.")] = 50,
    patience: Annotated[
        int, typer.Option(min=1, max=MOST, help="Stop after this many validations without improvement.")
    ] = 4,
    early_stop: Annotated[
        Literal["loss", "map"], typer.Option(help="Held-out figure that decides about stopping.")
    ] = "loss",
    resume: Annotated[bool, typer.Option("--resume", help="Resume from OUTPUT.state, with the same options.")] = False,
    seed: Annotated[int, typer.Option(min=0, max=LAST_SEED, help="Seed of order and augmentation.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier OUTPUT, and its state.")] = False,
    json: flags.JsonFile = None,
) -> None:
    """Fine-tune from the PTQ checkpoint: BatchNorm frozen, scales as calibrated, the best weights kept.

    Ctrl-C ends training and keeps the best; --resume goes on from the last validation.
    """
    from cp_debug.cli.console import steps as progress
    from cp_debug.quantization.checkpoint import save_ptq_model
    from cp_debug.quantization.open_quantized import modules_of, open_quantized
    from cp_debug.quantization.qat import QatOptions
    from cp_debug.quantization.qat_centerpoint import (
        as_trainable,
        finetune_centerpoint,
        held_out_scenes,
        training_scenes,
    )
    from cp_debug.recipes.data.base import DataOptions
    from cp_debug.recipes.registry import load_model
    from cp_debug.reports.quantization import render_qat

    refuse(("steps",), unless=epochs is None, why="--epochs sets how long it trains")
    scenes_only = data is None and val_data is None
    refuse(("data_root",), unless=not scenes_only, why="without --data or --val-data there are synthetic scenes only")
    check_new("--output", [output], overwrite or resume)
    state = output.with_name(f"{output.name}.state")
    if state.exists() and not resume and not overwrite:
        raise InputError(f"--output: {state} is from an earlier run; --resume continues it, --overwrite starts again")
    with progress() as on_step:
        loaded = as_trainable(load_model(model))
        training = training_scenes(loaded, data, scenes, DataOptions(data_root))
        options = QatOptions(epochs * math.ceil(len(training) / batch) if epochs else steps, lr, interval, patience)
        modules = modules_of(open_quantized(loaded, start))
        result = finetune_centerpoint(
            loaded,
            modules,
            training,
            held_out_scenes(loaded, val_data, val_scenes, DataOptions(data_root)),
            options,
            batch=batch,
            criterion=early_stop,
            seed=seed,
            state=state,
            resume=resume,
            on_step=on_step,
        )
        save_ptq_model(modules, output)
    show_document(render_qat(result, early_stop, output), result.to_dict(), json)


app = typer.Typer(
    name="quantize",
    help="Quantize to INT8: calibrate, measure each layer, fine-tune.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command(cls=Command)(ptq)
app.command(cls=Command)(sensitivity)
app.command(cls=Command)(qat)
