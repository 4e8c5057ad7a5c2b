"""Resize, Upsample and GridSample."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from cp_debug.backends.kernels.registry import Call, kernel


@kernel("Resize", exact=True)
def resize(
    call: Call, x: Tensor, roi: Tensor | None = None, scales: Tensor | None = None, sizes: Tensor | None = None
) -> Tensor:
    if call.opset < 11:  # Resize-10: (x, scales)
        return _resample(x, dict(enumerate(_floats(roi))), None, call["mode"], "asymmetric", "floor", -0.75, False)
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
    return _resample(x, factors, target, call["mode"], transform, call["nearest_mode"], call["cubic_coeff_a"], exclude)


@kernel("Upsample", exact=True)
def upsample(call: Call, x: Tensor, scales: Tensor | None = None) -> Tensor:
    factors = _floats(scales) if scales is not None else call["scales"]
    return _resample(x, dict(enumerate(factors)), None, call["mode"], "asymmetric", "floor", -0.75, False)


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
) -> Tensor:
    """Resample axis by axis: every result element is a weighted sum of one, two or four source elements."""
    for axis, factor in factors.items():
        size = x.shape[axis]
        length = target[axis] if target is not None else int(np.floor(size * factor))
        if factor == 1 and length == size:
            continue
        at = _coordinates(length, size, factor, transform)
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
    for index, weight in taps:
        places = torch.from_numpy(np.clip(index, 0, x.shape[axis] - 1).astype(np.int64)).to(x.device)
        part = x.index_select(axis, places)
        if weight is not None:
            part = part * torch.from_numpy(weight).to(part).reshape(-1, *(1,) * (x.dim() - 1 - axis))
        total = part if total is None else total + part
    assert total is not None
    return total


def _coordinates(length: int, size: int, factor: float, transform: str) -> np.ndarray:
    """Places of ``length`` results on the source axis (ONNX Resize, coordinate_transformation_mode)."""
    i = np.arange(length, dtype=np.float64)
    if transform == "align_corners":
        return i * (size - 1) / (factor * size - 1) if length > 1 else i
    if transform == "asymmetric":
        return i / factor
    if transform == "pytorch_half_pixel" and length == 1:
        return np.zeros(1)
    if transform == "half_pixel_symmetric":
        middle = size / 2
        return middle - length / factor / 2 + (i + 0.5) / factor - 0.5
    return (i + 0.5) / factor - 0.5


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
