"""FP64 convolution on the CPU, a few rows at a time.

torch unfolds the whole input into one matrix, kernel-size times larger than the input (450 MiB for 384 channels of
128 × 128): filling new pages takes as long as multiplying. In blocks that stay in the cache, with one buffer for all of
them, the same products take half the time, and no memory to speak of.
"""

from __future__ import annotations

import math

from torch import Tensor
from torch.nn import functional

from cp_debug.backends.kernels.windows import Window

BLOCK = 1 << 23
"""Size of the buffer in bytes: about what the second and third cache levels of one core hold."""


def conv(x: Tensor, weight: Tensor, bias: Tensor | None, window: Window) -> Tensor:
    """Convolve x (N, C, *spatial) with weight (M, C, *kernel), one group."""
    size = window.output_size(x.shape[2:])
    matrix = weight.reshape(len(weight), -1)
    terms, row = matrix.shape[1], math.prod(size[1:])
    rows = min(max(BLOCK // (terms * row * x.element_size()), 1), size[0])
    buffer = x.new_empty(terms * rows * row)
    result = x.new_empty(len(x), len(weight), size[0], row)
    for sample, target in zip(x, result, strict=True):
        for start in range(0, size[0], rows):
            taps = _taps(sample, window, (min(rows, size[0] - start), *size[1:]), start)
            columns = buffer[: taps.numel()].view(taps.shape)
            columns.copy_(taps)
            product = matrix @ columns.view(terms, -1)
            if bias is not None:
                product += bias[:, None]
            target[:, start : start + rows] = product.view(len(weight), -1, row)
    return result.view(len(x), len(weight), *size)


def _taps(x: Tensor, window: Window, size: tuple[int, ...], start: int) -> Tensor:
    """Elements of x that each tap reads, (C, *kernel, *size), for results of ``size`` from row ``start`` on."""
    length = (size[0] - 1) * window.stride[0] + (window.kernel[0] - 1) * window.dilation[0] + 1
    first = start * window.stride[0] - window.begin[0]
    low = min(max(first, 0), x.shape[1])
    high = max(min(first + length, x.shape[1]), low)
    before = min(max(-first, 0), length)
    pads = [*window.torch_pads()[:-2], before, length - before - (high - low)]
    part = functional.pad(x[:, low:high], pads).contiguous()
    channel, *steps = part.stride()
    strides = [n * step for factors in (window.dilation, window.stride) for n, step in zip(steps, factors, strict=True)]
    return part.as_strided((len(part), *window.kernel, *size), (channel, *strides))
