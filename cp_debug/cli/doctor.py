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
    unsafe = [setting for setting in report.settings if not setting.safe]
    if unsafe:
        console.print(Text("these settings change numbers; cpdebug sets them itself, your own programs should, too:"))
    for setting in unsafe:  # to be copied, too
        name = setting.name.removeprefix("torch ")
        is_what = setting.value if name in setting.advice else f"{setting.name} is {setting.value}"
        console.print(Text.assemble((setting.advice, "yellow"), f"  # {is_what} here"), soft_wrap=True)
    console.print(
        Text(f"{len(report.settings) - len(unsafe)} of {len(report.settings)} settings are safe; --json has all")
    )
    console.print()
    for line in report.devices:
        console.print(Text(line))
    for warning in report.warnings:
        console.print(Text(f"warning: {warning}", "bold yellow"))
