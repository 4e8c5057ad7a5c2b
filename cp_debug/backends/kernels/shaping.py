"""Operators that move values without computing: reshape, concatenate, slice, pad."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from cp_debug.backends.kernels.registry import Call, kernel


@kernel("Reshape", rounds=False)
def reshape(call: Call, x: Tensor, shape: Tensor | None = None) -> Tensor:
    sizes = call.ints("shape", shape) or []
    if not call["allowzero"]:
        sizes = [x.shape[i] if n == 0 else n for i, n in enumerate(sizes)]
    if -1 in sizes and not x.numel():  # torch will not infer a size next to a zero
        known = math.prod(n for n in sizes if n != -1)
        sizes = [0 if n == -1 and not known else n for n in sizes]
    return x.reshape(sizes)


@kernel("Flatten", rounds=False)
def flatten(call: Call, x: Tensor) -> Tensor:
    axis = call["axis"] + (x.dim() if call["axis"] < 0 else 0)
    return x.reshape(math.prod(x.shape[:axis]), math.prod(x.shape[axis:]))


@kernel("Transpose", rounds=False)
def transpose(call: Call, x: Tensor) -> Tensor:
    return x.permute(call["perm"] or list(reversed(range(x.dim()))))


@kernel("Squeeze", rounds=False)
def squeeze(call: Call, x: Tensor, axes: Tensor | None = None) -> Tensor:
    dims = call.ints("axes", axes)
    return x.squeeze() if dims is None else x.squeeze(dims)


@kernel("Unsqueeze", rounds=False)
def unsqueeze(call: Call, x: Tensor, axes: Tensor | None = None) -> Tensor:
    dims = call.ints("axes", axes) or []
    for dim in sorted(d % (x.dim() + len(dims)) for d in dims):
        x = x.unsqueeze(dim)
    return x


@kernel("Expand", rounds=False)
def expand(call: Call, x: Tensor, shape: Tensor) -> Tensor:
    return x.expand(torch.broadcast_shapes(x.shape, shape.tolist()))


@kernel("Tile", rounds=False)
def tile(call: Call, x: Tensor, repeats: Tensor) -> Tensor:
    return x.repeat(repeats.tolist())


@kernel("Concat", rounds=False)
def concat(call: Call, *values: Tensor) -> Tensor:
    return torch.cat(values, call["axis"])


@kernel("Split", rounds=False)
def split(call: Call, x: Tensor, sizes: Tensor | None = None) -> list[Tensor]:
    axis = call["axis"]
    parts = call.ints("split", sizes)
    if parts is None:
        count = call["num_outputs"] or call.outputs
        size = -(-x.shape[axis] // count)
        parts = [size] * (count - 1) + [x.shape[axis] - size * (count - 1)]
    return list(x.split(parts, axis))


@kernel("Slice", rounds=False)
def slice_(
    call: Call,
    x: Tensor,
    starts: Tensor | None = None,
    ends: Tensor | None = None,
    axes: Tensor | None = None,
    steps: Tensor | None = None,
) -> Tensor:
    first, last = call.ints("starts", starts) or [], call.ints("ends", ends) or []
    dims = call.ints("axes", axes) or list(range(len(first)))
    strides = call.ints("steps", steps) or [1] * len(first)
    for dim, start, stop, step in zip(dims, first, last, strides, strict=True):
        n = x.shape[dim]
        if step > 0:
            begin, end, step = slice(start, stop, step).indices(n)
            x = x[(slice(None),) * (dim % x.dim()) + (slice(begin, max(begin, end), step),)]
        else:  # torch has no negative steps
            stop = -n - 1 if stop < -n else stop
            x = x.index_select(dim, torch.arange(n)[_backwards(n, start, stop, step)].to(x.device))
    return x


def _backwards(n: int, start: int, stop: int, step: int) -> list[int]:
    return list(range(n))[slice(start, None if stop == -n - 1 else stop, step)]


@kernel("Pad", rounds=False)
def pad(
    call: Call, x: Tensor, pads: Tensor | None = None, value: Tensor | None = None, axes: Tensor | None = None
) -> Tensor:
    widths = call.ints("pads", pads) or []
    fill = value.item() if value is not None else call["value"] or 0
    dims = [a % x.dim() for a in call.ints("axes", axes) or range(x.dim())]
    begin, end = dict.fromkeys(range(x.dim()), 0), dict.fromkeys(range(x.dim()), 0)
    begin.update(zip(dims, widths[: len(dims)], strict=True))
    end.update(zip(dims, widths[len(dims) :], strict=True))
    if call["mode"] == "constant":
        return functional.pad(x, [p for d in reversed(range(x.dim())) for p in (begin[d], end[d])], value=fill)
    for dim in dims:
        remaining = np.arange(x.shape[dim])[max(0, -begin[dim]) : x.shape[dim] + min(0, end[dim])]
        places = np.pad(remaining, (max(0, begin[dim]), max(0, end[dim])), mode=call["mode"])
        x = x.index_select(dim, torch.from_numpy(places).to(x.device))
    return x


@kernel("DepthToSpace", rounds=False)
def depth_to_space(call: Call, x: Tensor) -> Tensor:
    block = call["blocksize"]
    n, c, h, w = x.shape
    if call["mode"] == "CRD":
        x = x.reshape(n, c // block**2, block, block, h, w).permute(0, 1, 4, 2, 5, 3)
    else:
        x = x.reshape(n, block, block, c // block**2, h, w).permute(0, 3, 4, 1, 5, 2)
    return x.reshape(n, c // block**2, h * block, w * block)


@kernel("SpaceToDepth", rounds=False)
def space_to_depth(call: Call, x: Tensor) -> Tensor:
    block = call["blocksize"]
    n, c, h, w = x.shape
    order = (0, 1, 3, 5, 2, 4) if call["mode"] == "CRD" else (0, 3, 5, 1, 2, 4)
    x = x.reshape(n, c, h // block, block, w // block, block).permute(order)
    return x.reshape(n, c * block**2, h // block, w // block)


@kernel("Trilu", rounds=False)
def trilu(call: Call, x: Tensor, k: Tensor | None = None) -> Tensor:
    return (torch.triu if call["upper"] else torch.tril)(x, 0 if k is None else int(k))
