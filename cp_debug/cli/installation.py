"""``cpdebug doctor``, ``models`` and ``cache``: what is installed, what can be named, what is kept between runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from cp_debug.cli.console import console, show_document
from cp_debug.cli.flags import JsonAlone
from cp_debug.errors import InputError


def doctor(json: JsonAlone = None) -> None:
    """Show versions, devices and settings that can change numbers."""
    from dataclasses import asdict

    from rich.text import Text

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


def models() -> None:
    """List the models that cpdebug knows, and the ways to name yours."""
    from cp_debug.recipes.registry import known_models
    from cp_debug.reports.sheet import Column, Sheet
    from cp_debug.reports.sheet_terminal import Terminal

    rows = [
        *known_models(),
        ("mmdet3d:CONFIG", "a detector of the real mmdet3d: a config file, or the name of one it ships"),
        ("FOLDER", "a folder of transformers: config.json and .safetensors; its code is never run"),
        ("FILE.onnx", "any ONNX file; every value is a probe"),
        ("package.module:callable", "a callable that returns (torch module, example inputs)"),
        ("file.py:callable", "the same, in a file"),
    ]
    console.print(Terminal(Sheet((Column("model", "name"), Column("what it is")), rows)))


def cache(
    kind: Annotated[
        Literal["engines", "exports"] | None, typer.Argument(help="One of the caches; default: all.")
    ] = None,
    clear: Annotated[bool, typer.Option("--clear", help="Remove the listed entries.")] = False,
    unused: Annotated[
        float | None, typer.Option(min=0.0, help="Only entries not used for this number of days.")
    ] = None,
    folder: Annotated[Path | None, typer.Option("--cache", help="Folder of engines, as given to `bisect`.")] = None,
    json: JsonAlone = None,
) -> None:
    """Show or clear the engines and exports kept for later runs.

    Nothing is lost but time: the next run makes again what it needs.
    """
    import time
    from datetime import datetime

    from rich.filesize import decimal

    from cp_debug.reports.sheet import Column, Sheet
    from cp_debug.reports.sheet_terminal import Terminal
    from cp_debug.store import KINDS, cache_folder, kept, remove

    if folder is not None and kind == "exports":
        raise InputError("--cache: it would do nothing here: it names a folder of engines, and exports were asked for")
    if folder is not None and not folder.is_dir():
        raise InputError(f"--cache: {folder}: no such folder")
    kinds = [kind] if kind else ["engines"] if folder else list(KINDS)
    folders = {name: str(folder or cache_folder(name)) for name in kinds}
    before = time.time() - (unused or 0.0) * 86400
    entries = {
        name: [entry for entry in kept(Path(at)) if unused is None or entry.used <= before]
        for name, at in folders.items()
    }
    freed = {name: remove(found) for name, found in entries.items()} if clear else None
    if json:  # every entry
        document = {
            name: {
                "folder": folders[name],
                "bytes": sum(entry.size for entry in found),
                "removed": clear,
                "entries": [
                    {"kind": name, "key": e.key, "paths": [str(e.path)], "size": e.size, "used": e.used} for e in found
                ],
            }
            for name, found in entries.items()
        }
        show_document((), document, json)
    if json == "-":
        return
    if freed is not None:
        for name, found in entries.items():
            count = f"{len(found)} entr{'y' if len(found) == 1 else 'ies'}"
            console.print(f"{name}: removed {count}, {decimal(freed[name])}, of {folders[name]}", soft_wrap=True)
        return

    def used(name: str) -> str:
        return f"{datetime.fromtimestamp(entries[name][0].used):%Y-%m-%d %H:%M}" if entries[name] else ""

    columns = (
        Column("cache", "mark"),
        Column("entries", "number", show=str, of=lambda name: len(entries[name])),
        Column("size", "mark", of=lambda name: decimal(sum(entry.size for entry in entries[name]))),
        Column("last used", "mark", leave_out=1, of=used),
        Column("what it keeps", leave_out=2, of=KINDS.__getitem__),
    )
    console.print(Terminal(Sheet.of(columns, entries)))
    for name, at in folders.items():
        console.print(f"{name}: {at}", soft_wrap=True)
    if any(entries.values()):
        remedy = "remove them: cpdebug cache --clear; those of a month ago: --unused 30 --clear"
        console.print(remedy, soft_wrap=True, markup=False)
