"""``cpdebug doctor``: installed packages, devices, and every setting that can change a number."""

from __future__ import annotations

from cp_debug.cli.flags import JsonAlone


def doctor(json: JsonAlone = None) -> None:
    """Show versions, devices and settings that can change numbers."""
    from dataclasses import asdict

    from rich.text import Text

    from cp_debug.cli.console import console, show_document
    from cp_debug.reports.environment import examine
    from cp_debug.reports.sheet import Cell, Column, Sheet
    from cp_debug.reports.sheet_terminal import Terminal

    report = examine()
    show_document((), asdict(report), json)
    if json == "-":
        return
    packages = [(each.name, each.version or Cell("missing", "note")) for each in report.packages]
    console.print(Terminal(Sheet((Column("package", "mark"), Column("version", "mark")), packages)))
    for package in report.packages:  # lines of their own, to be copied
        if package.hint:
            console.print(Text.assemble((f"{package.name}: ", "yellow"), package.hint), soft_wrap=True)
    console.print()
    settings = [
        (each.name, each.value, each.in_a_run, Cell("✓", "good") if each.safe else Cell("✗", "note"))
        for each in report.settings
    ]
    columns = (Column("setting"), Column("here"), Column("in a run"), Column("", "mark"))  # nothing is cut
    console.print(Terminal(Sheet(columns, settings)))
    if not all(setting.safe for setting in report.settings):
        console.print(Text("where ✗ stands, a run of cpdebug sets the value itself; in programs of your own, set it:"))
    for setting in report.settings:
        if not setting.safe:
            console.print(Text(f"✗ {setting.name}: {setting.advice}", "yellow"), soft_wrap=True)
    console.print()
    for line in report.devices:
        console.print(Text(line))
    for warning in report.warnings:
        console.print(Text(f"warning: {warning}", "bold yellow"))
