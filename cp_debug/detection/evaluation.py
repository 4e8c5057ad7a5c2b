"""Detection metrics of several backends side by side, with confidence intervals: whole, by class, by distance."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cp_debug.backends.base import RunRecord
from cp_debug.detection.boxes import Boxes, Floats, Ints, Predictions
from cp_debug.detection.metrics import ERRORS, OVERLAPS, THRESHOLDS, Scores, score
from cp_debug.display import OnStep, Shown
from cp_debug.errors import InputError
from cp_debug.recipes.data.base import Truth
from cp_debug.serialize import JsonForm

if TYPE_CHECKING:
    import pandas as pd


CONFIDENCE = 0.95


class ConfidenceInterval(NamedTuple):
    """A figure and the range in which it falls for ``CONFIDENCE`` of the draws."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, draws: Floats) -> ConfidenceInterval:
        """The interval of a figure from its value in each draw [1 + B]; the first is that of the samples themselves.

        Draws in which it is undefined (NaN) are left out.
        """
        drawn, tail = draws[1:][~np.isnan(draws[1:])], 50 * (1 - CONFIDENCE)
        low, high = np.percentile(drawn, (tail, 100 - tail)) if len(drawn) else (draws[0], draws[0])
        return cls(float(draws[0]), float(low), float(high))

    def columns(self, name: str) -> dict[str, float]:
        """The figure as columns of a table: ``name``, and the range's ends."""
        return {name: self.value, f"{name} low": self.low, f"{name} high": self.high}


def intervals(draws: Mapping[str, Floats], less: Mapping[str, Floats] | None = None) -> dict[str, ConfidenceInterval]:
    """The interval of each figure from its values [1 + draws], with those of ``less``, of a reference, taken off."""
    return {name: ConfidenceInterval.of(each if less is None else each - less[name]) for name, each in draws.items()}


def draw_samples(samples: int, draws: int, seed: int) -> Floats:
    """Weights [1 + draws, samples]: a row of ones, then how often each sample was drawn (multinomial).

    Equal for equal arguments, so that the difference of two backends is taken draw by draw. Efron's bootstrap.
    """
    times_drawn = np.random.default_rng(seed).multinomial(samples, np.full(samples, 1 / samples), size=draws)
    return np.concatenate((np.ones((1, samples)), times_drawn))


NUSCENES_RANGES = {
    **dict.fromkeys(("car", "truck", "bus", "trailer", "construction_vehicle"), 50.0),
    **dict.fromkeys(("pedestrian", "motorcycle", "bicycle"), 40.0),
    **dict.fromkeys(("traffic_cone", "barrier"), 30.0),
}
"""Metres within which nuScenes evaluates a class. The devkit takes them from the car's centre, this from the sensor."""
_T4 = ("t4", "t4_intervals", "t4_difference")
FEW = 20
"""Number of samples below which an interval says little."""


def parse_ranges(text: str, class_names: Sequence[str], source: str = "--range") -> Mapping[str, float]:
    """Parse ``--range`` as class → metres; an empty mapping for ``model``, which means the model's own region.

    ``text`` is ``model``, ``nuscenes``, metres for all classes, or ``CLASS=METRES,…``. Raises InputError, which names
    ``source``, for anything else.
    """
    if text == "model":
        return {}
    if text == "nuscenes":
        return NUSCENES_RANGES
    entries = [entry.rpartition("=") for entry in text.split(",")]
    unknown = [name for name, sign, _ in entries if sign and name not in class_names]
    if unknown:
        raise InputError(f"{source}: the model has no class {unknown[0]!r}; its classes are {', '.join(class_names)}")
    try:
        named_ranges = [(name, float(metres)) for name, _, metres in entries]
    except ValueError:
        raise InputError(f"{source}: {text!r}; expected model, nuscenes, metres, or CLASS=METRES,…") from None
    return {class_name: metres for name, metres in named_ranges for class_name in ([name] if name else class_names)}


