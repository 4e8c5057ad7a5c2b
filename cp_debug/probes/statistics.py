"""Statistics of two tensors: all from one blocked pass, one pair in memory at a time.

NaN and Inf never vanish into a summary:

* NaN on both sides at one place, or Inf of the same sign, is agreement: counted on each side, left out of the numbers.
* Any other pair with a NaN or Inf in it (``mismatched``) is an infinite difference: ``max_abs``, ``mean_abs`` and
  ``rel_l2`` become inf, ``sqnr_db`` -inf, ``cosine`` NaN, and percentiles count it at the top. ``finite_max_abs`` and
  ``finite_rel_l2`` keep what the rest says.
* Another shape is a finding too: all differences are infinite, ``argmax`` is None; what each side alone holds is kept.

Sums are float64 (squares of float64 values beyond 1e154 overflow to inf). Differences of integers are exact before they
are rounded to float64; one beside a number in floating point is rounded first.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from cp_debug.errors import InputError, in_one_line
from cp_debug.probes.arrays import Tensor, dtype_name, in_one_place, is_dense, is_torch
from cp_debug.probes.distance import MASKED, distance, ratio, unmasked
from cp_debug.probes.statistics_reduce import PairPiece, Totals, reduce_pair
from cp_debug.serialize import JsonForm

RESOLUTION = 2.0**-6
"""Largest relative error of ``p50_abs`` and ``p99_abs``, from 1.2e-38 to 3.4e38: half a bin of the histogram."""


@dataclass(frozen=True)
class TensorStats(JsonForm):
    """test − reference, in numbers. Units are those of the tensors, except where a name says otherwise."""

    derives = ("shape_mismatch",)
    shape: tuple[int, ...]
    shape_test: tuple[int, ...]
    dtype_ref: str
    dtype_test: str
    count: int
    """Elements of the reference."""
    max_abs: float
    mean_abs: float
    rel_l2: float
    """‖test − ref‖ ÷ ‖ref‖; for a reference of zeros 0 when the test is zero too, else inf. Where the reference has a
    mask, such as −1e9, without those elements if that is more (``unmasked``)."""
    cosine: float
    """1 when both are all zeros (or empty), 0 when one is."""
    sqnr_db: float
    """10·log10(Σref² ÷ Σ(test − ref)²): inf without a difference, -inf for a reference of zeros."""
    p50_abs: float
    p99_abs: float
    """Smallest |difference| that at least 99 % do not exceed, from a log histogram: relative error up to RESOLUTION. Of
    tensors beyond 2²⁰ elements every seventh is counted."""
    max_ref: float
    """Largest finite |reference|."""
    nan_ref: int
    nan_test: int
    inf_ref: int
    inf_test: int
    mismatched: int
    """Places where a NaN or Inf meets something else."""
    argmax: tuple[int, ...] | None
    """Index of ``max_abs``, the first in row-major order; None for empty tensors and for other shapes."""
    equal: bool
    """Same shape and every value equal, NaN equal to NaN, −0 to 0, whatever the dtypes."""
    finite_max_abs: float
    finite_rel_l2: float
    unequal: int | None = None
    """Number of elements that differ, where a side holds integers or bool; None in floating point, and for other
    shapes."""

    @property
    def is_whole(self) -> bool:
        """Whether a side holds integers or bool: indices, ids, counts, masks, which are right or wrong, not rounded."""
        return self.unequal is not None

    @property
    def shape_mismatch(self) -> bool:
        """Whether the shapes differ: nothing could be compared element by element."""
        return self.shape != self.shape_test

    @property
    def severity(self) -> tuple[float, ...]:
        """Sort key, larger is worse: other shape, then ``max_abs``, then how many mismatched, then ``rel_l2``."""
        return self.shape_mismatch, self.max_abs, self.mismatched, self.rel_l2

    @property
    def nothing_compared(self) -> str:
        """Reason in words why no two numbers could be compared; empty where some were, or where the sides differ."""
        if self.shape_mismatch or self.mismatched or self.nan_ref + self.inf_ref < self.count:
            return ""
        return "NaN or Inf everywhere on both sides" if self.count else "without an element on both sides"

    def nonfinite(self, kind: str, side: str) -> int:
        """Number of elements that are NaN (``nan``) or Inf (``inf``) on the ``reference`` or the ``test`` side."""
        count: int = getattr(self, f"{kind}_{'ref' if side == 'reference' else side}")
        return count

    @property
    def both_zero(self) -> bool:
        """Whether every element is 0 on both sides: most faults could hide behind that."""
        strange = self.nan_ref or self.inf_ref or self.mismatched or self.shape_mismatch
        return self.count > 0 and self.max_ref == self.max_abs == 0 and not strange


def compare(reference: Tensor, test: Tensor) -> TensorStats:
    """Compare two tensors of any real or bool dtypes, numpy (memory-mapped too) or torch, in one pass.

    A pair of which a tensor lies on a GPU is reduced there. Extra memory is a few blocks, whatever the size; arrays
    that are not contiguous are read block by block too.
    Raises InputError for dtypes without real numbers.
    """
    for side, tensor in (("reference", reference), ("test", test)):
        if is_torch(tensor) and not (hasattr(tensor, "layout") and is_dense(tensor)):
            raise InputError(f"cannot compare: the {side} is not a dense tensor with values: {type(tensor).__name__}")
        if not _is_real(tensor):
            kind = dtype_name(tensor) if hasattr(tensor, "dtype") else np.asarray(tensor).dtype.name
            raise InputError(f"cannot compare: the {side} has dtype {kind}; expected real numbers or bool")
    reference, test = in_one_place(reference, test)
    if reference.shape != test.shape:
        of_each = (reduce_pair(side, side).whole for side in (reference, test))
        return _different_shapes(reference, test, *of_each)
    return _finish(reference, test, reduce_pair(reference, test))


def _is_real(tensor: Tensor) -> bool:
    if is_torch(tensor):
        return not tensor.is_complex()
    try:
        dtype = np.asarray(tensor).dtype
    except Exception as error:  # a list of rows of other lengths, or somebody's object that raises
        raise InputError(f"cannot compare: no array: {in_one_line(error)}") from error
    return dtype.kind in "biuf" or (dtype.kind == "V" and np.can_cast(dtype, np.float64))


def _finish(reference: Tensor, test: Tensor, totals: Totals) -> TensorStats:
    """Statistics of two tensors of one shape, from their sums; formulas stand at the fields of ``TensorStats``."""
    whole, shape = totals.whole, tuple(reference.shape)
    agree = not whole.mismatched
    norm_ref, norm_test, norm_diff = (math.sqrt(square) for square in (whole.sum_rr, whole.sum_tt, whole.sum_dd))
    rel_l2 = of_all = ratio(norm_diff, norm_ref)
    if 0 < of_all < 1 and whole.max_ref >= MASKED and (shown := unmasked(reference, norm_ref)) is not None:
        rel_l2 = max(of_all, distance(test[shown], reference[shown]).relative)
    if norm_ref and norm_test:
        cosine = min(max(whole.sum_rt / norm_ref / norm_test, -1.0), 1.0)
    else:
        cosine = float(norm_ref == norm_test)
    return TensorStats(
        **_sides(reference, test, whole, whole),
        max_abs=totals.max_abs,
        mean_abs=whole.sum_abs / max(whole.finite, 1) if agree else math.inf,
        rel_l2=rel_l2 if agree else math.inf,
        cosine=cosine if agree else math.nan,
        sqnr_db=(-20 * math.log10(of_all) if of_all else math.inf) if agree else -math.inf,
        p50_abs=totals.quantile(0.50),
        p99_abs=totals.quantile(0.99),
        mismatched=whole.mismatched,
        argmax=tuple(int(i) for i in np.unravel_index(totals.argmax, shape)) if 0 not in shape else None,
        equal=totals.max_abs == 0,
        finite_max_abs=whole.max_abs,
        finite_rel_l2=rel_l2,
        unequal=totals.unequal,
    )


def _different_shapes(reference: Tensor, test: Tensor, of_ref: PairPiece, of_test: PairPiece) -> TensorStats:
    """Statistics of two tensors whose shapes differ: every difference is infinite."""
    return TensorStats(
        **_sides(reference, test, of_ref, of_test),
        max_abs=math.inf,
        mean_abs=math.inf,
        rel_l2=math.inf,
        p50_abs=math.inf,
        p99_abs=math.inf,
        finite_max_abs=math.inf,
        finite_rel_l2=math.inf,
        cosine=math.nan,
        sqnr_db=-math.inf,
        mismatched=0,
        argmax=None,
        equal=False,
    )


def _sides(reference: Tensor, test: Tensor, of_ref: PairPiece, of_test: PairPiece) -> dict[str, Any]:
    """Fields that look at one side alone."""
    return {
        "shape": tuple(reference.shape),
        "shape_test": tuple(test.shape),
        "dtype_ref": dtype_name(reference),
        "dtype_test": dtype_name(test),
        "count": math.prod(reference.shape),
        "max_ref": of_ref.max_ref,
        "nan_ref": of_ref.nan_ref,
        "inf_ref": of_ref.inf_ref,
        "nan_test": of_test.nan_test,
        "inf_test": of_test.inf_test,
    }
