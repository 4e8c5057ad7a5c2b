"""The result of a bisect, put together: each test's worst of all samples, and the notes that a reader must know."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cp_debug.backends.base import Program
from cp_debug.bisect.candidate_run import CandidateRun
from cp_debug.bisect.finding import Finding
from cp_debug.bisect.observe import Observation
from cp_debug.bisect.optimizer_blame import OptimizerBlame
from cp_debug.bisect.options import Options
from cp_debug.bisect.replayed import EXCESS
from cp_debug.bisect.result import (
    GUILTY,
    Attribution,
    LayerRow,
    Remainder,
    StageRow,
    TestResult,
    check_not_empty,
    nan_without_trace,
)
from cp_debug.bisect.verdict import oracle_is_alone
from cp_debug.detection.changes import DetectionChange, compare_detections
from cp_debug.errors import InputError
from cp_debug.files import resolved
from cp_debug.graph.control_flow import idle_on_both
from cp_debug.graph.graph import Graph
from cp_debug.programs.layers import Layer, stage_layers
from cp_debug.programs.paired import end_notes
from cp_debug.programs.pipeline import Key
from cp_debug.recipes.abilities import DetectsBoxes
from cp_debug.recipes.base import Model
from cp_debug.safe_text import amount, some


class Collected:
    """Results of one test backend over all samples: the worst one of every layer, so memory does not grow."""

    def __init__(self) -> None:
        self.rows: dict[Key, LayerRow] = {}
        self.observation: Observation | None = None
        """Observation whose gap stands out of its own noise the most; where none does, that of the noisiest sample."""
        self.first_observation: Observation | None = None
        """Observation of the first sample."""
        self._noisiest: Observation | None = None
        self.optimizer_blame: OptimizerBlame | None = None
        self.findings: list[Finding] = []
        self.detections: DetectionChange | None = None
        self.ways: dict[str, None] = {}
        """Control flow that went another way than the reference's, in words."""
        self.undone: dict[str, list[str]] = {}
        """Layers that hold their result in another basis → the layers that undo it, by name."""
        self.masks: dict[str, None] = {}
        """Layers that differ only in what is masked, of which what reads it makes the same, by name."""
        self.unexplained: dict[str, None] = {}
        """Notes about what could not be explained."""
        self.remainder: Remainder | None = None
        """Remainder of the worst sample, where no layer is guilty of its divergence."""
        self.lost: dict[str, None] = {}
        """Outputs with channels that are 0 everywhere in the test alone, in words."""
        self.attribution: Attribution | None = None
        """How the shares of the worst sample add up."""

    def is_worst(self, rows: Mapping[Key, LayerRow]) -> bool:
        """Whether no sample before has a row as severe as the worst of these."""
        worst = max((row.severity for row in rows.values()), default=())
        return all(row.severity < worst for row in self.rows.values())

    def detect(self, reference: Any, test: Any) -> None:
        """Add the change of one sample's detections, where both sides have some in boxes."""
        if isinstance(reference, DetectsBoxes) and isinstance(test, DetectsBoxes):
            change = compare_detections(reference, test)
            self.detections = change if self.detections is None else self.detections + change

    def add(self, rows: Mapping[Key, LayerRow]) -> None:
        """Keep the worse of each layer's rows."""
        for key, row in rows.items():
            if key not in self.rows or row.severity > self.rows[key].severity:
                self.rows[key] = row

    def observe(self, observation: Observation) -> None:
        """Keep what one sample adds: a gap counts by what its own sample's noise leaves of it."""
        self.first_observation = self.first_observation or observation
        if self._noisiest is None or observation.noise_floor > self._noisiest.noise_floor:
            self._noisiest = observation
        if self.observation is None or _standing_out(observation) > _standing_out(self.observation):
            self.observation = observation

    def notes(self, spec: str, *, draws: bool = False) -> list[str]:
        """Notes that a reader must know besides the rows. ``draws``: the program draws random numbers."""
        notes = [*observation_notes(spec, self._noisiest, self.observation, draws=draws), *self.ways]
        rows = self.rows.values()
        skipped = Counter(row.replay.skipped for row in rows if row.replay and row.replay.skipped)
        notes += self.unexplained
        guilty = {row.name for row in rows if row.verdict == GUILTY}
        undone = {name: by for name, by in self.undone.items() if name not in guilty}
        undoing = dict.fromkeys(name for names in undone.values() for name in names)
        notes.extend(both_inexact([row for row in rows if row.name not in undoing]))
        masks, fine = [name for name in self.masks if name not in guilty], ", so nothing is wrong"
        says = f"in another basis (channels permuted, rotated or scaled), and the layers that read it undo that{fine}"
        told = _layers(undone, "holds its result", "hold their results", says)
        notes.extend(f"{text}; undone by {some(undoing, 4)}" for text in told)
        says = f"only in what is masked (such as −Inf for −1e9); the results behind are the same{fine}"
        notes.extend(_layers(masks, "differs", "differ", says))
        if unknown := [row.name for row in rows if row.replay and row.replay.not_emulated]:
            many = f"{amount(len(unknown), 'layer')} not emulated, so their expected error is unknown"
            notes.append(f"{many}: {some(unknown, 5)}")
        notes.extend(f"{amount(count, 'layer')} not replayed: {reason}" for reason, count in skipped.items())
        return notes


