"""``cpdebug search``: finds the layers that must keep their precision."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from cp_debug.cli import reading, tensorrt
from cp_debug.cli.bisect import Exporter
from cp_debug.cli.flags import MOST, JsonFile, MadeSeed, ModelName, QuantizedTest, grouped
from cp_debug.cli.typed import refuse
from cp_debug.errors import InputError
from cp_debug.loading import load_torch

_DURATION = re.compile(r"(?P<number>\d+(?:\.\d+)?)(?P<unit>[smh]?)")


@grouped
def search(
    model: ModelName = "centerpoint:tiny",
    backends: Annotated[
        str, typer.Option("--backends", "-b", help="The reference and one test.")
    ] = "torch,emu-fp16acc",
    goal: Annotated[
        str, typer.Option(help="rel_l2, max_abs, boxes_lost, boxes_gained, boxes_moved, map_drop; joined by 'and'.")
    ] = "rel_l2<1e-3",
    test_model: QuantizedTest = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Weights for the recipe: .pt, .safetensors, or what `cpdebug quantize` wrote.")
    ] = None,
    inputs: Annotated[Path | None, typer.Option(help=reading.INPUTS_HELP)] = None,
    data: Annotated[
        Path | None, typer.Option(help="For map_drop: an info file (.pkl); else the held-out synthetic scenes.")
    ] = None,
    samples: Annotated[int, typer.Option("--samples", "-n", min=1, max=MOST, help="How many samples.")] = 1,
    seed: MadeSeed = 0,
    max_builds: Annotated[int | None, typer.Option(min=1, max=MOST, help="Most builds (emulated: trials).")] = None,
    budget: Annotated[str | None, typer.Option(help="Time after which no trial begins: 90s, 30m, 2h.")] = None,
    log: Annotated[Path | None, typer.Option(help="One line per trial; a search resumes from it.")] = None,
    onnx: Annotated[
        Path | None, typer.Option(help="Write the mixed-precision graph (a folder, for several components).")
    ] = None,
    exporter: Annotated[Exporter, typer.Option(help="For torch models; auto: what all backends read.")] = Exporter.auto,
    unfolded: Annotated[bool, typer.Option("--unfolded", help="Do not fold BatchNorm.")] = False,
    json: JsonFile = None,
    *,
    engines: tensorrt.TensorRTFlags,
    files: reading.ReadingFlags,
) -> None:
    """Find layers to keep in FP32, none needless, to meet a goal. Of an INT8 graph: layers to leave unquantized.

    Unless a limit ends it first, none of them can be left out; that no smaller set exists is not shown.

    Exit code 1 when the goal was not reached.
    """
    from dataclasses import replace

    from cp_debug.backends.spec import parse_backends
    from cp_debug.cli.console import errors, show_document, steps
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
        exporter=exporter.chosen,
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
