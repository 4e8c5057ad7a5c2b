"""The walk over a tensor pair in blocks, by NumPy on the host and by torch on a device, and the sums that it makes.

Differences of integers are exact before they are rounded to float64: beyond 2⁵³ two of them may round to one.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from cp_debug.probes.arrays import Tensor, device_of, dtype_name, is_torch

HOST_CHUNK = 1 << 15
"""Elements a turn on the host: what is made of them stays in a core's cache, and torch computes with no more of them in
one thread: on a busy machine its threads wait for each other at every operator."""
ROW = 1 << 13
"""Elements that BLAS multiplies and sums at once."""
COUNTED = 1 << 20
"""Elements up to which each falls into a bin. Beyond, every seventh: as of a random sample of 150,000, ranks have a
standard deviation of at most 0.13 % at the median and 0.03 % at 99 %. Counting all took a third of the comparison."""
DEVICE_CHUNK = 1 << 24
"""Elements a turn on a GPU: 128 MiB in FP64, some five times over."""
_LARGEST = np.finfo(np.float64).max / 2
"""Limit of magnitudes, so that a difference of two such numbers is finite."""


def blocks(ref: Tensor, test: Tensor) -> Iterator[tuple[int, Any, Any, Any, Any]]:
    """Blocks of two tensors of one shape and any real dtypes, both arrays or both on one device of torch.

    Of each: the flat index where it starts, both sides as they are [n], and both in FP32, where that holds all their
    numbers, else in FP64 [n].
    """
    # Copied where the elements lie otherwise: slices of a flat iterator take eight times as long.
    sides = [(side.detach() if is_torch(side) else side).reshape(-1) for side in (ref, test)]
    as_floats = [_single if np.can_cast(np.dtype(dtype_name(s)), np.float32) else as_double for s in (ref, test)]
    chunk, count = HOST_CHUNK if isinstance(ref, np.ndarray) else DEVICE_CHUNK, math.prod(ref.shape)
    for start in range(0, count, chunk):
        parts = [side[start : start + chunk] for side in sides]
        yield start, *parts, *(convert(part) for convert, part in zip(as_floats, parts, strict=True))


def reduce_pair(ref: Tensor, test: Tensor) -> Totals:
    """Reduce two tensors of one shape and any real dtypes, both arrays or both on one device of torch.

    From a device only numbers are copied to the host.
    """
    whole, wide = any(map(is_whole, (ref, test))), are_wide(ref, test)
    pieces, unequal, histogram = [], 0, np.zeros(BINS, np.int64)
    count = math.prod(ref.shape)
    each, places = 7 if count > COUNTED else 1, host_places(ref, 3)
    with np.errstate(all="ignore"):
        for start, a, b, r, t in blocks(ref, test):
            if whole:
                unequal += int((a != b).sum() if wide else (r != t).sum())
            numbers, bins = _reduced(r, t, abs(differences(b, a)) if wide else abs(t - r), each, places)
            special: dict[str, Any] = {}
            if not math.isfinite(numbers[0]):
                r, t, special = _set_aside(as_double(r), as_double(t))
                numbers, bins = _reduced(r, t, abs(t - r), each, places)
            histogram += bins
            fields = dict(zip(PairPiece._fields[1:], numbers, strict=False), finite=len(r), argmax=int(numbers[1]))
            pieces.append((start, PairPiece(**{**fields, **special})))
    if each > 1:
        histogram = np.rint(histogram * (count / histogram.sum())).astype(np.int64)
    return Totals.of(pieces, histogram, unequal if whole else None)


def _reduced(r: Any, t: Any, d: Any, each: int, places: Sequence[Any]) -> tuple[list[float], np.ndarray]:
    """The largest of the |differences| ``d`` [n] of two tensors, its first place, the largest |r|, and sums, as
    ``PairPiece`` has them; [BINS] int64 how many of every so many fall into each bin, which means nothing where one is
    not finite."""
    x, y, z = map(as_double, (r, t, d), places)
    pairs = (z, z), (x, x), (y, y), (x, y)
    place = d.argmax()
    numbers = [d.max() if is_torch(d) else d[place], place, abs(r).max(), z.sum(), *(dot(*pair) for pair in pairs)]
    # Of each piece from its first element on, on every device: 7 divides no piece, so others are taken of each row.
    whole = len(d) // HOST_CHUNK * HOST_CHUNK
    parts = (d[:whole].reshape(-1, HOST_CHUNK)[:, ::each].reshape(-1), d[whole::each])
    bits = [_single(part).view(sys.modules["torch"].int32 if is_torch(d) else np.int32) for part in parts if len(part)]
    return to_host(numbers), np.sum([_count(part >> BIN_SHIFT)[:BINS] for part in bits], axis=0)


def dot(a: Any, b: Any) -> Any:
    """Σ a·b of two tensors [n] of FP64, or of FP32 on the host, where rows of ``ROW`` are summed in FP32."""
    if not isinstance(a, np.ndarray):
        if device_of(a) != "cpu":
            return a @ b
        a, b = a.detach().numpy(), b.detach().numpy()
    # OpenBLAS multiplies up to 10,000 elements in one thread: with more its threads wait for each other on a busy
    # machine. One matmul of many rows is a product for each.
    whole = len(a) // ROW * ROW
    rows = (a[:whole].reshape(-1, 1, ROW) @ b[:whole].reshape(-1, ROW, 1)).sum(dtype=np.float64)
    return rows if whole == len(a) else rows + (a[whole:] * b[whole:]).sum(dtype=np.float64)


def to_host(numbers: Sequence[Any]) -> list[float]:
    """Numbers of the host, or in one copy those that lie on a device."""
    if device_of(numbers[0]) == "cpu":
        return [float(number) for number in numbers]
    found: list[float] = sys.modules["torch"].stack([number.double() for number in numbers]).tolist()
    return found


def _count(keys: Any) -> np.ndarray:
    """Count how often each bin occurs. ``histc`` of integers exists on CUDA only, and is 20 times faster there."""
    if not is_torch(keys):
        return np.bincount(keys, minlength=BINS)
    counts = keys.histc(BINS, 0, BINS).long() if keys.is_cuda else keys.bincount(minlength=BINS)
    return np.asarray(counts.cpu())


def _set_aside(ref: Any, test: Any) -> tuple[Any, Any, dict[str, Any]]:
    """Put zeros where a pair [n] of FP64 is not finite, and say what was there as fields of a PairPiece."""
    xp = sys.modules["torch"] if is_torch(ref) else np
    nan_ref, nan_test, inf_ref, inf_test = xp.isnan(ref), xp.isnan(test), xp.isinf(ref), xp.isinf(test)
    finite_ref = ~(nan_ref | inf_ref)
    finite = finite_ref & ~(nan_test | inf_test)
    mismatched = ~finite & (ref != test) & ~(nan_ref & nan_test)
    masks = {"finite": finite, "nan_ref": nan_ref, "nan_test": nan_test, "inf_ref": inf_ref, "inf_test": inf_test}
    fields: dict[str, Any] = {name: int(mask.sum()) for name, mask in (masks | {"mismatched": mismatched}).items()}
    fields["max_ref"] = float(abs(xp.where(finite_ref, ref, 0.0)).max())
    fields["first_mismatch"] = int(xp.where(mismatched, 1, 0).argmax())
    clean_ref, clean_test = (xp.where(finite, side, 0.0).clip(-_LARGEST, _LARGEST) for side in (ref, test))
    return clean_ref, clean_test, fields


def host_places(like: Tensor, count: int) -> Sequence[Any]:
    """So many places for a block of a tensor in FP64, as ``as_double`` takes them; None for what lies on a device.

    Memory that is asked for anew for each block costs as much as all that is computed there, in page faults.
    """
    if not isinstance(like, np.ndarray):
        return (None,) * count
    return [np.empty(min(like.size, HOST_CHUNK)) for _ in range(count)]


def as_double(part: Any, place: np.ndarray | None = None) -> Any:
    """A tensor of any shape in FP64; one that is of it already, as it is. A block of the host [n] of another type is
    written to ``place`` [n or more], where that is given."""
    if not isinstance(part, np.ndarray):
        return part.double()
    if place is None or part.dtype == np.float64:
        return part.astype(np.float64, copy=False)
    np.copyto(place[: len(part)], part)
    return place[: len(part)]


def _single(part: Any) -> Any:
    return part.astype(np.float32, copy=False) if isinstance(part, np.ndarray) else part.float()


MANTISSA_BITS = 5
"""A histogram bin is the leading bits of a float32: 8 of exponent and these, so 32 bins an octave."""
BIN_SHIFT = 23 - MANTISSA_BITS
INFINITE_BIN = 255 << MANTISSA_BITS
BINS = INFINITE_BIN + 1


class PairPiece(NamedTuple):
    """Consecutive elements of a pair, reduced. Differences and sums are over the pairs with both sides finite."""

    finite: int
    """Number of pairs with both sides finite."""
    max_abs: float
    argmax: int
    """First flat index, counted from the start of the piece, that has ``max_abs``."""
    max_ref: float
    sum_abs: float
    sum_dd: float
    sum_rr: float
    sum_tt: float
    sum_rt: float
    nan_ref: int = 0
    nan_test: int = 0
    inf_ref: int = 0
    inf_test: int = 0
    mismatched: int = 0
    first_mismatch: int = 0
    """Flat index of the first mismatched pair; means nothing when there is none."""


@dataclass
class Totals:
    """A whole tensor pair, reduced."""

    whole: PairPiece
    histogram: np.ndarray
    """(BINS,) int64: |difference| of the finite pairs; mismatched pairs in the last bin."""
    unequal: int | None = None
    """Number of elements that differ, where a side holds integers or bool."""

    @classmethod
    def of(cls, pieces: Iterable[tuple[int, PairPiece]], histogram: np.ndarray, unequal: int | None = None) -> Totals:
        """Add up pieces, each with the flat index where it starts, in any order.

        ``histogram``, [bins] int64, holds all pairs, those that are not finite as zeros; it is corrected here.
        """
        ordered = sorted(pieces, key=lambda item: item[0])
        if not ordered:
            return cls(PairPiece(0, 0.0, 0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0), histogram, unequal)
        columns = dict(zip(PairPiece._fields, zip(*(piece for _, piece in ordered), strict=True), strict=True))
        sums: dict[str, Any] = {name: sum(column) for name, column in columns.items()}
        start, worst = max(ordered, key=lambda item: item[1].max_abs)
        mismatch = next((start + piece.first_mismatch for start, piece in ordered if piece.mismatched), 0)
        extremes = {"max_abs": worst.max_abs, "argmax": start + worst.argmax, "max_ref": max(columns["max_ref"])}
        histogram[0] -= histogram.sum() - sums["finite"]
        histogram[-1] += sums["mismatched"]
        return cls(PairPiece(**(sums | extremes | {"first_mismatch": mismatch})), histogram, unequal)

    @property
    def max_abs(self) -> float:
        """Largest |difference|, inf when a pair is mismatched."""
        return math.inf if self.whole.mismatched else self.whole.max_abs

    @property
    def argmax(self) -> int:
        """Flat index of ``max_abs``, the first one."""
        return self.whole.first_mismatch if self.whole.mismatched else self.whole.argmax

    def quantile(self, q: float) -> float:
        """The smallest |difference| that at least the fraction ``q`` of the compared pairs does not exceed."""
        cumulative = self.histogram.cumsum()
        rank = max(math.ceil(q * cumulative[-1]), 1)
        return min(_bin_value(int(cumulative.searchsorted(rank))), self.max_abs)


def _bin_value(index: int) -> float:
    """The middle of a bin; 0 for bin 0, which holds zero and all below 3.7e-40; inf from the last on."""
    if index == 0 or index >= INFINITE_BIN:
        return 0.0 if index == 0 else math.inf
    return float(np.array((2 * index + 1) << (BIN_SHIFT - 1), np.uint32).view(np.float32))


_LARGE = 2.0**62
"""Differences from which on float64's rounding says no less than 64 bits, in which they may wrap around."""


