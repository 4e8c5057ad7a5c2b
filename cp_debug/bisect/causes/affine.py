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


DEQUANTIZED = {"scaled": "int8-scale", "shifted": "int8-zero-point"}
"""Affine cause → name of the cause in the result of a DequantizeLinear."""


def _name(segment: Segment, name: str) -> str:
    return DEQUANTIZED.get(name, name) if segment.op == "DequantizeLinear" else name


def _text(name: str, subject: str, theta: Tensor) -> str:
    if name == "shifted":
        return f"{theta[0, 0]:+.4g} is added to the result"
    return f"{subject} {'is' if subject != 'the weights' else 'are'} multiplied by {1 + theta[0, 0]:.6g}"


@cause()
def everywhere(segment: Segment) -> Iterator[Candidate]:
    """Candidates: one factor or one summand for the whole tensor, fitted."""
    if segment.op == "QuantizeLinear":  # integers: its own causes say more
        return
    error = segment.test - segment.before
    if bool(segment.exact.any()):
        says = "the sign of the result is the other one"
        yield Candidate(_name(segment, "scaled"), says, -segment.exact, 0, {"factor": -1.0}, _FIX)
    for name, subject, basis in (*_bases(segment), ("affine", "", [segment.before, torch.ones(())])):
        fit = cross_fit(error, basis, segment.folds)
        if fit is not None:
            change, theta = fit
            text = (
                _text(name, subject, theta) if subject else f"the result is × {1 + theta[0, 0]:.6g} {theta[0, 1]:+.4g}"
            )
            factors = {"factor": 1 + float(theta[0, 0])} if name != "shifted" else {"summand": float(theta[0, 0])}
            value = segment.activate(segment.before + change)
            yield Candidate(_name(segment, name), text, value, len(basis), factors, _FIX)


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
    if segment.test.dim() < 2 or segment.test.shape[segment.axis] < 2:
        return
    yield from _sliced(segment, segment.axis)


@cause(costly=True)
def slice_by_slice(segment: Segment) -> Iterator[Candidate]:
    """Candidates: the same along the other axes (positions, heads, tokens), where few of their slices are off."""
    for axis in range(segment.test.dim()):
        count = segment.test.shape[axis]
        if axis != segment.axis and count > 1 and 0 < int(off_channels(segment, axis).sum()) <= count // 2:
            yield from _sliced(segment, axis)


def _sliced(segment: Segment, axis: int) -> Iterator[Candidate]:
    error = segment.test - segment.before
    off = off_channels(segment, axis)
    count = int(off.sum())
    chosen = off.reshape(-1, *[1] * (segment.test.dim() - axis - 1))
    one = "channel" if axis == segment.axis else f"axis {axis}, slice"
    affine = [segment.before, torch.ones((), dtype=torch.float64)]
    bases = [b for b in _bases(segment) if b[0] != "bias-scaled"]
    for name, _, basis in (*bases, ("affine", "", affine)):
        fit = cross_fit(error, basis, segment.folds, axis)
        if fit is None:
            continue
        change, theta = fit
        value = segment.activate(segment.before + torch.where(chosen, change, 0.0))
        places = off.nonzero().flatten().tolist()
        which = f"{one} {places[0]}" if count == 1 else f"{count} of {len(off)} channels"
        which = which if count == 1 or axis == segment.axis else f"{count} of {len(off)} slices of axis {axis}"
        says = f"{which} {'is' if count == 1 else 'are'} off {OFF[name]}"
        evidence: dict[str, Any] = {"channels": places[:32], "factors": (1 + theta[off][:32, 0]).tolist()}
        if name == "shifted":
            evidence = {"channels": places[:32], "summands": theta[off][:32, 0].tolist()}
        if axis != segment.axis:
            evidence["axis"] = axis
        cause_name = f"channels-{name.removeprefix('weights-')}"
        if name in ("scaled", "weights-scaled") and bool(((1 + theta[off]).abs() < NOTHING).all()):
            cause_name = "channels-zeroed"
            of = "the weights of " if name == "weights-scaled" else ""
            says = f"{of}{which} {'is' if count == 1 and not of else 'are'} zero"
        yield Candidate(cause_name, says, value, count * len(basis), evidence, _FIX)


def off_channels(segment: Segment, axis: int | None = None) -> Tensor:
    """[C] bool: channels (slices of an ``axis``) that are off by more than the claimed rounding, evenly, and not merely
    by a trace."""
    along = segment.axis if axis is None else axis
    dims = [d for d in range(segment.error.dim()) if d != along]
    error = segment.error.square().sum(dims)
    rounding = 16 * segment.expected**2 / len(error)
    return error > torch.clamp(error.max() * 1e-8, min=min(rounding, float(error.max()) / 2))
