"""Products of scaled operands whose sums are narrower than FP32: matrix products, convolutions as such.

A convolution is summed tap by tap, row by row, the channels of a tap side by side, as a kernel for channels-last data
does it. A transposed convolution is one of its data with zeros between: no order of real kernels is known for it.
"""

from __future__ import annotations

import functools
import itertools
import math
import operator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from cp_debug.backends.kernels.windows import Window
from cp_debug.backends.running_sums import RunningSum
from cp_debug.backends.scaling import COLUMNS, DATA, KERNEL, ROWS, TRANSPOSED_KERNEL, Axes, Encoded, Scaling

_ELEMENTS = 1 << 23
"""Elements of unfolded data at a time."""


class Narrow(NamedTuple):
    """Encoding of a product's operands, and the sum in which their products are added."""

    scaling: Scaling
    running_sum: RunningSum


def matmul(a: Tensor, b: Tensor, narrow: Narrow) -> Tensor:
    """``numpy.matmul`` of a [..., M, K] and b [..., K, N], float32."""
    left, right = a[None] if a.dim() == 1 else a, b[:, None] if b.dim() == 1 else b
    if right.dim() == 2:
        rows = narrow.scaling.encode(left, ROWS, 0).mapped(lambda p: p.reshape(-1, p.shape[-1]))
        result = _product(rows, narrow.scaling.encode(right, COLUMNS, 1), narrow)
        result = result.reshape(*left.shape[:-1], right.shape[-1])
    else:
        batch = np.broadcast_shapes(left.shape[:-2], right.shape[:-2])

        def stacked(part: Tensor) -> Tensor:
            return part.expand(*batch, *part.shape[-2:]).reshape(-1, *part.shape[-2:])

        one = narrow.scaling.encode(left, ROWS, 0).mapped(stacked)
        other = narrow.scaling.encode(right, COLUMNS, 1).mapped(stacked)
        result = a.new_empty(math.prod(batch), left.shape[-2], right.shape[-1])
        for i in range(len(result)):
            at_i = operator.itemgetter(i)
            result[i] = _product(one.mapped(at_i), other.mapped(at_i), narrow)
        result = result.reshape(*batch, *result.shape[1:])
    result = result.squeeze(-2) if a.dim() == 1 else result
    return result.squeeze(-1) if b.dim() == 1 else result


def _product(a: Encoded, b: Encoded, narrow: Narrow) -> Tensor:
    """[M, N] of [M, K] and [K, N]."""
    coarse = _first(a.coarse, 1) * _first(b.coarse, 0)
    if narrow.scaling.segment is None:
        return narrow.running_sum.matmul(a.multiplied, b.multiplied) * coarse
    if a.fine is None or b.fine is None:  # an operand without elements
        return a.codes @ b.codes
    total = a.codes.new_zeros(a.codes.shape[0], b.codes.shape[1])
    for begin in range(0, a.codes.shape[1], narrow.scaling.segment):
        part = slice(begin, begin + narrow.scaling.segment)
        scales = a.fine[:, begin, None] * b.fine[begin]
        total = total + narrow.running_sum.matmul(a.codes[:, part], b.codes[part]) * scales
    return total * coarse


def _first(coarse: Tensor, axis: int) -> Tensor:
    """Scales of rows or columns: they are the same all along the other axis."""
    return coarse if coarse.dim() == 0 or coarse.shape[axis] == 1 else coarse.narrow(axis, 0, 1)


def conv(x: Tensor, weight: Tensor, bias: Tensor | None, window: Window, groups: int, narrow: Narrow) -> Tensor:
    """ONNX Conv of x (N, C, *spatial) and weight (M, C ÷ groups, *kernel), float32; the bias is added in FP32."""
    data = _grouped_data(x, groups, narrow.scaling)
    kernel = narrow.scaling.encode(weight, KERNEL, 1)
    return _convolved(data, kernel, x, weight, bias, window, groups, narrow)


