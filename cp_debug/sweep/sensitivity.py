"""``sweep sensitivity``: layers that suffer from INT8.

One task measures all layers on one sample, or a share of the layers on all samples.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from cp_debug.files import resolved
from cp_debug.mixed_precision.fake_quant_runner import FakeQuantRunner
from cp_debug.mixed_precision.sensitivity import (
    ALONE,
    LEFT_OUT,
    SensitivityProfile,
    merge_trials,
    profile_trials,
    run_trials,
    scored_samples,
)
from cp_debug.quantization.open_quantized import modules_of, open_quantized
from cp_debug.serialize import JsonForm, json_safe
from cp_debug.sweep.grid import Grid
from cp_debug.sweep.log import Record, grouped
from cp_debug.sweep.prepared import Subject, calibrated, load_subject, pick
from cp_debug.sweep.spread import Outlier, Spread, columns, numeric, outliers
from cp_debug.sweep.tasks import Parameters, Task, digests

SHARES = 16
"""Number of tasks for a model when layers are shared out."""
_FIGURES = ("introduced", "error")
COLUMNS = {**dict.fromkeys(("label", "sample", "mode", "layer", "kind"), str), **dict.fromkeys(_FIGURES, float)}
"""Columns of the flat table: a row for each trial."""


def tasks(grid: Grid, quantized: Sequence[Path], *, by_layers: bool) -> Iterator[Task]:
    """Tasks for each model × each quantized checkpoint × each sample, or × each share of the layers.

    Raises InputError for unusable files.
    """
    for subject in grid.subjects():
        for checkpoint in quantized or (None,):
            files = {**subject["files"], **digests([checkpoint] if checkpoint else [])}
            label = subject["label"] if checkpoint is None else f"{subject['label']} · {checkpoint}"
            settings = {"label": label, "quantized": str(resolved(checkpoint)) if checkpoint else None, **grid.how}
            if by_layers:
                inputs = None if grid.inputs is None else str(resolved(grid.inputs))
                files |= digests([grid.inputs] if grid.inputs and grid.inputs.is_file() else [])
                about: dict[str, Any] = {"inputs": inputs, "index": 0, "count": grid.samples, "shares": SHARES}
                cells: list[dict[str, Any]] = [{**about, "share": share, "files": {}} for share in range(SHARES)]
            else:
                cells = [{**cell, "count": 1, "shares": 1, "share": 0} for cell in grid.picked(subject)]
            for cell in cells:
                yield Task("sensitivity", {**subject, **settings, **cell, "files": {**files, **cell["files"]}})


def task(params: Parameters) -> dict[str, Any]:
    """Run the trials of one task; the result is JSON-safe.

    Shares of the layers are scored too, where the model detects.
    """
    quantized = params["quantized"]
    digest = quantized and params["files"][quantized]
    bench = _bench(Subject.of(params), quantized, digest, params["batches"], params["method"])
    trials = profile_trials(bench.layers)[params["share"] :: params["shares"]]
    if params["shares"] == 1:
        sample = replace(pick(bench.model, params), truth=None)  # mAP of a single sample says nothing
        source, samples = sample.source, [sample]
    else:
        inputs = None if params["inputs"] is None else Path(params["inputs"])
        source, samples = scored_samples(bench.model, inputs, params["count"], params["seed"])
    return json_safe({"sample": source, "rows": run_trials(bench, samples, trials, data=source, draws=params["draws"])})


@lru_cache(1)
def _bench(subject: Subject, quantized: str | None, digest: str | None, batches: int, method: str) -> FakeQuantRunner:
    """``digest`` is the checkpoint's: one that was written again is another."""
    model = load_subject(subject)
    if quantized is not None:
        return FakeQuantRunner(model, modules_of(open_quantized(model, Path(quantized), None, batches, method=method)))
    settings = {"batches": batches, "method": method}
    parts = calibrated(subject, model, settings, lambda: open_quantized(model, None, None, batches, method=method))
    return FakeQuantRunner(model, modules_of(parts))


