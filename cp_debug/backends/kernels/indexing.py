"""Gather, scatter and their kin."""

from __future__ import annotations

import torch
from onnx import TensorProto
from torch import Tensor

from cp_debug.backends.kernels.registry import Call, kernel

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
