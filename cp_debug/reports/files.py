"""Results as files: JSON and CSV, written to a temporary name and renamed when complete."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from cp_debug.bisect.result import BisectResult
from cp_debug.errors import InputError


def write_json(result: BisectResult, target: str) -> None:
    """Write the result as JSON to the file ``target``, or to stdout when it is ``-``."""
    text = json.dumps(result.to_dict(), indent=1, allow_nan=False)
    if target == "-":
        sys.stdout.write(text + "\n")
        return
    with complete_file(Path(target)) as stream:
        stream.write(text + "\n")


def write_csv(result: BisectResult, target: Path) -> None:
    """Write the layers of every test backend as one CSV table with a leading column ``backend``."""
    import pandas as pd

    tables = [test.layers.assign(backend=test.backend.spec) for test in result.tests]
    table = pd.concat(tables)
    with complete_file(target) as stream:
        table[["backend", *table.columns.drop("backend")]].to_csv(stream, index=False)


@contextmanager
def complete_file(path: Path) -> Iterator[TextIO]:
    """Open ``path`` for writing so that it appears whole or not at all. Raises InputError when it cannot be written."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("w", encoding="utf-8") as stream:
            yield stream
        partial.replace(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror or error})") from error
    finally:
        partial.unlink(missing_ok=True)
