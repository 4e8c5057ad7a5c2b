"""``cpdebug quantize ptq``: INT8, FP8, block-scaled types and INT4 without training."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cp_debug.cli import reading
from cp_debug.cli.calibration import Method, check_calibration
from cp_debug.cli.flags import MOST, JsonFile, ModelName, grouped
from cp_debug.cli.given import check_given
from cp_debug.cli.typed import refuse, typed
from cp_debug.loading import load_torch

if TYPE_CHECKING:
    from cp_debug.backends.narrow_options import NarrowOptions


@grouped
def ptq(
    model: ModelName = "centerpoint:tiny",
    *,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for checkpoint, caches and ONNX files.")],
    checkpoint: Annotated[Path | None, typer.Option(help="Weights for the recipe: .pt or .safetensors.")] = None,
    calib_data: Annotated[
        Path | None, typer.Option(help="Info file, point files, .npz or a folder; default: generated.")
    ] = None,
    batches: Annotated[int, typer.Option(min=1, max=MOST, help="Calibration samples, at most.")] = 100,
    precision: Annotated[
        str, typer.Option(help="int8, fp8, mxfp8, mxfp4, nvfp4 or int4, with options: fp8:channel, int4:g32:sym.")
    ] = "int8",
    method: Annotated[
        Method, typer.Option(help="How the scales are chosen. Other than int8: max (default) or percentile.")
    ] = Method.mse,
    skip_layers: Annotated[
        list[str] | None, typer.Option(help="Leave these layers in FP32: globs over module paths; repeatable.")
    ] = None,
    cache: Annotated[
        Path | None, typer.Option(help="Scales of an earlier run (its folder, or a file) instead of calibrating.")
    ] = None,
    opset: Annotated[
        int, typer.Option(min=13, max=100, help="Opset of the files; TensorRT 8 reads up to 17; FP8 needs 19, INT4 21.")
    ] = 17,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier run's files in --output.")] = False,
    json: JsonFile = None,
    files: reading.ReadingFlags,
) -> None:
    """Fold BatchNorm, calibrate, and write checkpoint, calibration caches and ONNX files with Q/DQ pairs.

    Weights get a scale a channel, inputs of layers one each, both operands of a residual addition one together.

    Other precisions: standard Q/DQ nodes with weights in codes, as the emulated backend of the same name computes, and
    a recipe for ModelOpt.
    """
    from cp_debug.cli.console import show_document, steps
    from cp_debug.errors import InputError

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
            job |= {"method": method.value, "options": ExportOptions(opset)}
            result: Any = quantize_ptq(loaded, output, cache=cache, **job)
        else:
            job["method"] = method.value if typed(("method",)) else "max"
            job["options"] = ExportOptions(opset if typed(("opset",)) else 21)
            result = quantize_narrow(loaded, output, narrow, **job)
    show_document(terminal(result), result.to_dict(), json)


def narrow_options(precision: str) -> NarrowOptions | None:
    """The options of a precision other than ``int8``; None for it. Raises InputError for one that nobody knows."""
    if precision == "int8":
        return None
    from cp_debug.backends.narrow_options import FAMILIES, NarrowOptions, is_narrow
    from cp_debug.errors import InputError

    if not is_narrow(precision):
        raise InputError(f"--precision: {precision!r}; expected int8 or one of {', '.join(FAMILIES)}")
    return NarrowOptions.parse(precision)


def _narrow(precision: str, method: Method, opset: int) -> NarrowOptions | None:
    """The options of a precision, checked with the flags that mean less there; None for ``int8``."""
    options = narrow_options(precision)
    if options is None:
        return None
    from cp_debug.deploy.quantize_narrow import check_method
    from cp_debug.errors import InputError
    from cp_debug.quantization.narrow_layers import calibrated, check_exportable, opset_of

    check_exportable(options)
    refuse(("cache",), unless=False, why="scales of an earlier run are of INT8")
    refuse(("method", "batches"), unless=calibrated(options), why=f"{options} has no scale that is calibrated")
    if typed(("method",)):
        check_method(options, method.value)
    if typed(("opset",)) and opset < opset_of(options):
        raise InputError(f"--opset: {opset}; {options} needs {opset_of(options)}")
    return options
