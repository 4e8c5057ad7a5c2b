"""``sweep ablate``: layers that cost boxes. One task gives layers of one test backend their exact values on one sample.

Merged, of every layer: the boxes that come back, and the mAP and NDS, with intervals over the samples.

A layer is given its exact values by computing it in FP32 from the inputs that it has in the test's own run, with its
weights as they are: what it introduced by itself is gone, what it inherited stays, and everything behind it goes on in
the test's precision. In INT8 it reads what is in front of its Q/DQ pairs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cp_debug.backends.base import Backend, Program
from cp_debug.detection.boxes import Floats, Predictions
from cp_debug.detection.changes import GAINED, LOST, MOVED_BOX, changes
from cp_debug.detection.evaluate import Detector, as_detector, without_boxes
from cp_debug.detection.evaluation import ConfidenceInterval, EvaluationOptions, draw_samples, draws_of, rings_of
from cp_debug.mixed_precision.goal import Goal
from cp_debug.mixed_precision.layers import FusionGroup
from cp_debug.mixed_precision.runners import BackendRunner, EmulatedRunner
from cp_debug.mixed_precision.search import emulation_device, layers_of_test, plain_program
from cp_debug.mixed_precision.trials import Judge, Results
from cp_debug.programs.pipeline import Pipeline, wants_int8
from cp_debug.programs.scene import DecodedBoxes, decode
from cp_debug.recipes.base import Model, Sample
from cp_debug.serialize import json_safe
from cp_debug.sweep.evaluating import LoggedScenes, detections_from, pack_detections, pack_scene
from cp_debug.sweep.log import Record, flat_rows, grouped
from cp_debug.sweep.prepared import Grid, Subject, load, make_backends, pick, programs_of, shared_figures
from cp_debug.sweep.spread import Outlier, PairGroup, Spread, numeric, outliers
from cp_debug.sweep.tasks import Parameters, Task

_COUNTS = ("lost", "gained", "moved")
COLUMNS = {
    **dict.fromkeys(("label", "backend", "sample", "kind", "layers"), str),
    **dict.fromkeys(("back", *_COUNTS), int),
    "error": float,
}
"""Columns of the flat table: a row for each sample and set of layers."""


def tasks(grid: Grid) -> Iterator[Task]:
    """Tasks for each model × each test backend × each sample.

    The layers are ranked on the first sample of each model, whose parameters every task has as ``first``. Raises
    InputError for unusable files, and for a model that detects nothing.
    """
    if model := grid.without_boxes():
        raise without_boxes(model)
    first: dict[str, dict[str, Any]] = {}
    for task in grid.tests("ablate"):
        params = task.params
        sample = first.setdefault(params["label"], {name: params[name] for name in ("inputs", "index", "files")})
        shown = {name: sample[name] for name in ("inputs", "index")}
        yield replace(task, params={**params, "first": shown, "files": {**sample["files"], **params["files"]}})


def task(params: Parameters) -> dict[str, Any]:
    """Run the reference and every set of layers on one sample; the result is JSON-safe.

    Raises InputError for a model that detects nothing, and for a backend whose layers cannot be told apart.
    """
    model = as_detector(load(params))
    reference, test = make_backends(params)
    sample = pick(model, params)
    ablation = _ablation(model, params, test)
    ranking = json.dumps({name: value for name, value in params.items() if name not in ("inputs", "index", "label")})
    shares = _shares(ranking)
    wanted = ablation.sets(shares, params["layers"])
    with TemporaryDirectory(prefix="cpdebug-") as scratch:
        folder = Path(scratch)
        programs = [plain_program(program, folder) for program in programs_of(params, [reference])]
        with Pipeline(model, programs, reference) as pipeline:
            exact = pipeline.run(sample)
        judge = Judge(model, [sample], [exact], Goal.parse("rel_l2<1"))
        runner = ablation.runner(sample, folder)
        found = _boxes(model, sample, exact)
        measured = [_measured(model, sample, judge, found, each, runner.run(frozenset(each.groups))[0])
                    for each in wanted]  # fmt: skip
    of_group = dict(zip(ablation.groups, shares, strict=True))
    return json_safe(
        {
            **pack_scene(model, sample, found),
            "reference": str(reference.spec),
            "backend": str(test.spec),
            "emulated": test.emulated,
            "precision": ablation.precision.name,
            "layers": len(ablation.groups),
            "shares": {each.names[0]: of_group[each.groups[0]] for each in wanted if each.kind == LAYER},
            "sets": measured,
        }
    )


def _measured(
    model: Detector, sample: Sample, judge: Judge, reference: DecodedBoxes, ablated: AblatedSet, results: Results
) -> dict[str, Any]:
    found = _boxes(model, sample, results)
    listed = changes(reference, found)
    return {
        "kind": ablated.kind,
        "layers": ablated.names if ablated.kind != ALL else [],
        "lost": sorted(change.reference for change in listed if change.kind == LOST and change.reference is not None),
        **{kind: sum(change.kind == kind for change in listed) for kind in (GAINED, MOVED_BOX)},
        "error": judge.measure([results]).figures["rel_l2"],
        "detected": None if sample.truth is None else pack_detections(found),
    }


def _boxes(model: Detector, sample: Sample, results: Results) -> DecodedBoxes:
    """Detections; none where the decoder cannot read what a broken backend gave it."""
    detected = decode(model, sample, results)
    if detected is None:
        return DecodedBoxes(np.zeros((0, 9), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int64))
    return DecodedBoxes(*(np.asarray(getattr(detected, name)) for name in ("boxes", "scores", "labels")))


def _ablation(model: Model, params: Parameters, test: Backend) -> Ablation:
    return Ablation(model, programs_of(params, [test], int8=wants_int8(test)), test)


@lru_cache(2)
def _shares(ranking: str) -> list[float]:
    """Shares of the layers on the first sample of the sweep, measured once; ``ranking``: parameters, as JSON."""
    params = json.loads(ranking)
    model = load(params)
    _, test = make_backends(params)
    sample = pick(model, params | params["first"])
    about = {name: params[name] for name in ("backends", "exporter", "folded", "calibration", "first", "files")}
    figures = shared_figures(
        Subject.of(params),
        model,
        {"shares": about},
        lambda: json_safe(_ablation(model, params, test).shares(sample)),
    )
    return [numeric(figure) for figure in figures]


def rows(record: Record) -> list[dict[str, Any]]:
    """A record as rows of ``COLUMNS``."""
    sets = record["result"]["sets"]
    lost = set(sets[0]["lost"])
    counted = ({"back": len(lost.difference(each["lost"])), "lost": len(each["lost"])} for each in sets)
    parts = (each | counts | {"layers": " ".join(each["layers"])} for each, counts in zip(sets, counted, strict=True))
    return flat_rows(COLUMNS, parts, record)


@dataclass(frozen=True)
class AblationRow:
    """Figures of a set of layers with exact values, over all samples."""

    kind: str
    """``layer``, ``first`` (the first few by share) or ``all``."""
    layers: list[str]
    """Layers of the set, ``component/name``, the largest share first; none are listed of ``all``."""
    share: float | None
    """Of a single layer: its part of the divergence of the first sample (``Ablation.shares``)."""
    back: ConfidenceInterval
    """Boxes that the test loses and finds with these layers exact."""
    lost: ConfidenceInterval
    """Boxes that are still lost."""
    gained: ConfidenceInterval
    moved: ConfidenceInterval
    error: Spread | None
    """Relative L2 error of the worst final output."""
    scores: dict[str, ConfidenceInterval] = field(metadata={"column": "Δ {}"})
    """mAP and NDS gained over the test as it is; empty without ground truth."""
    classes: dict[str, ConfidenceInterval] = field(metadata={"column": "back in {}"})
    """Class → boxes back."""
    distances: dict[str, ConfidenceInterval] = field(metadata={"column": "back in {}"})
    """Ring of distances → boxes back."""


@dataclass(frozen=True)
class PartCounts:
    """Boxes of the reference in one class or ring, and those that the test loses."""

    part: str
    boxes: int
    lost: ConfidenceInterval


@dataclass(frozen=True)
class AblationGroup(PairGroup):
    """One model on one test backend, over all samples. Counts are totals, with intervals over the samples."""

    precision: str
    layers: int
    """Layers that compute in the test's precision."""
    boxes: int
    """Boxes of the reference."""
    lost: ConfidenceInterval
    """Boxes of the reference that the test, as it is, loses."""
    gained: ConfidenceInterval
    moved: ConfidenceInterval
    error: Spread | None
    scores: dict[str, ConfidenceInterval]
    """mAP and NDS of the test less the reference's; empty without ground truth."""
    classes: list[PartCounts]
    distances: list[PartCounts]
    single: list[AblationRow]
    """Single layers, those that bring most back first."""
    together: list[AblationRow]
    """The first few layers by share, and all of them."""
    outliers: list[Outlier]
    """Samples in which the test loses or gains unusually many boxes."""
    notes: list[str]

    def table(self) -> Sequence[AblationRow]:
        """The sets of layers."""
        return [*self.single, *self.together]


