"""Affine causes: the result is the right one times a number plus a number, everywhere or channel by channel."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from cp_debug.bisect.causes.base import Candidate, cause
from cp_debug.bisect.causes.fits import cross_fit
from cp_debug.bisect.causes.segment import Segment

_FIX = "compare the parameters of {layers} in both programs (checkpoint, folding, quantization scales)"


def _bases(segment: Segment) -> Iterator[tuple[str, str, list[Tensor]]]:
    """(Cause, what it changes, tensors that are added to the exact result in unknown amounts)."""
    exact, unit = segment.before, torch.ones((), dtype=torch.float64)
    yield "scaled", "the result", [exact]
    if segment.bias is not None:
        yield "weights-scaled", "the weights", [exact - segment.bias]
    yield "shifted", "a constant", [unit]
    if segment.bias is not None:
        yield "bias-scaled", "the bias", [segment.bias.expand_as(exact)]
    yield "affine", "the result", [exact, unit]


DEQUANTIZED = {"scaled": "int8-scale", "shifted": "int8-zero-point"}
"""Affine cause → name of the cause in the result of a DequantizeLinear."""


def _name(segment: Segment, name: str) -> str:
    return DEQUANTIZED.get(name, name) if segment.op == "DequantizeLinear" else name


@cause()
def everywhere(segment: Segment) -> Iterator[Candidate]:
    """Candidates: one factor or one summand for the whole tensor, fitted."""
    if segment.op == "QuantizeLinear":  # integers: its own causes say more
        return
    if bool(segment.exact.any()):
        says = "the sign of the result is flipped"
        yield Candidate(_name(segment, "scaled"), says, -segment.exact, 0, {"factor": -1.0}, _FIX)
    for name, subject, basis in _bases(segment):
        fit = cross_fit(segment.test - segment.before, basis, segment.folds)
        if fit is not None:
            change, theta = fit
            factor = 1 + float(theta[0, 0])
            text = f"{subject} {'are' if subject == 'the weights' else 'is'} multiplied by {factor:.6g}"
            if name == "shifted":
                text = f"{theta[0, 0]:+.4g} is added to the result"
            elif name == "affine":
                text = f"the result is × {factor:.6g} {theta[0, 1]:+.4g}"
            figures = {"summand": float(theta[0, 0])} if name == "shifted" else {"factor": factor}
            value = segment.activate(segment.before + change)
            yield Candidate(_name(segment, name), text, value, len(basis), figures, _FIX)


NOTHING = 1e-3
"""Factor below which a channel is not scaled but zero."""
OFF = {
    "scaled": "in scale",
    "weights-scaled": "in the scale of the weights",
    "shifted": "by a constant each",
    "affine": "in scale and offset",
}


@cause()
def channel_by_channel(segment: Segment) -> Iterator[Candidate]:
    """Candidates: a factor and a summand for each channel, for all channels or only for those that are off."""
    if segment.test.dim() > 1 and segment.test.shape[segment.axis] > 1:
        yield from _sliced(segment, segment.axis)


@cause(costly=True)
def slice_by_slice(segment: Segment) -> Iterator[Candidate]:
    """Candidates: the same along the other axes (positions, heads, tokens), where few of their slices are off."""
    for axis in range(segment.test.dim()):
        count = segment.test.shape[axis]
        if axis != segment.axis and count > 1 and 0 < int(off_channels(segment, axis).sum()) <= count // 2:
            yield from _sliced(segment, axis)


def _sliced(segment: Segment, axis: int) -> Iterator[Candidate]:
    off = off_channels(segment, axis)
    places, own = off.nonzero().flatten().tolist(), axis == segment.axis
    chosen = off.reshape(-1, *[1] * (segment.test.dim() - axis - 1))
    which, verb = f"{len(places)} of {len(off)} {'channels' if own else f'slices of axis {axis}'}", "are"
    if len(places) == 1:
        which, verb = f"{'channel' if own else f'axis {axis}, slice'} {places[0]}", "is"
    for name, _, basis in _bases(segment):
        fit = cross_fit(segment.test - segment.before, basis, segment.folds, axis) if name in OFF else None
        if fit is None:
            continue
        change, theta = fit
        value, numbers = segment.activate(segment.before + torch.where(chosen, change, 0.0)), theta[off][:32, 0]
        figures = {"summands": numbers.tolist()} if name == "shifted" else {"factors": (1 + numbers).tolist()}
        evidence: dict[str, Any] = {"channels": places[:32], **figures} | ({} if own else {"axis": axis})
        called, says = f"channels-{name.removeprefix('weights-')}", f"{which} {verb} off {OFF[name]}"
        if name in ("scaled", "weights-scaled") and bool(((1 + theta[off][:, 0]).abs() < NOTHING).all()):
            called = "channels-zeroed"
            says = f"{which} {verb} zero" if name == "scaled" else f"the weights of {which} are zero"
        yield Candidate(called, says, value, len(places) * len(basis), evidence, _FIX)


def off_channels(segment: Segment, axis: int | None = None) -> Tensor:
    """[C] bool: channels (slices of an ``axis``) that are off by more than the claimed rounding, evenly, and not merely
    by a trace."""
    along = segment.axis if axis is None else axis
    dims = [d for d in range(segment.error.dim()) if d != along]
    error = segment.error.square().sum(dims)
    rounding = 16 * segment.expected**2 / len(error)
    return error > torch.clamp(error.max() * 1e-8, min=min(rounding, float(error.max()) / 2))
