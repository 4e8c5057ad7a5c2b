"""Fourier transforms."""

from __future__ import annotations

import torch
from torch import Tensor

from cp_debug.backends.kernels.registry import Call, kernel


@kernel("DFT")
def dft(call: Call, x: Tensor, length: Tensor | None = None, axis: Tensor | None = None) -> Tensor:
    """x [B, …, 1 or 2]: real, or real and imaginary parts, in the last axis."""
    dim = int(axis) if axis is not None else call["axis"] if call.opset < 20 else -2
    dim %= x.dim()
    inverse, onesided = bool(call["inverse"]), bool(call["onesided"])
    whole = 2 * (x.shape[dim] - 1) if inverse and onesided else x.shape[dim]
    return _transformed(x, int(length) if length is not None else whole, dim, inverse, onesided)


@kernel("STFT")
def stft(
    call: Call, signal: Tensor, step: Tensor, window: Tensor | None = None, length: Tensor | None = None
) -> Tensor:
    """signal [B, N] or [B, N, 1 or 2] → [B, frames, bins, 2]."""
    if signal.dim() == 2:
        signal = signal[..., None]
    size = int(length) if length is not None else signal.shape[1] if window is None else window.shape[0]
    frames = signal.unfold(1, size, int(step)).movedim(-1, 2)
    if window is not None:
        if window.shape[0] < size:
            return NotImplemented
        frames = call.arithmetic.round(frames * window[:size, None])
    return _transformed(frames, size, 2, False, bool(call["onesided"]))


def _transformed(x: Tensor, length: int, dim: int, inverse: bool, onesided: bool) -> Tensor:
    """``x`` is cut, or filled with zeros, to ``length`` along ``dim``; one-sided are bins up to N/2."""
    signal = torch.complex(x[..., 0], x[..., 1]) if x.shape[-1] == 2 else x[..., 0]
    if inverse and onesided:
        return torch.fft.irfft(signal, length, dim)[..., None]
    if inverse:
        return torch.view_as_real(torch.fft.ifft(signal, length, dim).resolve_conj())
    result = torch.fft.fft(signal, length, dim)
    if onesided:
        result = result.narrow(dim, 0, length // 2 + 1)
    return torch.view_as_real(result.resolve_conj())
