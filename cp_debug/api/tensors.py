"""``compare_tensors``: two mappings of tensors, by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from cp_debug.errors import InputError
from cp_debug.probes.statistics import TensorStats, compare
from cp_debug.safe_text import some

if TYPE_CHECKING:
    import pandas as pd


class TensorComparison(dict[str, TensorStats]):
    """Name → statistics of test − reference, in the reference's order."""

    def __init__(self, statistics: Mapping[str, TensorStats], missing: list[str], extra: list[str]) -> None:
        super().__init__(statistics)
        self.missing, self.extra = missing, extra
        """Names that only the reference, and that only the test has."""

    @property
    def worst(self) -> str:
        """The name of the tensor that differs most, by ``TensorStats.severity``."""
        return max(self, key=lambda name: self[name].severity)

    @property
    def frame(self) -> pd.DataFrame:
        """A pandas DataFrame with one row for each tensor."""
        import pandas as pd

        from cp_debug.serialize import encode

        return pd.DataFrame({name: encode(stats, json=False) for name, stats in self.items()}).T.infer_objects()

    def __str__(self) -> str:
        width = max(map(len, self))
        lines = [f"{name:{width}}  {_says(stats)}" for name, stats in self.items()]
        lines += [f"only in the reference: {', '.join(self.missing)}"] if self.missing else []
        lines += [f"only in the test: {', '.join(self.extra)}"] if self.extra else []
        return "\n".join(lines)


def compare_tensors(reference: Mapping[str, Any], test: Mapping[str, Any]) -> TensorComparison:
    """Compare tensors of equal names: numpy arrays (memory-mapped too) or torch tensors, of any real or bool dtype.

    Lists of numbers are taken as arrays. Raises InputError for what is no mapping of tensors, where no name is in both
    or no tensor has an element on a side, and for dtypes without real numbers.
    """
    for side, given in (("reference", reference), ("test", test)):
        if not isinstance(given, Mapping):
            raise InputError(f"{side}: {type(given).__name__}; expected a mapping of tensors by name")
        if unnamed := [name for name in given if not isinstance(name, str)]:
            raise InputError(f"{side}: {type(unnamed[0]).__name__} among the names; expected text")
    common = [name for name in reference if name in test]
    if not common:
        raise InputError(f"no name in common: {some(reference, 4) or 'nothing'} against {some(test, 4) or 'nothing'}")
    statistics = {name: _compared(name, reference[name], test[name]) for name in common}
    if all(stats.nothing_compared and not stats.count for stats in statistics.values()):
        raise InputError(f"nothing was compared: {some(statistics, 4)} without an element on both sides")
    return TensorComparison(
        statistics,
        [name for name in reference if name not in test],
        [name for name in test if name not in reference],
    )


def _compared(name: str, reference: Any, test: Any) -> TensorStats:
    pair = []
    for side, given in (("reference", reference), ("test", test)):
        tensor = given
        if not hasattr(given, "dtype"):
            try:
                tensor = np.asarray(given)
            except ValueError:  # nested lists of different lengths
                tensor = np.asarray(None)
            if tensor.dtype.kind not in "biuf":
                raise InputError(f"{side}: {name!r} is {type(given).__name__}; expected a tensor or a list of numbers")
        pair.append(tensor)
    try:
        return compare(*pair)
    except InputError as error:
        raise InputError(f"{name!r}: {error}") from None


def _says(stats: TensorStats) -> str:
    """Shapes where they differ, else the distance; with NaN or Inf, how many, and what the rest is."""
    if stats.shape_mismatch:
        return f"shapes differ: {stats.shape}, {stats.shape_test}"
    sides = (("reference", stats.nan_ref, stats.inf_ref), ("test", stats.nan_test, stats.inf_test))
    held = "; ".join(f"{side}: {nan} NaN, {inf} Inf" for side, nan, inf in sides)
    if not stats.count:
        return f"nothing to compare: {stats.nothing_compared}"
    if not stats.mismatched:
        alike = f"; NaN and Inf are alike on both sides ({held})" if any(nan or inf for _, nan, inf in sides) else ""
        if stats.nothing_compared:
            return f"no number to compare{alike}"
        unequal = f", {stats.unequal} of {stats.count} elements differ" if stats.unequal else ""
        return f"max |Δ| {stats.max_abs:.3g}, rel. L2 {stats.rel_l2:.3g}{unequal}{alike}"
    rest = f"max |Δ| {stats.finite_max_abs:.3g}, rel. L2 {stats.finite_rel_l2:.3g}"
    return f"{stats.mismatched} of {stats.count} values meet NaN or Inf ({held}); the rest: {rest}"
