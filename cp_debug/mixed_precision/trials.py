"""Trials: a model with some layers kept in higher precision, the figures against a reference, and the log of a search.

Layers are groups of ONNX nodes in a search, and the calibrated layers in a sensitivity profile.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from typing_extensions import TypedDict

from cp_debug.detection.boxes import Predictions
from cp_debug.detection.changes import compare_detections
from cp_debug.detection.evaluation import ConfidenceInterval, EvaluationOptions, draws_of
from cp_debug.errors import InputError
from cp_debug.files import Journal, check_target
from cp_debug.mixed_precision.goal import DETECTIONS, Goal, without_counts
from cp_debug.mixed_precision.layers import Kept
from cp_debug.probes.caveats import caveats, compare_any, why_nothing
from cp_debug.probes.statistics import TensorStats
from cp_debug.programs.scene import decode as decode_scene
from cp_debug.reading import check_file, json_text, parse_json, sealed, typed, unsealed
from cp_debug.recipes.abilities import DetectsBoxes
from cp_debug.recipes.base import Arrays, Model, Sample
from cp_debug.serialize import JsonForm, decode


@dataclass(frozen=True)
class Measured:
    """Figures of one set of kept layers, against the reference."""

    figures: dict[str, float] = field(default_factory=dict)
    """``rel_l2`` of the worst output; on graphs also ``max_abs`` and figures of detections that the goal asks for."""
    outputs: dict[str, float] = field(default_factory=dict)
    """Final output → relative L2 distance, infinite where it is not finite: on graphs of the worst sample, under fake
    quantizers over all samples."""
    draws: Mapping[str, np.ndarray] = field(default_factory=dict, compare=False, metadata={"omit": True})
    """mAP and NDS in each draw of the samples [1 + draws], where the runner scores them."""

    @property
    def error(self) -> float:
        """Root mean square over the outputs, so that each counts alike whatever its unit."""
        return math.sqrt(sum(value**2 for value in self.outputs.values()) / len(self.outputs))

    def change(self, name: str, before: Measured) -> ConfidenceInterval:
        """Rise of a score over ``before``, drawn on the same samples."""
        return ConfidenceInterval.of(self.draws[name] - before.draws[name])


@dataclass(frozen=True)
class Trial(JsonForm):
    """One set of kept layers and its figures."""

    nodes: frozenset[tuple[str, str]] = field(metadata={"key": "kept"})
    """(Component, node) of everything that was kept."""
    layers: int
    emulated: bool
    """Whether it ran on the emulator in place of the backend."""
    measured: Measured = field(metadata={"inline": True})
    seconds: float
    latency: float | None = None
    """Duration of a pass on the device in seconds, where the backend tells."""
    error: str = ""
    """Reason why it could not be built; then nothing was measured."""


def nodes_in(kept_groups: Kept) -> frozenset[tuple[str, str]]:
    """(Component, node) of a set of layers: its name in the log, however layers are grouped."""
    return frozenset((group.component, node) for group in kept_groups for node in group.nodes)


SCHEMA = "cpdebug.search-log/1"


class _FusedLayer(TypedDict):
    name: str
    nodes: list[str]


class TrialLog:
    """The trials of one search; with a ``path`` each is on disk before the next begins."""

    def __init__(self, path: Path | None = None, about: Mapping[str, Any] = MappingProxyType({})) -> None:
        """``about``: what the search depends on, JSON-safe. Raises InputError for the log of another search."""
        self._journal: Journal | None = None
        self.trials: dict[tuple[bool, frozenset[tuple[str, str]]], Trial] = {}
        self.engine: dict[str, list[dict[str, Any]]] = {}
        """Component → layers (``name``, ``nodes``) of the engine with nothing kept, where the backend tells."""
        if path is None:
            return
        header = parse_json(json_text({"schema": SCHEMA, **about}), str(path))
        check_file(path, "log") if path.exists() else check_target(path)
        self._journal = Journal(path, f"--log: {path}", f"{sealed(header)}\n".encode())
        self._read(self._journal, header)

    def add(self, trial: Trial) -> None:
        """Keep a trial."""
        self.trials[trial.emulated, trial.nodes] = trial
        self._write(trial.to_dict())

    def add_engine(self, layers: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
        """Keep the layers that the engine fused."""
        self.engine = {
            c: [{"name": e["name"], "nodes": list(e["nodes"])} for e in layers_of_component]
            for c, layers_of_component in layers.items()
        }
        self._write({"engine": self.engine})

    def _write(self, document: Mapping[str, Any]) -> None:
        if self._journal is not None:
            self._journal.append(document)

    def _read(self, journal: Journal, header: Mapping[str, Any]) -> None:
        path = journal.path
        try:
            first, *documents = [unsealed(line, f"line {n}") for n, line in enumerate(journal.lines(), 1)]
            different = [key for key in header if first[key] != header[key]]
            for document in documents:
                if "engine" in document:
                    self.engine = typed(dict[str, list[_FusedLayer]], document["engine"], "engine")
                else:
                    trial = decode(Trial, document, "trial")
                    if not trial.error and "rel_l2" not in trial.measured.figures:
                        raise ValueError("a trial lacks the figure rel_l2")
                    self.trials[trial.emulated, trial.nodes] = trial
            named = [set(t.measured.figures) for t in self.trials.values() if t.measured.figures]
            if others := [names for names in named if names != named[0]]:
                raise ValueError(f"one trial has the figures {sorted(named[0])}, another {sorted(others[0])}")
        except (InputError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"--log: {path} is not the log of a search ({error}); give another file") from None
        if different:
            parts = ", ".join(f"{key} {first[key]!r}, now {header[key]!r}" for key in different)
            raise InputError(f"--log: {path} belongs to another search ({parts}); give another file")
        journal.repair()


Results = Mapping[str, Arrays]
"""Component → output name → array."""


class Judge:
    """Measures against the reference's results, one a sample.

    Raises InputError for a reference with NaN in its outputs, or without a finite number in any of them, a goal on
    detections of a model that has none, and for ``map_drop`` without ground truth. Inf is a value like others: a test
    must have it at the same places.
    """

    def __init__(self, model: Model, samples: Sequence[Sample], reference: Sequence[Results], goal: Goal) -> None:
        self._model, self._samples, self._last = model, samples, model.components[-1].name
        self._outputs = [results[self._last] for results in reference]
        self._counts = sorted(goal.figures.intersection(DETECTIONS))
        self._scored = "map_drop" in goal.figures
        self._decoded: list[Any] = []
        own: dict[str, list[TensorStats]] = {}
        """Output → what the reference holds there, by sample."""
        for sample, outputs in zip(samples, self._outputs, strict=True):
            for name, array in outputs.items():
                own.setdefault(name, []).append(stats := compare_any(array, array))
                if stats.nan_ref:
                    raise InputError(
                        f"{sample.source}: the reference's output {name} holds {stats.nan_ref} NaN of {stats.count} "
                        "elements, so no goal can be judged by it; give other inputs"
                    )
        if why := why_nothing(own):
            raise InputError(f"{model.name}: no goal can be judged: {why}; give other inputs")
        self._notes = caveats(own)
        if self._counts or self._scored:
            self._decoded = [decode_scene(model, *pair) for pair in zip(samples, reference, strict=True)]
            if not all(isinstance(decoded, DetectsBoxes) for decoded in self._decoded):
                raise without_counts(model.name)
        if self._scored and any(sample.truth is None for sample in samples):
            raise InputError("--goal: map_drop needs samples with ground truth; give an info file with --data")

    @property
    def notes(self) -> list[str]:
        """Remarks that a reader of the figures must know."""
        empty = self._decoded and not any(len(decoded.scores) for decoded in self._decoded)
        says = ["the reference detects nothing on these samples, so there is nothing to lose"] if empty else []
        return [*self._notes, *says]

    def measure(self, results: Sequence[Results]) -> Measured:
        """Figures of one run over all samples. Raises InputError for a run that lacks an output."""
        outputs: dict[str, float] = {}
        largest = 0.0
        for reference, test in zip(self._outputs, results, strict=True):
            if missing := sorted(reference.keys() - test[self._last].keys()):
                present = ", ".join(test[self._last]) or "none"
                raise InputError(f"{self._last}: the test has no output {missing[0]!r}; its outputs are {present}")
            for name, array in reference.items():
                stats = compare_any(array, test[self._last][name])
                outputs[name] = max(outputs.get(name, 0.0), _or_infinite(stats.rel_l2))
                largest = max(largest, _or_infinite(stats.max_abs))
        figures = {"rel_l2": max(outputs.values(), default=0.0), "max_abs": largest}
        if self._decoded:
            figures |= self._detections(
                [decode_scene(self._model, *pair) for pair in zip(self._samples, results, strict=True)]
            )
        return Measured(figures, outputs)

    def _detections(self, decoded: Sequence[Any]) -> dict[str, float]:
        if any(detections is None for detections in decoded):  # outputs that the decoder cannot read
            return dict.fromkeys((*self._counts, *(("map_drop",) if self._scored else ())), math.inf)
        changes = [compare_detections(a, b) for a, b in zip(self._decoded, decoded, strict=True)]
        figures = {name: float(sum(getattr(c, name.removeprefix("boxes_")) for c in changes)) for name in self._counts}
        if self._scored:
            both = (draws_of_scores(self._model, found, self._samples, 0) for found in (self._decoded, decoded))
            reference, test = (float(draws["mAP"][0]) for draws in both)
            figures["map_drop"] = 100 * (reference - test)
        return figures


def draws_of_scores(
    model: Any, detected: Sequence[DetectsBoxes], samples: Sequence[Sample], draws: int
) -> dict[str, np.ndarray]:
    """``draws_of`` the samples with these detections, float64 [1 + draws]."""
    options = EvaluationOptions(region=model.region, draws=draws)
    truths = [sample.truth for sample in samples]
    return draws_of(Predictions.gather(detected), truths, model.class_names, options)


def _or_infinite(value: float) -> float:
    return value if math.isfinite(value) else math.inf
