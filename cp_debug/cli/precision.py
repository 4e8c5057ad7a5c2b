"""``cpdebug check``, ``predict`` and ``search``: what a precision will do, and which layers must keep theirs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from cp_debug.cli import flags, tensorrt
from cp_debug.cli.console import errors, show_document, steps
from cp_debug.cli.flags import INPUTS_HELP, MOST, grouped
from cp_debug.cli.typed import refuse
from cp_debug.errors import InputError
from cp_debug.loading import load_torch
from cp_debug.safe_text import some


@grouped
def check(
    model: flags.ModelName = "centerpoint:tiny",
    checkpoint: flags.PlainCheckpoint = None,
    inputs: Annotated[Path | None, typer.Option(help="Inputs, as for bisect.")] = None,
    seed: flags.MadeSeed = 0,
    activations: Annotated[
        bool, typer.Option(help="Also check the activations of one sample, in one FP32 pass.")
    ] = True,
    json: flags.JsonAlone = None,
    *,
    files: flags.ReadingFlags,
) -> None:
    """Look for trouble in an ONNX file before any run. FP16's range, long sums, tiny variances, INT8 scales,
    logits that are read as scores.

    Exits with 1 when there is a problem; risks alone leave it at 0.
    """
    from dataclasses import asdict, fields
    from tempfile import TemporaryDirectory

    from rich.text import Text

    from cp_debug.serialize import json_safe

    why = "--no-activations runs nothing"
    refuse(("inputs", "seed", *(f.name for f in fields(files))), unless=activations, why=why)
    how = files.checked(model, inputs, checkpoint=checkpoint)
    load_torch()
    from cp_debug.bisect.preflight import PROBLEM, Preflight
    from cp_debug.programs.pipeline import prepare, preparing
    from cp_debug.programs.tensor_inputs import numbers_where_needed
    from cp_debug.recipes.abilities import CountsSamples
    from cp_debug.recipes.registry import load_model

    loaded = load_model(model, checkpoint=checkpoint, seed=seed, reading=how)
    sample = next(iter(loaded.samples(1, seed, inputs)))
    total = loaded.sample_count(inputs) if inputs is not None and isinstance(loaded, CountsSamples) else 1
    with TemporaryDirectory(prefix="cpdebug-") as scratch, steps() as on_step:
        on_step(preparing(loaded), 0, 2)
        loaded, [sample] = numbers_where_needed(loaded, [sample], Path(scratch))
        programs = prepare(loaded, sample, Path(scratch))
        on_step("weights and sums, and what one sample shows" if activations else "weights and sums", 1, 2)
        concerns = Preflight(loaded, programs, sample if activations else None).concerns()
    lines = []
    for concern in concerns:
        style = "bold red" if concern.severity == PROBLEM else "bold yellow"
        lines.append(Text.assemble((f"{concern.severity}: {concern.check}", style), f": {concern.says}"))
        if concern.layers:
            lines.append(Text(f"   layers   {some(concern.layers, 6)}", "dim"))
        lines.append(Text(f"   fix      {concern.fix}"))
    if not concerns:
        one = "one sample" if total == 1 else f"the first of {total} samples"
        looked = f"weights, sums, scales, and the activations of {one}" if activations else "weights, sums and scales"
        found = f" in {looked}; `cpdebug predict` emulates a precision"
        lines.append(Text.assemble(("✓ nothing found", "bold green"), found))
    show_document(lines, json_safe([asdict(concern) for concern in concerns]), json)
    raise typer.Exit(int(any(concern.severity == PROBLEM for concern in concerns)))


@grouped
def predict(
    model: flags.ModelName = "centerpoint:tiny",
    precision: Annotated[str, typer.Option(help="fp16, bf16, tf32; int8 for a file with Q/DQ pairs.")] = "fp16",
    target: Annotated[str, typer.Option(help="The runtime: trt-8.6, trt-10, trt-11.")] = "trt-8.6",
    builder_level: Annotated[
        int | None,
        typer.Option(min=0, max=5, help="The builder's optimization level; at 0 any layer may stay in FP32."),
    ] = None,
    checkpoint: flags.PlainCheckpoint = None,
    inputs: Annotated[Path | None, typer.Option(help=INPUTS_HELP)] = None,
    samples: Annotated[int, typer.Option("--samples", "-n", min=1, max=MOST, help="How many samples.")] = 1,
    seed: flags.MadeSeed = 0,
    goal: Annotated[str | None, typer.Option(help="As in search: also name the layers to keep in FP32 for it.")] = None,
    device: Annotated[str, typer.Option(help="Where to emulate: cpu, cuda, cuda:1.")] = "cpu",
    show_all: Annotated[bool, typer.Option("--all", help="Every layer, not only the largest errors.")] = False,
    exporter: Annotated[flags.Exporter, typer.Option(help="For torch models; auto: what the target reads.")] = "auto",
    json: flags.JsonFile = None,
    *,
    files: flags.ReadingFlags,
) -> None:
    """Predict what a precision will do, without an engine. Each layer's error with an interval, values beyond
    FP16's range, the effect on outputs and detections.

    Nothing is built: the network is emulated in the ways in which the target's kernels may compute it. Exit code 1 when
    some layer should stay in FP32, or an output is expected to be further off than the goal, or the tolerance, allows.
    """
    from cp_debug.mixed_precision.goal import Goal
    from cp_debug.prediction.targets import target_of

    target_of(target, precision)
    if goal is not None:
        Goal.parse(goal)
    how = files.checked(model, inputs, samples, checkpoint=checkpoint)
    load_torch()
    from cp_debug.prediction.predict import PredictOptions
    from cp_debug.prediction.predict import predict as run
    from cp_debug.reports.mixed_precision import render_prediction

    options = PredictOptions(
        checkpoint, inputs, samples, seed, flags.chosen(exporter), device, goal, how, builder_level
    )
    with steps() as on_step:
        result = run(model, precision, target, options=options, on_step=on_step)
    show_document(render_prediction(result, show_all=show_all), result.to_dict(), json)
    raise typer.Exit(int(not result.passes))


_DURATION = re.compile(r"(?P<number>\d+(?:\.\d+)?)(?P<unit>[smh]?)")


@grouped
def search(
    model: flags.ModelName = "centerpoint:tiny",
    backends: Annotated[
        str, typer.Option("--backends", "-b", help="The reference and one test.")
    ] = "torch,emu-fp16acc",
    goal: Annotated[
        str, typer.Option(help="rel_l2, max_abs, boxes_lost, boxes_gained, boxes_moved, map_drop; joined by 'and'.")
    ] = "rel_l2<1e-3",
    test_model: flags.QuantizedTest = None,
    checkpoint: flags.Checkpoint = None,
    inputs: Annotated[Path | None, typer.Option(help=INPUTS_HELP)] = None,
    data: Annotated[
        Path | None, typer.Option(help="For map_drop: an info file (.pkl); else the held-out synthetic scenes.")
    ] = None,
    samples: Annotated[int, typer.Option("--samples", "-n", min=1, max=MOST, help="How many samples.")] = 1,
    seed: flags.MadeSeed = 0,
    max_builds: Annotated[int | None, typer.Option(min=1, max=MOST, help="Most builds (emulated: trials).")] = None,
    budget: Annotated[str | None, typer.Option(help="Time after which no trial begins: 90s, 30m, 2h.")] = None,
    log: Annotated[Path | None, typer.Option(help="One line per trial; a search resumes from it.")] = None,
    onnx: Annotated[
        Path | None, typer.Option(help="Write the mixed-precision graph (a folder, for several components).")
    ] = None,
    exporter: flags.CommonExporter = "auto",
    unfolded: flags.Unfolded = False,
    json: flags.JsonFile = None,
    *,
    engines: tensorrt.TensorRTFlags,
    files: flags.ReadingFlags,
) -> None:
    """Find layers to keep in FP32, none needless, to meet a goal. Of an INT8 graph: layers to leave unquantized.

    Unless a limit ends it first, none of them can be left out; that no smaller set exists is not shown.

    Exit code 1 when the goal was not reached.
    """
    from dataclasses import replace

    from cp_debug.backends.spec import parse_backends
    from cp_debug.mixed_precision.goal import Goal

    parsed, specs = Goal.parse(goal), parse_backends(backends, test=test_model)
    time_limit = None if budget is None else parse_duration(budget)
    engines.check(specs)
    refuse(("data",), unless="map_drop" in goal, why=f"the goal is {goal}; expected one with map_drop")
    source, scored = inputs or data, data is not None
    how = files.checked(model, source, samples, checkpoint=checkpoint, test_model=test_model, truth=scored)
    engines.check_installed(specs)
    load_torch()
    from cp_debug.mixed_precision.search import MixedPrecisionOptions, samples_for
    from cp_debug.mixed_precision.search import search as run
    from cp_debug.quantization.quantized_programs import load_quantized
    from cp_debug.recipes.abilities import samples_left_out
    from cp_debug.reports.mixed_precision import render

    options = MixedPrecisionOptions(
        max_builds=max_builds,
        budget=time_limit,
        log=log,
        exporter=flags.chosen(exporter),
        folded=not unfolded,
        test_model=test_model,
        inputs=inputs,
        onnx=onnx,
    )
    with steps() as on_step:
        loaded, parts = load_quantized(model, checkpoint, seed, reading=how)
        loaded_samples = samples_for(loaded, parsed, inputs=inputs, data=data, count=samples, seed=seed)
        created = tensorrt.make(specs, engines.options, on_step)
        result = run(loaded, created, parsed, loaded_samples, replace(options, quantized=parts), on_step)
        result.notes.extend(samples_left_out(loaded, source, samples, len(loaded_samples)))
    show_document(render(result), result.to_dict(), json)
    if onnx and result.reached:
        errors.print(f"{onnx}: written", soft_wrap=True)
    raise typer.Exit(0 if result.reached else 1)


def parse_duration(text: str) -> float:
    """``90s``, ``30m``, ``2h`` or plain seconds → seconds. Raises InputError."""
    match = _DURATION.fullmatch(text.strip())
    if match is None or float(match["number"]) == 0:
        raise InputError(f"--budget: {text!r}; expected a time such as 90s, 30m or 2h")
    return float(match["number"]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match["unit"]]