@dataclass(frozen=True)
class EvaluationOptions:
    """Boxes that count, and how the backends are compared.

    ranges: class → metres from the sensor, for predictions and truth; of other classes those in ``region`` (x0, y0, x1,
    y1; None: everywhere) count. min_points: objects with fewer points do not. draws, seed: of the bootstrap. max_drop:
    mAP that a backend may lose. t4: T4's metric besides, by ``perception_eval``.
    """

    ranges: Mapping[str, float] = field(default_factory=dict)
    region: tuple[float, float, float, float] | None = None
    min_points: int = 1
    draws: int = 1000
    seed: int = 0
    max_drop: float = 0.01
    t4: bool = False

    @property
    def farthest(self) -> float:
        """Distance in m for metrics that know one for all classes: the largest of ``ranges``, else the region's."""
        x0, y0, x1, y1 = self.region or (-np.inf, -np.inf, np.inf, np.inf)
        return max(self.ranges.values(), default=max(-x0, -y0, x1, y1))

    def counts(self, boxes: Boxes, class_names: Sequence[str]) -> NDArray[np.bool_]:
        """Mask [N] of boxes in range. One that is nowhere (NaN) counts, so that it is not forgiven."""
        x, y = boxes.centers.T
        x0, y0, x1, y1 = self.region or (-np.inf, -np.inf, np.inf, np.inf)
        inside = (x >= x0) & (x <= x1) & (y >= y0) & (y <= y1)
        ranges = np.array([self.ranges.get(name, np.inf) for name in class_names])[boxes.labels]
        within = np.linalg.norm(boxes.centers, axis=1) < ranges
        return np.where(np.isfinite(ranges), within, inside) | np.isnan(x + y)


@dataclass(frozen=True)
class BackendScores(JsonForm):
    """One backend's figures; ``difference`` is to the reference, None for the reference itself."""

    backend: RunRecord = field(metadata={"inline": True})
    detections: int
    summary: dict[str, ConfidenceInterval] = field(metadata={"written": False})
    difference: dict[str, ConfidenceInterval] | None = field(metadata={"written": False})
    classes: dict[str, dict[str, Any]] = field(metadata={"written": False})
    """Class → figure → value; ``AP`` is a ``ConfidenceInterval``."""
    not_finite: int = 0
    """Number of samples on which an output held NaN or Inf."""
    t4: dict[str, float] = field(default_factory=dict, metadata={"written": False})
    """T4's metric, where it was asked for, by T4MetricV2's names."""
    t4_intervals: dict[str, ConfidenceInterval] = field(default_factory=dict, metadata={"written": False})
    """Intervals of T4's metric, where there are some."""
    t4_difference: dict[str, ConfidenceInterval] = field(default_factory=dict, metadata={"written": False})
    """Differences of T4's metric from the reference; empty for the reference itself."""

    def dropped(self, max_drop: float) -> list[str]:
        """The names of each mAP that is lower by more than ``max_drop``, which chance in the choice of samples does
        not explain: ``mAP``, and T4's by distance of centres and of planes."""
        changes = {"mAP": self.difference["mAP"]} if self.difference is not None else {}
        changes |= {name: change for name, change in self.t4_difference.items() if name.startswith("mAP_")}
        return [name for name, change in changes.items() if change.value < -max_drop and change.high < 0]

    def worse(self, max_drop: float) -> bool:
        """Whether some mAP is lower than the reference's, by ``dropped``."""
        return bool(self.dropped(max_drop))

    def derived(self) -> dict[str, Any]:
        """The spec, and all figures: an interval is value, low, high; an undefined figure is None."""
        figures: dict[str, Any] = {"summary": self.summary, "difference": self.difference, "classes": self.classes}
        figures |= {key: value for key in _T4 if (value := getattr(self, key))}
        record = {"backend": self.backend.spec, "precision": str(self.backend.precision)}
        return record | {key: _plain(value) for key, value in figures.items()}

    @classmethod
    def fields_from(cls, document: dict[str, Any]) -> dict[str, Any]:
        """The document with its figures as they were: intervals, and NaN for an undefined figure."""
        return document | {
            key: _figures(document[key]) for key in ("summary", "difference", "classes", *_T4) if key in document
        }


