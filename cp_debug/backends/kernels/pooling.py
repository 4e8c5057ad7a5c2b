"""Pools."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from cp_debug.backends.kernels.registry import Call, kernel
from cp_debug.backends.kernels.windows import Window

_MAX = {1: functional.max_pool1d, 2: functional.max_pool2d, 3: functional.max_pool3d}


@kernel("MaxPool", rounds=False)
def max_pool(call: Call, x: Tensor) -> Tensor | list[Tensor]:
    if not x.is_floating_point() or (call.outputs > 1 and call["storage_order"]):
        return NotImplemented
    window = Window.of(call, call["kernel_shape"], x.shape[2:])
    pads = window.torch_pads(_overhang(call, window, x.shape[2:]))
    padded = functional.pad(x, pads, value=float("-inf"))
    how = window.kernel, window.stride, 0, window.dilation
    if call.outputs == 1:
        return _MAX[x.dim() - 2](padded, *how)
    values, left = _MAX[x.dim() - 2](padded, *how, return_indices=True)
    # Torch counts in the padded plane; ONNX in the whole tensor, without the padding.
    size = math.prod(x.shape[2:])
    planes = torch.arange(x.shape[0] * x.shape[1], device=x.device) * size
    places, step = planes.reshape(*x.shape[:2], *[1] * (x.dim() - 2)), 1
    for axis in range(x.dim() - 1, 1, -1):
        places = places + (left % padded.shape[axis] - pads[2 * (x.dim() - 1 - axis)]) * step
        left, step = left // padded.shape[axis], step * x.shape[axis]
    return [values, places]


@kernel("AveragePool")
def average_pool(call: Call, x: Tensor) -> Tensor:
    window = Window.of(call, call["kernel_shape"], x.shape[2:])
    overhang = _overhang(call, window, x.shape[2:])
    sums = _sum_pool(functional.pad(x, window.torch_pads(overhang)), window)
    # Each window's divisor: the elements it covers, the declared padding counted or not, the overhang never.
    covered = functional.pad(x.new_ones(1, 1, *x.shape[2:]), window.torch_pads(), value=call["count_include_pad"] or 0)
    beyond = [p for extra in reversed(overhang) for p in (0, extra)]
    return sums / _sum_pool(functional.pad(covered, beyond), window)


@kernel("LpPool")
def lp_pool(call: Call, x: Tensor) -> Tensor:
    window = Window.of(call, call["kernel_shape"], x.shape[2:])
    overhang = _overhang(call, window, x.shape[2:]) if call["ceil_mode"] else None
    return _sum_pool(functional.pad(x.abs() ** call["p"], window.torch_pads(overhang)), window) ** (1 / call["p"])


@kernel("GlobalAveragePool")
def global_average_pool(call: Call, x: Tensor) -> Tensor:
    return x.mean(list(range(2, x.dim())), keepdim=True)


@kernel("GlobalMaxPool", rounds=False)
def global_max_pool(call: Call, x: Tensor) -> Tensor:
    return x.amax(list(range(2, x.dim())), keepdim=True)


@kernel("GlobalLpPool")
def global_lp_pool(call: Call, x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, call["p"], dim=list(range(2, x.dim())), keepdim=True)


def _overhang(call: Call, window: Window, size: Sequence[int]) -> list[int]:
    """Elements by which ceil_mode lets the last window of each axis reach beyond the padded input."""
    axes = zip(
        window.output_size(size, ceil=bool(call["ceil_mode"])), size, window.kernel, window.stride, window.dilation,
        window.begin, window.end, strict=True,
    )  # fmt: skip
    return [max(0, (out - 1) * s + (k - 1) * d + 1 - (n + b + e)) for out, n, k, s, d, b, e in axes]


def _sum_pool(x: Tensor, window: Window) -> Tensor:
    if max(window.dilation) > 1:
        for axis, (size, step, apart) in enumerate(zip(window.kernel, window.stride, window.dilation, strict=True), 2):
            x = x.unfold(axis, (size - 1) * apart + 1, step)[..., ::apart].sum(-1)
        return x
    if len(window.kernel) == 1:
        return functional.avg_pool2d(x[..., None], (*window.kernel, 1), (*window.stride, 1), divisor_override=1)[..., 0]
    pool = torch.nn.functional.avg_pool2d if len(window.kernel) == 2 else torch.nn.functional.avg_pool3d
    return pool(x, window.kernel, window.stride, divisor_override=1)
