"""Standards by which a test is judged, its tolerances and its oracle, from the precisions that both sides declare."""

from __future__ import annotations

import math
from collections.abc import Iterable

from cp_debug.backends.base import Backend, Program
from cp_debug.bisect.int8_notes import both_int8
from cp_debug.bisect.options import Options
from cp_debug.graph.declared import narrow_values
from cp_debug.graph.integer_values import is_quantized
from cp_debug.graph.qdq import has_own_pairs
from cp_debug.programs.precision import coarsest, oracle_for


def tolerance(reference: Backend, test: Backend, programs: Iterable[Program], options: Options) -> tuple[float, float]:
    """(rtol, atol) from ``options``, else of the coarsest precision that a backend or a file declares.

    Infinite where both sides are in INT8: their roundings at ties tip over.
    """
    declared: set[str] = set()
    for program in programs:
        declared.update(narrow_values(program.graph).values())
        if is_quantized(program.graph) and not has_own_pairs(program.graph):
            declared.add("int8")
    precision = coarsest(reference.precision, test.precision, *declared)
    unjudged = math.inf if both_int8(reference, test) else precision.atol
    return (
        precision.rtol if options.rtol is None else options.rtol,
        unjudged if options.atol is None else options.atol,
    )


def oracle(reference: Backend, test: Backend, options: Options) -> str | None:
    """The arithmetic of the replay; None where nothing is replayed."""
    return (options.oracle or oracle_for(reference.precision, test.precision)) if options.replay else None
