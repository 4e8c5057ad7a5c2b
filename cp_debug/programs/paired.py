"""The values of a test by the names of the reference's: of its programs, and of captures from other files.

Notes say in which inputs and outputs two programs differ: other names, other types, outputs that only the test has.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from cp_debug.backends.base import Program
from cp_debug.backends.executor import Executor
from cp_debug.errors import InputError
from cp_debug.graph.graph import Graph, ValueInfo
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
    parse_map_of,
)
from cp_debug.probes.arrays import Sink, Tensor
from cp_debug.probes.capture import Capture, CaptureWriter, TensorEntry
from cp_debug.probes.distance import relative_l2
from cp_debug.probes.fingerprint import Fingerprint, fingerprint
from cp_debug.probes.module_state import stored_tensors
from cp_debug.programs.align import TOLERANCE
from cp_debug.programs.pairing_numbers import NumericPairing
from cp_debug.programs.walk import Walk, tensors_as_arrays
from cp_debug.programs.weight_differences import WeightDifferences, differences_of_states, weight_differences
from cp_debug.recipes.base import Model, Sample
from cp_debug.safe_text import amount, some

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
            paired_tests.append(_with(test, _pair_by_name_alone(program, test, fixed)))
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
    by_name = _pair_by_name_alone(program, test, fixed)
    if not believable(program.graph, test.graph) or (by_name.missing and by_name.added):
        return True
    return bool(moved_names(program.graph, test.graph))


def _pair_by_name_alone(program: Program, test: Program, fixed: Mapping[str, str]) -> Pairing:
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


Key = tuple[str, str]
"""Component and name."""


def pair_captures(reference: Capture, test: Capture, maps: Sequence[str] = ()) -> dict[Key, Key]:
    """Reference tensor → test tensor, for the tensors of two captures.

    They are paired as ``maps`` says (``REFERENCE=TEST`` each), by name, by what they hold on the first sample, in
    order; final outputs that are left by position and shape. Components are paired by name, else in order where both
    captures have as many. Raises InputError for a wrong map.
    """
    components = _components(reference, test)
    ours = [(e.component, e.name) for e in _first(reference)]
    theirs = [(e.component, e.name) for e in _first(test)]
    mapped = parse_map_of(maps, {name for _, name in ours}, {name for _, name in theirs})
    fixed = {name: test_key for test_key, name in mapped.items()}
    pairs: dict[Key, Key] = {}
    free = dict.fromkeys(theirs)
    for component, name in ours:
        candidate = (components.get(component, component), fixed.get(name, name))
        if candidate in free and (name in fixed or name not in mapped):
            pairs[component, name] = candidate
            del free[candidate]
    unpaired = [key for key in ours if key not in pairs]
    if unpaired and free:
        for key, test_key in _by_contents(reference, test, unpaired, list(free), components):
            pairs[key] = test_key
            free.pop(test_key)
        for key, test_key in _by_position(reference, test, pairs):
            pairs[key] = test_key
    return pairs


def _first(capture: Capture) -> Iterator[TensorEntry]:
    sample = min(capture.samples, default=0)
    return (e for e in capture.entries if e.sample == sample)


def _components(reference: Capture, test: Capture) -> dict[str, str]:
    ours, theirs = (list(dict.fromkeys(e.component for e in c.entries)) for c in (reference, test))
    paired = {name: name for name in ours if name in theirs}
    unpaired, unpaired_test = ([n for n in names if n not in paired] for names in (ours, theirs))
    return paired | (dict(zip(unpaired, unpaired_test, strict=True)) if len(unpaired) == len(unpaired_test) else {})


def _by_contents(
    reference: Capture, test: Capture, left: Sequence[Key], free: Sequence[Key], components: Mapping[str, str]
) -> Iterator[tuple[Key, Key]]:
    """Pairs of equal tensors: each of ``left`` with the first free one in execution order."""
    sample = min(reference.samples)
    prints: dict[Key, Fingerprint] = {}

    def held(capture: Capture, key: Key) -> Fingerprint | None:
        array = capture.load(key[1], sample, key[0])
        return fingerprint(np.asarray(array, np.float64)) if array.dtype.kind in "fiub" else None

    for key in free:
        if (test_print := held(test, key)) is not None:
            prints[key] = test_print
    for key in left:
        own_print = held(reference, key)
        component = components.get(key[0])
        if own_print is None or component is None:
            continue
        near = ((own_print.distance(print_), k) for k, print_ in prints.items() if k[0] == component)
        twin = next((k for distance, k in near if distance <= TOLERANCE), None)
        if twin is not None:
            del prints[twin]
            yield key, twin


def _by_position(reference: Capture, test: Capture, pairs: Mapping[Key, Key]) -> Iterator[tuple[Key, Key]]:
    """Pairs of final outputs of one shape, in the order of both models."""
    shapes = [{(e.component, e.name): e.shape for e in _first(c)} for c in (reference, test)]
    outputs = [[(str(c), str(n)) for c, n in capture.manifest.get("outputs", [])] for capture in (reference, test)]
    free = [key for key in outputs[1] if key in shapes[1] and key not in set(pairs.values())]
    for key in outputs[0]:
        if key in shapes[0] and key not in pairs:
            candidate = next((k for k in free if shapes[1][k] == shapes[0][key]), None)
            if candidate is not None:
                free.remove(candidate)
                yield key, candidate


def end_notes(programs: Sequence[Program], tests: Sequence[Program], told: Sequence[str] = ()) -> list[str]:
    """The sentences for all components. ``told``: what the user said of names, ``REFERENCE=TEST`` each."""
    notes: list[str] = []
    for program, test in zip(programs, tests, strict=True):
        if (pairing := test.pairing) is None:
            continue
        unread = [v.name for v in program.graph.inputs if v.name not in pairing.inputs]
        notes += [f"the test does not read {some(unread)}"] if unread else []
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
