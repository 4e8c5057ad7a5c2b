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

BLOCK = 1 << 22
"""Bytes of the buffer: about what the second and third cache levels of one core hold."""


def conv(x: Tensor, weight: Tensor, bias: Tensor | None, window: Window) -> Tensor:
    """Convolve x (N, C, *spatial) with weight (M, C, *kernel), one group."""
    x = functional.pad(x, window.torch_pads()).contiguous()
    rank = len(window.kernel)
    size = [
        (n - (k - 1) * d - 1) // s + 1
        for n, k, s, d in zip(x.shape[2:], window.kernel, window.stride, window.dilation, strict=True)
    ]
    steps = x.stride()[2:]
    # (N, C, *kernel, *output): which element of x each tap of each output element reads.
    taps = x.as_strided(
        (*x.shape[:2], *window.kernel, *size),
        (
            *x.stride()[:2],
            *(n * d for n, d in zip(steps, window.dilation, strict=True)),
            *(n * s for n, s in zip(steps, window.stride, strict=True)),
        ),
    )
    matrix = weight.reshape(len(weight), -1)
    terms, row = matrix.shape[1], math.prod(size[1:])
    rows = min(max(BLOCK // (terms * row * x.element_size()), 1), size[0])
    buffer = x.new_empty(terms * rows * row)
    result = x.new_empty(len(x), len(weight), size[0], row)
    for sample, target in zip(taps, result, strict=True):
        for start in range(0, size[0], rows):
            part = sample.narrow(1 + rank, start, min(rows, size[0] - start))
            columns = buffer[: part.numel()].view(part.shape)
            columns.copy_(part)
            product = matrix @ columns.view(terms, -1)
            if bias is not None:
                product += bias[:, None]
            target[:, start : start + rows] = product.view(len(weight), -1, row)
    return result.view(len(x), len(weight), *size)
