"""``cpdebug eval``: scores the detections of several backends."""

from __future__ import annotations

from dataclasses import fields
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cp_debug.cli import flags, tensorrt
from cp_debug.cli.console import show_document, steps
from cp_debug.cli.flags import LAST_SEED, MOST, check_calibration, check_made_up, grouped
from cp_debug.cli.given import check_given
from cp_debug.cli.typed import refuse, refuse_data_flags, refuse_export_flags
from cp_debug.loading import load_torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cp_debug.backends.base import Program


@grouped
def evaluate(
    model: Annotated[
        str,
        typer.Argument(
            help="A recipe that detects (`cpdebug models`), or the description of exported files (.yaml, .toml, .json)."
        ),
    ] = "centerpoint:tiny",
    backends: Annotated[str, typer.Option("--backends", "-b", help="Reference first, then the tests.")] = "torch,ort",
    data: flags.Scenes = None,
    samples: Annotated[int, typer.Option("--samples", "-n", min=1, max=MOST, help="At most this many samples.")] = 50,
    checkpoint: flags.Checkpoint = None,
    data_root: flags.DataRoot = None,
    sweeps: Annotated[int, typer.Option(min=0, max=MOST, help="Earlier sweeps to merge, at most.")] = 9,
    skip_missing: Annotated[bool, typer.Option("--skip-missing", help="Leave out samples without a cloud.")] = False,
    ranges: Annotated[
        str, typer.Option("--range", help="model, nuscenes, metres, or CLASS=METRES,… from the sensor.")
    ] = "model",
    min_points: Annotated[int, typer.Option(min=0, max=MOST, help="Points that an object must have to count.")] = 1,
    draws: Annotated[int, typer.Option(min=0, max=MOST, help="Bootstrap draws for the intervals.")] = 1000,
    seed: Annotated[int, typer.Option(min=0, max=LAST_SEED, help="Seed of the bootstrap; first synthetic scene.")] = 0,
    max_drop: Annotated[float, typer.Option(min=0, help="mAP that a backend may lose.")] = 0.01,
    t4: Annotated[
        bool, typer.Option("--t4", help="Also T4's metric: mAP and mAPH by TIER IV's perception_eval (extra t4).")
    ] = False,
    exporter: Annotated[flags.Exporter, typer.Option(help="For torch models.")] = "auto",
    unfolded: flags.Unfolded = False,
    json: flags.JsonFile = None,
    csv: Annotated[
        Path | None, typer.Option(help="Write the figures of each backend and class as CSV; - is stdout.")
    ] = None,
    predictions: Annotated[Path | None, typer.Option(help="Write every detection, as .npz.")] = None,
    *,
    int8: flags.CalibrationFlags,
    engines: tensorrt.TensorRTFlags,
) -> None:
    """Score backends on a data set: mAP, NDS, with intervals. Errors as nuScenes defines them, or AP by overlap.

    Exit code 1 when a backend's mAP, T4's among them, is lower than the reference's by more than --max-drop and the
    95 % interval of the difference is below 0, or when its outputs hold NaN or Inf on more samples than the
    reference's.
    """
    from cp_debug.backends.spec import parse_backends
    from cp_debug.deploy.documents import SUFFIXES
    from cp_debug.recipes.data.base import DataOptions, iterate

    specs, read = parse_backends(backends), DataOptions(data_root, sweeps, skip_missing)
    if t4:
        from cp_debug.detection.t4_metric import check_installed

        check_installed()
    exported = model.endswith(SUFFIXES)
    refuse(_OF_MODULES, unless=not exported, why=f"{model} describes exported files, which are taken as they are")
    engines.check(specs)
    refuse(_OF_BUILDS, unless=not exported, why=f"the engines of {model} are built already")
    check_made_up(samples, data, given_by="--data")
    if not exported:
        int8.check(specs)
        refuse_data_flags(data)
        refuse_export_flags([model])
        check_given(model, inputs=data, samples=samples, checkpoint=checkpoint, options=read, truth=True, flag="--data")
    engines.check_installed(specs)
    if not exported:
        check_calibration(model, int8.calib_data, int8.calib_samples)
    load_torch()
    from cp_debug.deploy.file_evaluation import evaluate_files, read_description
    from cp_debug.detection.boxes import save_predictions
    from cp_debug.detection.evaluate import as_detector
    from cp_debug.detection.evaluate import evaluate as run
    from cp_debug.detection.evaluation import EvaluationOptions, parse_ranges
    from cp_debug.quantization.quantized_programs import load_quantized, quantize_programs
    from cp_debug.reports.evaluation import render

    def counting(class_names: Sequence[str]) -> EvaluationOptions:
        within = parse_ranges(ranges, class_names)
        return EvaluationOptions(ranges=within, min_points=min_points, draws=draws, seed=seed, max_drop=max_drop, t4=t4)

    def quantize(programs: list[Program], folder: Path) -> tuple[list[Program], str]:
        how = int8.chosen
        clouds = islice(iterate(opened), how.samples) if data is not None and how.data is None else None
        return quantize_programs(detector, programs, folder, clouds, parts=quantized, calibration=how)

    with steps() as on_step:
        if exported:
            described = read_description(Path(model))
            result = evaluate_files(
                described,
                specs,
                data,
                samples,
                counting(described.config.class_names),
                seed=seed,
                read=read,
                python=engines.trt_python,
                on_event=on_step.on_event,
                on_step=on_step,
            )
        else:
            loaded, quantized = load_quantized(model, checkpoint, seed)
            int8.check(specs, f"the scales are those of {checkpoint}" if quantized else "")
            detector = as_detector(loaded)
            options = counting(detector.class_names)
            opened = detector.data(data, samples, seed, read)
            result = run(
                detector,
                tensorrt.make(specs, engines.options, on_step),
                opened,
                options,
                exporter=flags.chosen(exporter),
                folded=not unfolded,
                quantize=quantize,
                on_step=on_step,
            )
    show_document(render(result), result.to_dict(), json, csv, result.to_pandas)
    if predictions:
        save_predictions(predictions, result.samples, result.predictions)
    raise typer.Exit(1 if result.worse else 0)


_OF_MODULES = ("checkpoint", "exporter", "unfolded")
_OF_BUILDS = tuple(field.name for field in fields(tensorrt.TensorRTFlags) if field.name != "trt_python")
