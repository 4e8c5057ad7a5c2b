"""``cpdebug bench``: the time that each part takes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cp_debug.cli import reading, tensorrt
from cp_debug.cli.flags import MOST, Checkpoint, JsonFile, grouped
from cp_debug.cli.given import check_configured, check_given
from cp_debug.cli.typed import refuse, refuse_export_folder
from cp_debug.loading import load_torch


@grouped
def bench(
    model: Annotated[str, typer.Argument(help="A model, or the configuration of `cpdebug deploy`.")] = (
        "centerpoint:tiny"
    ),
    backends: Annotated[str, typer.Option("--backends", "-b", help="Ratios refer to the first one.")] = (
        "torch,ort,ort-all"
    ),
    onnx_dir: Annotated[Path | None, typer.Option(help="Folder of `cpdebug export`; default: exported now.")] = None,
    recipe: Annotated[str | None, typer.Option("--model", help="For a configuration that names no model.")] = None,
    checkpoint: Checkpoint = None,
    inputs: Annotated[Path | None, typer.Option(help="Files or a folder, as for bisect, or an info file.")] = None,
    batch: Annotated[int, typer.Option(min=1, max=MOST, help="Clouds in one pass (CenterPoint).")] = 1,
    warmup: Annotated[int, typer.Option(min=0, max=MOST, help="Warm-up passes.")] = 3,
    repeats: Annotated[int, typer.Option("--repeats", "-n", min=1, max=MOST, help="Timed passes.")] = 20,
    json: JsonFile = None,
    trt_python: tensorrt.Python = None,
    *,
    files: reading.ReadingFlags,
) -> None:
    """Measure latency and memory on each backend. Every component, the glue in front of it, decoding and the
    whole are timed, with percentiles."""
    from tempfile import TemporaryDirectory

    from cp_debug.backends.spec import BackendSpec
    from cp_debug.cli.console import show_document, show_notes, steps
    from cp_debug.deploy.schema import SUFFIXES

    if not model.endswith(SUFFIXES):
        check_given(model, checkpoint=checkpoint)
    load_torch()
    from cp_debug.deploy.config import override
    from cp_debug.deploy.stages import Deployment, configured
    from cp_debug.errors import InputError
    from cp_debug.reports.deployment import latency_table
    from cp_debug.reports.sheet_terminal import Terminal

    with TemporaryDirectory(prefix="cpdebug-") as scratch, steps() as on_step:
        config, source = configured(model, recipe, Path(scratch))
        show_notes(config.notes)
        specs = [part.strip() for part in backends.split(",") if part.strip()]
        if not specs:
            raise InputError(f"--backends: {backends!r} names none; expected at least one, such as torch,ort")
        parsed = [BackendSpec.parse(spec) for spec in specs]
        why = f"none of {', '.join(specs)} is TensorRT"
        refuse(("trt_python",), unless=any(spec.family == "trt" for spec in parsed), why=why)
        why = f"{source} is a model, not a configuration"
        refuse(("recipe",), unless=config.model != model, why=why)
        on_the_fly = config.quantization is None and any("int8" in spec.name for spec in parsed)
        overrides = {"checkpoint": checkpoint, "data.path": inputs, "tensorrt.python": trt_python}
        config = override(config, {**overrides, "quantization": {"samples": 8} if on_the_fly else None})
        refuse_export_folder(config.model or "")
        how = files.chosen(config.model or "", config.data.path)
        check_configured(config, batch, reading=how)
        deployment = Deployment(config, source, on_step, how, on_event=on_step.on_event)
        benches = deployment.bench(specs, onnx_dir, batch=batch, warmup=warmup, repeats=repeats)
    show_notes(deployment.remarks.sentences)
    document = {"model": config.model, "batch": batch, "warmup": warmup, "repeats": repeats}
    title = f"{config.model}, batch {batch}, {repeats} passes after {warmup}"
    show_document(
        [Terminal(latency_table(benches, title))],
        {**document, "backends": [backend_bench.to_dict() for backend_bench in benches]},
        json,
    )
