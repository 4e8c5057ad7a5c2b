"""``sweep bisect``: one task bisects one test backend on one sample; merged, figures of each layer over the samples."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from cp_debug.bisect.engine import Options, bisect
from cp_debug.bisect.result import GUILTY, nonfinite_origins
from cp_debug.detection.changes import DetectionChange
from cp_debug.programs.pipeline import wants_int8
from cp_debug.recipes.abilities import with_samples
from cp_debug.serialize import decode, encode, json_safe
from cp_debug.sweep.log import Record, flat_rows, group_of, grouped
from cp_debug.sweep.prepared import Grid, load, make_backends, pick, programs_of
from cp_debug.sweep.spread import Outlier, PairGroup, Spread, numeric, outliers
from cp_debug.sweep.tasks import Parameters, Task

FIGURES = ("rel_l2", "introduced", "excess")
"""Figures of a layer whose spread over the samples is reported."""
MAP_LAYERS, MAP_COLUMNS = 60, 160
"""Rows and columns that a heat map has at most."""
_KEPT = {
    "index": int,
    "component": str,
    "name": str,
    "onnx": str,
    "op": str,
    "max_abs": float,
    "rel_l2": float,
    "introduced": float,
    "inherited": float,
    "expected": float,
    "excess": float,
    "noise_floor": float,
    "share": float,
    "verdict": str,
    "why": str,
}
"""Entries of a layer's row that are kept."""
COLUMNS = {"label": str, "reference": str, "backend": str, "sample": str, **_KEPT}
"""Columns of the flat table: a row for each sample and layer."""


def tasks(grid: Grid) -> Iterator[Task]:
    """Tasks for each model × each test backend × each sample. Raises InputError for unusable files."""
    return grid.tests("bisect")


def task(params: Parameters) -> dict[str, Any]:
    """Bisect one test backend on one sample; the result is JSON-safe."""
    backends = make_backends(params)
    model = load(params)
    options = Options(
        seed=params["seed"],
        rtol=params["rtol"],
        atol=params["atol"],
        explain=params["explain"],
        exporter=params["exporter"],
        folded=params["folded"],
    )
    quantized = programs_of(params, backends, int8=True) if wants_int8(backends[1]) else None
    result = bisect(
        with_samples(model, [pick(model, params)]),
        backends,
        test_model=None if quantized is None else lambda programs, folder: quantized,
        programs=programs_of(params, backends),
        options=options,
    )
    (test,) = result.tests
    rows = (row.to_dict() for row in test.rows)
    # Where NaN and Inf are born, without their number, which differs from sample to sample.
    strange = ["; ".join(["a final output is not finite", *nonfinite_origins(test.rows)])] if test.not_finite else []
    return {
        "sample": result.samples[0],
        "reference": result.reference.spec,
        "backend": test.backend.spec,
        "emulated": test.backend.emulated,
        "agrees": test.agrees,
        "final": json_safe(max((row.stats.rel_l2 for row in test.outputs), default=0.0)),
        "detections": encode(test.detections),
        "causes": sorted({finding.cause for finding in test.findings}),
        "notes": [*test.notes, *test.caveats, *strange],
        "layers": [{name: row[name] for name in _KEPT} for row in rows],
    }


rows = partial(flat_rows, COLUMNS, "layers")
"""A record as rows of ``COLUMNS``."""


@dataclass(frozen=True)
class LayerSpread:
    """One layer over the samples."""

    index: int
    component: str
    name: str
    onnx: str
    op: str
    guilty: int
    """Number of samples on which it is guilty."""
    samples: int
    figures: dict[str, Spread | None]