@dataclass(frozen=True, repr=False)
class EvaluationResult(JsonForm, Shown):
    """Everything that ``cpdebug eval`` shows. The first backend is the reference."""

    model: str
    data: str
    samples: list[str]
    options: EvaluationOptions = field(metadata={"inline": True})
    backends: list[BackendScores]
    predictions: dict[str, Predictions] = field(default_factory=dict, metadata={"omit": True})
    """Spec → detections; ``save_predictions`` writes them."""
    notes: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def worse(self) -> list[str]:
        """Specs of the backends that detect significantly less than the reference, or give NaN on more samples."""
        most = next((reference.not_finite for reference in self.backends), 0)
        return [
            scores.backend.spec
            for scores in self.backends
            if scores.worse(self.options.max_drop) or scores.not_finite > most
        ]

    def derived(self) -> dict[str, Any]:
        """The backends that are worse, and the confidence of every interval."""
        return {"worse": self.worse, "confidence": CONFIDENCE}

    def to_pandas(self) -> pd.DataFrame:
        """A row for each backend and class, and one for all classes (``class`` is ``all``)."""
        import pandas as pd

        rows = []
        for scores in self.backends:
            for name, figures in scores.classes.items():
                rows.append({"backend": scores.backend.spec, "class": name, **_columns(figures)})
            difference = {f"Δ {name}": value for name, value in (scores.difference or {}).items()}
            rows.append({"backend": scores.backend.spec, "class": "all", **_columns({**scores.summary, **difference})})
        return pd.DataFrame(rows)


def _plain(value: Any) -> Any:
    if isinstance(value, ConfidenceInterval):
        return {name: _plain(number) for name, number in value._asdict().items()}
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    return None if isinstance(value, float) and np.isnan(value) else value


def _figures(value: Any) -> Any:
    """The figures of which ``_plain`` and JSON made ``value``, in containers like its own."""
    if not isinstance(value, dict):
        return float(value) if isinstance(value, str) else value
    figures = {name: math.nan if item is None else _figures(item) for name, item in value.items()}
    return ConfidenceInterval(**figures) if figures.keys() == set(ConfidenceInterval._fields) else figures


