"""Sensitivity of layers to INT8: the share of each in what it does to the outputs, and what leaving it out gives.

All shares come from one walk backward a sample (``bisect/backward.py``); the layers with the largest are left out, one
by one, and the model is run.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cp_debug.detection.bootstrap import ConfidenceInterval
from cp_debug.errors import InputError
from cp_debug.mixed_precision.layer_runner import KeptLayers, LayerRunner, OnStep
from cp_debug.mixed_precision.strategy import smallest
from cp_debug.mixed_precision.trial import Measured
from cp_debug.recipes.abilities import HasClasses, HasData
from cp_debug.recipes.base import Model, Sample
from cp_debug.recipes.data.base import DataOptions, DataSet, iterate
from cp_debug.recipes.data.open_data import DEFAULT_OPTIONS
from cp_debug.serialize import JsonForm

if TYPE_CHECKING:
    import pandas as pd

TRIED = 16
"""Layers that are left out one by one."""
DRAWS = 200
METRIC = "mAP"
"""Score that a budget limits the loss of, where the model detects; else it limits the outputs' relative L2 error."""


@dataclass(frozen=True)
class Int8Effect(JsonForm):
    """Effect of INT8 on the model."""

    error: float
    """Relative L2 of the outputs against FP32, root mean square over them."""
    scores: Mapping[str, ConfidenceInterval] = field(metadata={"written": False})
    """Change of mAP and NDS where the model detects: against FP32, or for a left-out layer against all in INT8."""

    @property
    def sqnr(self) -> float:
        """Signal to quantization noise of the outputs, in dB."""
        return -20 * math.log10(self.error) if self.error else math.inf

    def derived(self) -> dict[str, Any]:
        """The error in dB, and the change of each score as value, low and high."""
        return {"sqnr_db": self.sqnr, **self.scores}

    @classmethod
    def fields_from(cls, document: dict[str, Any]) -> dict[str, Any]:
        """The document with what is neither ``error`` nor ``sqnr_db`` under ``scores``."""
        return document | {"scores": {k: v for k, v in document.items() if k not in ("error", "sqnr_db")}}


@dataclass(frozen=True)
class LayerSensitivity:
    """What one layer's precision does."""

    layer: str
    kind: str
    weights: int
    introduced: float
    """Relative L2 error of its own results."""
    share: float
    """Part of the outputs' divergence, all layers in INT8, that its own error makes."""
    left_out: Int8Effect | None
    """All in INT8 but this layer; None where that was not tried, as its share is small."""

    @property
    def severity(self) -> tuple[float, ...]:
        """Sort key, larger is worse: mAP that leaving it out surely gives back, then the error without it, smaller
        first, then its share where that was not tried."""
        if self.left_out is None:
            return 0.0, -math.inf, self.share
        change = self.left_out.scores.get(METRIC)
        return max(change.low, 0.0) if change else 0.0, -self.left_out.error, self.share


@dataclass(frozen=True)
class Choice:
    """The layers that stay in FP32 so that a budget is kept, and what was measured with them."""

    budget: float
    skipped: list[str]
    loss: ConfidenceInterval
    """mAP lost against FP32; the outputs' relative L2 error for a model that detects nothing."""
    tried: int
    """Number of sets of layers that were run on all samples."""


@dataclass(frozen=True)
class SensitivityProfile(JsonForm):
    """All layers, the most sensitive first."""

    model: str
    data: str
    samples: int
    layers: list[LayerSensitivity]
    int8: Int8Effect
    """All layers in INT8."""
    scores: Mapping[str, float] = field(metadata={"key": "fp32"})
    """mAP and NDS in FP32; empty for a model that detects nothing."""
    choice: Choice | None = field(default=None, metadata={"key": "auto"})
    seconds: float = 0.0
    precision: str = "int8"
    """Precision of the layers, as a backend spec has it; where ``int8`` stands elsewhere, this is meant."""
    notes: list[str] = field(default_factory=list)
    """Sentences about layers whose shares are not complete, and why."""

    def to_pandas(self) -> pd.DataFrame:
        """A pandas DataFrame with a row for each layer."""
        import pandas as pd

        rows = []
        for row in self.layers:
            names = ("layer", "kind", "weights", "introduced", "share")
            flat: dict[str, Any] = {name: getattr(row, name) for name in names}
            if row.left_out is not None:
                flat |= {"left_out_error": row.left_out.error, "left_out_sqnr_db": row.left_out.sqnr}
                for name, change in row.left_out.scores.items():
                    bounds = zip(("", "_low", "_high"), change, strict=True)
                    flat |= {f"left_out_{name}{bound}": value for bound, value in bounds}
            rows.append(flat)
        return pd.DataFrame(rows)


