"""``cpdebug check``: problems that can be known before a backend runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cp_debug.cli import reading
from cp_debug.cli.flags import LAST_SEED, grouped
from cp_debug.cli.given import check_given
from cp_debug.cli.typed import refuse, refuse_seed
from cp_debug.loading import load_torch


@grouped
def check(
    model: Annotated[str, typer.Argument(help="A model, as for bisect.")] = "centerpoint:tiny",
    checkpoint: Annotated[Path | None, typer.Option(help="Weights for the recipe: .pt or .safetensors.")] = None,
    inputs: Annotated[Path | None, typer.Option(help="Inputs, as for bisect.")] = None,
    seed: Annotated[int, typer.Option(min=0, max=LAST_SEED, help="Seed of made-up inputs.")] = 0,
    activations: Annotated[
        bool, typer.Option(help="Also look at the activations of one sample, in one FP32 pass.")
    ] = True,
    json: Annotated[bool, typer.Option("--json", help="Machine-readable, on stdout.")] = False,
    *,
    files: reading.ReadingFlags,
) -> None:
    """Look for what will go wrong: ranges of FP16, long sums, tiny variances, INT8 scales, logits read as scores.

    Exits with 1 when there is a problem; risks alone leave it at 0.
    """
    from dataclasses import asdict
    from json import dumps
    from tempfile import TemporaryDirectory

    from rich.text import Text

    from cp_debug.cli.console import console, steps
    from cp_debug.files import write_text
    from cp_debug.serialize import json_safe

    why = "--no-activations runs nothing"
    refuse(("inputs", "seed"), unless=activations, why=why)
    refuse_seed([model], inputs)
    how = files.chosen(model, inputs)
    check_given(model, inputs=inputs, checkpoint=checkpoint, reading=how)
    load_torch()
    from cp_debug.bisect.preflight import PROBLEM, Preflight
    from cp_debug.programs.pipeline import prepare, preparing
    from cp_debug.programs.tensor_inputs import numbers_where_needed
    from cp_debug.recipes.registry import load_model

    loaded = load_model(model, checkpoint=checkpoint, seed=seed, reading=how)
    sample = next(iter(loaded.samples(1, seed, inputs)))
    with TemporaryDirectory(prefix="cpdebug-") as scratch, steps() as on_step:
        on_step(preparing(loaded), 0, 2)
        loaded, [sample] = numbers_where_needed(loaded, [sample], Path(scratch))
        programs = prepare(loaded, sample, Path(scratch))
        on_step("weights and sums, and what one sample shows" if activations else "weights and sums", 1, 2)
        concerns = Preflight(loaded, programs, sample if activations else None).concerns()
    if json:
        write_text(dumps(json_safe([asdict(concern) for concern in concerns]), indent=1, allow_nan=False) + "\n", None)
    for concern in () if json else concerns:
        style = "bold red" if concern.severity == PROBLEM else "bold yellow"
        console.print(Text.assemble((f"{concern.severity}: {concern.check}", style), f": {concern.says}"))
        more = f" and {len(concern.layers) - 6} more" if len(concern.layers) > 6 else ""
        if concern.layers:
            console.print(Text(f"   layers   {', '.join(concern.layers[:6])}{more}", "dim"))
        console.print(Text(f"   fix      {concern.fix}"))
    if not concerns and not json:
        looked = (
            "weights, sums, scales, and the activations of one sample" if activations else "weights, sums and scales"
        )
        console.print(Text.assemble(("✓ nothing found", "bold green"), f" in {looked}"))
    raise typer.Exit(int(any(concern.severity == PROBLEM for concern in concerns)))
