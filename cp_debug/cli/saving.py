"""Output folders of commands: a new folder, or, with --overwrite, that of an earlier run."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cp_debug.errors import InputError


def is_ours(folder: Path) -> bool:
    """Whether an earlier run wrote the folder: a saved result, also an incomplete one, or a capture."""
    return any((folder / name).exists() for name in ("result.json", "sample-0", "manifest.json"))


def check_target(flag: str, folder: Path, overwrite: bool) -> None:
    """Raise InputError where ``folder`` cannot be written as ``flag`` says, before anything long."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not folder.is_dir() or not is_ours(folder):
        raise InputError(f"{flag}: {folder} exists and is none of cpdebug's; expected a new or empty folder")
    if not overwrite:
        raise InputError(f"{flag}: {folder} holds an earlier run; --overwrite replaces it")


@contextmanager
def replacing(flag: str, folder: Path, overwrite: bool) -> Iterator[Path]:
    """A folder to write to, which takes the place of an earlier run's when the block succeeds; else that one stays.

    A new or empty folder is given as it is. Raises InputError as ``check_target`` does.
    """
    check_target(flag, folder, overwrite)
    if not folder.exists() or not any(folder.iterdir()):
        there = folder.exists()
        try:
            yield folder
        except Exception:
            _empty(folder)
            if not there:
                shutil.rmtree(folder, ignore_errors=True)
            raise
        return
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    try:
        yield partial
        try:
            shutil.rmtree(folder)
            partial.replace(folder)
        except OSError as error:
            raise InputError(f"{flag}: {folder} cannot be replaced ({error.strerror or error})") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _empty(folder: Path) -> None:
    """Remove what was written into a folder that was new or empty, by a command that failed."""
    for entry in folder.iterdir() if folder.is_dir() else ():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.unlink(missing_ok=True)
