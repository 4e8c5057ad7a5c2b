"""``sweep search``: one task is the mixed-precision search of one sample.

Merged, the results tell how often each layer is needed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from cp_debug.errors import InputError
from cp_debug.mixed_precision.goal import DETECTIONS, Goal, without_counts
from cp_debug.mixed_precision.search import MixedPrecisionOptions, search
from cp_debug.serialize import json_safe
from cp_debug.sweep.log import Record, flat_rows, grouped
from cp_debug.sweep.prepared import Grid, Subject, make_backends, opened, pick
from cp_debug.sweep.spread import PairGroup, Spread, numeric
from cp_debug.sweep.tasks import Parameters, Task

_KEPT = ("component", "layer", "ops", "introduced", "share")
COLUMNS = {**dict.fromkeys(("label", "backend", "sample", "layer"), str), "introduced": float, "share": float}
"""Columns of the flat table: a row for each sample and layer to keep."""


def tasks(grid: Grid) -> Iterator[Task]:
    """Tasks for each model × each test backend × each sample.

    Raises InputError for a goal that needs many samples at once or boxes that a model lacks, and for unusable files.
    """
    goal = Goal.parse(grid.how["goal"])
    if goal.figures.intersection(DETECTIONS) and (model := grid.without_boxes()):
        raise without_counts(model)
    if "map_drop" in goal.figures:
        raise InputError("--goal: map_drop needs many samples at once; expected figures of a single one")
    reference, *tests = grid.backends
    return grid.tasks("search", [(reference, test) for test in tests])


def task(params: Parameters) -> dict[str, Any]:
    """One whole search on one sample; the result is JSON-safe."""
    model, parts = opened(Subject.of(params))
    sample = pick(model, params)
    options = MixedPrecisionOptions(
        max_builds=params["max_builds"],
        exporter=params["exporter"],
        folded=params["folded"],
        test_model=params["test_model"] and Path(params["test_model"]),
        quantized=parts,
    )
    result = search(model, make_backends(params), Goal.parse(params["goal"]), [sample], options)
    return json_safe(
        {
            "sample": sample.source,
            **{name: getattr(result, name) for name in ("reference", "backend", "emulated", "goal", "reached")},
            **{name: getattr(result, name) for name in ("minimal", "verdict", "layers", "stopped", "notes")},
            "figures": dict(result.best.measured.figures),
            "baseline": dict(result.baseline.measured.figures),
            "trials": len(result.trials),
            "kept": [{name: layer.to_dict()[name] for name in _KEPT} for layer in result.kept],
            "keep": result.keep,
        }
    )


rows = partial(flat_rows, COLUMNS, "kept")
"""A record as rows of ``COLUMNS``."""


@dataclass(frozen=True)
class NeededLayer:
    """A layer that some sample needs."""

    component: str
    layer: str
    needed: int
    """Number of samples that need it."""
    share: Spread | None
    """Its part of the divergence with nothing kept, over all samples, NaN where it is not needed."""


@dataclass(frozen=True)
class MixedPrecisionGroup(PairGroup):
    """One model on one test backend."""

    goal: str
    reached: list[bool]
    """Whether the goal was reached, by sample."""
    kept: list[int]
    """Number of layers kept, by sample."""
    total: int
    layers: list[NeededLayer]
    keep: dict[str, list[str]]
    """Component → nodes that some sample needs: with them kept every sample's own set is. Verify it as a whole."""

    @property
    def passed(self) -> bool:
        """Whether the goal was reached on every sample."""
        return all(self.reached)


def merge(records: Iterable[Record]) -> list[MixedPrecisionGroup]:
    """One group for each model and test backend, in the order of the grid."""
    return [_merge(label, [record["result"] for record in found]) for (label, *_), found in grouped(records)]


def _merge(label: str, results: Sequence[Mapping[str, Any]]) -> MixedPrecisionGroup:
    shares: dict[tuple[str, str], dict[int, float]] = defaultdict(dict)
    keep: dict[str, dict[str, None]] = defaultdict(dict)
    for place, result in enumerate(results):
        for layer in result["kept"]:
            shares[layer["component"], layer["layer"]][place] = numeric(layer["share"])
        for component, nodes in result["keep"].items():
            keep[component] |= dict.fromkeys(nodes)
    layers = [
        NeededLayer(
            *key,
            len(share_by_sample),
            Spread.of([share_by_sample.get(place, float("nan")) for place in range(len(results))]),
        )
        for key, share_by_sample in shares.items()
    ]
    return MixedPrecisionGroup(
        **MixedPrecisionGroup.about(label, results),
        goal=results[0]["goal"],
        reached=[result["reached"] for result in results],
        kept=[len(result["kept"]) for result in results],
        total=results[0]["layers"],
        layers=sorted(layers, key=lambda row: -row.needed),
        keep={component: list(nodes) for component, nodes in keep.items()},
    )
