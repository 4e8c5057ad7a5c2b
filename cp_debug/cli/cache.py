"""``cpdebug cache``: what is kept between runs, and how to clear it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from cp_debug.caches import KeptEntry


class CacheKind(str, Enum):
    """Caches by what they keep."""

    engines = "engines"
    exports = "exports"


def cache(
    kind: Annotated[CacheKind | None, typer.Argument(help="One of the caches; default: all.")] = None,
    clear: Annotated[bool, typer.Option("--clear", help="Remove what would be listed.")] = False,
    unused: Annotated[
        float | None, typer.Option(min=0.0, help="Only what was not used for this number of days.")
    ] = None,
    folder: Annotated[
        Path | None, typer.Option("--cache", help="Folder of engines, as it was named to `bisect`.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Machine-readable, on stdout: every entry.")] = False,
) -> None:
    """Show what is kept for later runs, TensorRT's engines and exported graphs, or clear it.

    Nothing is lost but time: the next run makes again what it needs.
    """
    import time
    from dataclasses import asdict
    from json import dumps

    from rich.filesize import decimal

    from cp_debug.caches import KINDS, cache_folder, kept, remove
    from cp_debug.cli.console import console
    from cp_debug.errors import InputError
    from cp_debug.files import write_text

    if folder is not None and kind is CacheKind.exports:
        raise InputError("--cache: it would do nothing here: it names a folder of engines, and exports were asked for")
    if folder is not None and not folder.is_dir():
        raise InputError(f"--cache: {folder}: no such folder")
    kinds = [kind.value] if kind else ["engines"] if folder else list(KINDS)
    folders = {name: folder or cache_folder(name) for name in kinds}
    before = time.time() - (unused or 0.0) * 86400
    entries = {
        name: [entry for entry in kept(name, at) if unused is None or entry.used <= before]
        for name, at in folders.items()
    }
    freed = {name: remove(found) for name, found in entries.items()} if clear else None
    if json:
        document = {
            name: {
                "folder": str(folders[name]),
                "bytes": sum(entry.size for entry in found),
                "removed": clear,
                "entries": [asdict(entry) | {"paths": [str(path) for path in entry.paths]} for entry in found],
            }
            for name, found in entries.items()
        }
        write_text(dumps(document, indent=1) + "\n", None)
        return
    if freed is None:
        _show(folders, entries)
        return
    for name, found in entries.items():
        console.print(f"{name}: removed {_count(found)}, {decimal(freed[name])}, of {folders[name]}", soft_wrap=True)


def _show(folders: Mapping[str, Path], entries: Mapping[str, Sequence[KeptEntry]]) -> None:
    from datetime import datetime

    from rich.filesize import decimal

    from cp_debug.caches import KINDS
    from cp_debug.cli.console import console
    from cp_debug.reports.sheet import Column, Sheet
    from cp_debug.reports.sheet_terminal import Terminal

    rows = [
        (
            name,
            len(found),
            decimal(sum(entry.size for entry in found)),
            f"{datetime.fromtimestamp(found[0].used):%Y-%m-%d %H:%M}" if found else "",
            KINDS[name],
        )
        for name, found in entries.items()
    ]
    columns = (
        Column("cache", "mark"),
        Column("entries", "number", show=str),
        Column("size", "mark"),
        Column("last used", "mark", leave_out=1),
        Column("what it keeps", leave_out=2),
    )
    console.print(Terminal(Sheet(columns, rows)))
    for name, at in folders.items():
        console.print(f"{name}: {at}", soft_wrap=True)
    if any(entries.values()):
        console.print("remove them: cpdebug cache --clear; those of a month ago: --unused 30 --clear", soft_wrap=True)


def _count(entries: Sequence[KeptEntry]) -> str:
    return f"{len(entries)} entr{'y' if len(entries) == 1 else 'ies'}"
