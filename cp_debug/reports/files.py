"""Results as files: JSON, CSV and Parquet, written to a temporary name and renamed when complete."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from cp_debug.bisect.result import BisectResult
from cp_debug.files import complete_path, write_text
from cp_debug.optional import require
from cp_debug.reading import json_text
from cp_debug.safe_text import csv_cell

if TYPE_CHECKING:
    import pandas as pd


def write_json(result: BisectResult, target: Path) -> None:
    """Write the result as JSON, as ``SavedResult.open`` reads it."""
    write_text(json_text(result.to_dict(), indent=1) + "\n", target)


def layer_frame(result: BisectResult) -> pd.DataFrame:
    """The layers of every test backend as one table with a leading column ``backend``; figures are numbers."""
    import pandas as pd

    table = pd.concat([test.layers.assign(backend=test.backend.spec) for test in result.tests], ignore_index=True)
    return table[["backend", *table.columns.drop("backend")]]


def csv_text(table: pd.DataFrame) -> str:
    """A table as CSV in which no cell is a formula."""
    cells = {csv_cell(name): [csv_cell(cell) for cell in column] for name, column in table.items() if _is_text(column)}
    return table.rename(columns=csv_cell).assign(**cells).to_csv(index=False)


def _is_text(column: pd.Series) -> bool:
    from pandas.api.types import is_numeric_dtype

    return not is_numeric_dtype(column)


def write_parquet(result: BisectResult, target: Path) -> None:
    """Write the layers of every test backend as one Parquet file. Raises MissingPackage without pyarrow."""
    require("pyarrow", "parquet")
    with complete_path(target) as partial:
        layer_frame(result).to_parquet(partial, engine="pyarrow", index=False)