def profile_of(
    runner: LayerRunner,
    samples: Sequence[Sample],
    *,
    data: str = "",
    budget: float | None = None,
    draws: int = DRAWS,
    tried: int = TRIED,
    on_step: OnStep = lambda text, done, total: None,
) -> SensitivityProfile:
    """Measure every layer of ``runner`` on ``samples``, with its precision emulated.

    Samples with ground truth are scored where the model detects. ``budget`` also chooses the layers to leave in FP32
    (``choose_layers``). ``draws`` of the samples give the intervals. ``tried``: layers that are left out one by one,
    the largest shares first. Raises InputError where there is no sample, or a budget of mAP meets samples without
    ground truth.
    """
    started, model = time.perf_counter(), runner.model
    check_samples(samples)
    unknown = [sample.source for sample in samples if sample.truth is None]
    if budget is not None and unknown and isinstance(model, HasClasses):
        raise InputError(f"--auto: {unknown[0]} has no ground truth, so mAP is unknown; expected an info file (.pkl)")
    on_step("shares of all layers", 0, len(samples))
    shares = runner.shares(samples)
    ranked = sorted(runner.layers, key=lambda name: -shares[name].share)
    alone = {name: frozenset([name]) for name in ranked[:tried]}
    sets = dict.fromkeys([runner.all, frozenset(), *alone.values()])
    measured = runner.measure(samples, sets, draws=draws, on_step=on_step)
    exact, low = measured[runner.all], measured[frozenset()]
    layers = [
        LayerSensitivity(
            name,
            runner.layers[name].kind,
            runner.layers[name].weights,
            shares[name].introduced,
            shares[name].share,
            _effect(measured[alone[name]], low) if name in alone else None,
        )
        for name in ranked
    ]
    profile = SensitivityProfile(
        model.name,
        data,
        len(samples),
        sorted(layers, key=lambda row: row.severity, reverse=True),
        _effect(low, exact),
        {score: float(values[0]) for score, values in exact.draws.items()},
        precision=runner.precision,
        notes=list(dict.fromkeys(runner.notes)),
    )
    if budget is not None:
        profile = replace(profile, choice=choose_layers(runner, samples, profile, budget, draws=draws, on_step=on_step))
    return replace(profile, seconds=time.perf_counter() - started)


def check_samples(samples: Sequence[Sample]) -> None:
    """Raise InputError where there is no sample to measure on."""
    if not samples:
        raise InputError("--data: there is no sample; expected at least one")


def scored_samples(
    model: Model, data: Path | None, count: int, first: int = 0, options: DataOptions = DEFAULT_OPTIONS
) -> tuple[str, list[Sample]]:
    """(Name of the data, at most ``count`` samples of them); samples have ground truth where the data have it."""
    if isinstance(model, HasData):
        opened: DataSet = model.data(data, count, first, options)
        return opened.name, list(iterate(opened))
    return data.name if data else f"seed {first}", list(model.samples(count, first, data))


def _effect(test: Measured, before: Measured) -> Int8Effect:
    return Int8Effect(test.error, {score: test.change(score, before) for score in test.draws})


def check_budget(budget: float) -> None:
    """Raise InputError for a budget that nothing can keep."""
    if not budget > 0:
        raise InputError(f"--auto is {budget:g}; expected a positive budget")


def choose_layers(
    runner: LayerRunner,
    samples: Sequence[Sample],
    profile: SensitivityProfile,
    budget: float,
    *,
    draws: int = 1000,
    on_step: OnStep = lambda text, done, total: None,
) -> Choice:
    """Few layers to leave in FP32 so that the rest loses at most ``budget`` mAP on ``samples``.

    The most sensitive are taken first, 1, 2, 4 … of them, until the budget is kept; then each that is not needed is
    given back. Every set is run on all samples. For a model that detects nothing, ``budget`` is the relative L2 error
    of the outputs. Raises InputError for a budget that nothing can keep.
    """
    check_budget(budget)
    ranked = [row.layer for row in profile.layers]
    sizes = [0, *(2**k for k in range(len(ranked).bit_length()) if 2**k < len(ranked)), len(ranked)]
    firsts = [frozenset(ranked[:size]) for size in sizes]
    measured = runner.measure(samples, dict.fromkeys(firsts), draws=draws, on_step=on_step)

    def loss(kept_layers: KeptLayers) -> ConfidenceInterval:
        if kept_layers not in measured:
            measured.update(runner.measure(samples, [kept_layers], draws=draws, on_step=on_step))
        return _loss(measured[kept_layers], measured[runner.all])

    def extend(grown: Sequence[str]) -> list[str]:
        return ranked[len(grown) : next((size for size in sizes if size > len(grown)), len(ranked))]

    smallest_set = smallest(lambda kept_layers: loss(kept_layers).value <= budget, extend)  # all in FP32 lose nothing
    chosen = ranked if smallest_set is None else smallest_set
    return Choice(budget, chosen, loss(frozenset(chosen)), len(measured))


def _loss(test: Measured, reference: Measured) -> ConfidenceInterval:
    if METRIC not in test.draws:
        return ConfidenceInterval(test.error, test.error, test.error)
    return ConfidenceInterval.of(reference.draws[METRIC] - test.draws[METRIC])


def get_sensitive_layers(profile: SensitivityProfile, budget: float) -> list[str]:
    """The layers to leave in FP32, as the profile alone predicts it; ``choose_layers`` runs them.

    These are the most sensitive ones until the others, their losses added up, are within ``budget`` (mAP, or the
    outputs' relative L2 error).
    """
    limit, left = budget, profile.int8.error
    gains: dict[str, float] = {}
    if METRIC in profile.int8.scores:
        left = -profile.int8.scores[METRIC].value
        gains = {row.layer: max(row.left_out.scores[METRIC].value, 0.0) for row in profile.layers if row.left_out}
    else:  # squares of errors add up
        limit, left = budget**2, left**2
        gains = {row.layer: max(row.share, 0.0) * left for row in profile.layers}
    taken: list[str] = []
    for row in profile.layers:
        if left - sum(gains.get(name, 0.0) for name in taken) <= limit:
            break
        taken.append(row.layer)
    return taken
