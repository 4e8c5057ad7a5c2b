"""Values that one of two sides holds as levels of a quantizer, by the names of the reference."""

from __future__ import annotations

from collections.abc import Sequence

from cp_debug.backends.base import Program
from cp_debug.graph.integer_values import level_values
from cp_debug.programs.pipeline import Key, value_map


def levels_of_both(programs: Sequence[Program], tests: Sequence[Program]) -> set[Key]:
    """The values that ``programs``, the reference's, or ``tests``, of the same components, hold as levels."""
    levels = {Key(program.name, value) for program in programs for value in level_values(program.graph)}
    for program, test in zip(programs, tests, strict=True):
        if held := level_values(test.graph):
            names = value_map(program, test)
            levels |= {Key(test.name, names.get(value, value)) for value in held}
    return levels
