"""``cpdebug deploy``: from a checkpoint to verified, evaluated files."""

from __future__ import annotations

from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cp_debug.cli import tensorrt
from cp_debug.cli.flags import JsonFile, RotYAxis
from cp_debug.cli.given import check_configured, check_installed
from cp_debug.cli.typed import refuse
from cp_debug.errors import CpdebugError, InputError, system_reason
from cp_debug.files import make_folder
from cp_debug.loading import load_torch

if TYPE_CHECKING:
    from cp_debug.deploy.runner import StageRecord
    from cp_debug.deploy.schema import DeployConfig


def deploy(
    config: Annotated[Path, typer.Argument(help="A .yaml, .toml or .json file, or AWML's deploy_config.py.")],
    model: Annotated[str | None, typer.Option(help="For a configuration that names no model, such as AWML's.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Run finished stages again.")] = False,
    html: Annotated[Path | None, typer.Option(help="The page.  [default: report.html in the work folder]")] = None,
    json: JsonFile = None,
    rot_y_axis_reference: RotYAxis = False,
    data_root: Annotated[
        Path | None, typer.Option(help="Folder that paths in the info file are relative to.  [default: data.root]")
    ] = None,
    trt_python: tensorrt.Python = None,
) -> None:
    """Export, build, verify and evaluate from one configuration. Exit code 1 when a stage fails.

    A run that was interrupted goes on where it stopped: a stage whose inputs and files are unchanged is not repeated.
    """
    from rich.text import Text

    from cp_debug.cli.console import command_line, show_document, show_notes, steps
    from cp_debug.deploy.config import named_config, override

    overrides = {
        "tensorrt.python": trt_python,
        "export.rot_y_axis_reference": rot_y_axis_reference or None,
        "data.root": data_root,
    }
    settings = override(named_config(config, model), overrides)
    show_notes(settings.notes)
    check_installed(*_backends(settings), trt_python=settings.tensorrt.python)
    if settings.verify.enabled:
        check_configured(settings, settings.verify.samples, flag=f"{config}: data.path")
    if settings.evaluate.enabled:
        check_configured(settings, settings.evaluate.samples, truth=True, flag=f"{config}: data.path")
    engines = settings.export.mode in ("trt", "both") or any(
        "trt" in scenario.test for scenario in settings.scenarios()
    )
    refuse(("data_root",), unless=settings.data.path is not None, why=f"{config} names no data")
    refuse(("trt_python",), unless=engines, why=f"{config} builds no engine")
    load_torch()
    from cp_debug.deploy.runner import deploy as run
    from cp_debug.deploy.stages import Deployment
    from cp_debug.reports.deployment import stage_table, write_summary
    from cp_debug.reports.sheet_terminal import Terminal

    log = DeployLog(settings.log_file)
    for note in settings.notes:
        log.line(note)
    try:
        with steps() as on_step:
            deployment = Deployment(settings, str(config), on_step, on_event=on_step.on_event)
            records = run(deployment, fresh=fresh, on_stage=log.stage)
    except CpdebugError as error:
        with suppress(InputError):  # a full disk is not what ended it
            log.line(str(error))
        raise
    passed = all(record.passed for record in records)
    page = html or settings.work_dir / "report.html"
    write_summary(records, f"{settings.model}, {config.name}", command_line(), page)
    verdict = Text(f"{'✓' if passed else '✗'} {page}", style="green" if passed else "bold red")
    document = {"passed": passed, "stages": {record.name: record.document for record in records}}
    show_document([Terminal(stage_table(records)), verdict], document, json)
    raise typer.Exit(0 if passed else 1)


class DeployLog:
    """Lines with times, appended to a file where there is one. Raises InputError where it cannot be written."""

    def __init__(self, file: Path | None) -> None:
        self._file = file
        if file is not None:
            make_folder(file.parent)

    def line(self, text: str) -> None:
        """Append a line."""
        if self._file is None:
            return
        try:
            with self._file.open("a", encoding="utf-8") as lines:
                lines.write(f"{datetime.now():%Y-%m-%d %H:%M:%S} {text}\n")
        except OSError as error:
            raise InputError(f"{self._file}: the log cannot be written ({system_reason(error)})") from None

    def stage(self, name: str, record: StageRecord | None) -> None:
        """Append that a stage begins (no record), or what it gave."""
        if record is None:
            self.line(f"{name}: begins")
            return
        outcome = "as before" if record.resumed else f"{record.seconds:.1f} s"
        self.line(f"{name}: {'passed' if record.passed else 'FAILED'}, {outcome}: {record.line}")


def _backends(settings: DeployConfig) -> list[str]:
    """Specs of the backends that the stages need, as far as the configuration alone tells."""
    specs = [settings.engine_backend] if settings.export.mode in ("trt", "both") else []
    if settings.verify.enabled:
        specs += [spec for scenario in settings.scenarios() for spec in (scenario.reference, scenario.test)]
    if settings.evaluate.enabled:
        specs += settings.evaluate.backends or []
    return specs
