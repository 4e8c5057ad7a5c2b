"""FP16 accumulation on an NVIDIA GPU: one CUDA kernel for convolutions and products, compiled by torch's NVRTC.

An instruction's products are added one after the other in FP32, beginning with 0; their sum is added to the partial
sum, which is then rounded to FP16. That is what the CPU's matrix product does. Between instructions a thread keeps its
partial sums as pairs of FP16, which leaves registers for a tile of up to 8 outputs × 8 places.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from math import prod
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from cp_debug.backends.kernels.fp16_accumulation_source import SOURCE
from cp_debug.probes.cuda_kernel import CudaKernel, compiled

BLOCK = 16
"""Products that one instruction adds."""
_LARGEST = 1 << 31
"""Elements of an image, and of a channel of the result: offsets are 32 bits wide."""
_DEEPEST = 65535
"""Images times phases of one launch."""
_TABLES = 64
"""Geometries whose tables stay on a device; those of 256 × 256 places take 0.5 MB."""


class Tile(NamedTuple):
    """Outputs × places of a block and of one of its threads, and blocks that share a multiprocessor."""

    outputs: int
    places: int
    of_thread: tuple[int, int]
    blocks: int

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return self.outputs // self.of_thread[0] * self.places // self.of_thread[1]


WIDE, NARROW = Tile(64, 64, (8, 4), 3), Tile(16, 128, (4, 4), 4)
"""The best of twelve on an H200, for 64 to 256 outputs and for 1 to 3 (``docs/gpu/speed.md``)."""
FEW = 16
"""Outputs up to which a tile is narrow."""


class Instruction(NamedTuple):
    """Products that are added together: places on K, which walks the taps and inside a tap the channels."""

    slice: int
    """Partial sum that they belong to."""
    taps: Sequence[int]
    channels: Sequence[int]


@dataclass(frozen=True, eq=False)
class Sum:
    """Instructions in the order in which they are added, and the number of partial sums, which are added at the end.

    One object stands for one order: a device's tables are kept for it.
    """

    instructions: tuple[Instruction, ...]
    slices: int


class Taps(NamedTuple):
    """Weights of a sum, and its taps: where each stands in them, and where it starts on each spatial axis."""

    weight: Tensor
    """(groups, outputs per group, channels per group, places of the kernel)."""
    places: tuple[int, ...]
    starts: tuple[tuple[int, ...], ...]


class Scattered(NamedTuple):
    """Results' places in a larger tensor: each phase's first place, and the step from place to place."""

    into: Tensor
    """(images, outputs per group, *spatial)."""
    begins: tuple[tuple[int, ...], ...]
    step: tuple[int, ...]


class _Tables(NamedTuple):
    order: Tensor
    """(phases · rows): places in the weights (channels × places of the kernel), in the order of addition."""
    numbers: Tensor
    """The tables that the kernel reads, in the order that its text tells."""


def accumulate(
    x: Tensor,
    phases: Sequence[Taps],
    stride: Sequence[int],
    size: Sequence[int],
    total: Sum,
    scattered: Scattered | None = None,
) -> Tensor | None:
    """Sum the taps over ``x`` (images, channels per group, *spatial) → (images, outputs per group, *size).

    Image i is of group i modulo the groups. All operands hold FP16 values in float32. Several phases, which share their
    weights and differ in their taps, need a ``scattered``, whose tensor is written to and returned. None where there is
    no GPU, or where its kernel does not give this project's definition bit by bit.
    """
    outputs = phases[0].weight.shape[1]
    images, places = len(x), prod(size)
    if not x.is_cuda or x.dtype != torch.float32 or images * len(phases) > _DEEPEST:
        return None
    if max(x[0].numel(), prod(scattered.into.shape[2:]) if scattered else places) >= _LARGEST:
        return None
    tile = NARROW if outputs <= FEW else WIDE
    if not _is_right(x.device.index, total.slices > 1, tile):
        return None
    return _launch(x.contiguous(), phases, stride, size, total, scattered, tile)


def _launch(
    x: Tensor,
    phases: Sequence[Taps],
    stride: Sequence[int],
    size: Sequence[int],
    total: Sum,
    scattered: Scattered | None,
    tile: Tile,
) -> Tensor:
    weight = phases[0].weight
    groups, outputs, _, kernel = weight.shape
    into, begins, step = scattered or Scattered(
        x.new_empty(len(x), outputs, *size), ((0,) * len(size),), (1,) * len(size)
    )
    tables = _tables(
        str(x.device), total, (groups, outputs, kernel), tuple((p.places, p.starts) for p in phases),
        tuple(x.shape[1:]), tuple(stride), tuple(size), tuple(into.shape[2:]), begins, step,
    )  # fmt: skip
    if outputs % 4:
        weight = functional.pad(weight, (0, 0, 0, 0, 0, -outputs % 4))
    ordered = weight.flatten(2).index_select(2, tables.order).unflatten(2, (len(phases), -1)).permute(2, 0, 3, 1)
    blocks = -(-prod(size) // tile.places), -(-outputs // tile.outputs), len(x) * len(phases)
    launched = _kernel(x.device.index, total.slices > 1, tile)
    assert launched is not None
    launched.launch(blocks, tile.threads, x, ordered.contiguous(), tables.numbers, into, device=x.device)
    return into


@lru_cache(maxsize=_TABLES)
def _tables(
    device: str,
    total: Sum,
    weight: tuple[int, int, int],
    phases: tuple[tuple[tuple[int, ...], tuple[tuple[int, ...], ...]], ...],
    image: tuple[int, ...],
    stride: tuple[int, ...],
    size: tuple[int, ...],
    scattered: tuple[int, ...],
    begins: tuple[tuple[int, ...], ...],
    step: tuple[int, ...],
) -> _Tables:
    """Tables for weights of so many groups, outputs and places of the kernel, data of the shape ``image`` (channels,
    *spatial) and results that go into ``scattered``."""
    (groups, outputs, kernel), spatial = weight, image[1:]
    by_slice = [
        [i for i in total.instructions if i.slice == s] or [Instruction(s, (), ())] for s in range(total.slices)
    ]
    steps = np.array([len(i.taps) + 256 * (i is part[-1]) for part in by_slice for i in part])
    tap = np.array([t for part in by_slice for i in part for t in i.taps], np.int64)
    channel = np.array([c for part in by_slice for i in part for c in i.channels], np.int64)
    # The kernel loads whole blocks: what is behind the last row is read and not used.
    order, offset = np.zeros((2, len(phases), len(tap) + BLOCK), np.int64)
    for row, (places, _) in zip(order, phases, strict=True):
        row[: len(tap)] = channel * kernel + np.array(places)[tap]
    for row, (_, starts) in zip(offset, phases, strict=True):
        row[: len(tap)] = _flat(starts, spatial)[tap] + channel * prod(spatial)
    grid = np.stack(np.meshgrid(*map(np.arange, size), indexing="ij"), -1).reshape(-1, len(size))
    head = [prod(image), prod(scattered), groups, order.shape[1], outputs, len(grid), len(steps), len(phases)]
    numbers = [
        head,
        offset,
        _flat(grid * stride, spatial),
        _flat(grid * step, scattered),
        _flat(begins, scattered),
        steps,
    ]
    flat = np.concatenate([np.asarray(part, np.int64).reshape(-1) for part in numbers]).astype(np.int32)
    return _Tables(torch.from_numpy(order.reshape(-1)).to(device), torch.from_numpy(flat).to(device))


def _flat(places: Any, shape: Sequence[int]) -> np.ndarray:
    """Flat places in a tensor of ``shape``: (n, axes) to (n), int64."""
    return np.asarray(places, np.int64) @ np.array([prod(shape[axis + 1 :]) for axis in range(len(shape))], np.int64)


def defined(x: Tensor, weight: Tensor, total: Sum) -> Tensor:
    """The definition for one tap, term by term: float32 [groups, K, places] and [groups, outputs, K] to [groups,
    outputs, places]."""
    sums = [x.new_zeros(x.shape[0], weight.shape[1], x.shape[2]) for _ in range(total.slices)]
    for instruction in total.instructions:
        part = torch.zeros_like(sums[0])
        for c in instruction.channels:
            part = part + weight[:, :, c : c + 1] * x[:, c : c + 1]
        sums[instruction.slice] = (sums[instruction.slice] + part).half().float()
    result = sums[0]
    for other in sums[1:]:
        result = (result + other).half().float()
    return result


@cache
def _is_right(index: int, sliced: bool, tile: Tile) -> bool:
    """Whether a kernel compiles for this GPU and gives the definition's bits on a small product."""
    if _kernel(index, sliced, tile) is None:
        return False
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(2, 40, 150, generator=draw).half().float()
    weight = torch.randn(2, 70, 40, generator=draw).half().float()
    places = [(0, range(16)), (int(sliced), range(16, 32)), (0, range(32, 40))]
    total = Sum(tuple(Instruction(s, [0] * len(c), c) for s, c in places), 1 + sliced)
    device = f"cuda:{index}"
    taps = Taps(weight.to(device)[..., None], (0,), ((0,),))
    found = _launch(x.to(device), [taps], (1,), (150,), total, None, tile)
    return bool(torch.equal(found.cpu(), defined(x, weight, total)))


def source_of(sliced: bool, tile: Tile) -> str:
    """The kernel's text; ``sliced`` where there is more than one partial sum."""
    constants = {
        "OT": tile.outputs, "PT": tile.places, "TO": tile.of_thread[0], "TP": tile.of_thread[1],
        "BLOCKS": tile.blocks, "SLICED": int(sliced), "LAST": "result" if sliced else "total",
    }  # fmt: skip
    return "".join(f"#define {name} {value}\n" for name, value in constants.items()) + SOURCE


@cache
def _kernel(index: int, sliced: bool, tile: Tile) -> CudaKernel | None:
    """The compiled kernel for a GPU; None where this torch or driver cannot compile it."""
    return compiled(source_of(sliced, tile), "fp16_accumulate", index)
