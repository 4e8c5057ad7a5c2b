"""Standards by which a test is judged, from the precisions that both sides declare; and what INT8 changes in them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

from onnx import TensorProto

from cp_debug.backends.base import Backend, Program
from cp_debug.backends.capabilities import integer_kernels_of
from cp_debug.bisect.options import Options
from cp_debug.bisect.result import GUILTY, LayerRow
from cp_debug.bisect.verdict import obeys_scales
from cp_debug.errors import DeviceUnavailable, InputError
from cp_debug.graph.half_precision import narrow_values
from cp_debug.graph.narrow_qdq import narrow_precision
from cp_debug.programs.pipeline import Pipeline, wants_int8
from cp_debug.programs.precision import coarsest, oracle_for
from cp_debug.safe_text import some


def oracle_device(test: Backend, options: Options) -> str:
    """Device on which the layers of ``test`` are replayed: the one that was asked for, or the test's own.

    ``auto`` stays on the CPU where torch sees no such GPU, and for INT8: quantizers are replayed there. Raises
    DeviceUnavailable for one that is not there.
    """
    asked, auto = options.oracle_device, options.oracle_device == "auto"
    # A dump was computed "elsewhere", another distribution's backend wherever it says.
    if asked == "cpu" or (auto and (not test.device.startswith("cuda") or test.precision == "int8")):
        return "cpu"
    import torch

    wanted = torch.device(test.device if auto else asked)
    there = wanted.type == "cuda" and torch.cuda.is_available() and (wanted.index or 0) < torch.cuda.device_count()
    if not there and not auto:
        count = torch.cuda.device_count()
        sees = f"torch {torch.__version__} sees {count} CUDA device{'s' * (count != 1)}"
        raise DeviceUnavailable(f"--oracle-device: {asked}, but {sees}; expected auto, cpu or the name of one of them")
    return f"cuda:{wanted.index or 0}" if there else "cpu"


def tolerance(reference: Backend, test: Backend, programs: Iterable[Program], options: Options) -> tuple[float, float]:
    """(rtol, atol) from ``options``, else of the coarsest precision that a backend or a file declares.

    Infinite where both sides are in INT8: their roundings at ties tip over.
    """
    declared: set[str] = set()
    for program in programs:
        declared.update(narrow_values(program.graph).values())
        if program.graph.precision == "int8":
            declared.add(narrow_precision(program.graph) or "int8")
    precision = coarsest(reference.precision, test.precision, *declared)
    unjudged = math.inf if both_int8(reference, test) else precision.atol
    return (
        precision.rtol if options.rtol is None else options.rtol,
        unjudged if options.atol is None else options.atol,
    )


def doubles_note(reference: Iterable[Program], test: Iterable[Program], options: Options) -> list[str]:
    """A sentence about FP64 on both sides, which FP32's limits judge; none elsewhere, nor where a user set them."""
    if options.rtol is not None or not (_is_double(reference) and _is_double(test)):
        return []
    says = (
        "both sides compute in FP64 but are judged by the limits of FP32, so smaller differences pass; set tighter "
        "ones with --rtol and --atol"
    )
    exact = "; the oracle is also FP64, and not more exact than the test"
    return [says + exact * (options.replay and options.oracle != "fp32")]


def _is_double(programs: Iterable[Program]) -> bool:
    """Whether all results that are floating point, as far as their types are known, are doubles."""
    floats = {TensorProto.DOUBLE, TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16}
    kinds = {
        program.graph.types[value].tensor_type.elem_type
        for program in programs
        for value in program.graph.values
        if value in program.graph.types
    }
    return kinds & floats == {TensorProto.DOUBLE}


def oracle(reference: Backend, test: Backend, options: Options) -> str | None:
    """The arithmetic of the replay; None where nothing is replayed. Raises InputError for another than these two."""
    if options.oracle not in (None, "fp32", "fp64"):
        raise InputError(f"oracle: {options.oracle!r}; expected 'fp32' or 'fp64'")
    return (options.oracle or oracle_for(reference.precision, test.precision)) if options.replay else None


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
