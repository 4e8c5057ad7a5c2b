"""Changes from one constant to another: scaled, in some channels only, permuted, transposed, stored in fewer bits."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np

from cp_debug.graph.constants import is_uniform
from cp_debug.probes.distance import relative_l2
from cp_debug.probes.statistics_reduce import differences
from cp_debug.safe_text import in_digits

EXACT = 2e-6
"""Relative L2 distance up to which a description reproduces a tensor in FP32: some roundings."""
NARROW = {"float16": 5e-4, "bfloat16": 4e-3}
"""Relative L2 distance up to which a description reproduces a tensor of a narrow type."""
CLOSE = 1e-7
"""Relative L2 distance up to which two tensors count as equal."""
PARTS = (2, 3, 4, 6, 8, 12, 16, 32, 64)
"""Counts of heads, groups, gates and window cells in which slices may lie inside one another."""
MOST_AXES = 4
"""Axes longer than 1 whose orders are all tried."""
FEW = 3
"""Elements that are named one by one."""
MOST_CHANNELS = 4096
"""Slices along an axis up to which each is compared with each."""


@dataclass(frozen=True)
class TensorChange:
    """One change of a tensor, in words and numbers."""

    kind: str
    """``scaled``, ``channels-scaled``, ``channels-zero``, ``shifted``, ``negated``, ``elements``, ``permuted``,
    ``copied``, ``gates-permuted``, ``transposed``, ``flipped``, ``rolled``, ``fp16``, ``bf16``, ``int8-per-tensor``,
    ``int8-per-channel``, ``pruned``, ``clipped``, ``coarse``, ``another``, ``shape``, ``other``."""
    says: str
    evidence: dict[str, Any] = field(default_factory=dict)
    size: float = 0.0
    """Relative L2 distance, to the larger of both tensors; infinite for another number of elements."""


@np.errstate(invalid="ignore", over="ignore")  # Inf in a mask; what an integer type cannot hold: no such change
def describe(ours: np.ndarray, theirs: np.ndarray, gates: int = 0, *, closely: bool = True) -> TensorChange | None:
    """The change that makes ``theirs`` out of ``ours``; None where both are equal, numbers up to FP32's rounding.

    Integers are compared to the last bit, whatever their size: they are indices, ids and levels. ``gates``: blocks
    along the second axis of a recurrent layer's weight, whose order may differ. ``closely`` False tells the distance
    alone.
    """
    if ours.dtype.kind not in "fiubV" or theirs.dtype.kind not in "fiubV":
        return None if np.array_equal(ours, theirs) else TensorChange("other", "they differ")
    whole = all(x.dtype.kind in "iub" for x in (ours, theirs))
    if ours.shape != theirs.shape and not ours.size == theirs.size == 1:
        return _reshaped(ours, theirs) if whole else _reshaped(*(x.astype(np.float64) for x in (ours, theirs)))
    if ours.size == theirs.size == 1:
        ours, theirs = ours.reshape(-1), theirs.reshape(-1)
    a, b = ours.astype(np.float64), theirs.astype(np.float64)
    if (np.array_equal(ours, theirs) if whole else np.array_equal(a, b, equal_nan=True)) or not a.size:
        return None
    size = _distance(theirs, ours) if whole else _distance(b, a)
    if size <= CLOSE and theirs.dtype.kind == "f":
        return None
    limit = max(min(EXACT, max(size / 4, CLOSE)), NARROW.get(str(theirs.dtype), 0.0))
    for kind, says, value, evidence in _ways(a, b, gates, limit) if closely and not np.array_equal(a, b) else ():
        if whole and kind == "elements":
            break
        if whole and says == "× 1":
            continue
        cast = (np.rint(value) if whole else value).astype(theirs.dtype)
        if np.array_equal(cast, theirs) or (not whole and _distance(b, value) <= limit):
            return TensorChange(kind, says, evidence, size)
    if whole:
        return _whole(ours, theirs, size)
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        places = np.argwhere((a != b) & ~(np.isfinite(a) & np.isfinite(b)) & ~(np.isnan(a) & np.isnan(b)))
        pair = (in_digits(float(x[tuple(places[0])])) for x in (a, b))
        return TensorChange("other", f"{' → '.join(pair)} in {len(places)} of {a.size} elements", {}, size)
    return TensorChange("other", f"differs by {size:.3g} (rel. L2)", {}, size)


def _whole(ours: np.ndarray, theirs: np.ndarray, size: float) -> TensorChange:
    """The change of integers that nothing but themselves describes: the elements that differ, or how many."""
    places = np.argwhere(ours != theirs).tolist()
    if len(places) <= FEW and ours.size > 2 * len(places):
        return TensorChange("elements", _elements(ours, theirs, places), {"elements": places}, size)
    most = float(abs(differences(ours, theirs)).max())
    says = f"{len(places)} of {ours.size} elements differ, by up to {in_digits(most)}"
    return TensorChange("other", says, {}, size)


def _elements(a: np.ndarray, b: np.ndarray, places: Sequence[list[int]]) -> str:
    """The elements at some places, as in ``1 of 4 elements: [1]: 15043 → 15044``; integers with all their digits."""

    def number(x: np.ndarray, place: list[int]) -> str:
        return str(x[tuple(place)]) if x.dtype.kind in "iub" else f"{x[tuple(place)]:.6g}"

    changes = ", ".join(f"{place}: {number(a, place)} → {number(b, place)}" for place in places)
    return f"{len(places)} of {a.size} elements: {changes}"


def _distance(theirs: np.ndarray, ours: np.ndarray) -> float:
    """The smaller of both relative L2 distances, ours from theirs and theirs from ours, of float64 of one shape.

    Infinite where NaN and Inf are not alike and in the same places.
    """
    strange = ~(np.isfinite(theirs) & np.isfinite(ours))
    if strange.any() and not np.array_equal(theirs[strange], ours[strange], equal_nan=True):
        return math.inf
    return min(relative_l2(theirs, ours), relative_l2(ours, theirs))


def _reshaped(a: np.ndarray, b: np.ndarray) -> TensorChange:
    for order in itertools.permutations(range(a.ndim)) if a.ndim <= 5 else ():
        moved = a.transpose(order)
        if moved.shape == b.shape and _same(b, moved):
            return TensorChange("transposed", f"axes in the order {list(order)}", {"axes": list(order)})
    if a.size == b.size and _same(b.ravel(), a.ravel()):
        return TensorChange("shape", f"the shape is {list(b.shape)} instead of {list(a.shape)}", {}, 0.0)
    return TensorChange("shape", f"the shape is {list(b.shape)} instead of {list(a.shape)}", {}, float("inf"))


def _same(theirs: np.ndarray, ours: np.ndarray) -> bool:
    """Whether two arrays of one shape are equal: integers to the last bit, numbers up to FP32's rounding."""
    return np.array_equal(theirs, ours) if theirs.dtype.kind in "iub" else _distance(theirs, ours) <= EXACT