def _columns(figures: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in figures.items():
        if isinstance(value, ConfidenceInterval):
            flat |= value.columns(name)
        else:
            flat[name] = value
    return flat


def draws_of(
    predicted: Predictions, truths: Sequence[Truth], class_names: Sequence[str], options: EvaluationOptions
) -> dict[str, Floats]:
    """mAP and NDS in each draw of the samples, float64 [1 + draws]; the first is of the samples themselves."""
    truth, _ = objects_that_count(truths, class_names, options)
    weights = draw_samples(len(truths), options.draws, options.seed)
    scores = score(boxes_that_count(predicted, class_names, options), truth, class_names, weights).summary()
    return {name: scores[name] for name in ("mAP", "NDS")}


def score_backends(
    predictions: Mapping[str, tuple[RunRecord, Predictions]],
    truths: Sequence[Truth],
    class_names: Sequence[str],
    options: EvaluationOptions,
    not_finite: Mapping[str, int] | None = None,
    on_step: OnStep = lambda text, done, total: None,
) -> tuple[list[BackendScores], list[str]]:
    """Figures of all backends, the reference first, and notes on the ground truth that they were scored on.

    ``not_finite``: spec → number of samples on which an output held NaN or Inf. ``on_step`` is told the frames of T4's
    metric, which takes long.
    """
    truth, notes = objects_that_count(truths, class_names, options)
    weights = draw_samples(len(truths), options.draws, options.seed)
    listed: list[BackendScores] = []
    reference: dict[str, Floats] = {}
    for record, predicted in predictions.values():
        boxes = boxes_that_count(predicted, class_names, options)
        if strange := (not_finite or {}).get(record.spec, 0):
            notes.append(f"{record.spec}: the outputs hold NaN or Inf on {strange} of {len(truths)} samples")
        if not boxes.finite.all():
            notes.append(f"{record.spec}: {np.sum(~boxes.finite)} detections hold NaN or Inf; they count as false")
        if not len(boxes):
            notes.append(f"{record.spec}: no detections in the evaluated range")
        scores = score(boxes, truth, class_names, weights)
        draws = scores.summary()
        difference = intervals(draws, reference) if reference else None
        reference = reference or draws
        listed.append(
            BackendScores(
                record,
                len(boxes),
                intervals(draws),
                difference,
                _class_figures(scores, boxes, truth, class_names),
                strange,
            )
        )
    if options.t4:
        from cp_debug.detection.t4_metric import t4_figures

        found = {record.spec: predicted for record, predicted in predictions.values()}
        figures, more = t4_figures(
            found,
            truths,
            class_names,
            distance=options.farthest,
            min_points=options.min_points,
            weights=weights,
            on_step=on_step,
        )
        first = figures[listed[0].backend.spec]
        listed = [_with_t4(each, figures[each.backend.spec], None if each is listed[0] else first) for each in listed]
        notes += more
    return listed, notes


def _with_t4(
    scores: BackendScores, draws: Mapping[str, Floats], reference: Mapping[str, Floats] | None
) -> BackendScores:
    """The scores with T4's metric in each draw; ``reference``, that of the reference, for every other backend."""
    values = {name: float(each[0]) for name, each in draws.items()}
    if any(len(each) == 1 for figures in (draws, reference or {}) for each in figures.values()):
        return replace(scores, t4=values)
    differences = {} if reference is None else intervals(draws, reference)
    return replace(scores, t4=values, t4_intervals=intervals(draws), t4_difference=differences)


def boxes_that_count(predicted: Predictions, class_names: Sequence[str], options: EvaluationOptions) -> Boxes:
    """A backend's boxes in range."""
    boxes = predicted.as_boxes(class_names)
    return boxes.take(options.counts(boxes, class_names))


def objects_that_count(
    truths: Sequence[Truth], class_names: Sequence[str], options: EvaluationOptions
) -> tuple[Boxes, list[str]]:
    """Objects of the ground truth that count, and notes about the others.

    ``truths``: of each sample; boxes are in metres and radians.
    """
    names = ("boxes", "velocities", "labels", "num_points", "attributes")
    boxes, velocities, labels, points, attributes = (
        np.concatenate([getattr(truth_of_sample, name) for truth_of_sample in truths]) for name in names
    )
    samples = np.repeat(np.arange(len(truths)), [len(truth_of_sample.labels) for truth_of_sample in truths])
    truth = Boxes.of(np.column_stack((boxes, velocities)), samples, labels, np.ones(len(labels)), attributes)
    notes = []
    if not truth.finite.all():
        notes.append(f"{np.sum(~truth.finite)} objects of the ground truth hold NaN or Inf; left out")
    enough = (points >= options.min_points) | (points < 0)
    truth = truth.take(truth.finite & enough & options.counts(truth, class_names))
    absent = [name for label, name in enumerate(class_names) if label not in truth.labels]
    if absent:
        notes.append(f"no object of {', '.join(absent)}: AP 0 and errors 1, as in the devkit")
    if not (truth.attributes != "").any():
        notes.append("the ground truth has no attributes: mAAE is 1 and NDS at most 0.9, as in the devkit")
    if len(truths) < FEW:
        notes.append(f"{len(truths)} samples are few, so the intervals are wide")
    return truth, notes


def _class_figures(scores: Scores, boxes: Boxes, truth: Boxes, class_names: Sequence[str]) -> dict[str, dict[str, Any]]:
    figures: dict[str, dict[str, Any]] = {}
    for label, name in enumerate(class_names):
        figures[name] = {
            "objects": int((truth.labels == label).sum()),
            "detections": int((boxes.labels == label).sum()),
            "found": int(scores.found[0, label]),
            "AP": ConfidenceInterval.of(scores.precisions[:, label].mean(axis=1)),
            **{
                f"AP@{limit}": float(value)
                for limit, value in zip(THRESHOLDS, scores.precisions[0, label], strict=True)
            },
            **{kind: float(value) for kind, value in zip(ERRORS, scores.errors[0, label], strict=True)},
            **{f"BEV AP@{limit}": float(value) for limit, value in zip(OVERLAPS, scores.bev[0, label], strict=True)},
            **{f"3D AP@{limit}": float(value) for limit, value in zip(OVERLAPS, scores.volume[0, label], strict=True)},
        }
    return figures


RINGS = 3
"""Rings into which the region is cut where nobody names their edges."""


@dataclass(frozen=True)
class Rings:
    """Distances from the sensor, seen from above, in consecutive rings; the last has no end."""

    edges: tuple[float, ...]
    """Metres at which one ring ends and the next begins, rising."""

    @property
    def names(self) -> list[str]:
        """Names of the rings, the nearest first."""
        edges = [f"{edge:g}" for edge in self.edges]
        return [*(f"{near}–{far} m" for near, far in zip(["0", *edges], edges, strict=False)), f"from {edges[-1]} m"]

    def of(self, centers: ArrayLike) -> Ints:
        """Ring [N] of each centre [N, 2 or more] in m; one that is nowhere (NaN) is in the last."""
        distances = np.linalg.norm(np.asarray(centers, dtype=np.float64)[:, :2], axis=1)
        return np.searchsorted(np.array(self.edges), distances, side="right")


def rings_of(edges: Sequence[float], options: EvaluationOptions) -> Rings:
    """Rings with these ``edges`` in m; without any, ``RINGS`` of equal width as far as boxes count.

    Raises InputError for edges that do not rise from above 0.
    """
    if edges:
        if any(far <= near for near, far in zip([0.0, *edges], edges, strict=False)):
            given = ",".join(f"{edge:g}" for edge in edges)
            raise InputError(f"--distances: {given}; expected metres that rise, as in 20,40")
        return Rings(tuple(edges))
    farthest = options.farthest
    if not np.isfinite(farthest):
        return Rings((20.0, 40.0))
    return Rings(tuple(round(farthest * place / RINGS, 1) for place in range(1, RINGS)))


@dataclass(frozen=True)
class PartScores(JsonForm):
    """Figures of all backends on one class, or in one ring of distances."""

    part: str
    """Name of the class, or of the ring."""
    objects: int
    """Objects of the ground truth in it."""
    figures: dict[str, dict[str, ConfidenceInterval]]
    """Backend → figure: ``AP`` of a class; ``mAP`` and ``NDS`` of a ring, over the classes that have objects there."""
    differences: dict[str, dict[str, ConfidenceInterval]]
    """Test backend → figure less the reference's, drawn on the same samples."""


def by_class(
    predictions: Mapping[str, Predictions],
    truths: Sequence[Truth],
    class_names: Sequence[str],
    options: EvaluationOptions,
) -> list[PartScores]:
    """AP of each class; the first of ``predictions`` (backend → detections) is the reference."""
    truth, _ = objects_that_count(truths, class_names, options)
    scores = {spec: _scores(boxes_that_count(each, class_names, options), truth, class_names, options, len(truths))
              for spec, each in predictions.items()}  # fmt: skip
    return [
        _part(
            name,
            int((truth.labels == label).sum()),
            {spec: {"AP": each.precisions[:, label].mean(axis=1)} for spec, each in scores.items()},
        )
        for label, name in enumerate(class_names)
    ]


def by_distance(
    predictions: Mapping[str, Predictions],
    truths: Sequence[Truth],
    class_names: Sequence[str],
    options: EvaluationOptions,
    rings: Rings,
) -> list[PartScores]:
    """mAP and NDS in each ring that has objects; the first of ``predictions`` is the reference.

    Detections and objects are in the ring where their own centre is, as nuScenes' range of a class has it: a pair
    across an edge counts as one missed and one false. Means are over the classes with objects in the ring.
    """
    truth, _ = objects_that_count(truths, class_names, options)
    boxes = {spec: boxes_that_count(each, class_names, options) for spec, each in predictions.items()}
    parts = []
    for place, name in enumerate(rings.names):
        objects = truth.take(rings.of(truth.centers) == place)
        present = np.unique(objects.labels)
        if not len(present):
            continue
        draws = {}
        for spec, of_backend in boxes.items():
            inside = of_backend.take(rings.of(of_backend.centers) == place)
            scores = _scores(inside, objects, class_names, options, len(truths))
            chosen = Scores(*(getattr(scores, figure.name)[:, present] for figure in fields(Scores)))
            draws[spec] = {figure: values for figure, values in chosen.summary().items() if figure in ("mAP", "NDS")}
        parts.append(_part(name, len(objects), draws))
    return parts


def _scores(boxes: Boxes, truth: Boxes, class_names: Sequence[str], options: EvaluationOptions, samples: int) -> Scores:
    return score(boxes, truth, class_names, draw_samples(samples, options.draws, options.seed))


def _part(name: str, objects: int, draws: Mapping[str, Mapping[str, Floats]]) -> PartScores:
    reference, *tests = draws
    figures = {spec: intervals(each) for spec, each in draws.items()}
    return PartScores(name, objects, figures, {spec: intervals(draws[spec], draws[reference]) for spec in tests})
