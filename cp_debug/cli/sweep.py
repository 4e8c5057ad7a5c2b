"""``cpdebug sweep``: many models, checkpoints, backends and samples at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cp_debug.backends.spec import BackendSpec, parse_backends
from cp_debug.cli import flags
from cp_debug.cli.console import command_line, say, show_document, show_error, steps
from cp_debug.cli.flags import MOST, check_made_up, grouped
from cp_debug.cli.given import check_given
from cp_debug.cli.typed import Command, refuse, refuse_data_flags, refuse_export_flags, refuse_seed
from cp_debug.display import OnStep
from cp_debug.errors import InputError
from cp_debug.files import resolved
from cp_debug.loading import load_torch
from cp_debug.safe_text import amount
from cp_debug.store import Store

if TYPE_CHECKING:
    from distributed import Client

    from cp_debug.sweep.prepared import Grid
    from cp_debug.sweep.run import Progress
    from cp_debug.sweep.tasks import Task

QUEUE, REPORT = "Queue", "Report"
Backends = Annotated[str, typer.Option("--backends", "-b", help="Reference first, then the tests.")]
Draws = Annotated[int, typer.Option(min=0, max=MOST, help="Bootstrap draws for the intervals.")]
Samples = Annotated[int, typer.Option("--samples", "-n", min=1, max=MOST, help="At most this many samples.")]
Inputs = Annotated[Path | None, typer.Option(help="Info file (.pkl), .npz, point file, or a folder of such.")]


@dataclass(frozen=True)
class Subjects:
    """Flags of all kinds of sweeps: models and samples."""

    models: Annotated[list[str] | None, typer.Argument(help="Recipes, .onnx files, module:callable; else tiny.")] = None
    checkpoint: Annotated[list[Path] | None, typer.Option("--checkpoint", help="Weights; repeatable.")] = None
    samples: Samples = 8
    seed: flags.SceneSeed = 0

    def check(self, backends: str, inputs: Path | None, *, exports: bool = True) -> list[BackendSpec]:
        """The backends. Raises InputError for a name that is no model and a file that cannot be read; loads torch.

        Exports, where the tasks share them, and engines are what goes into a shared store.
        """
        from cp_debug.recipes.registry import DEFAULT

        specs = parse_backends(backends)
        modules = exports and any(not model.endswith(".onnx") for model in self.models or [DEFAULT])
        why = "nothing is shared: no backend is TensorRT, and " + (
            "no model is exported or calibrated as a torch module"
            if exports
            else "every search exports its model itself"
        )
        refuse(("shared",), unless=modules or any(spec.family == "trt" for spec in specs), why=why)
        check_made_up(self.samples, inputs, given_by="--inputs or --data")
        for model in self.models or ():
            check_given(model)
        load_torch()
        return specs

    def grid(self, specs: Sequence[BackendSpec], inputs: Path | None, how: Mapping[str, Any], **more: Any) -> Grid:
        """The grid of these flags. Raises InputError for flags that would do nothing."""
        from cp_debug.recipes.registry import DEFAULT
        from cp_debug.sweep.prepared import Grid

        models = self.models or [DEFAULT]
        refuse_export_flags(models)
        refuse_seed(models, inputs, self.samples)
        return Grid(models, specs, self.checkpoint or (), self.samples, self.seed, inputs, how=how, **more)


@dataclass(frozen=True)
class Compared(Subjects):
    """Flags of sweeps over backends."""

    backends: Backends = "torch,ort"
    exporter: flags.CommonExporter = "auto"
    unfolded: flags.Unfolded = False

    def compared(self, inputs: Path | None, how: Mapping[str, Any], **more: Any) -> Grid:
        """The grid, whose models are exported as these flags say. Raises InputError for flags that would do nothing."""
        chosen = {"exporter": flags.chosen(self.exporter), "folded": not self.unfolded}
        return self.grid(parse_backends(self.backends), inputs, how, **chosen, **more)


@dataclass(frozen=True)
class Scored(Compared):
    """Flags of sweeps over data with ground truth."""

    samples: Samples = 50
    data_root: flags.DataRoot = None
    sweeps: Annotated[int, typer.Option(min=0, max=MOST, help="Earlier sweeps to merge, at most.")] = 9
    skip_missing: Annotated[bool, typer.Option("--skip-missing", help="Leave out samples without a cloud.")] = False
    min_points: Annotated[int, typer.Option(min=0, max=MOST, help="Points that an object must have to count.")] = 1
    draws: Draws = 1000
    distances: Annotated[
        str | None,
        typer.Option(help="Metres from the sensor where rings end, as 20,40; default: thirds of the region."),
    ] = None

    def scored(self, data: Path | None, int8: flags.CalibrationFlags, **how: Any) -> Grid:
        """The grid, and in its settings, which a log keeps, the reading of clouds and INT8's calibration.

        Raises InputError for flags that would do nothing.
        """
        from cp_debug.recipes.data.base import DataOptions

        refuse_data_flags(data)
        read = DataOptions(self.data_root and resolved(self.data_root), self.sweeps, self.skip_missing)
        settings = {"data_root": read.root and str(read.root), "sweeps": read.sweeps, "skip_missing": read.skip_missing}
        return self.compared(data, {**settings, "calibration": calibration_settings(int8), **how}, data=read)

    @property
    def edges(self) -> list[float]:
        """Edges of ``--distances`` in m, none without it. Raises InputError for what is no list of rising numbers."""
        from cp_debug.detection.evaluation import EvaluationOptions, rings_of

        if self.distances is None:
            return []
        try:
            edges = [float(part) for part in self.distances.split(",")]
        except ValueError:
            raise InputError(f"--distances: {self.distances!r}; expected metres that rise, as in 20,40") from None
        rings_of(edges, EvaluationOptions())
        return edges


@dataclass(frozen=True)
class Desk:
    """Flags that all kinds of sweeps share: where tasks go and reports come out."""

    workers: Annotated[
        int | None,
        typer.Option(min=1, max=1000, help="Processes on this machine; default: its cores.", rich_help_panel=QUEUE),
    ] = None
    gpus: Annotated[
        int | None,
        typer.Option(min=1, max=64, help="GPUs here, one process each; default: all.", rich_help_panel=QUEUE),
    ] = None
    cluster: Annotated[
        str | None, typer.Option(help="A Dask scheduler instead: tcp://host:8786.", rich_help_panel=QUEUE)
    ] = None
    shared: Annotated[
        str | None,
        typer.Option(help="Folder or URL (s3://…) of shared exports and engines.", rich_help_panel=QUEUE),
    ] = None
    log: Annotated[
        Path | None,
        typer.Option(help="FILE.jsonl, read by a restart; FILE.parquet: also a table.", rich_help_panel=QUEUE),
    ] = None
    retry_failed: Annotated[
        bool,
        typer.Option("--retry-failed", help="Retry tasks that failed in an earlier run.", rich_help_panel=QUEUE),
    ] = False
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for the log and all reports.", rich_help_panel=REPORT)
    ] = None
    json: Annotated[
        str | None, typer.Option(help="Write JSON to a file, or to stdout with -.", rich_help_panel=REPORT)
    ] = None
    csv: Annotated[Path | None, typer.Option(help="Write figures as CSV; - is stdout.", rich_help_panel=REPORT)] = None
    html: Annotated[Path | None, typer.Option(help="Write the report as one HTML file.", rich_help_panel=REPORT)] = None

    def run(self, kind: str, tasks: Callable[[], Iterable[Task]], **merging: Any) -> None:
        """Run what is left, merge what there is, show it, and exit. ``merging``: settings of the kind's ``merge``."""
        from cp_debug.reports.sweep import frame, render, write_page
        from cp_debug.sweep.log import SweepLog, write_table
        from cp_debug.sweep.run import SweepResult, run
        from cp_debug.sweep.tasks import module_of
        from cp_debug.sweep.workers import local_workers, remote_workers

        if self.workers and self.cluster:
            raise InputError("--workers and --cluster: expected one of them; a cluster has its own workers")

        if self.gpus and (self.workers or self.cluster):
            other = "--workers" if self.workers else "--cluster"
            raise InputError(f"--gpus and {other}: expected one of them; there is one worker per GPU")

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
        with ExitStack() as stack:
            shared = self._shared(stack)
            log = stack.enter_context(SweepLog(target.with_suffix(".jsonl")))
            with steps() as on_step:
                shown = _progress_on(f"sweep {kind}", on_step)
                finished = run(sharing, log, connect, retry_failed=self.retry_failed, on_progress=shown)
            if log.others:
                say(f"note: {log.path} also holds {amount(len(log.others), 'task')} of other sweeps, left alone")
            try:
                module = module_of(kind)
                result = SweepResult.of(kind, finished, module.merge(finished.results(), **merging), command_line())
                if target.suffix == ".parquet":
                    write_table(finished.results(), module.rows, module.COLUMNS, target)
            except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
                if finished.ran == len(finished.places):  # no record is of an earlier run
                    raise
                not_readable = f"{log.path}: what was read from it is no result of this version"
                raise InputError(f"{not_readable}; give another --log") from error
        json, csv, html = self.json, self.csv, self.html
        if self.output:
            json, csv, html = (
                json or str(self.output / "sweep.json"),
                csv or self.output / "sweep.csv",
                html or self.output / "sweep.html",
            )
        show_document(render(result), result.to_dict(), json, csv, lambda: frame(result))
        if html:
            write_page(result, html)
        if result.failures:
            first = result.failures[0]
            show_error(f"{amount(len(result.failures), 'task')} failed; {first.label}, {first.sample}: {first.error}")
        raise typer.Exit(0 if result.passed else 2 if result.failures else 1)

    def _shared(self, stack: ExitStack) -> str | None:
        """Place of what workers share: that of the flag, else a folder that goes with the sweep's own processes."""
        if self.shared is None:
            return None if self.cluster else stack.enter_context(TemporaryDirectory(prefix="cpdebug-"))
        place = self.shared if "://" in self.shared else str(resolved(Path(self.shared)))
        Store.open(place, "--shared")
        return place


