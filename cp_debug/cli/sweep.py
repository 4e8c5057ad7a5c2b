"""``cpdebug sweep``: many models, checkpoints, backends and samples at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from enum import Enum
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cp_debug.backends.spec import parse_backends
from cp_debug.cli import calibration
from cp_debug.cli.bisect import Exporter
from cp_debug.cli.flags import LAST_SEED, MOST, Atol, Rtol, check_made_up, grouped
from cp_debug.cli.given import check_given
from cp_debug.cli.typed import Command, refuse, refuse_data_flags, refuse_export_flags, refuse_seed
from cp_debug.errors import InputError, in_one_line
from cp_debug.files import resolved
from cp_debug.loading import load_torch

if TYPE_CHECKING:
    from distributed import Client

    from cp_debug.sweep.grid import Grid
    from cp_debug.sweep.log import Flatten, Record
    from cp_debug.sweep.result import ResultGroup
    from cp_debug.sweep.tasks import Task

app = typer.Typer(
    name="sweep",
    help="A grid of models, checkpoints, backends and samples, on many workers; started again, it goes on.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)


class Axis(str, Enum):
    """Axis along which a sensitivity sweep is cut into tasks."""

    samples = "samples"
    layers = "layers"


QUEUE, REPORT = "Queue", "Report"
Models = Annotated[list[str] | None, typer.Argument(help="Recipes, .onnx files, module:callable; else tiny.")]
Backends = Annotated[str, typer.Option("--backends", "-b", help="Reference first, then the tests.")]
Checkpoints = Annotated[list[Path] | None, typer.Option("--checkpoint", help="Weights; repeatable.")]
Inputs = Annotated[Path | None, typer.Option(help="Info file (.pkl), .npz, point file, or a folder of such.")]
Seed = Annotated[int, typer.Option(min=0, max=LAST_SEED, help="Seed of made-up inputs; first synthetic scene.")]
Exporters = Annotated[Exporter, typer.Option(help="For torch models; auto: what all backends read.")]
Unfolded = Annotated[bool, typer.Option("--unfolded", help="Keep BatchNorm apart.")]


@dataclass(frozen=True)
class Desk:
    """Flags that all kinds of sweeps share: where tasks go and reports come out."""

    workers: Annotated[
        int | None,
        typer.Option(min=1, max=1000, help="Processes on this machine; default: its cores.", rich_help_panel=QUEUE),
    ] = None
    gpus: Annotated[
        int | None,
        typer.Option(min=1, max=64, help="GPUs of this machine, a process each; default: all.", rich_help_panel=QUEUE),
    ] = None
    cluster: Annotated[
        str | None, typer.Option(help="Instead, a Dask scheduler: tcp://host:8786.", rich_help_panel=QUEUE)
    ] = None
    shared: Annotated[
        str | None,
        typer.Option(help="Folder or URL (s3://…) of exports, calibrations, engines for all.", rich_help_panel=QUEUE),
    ] = None
    log: Annotated[
        Path | None,
        typer.Option(help="FILE.jsonl, which a restart reads; FILE.parquet: that too.", rich_help_panel=QUEUE),
    ] = None
    partition: Annotated[
        bool,
        typer.Option(
            "--partition", help="FILE.parquet is a folder, a table a model and backend.", rich_help_panel=QUEUE
        ),
    ] = False
    retry_failed: Annotated[
        bool,
        typer.Option("--retry-failed", help="Try tasks again that failed in an earlier run.", rich_help_panel=QUEUE),
    ] = False
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for the log and all reports.", rich_help_panel=REPORT)
    ] = None
    json: Annotated[
        str | None, typer.Option(help="Write JSON to a file, or to stdout with -.", rich_help_panel=REPORT)
    ] = None
    csv: Annotated[Path | None, typer.Option(help="Write the figures as CSV.", rich_help_panel=REPORT)] = None
    html: Annotated[Path | None, typer.Option(help="Write the report as one HTML file.", rich_help_panel=REPORT)] = None

    def run(
        self,
        kind: str,
        tasks: Callable[[], Iterable[Task]],
        merge: Callable[[Iterable[Record]], Sequence[ResultGroup]],
        flat: tuple[Flatten, Mapping[str, type]],
    ) -> None:
        """Run what is left, merge what there is, show it, and exit. ``flat``: how records become rows of a table."""
        from cp_debug.cli.console import command_line, show_document
        from cp_debug.cli.sweep_view import view
        from cp_debug.reports.sweep import render, write_csv, write_page
        from cp_debug.sweep.log import SweepLog, write_parquet, write_parts
        from cp_debug.sweep.result import SweepResult
        from cp_debug.sweep.run import run
        from cp_debug.sweep.workers import local_workers, remote_workers

        if self.workers and self.cluster:
            raise InputError("--workers and --cluster: expected one of them; a cluster has its own workers")

        if self.gpus and (self.workers or self.cluster):
            other = "--workers" if self.workers else "--cluster"
            raise InputError(f"--gpus and {other}: expected one of them; there is one worker a GPU")

        def connect(gpu: bool) -> AbstractContextManager[Client]:
            refuse(("gpus",), unless=gpu, why="no backend of the sweep needs a GPU; --workers gives it processes")
            if self.cluster:
                return remote_workers(self.cluster)
            return local_workers(self.workers, gpu=gpu, gpus=self.gpus)

        def sharing() -> Iterator[Task]:
            return (replace(task, params={**task.params, "shared": shared}) for task in tasks())

        target = self.log or (self.output / "log.jsonl" if self.output else Path("sweep.jsonl"))
        if target.suffix not in (".jsonl", ".parquet"):
            raise InputError(f"--log: {target}; expected FILE.jsonl or FILE.parquet")
        refuse(("partition",), unless=target.suffix == ".parquet", why=f"--log {target} is no FILE.parquet")
        with ExitStack() as stack:
            shared = self._shared(stack)
            log = stack.enter_context(SweepLog(target.with_suffix(".jsonl")))
            with view(f"sweep {kind}") as on_progress:
                finished = run(sharing, log, connect, retry_failed=self.retry_failed, on_progress=on_progress)
            try:
                result = SweepResult.of(kind, finished, merge(finished.results()), command_line())
                if target.suffix == ".parquet":
                    write = write_parts if self.partition else write_parquet
                    write(finished.results(), *flat, target)
            except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
                if not finished.reread:
                    raise
                not_readable = f"{log.path}: what was read from it is no result of this version ({in_one_line(error)})"
                raise InputError(f"{not_readable}; give another --log") from error
        json, csv, html = self.json, self.csv, self.html
        if self.output:
            json, csv, html = (
                json or str(self.output / "sweep.json"),
                csv or self.output / "sweep.csv",
                html or self.output / "sweep.html",
            )
        show_document(render(result), result.to_dict(), json)
        if csv:
            write_csv(result, csv)
        if html:
            write_page(result, html)
        raise typer.Exit(0 if result.passed else 2 if result.failures else 1)

    def _shared(self, stack: ExitStack) -> str | None:
        """Place of what workers share: that of the flag, else a folder that goes with the sweep's own processes."""
        from cp_debug.sweep.shared import SharedStore

        if self.shared is None:
            return None if self.cluster else stack.enter_context(TemporaryDirectory(prefix="cpdebug-"))
        place = self.shared if "://" in self.shared else str(resolved(Path(self.shared)))
        SharedStore(place).check()
        return place


