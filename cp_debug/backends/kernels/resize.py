"""Resize, Upsample and GridSample."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from cp_debug.backends.kernels.registry import Call, kernel

HALF = ("half_pixel", "pytorch_half_pixel")
"""Transforms whose places ONNX Runtime 1.31 computes exactly enough for ties, where sizes are given."""
_FEW_BITS = 4096
"""Places that are multiples of 1 ÷ this, and less than this, are exact in FP32 with bits to spare."""


@kernel("Resize", exact=True)
def resize(
    call: Call,
    x: Tensor,
    roi: Tensor | None = None,
    scales: Tensor | None = None,
    sizes: Tensor | None = None,
    shift: float = 0.0,
) -> Tensor:
    """``shift`` moves every place on a source axis that is not exact, nor exactly in the middle of two, by so many
    pixels: to see what its rounding may change."""
    if call.opset < 11:  # Resize-10: (x, scales)
        factors = dict(enumerate(_floats(roi)))
        return _resample(x, factors, None, call["mode"], "asymmetric", "floor", -0.75, False, shift=shift)
    transform, policy = call["coordinate_transformation_mode"], call["keep_aspect_ratio_policy"] or "stretch"
    if call["antialias"] or transform == "tf_crop_and_resize" or policy != "stretch":
        return NotImplemented
    axes = [a % x.dim() for a in call["axes"] or range(x.dim())]
    target = None
    if sizes is not None and sizes.numel():
        target = dict(zip(axes, (int(n) for n in sizes.tolist()), strict=True))
        factors = {a: n / x.shape[a] for a, n in target.items()}
    else:
        factors = dict(zip(axes, _floats(scales), strict=True))
    exclude = bool(call["exclude_outside"])
    how = transform, call["nearest_mode"], call["cubic_coeff_a"], exclude
    return _resample(x, factors, target, call["mode"], *how, literal=call.literal, shift=shift)


@kernel("Upsample", exact=True)
def upsample(call: Call, x: Tensor, scales: Tensor | None = None, shift: float = 0.0) -> Tensor:
    """``shift``: as of ``resize``."""
    factors = _floats(scales) if scales is not None else call["scales"]
    return _resample(x, dict(enumerate(factors)), None, call["mode"], "asymmetric", "floor", -0.75, False, shift=shift)


@kernel("GridSample")
def grid_sample(call: Call, x: Tensor, grid: Tensor) -> Tensor:
    mode = {"linear": "bilinear", "cubic": "bicubic"}.get(call["mode"], call["mode"])
    if x.dim() > 4 and mode == "bicubic":
        return NotImplemented
    return functional.grid_sample(x, grid, mode, call["padding_mode"], bool(call["align_corners"]))


def _floats(scales: Tensor | None) -> list[float]:
    return [] if scales is None else scales.tolist()


def _resample(
    x: Tensor,
    factors: dict[int, float],
    target: dict[int, int] | None,
    mode: str,
    transform: str,
    nearest: str,
    cubic: float,
    exclude: bool,
    *,
    literal: bool = False,
    shift: float = 0.0,
) -> Tensor:
    """Resample axis by axis: every result element is a weighted sum of one, two or four source elements."""
    for axis, factor in factors.items():
        size = x.shape[axis]
        # In FP32, as runtimes multiply: 300 × 1.1 is 330.
        length = target[axis] if target is not None else int(np.floor(np.float32(size) * np.float32(factor)))
        if factor == 1 and length == size:
            continue
        at = _coordinates(length, size, factor, transform, nearest=mode == "nearest", literal=literal)
        ties, rounds = np.zeros(length, bool), mode == "nearest" and nearest.startswith("round")
        if rounds and transform in HALF and target is not None and not literal:
            # From sizes alone a place in the middle of two is known exactly, and the declared mode decides.
            twice = ((2 * np.arange(length) + 1) * size - length) / length
            at, ties = twice / 2, twice % 2 == 1
        if shift and not _is_exact(length, size, factor, transform):
            at = np.where(ties, at, at + shift)
        taps: list[tuple[np.ndarray, np.ndarray | None]]
        if mode == "nearest":
            taps = [(_nearest(at, nearest), None)]
        else:
            base = np.floor(at)
            share = at - base
            weights = [1 - share, share] if mode in ("linear", "bilinear") else _cubic(share, cubic)
            first = 0 if len(weights) == 2 else -1
            index = [base + first + i for i in range(len(weights))]
            if exclude:
                inside = [np.where((i >= 0) & (i < size), w, 0) for i, w in zip(index, weights, strict=True)]
                weights = [w / sum(inside) for w in inside]
            taps = list(zip(index, weights, strict=True))
        x = _gather(x, axis, taps)
    return x


def _gather(x: Tensor, axis: int, taps: list[tuple[np.ndarray, np.ndarray | None]]) -> Tensor:
    total: Tensor | None = None
    levels = not x.is_floating_point() and taps[0][1] is not None
    dtype, x = x.dtype, x.double() if levels else x
    for index, weight in taps:
        places = torch.from_numpy(np.clip(index, 0, x.shape[axis] - 1).astype(np.int64)).to(x.device)
        part = x.index_select(axis, places)
        if weight is not None:
            part = part * torch.from_numpy(weight).to(part).reshape(-1, *(1,) * (x.dim() - 1 - axis))
        total = part if total is None else total + part
    assert total is not None
    return total.to(dtype) if levels else total  # cut off, as ONNX Runtime converts


def _coordinates(length: int, size: int, factor: float, transform: str, *, nearest: bool, literal: bool) -> np.ndarray:
    """Places of ``length`` results on the source axis (ONNX Resize, coordinate_transformation_mode).

    Aligned corners refer to the length of the result in ONNX Runtime and torch, to scale × size, which need not be
    whole, in ONNX's reference implementation (``literal``).
    """
    # Where the nearest neighbour is chosen, the rounding of the place decides: in FP32, as ONNX Runtime computes it.
    real: type[np.floating] = np.float32 if nearest and not literal else np.float64
    i, factor_, half = np.arange(length, dtype=real), real(factor), real(0.5)
    if transform == "align_corners":
        whole = factor * size if literal else length
        return i * real(size - 1) / real(whole - 1) if length > 1 else i
    if transform == "asymmetric":
        return i / factor_
    if transform == "pytorch_half_pixel" and length == 1:
        return np.zeros(1)
    if transform == "half_pixel_symmetric":
        middle = real(size / 2)
        return middle * (1 - real(length) / (factor_ * real(size))) + (i + half) / factor_ - half
    return (i + half) / factor_ - half


def _is_exact(length: int, size: int, factor: float, transform: str) -> bool:
    """Whether the places of the results need so few bits that FP32 holds them, whatever formula is used."""
    step = (size - 1) / max(length - 1, 1) if transform == "align_corners" else 1 / factor
    return (step * _FEW_BITS).is_integer() and max(length, size) < _FEW_BITS


def _nearest(at: np.ndarray, mode: str) -> np.ndarray:
    if mode == "round_prefer_floor":
        return np.ceil(at - 0.5)
    return {"floor": np.floor(at), "ceil": np.ceil(at), "round_prefer_ceil": np.floor(at + 0.5)}[mode]


def _cubic(t: np.ndarray, a: float) -> list[np.ndarray]:
    """Weights of the four neighbours in Keys' cubic convolution, ``t`` behind the second of them."""

    def near(d: np.ndarray) -> np.ndarray:
        return ((a + 2) * d - (a + 3)) * d * d + 1

    def far(d: np.ndarray) -> np.ndarray:
        return ((a * d - 5 * a) * d + 8 * a) * d - 4 * a

    return [far(t + 1), near(t), near(1 - t), far(2 - t)]
