"""Flags that all kinds of sweeps share, checks of what they are given, the grid, and the run with its reports."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cp_debug.backends.spec import parse_backends
from cp_debug.cli import calibration
from cp_debug.cli.bisect import Exporter
from cp_debug.cli.console import show_error
from cp_debug.cli.flags import LAST_SEED, MOST, check_made_up
from cp_debug.cli.given import check_given
from cp_debug.cli.typed import refuse, refuse_export_flags, refuse_seed
from cp_debug.errors import InputError
from cp_debug.files import resolved
from cp_debug.loading import load_torch
from cp_debug.safe_text import amount

if TYPE_CHECKING:
    from distributed import Client

    from cp_debug.recipes.data.base import DataOptions
    from cp_debug.sweep.grid import Grid
    from cp_debug.sweep.log import Flatten, Record
    from cp_debug.sweep.result import ResultGroup
    from cp_debug.sweep.tasks import Task

QUEUE, REPORT = "Queue", "Report"
Models = Annotated[list[str] | None, typer.Argument(help="Recipes, .onnx files, module:callable; else tiny.")]
Backends = Annotated[str, typer.Option("--backends", "-b", help="Reference first, then the tests.")]
Checkpoints = Annotated[list[Path] | None, typer.Option("--checkpoint", help="Weights; repeatable.")]
Inputs = Annotated[Path | None, typer.Option(help="Info file (.pkl), .npz, point file, or a folder of such.")]
Seed = Annotated[int, typer.Option(min=0, max=LAST_SEED, help="Seed of made-up inputs; first synthetic scene.")]
Exporters = Annotated[Exporter, typer.Option(help="For torch models; auto: what all backends read.")]
Distances = Annotated[
    str | None, typer.Option(help="Metres from the sensor where rings end, as 20,40; default: thirds of the region.")
]
DataRoot = Annotated[Path | None, typer.Option(help="Folder that paths in the info file are relative to.")]
Sweeps = Annotated[int, typer.Option(min=0, max=MOST, help="Earlier sweeps to merge, at most.")]
SkipMissing = Annotated[bool, typer.Option("--skip-missing", help="Leave out samples without a cloud.")]
MinPoints = Annotated[int, typer.Option(min=0, max=MOST, help="Points that an object must have to count.")]
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
        from cp_debug.cli.console import command_line, say, show_document
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
            if log.others:
                say(f"note: {log.path} also holds {amount(len(log.others), 'task')} of other sweeps, left alone")
            try:
                result = SweepResult.of(kind, finished, merge(finished.results()), command_line())
                if target.suffix == ".parquet":
                    write = write_parts if self.partition else write_parquet
                    write(finished.results(), *flat, target)
            except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
                if not finished.reread:
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
        show_document(render(result), result.to_dict(), json)
        if csv:
            write_csv(result, csv)
        if html:
            write_page(result, html)
        if result.failures:
            first = result.failures[0]
            show_error(f"{amount(len(result.failures), 'task')} failed; {first.label}, {first.sample}: {first.error}")
        raise typer.Exit(0 if result.passed else 2 if result.failures else 1)

    def _shared(self, stack: ExitStack) -> str | None:
        """Place of what workers share: that of the flag, else a folder that goes with the sweep's own processes."""
        from cp_debug.sweep.shared import SharedStore

        if self.shared is None:
            return None if self.cluster else stack.enter_context(TemporaryDirectory(prefix="cpdebug-"))
        place = self.shared if "://" in self.shared else str(resolved(Path(self.shared)))
        SharedStore(place).check()
        return place


def edges_of(text: str | None) -> list[float]:
    """Edges of ``--distances`` in m, none without it. Raises InputError for what is no list of rising numbers."""
    from cp_debug.detection.breakdown import rings_of
    from cp_debug.detection.evaluation import EvaluationOptions

    if text is None:
        return []
    try:
        edges = [float(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"--distances: {text!r}; expected metres that rise, as in 20,40") from None
    rings_of(edges, EvaluationOptions())
    return edges


def reading_of(
    root: Path | None, sweeps: int, skip_missing: bool, int8: calibration.CalibrationFlags
) -> tuple[DataOptions, dict[str, Any]]:
    """Reading of clouds, and the same, with INT8's calibration, as the settings that a log keeps."""
    from cp_debug.recipes.data.base import DataOptions

    read = DataOptions(root and resolved(root), sweeps, skip_missing)
    settings = {"data_root": read.root and str(read.root), "sweeps": sweeps, "skip_missing": skip_missing}
    return read, settings | {"calibration": calibration_settings(int8)}


def calibration_settings(flags: calibration.CalibrationFlags, inputs: Path | None = None) -> dict[str, Any]:
    """Settings of the calibration, as tasks have them; ``inputs`` serve where no data are given for it."""
    data = flags.calib_data or inputs
    return {
        "data": None if data is None else str(resolved(data)),
        "samples": flags.calib_samples,
        "method": flags.calib_method.value,
        "skip_layers": flags.skip_layers or [],
    }


def check_models(
    models: list[str] | None,
    backends: str,
    samples: int,
    inputs: Path | None,
    *,
    exports: bool = True,
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


def grid_of(
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
    """The grid of these flags. Raises InputError for flags that would do nothing."""
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