@app.command("bisect", cls=Command)
@grouped
def sweep_bisect(
    models: Models = None,
    backends: Backends = "torch,ort",
    checkpoint: Checkpoints = None,
    inputs: Inputs = None,
    samples: Annotated[int, typer.Option("--samples", "-n", min=1, max=MOST, help="At most this many samples.")] = 8,
    seed: Seed = 0,
    rtol: Rtol = None,
    atol: Atol = None,
    explain: Annotated[bool, typer.Option(help="Try the known causes on every guilty layer.")] = True,
    exporter: Exporters = Exporter.auto,
    unfolded: Unfolded = False,
    *,
    int8: calibration.CalibrationFlags,
    desk: Desk,
) -> None:
    """Count on how many samples each layer is guilty; tell how errors spread, and which samples stand out.

    A task is one test backend on one sample. Exit code 1 when a backend disagrees on some sample, 2 when a task failed.
    """
    _check_models(models, backends, samples, inputs)
    from cp_debug.sweep import bisecting

    int8.check(parse_backends(backends))
    how = {"rtol": rtol, "atol": atol, "explain": explain, "calibration": _calibration(int8, inputs)}
    grid = _grid(models, backends, checkpoint, samples, seed, inputs, exporter, unfolded, how)
    desk.run("bisect", lambda: bisecting.tasks(grid), bisecting.merge, (bisecting.rows, bisecting.COLUMNS))


