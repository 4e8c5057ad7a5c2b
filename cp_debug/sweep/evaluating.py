"""``sweep eval``: one task runs one backend on one sample; merged, scored as ``cpdebug eval`` scores."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np

from cp_debug.backends.base import RunRecord
from cp_debug.detection.boxes import Predictions
from cp_debug.detection.changes import DetectionChange, compare_detections
from cp_debug.detection.evaluate import Detector, as_detector, finite, without_boxes
from cp_debug.detection.evaluation import (
    EvaluationOptions,
    EvaluationResult,
    PartScores,
    by_class,
    by_distance,
    rings_of,
    score_backends,
)
from cp_debug.errors import InputError
from cp_debug.programs.pipeline import Pipeline, wants_int8
from cp_debug.programs.scene import DecodedBoxes
from cp_debug.recipes.abilities import DetectsBoxes, Remarks
from cp_debug.recipes.base import Sample
from cp_debug.recipes.data.base import Truth
from cp_debug.serialize import encode, json_safe
from cp_debug.sweep.log import Record, flat_rows, grouped
from cp_debug.sweep.prepared import Grid, load, make_backends, pick, programs_of
from cp_debug.sweep.spread import Outlier, SampleGroup, outliers
from cp_debug.sweep.tasks import Parameters, Task

BOX = ("x", "y", "z", "length", "width", "height", "yaw", "vx", "vy")
"""Columns of a detection; metres, radians, m/s; z of the bottom centre."""
_DETECTED = ("boxes", "scores", "labels")


def pack_detections(detected: DetectsBoxes) -> dict[str, Any]:
    """Detections of one sample as lists: boxes [N, 9] in metres, radians and m/s; scores and labels [N]."""
    return {name: np.asarray(getattr(detected, name)).tolist() for name in _DETECTED}


def detections_from(plain: Mapping[str, Any]) -> DecodedBoxes:
    """Detections from the lists of a record: boxes [N, 9] float32 in metres, scores [N] float32, labels [N] int64."""
    boxes = np.array(plain["boxes"], dtype=np.float32).reshape(-1, len(BOX))
    return DecodedBoxes(boxes, np.array(plain["scores"], dtype=np.float32), np.array(plain["labels"], dtype=np.int64))


def pack_scene(model: Detector, sample: Sample, detected: DetectsBoxes) -> dict[str, Any]:
    """One sample with what is detected in it as lists, by the fields of ``Truth`` in its units where it has any."""
    remarks, truth = Remarks(model), sample.truth
    remarks.see(sample)
    return {
        "sample": sample.source,
        "classes": list(model.class_names),
        "region": list(model.region),
        "remarks": remarks.sentences,
        "detected": pack_detections(detected),
        "truth": None
        if truth is None
        else {field.name: getattr(truth, field.name).tolist() for field in fields(Truth)},
    }


@dataclass(frozen=True)
class LoggedScenes:
    """What records tell of one model's samples."""

    names: list[str]
    classes: list[str]
    options: EvaluationOptions
    """Those of the sweep, in the model's region."""
    notes: list[str]
    detected: list[DecodedBoxes]
    truths: list[Truth]
    """None but where every sample has some."""

    @classmethod
    def of(cls, results: Sequence[Mapping[str, Any]], options: EvaluationOptions) -> LoggedScenes:
        """The scenes of ``pack_scene``, by sample; velocities that are unknown, "NaN" there, are NaN again."""
        remarks, first = Remarks(), results[0]
        for result in results:
            remarks.add(result["remarks"])
        known = all(result["truth"] is not None for result in results)
        return cls(
            [result["sample"] for result in results],
            first["classes"],
            replace(options, region=tuple(first["region"])),
            remarks.sentences,
            [detections_from(result["detected"]) for result in results],
            [_truth_from(result["truth"]) for result in results] if known else [],
        )


def _truth_from(plain: Mapping[str, Any]) -> Truth:
    return Truth(
        boxes=np.array(plain["boxes"], dtype=np.float32).reshape(-1, 7),
        labels=np.array(plain["labels"], dtype=np.int64),
        velocities=np.array(plain["velocities"], dtype=object).reshape(-1, 2).astype(np.float32),
        num_points=np.array(plain["num_points"], dtype=np.int64),
        attributes=np.array(plain["attributes"], dtype=np.str_),
    )


COLUMNS = {"label": str, "backend": str, "sample": str, "class": str, "score": float, **dict.fromkeys(BOX, float)}
"""Columns of the flat table: a row for each detection; z of the bottom centre."""


def tasks(grid: Grid) -> Iterator[Task]:
    """Tasks for each model × each backend, the reference too × each sample.

    Raises InputError for unusable files, and for a model that detects nothing.
    """
    if model := grid.without_boxes():
        raise without_boxes(model)
    return grid.tasks("eval", [(spec,) for spec in grid.backends])