def conv_transpose(
    x: Tensor, weight: Tensor, bias: Tensor | None, window: Window, size: tuple[int, ...], groups: int, narrow: Narrow
) -> Tensor:
    """ONNX ConvTranspose of x (N, C, *spatial) and weight (C, M ÷ groups, *kernel) to spatial ``size``, float32."""
    data, kernel = _grouped_data(x, groups, narrow.scaling), narrow.scaling.encode(weight, TRANSPOSED_KERNEL, 1)
    spatial = range(2, x.dim())

    def spread(part: Tensor, fill: float) -> Tensor:
        sizes = [(n - 1) * s + 1 for n, s in zip(x.shape[2:], window.stride, strict=True)]
        result = part.new_full((*x.shape[:2], *sizes), fill)
        places = tuple(slice(None, None, s) for s in window.stride)
        result[(slice(None), slice(None), *places)] = part
        return result

    spans = [(k - 1) * d for k, d in zip(window.kernel, window.dilation, strict=True)]
    begin = tuple(s - b for s, b in zip(spans, window.begin, strict=True))
    wide = [(n - 1) * s + 1 for n, s in zip(x.shape[2:], window.stride, strict=True)]
    end = tuple(n + s - w - b for n, s, w, b in zip(size, spans, wide, begin, strict=True))
    plain = Window(window.kernel, (1,) * len(spans), window.dilation, begin, end)
    stretched = data.mapped(lambda p: spread(p, 0.0), scales=lambda p: spread(p, 1.0))
    mirrored = kernel.mapped(lambda p: p.flip(*spatial).unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1))
    return _convolved(stretched, mirrored, stretched.codes, mirrored.codes, bias, plain, groups, narrow)


def decoded(x: Tensor, weight: Tensor, axes: Axes, groups: int, scaling: Scaling) -> tuple[Tensor, Tensor]:
    """Data [N, C, …] and kernel of a convolution with what the encoding leaves of them; shapes and dtypes stay.

    ``axes``: those of the kernel, of a convolution or a transposed one.
    """
    return _grouped_data(x, groups, scaling).values.to(x.dtype), scaling.encode(weight, axes, 1).values.to(weight.dtype)


def _grouped_data(x: Tensor, groups: int, scaling: Scaling) -> Encoded:
    """Data of a convolution, encoded so that no block reaches from one group into the next."""
    return scaling.encode(x.unflatten(1, (groups, -1)), Axes(2, DATA.kept), 0).mapped(lambda p: p.flatten(1, 2))


def _convolved(
    data: Encoded,
    kernel: Encoded,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    window: Window,
    groups: int,
    narrow: Narrow,
) -> Tensor:
    size = window.output_size(x.shape[2:])
    channels, outputs = x.shape[1] // groups, weight.shape[0] // groups
    terms = channels * math.prod(window.kernel)
    matrices = kernel.mapped(lambda p: p.movedim(1, -1).reshape(groups, outputs, terms).mT)
    result = x.new_empty(x.shape[0], weight.shape[0], *size)
    rows = max(1, _ELEMENTS // max(1, terms * math.prod(size[1:])))
    for n, group in itertools.product(range(x.shape[0]), range(groups)):
        part = slice(group * channels, (group + 1) * channels)
        b = matrices.mapped(operator.itemgetter(group))
        padded = data.mapped(
            functools.partial(_padded, n=n, channels=part, window=window, fill=0.0),
            scales=functools.partial(_padded, n=n, channels=part, window=window, fill=1.0),
        )
        for first in range(0, size[0], rows):
            extent = (min(rows, size[0] - first), *size[1:])
            a = padded.mapped(functools.partial(_columns, extent=extent, window=window, first=first))
            product = _by_taps(a, b, narrow, channels)
            target = result[n, group * outputs : (group + 1) * outputs, first : first + extent[0]]
            target.copy_(product.t().unflatten(1, extent))
    return result if bias is None else result + bias.reshape(-1, *(1,) * len(size))


def _by_taps(a: Encoded, b: Encoded, narrow: Narrow, channels: int) -> Tensor:
    """Product whose blocks with FP32 scales end where a tap ends."""
    if narrow.scaling.segment is None or channels % narrow.scaling.segment == 0:
        return _product(a, b, narrow)

    def product(begin: int) -> Tensor:
        part = slice(begin, begin + channels)
        return _product(a.mapped(lambda p: p[:, part]), b.mapped(lambda p: p[part]), narrow)

    parts = map(product, range(0, a.codes.shape[1], channels))
    total = next(parts)
    for part in parts:
        total = total + part
    return total


def _padded(part: Tensor, n: int, channels: slice, window: Window, fill: float) -> Tensor:
    return functional.pad(part[n, channels], window.torch_pads(), value=fill)


def _columns(x: Tensor, extent: tuple[int, ...], window: Window, first: int) -> Tensor:
    """Rows of unfolded data, [positions, taps · C], for results of ``extent`` from row ``first`` on."""
    taps = []
    for tap in itertools.product(*map(range, window.kernel)):
        starts = [t * d for t, d in zip(tap, window.dilation, strict=True)]
        starts[0] += first * window.stride[0]
        places = tuple(slice(b, b + (n - 1) * s + 1, s) for b, n, s in zip(starts, extent, window.stride, strict=True))
        taps.append(x[(slice(None), *places)].flatten(1))
    return torch.cat(taps).t()