@app.command("eval", cls=Command)
@grouped
def sweep_eval(
    models: Models = None,
    backends: Backends = "torch,ort",
    checkpoint: Checkpoints = None,
    data: Annotated[
        Path | None, typer.Option(help="An mmdet3d info file (.pkl); else the held-out synthetic scenes.")
    ] = None,
    samples: Annotated[int, typer.Option("--samples", "-n", min=1, max=MOST, help="At most this many samples.")] = 50,
    data_root: Annotated[Path | None, typer.Option(help="Folder that paths in the info file are relative to.")] = None,
    sweeps: Annotated[int, typer.Option(min=0, max=MOST, help="Earlier sweeps to merge, at most.")] = 9,
    skip_missing: Annotated[bool, typer.Option("--skip-missing", help="Leave out samples without a cloud.")] = False,
    min_points: Annotated[int, typer.Option(min=0, max=MOST, help="Points that an object must have to count.")] = 1,
    draws: Annotated[int, typer.Option(min=0, max=MOST, help="Bootstrap draws for the intervals.")] = 1000,
    seed: Seed = 0,
    max_drop: Annotated[float, typer.Option(min=0, help="mAP that a backend may lose.")] = 0.01,
    exporter: Exporters = Exporter.auto,
    unfolded: Unfolded = False,
    *,
    int8: calibration.CalibrationFlags,
    desk: Desk,
) -> None:
    """Score many models at once as `cpdebug eval` does: mAP, NDS, and in which samples boxes were lost or gained.

    A task is one backend on one sample. Exit code 1 when a backend detects significantly less, 2 when a task failed.
    """
    _check_models(models, backends, samples, data)
    from cp_debug.detection.evaluation import EvaluationOptions
    from cp_debug.recipes.data.base import DataOptions
    from cp_debug.sweep import evaluating

    int8.check(parse_backends(backends))
    refuse_data_flags(data)
    read = DataOptions(data_root and resolved(data_root), sweeps, skip_missing)
    how: dict[str, Any] = {"data_root": read.root and str(read.root), "sweeps": sweeps, "skip_missing": skip_missing}
    how["calibration"] = _calibration(int8)
    grid = replace(_grid(models, backends, checkpoint, samples, seed, data, exporter, unfolded, how), data=read)
    options = EvaluationOptions(min_points=min_points, draws=draws, seed=seed, max_drop=max_drop)
    merge = partial(evaluating.merge, options=options)
    desk.run("eval", lambda: evaluating.tasks(grid), merge, (evaluating.rows, evaluating.COLUMNS))


@app.command("sensitivity", cls=Command)
@grouped
def sweep_sensitivity(
    models: Models = None,
    checkpoint: Checkpoints = None,
    quantized: Annotated[
        list[Path] | None,
        typer.Option("--from", help="Checkpoint of `quantize ptq` or `qat`; repeatable; else each worker calibrates."),
    ] = None,
    calib_samples: calibration.Samples = 20,
    calib_method: calibration.Calibrator = calibration.Method.mse,
    data: Inputs = None,
    samples: Annotated[int, typer.Option("--samples", "-n", min=1, max=MOST, help="At most this many samples.")] = 8,
    seed: Seed = 0,
    by: Annotated[
        Axis, typer.Option(help="Shape of a task: one sample and all layers, or all samples and a share of the layers.")
    ] = Axis.samples,
    draws: Annotated[int, typer.Option(min=0, max=MOST, help="Bootstrap draws for the intervals, by layers.")] = 200,
    *,
    desk: Desk,
) -> None:
    """Find layers that suffer from INT8: their errors over samples, or the profile of `quantize sensitivity`.

    Exit code 2 when a task failed.
    """
    _check_models(models, "torch,torch-fp64", samples, data)
    from cp_debug.sweep import sensitivity

    refuse(("calib_samples", "calib_method", "shared"), unless=not quantized, why="the scales are those of --from")
    refuse(("draws",), unless=by is Axis.layers, why="intervals are drawn with --by layers")
    how = {"batches": calib_samples, "method": calib_method.value, "draws": draws}
    grid = _grid(models, "torch,torch-fp64", checkpoint, samples, seed, data, Exporter.auto, False, how)
    desk.run(
        "sensitivity",
        lambda: sensitivity.tasks(grid, quantized or (), by_layers=by is Axis.layers),
        sensitivity.merge,
        (sensitivity.rows, sensitivity.COLUMNS),
    )


