"""``cpdebug export``: the ONNX files that are deployed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cp_debug.cli.bisect import Exporter
from cp_debug.cli.flags import MadeSeed, RotYAxis
from cp_debug.cli.given import check_given
from cp_debug.cli.saving import check_new
from cp_debug.cli.typed import refuse, refuse_seed
from cp_debug.errors import InputError
from cp_debug.loading import load_torch

OLDEST_EXPORTED = 11
"""Oldest opset to which a torch module is exported."""


def export(
    model: Annotated[
        str, typer.Argument(help="A recipe (`cpdebug models`), module:callable / file.py:callable, or .onnx.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the files.")],
    checkpoint: Annotated[Path | None, typer.Option(help="Weights: .pt or .safetensors.")] = None,
    opset: Annotated[
        int | None,
        typer.Option(min=7, max=100, help="TensorRT 8 reads up to 17.  [default: 17; that of an ONNX file]"),
    ] = None,
    exporter: Annotated[Exporter, typer.Option(help="auto: TorchScript below opset 18, dynamo from there.")] = (
        Exporter.auto
    ),
    unfolded: Annotated[bool, typer.Option("--unfolded", help="Do not fold BatchNorm and constants.")] = False,
    simplify: Annotated[bool, typer.Option("--simplify", help="Run onnxscript's optimizer over the graph.")] = False,
    rot_y_axis_reference: RotYAxis = False,
    quantized: Annotated[
        Path | None, typer.Option(help="Checkpoint of `quantize ptq` or `qat`: the files get its Q/DQ pairs.")
    ] = None,
    inputs: Annotated[Path | None, typer.Option(help="Samples to export and compare with; default: generated.")] = None,
    seed: MadeSeed = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier export in --output.")] = False,
) -> None:
    """Export a model's components as ONNX files. Their batch and spatial axes are free; each file is aligned with
    its module and checked on two inputs of different sizes.

    An ONNX file is checked, brought to --opset by ONNX's own converter, and compared with the original by ONNX Runtime.
    """
    from cp_debug.cli.console import console, show_notes, steps

    is_file = model.endswith(".onnx")
    flags = ("checkpoint", "exporter", "unfolded", "rot_y_axis_reference", "quantized")
    refuse(flags, unless=not is_file, why=f"{model} is an ONNX file, which no torch module is exported for")
    if not is_file and opset is not None and opset < OLDEST_EXPORTED:
        raise InputError(f"--opset: {opset}; expected {OLDEST_EXPORTED} or more to export a torch module")
    refuse_seed([model], inputs)
    check_given(model, inputs=inputs, checkpoint=checkpoint)
    load_torch()
    from cp_debug.deploy.exporting import OPSET, ExportOptions, export_model, own_files
    from cp_debug.deploy.file_export import SAMPLES, export_files
    from cp_debug.deploy.quantize_output import export_quantized
    from cp_debug.deploy.stages import turn_outputs
    from cp_debug.files import resolved
    from cp_debug.quantization.open_quantized import open_quantized
    from cp_debug.recipes.abilities import Remarks
    from cp_debug.recipes.registry import load_model
    from cp_debug.reports.deployment import export_lines

    loaded = load_model(model, checkpoint=checkpoint, seed=seed)
    originals = {resolved(component.onnx_path) for component in loaded.components if component.onnx_path is not None}
    files = [output / f"{component.name}.onnx" for component in loaded.components]
    check_new("--output", (file for file in files if resolved(file) not in originals), overwrite)
    if rot_y_axis_reference:
        turn_outputs(loaded)
    options = ExportOptions(opset or OPSET, exporter.chosen, not unfolded, simplify)
    with steps() as on_step:
        samples = list(loaded.samples(SAMPLES if is_file else 1, seed, inputs))
        remarks = Remarks(loaded)
        for sample in samples:
            remarks.see(sample)
        show_notes(remarks.sentences)
        if is_file:
            programs = own_files(loaded) or []
            exported = export_files(loaded, programs, samples, output, opset=opset, simplify=simplify, on_step=on_step)
        elif quantized is None:
            exported = export_model(loaded, samples[0], output, options, on_step=on_step)
        else:
            opened = open_quantized(loaded, quantized)
            exported = export_quantized(loaded, opened, samples[0], output, options, on_step=on_step)
    for line in export_lines(exported):
        console.print(line, soft_wrap=True)
