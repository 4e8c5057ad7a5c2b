"""Notes that a reader must know about a backend in INT8."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from cp_debug.backends.base import Backend, Program
from cp_debug.backends.capabilities import integer_kernels_of
from cp_debug.bisect.result import GUILTY, LayerRow
from cp_debug.bisect.verdict import obeys_scales
from cp_debug.programs.pipeline import Pipeline, wants_int8
from cp_debug.safe_text import some


def both_int8(reference: Backend, test: Backend) -> bool:
    """Whether the divergence of two backends says nothing: roundings at ties tip over, and grow from layer to layer."""
    return wants_int8(reference) and wants_int8(test)


def _of_scales(spec: str, rows: Sequence[LayerRow]) -> Iterator[str]:
    """The sentence about how well layers do what their scales say; those that are guilty of another result do not."""
    departures = {
        row.name: row.replay.deviation_from_scales
        for row in rows
        if row.replay and row.replay.deviation_from_scales is not None
    }
    others = [row.name for row in rows if row.verdict == GUILTY and row.replay and obeys_scales(row.replay) is False]
    named = some(others, 4)
    obeying = {name: off for name, off in departures.items() if name not in others}
    if obeying:
        name = max(obeying, key=lambda name: obeying[name])
        off = obeying[name]
        noise = f"to {-20 * math.log10(off):.0f} dB or better, the least at {name}" if off else "bit for bit"
        who = f"every layer but {named}" if others else "every layer"
        yield f"{spec}: {who} computes what its scales say from its own inputs, {noise}"
    elif others:
        yield f"{spec}: no layer computes what its scales say from its own inputs: {named}"


def int8_notes(
    reference: Pipeline, pipeline: Pipeline, rows: Sequence[LayerRow], how: Mapping[tuple[Program, ...], str]
) -> Iterator[str]:
    """Notes about a backend in INT8, for readers of the result.

    They tell how it was quantized here (``how``: its programs → words), whether it obeys the scales, and
    whether integers were computed.
    """
    backend = pipeline.backend
    yield from dict.fromkeys(how[key] for p in (reference, pipeline) if (key := tuple(p.programs)) in how)
    if both_int8(reference.backend, backend):
        yield (
            "both sides are INT8, where ties may round either way and the differences grow from layer to layer: layers "
            "are judged by what they introduce, not by max |Δ| or rel. L2"
        )
    yield from _of_scales(str(backend.spec), rows)
    counts = [integer_kernels_of(session) for session in pipeline.sessions.values()]
    if counts and all(count == 0 for count in counts):
        needs = (
            "; ONNX Runtime needs Q/DQ pairs after a layer, too, and this graph has them only before layers, as "
            "TensorRT expects"
        )
        yield f"{backend.spec}: no integer kernel ran{needs * (backend.spec.family == 'ort')}"