Form = tuple[str, str, np.ndarray, dict[str, Any]]
"""Kind of a change, what it is in words, what it makes of a tensor, and figures: see ``TensorChange``."""


def _ways(a: np.ndarray, b: np.ndarray, gates: int, limit: float) -> Iterator[Form]:
    """Every description with what it makes of ``a``, the simplest first, but none that cannot come within ``limit``."""
    if b.size > 1 and not b.any():
        yield "channels-zero", "all zero", np.zeros_like(a), {"axis": 0, "channels": list(range(min(len(a), 32)))}
    elif b.size > 1 and is_uniform(b) and not is_uniform(a):
        yield "other", f"all {b.flat[0]:.6g}", b, {}
    yield "negated", "the sign is flipped", -a, {}
    yield from itertools.takewhile(lambda way: way[0] in ("fp16", "bf16"), stored_forms(a))
    if (norm := float((a * a).sum())) and (factor := float((a * b).sum()) / norm):
        yield "scaled", f"× {factor:.6g}", factor * a, {"factor": factor}
    summand = float((b - a).mean())
    if summand:
        yield "shifted", f"{summand:+.4g}", a + summand, {"summand": summand}
    different = a != b
    count = int(different.sum())
    yield from _diagonals(a, b)
    yield from rolled_forms(a, b)
    reordered = _distance(np.sort(b, None), np.sort(a, None)) <= limit
    yield from turned_forms(a) if reordered else ()
    yield from _by_channel(a, b)
    yield from _orders(a, b, gates, reordered)
    if _cut_off(a, b, different):
        yield "clipped", f"clipped at {b.min():.4g} and {b.max():.4g}", a.clip(b.min(), b.max()), {}
    if 0 < count <= FEW and a.size > 2 * count:
        places = np.argwhere(different).tolist()
        yield "elements", _elements(a, b, places), b, {"elements": places}
    if _distance(b, a) < 1:  # what is left out or rounded is no larger than what was there
        yield from _pruned(a, b)
        yield from (way for way in stored_forms(a) if way[0] not in ("fp16", "bf16"))