def is_whole(tensor: Tensor) -> bool:
    """Whether a tensor of any shape, of numpy or torch, holds integers or bool."""
    return _dtype_name(tensor).startswith(("int", "uint", "bool"))


def are_wide(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of any shapes hold integers, one of them of 64 bits: ``differences`` subtracts such."""
    return is_whole(a) and is_whole(b) and any(_dtype_name(t) in ("int64", "uint64") for t in (a, b))


def differences(ours: Tensor, theirs: Tensor) -> Any:
    """ours − theirs of two tensors of integers or bool, both of numpy or both of torch, in their shape and float64."""
    if is_torch(ours):
        import torch

        rounded = ours.double() - theirs.double()  # type: ignore[union-attr]
        exact = ours.long() - theirs.long()  # type: ignore[union-attr]
        return torch.where(rounded.abs() < _LARGE, exact.double(), rounded)
    rounded = np.subtract(ours, theirs, dtype=np.float64, casting="unsafe")
    exact = np.asarray(ours).astype(np.int64) - np.asarray(theirs).astype(np.int64)
    return np.where(np.abs(rounded) < _LARGE, exact.astype(np.float64), rounded)


def _dtype_name(tensor: Tensor) -> str:
    if is_torch(tensor):
        return dtype_name(tensor)
    return np.asarray(tensor).dtype.name  # whatever the order of its bytes