def _layers(names: Collection[str], one: str, many: str, says: str) -> list[str]:
    """The sentence about some layers, with the verb for one and for many; none without any."""
    verb = one if len(names) == 1 else many
    return [f"{amount(len(names), 'layer')} {verb} {says}: {some(names, 4)}"] if names else []


def both_inexact(rows: Collection[LayerRow]) -> list[str]:
    """Sentences about layers on whose results both sides agree, and which are farther from the oracle than precision
    explains: with the same bits, and within the precision; and about layers whose captured inputs are not those that
    they read."""
    off = [r for r in rows if r.replay and (r.replay.new_nonfinite or (r.replay.excess or 0.0) > EXCESS)]
    torn = {r.name: r.replay.contradicted for r in off if r.replay and r.replay.contradicted}
    off = [r for r in off if r.name not in torn]
    alike = [r for r in off if not r.stats.equal and r.replay and oracle_is_alone(r.stats, r.replay)]
    says = "on both sides as closely as precision allows, but not with the oracle, which may itself be wrong there"
    doubts = _layers([r.name for r in alike], "agrees", "agree", says)
    if torn:
        have, read = ("has", "it") if len(torn) == 1 else ("have", "they")
        inputs = some(dict.fromkeys(name for names in torn.values() for name in names), 4)
        doubts.insert(
            0,
            f"the captured values contradict each other: {some(torn, 4)} {have} the reference's result, which does not "
            f"follow from {inputs} as captured; that is not what {read} read: a buffer was overwritten after it had "
            "been read, or values of several runs were mixed",
        )
    inexact = [r for r in off if r.stats.equal]
    if not inexact:
        return doubts
    worst = max(inexact, key=lambda r: r.replay.excess or 0.0 if r.replay else 0.0)
    excess = (worst.replay.excess if worst.replay else None) or 0.0
    how = f"are inexact, up to {excess:.3g}× what precision explains ({worst.name})"
    how = how if excess > EXCESS else "have NaN or Inf where exact arithmetic has others, or numbers"
    says = f"the same bits on both sides, but both {how}"
    return doubts + _layers([r.name for r in inexact], "has", "have", says)


def _standing_out(observation: Observation) -> tuple[float, float]:
    """Part of an observer gap that noise does not explain; then, for those where it explains all, the noise."""
    return max(observation.observer_gap - observation.noise_floor, 0.0), observation.noise_floor


def observation_notes(
    spec: str, noisiest: Observation | None, observed: Observation | None, *, draws: bool
) -> Iterator[str]:
    """Sentences for a backend that does not agree with itself, or that probes change.

    ``noisiest`` tells its noise, ``observed`` the gap; ``draws``: its program draws random numbers, so that no two runs
    need be alike.
    """
    if noisiest is not None and noisiest.first_unsteady:
        reason = "another thread count changes its sums" if noisiest.repeats else "it is not deterministic: runs differ"
        reason = "it draws random numbers: runs differ" if draws else reason
        yield f"{spec}: {reason}, first at {noisiest.first_unsteady} (noise floor {noisiest.noise_floor:.2g})"
    if observed is not None and observed.observer_gap > observed.noise_floor and not draws:
        yield (
            f"observer gap {observed.observer_gap:.2g}: with probes {spec} runs a different program, "
            "so the layer values are not those of the deployed one"
        )


