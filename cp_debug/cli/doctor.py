"""``cpdebug doctor``: installed packages, devices, and every setting that can change a number."""

from __future__ import annotations

from typing import Annotated

import typer


def doctor(json: Annotated[bool, typer.Option("--json", help="Machine-readable, on stdout.")] = False) -> None:
    """Show versions, devices and numeric settings, and which of them are not the safe ones."""
    from dataclasses import asdict
    from json import dumps

    from rich.table import Table
    from rich.text import Text

    from cp_debug.cli.console import console
    from cp_debug.reports.environment import examine

    report = examine()
    if json:
        print(dumps(asdict(report), indent=1))
        return
    versions = Table(box=None, header_style="bold", pad_edge=False)
    for header in ("package", "version", ""):
        versions.add_column(header, overflow="fold")
    for package in report.packages:
        versions.add_row(package.name, package.version or Text("missing", "yellow"), Text(package.hint, "dim"))
    console.print(versions)
    console.print()
    settings = Table(box=None, header_style="bold", pad_edge=False)
    for header in ("setting", "here", "in a run", ""):
        settings.add_column(header, overflow="fold")  # nothing is cut where the terminal is narrow
    for setting in report.settings:
        safe = Text("✓", "green") if setting.safe else Text("✗", "yellow")
        settings.add_row(setting.name, setting.value, setting.in_a_run, safe)
    console.print(settings)
    for setting in report.settings:  # lines of their own, to be copied
        if not setting.safe:
            console.print(Text(f"✗ {setting.name}: {setting.advice}", "yellow"), soft_wrap=True)
    console.print()
    for line in report.devices:
        console.print(Text(line))
    for warning in report.warnings:
        console.print(Text(f"warning: {warning}", "bold yellow"))
