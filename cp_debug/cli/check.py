"""``cpdebug check``: problems that can be known before a backend runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cp_debug.cli import reading
from cp_debug.cli.flags import JsonAlone, MadeSeed, grouped
from cp_debug.cli.typed import refuse
from cp_debug.loading import load_torch
from cp_debug.safe_text import some

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from rich.text import Text

    from cp_debug.bisect.preflight import Concern


@grouped
def check(
    model: Annotated[str, typer.Argument(help="A model, as for bisect.")] = "centerpoint:tiny",
    checkpoint: Annotated[Path | None, typer.Option(help="Weights for the recipe: .pt or .safetensors.")] = None,
    inputs: Annotated[Path | None, typer.Option(help="Inputs, as for bisect.")] = None,
    seed: MadeSeed = 0,
    activations: Annotated[
        bool, typer.Option(help="Also check the activations of one sample, in one FP32 pass.")
    ] = True,
    json: JsonAlone = None,
    *,
    files: reading.ReadingFlags,
) -> None:
    """Look for trouble in an ONNX file before any run. FP16's range, long sums, tiny variances, INT8 scales,
    logits that are read as scores.

    Exits with 1 when there is a problem; risks alone leave it at 0.
    """
    from dataclasses import asdict, fields
    from tempfile import TemporaryDirectory

    from cp_debug.cli.console import show_document, steps
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
    lines = _lines(concerns, activations, total)
    show_document(lines, json_safe([asdict(concern) for concern in concerns]), json)
    raise typer.Exit(int(any(concern.severity == PROBLEM for concern in concerns)))


def _lines(concerns: Sequence[Concern], activations: bool, total: int) -> Iterator[Text]:
    """Lines about each concern, or that there is none in the first of ``total`` samples."""
    from rich.text import Text

    from cp_debug.bisect.preflight import PROBLEM

    for concern in concerns:
        style = "bold red" if concern.severity == PROBLEM else "bold yellow"
        yield Text.assemble((f"{concern.severity}: {concern.check}", style), f": {concern.says}")
        if concern.layers:
            yield Text(f"   layers   {some(concern.layers, 6)}", "dim")
        yield Text(f"   fix      {concern.fix}")
    if not concerns:
        one = "one sample" if total == 1 else f"the first of {total} samples"
        looked = f"weights, sums, scales, and the activations of {one}" if activations else "weights, sums and scales"
        yield Text.assemble(("✓ nothing found", "bold green"), f" in {looked}; `cpdebug predict` emulates a precision")
