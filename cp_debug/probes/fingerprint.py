"""A tensor reduced to a few numbers, from which the relative L2 distance of two tensors can be told.

The Johnson-Lindenstrauss estimate: for a projection r with independent entries of mean 0 and variance 1,
E[<x - y, r>²] = ‖x - y‖². With PROJECTIONS of them the estimate has a relative standard deviation of about
1 / sqrt(2 · PROJECTIONS) = 18 %: whole runs are compared with each other while neither is kept.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

PROJECTIONS = 16
_BLOCK = 1 << 12
_CHUNK = 1 << 20
"""Elements whose blocks' signs are drawn at once."""
_PIECE = 1 << 18
"""Elements that are read at a time: they stay in a processor's cache through all that is done with them."""
_SMALLEST, _LARGEST = 1e-12, 1e15
"""Norms of a piece between which FP32 loses nothing to its range."""


@dataclass(frozen=True)
class Fingerprint:
    """Shape, counts of NaN, +Inf and -Inf, norm and projections of the finite elements."""

    shape: tuple[int, ...]
    special: tuple[int, int, int]
    norm: float
    projections: np.ndarray

    def distance(self, other: Fingerprint) -> float:
        """Estimate of ‖x - y‖ / max(‖x‖, ‖y‖); infinite for another shape or other NaN and Inf counts."""
        if self.shape != other.shape or self.special != other.special:
            return float("inf")
        whole = max(self.norm, other.norm)
        # Divided before they are squared: FP64 has no room for the squares of numbers beyond 1e154.
        apart = (self.projections / whole - other.projections / whole) if whole else np.zeros(1)
        return float(np.sqrt(np.mean(apart**2)))


def fingerprint(tensor: Tensor | np.ndarray) -> Fingerprint:
    """Fingerprint of a tensor of any shape and dtype, on any device, read once in row-major order.

    Complex numbers count as pairs of their parts.
    """
    if not isinstance(tensor, Tensor):  # a numpy scalar counts as an array
        tensor = torch.from_numpy(np.asarray(tensor, order="C"))
    flat = tensor.detach().reshape(-1)
    if flat.is_complex():
        flat = torch.view_as_real(flat.resolve_conj()).reshape(-1)
    sums, norm, special = torch.zeros(PROJECTIONS, dtype=torch.float64), 0.0, torch.zeros(3, dtype=torch.int64)
    for start in range(0, flat.numel(), _PIECE):
        given = flat[start : start + _PIECE]
        numbers = given.to("cpu", _held(given.dtype))
        if rest := -len(given) % _BLOCK:
            numbers = functional.pad(numbers, (0, rest))
        own = float(torch.linalg.vector_norm(numbers))
        if not _SMALLEST < own < _LARGEST and numbers.any():
            numbers = numbers.double()
            own = float(torch.linalg.vector_norm(numbers))
        if not math.isfinite(own):  # NaN, Inf, or numbers of float64 whose squares it has no room for
            special += torch.stack([numbers.isnan().sum(), numbers.isposinf().sum(), numbers.isneginf().sum()])
            numbers = torch.where(numbers.isfinite(), numbers, 0.0)  # it may be the caller's own
            largest = float(numbers.abs().max())
            own = largest * float(torch.linalg.vector_norm(numbers / largest)) if largest else 0.0
        norm = math.hypot(norm, own)
        blocks = numbers.view(-1, _BLOCK)
        index, first = divmod(start // _BLOCK, _CHUNK // _BLOCK)
        sums += (blocks @ _within_block(blocks.dtype) * _signs(index)[first : first + len(blocks)]).sum(dim=0)
    return Fingerprint(tuple(tensor.shape), tuple(special.tolist()), norm, sums.numpy())


def _held(dtype: torch.dtype) -> torch.dtype:
    """FP32 for the types whose numbers it holds, which takes a third of the time; FP64's projections are less than 2e-6
    away. FP64 for all others."""
    wide = dtype in (torch.float64, torch.int64, torch.int32, torch.uint64, torch.uint32)
    return torch.float64 if wide else torch.float32


@cache
def _within_block(dtype: torch.dtype) -> Tensor:
    """The random projection of one block, [_BLOCK, PROJECTIONS]; every block has it, with signs of its own."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(_BLOCK, PROJECTIONS, dtype=torch.float64, generator=generator).to(dtype)


@cache
def _signs(chunk: int) -> Tensor:
    """±1 for every block of a chunk, [blocks, PROJECTIONS]."""
    generator = torch.Generator().manual_seed(chunk + 1)
    return torch.randint(2, (_CHUNK // _BLOCK, PROJECTIONS), generator=generator) * 2.0 - 1.0