def task(params: Parameters) -> dict[str, Any]:
    """Run one backend on one sample with ground truth; the result is JSON-safe.

    Raises InputError for a sample without ground truth.
    """
    model = as_detector(load(params))
    (backend,) = make_backends(params)
    sample = pick(model, params)
    if sample.truth is None:
        raise InputError(f"{sample.source}: has no ground truth; expected an info file (.pkl)")
    with Pipeline(model, programs_of(params, [backend], int8=wants_int8(backend)), backend) as pipeline:
        outputs = pipeline.run(sample)
        detections: Any = model.decode(sample, outputs)
        record = pipeline.record()
    last = outputs[model.components[-1].name]
    return json_safe({**pack_scene(model, sample, detections), "record": encode(record), "finite": finite(last)})


def rows(record: Record) -> list[dict[str, Any]]:
    """A record as rows of ``COLUMNS``."""
    result = record["result"]
    boxes, scores, labels = (result["detected"][name] for name in ("boxes", "scores", "labels"))
    parts = (
        {"backend": result["record"]["spec"], "class": result["classes"][label], "score": score}
        | dict(zip(BOX, box, strict=True))
        for box, score, label in zip(boxes, scores, labels, strict=True)
    )
    return flat_rows(COLUMNS, parts, record)


@dataclass(frozen=True)
class EvalGroup(SampleGroup):
    """One model on all backends, over the samples that every backend finished."""

    result: EvaluationResult = field(metadata={"inline": True})
    changes: dict[str, DetectionChange]
    """Test backend → change of the reference's detections, over all samples."""
    outliers: dict[str, list[Outlier]]
    """Test backend → samples in which unusually many boxes were lost or gained."""
    classes: list[PartScores] = field(default_factory=list, metadata={"key": "by_class"})
    distances: list[PartScores] = field(default_factory=list, metadata={"key": "by_distance"})

    @property
    def passed(self) -> bool:
        """Whether no backend detects significantly less than the reference."""
        return not self.result.worse

    def rows(self) -> list[dict[str, Any]]:
        """A row for each backend and class, one for all classes, and one for each ring of distances."""
        rows: list[Any] = self.result.to_pandas().to_dict("records")
        for part in self.distances:
            for spec, figures in part.figures.items():
                flat: dict[str, Any] = {"backend": spec, "class": "all", "distance": part.part}
                changes = {f"Δ {name}": value for name, value in part.differences.get(spec, {}).items()}
                for name, figure in (figures | changes).items():
                    flat |= figure.columns(name)
                rows.append(flat)
        return [{"model": self.label, **row} for row in rows]


def merge(records: Iterable[Record], options: EvaluationOptions, edges: Sequence[float] = ()) -> list[EvalGroup]:
    """One group for each model, in the order of the grid, whose first backend is the reference.

    ``edges``: of the rings of distances, in m. Raises InputError for edges that do not rise.
    """
    groups: dict[str, dict[str, dict[Any, Any]]] = defaultdict(dict)
    for (label, backend), found in grouped(records):
        samples = {(each["params"]["inputs"] or "", each["params"]["index"]): each["result"] for each in found}
        groups[label][backend] = samples
    merged = (_merge(label, backends, options, edges) for label, backends in groups.items())
    return [group for group in merged if group is not None]


def _merge(
    label: str, backends: Mapping[str, Mapping[Any, Any]], options: EvaluationOptions, edges: Sequence[float]
) -> EvalGroup | None:
    reference, *tests = backends
    shared = [sample for sample in backends[reference] if all(sample in backends[test] for test in tests)]
    if not shared or not tests:  # the tasks that failed say why
        return None
    results = {spec: [by_backend[sample] for sample in shared] for spec, by_backend in backends.items()}
    scenes = {spec: LoggedScenes.of(by_backend, options) for spec, by_backend in results.items()}
    first = scenes[reference]
    found = {spec: Predictions.gather(each.detected) for spec, each in scenes.items()}
    runs = {spec: (RunRecord(**results[spec][0]["record"]), predicted) for spec, predicted in found.items()}
    strange = {spec: sum(not each["finite"] for each in by_backend) for spec, by_backend in results.items()}
    scores, notes = score_backends(runs, first.truths, first.classes, first.options, strange)
    left_out = max(map(len, backends.values())) - len(shared)
    if left_out:
        notes.append(f"{left_out} samples are left out: some backend did not finish them")
    pairs = {test: list(map(compare_detections, first.detected, scenes[test].detected)) for test in tests}
    moved = {test: [float(change.lost + change.gained) for change in by_backend] for test, by_backend in pairs.items()}
    of_parts = found, first.truths, first.classes, first.options
    return EvalGroup(
        label=label,
        result=EvaluationResult(
            model=label,
            data=f"{first.names[0]} to {first.names[-1]}",
            samples=first.names,
            options=first.options,
            backends=scores,
            predictions=found,
            notes=[*first.notes, *notes],
        ),
        changes={test: sum(by_backend[1:], by_backend[0]) for test, by_backend in pairs.items()},
        outliers={test: outliers(first.names, by_backend, {}) for test, by_backend in moved.items()},
        classes=by_class(*of_parts),
        distances=by_distance(*of_parts, rings_of(edges, first.options)),
    )
