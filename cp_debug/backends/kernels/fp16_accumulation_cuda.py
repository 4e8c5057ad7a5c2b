"""FP16 accumulation on an NVIDIA GPU: one CUDA kernel for convolutions and products, compiled by torch's NVRTC, and one
that puts their weights in the order of addition and pads their images.

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

from cp_debug.backends.kernels.fp16_accumulation_source import PREPARE_SOURCE, PREPARED, SOURCE
from cp_debug.probes.cuda_kernel import CudaKernel, compiled

BLOCK = 16
"""Products that one instruction adds."""
_LARGEST = 1 << 29
"""Elements of an image, of a group's weights, and of a channel of the result: offsets in bytes are 31 bits wide."""
_BYTES = 4
"""Bytes of an element."""
_DEEPEST = 65535
"""Images times phases of one launch."""
_TABLES = 64
"""Geometries whose tables stay on a device; those of 256 × 256 places take 0.5 MB."""


class Tile(NamedTuple):
    """Outputs × places of a block and of one of its threads, instructions whose operands are held or on their way, and
    blocks that share a multiprocessor."""

    outputs: int
    places: int
    of_thread: tuple[int, int]
    stages: int
    blocks: int

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return self.outputs // self.of_thread[0] * self.places // self.of_thread[1]


WIDE, NARROW = Tile(64, 64, (8, 4), 3, 3), Tile(16, 128, (4, 4), 3, 4)
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
    parts: int = 1
    """Parts that the partial sums are of, as many of each: those of a part are added first."""

    def blocks(self, channels: int) -> list[slice | list[int]]:
        """The places on K of each instruction; K has ``channels`` places for each tap."""
        places = ([t * channels + c for t, c in zip(i.taps, i.channels, strict=True)] for i in self.instructions)
        return [slice(p[0], p[-1] + 1) if p[-1] - p[0] == len(p) - 1 else p for p in places]


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
    """(phases, rows), int32: places in the weights (channels × places of the kernel), in the order of addition, each
    instruction filled up to ``BLOCK``."""
    numbers: Tensor
    """The tables that the kernel reads, int32, in the order that its text tells."""


def accumulate(
    x: Tensor,
    phases: Sequence[Taps],
    stride: Sequence[int],
    size: Sequence[int],
    total: Sum,
    pads: tuple[int, ...] = (),
    scattered: Scattered | None = None,
) -> Tensor | None:
    """Sum the taps over ``x`` (images, channels per group, *spatial) → (images, outputs per group, *size).

    Image i is of group i modulo the groups. All operands hold FP16 values in float32. ``pads``, of zeros around each
    image, as ``torch.nn.functional.pad`` takes them. Several phases, which share their weights and differ in their
    taps, need a ``scattered``, whose tensor is written to and returned. None where there is no GPU, or where its kernel
    does not give this project's definition bit by bit.
    """
    if not x.is_cuda or x.dtype != torch.float32:
        return None
    outputs, shape = phases[0].weight.shape[1], x.shape
    into = prod(scattered.into.shape[2:] if scattered else size)
    ordered = BLOCK * len(total.instructions) * (outputs + -outputs % 4)
    image = shape[1] * prod(_padded(shape[2:], pads))
    if max(image, ordered, into) >= _LARGEST or shape[0] * len(phases) > _DEEPEST:
        return None
    tile = NARROW if outputs <= FEW else WIDE
    if not _is_right(x.device.index, total.slices > 1, tile):
        return None
    return _launch(x, phases, stride, size, total, pads, scattered, tile)