def rows(record: Record) -> list[dict[str, Any]]:
    """A record as rows of ``COLUMNS``."""
    about = {"label": record["params"]["label"], "sample": record["result"]["sample"]}
    return [
        about | {n: row.get(n) for n in ("mode", "layer", "kind")} | {n: numeric(row.get(n)) for n in _FIGURES}
        for row in record["result"]["rows"]
    ]


@dataclass(frozen=True)
class SensitiveLayer:
    """One layer's errors over the samples, relative L2.

    introduced: its own result in INT8. alone: the outputs with it alone in INT8. left_out: the outputs with it alone in
    FP32.
    """

    layer: str
    kind: str
    introduced: Spread | None
    alone: Spread | None
    left_out: Spread | None


@dataclass(frozen=True)
class SensitivityGroup(JsonForm):
    """One quantized model, each sample by itself; layers are sorted by the median error that they bring alone."""

    label: str
    samples: list[str]
    int8: Spread | None
    """The outputs' error with all layers in INT8."""
    layers: list[SensitiveLayer]
    outliers: list[Outlier]

    @property
    def passed(self) -> bool:
        """True: nothing is judged here."""
        return True

    def rows(self) -> list[dict[str, Any]]:
        """A row for each layer."""
        return [
            {"model": self.label, "layer": row.layer, "kind": row.kind}
            | columns("introduced", row.introduced, self.samples)
            | columns(ALONE, row.alone, self.samples)
            | columns(LEFT_OUT, row.left_out, self.samples)
            for row in self.layers
        ]


@dataclass(frozen=True)
class ProfileGroup(JsonForm):
    """One quantized model on all samples together, as ``cpdebug quantize sensitivity`` measures it."""

    label: str
    profile: SensitivityProfile = field(metadata={"inline": True})

    @property
    def passed(self) -> bool:
        """True: nothing is judged here."""
        return True

    def rows(self) -> list[dict[str, Any]]:
        """A row for each layer."""
        return [{"model": self.label, **row} for row in self.profile.to_pandas().to_dict("records")]  # type: ignore[dict-item]


def merge(records: Iterable[Record]) -> list[SensitivityGroup | ProfileGroup]:
    """One group for each quantized model, in the order of the grid.

    It is a profile where the layers were shared out, and left out where a share failed.
    """
    return [
        _over_samples(label, found) if found[0]["params"]["shares"] == 1 else ProfileGroup(label, _together(found))
        for (label, *_), found in grouped(records)
        if found[0]["params"]["shares"] in (1, len(found))
    ]


def _together(records: Sequence[Record]) -> SensitivityProfile:
    profile = merge_trials(row for record in records for row in record["result"]["rows"])
    return replace(profile, seconds=sum(record["seconds"] for record in records))


def _over_samples(label: str, records: Sequence[Record]) -> SensitivityGroup:
    names = [record["result"]["sample"] for record in records]
    rows_by_sample = [{(row["mode"], row.get("layer")): row for row in record["result"]["rows"]} for record in records]

    def figures(mode: str, layer: str | None, figure: str = "error") -> list[float]:
        return [numeric(rows[mode, layer][figure]) for rows in rows_by_sample]

    kinds = {row["layer"]: row["kind"] for row in rows_by_sample[0].values() if row["mode"] == ALONE}
    layers = [
        SensitiveLayer(
            name,
            kind,
            Spread.of(figures(ALONE, name, "introduced")),
            Spread.of(figures(ALONE, name)),
            Spread.of(figures(LEFT_OUT, name)),
        )
        for name, kind in kinds.items()
    ]
    layers.sort(key=lambda row: -row.alone.median if row.alone else 0.0)
    int8_errors = figures("int8", None)
    return SensitivityGroup(
        label,
        names,
        Spread.of(int8_errors),
        layers,
        outliers(names, int8_errors, {name: figures(ALONE, name) for name in kinds}),
    )