def _progress_on(kind: str, on_step: OnStep) -> Callable[[Progress], None]:
    """What shows how far a sweep is, as a step of its tasks, and says once what its workers lack."""
    said: set[str] = set()

    def show(now: Progress) -> None:
        finished = now.done + now.failed
        pace = f"{60 * now.rate:.3g} a minute on {amount(now.present, 'worker')}"
        idle = "waiting for a worker with GPU=1" if now.waiting_for_gpu else "waiting for workers"
        if finished == now.total or (now.present and not now.waiting_for_gpu):
            idle = ""
        state = [idle, f"{now.failed} failed", f"{now.running} running", pace]
        on_step(f"{kind}: {', '.join(filter(None, state))}", finished, now.total)
        gpu = f"{idle}: dask worker … --resources GPU=1; its tasks start when there is one"
        refused = f"warning: gets no tasks: {now.refused}"
        store = f"warning: {now.store}"
        for text, told in ((gpu, now.waiting_for_gpu), (refused, now.refused), (store, now.store)):
            if told and text not in said:
                said.add(text)
                say(text)

    return show


def calibration_settings(int8: flags.CalibrationFlags, inputs: Path | None = None) -> dict[str, Any]:
    """Settings of the calibration, as tasks have them; ``inputs`` serve where no data are given for it."""
    data = int8.calib_data or inputs
    return {
        "data": None if data is None else str(resolved(data)),
        "samples": int8.calib_samples,
        "method": int8.calib_method,
        "skip_layers": int8.skip_layers or [],
    }


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
    rtol: flags.Rtol = None,
    atol: flags.Atol = None,
    explain: Annotated[bool, typer.Option(help="Try the known causes on every guilty layer.")] = True,
    int8: flags.CalibrationFlags,
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
    data: flags.Scenes = None,
    what: Scored,
    max_drop: Annotated[float, typer.Option(min=0, help="mAP that a backend may lose.")] = 0.01,
    int8: flags.CalibrationFlags,
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
    int8: flags.CalibrationFlags,
    desk: Desk,
) -> None:
    """Count the boxes, and the mAP, that come back when single layers of a test compute in FP32.

    A task is one test backend on one sample, with every set of layers. Exit code 2 when a task failed.
    """
    specs = what.check(what.backends, data)
    from cp_debug.backends.registry import create
    from cp_debug.detection.evaluation import EvaluationOptions
    from cp_debug.mixed_precision.layers import precision_of
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
    calib_samples: flags.CalibSamples = 20,
    calib_method: flags.CalibMethod = "mse",
    data: Inputs = None,
    desk: Desk,
) -> None:
    """Find layers that suffer from INT8: of each, the part that it makes of the outputs' divergence, over samples.

    A task is one sample. Exit code 2 when a task failed.
    """
    specs = what.check("torch,torch-fp64", data)
    from cp_debug.sweep import sensitivity

    refuse(("calib_samples", "calib_method", "shared"), unless=not quantized, why="the scales are those of --from")
    grid = what.grid(specs, data, {"batches": calib_samples, "method": calib_method})
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
    test_model: flags.QuantizedTest = None,
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
