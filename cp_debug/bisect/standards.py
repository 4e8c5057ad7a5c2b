"""Standards by which a test is judged, its tolerances and its oracle, from the precisions that both sides declare."""

from __future__ import annotations

import math
from collections.abc import Iterable

from cp_debug.backends.base import Backend, Program
from cp_debug.bisect.int8_notes import both_int8
from cp_debug.bisect.options import Options
from cp_debug.errors import DeviceUnavailable
from cp_debug.graph.declared import narrow_values
from cp_debug.graph.integer_values import is_quantized
from cp_debug.graph.narrow_types import narrow_precision
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
        if is_quantized(program.graph):
            declared.add(narrow_precision(program.graph) or "int8")
    precision = coarsest(reference.precision, test.precision, *declared)
    unjudged = math.inf if both_int8(reference, test) else precision.atol
    return (
        precision.rtol if options.rtol is None else options.rtol,
        unjudged if options.atol is None else options.atol,
    )


def oracle(reference: Backend, test: Backend, options: Options) -> str | None:
    """The arithmetic of the replay; None where nothing is replayed."""
    return (options.oracle or oracle_for(reference.precision, test.precision)) if options.replay else None