def rolled_forms(a: np.ndarray, b: np.ndarray | None = None) -> Iterator[Form]:
    """A tensor in its shape, moved along an axis by one step or, with ``b``, by as much as its largest slice has moved.

    What comes in at an end is what goes out at the other; with ``b`` it is that of ``b``.
    """
    for axis, count in enumerate(a.shape):
        found = []
        if b is not None:
            ours, theirs = (np.moveaxis(x, axis, 0).reshape(count, -1) for x in (a, b))
            place = int(abs(theirs).max(1).argmax())
            found = [place - each for each in np.flatnonzero((ours == theirs[place]).all(1))[:FEW].tolist()]
        far = [(step + count // 2) % count - count // 2 for step in found if step]
        for step in dict.fromkeys((1, -1, *far)) if count > 2 else ():
            if np.array_equal(shifted_in(a, a, {axis: step}), a):
                continue  # slices that are all alike have not moved
            value = np.roll(a, step, axis) if b is None else shifted_in(a, b, {axis: step})
            yield "rolled", f"off by {step:+d} along axis {axis}", value, {"axis": axis, "by": step}


def _diagonals(a: np.ndarray, b: np.ndarray) -> Iterator[Form]:
    """A causal mask whose border lies at another diagonal."""
    ours, theirs = _diagonal(a), _diagonal(b)
    if ours is None or theirs is None or ours == theirs or (a.min(), a.max()) != (b.min(), b.max()):
        return
    corners = {0: "top left", a.shape[-1] - a.shape[-2]: "bottom right"}
    named = f" (aligned {corners[theirs]} instead of {corners[ours]})" if {ours, theirs} == {*corners} else ""
    says = f"its border follows diagonal {theirs} instead of {ours}{named}"
    yield "rolled", says, b, {"diagonal": theirs, "instead_of": ours}


def _diagonal(x: np.ndarray) -> int | None:
    """The last diagonal of the lower part of a matrix that holds one number up to there and another behind."""
    if x.ndim < 2 or x.size != x.shape[-1] * x.shape[-2]:
        return None
    matrix = x.reshape(x.shape[-2:])
    below, above = matrix[-1, 0], matrix[0, -1]
    last = int((matrix[0] == below).sum()) - 1
    plain = below != above and {*matrix[0], *matrix[-1]} == {below, above}
    return last if plain and np.array_equal(np.where(np.tri(*matrix.shape, last), below, above), matrix) else None


def _by_channel(a: np.ndarray, b: np.ndarray) -> Iterator[Form]:
    for axis in range(a.ndim):
        if a.shape[axis] < 2 or (a.ndim < 2 and a.size > MOST_CHANNELS):
            continue
        rows_a, rows_b = (np.moveaxis(x, axis, 0).reshape(a.shape[axis], -1) for x in (a, b))
        changed = np.flatnonzero((rows_a != rows_b).any(1))
        if len(changed) == 0 or (2 * len(changed) > len(rows_a) and len(changed) > 8 and axis > 1):
            continue
        yield from slice_forms(a, b, axis, changed)


def slice_forms(a: np.ndarray, b: np.ndarray, axis: int, changed: np.ndarray) -> Iterator[Form]:
    """A tensor with the slices ``changed`` along an axis zero, and with each of them scaled to be nearest to that of
    ``b``; both float64, of one shape."""
    count = a.shape[axis]
    rows, theirs = (np.moveaxis(x, axis, 0).reshape(count, -1) for x in (a, b))

    def whole(part: np.ndarray) -> np.ndarray:
        value = rows.copy()
        value[changed] = part
        return np.moveaxis(value.reshape(np.moveaxis(a, axis, 0).shape), 0, axis)

    listed = ", ".join(map(str, changed[:4])) + (", …" if len(changed) > 4 else "")
    name = f"{axis_name(axis, a.ndim, many=len(changed) > 1)} {listed}"
    evidence = {"axis": axis, "channels": changed[:32].tolist()}
    yield "channels-zero", f"{name} {'is' if len(changed) == 1 else 'are'} zero", whole(np.array(0.0)), evidence
    if rows.shape[1] > 1:  # a row of one element is any other one times something
        norms, products = (rows[changed] ** 2).sum(1), (rows[changed] * theirs[changed]).sum(1)
        factors = np.divide(products, norms, out=np.ones(len(changed)), where=norms > 0)
        spread = f"{factors.min():.6g} … {factors.max():.6g}" if np.ptp(factors) > 1e-6 else f"{factors[0]:.6g}"
        many = f"{len(changed)} of {count} {axis_name(axis, a.ndim, many=True)}"
        text = f"{name if len(changed) == 1 else many} × {spread}"
        figures = {**evidence, "factors": factors[:32].tolist()}
        yield "channels-scaled", text, whole(rows[changed] * factors[:, None]), figures


def axis_name(axis: int, dims: int, *, many: bool = False) -> str:
    """Name of a slice along an axis, or of ``many``. Convolutions count output channels first; a matrix may lie either
    way."""
    names = {1: ("element",), 2: ("row", "column")}.get(dims, ("channel", "input channel"))
    s = "s" if many else ""
    return f"{names[axis]}{s}" if axis < len(names) else f"slice{s} of axis {axis}"


def _orders(a: np.ndarray, b: np.ndarray, gates: int, reordered: bool) -> Iterator[Form]:
    if reordered and gates > 1 and a.ndim > 1 and a.shape[1] % (gates * (2 if a.ndim == 2 else 1)) == 0:
        for order in itertools.islice(itertools.permutations(range(gates)), 1, None):
            yield (
                "gates-permuted",
                f"the gates are in the order {list(order)}",
                regated(a, order),
                {"order": list(order)},
            )
    for axis in range(a.ndim):
        few = 1 < a.shape[axis] <= MOST_CHANNELS
        if few and (places := same_slices(np.moveaxis(a, axis, 0), np.moveaxis(b, axis, 0))) is not None:
            yield in_order(a, places, axis)
    yield from (way for way in interleaved_forms(a) if way[0] == "transposed") if reordered else ()


def in_order(a: np.ndarray, places: Sequence[int], axis: int) -> Form:
    """A tensor in its shape whose slices along an axis are those that it has at ``places``."""
    copied, (pairs, moved) = len(set(places)) < len(places), exchanges(places)
    what = "that hold those of others" if copied else "in another order"
    text = f"{axis_name(axis, a.ndim, many=True)} {what}: {pairs}"
    evidence = {"axis": axis, "moved": moved, "order": list(places[:64])}
    return "copied" if copied else "permuted", text, np.take(a, places, axis), evidence


def regated(a: np.ndarray, order: Sequence[int]) -> np.ndarray:
    """A weight [D, gates · H, …] or bias [D, 2 · gates · H] of a recurrent layer with its gates in another order."""
    blocks = a.reshape(len(a), 2 if a.ndim == 2 else 1, len(order), -1, *a.shape[2:])
    return blocks[:, :, list(order)].reshape(a.shape)


def exchanges(order: Sequence[int]) -> tuple[str, int]:
    """An order in words, as in ``0←2, 2←0``, and how many places it moves."""
    moved = [i for i, j in enumerate(order) if i != j]
    return ", ".join(f"{i}←{order[i]}" for i in moved[:6]) + (", …" if len(moved) > 6 else ""), len(moved)


def turned_forms(a: np.ndarray) -> Iterator[Form]:
    """A tensor in its shape with axes in another order, written or read so, or running backwards."""
    axes = [axis for axis, count in enumerate(a.shape) if count > 1]
    for moved in itertools.islice(itertools.permutations(axes), 1, None) if len(axes) <= MOST_AXES else ():
        order = [moved[axes.index(axis)] if axis in axes else axis for axis in range(a.ndim)]
        turned, text = a.transpose(order), f"axes in the order {order}"
        same = turned.shape == a.shape
        old = "" if same else ", read in the old shape"
        yield "transposed", text + old, turned.reshape(a.shape), {"axes": order}
        if not same:
            value = a.reshape([a.shape[axis] for axis in order]).transpose(np.argsort(order))
            yield "transposed", f"read with its axes in the order {order}", value, {"axes": order}
    for count in dict.fromkeys((1, 2, a.ndim - 2)):
        for chosen in itertools.combinations(axes, count) if count > 0 else ():
            text = f"axis {chosen[0]} runs backwards" if count == 1 else f"axes {list(chosen)} run backwards"
            if count > 1 and chosen == tuple(range(2, a.ndim)):
                text += " (of a kernel: convolution instead of correlation)"
            yield "flipped", text, np.flip(a, chosen), {"axis": chosen[0] if count == 1 else list(chosen)}


def stored_forms(a: np.ndarray) -> Iterator[Form]:
    """A tensor of float64 in fewer bits, in numbers: FP16, BF16, INT8, fewer bits, FP8, short mantissas."""
    for name, kind in (("fp16", np.float16), ("bf16", ml_dtypes.bfloat16)):
        with np.errstate(over="ignore"):
            rounded = a.astype(np.float32).astype(kind).astype(np.float64)
        if not np.array_equal(rounded, a):
            yield name, f"stored in {name.upper()}", rounded, {}
    if not np.isfinite(a).all():  # a mask's Inf has no scale
        return
    for says, kind, value, scales in int8_forms(a):
        yield kind, f"stored in INT8, {says}", value, {"scales": scales}
    for text, value in few_bit_forms(a) if a.ndim > 1 else ():
        yield "coarse", f"stored {text}", value, {}


def interleaved_forms(a: np.ndarray) -> Iterator[Form]:
    """A tensor with slices inside one another, in its shape: of a parts of b slices, b parts of a; halves exchanged;
    square blocks (gates of a recurrent layer, heads) each transposed."""
    for axis, count in enumerate(a.shape):
        before, behind = a.shape[:axis], a.shape[axis + 1 :]
        for parts in (p for p in PARTS if count % p == 0 and 1 < p < count):
            for m, n in dict.fromkeys(((parts, count // parts), (count // parts, parts))):
                value = a.reshape(*before, m, n, *behind).swapaxes(axis, axis + 1).reshape(a.shape)
                text = f"{axis_name(axis, a.ndim, many=True)} {m} × {n} are read as {n} × {m}"
                yield "permuted", text, value, {"axis": axis, "parts": [m, n]}
        if count > 3 and count % 2 == 0:
            text = f"both halves of the {axis_name(axis, a.ndim, many=True)} are exchanged"
            yield "permuted", text, np.roll(a, count // 2, axis), {"axis": axis, "by": count // 2}
    for axis, other in itertools.permutations(range(a.ndim), 2):
        count, size = a.shape[axis], a.shape[other]
        if size > 1 and count > size and count % size == 0 and count // size in PARTS:
            blocks = np.moveaxis(a, (axis, other), (-2, -1))
            moved = blocks.reshape(*blocks.shape[:-2], -1, size, size).swapaxes(-1, -2).reshape(blocks.shape)
            text = f"{count // size} blocks of {size} × {size} are transposed"
            value = np.moveaxis(moved, (-2, -1), (axis, other))
            yield "transposed", text, value, {"axis": axis, "blocks": count // size}


def shifted_in(a: np.ndarray, b: np.ndarray, steps: Mapping[int, int]) -> np.ndarray:
    """``a`` moved by some slices along axes (axis → step); what comes in at their ends, another part of a larger
    tensor, is taken from ``b`` of the same shape and dtype."""
    value = np.roll(a, tuple(steps.values()), tuple(steps))
    for axis, step in steps.items():
        end = [slice(None)] * a.ndim
        end[axis] = slice(0, step) if step >= 0 else slice(step, None)
        value[tuple(end)] = b[tuple(end)]
    return value


def same_slices(rows: np.ndarray, wanted: np.ndarray) -> list[int] | None:
    """The order in which ``rows`` [slices, …] hold what ``wanted`` does, to the last bit; None if there is none.

    A slice of more than one element may also be the copy of another one, whose place is then there twice.
    """
    places: dict[bytes, dict[int, None]] = {}
    for index, row in enumerate(np.ascontiguousarray(rows)):
        places.setdefault(row.tobytes(), {})[index] = None
    left = {row: dict(indices) for row, indices in places.items()}
    order = []
    for index, row in enumerate(np.ascontiguousarray(wanted)):
        key = row.tobytes()
        if key not in places or (not left[key] and row.size < 2):
            return None
        candidates = left[key] or places[key]
        order.append(index if index in candidates else next(iter(candidates)))
        left[key].pop(order[-1], None)
    return order


def _pruned(a: np.ndarray, b: np.ndarray) -> Iterator[Form]:
    """The small ones are zero."""
    if a.ndim < 2 or not np.isfinite(a).all():
        return
    gone = (b == 0) & (a != 0)
    if gone.any() and not gone.all():
        threshold, share = float(np.abs(a[gone]).max()), float((b == 0).mean())
        if threshold:
            yield "pruned", f"the smallest {share:.3g} are zero", np.where(np.abs(a) <= threshold, 0.0, a), {}


def _cut_off(a: np.ndarray, b: np.ndarray, different: np.ndarray) -> bool:
    """Whether the elements that differ, two or more, are the largest or the smallest of ``b``, all alike, and were
    beyond them."""
    if different.sum() < 2 or not (np.isfinite(a).all() and np.isfinite(b).all()):
        return False
    low, high = float(b.min()), float(b.max())
    ends = (a > high) & (b == high) | (a < low) & (b == low)
    return bool(ends[different].all())


def few_bit_forms(a: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """A tensor in fewer bits than INT8 and BF16 have, or in FP8: (in words, values), of float64 and any shape.

    Integers of 2 to 7 bits, mantissas of 2 to 9 bits to the nearest, those of FP16 and BF16 also cut off.
    """
    for bits in (4, 6, 5, 3, 2, 7):
        for text, _, values, _ in int8_forms(a, bits):
            yield f"in {bits} bits, {text}", values
    for name, kind in (("E4M3", ml_dtypes.float8_e4m3fn), ("E5M2", ml_dtypes.float8_e5m2)):
        largest = float(ml_dtypes.finfo(kind).max)
        for text, scale in (("no scale", 1.0), ("one scale for all", float(np.abs(a).max() or 1.0) / largest)):
            values = np.clip(a / scale, -largest, largest).astype(kind).astype(np.float64) * scale
            yield f"in FP8 {name}, {text}", values
    mantissa, exponent = np.frexp(a)
    rest = ", the others truncated"
    for bits, told in (*((bits, "") for bits in (2, 3, 4, 5, 6, 8, 9)), (7, rest), (10, rest)):
        whole = (np.trunc if told else np.round)(mantissa * 2 ** (bits + 1))
        yield f"with {bits} bits of mantissa{told}", np.ldexp(whole / 2 ** (bits + 1), exponent)


def int8_forms(a: np.ndarray, bits: int = 8) -> Iterator[tuple[str, str, np.ndarray, int]]:
    """A tensor rounded to INT8 in the usual ways: (in words, kind, values, number of scales).

    Values are numbers, not levels: ``scale · (level − zero point)``, in the shape and dtype of ``a``. Levels reach from
    −127 to 127, −128 to 127 or 0 to 255, with other ``bits`` accordingly.
    """
    most = 2 ** (bits - 1) - 1

    def rounded(span: np.ndarray, steps: float, bottom: int, top: int, low: Any = 0.0) -> np.ndarray:
        step = np.maximum(span, 1e-30) / steps
        zero = np.round(-low / step)
        return (np.clip(np.round(a / step) + zero, bottom, top) - zero) * step

    def asymmetric(rest: Any) -> np.ndarray:
        low, high = np.minimum(a.min(rest, keepdims=True), 0), np.maximum(a.max(rest, keepdims=True), 0)
        return rounded(high - low, 2 * most + 1, 0, 2 * most + 1, low)

    def largest(rest: Any) -> np.ndarray:
        return np.abs(a).max(rest, keepdims=True)

    forms: list[tuple[str, Callable[[Any], np.ndarray]]] = [
        ("symmetric", lambda rest: rounded(largest(rest), most, -most, most)),
        ("symmetric over the full range", lambda rest: rounded(largest(rest), most + 0.5, -most - 1, most)),
        ("asymmetric", asymmetric),
    ]
    everything = tuple(range(a.ndim))
    for name, form in forms:
        yield f"one scale for all, {name}", "int8-per-tensor", form(everything), 1
    for axis in range(min(a.ndim, 2)) if a.ndim > 1 else ():
        axes = tuple(d for d in everything if d != axis)
        for name, form in forms:
            text = f"a scale for each slice of axis {axis}, {name}"
            yield text, "int8-per-channel", form(axes), a.shape[axis]