@app.command("search", cls=Command)
@grouped
def sweep_search(
    models: Models = None,
    backends: Backends = "torch,emu-fp16acc",
    checkpoint: Checkpoints = None,
    goal: Annotated[
        str, typer.Option(help="rel_l2, max_abs, boxes_lost, boxes_gained, boxes_moved; joined by 'and'.")
    ] = "rel_l2<1e-3",
    test_model: Annotated[
        Path | None, typer.Option(help="The Q/DQ graph of the test (a folder, for several components).")
    ] = None,
    inputs: Inputs = None,
    samples: Annotated[int, typer.Option("--samples", "-n", min=1, max=MOST, help="At most this many samples.")] = 8,
    seed: Seed = 0,
    max_builds: Annotated[
        int | None, typer.Option(min=1, max=MOST, help="Builds (emulated: trials) a task at most.")
    ] = None,
    exporter: Exporters = Exporter.auto,
    unfolded: Unfolded = False,
    *,
    desk: Desk,
) -> None:
    """Count on how many samples each layer must keep its precision. A task is one `cpdebug search` on one sample.

    Exit code 1 when the goal was not reached on some sample, 2 when a task failed.
    """
    _check_models(models, backends, samples, inputs, exports=False)
    from cp_debug.sweep import searching

    how = {"goal": goal, "max_builds": max_builds, "test_model": test_model and str(resolved(test_model))}
    grid = _grid(models, backends, checkpoint, samples, seed, inputs, exporter, unfolded, how)
    if test_model is not None:
        grid = replace(grid, reads=sorted(test_model.glob("*.onnx")) if test_model.is_dir() else [test_model])
    desk.run("search", lambda: searching.tasks(grid), searching.merge, (searching.rows, searching.COLUMNS))


def _calibration(flags: calibration.CalibrationFlags, inputs: Path | None = None) -> dict[str, Any]:
    data = flags.calib_data or inputs
    return {
        "data": None if data is None else str(resolved(data)),
        "samples": flags.calib_samples,
        "method": flags.calib_method.value,
        "skip_layers": flags.skip_layers or [],
    }


def _check_models(
    models: list[str] | None, backends: str, samples: int, inputs: Path | None, *, exports: bool = True
) -> None:
    """Raise InputError for a name that is no model and a file that cannot be read; then load torch.

    Exports, where the tasks share them, and engines are what goes into a shared store.
    """
    from cp_debug.recipes.registry import DEFAULT

    modules = exports and any(not model.endswith(".onnx") for model in models or [DEFAULT])
    engines = backends and any(spec.family == "trt" for spec in parse_backends(backends))
    why = "nothing is shared: no backend is TensorRT, and " + (
        "no model is exported or calibrated as a torch module" if exports else "every search exports its model itself"
    )
    refuse(("shared",), unless=bool(modules or engines), why=why)
    check_made_up(samples, inputs, given_by="--inputs or --data")
    for model in models or ():
        check_given(model)
    load_torch()


def _grid(
    models: list[str] | None,
    backends: str,
    checkpoints: list[Path] | None,
    samples: int,
    seed: int,
    inputs: Path | None,
    exporter: Exporter,
    unfolded: bool,
    how: Mapping[str, Any],
) -> Grid:
    from cp_debug.recipes.registry import DEFAULT
    from cp_debug.sweep.grid import Grid

    refuse_export_flags(models or [DEFAULT])
    refuse_seed(models or [DEFAULT], inputs, samples)
    return Grid(
        models=models or [DEFAULT],
        backends=parse_backends(backends),
        checkpoints=checkpoints or (),
        samples=samples,
        seed=seed,
        inputs=inputs,
        exporter=exporter.chosen,
        folded=not unfolded,
        how=how,
    )
