"""Results of one test backend over all samples, and the notes that a reader must know."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from cp_debug.bisect.finding import Finding
from cp_debug.bisect.observe import Observation
from cp_debug.bisect.optimizer_blame import OptimizerBlame
from cp_debug.bisect.replayed import EXCESS
from cp_debug.bisect.result import GUILTY, Attribution, LayerRow, Remainder
from cp_debug.bisect.verdict import oracle_is_alone
from cp_debug.detection.changes import DetectionChange, compare_detections
from cp_debug.programs.pipeline import Key
from cp_debug.recipes.abilities import DetectsBoxes
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
        """Layers that mask by another number than the reference, of which what reads it makes the same, by name."""
        self._unexplained: dict[str, None] = {}
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

    def explained(self, notes: Iterable[str]) -> None:
        """Add notes about what could not be explained in one sample."""
        self._unexplained.update(dict.fromkeys(notes))

    def notes(self, spec: str, *, draws: bool = False) -> list[str]:
        """Notes that a reader must know besides the rows. ``draws``: the program draws random numbers."""
        notes = [*_noise(spec, self._noisiest, draws=draws), *_gap(spec, self.observation, draws=draws)]
        notes += self.ways
        rows = self.rows.values()
        skipped = Counter(row.replay.skipped for row in rows if row.replay and row.replay.skipped)
        notes.extend(self._unexplained)
        guilty = {row.name for row in rows if row.verdict == GUILTY}
        undone = {name: by for name, by in self.undone.items() if name not in guilty}
        undoing = {name for names in undone.values() for name in names}
        notes.extend(both_inexact([row for row in rows if row.name not in undoing]))
        notes.extend(_undone(undone))
        notes.extend(_masks([name for name in self.masks if name not in guilty]))
        if unknown := [row.name for row in rows if row.replay and row.replay.not_emulated]:
            many = f"{amount(len(unknown), 'layer')} not emulated, so their expected error is unknown"
            notes.append(f"{many}: {some(unknown, 5)}")
        notes.extend(f"{amount(count, 'layer')} not replayed: {reason}" for reason, count in skipped.items())
        return notes


def _undone(undone: Mapping[str, Sequence[str]]) -> list[str]:
    if not undone:
        return []
    verb = "holds its result" if len(undone) == 1 else "hold their results"
    by = dict.fromkeys(name for names in undone.values() for name in names)
    return [
        f"{amount(len(undone), 'layer')} {verb} in another basis (channels permuted, rotated or scaled), and the "
        f"layers that read it undo that, so nothing is wrong: {some(undone, 4)}; undone by {some(by, 4)}"
    ]


def _masks(names: Sequence[str]) -> list[str]:
    if not names:
        return []
    verb = "masks" if len(names) == 1 else "mask"
    return [
        f"{amount(len(names), 'layer')} {verb} with another number than the reference (such as −Inf for −1e9); the "
        f"results after them are the same, so nothing is wrong: {some(names, 4)}"
    ]


def both_inexact(rows: Collection[LayerRow]) -> list[str]:
    """Sentences about layers on whose results both sides agree, and which are farther from the oracle than precision
    explains: with the same bits, and within the precision; and about layers whose captured inputs are not those that
    they read."""
    off = [r for r in rows if r.replay and (r.replay.new_nonfinite or (r.replay.excess or 0.0) > EXCESS)]
    torn = {r.name: r.replay.contradicted for r in off if r.replay and r.replay.contradicted}
    off = [r for r in off if r.name not in torn]
    alike = [r for r in off if not r.stats.equal and r.replay and oracle_is_alone(r.stats, r.replay)]
    verb = "agrees" if len(alike) == 1 else "agree"
    doubts = _contradictions(torn)
    doubts += [
        f"{amount(len(alike), 'layer')} {verb} on both sides as closely as precision "
        f"allows, but not with the oracle, which may itself be wrong there: {some([r.name for r in alike], 4)}"
    ] * bool(alike)
    inexact = [r for r in off if r.stats.equal]
    if not inexact:
        return doubts
    worst = max(inexact, key=lambda r: r.replay.excess or 0.0 if r.replay else 0.0)
    excess = (worst.replay.excess if worst.replay else None) or 0.0
    verb = "has" if len(inexact) == 1 else "have"
    names = some([r.name for r in inexact], 4)
    how = f"are inexact, up to {excess:.3g}× what precision explains ({worst.name})"
    how = how if excess > EXCESS else "have NaN or Inf where exact arithmetic has others, or numbers"
    return [*doubts, f"{amount(len(inexact), 'layer')} {verb} the same bits on both sides, but both {how}: {names}"]


def _contradictions(torn: Mapping[str, Sequence[str]]) -> list[str]:
    """The sentence about layers → their inputs that what was captured contradicts."""
    if not torn:
        return []
    have, read = ("has", "it") if len(torn) == 1 else ("have", "they")
    inputs = some(dict.fromkeys(name for names in torn.values() for name in names), 4)
    return [
        f"the captured values contradict each other: {some(torn, 4)} {have} the reference's result, which does not "
        f"follow from {inputs} as captured; that is not what {read} read: a buffer was overwritten after it had been "
        "read, or values of several runs were mixed"
    ]


def _standing_out(observation: Observation) -> tuple[float, float]:
    """Part of an observer gap that noise does not explain; then, for those where it explains all, the noise."""
    return max(observation.observer_gap - observation.noise_floor, 0.0), observation.noise_floor


def observation_notes(spec: str, observation: Observation | None, *, draws: bool = False) -> list[str]:
    """Sentences for a backend that does not agree with itself, or that probes change.

    ``draws``: its program draws random numbers, so that no two runs need be alike.
    """
    return [*_noise(spec, observation, draws=draws), *_gap(spec, observation, draws=draws)]


def _noise(spec: str, observation: Observation | None, *, draws: bool) -> Iterator[str]:
    if observation is not None and observation.first_unsteady:
        reason = (
            "another thread count changes its sums" if observation.repeats else "it is not deterministic: runs differ"
        )
        reason = "it draws random numbers: runs differ" if draws else reason
        yield f"{spec}: {reason}, first at {observation.first_unsteady} (noise floor {observation.noise_floor:.2g})"


def _gap(spec: str, observation: Observation | None, *, draws: bool) -> Iterator[str]:
    if observation is not None and observation.observer_gap > observation.noise_floor and not draws:
        yield (
            f"observer gap {observation.observer_gap:.2g}: with probes {spec} runs a different program, "
            "so the layer values are not those of the deployed one"
        )
