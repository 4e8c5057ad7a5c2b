"""Reductions, arg-max, top-k and cumulative sums."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from cp_debug.backends.kernels.registry import Call, kernel


def _product(x: Tensor, axes: list[int]) -> Tensor:
    for axis in axes:
        x = x.prod(axis, keepdim=True, dtype=x.dtype)
    return x


def _sum(x: Tensor, axes: list[int]) -> Tensor:
    return x.sum(axes, keepdim=True, dtype=x.dtype)


def _mean(x: Tensor, axes: list[int]) -> Tensor:
    if x.is_floating_point():
        return x.mean(axes, keepdim=True)
    return x.to(torch.float64).mean(axes, keepdim=True).to(x.dtype)


def _extreme(x: Tensor, axes: list[int], *, largest: bool) -> Tensor:
    if x.dtype == torch.bool:
        return _extreme(x.byte(), axes, largest=largest).bool()
    if not x.numel():
        shape = [1 if i in axes else n for i, n in enumerate(x.shape)]
        if x.is_floating_point():
            return x.new_full(shape, float("-inf" if largest else "inf"))
        limits = torch.iinfo(x.dtype)
        return x.new_full(shape, limits.min if largest else limits.max)
    return (torch.amax if largest else torch.amin)(x, axes, keepdim=True)


def _log_sum_exp(x: Tensor, axes: list[int]) -> Tensor:
    if not x.is_floating_point():
        return NotImplemented
    return torch.logsumexp(x, axes, keepdim=True)


def _square_root_of_squares(x: Tensor, axes: list[int]) -> Tensor:
    return _sum(x * x, axes).sqrt().to(x.dtype)


_REDUCTIONS: dict[str, Callable[[Tensor, list[int]], Tensor]] = {
    "ReduceL1": lambda x, axes: _sum(x.abs(), axes),
    "ReduceL2": _square_root_of_squares,
    "ReduceLogSum": lambda x, axes: _sum(x, axes).log().to(x.dtype),
    "ReduceLogSumExp": _log_sum_exp,
    "ReduceMax": lambda x, axes: _extreme(x, axes, largest=True),
    "ReduceMean": _mean,
    "ReduceMin": lambda x, axes: _extreme(x, axes, largest=False),
    "ReduceProd": _product,
    "ReduceSum": _sum,
    "ReduceSumSquare": lambda x, axes: _sum(x * x, axes),
}


@kernel(*_REDUCTIONS)
def reduce(call: Call, x: Tensor, axes: Tensor | None = None) -> Tensor:
    dims = call.ints("axes", axes) or []
    if not dims and call["noop_with_empty_axes"]:
        # Nothing is summed, but what a reduction does to each element remains: a size-1 axis to reduce shows it.
        reduced = _REDUCTIONS[call.node.op](x[None], [0])
        return reduced if reduced is NotImplemented else reduced[0]
    dims = sorted({d % max(x.dim(), 1) for d in dims}) or list(range(x.dim()))
    flat = x if x.dim() else x[None]
    reduced = _REDUCTIONS[call.node.op](flat, dims or [0])
    if reduced is NotImplemented:
        return reduced
    if not call["keepdims"] or not x.dim():
        return reduced.reshape([n for i, n in enumerate(x.shape) if i not in dims])
    return reduced


@kernel("ArgMax", "ArgMin", rounds=False)
def arg_extreme(call: Call, x: Tensor) -> Tensor:
    axis, keep = call["axis"], bool(call["keepdims"])
    choose = torch.argmax if call.node.op == "ArgMax" else torch.argmin
    if call["select_last_index"]:
        return x.shape[axis] - 1 - choose(x.flip(axis), axis, keepdim=keep)
    return choose(x, axis, keepdim=keep)


@kernel("TopK", rounds=False)
def top_k(call: Call, x: Tensor, k: Tensor | None = None) -> list[Tensor]:
    count = int(k) if k is not None else call["k"]
    descending = call["largest"] is None or bool(call["largest"])
    # A stable sort: equal values keep their order, which torch.topk does not promise.
    values, indices = torch.sort(x, dim=call["axis"], descending=descending, stable=True)
    return [values.narrow(call["axis"], 0, count), indices.narrow(call["axis"], 0, count)]


@kernel("CumSum", "CumProd")
def cumulative(call: Call, x: Tensor, axis: Tensor) -> Tensor:
    dim, (function, first) = int(axis), {"CumSum": (torch.cumsum, 0), "CumProd": (torch.cumprod, 1)}[call.node.op]
    totals = function(x.flip(dim) if call["reverse"] else x, dim, dtype=x.dtype)
    if call["exclusive"]:
        start = torch.full_like(totals.narrow(dim, 0, 1), first)
        totals = torch.cat([start, totals.narrow(dim, 0, x.shape[dim] - 1)], dim)
    return totals.flip(dim) if call["reverse"] else totals


@kernel("Hardmax", rounds=False)
def hardmax(call: Call, x: Tensor) -> Tensor:
    axis = call["axis"] % x.dim() if x.dim() else 0
    if call.opset < 13:  # all axes from this one on are one
        flat = x.reshape(math.prod(x.shape[:axis]), -1)
        return functional.one_hot(flat.argmax(1), flat.shape[1]).to(x.dtype).reshape(x.shape)
    return functional.one_hot(x.argmax(axis), x.shape[axis]).movedim(-1, axis).to(x.dtype)


@kernel("Det")
def determinant(call: Call, x: Tensor) -> Tensor:
    return torch.linalg.det(x)
