"""Operators that compute no number: shapes, fills and casts; reshape, concatenate, slice, pad; gather and scatter."""

from __future__ import annotations

import math

import numpy as np
import torch
from onnx import TensorProto, numpy_helper
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
    # torch.broadcast_shapes imports a symbolic algebra first: 0.4 s.
    return x.expand(np.broadcast_shapes(tuple(x.shape), tuple(shape.tolist())))


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
            places = list(range(n))[slice(start, None if stop == -n - 1 else stop, step)]
            x = x.index_select(dim, torch.tensor(places, dtype=torch.int64, device=x.device))
    return x


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
    parts, order = {
        "CRD": ((c // block**2, block, block), (0, 1, 4, 2, 5, 3)),
        "DCR": ((block, block, c // block**2), (0, 3, 4, 1, 5, 2)),
    }[call["mode"]]
    x = x.reshape(n, *parts, h, w).permute(order)
    return x.reshape(n, c // block**2, h * block, w * block)


@kernel("SpaceToDepth", rounds=False)
def space_to_depth(call: Call, x: Tensor) -> Tensor:
    block = call["blocksize"]
    n, c, h, w = x.shape
    order = {"CRD": (0, 1, 3, 5, 2, 4), "DCR": (0, 3, 5, 1, 2, 4)}[call["mode"]]
    x = x.reshape(n, c, h // block, block, w // block, block).permute(order)
    return x.reshape(n, c * block**2, h // block, w // block)


@kernel("Trilu", rounds=False)
def trilu(call: Call, x: Tensor, k: Tensor | None = None) -> Tensor:
    return (torch.triu if call["upper"] else torch.tril)(x, 0 if k is None else int(k))


DTYPES = {
    TensorProto.BFLOAT16: torch.bfloat16,
    TensorProto.BOOL: torch.bool,
    TensorProto.DOUBLE: torch.float64,
    TensorProto.FLOAT: torch.float32,
    TensorProto.FLOAT16: torch.float16,
    TensorProto.INT16: torch.int16,
    TensorProto.INT32: torch.int32,
    TensorProto.INT64: torch.int64,
    TensorProto.INT8: torch.int8,
    TensorProto.UINT8: torch.uint8,
}


@kernel("Shape", rounds=False)
def shape(call: Call, x: Tensor) -> Tensor:
    return torch.tensor(x.shape[call["start"] or 0 : call["end"]], dtype=torch.int64, device=call.device)


@kernel("Size", rounds=False)
def size(call: Call, x: Tensor) -> Tensor:
    return torch.tensor(x.numel(), dtype=torch.int64, device=call.device)


@kernel("Range", exact=True)
def range_(call: Call, start: Tensor, limit: Tensor, delta: Tensor) -> Tensor:
    count = max(0, math.ceil((limit.item() - start.item()) / delta.item()))
    return start + torch.arange(count, device=call.device).to(start.dtype) * delta


@kernel("ConstantOfShape")
def constant_of_shape(call: Call, sizes: Tensor) -> Tensor:
    fill = call["value"]
    if fill is None:
        return torch.zeros(sizes.tolist(), dtype=call.arithmetic.dtype, device=call.device)
    value = call.arithmetic.hold(numpy_helper.to_array(fill), call.device)
    # The value has one axis of length 1; no sizes make a number, without axes.
    return value.reshape(()).expand(sizes.tolist()) if isinstance(value, Tensor) else NotImplemented


@kernel("EyeLike", rounds=False)
def eye_like(call: Call, x: Tensor) -> Tensor:
    dtype = x.dtype if call["dtype"] is None else DTYPES.get(call["dtype"])
    if dtype is None:
        return NotImplemented
    rows, columns = (torch.arange(n, device=call.device) for n in x.shape)
    return (columns[None] - rows[:, None] == call["k"]).to(call.arithmetic.held(dtype))


@kernel("Cast")
def cast(call: Call, x: Tensor) -> Tensor:
    dtype = DTYPES.get(call["to"])
    if dtype is None:
        return NotImplemented
    held = call.arithmetic.held(dtype)
    return x.to(held) if dtype in (torch.float32, torch.float64) else x.to(dtype).to(held)


@kernel("CastLike")
def cast_like(call: Call, x: Tensor, like: Tensor) -> Tensor:
    return x.to(like.dtype)


_REDUCTIONS = {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}


@kernel("Gather", rounds=False)
def gather(call: Call, x: Tensor, indices: Tensor) -> Tensor:
    axis = call["axis"] % x.dim()
    picked = x.index_select(axis, _positive(indices, x.shape[axis]).flatten())
    return picked.reshape(x.shape[:axis] + indices.shape + x.shape[axis + 1 :])


@kernel("GatherElements", rounds=False)
def gather_elements(call: Call, x: Tensor, indices: Tensor) -> Tensor:
    return x.gather(call["axis"], _positive(indices, x.shape[call["axis"]]))


@kernel("ReverseSequence", rounds=False)
def reverse_sequence(call: Call, x: Tensor, lengths: Tensor) -> Tensor:
    time, batch = call["time_axis"], call["batch_axis"]
    place = torch.arange(x.shape[time], device=x.device)[:, None].expand(-1, x.shape[batch])
    place = torch.where(place < lengths, lengths - 1 - place, place)
    shape = [x.shape[axis] if axis in (time, batch) else 1 for axis in range(x.dim())]
    return x.gather(time, (place if time < batch else place.T).reshape(shape).expand(x.shape))


@kernel("GatherND", rounds=False)
def gather_nd(call: Call, x: Tensor, indices: Tensor) -> Tensor:
    batch = call["batch_dims"]
    lead = indices.shape[:batch]
    rows = x.reshape(-1, *x.shape[batch:])
    places = indices.reshape(rows.shape[0], -1, indices.shape[-1])
    which = torch.arange(rows.shape[0], device=x.device)[:, None].expand(places.shape[:2])
    picked = rows[(which, *(_positive(p, n) for p, n in zip(places.unbind(-1), rows.shape[1:], strict=False)))]
    return picked.reshape(lead + indices.shape[batch:-1] + picked.shape[2:])


@kernel("ScatterElements", "Scatter")
def scatter_elements(call: Call, x: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
    axis, reduction = call["axis"], call["reduction"] or "none"
    places = _positive(indices, x.shape[axis])
    if reduction == "none":
        return x.scatter(axis, places, updates)
    return x.scatter_reduce(axis, places, updates, _REDUCTIONS[reduction])


@kernel("ScatterND")
def scatter_nd(call: Call, x: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
    depth, reduction = indices.shape[-1], call["reduction"] or "none"
    lead = x.shape[:depth]
    row = torch.zeros(indices.shape[:-1], dtype=torch.int64, device=x.device)
    for place, n in zip(indices.unbind(-1), lead, strict=True):
        row = row * n + _positive(place, n)
    flat = x.reshape(lead.numel(), -1)
    source = updates.reshape(row.numel(), -1)
    target = row.reshape(-1, 1).expand(source.shape)
    if reduction == "none":
        return flat.scatter(0, target, source).reshape(x.shape)
    return flat.scatter_reduce(0, target, source, _REDUCTIONS[reduction]).reshape(x.shape)


@kernel("OneHot", rounds=False)
def one_hot(call: Call, indices: Tensor, depth: Tensor, values: Tensor) -> Tensor:
    size = int(depth.reshape(-1)[0])
    axis = call["axis"] % (indices.dim() + 1)
    places = indices.to(torch.int64)
    places = torch.where(places < 0, places + size, places).unsqueeze(axis)
    classes = torch.arange(size, device=indices.device).reshape(-1, *(1,) * (indices.dim() - axis))
    return torch.where(places == classes, values[1], values[0])


@kernel("NonZero", rounds=False)
def non_zero(call: Call, x: Tensor) -> Tensor:
    return torch.nonzero(x).T


def _positive(indices: Tensor, size: int) -> Tensor:
    places = indices.to(torch.int64)
    return torch.where(places < 0, places + size, places)


@kernel("Multinomial", rounds=False)
def multinomial(call: Call, logits: Tensor) -> Tensor:
    generator = torch.Generator(logits.device)
    generator.seed() if call["seed"] is None else generator.manual_seed(int(call["seed"]))
    drawn = torch.multinomial(torch.softmax(logits, -1), call["sample_size"] or 1, True, generator=generator)
    return drawn.to(torch.int64 if call["dtype"] == TensorProto.INT64 else torch.int32)
