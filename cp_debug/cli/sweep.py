"""``cpdebug sweep``: many models, checkpoints, backends and samples at once."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import typer

from cp_debug.cli import calibration
from cp_debug.cli.flags import MOST, Atol, QuantizedTest, Rtol, Scenes, grouped
from cp_debug.cli.sweep_desk import Backends, Compared, Desk, Draws, Inputs, Scored, Subjects, calibration_settings
from cp_debug.cli.typed import Command, refuse
from cp_debug.files import resolved

app = typer.Typer(
    name="sweep",
    help="Run a command over models, backends and samples on many workers. Started again, it resumes.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.command("bisect", cls=Command)
@grouped
def sweep_bisect(
    *,
    inputs: Inputs = None,
    what: Compared,
    rtol: Rtol = None,
    atol: Atol = None,
    explain: Annotated[bool, typer.Option(help="Try the known causes on every guilty layer.")] = True,
    int8: calibration.CalibrationFlags,
    desk: Desk,
) -> None:
    """Count on how many samples each layer is guilty; tell how errors spread, and which samples stand out.

    A task is one test backend on one sample. Exit code 1 when a backend disagrees on some sample, 2 when a task failed.
    """
    int8.check(what.check(what.backends, inputs))
    from cp_debug.sweep import bisecting

    how = {"rtol": rtol, "atol": atol, "explain": explain, "calibration": calibration_settings(int8, inputs)}
    grid = what.compared(inputs, how)
    desk.run("bisect", lambda: bisecting.tasks(grid))


@app.command("eval", cls=Command)
@grouped
def sweep_eval(
    *,
    data: Scenes = None,
    what: Scored,
    max_drop: Annotated[float, typer.Option(min=0, help="mAP that a backend may lose.")] = 0.01,
    int8: calibration.CalibrationFlags,
    desk: Desk,
) -> None:
    """Score many models at once as `cpdebug eval` does: mAP, NDS, and in which samples boxes were lost or gained.

    A task is one backend on one sample. Exit code 1 when a backend detects significantly less, 2 when a task failed.
    """
    int8.check(what.check(what.backends, data))
    from cp_debug.detection.evaluation import EvaluationOptions
    from cp_debug.sweep import evaluating

    grid = what.scored(data, int8)
    options = EvaluationOptions(min_points=what.min_points, draws=what.draws, seed=what.seed, max_drop=max_drop)
    desk.run("eval", lambda: evaluating.tasks(grid), options=options, edges=what.edges)


@dataclass(frozen=True)
class _Ablated(Scored):
    backends: Backends = "torch,emu-fp16acc"
    draws: Draws = 200


@app.command("ablate", cls=Command)
@grouped
def sweep_ablate(
    *,
    data: Annotated[
        Path | None, typer.Option(help="An mmdet3d info file (.pkl) or clouds; else the held-out synthetic scenes.")
    ] = None,
    what: _Ablated,
    layers: Annotated[
        int, typer.Option(min=1, max=MOST, help="Number of layers to try one by one, the largest shares first.")
    ] = 12,
    int8: calibration.CalibrationFlags,
    desk: Desk,
) -> None:
    """Count the boxes, and the mAP, that come back when single layers of a test compute in FP32.

    A task is one test backend on one sample, with every set of layers. Exit code 2 when a task failed.
    """
    specs = what.check(what.backends, data)
    from cp_debug.backends.registry import create
    from cp_debug.detection.evaluation import EvaluationOptions
    from cp_debug.mixed_precision.precision import precision_of
    from cp_debug.sweep import ablating
    from cp_debug.sweep.workers import needs_gpu

    int8.check(specs)
    for spec in specs[1:]:  # of those on a GPU, which may be elsewhere, the tasks say it
        if not needs_gpu(spec):
            precision_of(create(spec), quantized=False)
    grid = what.scored(data, int8, layers=layers)
    options = EvaluationOptions(min_points=what.min_points, draws=what.draws, seed=what.seed)
    desk.run("ablate", lambda: ablating.tasks(grid), options=options, edges=what.edges)


@app.command("sensitivity", cls=Command)
@grouped
def sweep_sensitivity(
    *,
    what: Subjects,
    quantized: Annotated[
        list[Path] | None,
        typer.Option("--from", help="Checkpoint of `quantize ptq` or `qat`; repeatable; else each worker calibrates."),
    ] = None,
    calib_samples: calibration.Samples = 20,
    calib_method: calibration.Calibrator = calibration.Method.mse,
    data: Inputs = None,
    desk: Desk,
) -> None:
    """Find layers that suffer from INT8: of each, the part that it makes of the outputs' divergence, over samples.

    A task is one sample. Exit code 2 when a task failed.
    """
    specs = what.check("torch,torch-fp64", data)
    from cp_debug.sweep import sensitivity

    refuse(("calib_samples", "calib_method", "shared"), unless=not quantized, why="the scales are those of --from")
    grid = what.grid(specs, data, {"batches": calib_samples, "method": calib_method.value})
    desk.run("sensitivity", lambda: sensitivity.tasks(grid, quantized or ()))


@dataclass(frozen=True)
class _Searched(Compared):
    backends: Backends = "torch,emu-fp16acc"


@app.command("search", cls=Command)
@grouped
def sweep_search(
    *,
    inputs: Inputs = None,
    what: _Searched,
    goal: Annotated[
        str, typer.Option(help="rel_l2, max_abs, boxes_lost, boxes_gained, boxes_moved; joined by 'and'.")
    ] = "rel_l2<1e-3",
    test_model: QuantizedTest = None,
    max_builds: Annotated[
        int | None, typer.Option(min=1, max=MOST, help="Most builds (emulated: trials) per task.")
    ] = None,
    desk: Desk,
) -> None:
    """Count on how many samples each layer must keep its precision. A task is one `cpdebug search` on one sample.

    Exit code 1 when the goal was not reached on some sample, 2 when a task failed.
    """
    what.check(what.backends, inputs, exports=False)
    from cp_debug.sweep import searching

    how = {"goal": goal, "max_builds": max_builds, "test_model": test_model and str(resolved(test_model))}
    grid = what.compared(inputs, how)
    if test_model is not None:
        grid = replace(grid, reads=sorted(test_model.glob("*.onnx")) if test_model.is_dir() else [test_model])
    desk.run("search", lambda: searching.tasks(grid))
