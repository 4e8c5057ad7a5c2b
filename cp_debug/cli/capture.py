"""``cpdebug capture``: keep every tensor of one backend's run, for a comparison on another day or another machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cp_debug.cli import calibration, reading, tensorrt
from cp_debug.cli.bisect import Exporter
from cp_debug.cli.flags import MOST, MadeSeed, grouped
from cp_debug.cli.saving import replacing
from cp_debug.loading import load_torch


@grouped
def capture(
    model: Annotated[str, typer.Argument(help="A recipe, an .onnx file, or module:callable.")] = "centerpoint:tiny",
    backend: Annotated[str, typer.Option("--backend", "-b", help="The backend that runs.")] = "torch",
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the capture; new or empty.")] = Path(
        "capture"
    ),
    checkpoint: Annotated[Path | None, typer.Option(help="Weights for the recipe: .pt or .safetensors.")] = None,
    inputs: Annotated[Path | None, typer.Option(help=reading.INPUTS_HELP)] = None,
    samples: Annotated[int, typer.Option(min=1, max=MOST, help="How many samples.")] = 1,
    seed: MadeSeed = 0,
    exporter: Annotated[Exporter, typer.Option(help="For torch models; auto: what the backend reads.")] = Exporter.auto,
    unfolded: Annotated[bool, typer.Option("--unfolded", help="Do not fold BatchNorm.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier capture in --output.")] = False,
    *,
    int8: calibration.CalibrationFlags,
    engines: tensorrt.ProbeFlags,
    files: reading.ReadingFlags,
) -> None:
    """Run one backend with every probe and write a capture."""
    from contextlib import ExitStack

    from cp_debug.backends.spec import BackendSpec
    from cp_debug.cli.console import console, show_notes, steps

    specs = [BackendSpec.parse(backend)]
    engines.check(specs)
    int8.check(specs, calibration.own_scales(specs, model, checkpoint, None))
    calibrated = [int8.calib_data] if "int8" in specs[0].name else []
    how = files.checked(model, inputs, samples, *calibrated, checkpoint=checkpoint)
    engines.check_installed(specs)
    calibration.check_calibration(model, int8.calib_data, int8.calib_samples, reading=how)
    load_torch()
    from cp_debug.bisect.recording import record
    from cp_debug.quantization.quantized_programs import load_quantized

    with ExitStack() as stack, steps() as on_step:
        target = stack.enter_context(replacing("--output", output, overwrite))
        engine_options = engines.calibrated(model, checkpoint, stack)
        (opened_backend,) = tensorrt.make(specs, engine_options, on_step)
        loaded, parts = load_quantized(model, checkpoint, seed, inputs, how)
        recorded = record(
            loaded,
            opened_backend,
            target,
            inputs=inputs,
            samples=samples,
            seed=seed,
            exporter=exporter.chosen,
            folded=not unfolded,
            on_step=on_step,
            parts=parts,
            calibration=int8.chosen,
        )
    show_notes(recorded.manifest.get("notes", []))
    size = sum(file.stat().st_size for file in output.iterdir()) / 2**10
    amount = f"{size / 2**10:.1f} MiB" if size >= 2**10 else f"{size:.0f} KiB"
    samples_taken = f"{len(recorded.samples)} sample" + ("s" if len(recorded.samples) > 1 else "")
    console.print(f"{output}: {len(recorded.entries)} tensors of {samples_taken}, {amount}", soft_wrap=True)