@dataclass(frozen=True)
class HeatMap:
    """Excess of layers over samples, for a picture."""

    layers: list[str]
    """Layers with the highest excess, at most ``MAP_LAYERS``, in execution order."""
    width: int
    """Consecutive samples in a column; the last column may have fewer."""
    excess: list[list[float | None]]
    """Row of a layer → the highest excess of each column's samples; None where none has one."""

    @classmethod
    def of(cls, excess: Mapping[str, Sequence[float]]) -> HeatMap | None:
        """``excess``: layer → a figure for each sample, NaN where there is none. None for fewer than two samples."""
        names, values = [*excess], np.array([*excess.values()])
        if values.shape[-1] < 2:
            return None
        width = -(-values.shape[1] // MAP_COLUMNS)
        kept = sorted(np.argsort(-np.fmax.reduce(values, 1, initial=0.0), kind="stable")[:MAP_LAYERS])
        highest = np.fmax.reduceat(values[kept], range(0, values.shape[1], width), 1)
        shown = [[None if math.isnan(figure) else figure for figure in row] for row in highest.tolist()]
        return cls([names[place] for place in kept], width, shown)


@dataclass(frozen=True)
class BisectGroup(PairGroup):
    """One model on one test backend, over all samples."""

    agreeing: int
    """Samples on which the backend agrees with the reference."""
    final: Spread | None
    """The largest relative L2 divergence of the final outputs."""
    layers: list[LayerSpread]
    outliers: list[Outlier]
    causes: dict[str, int]
    """Cause → number of samples on which it was found."""
    detections: DetectionChange | None
    notes: dict[str, int]
    map: HeatMap | None = None

    @property
    def passed(self) -> bool:
        """Whether the backend agrees on every sample."""
        return self.agreeing == len(self.samples)

    @property
    def guilty(self) -> list[LayerSpread]:
        """The layers that are guilty on some sample, most often first."""
        return sorted((row for row in self.layers if row.guilty), key=lambda row: (-row.guilty, row.index))

    def derived(self) -> dict[str, Any]:
        """The outcome, and the names of the guilty layers."""
        return {**super().derived(), "guilty": [row.name for row in self.guilty]}


@dataclass
class _Tally:
    """Figures of a layer so far, by place of the sample in the grid: no row is held, of which a log may have many."""

    row: Mapping[str, Any]
    guilty: int = 0
    figures: dict[str, dict[int, float]] = field(default_factory=lambda: {name: {} for name in FIGURES})


def merge(records: Iterable[Record]) -> list[BisectGroup]:
    """One group for each model and test backend, in the order of the grid."""
    layers: dict[tuple[str, ...], dict[tuple[str, str], _Tally]] = defaultdict(dict)

    def without_layers(record: Record) -> Record:
        for row in record["result"]["layers"]:
            tally = layers[group_of(record)].setdefault((row["component"], row["onnx"]), _Tally(row))
            tally.guilty += row["verdict"] == GUILTY
            for name, values in tally.figures.items():
                values[record["place"]] = numeric(row[name])
        return record | {"result": {name: value for name, value in record["result"].items() if name != "layers"}}

    return [_merge(found, layers[group].values()) for group, found in grouped(map(without_layers, records))]


def _merge(records: Sequence[Record], layers: Iterable[_Tally]) -> BisectGroup:
    results = [record["result"] for record in records]
    tallies = sorted(layers, key=lambda tally: (tally.row["index"], tally.row["onnx"]))
    figures = [
        {name: [values.get(record["place"], math.nan) for record in records] for name, values in tally.figures.items()}
        for tally in tallies
    ]
    of_layer = {name: {t.row["name"]: f[name] for t, f in zip(tallies, figures, strict=True)} for name in FIGURES}
    names, final = [result["sample"] for result in results], [numeric(result["final"]) for result in results]
    change = [decode(DetectionChange, r["detections"], "detections") for r in results if r["detections"]]
    causes = Counter(cause for result in results for cause in result["causes"])
    return BisectGroup(
        **BisectGroup.about(records[0]["params"]["label"], results),
        agreeing=sum(result["agrees"] for result in results),
        final=Spread.of(final),
        layers=[
            LayerSpread(
                **{name: tally.row[name] for name in ("index", "component", "name", "onnx", "op")},
                guilty=tally.guilty,
                samples=len(tally.figures["rel_l2"]),
                figures={name: Spread.of(values) for name, values in layer_figures.items()},
            )
            for tally, layer_figures in zip(tallies, figures, strict=True)
        ],
        outliers=outliers(names, final, of_layer["introduced"]),
        causes=dict(sorted(causes.items(), key=lambda item: (-item[1], item[0]))),
        detections=sum(change[1:], change[0]) if change else None,
        notes=dict(sorted(Counter(note for result in results for note in result["notes"]).items())),
        map=HeatMap.of(of_layer["excess"]),
    )
