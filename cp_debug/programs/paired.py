"""The programs of a test, each with its values by the names of the reference's."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from cp_debug.backends.base import Program
from cp_debug.backends.executor import Executor
from cp_debug.errors import InputError
from cp_debug.graph.graph import Graph
from cp_debug.graph.integer_values import named_levels
from cp_debug.graph.pairing import (
    Pairing,
    believable,
    finish,
    left_out,
    moved_names,
    pair_by_names,
    pair_inputs,
    pair_outputs,
    parse_map,
)
from cp_debug.probes.arrays import Sink, Tensor
from cp_debug.probes.capture import Capture, CaptureWriter
from cp_debug.probes.distance import relative_l2
from cp_debug.probes.fingerprint import Fingerprint, fingerprint
from cp_debug.programs.pairing_numbers import NumericPairing
from cp_debug.programs.stored_tensors import stored_tensors
from cp_debug.programs.walk import Walk, tensors_as_arrays
from cp_debug.programs.weight_differences import WeightDifferences, differences_of_states, weight_differences
from cp_debug.recipes.base import Model, Sample

TOO_MUCH_ALIKE = 0.01
"""Relative distance of two outputs up to which what they hold does not tell which is which."""


def pair_programs(
    model: Model,
    sample: Sample,
    programs: Sequence[Program],
    tests: Sequence[Program],
    maps: Sequence[str] = (),
    on_step: Callable[[str], None] = lambda text: None,
) -> list[Program]:
    """``tests`` with their values paired with those of ``programs``: at once where names agree, else in a run of both.

    ``maps``: ``REFERENCE=TEST`` each, or ``OUTPUT=`` for one that is not to be compared. Raises InputError for a wrong
    one, where inputs cannot be paired, and for a component without an output that others are computed from.
    """
    changed = [(p, t) for p, t in zip(programs, tests, strict=True) if t.graph is not p.graph]
    omitted, pairs = left_out(maps, [v.name for v in programs[-1].graph.outputs])
    fixed = parse_map(pairs, [p.graph for p, _ in changed], [t.graph for _, t in changed]) if changed else {}
    if (maps and not changed) or (omitted and tests[-1].graph is programs[-1].graph):
        raise InputError("--map pairs values of two models; both sides run one, give another with --test-model")
    paired_tests = []
    last = max((i for i, (p, t) in enumerate(zip(programs, tests, strict=True)) if t.graph is not p.graph), default=-1)
    needed = [_needs_numbers(p, t, fixed) for p, t in zip(programs, tests, strict=True)]
    for step, program, test in zip(Walk(model, sample), programs, tests, strict=True):
        if step.place > last:
            paired_tests.append(test)
            continue
        if test.graph is program.graph:
            paired_tests.append(test)
            if any(needed[step.place + 1 :]):
                step.outputs = tensors_as_arrays(Executor(program.graph).run(step.inputs))
            continue
        if not any(needed[step.place :]):
            paired_tests.append(_with(test, pair_by_name_alone(program, test, fixed)))
            continue
        on_step(f"pairing the values of {test.graph.path.name}")
        pairing, step.outputs = pair_by_numbers(program, test, step.inputs, fixed)
        paired_tests.append(_with(test, pairing))
    for program, test in zip(programs[:-1], paired_tests[:-1], strict=True):
        check_outputs(program.graph, test)
    if omitted:
        last_test = paired_tests[-1]
        assert last_test.pairing is not None
        paired_tests[-1] = replace(last_test, pairing=replace(last_test.pairing, left_out=omitted))
    return paired_tests


def _with(test: Program, pairing: Pairing) -> Program:
    example = test.example and {pairing.inputs.get(n, n): array for n, array in test.example.items()}
    return replace(test, pairing=pairing, example=example)


def differing_weights(programs: Sequence[Program], tests: Sequence[Program]) -> dict[str, WeightDifferences]:
    """Component → differences of its weights, for components that a test runs from another file or checkpoint."""
    by_component = {}
    for program, test in zip(programs, tests, strict=True):
        ours, theirs = program.module, test.module
        if test.graph is program.graph:
            continue
        if ours is not None and theirs is not None and ours is not theirs:
            states = [{n: t.detach().cpu().numpy() for n, t in stored_tensors(m).items()} for m in (ours, theirs)]
            by_component[program.name] = differences_of_states(states[0], states[1])
        else:
            by_component[program.name] = weight_differences(program.graph, test.graph)
    return by_component


def check_outputs(ours: Graph, test: Program) -> None:
    """Raise InputError where a test lacks an output of ``ours``, from which the next component is computed."""
    lost = [v.name for v in ours.outputs if test.pairing is not None and test.pairing.lacks(v.name)]
    if lost:
        given = ", ".join(value.name for value in test.graph.outputs)
        raise InputError(f"--test-model: {test.graph} has no output that is {lost[0]!r}; its outputs are {given}")


def _inputs(program: Program, test: Program, fixed: Mapping[str, str]) -> dict[str, str]:
    return pair_inputs(program.graph, test.graph, fixed, f"--test-model: {test.graph}")


def _needs_numbers(program: Program, test: Program, fixed: Mapping[str, str]) -> bool:
    """Whether names leave anything open on both sides."""
    if test.graph is program.graph:
        return False
    if test.alignment is not None and program.alignment is not None:  # torch values tell more
        return False
    by_name = pair_by_name_alone(program, test, fixed)
    if not believable(program.graph, test.graph) or (by_name.missing and by_name.added):
        return True
    return bool(moved_names(program.graph, test.graph))


def pair_by_name_alone(program: Program, test: Program, fixed: Mapping[str, str]) -> Pairing:
    """The pairing by equal names and what the user said, without a run. Raises InputError as ``pair_inputs`` does."""
    inputs = _inputs(program, test, fixed)
    pairs = pair_by_names(program.graph, test.graph, fixed, inputs)
    if test.alignment is not None and program.alignment is not None:
        named = {own: name for own, (name, _) in pairs.items()}
        pairs |= {own: (name, "torch") for own, name in program.alignment.twins(test.alignment, named).items()}
    return finish(program.graph, test.graph, pairs, inputs)


def pair_by_numbers(
    program: Program, test: Program, inputs: Mapping[str, np.ndarray], fixed: Mapping[str, str]
) -> tuple[Pairing, dict[str, np.ndarray]]:
    """The pairing by contents, and by names where they can be believed; and the reference's outputs.

    ``inputs``: the reference's, name → array. Arrays have the dtype that the graph declares.
    Raises InputError as ``pair_inputs`` does.
    """
    ends = _inputs(program, test, fixed)
    pairs = pair_by_names(program.graph, test.graph, fixed, ends)
    final = {v.name for v in program.graph.outputs} & {v.name for v in test.graph.outputs}
    certain = {test_name for test_name, pair in pairs.items() if pair[1] == "map"} | {*ends.values()} | final
    certain |= {*named_levels(program.graph, test.graph)}
    doubted = moved_names(program.graph, test.graph) if believable(program.graph, test.graph) else set(pairs)
    pairs = {test_name: pair for test_name, pair in pairs.items() if test_name in certain or test_name not in doubted}
    with tempfile.TemporaryDirectory(prefix="cpdebug-") as scratch:
        prints: dict[str, Fingerprint] = {}
        with CaptureWriter(Path(scratch) / "reference", {}, checksums=False) as writer:

            def keep(name: str, tensor: Tensor) -> None:
                try:
                    prints[name] = fingerprint(tensor)
                    writer.put(name, tensor)
                except (InputError, TypeError):  # a dtype without numbers in it
                    prints.pop(name, None)

            for name, array in inputs.items():
                keep(name, array)
            outputs = _run(program, inputs, keep)
        capture = Capture.open(Path(scratch) / "reference")
        matcher = NumericPairing(program.graph, test.graph, pairs, prints, capture.load)
        matched = matcher.run()
        shapes = {name: p.shape for name, p in prints.items()}
        pairing = finish(program.graph, test.graph, matched, ends, (shapes, matcher.shapes))
        if program.module is None:  # names of both files, which their users know the outputs by
            return pairing, outputs
        told = {test_name: name for test_name, (name, how) in matched.items() if how == "map" or test_name == name}
        at_place = pair_outputs(program.graph, test.graph, told, (shapes, matcher.shapes), pairing.inside)
        return replace(pairing, moved=_moved(pairing.outputs, at_place, capture.load)), outputs


def _moved(
    outputs: Mapping[str, str], at_place: Mapping[str, str], load: Callable[[str], np.ndarray]
) -> dict[str, str]:
    """Reference outputs whose place in the test is taken by another one of theirs, with the test's output there.

    ``at_place`` pairs by position; ``load`` gives the reference's arrays, of which two may be too much alike to tell.
    """
    home = {test_name: name for name, test_name in outputs.items()}
    return {
        name: placed
        for name, placed in at_place.items()
        if placed != outputs.get(name, placed)
        and placed in home
        and relative_l2(load(home[placed]), load(name)) > TOO_MUCH_ALIKE
    }


def _run(program: Program, inputs: Mapping[str, np.ndarray], keep: Sink) -> dict[str, np.ndarray]:
    """Run the reference's graph once, every value given to ``keep``: in ONNX Runtime, which knows most operators."""
    from cp_debug.backends.registry import create
    from cp_debug.backends.spec import BackendSpec
    from cp_debug.errors import BackendUnavailable

    plain = replace(program, module=None, alignment=None)
    try:
        session = create(BackendSpec("ort")).open(plain)
    except (BackendUnavailable, InputError):
        return tensors_as_arrays(Executor(program.graph).run(inputs, keep))
    try:
        return session.run(inputs, keep)
    finally:
        session.close()
