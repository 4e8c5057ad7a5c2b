"""``compare_tensors``: two mappings of tensors, by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from cp_debug.errors import InputError
from cp_debug.probes.statistics import TensorStats, compare

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
        lines = [
            f"{name:{width}}  "
            + (
                f"shapes differ: {stats.shape}, {stats.shape_test}"
                if stats.shape_mismatch
                else f"max |Δ| {stats.max_abs:.3g}, rel. L2 {stats.rel_l2:.3g}"
            )
            for name, stats in self.items()
        ]
        lines += [f"only in the reference: {', '.join(self.missing)}"] if self.missing else []
        lines += [f"only in the test: {', '.join(self.extra)}"] if self.extra else []
        return "\n".join(lines)


def compare_tensors(reference: Mapping[str, Any], test: Mapping[str, Any]) -> TensorComparison:
    """Compare tensors of equal names: numpy arrays (memory-mapped too) or torch tensors, of any real or bool dtype.

    Raises InputError where no name is in both mappings, and for dtypes without real numbers.
    """
    common = [name for name in reference if name in test]
    if not common:
        raise InputError(f"no name in common: {_names(reference)} against {_names(test)}")
    return TensorComparison(
        {name: compare(reference[name], test[name]) for name in common},
        [name for name in reference if name not in test],
        [name for name in test if name not in reference],
    )


def _names(tensors: Mapping[str, Any]) -> str:
    return ", ".join([*tensors][:4]) + (" …" if len(tensors) > 4 else "") or "nothing"
