"""Sliding windows, which Conv, ConvTranspose and the pools share; and the pools."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from cp_debug.backends.kernels.registry import Call, kernel


@dataclass(frozen=True)
class Window:
    """Kernel, stride, dilation and padding of each spatial axis."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    begin: tuple[int, ...]
    end: tuple[int, ...]

    @classmethod
    def of(cls, call: Call, kernel: Sequence[int], size: Sequence[int]) -> Window:
        """Read the attributes for an input of spatial ``size``; resolves auto_pad."""
        rank = len(kernel)
        stride = tuple(call["strides"] or (1,) * rank)
        dilation = tuple(call["dilations"] or (1,) * rank)
        pads = tuple(call["pads"] or (0,) * 2 * rank)
        if call["auto_pad"] in ("SAME_UPPER", "SAME_LOWER"):
            spans = [(k - 1) * d + 1 for k, d in zip(kernel, dilation, strict=True)]
            totals = [max((-(-n // s) - 1) * s + span - n, 0) for n, s, span in zip(size, stride, spans, strict=True)]
            pads = split_padding(totals, extra_at_end=call["auto_pad"] == "SAME_UPPER")
        return cls(tuple(kernel), stride, dilation, pads[:rank], pads[rank:])

    @property
    def symmetric(self) -> bool:
        """Whether the padding is the same at both ends of every axis."""
        return self.begin == self.end

    def torch_pads(self, extra_end: Sequence[int] | None = None) -> list[int]:
        """The padding in the order of ``torch.nn.functional.pad``: last axis first."""
        ends = self.end if extra_end is None else [e + x for e, x in zip(self.end, extra_end, strict=True)]
        return [p for pair in zip(reversed(self.begin), reversed(ends), strict=True) for p in pair]

    def output_size(self, size: Sequence[int], *, ceil: bool = False) -> tuple[int, ...]:
        """Spatial size of the result. With ``ceil`` a last window may start inside the padded input and end outside."""
        out = []
        for n, k, s, d, b, e in zip(size, self.kernel, self.stride, self.dilation, self.begin, self.end, strict=True):
            free = n + b + e - (k - 1) * d - 1
            count = free // s + 1
            if ceil and free % s and count * s < n + b:  # a window that would start in the end padding is left out
                count += 1
            out.append(count)
        return tuple(out)


def split_padding(totals: Sequence[int], *, extra_at_end: bool) -> tuple[int, ...]:
    """Share each axis' total padding between its ends, the odd one at the end or at the beginning."""
    small, large = [t // 2 for t in totals], [t - t // 2 for t in totals]
    return (*small, *large) if extra_at_end else (*large, *small)


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
