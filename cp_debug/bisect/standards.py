"""Standards by which a test is judged, its tolerances and its oracle, from the precisions that both sides declare."""

from __future__ import annotations

import math
from collections.abc import Iterable

from onnx import TensorProto

from cp_debug.backends.base import Backend, Program
from cp_debug.bisect.int8_notes import both_int8
from cp_debug.bisect.options import Options
from cp_debug.errors import DeviceUnavailable, InputError
from cp_debug.graph.declared import narrow_values
from cp_debug.graph.narrow_qdq import narrow_precision
from cp_debug.programs.precision import coarsest, oracle_for


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