def merge(records: Iterable[Record], options: EvaluationOptions, edges: Sequence[float] = ()) -> list[AblationGroup]:
    """One group for each model and test backend, in the order of the grid. ``edges``: of rings, in m."""
    return [
        _merge(label, [record["result"] for record in found], options, edges) for (label, *_), found in grouped(records)
    ]


def _merge(
    label: str, results: Sequence[Mapping[str, Any]], options: EvaluationOptions, edges: Sequence[float]
) -> AblationGroup:
    first, scenes = results[0], LoggedScenes.of(results, options)
    reference, rings = Predictions.gather(scenes.detected), rings_of(edges, scenes.options)
    weights = draw_samples(len(results), options.draws, options.seed)
    sample_of, ring_of = np.repeat(np.arange(len(results)), reference.counts), rings.of(reference.boxes)
    classes = {name: reference.labels == k for k, name in enumerate(first["classes"]) if k in reference.labels}
    distances = {name: ring_of == k for k, name in enumerate(rings.names) if k in ring_of}

    def total(by_sample: Iterable[float]) -> ConfidenceInterval:
        return ConfidenceInterval.of(weights @ np.array(list(by_sample), dtype=np.float64))

    def count(boxes: NDArray[np.bool_]) -> ConfidenceInterval:
        return total(np.bincount(sample_of[boxes], minlength=len(results)))

    def inside(boxes: NDArray[np.bool_], parts: Mapping[str, NDArray[np.bool_]]) -> dict[str, ConfidenceInterval]:
        return {name: count(boxes & part) for name, part in parts.items()}

    def lost_in(place: int) -> NDArray[np.bool_]:
        """Mask of the reference's boxes [N] that are lost with a set."""
        lost, starts = np.zeros(len(sample_of), bool), np.cumsum(reference.counts) - reference.counts
        for result, start in zip(results, starts, strict=True):
            lost[start + np.array(result["sets"][place]["lost"], np.int64)] = True
        return lost

    @lru_cache(2)
    def scored(place: int | None) -> dict[str, Floats]:
        """Scores of a set in each draw; None: of the reference."""
        if not scenes.truths:
            return {}
        found = [detections_from(r["sets"][place]["detected"]) for r in results] if place is not None else None
        predicted = reference if found is None else Predictions.gather(found)
        return draws_of(predicted, scenes.truths, scenes.classes, scenes.options)

    def gain(place: int, before: Mapping[str, Floats]) -> dict[str, ConfidenceInterval]:
        return {name: ConfidenceInterval.of(draws - before[name]) for name, draws in scored(place).items()}

    def counts(place: int) -> dict[str, Any]:
        """Fields that the test as it is and each of its sets have."""
        sets = [result["sets"][place] for result in results]
        error = Spread.of([numeric(each["error"]) for each in sets])
        changed = {name: total(each[name] for each in sets) for name in (GAINED, MOVED_BOX)}
        return {LOST: count(lost_in(place)), **changed, "error": error}

    def row(place: int) -> AblationRow:
        kind, layers, back = *(first["sets"][place][name] for name in ("kind", "layers")), test_lost & ~lost_in(place)
        return AblationRow(
            kind=kind,
            layers=layers,
            share=numeric(first["shares"][layers[0]]) if kind == LAYER else None,
            back=count(back),
            **counts(place),
            scores=gain(place, as_it_is),
            classes=inside(back, classes),
            distances=inside(back, distances),
        )

    def parts(masks: Mapping[str, NDArray[np.bool_]]) -> list[PartCounts]:
        lost = inside(test_lost, masks)
        return [PartCounts(name, int(mask.sum()), lost[name]) for name, mask in masks.items()]

    assert first["sets"][0]["kind"] == NONE
    test_lost, as_it_is = lost_in(0), scored(0)
    whole, difference = counts(0), gain(0, scored(None))
    table = [row(place) for place in range(1, len(first["sets"]))]
    notes = list(scenes.notes)
    if not scenes.truths:
        notes.append("samples without ground truth: boxes are compared with the reference's, no mAP")
    if not any(whole[name].value for name in (LOST, GAINED, MOVED_BOX)):
        notes.append("the test changes no box, so there is nothing to restore")
    changed = [float(len(result["sets"][0][LOST]) + result["sets"][0][GAINED]) for result in results]
    return AblationGroup(
        **AblationGroup.about(label, results),
        precision=first["precision"],
        layers=first["layers"],
        boxes=len(sample_of),
        **whole,
        scores=difference,
        classes=parts(classes),
        distances=parts(distances),
        single=sorted((each for each in table if each.kind == LAYER), key=_returns),
        together=[each for each in table if each.kind in (FIRST, ALL)],
        outliers=outliers(scenes.names, changed, {}),
        notes=notes,
    )


