"""``cpdebug deploy``: from a checkpoint to verified, evaluated files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cp_debug.cli import tensorrt
from cp_debug.cli.given import check_configured
from cp_debug.cli.typed import refuse


def deploy(
    config: Annotated[Path, typer.Argument(help="A .yaml or .toml file, or AWML's deploy_config.py as it is.")],
    model: Annotated[str | None, typer.Option(help="For a configuration that names no model, such as AWML's.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Do again what an earlier run has done.")] = False,
    html: Annotated[Path | None, typer.Option(help="The page.  [default: report.html in the work folder]")] = None,
    json: Annotated[str | None, typer.Option(help="Write JSON to a file, or to stdout with -.")] = None,
    trt_python: tensorrt.Python = None,
) -> None:
    """Load, export, build, verify and evaluate as the configuration says; exit code 1 when a stage fails.

    A run that was interrupted goes on where it stopped: a stage whose inputs and files are unchanged is not repeated.
    """
    from rich.text import Text

    from cp_debug.cli.console import command_line, show_document, steps
    from cp_debug.deploy.config import override
    from cp_debug.deploy.runner import deploy as run
    from cp_debug.deploy.stages import Deployment, named_config
    from cp_debug.reports.deployment import stage_table, write_summary
    from cp_debug.reports.sheet_terminal import Terminal

    settings = override(named_config(config, model), {"tensorrt.python": trt_python})
    if settings.verify.enabled:
        check_configured(settings, settings.verify.samples, flag=f"{config}: data.path")
    if settings.evaluate.enabled:
        check_configured(settings, settings.evaluate.samples, truth=True, flag=f"{config}: data.path")
    engines = settings.export.mode in ("trt", "both") or any(
        "trt" in scenario.test for scenario in settings.scenarios()
    )
    refuse(("trt_python",), unless=engines, why=f"{config} builds no engine")
    with steps() as on_step:
        records = run(Deployment(settings, str(config), on_step, on_event=on_step.on_event), fresh=fresh)
    passed = all(record.passed for record in records)
    page = html or settings.work_dir / "report.html"
    write_summary(records, f"{settings.model}, {config.name}", command_line(), page)
    verdict = Text(f"{'✓' if passed else '✗'} {page}", style="green" if passed else "bold red")
    document = {"passed": passed, "stages": {record.name: record.document for record in records}}
    show_document([Terminal(stage_table(records)), verdict], document, json)
    raise typer.Exit(0 if passed else 1)