def result_of(
    model: Model,
    run: CandidateRun,
    collected: Collected,
    layers: Sequence[Layer],
    notes: Iterable[str],
    options: Options,
    model_sha256: str,
) -> TestResult:
    """The block of one test in the result.

    ``model`` is the reference's, ``model_sha256`` that of what the test runs. Raises InputError where no output was
    compared.
    """
    rows = [collected.rows[key] for key in sorted(collected.rows, key=lambda k: collected.rows[k].index)]
    by_key = {(row.component, row.onnx): row for row in rows}
    stages = [
        StageRow(
            stage.name,
            by_key[stage.last.component, stage.last.onnx],
            [r.name for r in rows if r.verdict == GUILTY and (r.component, r.onnx) in of_stage],
        )
        for stage in stage_layers(model.components, layers)
        if (of_stage := {(layer.component, layer.onnx) for layer in stage.layers})
        and (stage.last.component, stage.last.onnx) in by_key
    ]
    last = model.components[-1]
    program = run.pipeline.program(last.name)
    pairing, expected = program.pairing, [v.name for v in run.programs[last.name].graph.outputs]
    if pairing is not None:
        expected = [name for name in expected if name not in pairing.left_out]
    given = [name for name in expected if pairing is None or not pairing.lacks(name)]
    outputs = [by_key[last.name, name] for name in given if (last.name, name) in by_key]
    if not outputs:
        raise InputError(nothing_compared(run, last.name, expected))
    check_not_empty(str(run.pipeline.backend.spec), outputs)
    rtol, atol = run.tolerance
    for finding in collected.findings:
        finding.source = next((row.source for row in rows if row.source and row.name in finding.layers), "")
    return TestResult(
        backend=run.pipeline.record(),
        rows=rows,
        stages=stages,
        outputs=outputs,
        expected_outputs=expected,
        moved_outputs=dict(pairing.moved) if pairing is not None else {},
        pairing={p.name: p.pairing.to_dict() for p in run.pipeline.programs if p.pairing is not None},
        compared=sum(row.kind == "data" for row in rows),
        total=sum(layer.kind == "data" for layer in layers),
        unseen=[x.name for x in layers if x.kind == "data" and (x.component, x.onnx) not in by_key],
        rtol=rtol,
        atol=atol,
        oracle=run.oracle,
        observation=collected.observation,
        notes=[
            *filter(None, [run.pipeline.unrealised_note]),
            *nan_without_trace(rows, outputs),
            *end_notes(list(run.programs.values()), run.pipeline.programs, options.maps),
            *notes,
        ],
        programs={name: saved_name(graph, options.save) for name, graph in run.graphs.items()},
        optimizer_blame=collected.optimizer_blame,
        remainder=collected.remainder,
        attribution=collected.attribution,
        lost=list(collected.lost),
        model_sha256=model_sha256,
        findings=collected.findings,
        detections=collected.detections,
        not_run=[
            str(body)
            for ours, theirs in zip(run.programs.values(), run.pipeline.programs, strict=True)
            for body in idle_on_both(ours.flow, theirs.flow)
        ],
    )


def saved_name(graph: Graph, save: Path | None) -> str:
    """Path of a graph: relative to the saved folder if it lies there."""
    path, folder = resolved(graph.path), save and resolved(save)
    return path.relative_to(folder).as_posix() if folder and path.is_relative_to(folder) else str(path)


def nothing_compared(run: CandidateRun, component: str, expected: Sequence[str]) -> str:
    """Message that explains why there is no verdict, with the outputs of both sides."""
    program = run.pipeline.program(component)
    test_outputs = ", ".join(map(str, program.graph.outputs))
    return (
        f"{run.pipeline.backend.spec}: no output was compared: the reference has {', '.join(expected)}, "
        f"{program.graph} has {test_outputs}; --map REFERENCE=TEST pairs two of them"
    )


def coverage_of(programs: Sequence[Program]) -> dict[str, Any]:
    """Shares of the torch modules and of the deployed graphs that are accounted for, by component."""
    return {
        p.name: asdict(p.alignment.coverage())
        | {
            "absorbed": dict(p.alignment.absorbed),
            "unmatched_values": list(p.alignment.unmatched_values),
            "unmatched_modules": list(p.alignment.unmatched_modules),
        }
        for p in programs
        if p.alignment is not None
    }
