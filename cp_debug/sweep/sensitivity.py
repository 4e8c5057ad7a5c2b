"""``sweep sensitivity``: layers that suffer from INT8. One task shares out what it does to the outputs of a sample."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from cp_debug.files import resolved
from cp_debug.mixed_precision.sensitivity import LayerRunner, int8_runner, profile_of
from cp_debug.quantization.open_quantized import open_quantized
from cp_debug.serialize import json_safe
from cp_debug.sweep.log import Record, flat_rows, grouped
from cp_debug.sweep.prepared import Grid, Subject, calibrated, opened, pick
from cp_debug.sweep.spread import Outlier, SampleGroup, Spread, numeric, outliers
from cp_debug.sweep.tasks import Parameters, Task, digests

_FIGURES = ("introduced", "share")
COLUMNS = {**dict.fromkeys(("label", "sample", "layer", "kind"), str), **dict.fromkeys(_FIGURES, float)}
"""Columns of the flat table: a row for each sample and layer."""


def tasks(grid: Grid, quantized: Sequence[Path]) -> Iterator[Task]:
    """Tasks for each model × each quantized checkpoint × each sample. Raises InputError for unusable files."""
    for subject in grid.subjects():
        for checkpoint in quantized or (None,):
            files = {**subject["files"], **digests([checkpoint] if checkpoint else [])}
            label = subject["label"] if checkpoint is None else f"{subject['label']} · {checkpoint}"
            settings = {"label": label, "quantized": str(resolved(checkpoint)) if checkpoint else None, **grid.how}
            for cell in grid.picked(subject):
                yield Task("sensitivity", {**subject, **settings, **cell, "files": {**files, **cell["files"]}})


def task(params: Parameters) -> dict[str, Any]:
    """The shares of all layers on one sample; the result is JSON-safe."""
    quantized = params["quantized"]
    digest = quantized and params["files"][quantized]
    bench = _bench(Subject.of(params), quantized, digest, params["batches"], params["method"])
    sample = replace(pick(bench.model, params), truth=None)  # mAP of a single sample says nothing
    profile = profile_of(bench, [sample], draws=0, tried=0)
    layers = [{name: getattr(row, name) for name in ("layer", "kind", *_FIGURES)} for row in profile.layers]
    return json_safe({"sample": sample.source, "error": profile.int8.error, "layers": layers})


@lru_cache(1)
def _bench(subject: Subject, quantized: str | None, digest: str | None, batches: int, method: str) -> LayerRunner:
    """``digest`` is the checkpoint's: one that was written again is another."""
    model, _ = opened(subject)
    (example,) = model.samples(1, subject.seed, None)
    if quantized is not None:
        return int8_runner(model, open_quantized(model, Path(quantized), None, batches, method=method), example)
    settings = {"batches": batches, "method": method}
    parts = calibrated(subject, model, settings, lambda: open_quantized(model, None, None, batches, method=method))
    return int8_runner(model, parts, example)


rows = partial(flat_rows, COLUMNS, "layers")
"""A record as rows of ``COLUMNS``."""


@dataclass(frozen=True)
class SensitiveLayer:
    """One layer over the samples."""

    layer: str
    kind: str
    introduced: Spread | None
    """Relative L2 error of its own results in INT8."""
    share: Spread | None
    """Part of the outputs' divergence, all layers in INT8, that its own error makes."""


@dataclass(frozen=True)
class SensitivityGroup(SampleGroup):
    """One quantized model, each sample by itself; layers are sorted by their median share."""

    samples: list[str]
    int8: Spread | None
    """The outputs' error with all layers in INT8."""
    layers: list[SensitiveLayer]
    outliers: list[Outlier]


def merge(records: Iterable[Record]) -> list[SensitivityGroup]:
    """One group for each quantized model, in the order of the grid."""
    return [_over_samples(label, [record["result"] for record in found]) for (label, *_), found in grouped(records)]


def _over_samples(label: str, results: Sequence[dict[str, Any]]) -> SensitivityGroup:
    names, errors = [result["sample"] for result in results], [numeric(result["error"]) for result in results]
    by_sample = [{row["layer"]: row for row in result["layers"]} for result in results]
    kinds = {row["layer"]: row["kind"] for row in results[0]["layers"]}
    figures = {f: {name: [numeric(rows[name][f]) for rows in by_sample] for name in kinds} for f in _FIGURES}
    layers = [
        SensitiveLayer(name, kind, *(Spread.of(figures[figure][name]) for figure in _FIGURES))
        for name, kind in kinds.items()
    ]
    layers.sort(key=lambda row: -row.share.median if row.share else 0.0)
    return SensitivityGroup(label, names, Spread.of(errors), layers, outliers(names, errors, figures["share"]))
