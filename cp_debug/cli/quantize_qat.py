"""``cpdebug quantize qat``: fine-tune a quantized model."""

from __future__ import annotations

import math
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from cp_debug.cli.flags import LAST_SEED, MOST, JsonFile
from cp_debug.cli.saving import check_new
from cp_debug.cli.typed import refuse
from cp_debug.errors import InputError


class Criterion(str, Enum):
    """Figure that decides when to stop."""

    loss = "loss"
    map = "map"


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
    data_root: Annotated[Path | None, typer.Option(help="Folder that paths in the info files are relative to.")] = None,
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
        Criterion, typer.Option(help="Held-out figure that decides about stopping.")
    ] = Criterion.loss,
    resume: Annotated[bool, typer.Option("--resume", help="Resume from OUTPUT.state, with the same options.")] = False,
    seed: Annotated[int, typer.Option(min=0, max=LAST_SEED, help="Seed of order and augmentation.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier OUTPUT, and its state.")] = False,
    json: JsonFile = None,
) -> None:
    """Fine-tune from the PTQ checkpoint: BatchNorm frozen, scales as calibrated, the best weights kept.

    Ctrl-C ends training and keeps the best; --resume goes on from the last validation.
    """
    from cp_debug.cli.console import show_document
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
            criterion=early_stop.value,
            seed=seed,
            state=state,
            resume=resume,
            on_step=on_step,
        )
        save_ptq_model(modules, output)
    show_document(render_qat(result, early_stop.value, output), result.to_dict(), json)
