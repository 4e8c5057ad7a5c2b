"""Sentences about the inputs and outputs of two programs that are compared: other names, other types, outputs that only
the test has."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from cp_debug.backends.base import Program
from cp_debug.graph.graph import ValueInfo
from cp_debug.safe_text import amount, some


def end_notes(programs: Sequence[Program], tests: Sequence[Program], told: Sequence[str] = ()) -> list[str]:
    """The sentences for all components. ``told``: what the user said of names, ``REFERENCE=TEST`` each."""
    notes: list[str] = []
    for program, test in zip(programs, tests, strict=True):
        if (pairing := test.pairing) is None:
            continue
        notes += pairing.other_names(told)
        notes += omitted(pairing.left_out)
        paired = {*pairing.outputs.values(), *pairing.inside.values()}
        notes += only_in_test([v.name for v in test.graph.outputs if v.name not in paired])
        notes += other_types(_types(program.graph.outputs), _types(test.graph.outputs), pairing.outputs)
    return notes


def _types(values: Iterable[ValueInfo]) -> dict[str, str]:
    return {value.name: str(value.dtype) for value in values if value.dtype is not None}


def omitted(names: Sequence[str]) -> list[str]:
    """A sentence about outputs that the user left out; none where there are none."""
    return [f"{'output' if len(names) == 1 else 'outputs'} {some(names)} left out by --map"] if names else []


def only_in_test(names: Sequence[str]) -> list[str]:
    """A sentence about outputs that only the test has; none where there are none."""
    outputs = amount(len(names), "output")
    return [f"not compared: {outputs} of the test that the reference lacks: {some(names)}"] if names else []


def other_types(ours: Mapping[str, str], theirs: Mapping[str, str], pairs: Mapping[str, str]) -> Iterator[str]:
    """A sentence for each pair of types of outputs: ``output o is int64 in the reference and float32 in the test``.

    ``ours`` and ``theirs``: output → name of its dtype; ``pairs``: reference output → test output.
    """
    groups: dict[tuple[str, str], list[str]] = {}
    for name, test_name in pairs.items():
        kinds = ours.get(name, ""), theirs.get(test_name, "")
        if all(kinds) and kinds[0] != kinds[1]:
            groups.setdefault(kinds, []).append(name)
    for (kind, test_kind), names in groups.items():
        subject = f"output {names[0]} is" if len(names) == 1 else f"outputs {some(names)} are"
        yield f"{subject} {kind} in the reference and {test_kind} in the test"