def _returns(row: AblationRow) -> tuple[float, ...]:
    """Sort key: boxes that come back, then those that are wrong no more, then the share."""
    wrong = row.lost.value + row.gained.value + row.moved.value
    return -row.back.value, wrong, -(row.share if row.share is not None else math.inf)


NONE, LAYER, FIRST, ALL = "none", "layer", "first", "all"
"""Kinds of sets: no layer, one, the first few by share, all of them."""


@dataclass(frozen=True)
class AblatedSet:
    """Layers that compute in FP32 together."""

    kind: str
    groups: tuple[FusionGroup, ...]

    @property
    def names(self) -> list[str]:
        """Names of its layers, the largest share first."""
        return [f"{group.component}/{group.name}" for group in self.groups]


class Ablation:
    """Layers of one test backend that can be given their exact values.

    ``programs`` are those that the test runs. Raises InputError for a backend whose layers cannot be told apart, and
    for a model none of whose layers computes in its precision.
    """

    def __init__(self, model: Model, programs: Sequence[Program], backend: Backend) -> None:
        self._model, self._programs, self._backend = model, programs, backend
        self.precision, self.groups = layers_of_test(model, programs, backend)
        self._emulator = EmulatedRunner(model, programs, [], self.precision, emulation_device(backend))

    def shares(self, sample: Sample) -> list[float]:
        """Share of each of ``groups`` in what the test's precision does to the final outputs of ``sample``: emulated,
        whatever the backend, by one walk backward (``EmulatedRunner.shares``).
        """
        emulator = self._emulator.on([sample])
        emulator.prepare()
        of_nodes = emulator.shares(frozenset())
        return [group.share(of_nodes) for group in self.groups]

    def sets(self, shares: Sequence[float], most: int) -> list[AblatedSet]:
        """None, each of the ``most`` layers of the largest shares, the first 2, 4, 8 … of them, and all layers."""
        order = sorted(range(len(self.groups)), key=lambda place: (-shares[place], place))
        ranked = tuple(self.groups[place] for place in order)
        most = min(most, len(ranked))
        firsts = [count for count in (*(2**k for k in range(1, most.bit_length())), most) if 1 < count < len(ranked)]
        return [
            AblatedSet(NONE, ()),
            *(AblatedSet(LAYER, (group,)) for group in ranked[:most]),
            *(AblatedSet(FIRST, ranked[:count]) for count in dict.fromkeys(firsts)),
            AblatedSet(ALL, ranked),
        ]

    def runner(self, sample: Sample, folder: Path) -> EmulatedRunner | BackendRunner:
        """Runs sets on ``sample``: on the emulator that the backend is, else on the backend, built anew for each set.

        Its ``run`` gives one result: component → output → array in the dtype that the graph declares.
        """
        if self._backend.emulated:
            return self._emulator.on([sample])
        return BackendRunner(self._model, self._programs, [sample], self.precision, self._backend, folder)
