"""Files that appear whole or not at all: written to a temporary name and renamed when complete."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from cp_debug.errors import InputError


@contextmanager
def complete_path(path: Path) -> Iterator[Path]:
    """A temporary name that becomes ``path`` when the block succeeds. Raises InputError when it cannot be written."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        partial.replace(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror or error})") from error
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def complete_file(path: Path) -> Iterator[TextIO]:
    """Open ``path`` for writing so that it appears whole or not at all. Raises InputError when it cannot be written."""
    with complete_path(path) as partial, partial.open("w", encoding="utf-8") as stream:
        yield stream


def write_text(text: str, target: Path | None) -> None:
    """Write a report to a file, or to stdout without one."""
    if target is None:
        sys.stdout.write(text)
        return
    with complete_file(target) as stream:
        stream.write(text)


def key_of(parts: Mapping[str, Any]) -> str:
    """A hash of plain containers."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def hashes(paths: Iterable[Path]) -> dict[str, str]:
    """File → SHA-256."""
    return {str(path): file_hash(path) for path in sorted(paths)}


def file_hash(path: Path) -> str:
    """SHA-256 of a file; empty where there is none."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    except OSError:
        return ""
    return digest.hexdigest()