def _launch(
    x: Tensor,
    phases: Sequence[Taps],
    stride: Sequence[int],
    size: Sequence[int],
    total: Sum,
    pads: tuple[int, ...],
    scattered: Scattered | None,
    tile: Tile,
) -> Tensor:
    weight, shape, device = phases[0].weight, x.shape, x.device
    groups, outputs, _, kernel = weight.shape
    into, begins, step = scattered or Scattered(x.new_empty(shape[0], outputs, *size), *_alone(len(size)))
    tables = _tables(
        device, total, (groups, outputs, kernel), tuple((p.places, p.starts) for p in phases),
        shape[1:], pads, tuple(stride), tuple(size), into.shape[2:], begins, step,
    )  # fmt: skip
    images, ordered = _prepared(x, pads, weight, tables.order)
    blocks = -(-prod(size) // tile.places), -(-outputs // tile.outputs), shape[0] * len(phases)
    launched = _kernel(device.index, total.slices > 1, tile)
    assert launched is not None
    launched.launch(blocks, tile.threads, images, ordered, tables.numbers, into, device=device)
    return into


@cache
def _alone(axes: int) -> tuple[tuple[tuple[int, ...], ...], tuple[int, ...]]:
    """First place and step of a single phase."""
    return ((0,) * axes,), (1,) * axes


def _padded(spatial: Sequence[int], pads: Sequence[int]) -> list[int]:
    """Spatial sizes with their padding."""
    whole = list(spatial)
    for axis in range(len(pads) // 2):
        whole[-1 - axis] += pads[2 * axis] + pads[2 * axis + 1]
    return whole


def filled_up(x: Tensor, pads: tuple[int, ...]) -> Tensor:
    """Images of any shape with zeros around them, as many as ``torch.nn.functional.pad`` would be told."""
    return functional.pad(x, pads) if any(pads) else x


def _prepared(x: Tensor, pads: tuple[int, ...], weight: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
    """Images with their padding, contiguous, and weights in the order of addition: (phases, groups, rows, outputs),
    float32, outputs filled up to a multiple of 4.

    Images (images, channels, *spatial), weights (groups, outputs per group, channels per group, places of the kernel).
    """
    own = len(pads) <= 6 and weight.is_cuda
    kernel = compiled(PREPARE_SOURCE, "fp16_prepare", weight.device.index) if own else None
    if kernel is None:
        (phases, rows), outputs = order.shape, weight.shape[1]
        filled = functional.pad(weight.flatten(2), (0, 0, 0, -outputs % 4))
        chosen = filled.index_select(2, order.flatten()).unflatten(2, (phases, rows))
        return filled_up(x, pads).contiguous(), chosen.permute(2, 0, 3, 1).contiguous()
    if weight.stride(3) != 1 and weight.shape[3] > 1:
        weight = weight.contiguous()
    x = x.contiguous()
    to = _layout(x.shape, pads, weight.shape, weight.stride(), order.shape)
    ordered, images = x.new_empty(to.ordered), x if to.images is None else x.new_empty(to.images)
    kernel.launch(to.blocks, 256, weight, order, ordered, *to.of_weights, x, images, *to.of_images, device=x.device)
    return images, ordered


class _PreparedLayout(NamedTuple):
    """Shapes of what ``fp16_prepare`` writes, ``images`` None where nothing is padded, its blocks and its integers."""

    ordered: tuple[int, ...]
    images: tuple[int, ...] | None
    blocks: tuple[int, int, int]
    of_weights: tuple[int, ...]
    of_images: tuple[int, ...]


@lru_cache(maxsize=_TABLES)
def _layout(
    x: tuple[int, ...],
    pads: tuple[int, ...],
    weight: tuple[int, ...],
    steps: tuple[int, ...],
    order: tuple[int, int],
) -> _PreparedLayout:
    """The layout for images and weights of these shapes, weights with these strides, and so many phases and rows."""
    (groups, outputs, _, places), (phases, rows) = weight, order
    filled = outputs + -outputs % 4
    images: tuple[int, ...] | None = None
    sizes: tuple[int, ...] = (0,) * 9
    chunks = 0
    if any(pads):
        small, large = x[2:], _padded(x[2:], pads)
        images, ones = (*x[:2], *large), (1,) * (3 - len(large))
        chunks = -(-prod(large) // PREPARED)
        sizes = (*ones, *small, *ones, *large, *(*pads[::2], 0, 0, 0)[2::-1])
    across = -(-rows // 32), -(-filled // 32)
    ordering = across[0] * across[1] * phases * groups
    return _PreparedLayout(
        (phases, groups, rows, filled),
        images,
        (ordering + x[0] * x[1] * chunks, 1, 1),
        (groups, outputs, filled, places, rows, *steps[:3], *across, ordering),
        (chunks, *sizes),
    )


@lru_cache(maxsize=_TABLES)
def _tables(
    device: torch.device,
    total: Sum,
    weight: tuple[int, int, int],
    phases: tuple[tuple[tuple[int, ...], tuple[tuple[int, ...], ...]], ...],
    image: tuple[int, ...],
    pads: tuple[int, ...],
    stride: tuple[int, ...],
    size: tuple[int, ...],
    scattered: tuple[int, ...],
    begins: tuple[tuple[int, ...], ...],
    step: tuple[int, ...],
) -> _Tables:
    """Tables for weights of so many groups, outputs and places of the kernel, data of the shape ``image`` (channels,
    *spatial) before it is padded, and results that go into ``scattered``."""
    (groups, outputs, kernel), spatial = weight, _padded(image[1:], pads)
    by_slice = [
        [i for i in total.instructions if i.slice == s] or [Instruction(s, (), ())] for s in range(total.slices)
    ]
    instructions = [i for part in by_slice for i in part]
    steps = np.array([len(i.taps) + 256 * (i is part[-1]) for part in by_slice for i in part])
    # What an instruction has no products for is read and not added.
    tap, channel = np.zeros((2, len(steps), BLOCK), np.int64)
    for own_taps, own_channels, instruction in zip(tap, channel, instructions, strict=True):
        own_taps[: len(instruction.taps)] = instruction.taps
        own_channels[: len(instruction.channels)] = instruction.channels
    tap, channel = tap.reshape(-1), channel.reshape(-1)
    order = np.stack([channel * kernel + np.array(places)[tap] for places, _ in phases])
    offset = np.stack([_flat(starts, spatial)[tap] + channel * prod(spatial) for _, starts in phases])
    grid = np.stack(np.meshgrid(*map(np.arange, size), indexing="ij"), -1).reshape(-1, len(size))
    head = [
        image[0] * prod(spatial),
        prod(scattered),
        groups,
        order.shape[1],
        outputs,
        len(grid),
        len(steps),
        len(phases),
    ]
    numbers = [
        head,
        offset * _BYTES,
        _flat(grid * stride, spatial) * _BYTES,
        _flat(grid * step, scattered),
        _flat(begins, scattered),
        steps,
    ]
    flat = np.concatenate([np.asarray(part, np.int64).reshape(-1) for part in numbers]).astype(np.int32)
    return _Tables(torch.from_numpy(order.astype(np.int32)).to(device), torch.from_numpy(flat).to(device))


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
    x[..., :5] = x[..., -4:] = 0  # the padding
    weight = torch.randn(2, 70, 40, generator=draw).half().float()
    places = [(0, range(16)), (int(sliced), range(16, 32)), (0, range(32, 40))]
    total = Sum(tuple(Instruction(s, [0] * len(c), c) for s, c in places), 1 + sliced)
    device = f"cuda:{index}"
    taps = Taps(weight.to(device)[..., None], (0,), ((0,),))
    found = _launch(x.to(device)[..., 5:-4], [taps], (1,), (150,), total, (5, 4), None, tile)
    return bool(torch.equal(found.cpu(), defined(x, weight, total)))


def source_of(sliced: bool, tile: Tile) -> str:
    """The kernel's text; ``sliced`` where there is more than one partial sum."""
    constants = {
        "OT": tile.outputs, "PT": tile.places, "TO": tile.of_thread[0], "TP": tile.of_thread[1],
        "STAGES": tile.stages, "BLOCKS": tile.blocks, "SLICED": int(sliced), "LAST": "result" if sliced else "total",
    }  # fmt: skip
    return "".join(f"#define {name} {value}\n" for name, value in constants.items()) + SOURCE


@cache
def _kernel(index: int, sliced: bool, tile: Tile) -> CudaKernel | None:
    """The compiled kernel for a GPU; None where this torch or driver cannot compile it."""
    return compiled(source_of(sliced, tile), "fp16_accumulate", index)
