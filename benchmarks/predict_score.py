"""A prediction scored against what an engine did: is the measured error of every layer inside its interval?

    cpdebug predict MODEL --precision fp16 --target trt-8.6 --json PREDICTED.json   # without an engine
    cpdebug bisect MODEL -b torch,trt-fp16 --json RESULT.json                      # where there is one
    python benchmarks/predict_score.py PREDICTED.json RESULT.json [--backend trt-fp16] [--json FILE]
    python benchmarks/predict_score.py PREDICTED.json docs/gpu/data/h100-alone.json --network ppocr-det  # scored again

Every layer of the engine counts, none is dropped. Two figures of each: its *error* (relative L2 distance from the
reference, which needs no knowledge of how the engine fused), and what it *introduced*. Where the engine shows other
values than the prediction's layers end at, what the layers between two shown values introduce is added up as
independent errors are, and a part of a layer that the engine split has the interval of the whole, from 0 on.
``below`` and ``as fp32``: smaller than the interval's low end; of these, layers whose kernel's name says that it
computes in FP32. ``from_zero``: intervals that begin at 0, as the engine may leave the layer, or all above it, in
FP32. ``missing`` has no interval and counts as outside.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from cp_debug.backends.tensorrt.inspector import decode
from cp_debug.files import write_text
from cp_debug.prediction.result import Interval, PredictedLayer, Prediction

INSIDE, BELOW, ABOVE, MISSING = "inside", "below", "above", "missing"
NOTHING = 1e-9
"""An error that is none: the layer was computed exactly as FP32 does."""


@dataclass
class Scored:
    """One layer of the engine."""

    component: str
    value: str
    ops: str
    """Of the predicted layers that it stands for."""
    tactic: str
    arithmetic: str
    """By the kernel's name; ``?`` where it does not tell."""
    error: float
    error_interval: Interval | None
    error_is: str
    introduced: float | None
    introduced_interval: Interval | None
    introduced_is: str
    layers: int
    """Predicted layers that it stands for."""


class Score:
    """The rows of one test of a bisect against a prediction."""

    def __init__(self, prediction: Prediction, rows: Sequence[Mapping[str, Any]]) -> None:
        self._rows = [r for r in rows if r["op"] != "input" and r.get("kind", "data") == "data"]
        self._made = {(layer.component, layer.value): layer for layer in prediction.layers}
        self._inner = {(x.component, v): x for x in prediction.layers for v in x.inside}
        self._shown = {(r["component"], r["onnx"]) for r in rows}

    def rows(self) -> list[Scored]:
        """Each row of the engine, in execution order."""
        return [self._scored(row) for row in self._rows]

    def _scored(self, row: Mapping[str, Any]) -> Scored:
        key = (row["component"], row["onnx"])
        layer, split = self._made.get(key), self._inner.get(key)
        inside = self._between(key) if layer is not None else [split] if split is not None else []
        intervals = [x.introduced for x in inside if x.introduced is not None]
        introduced = Interval(
            *(math.hypot(*(getattr(i, end) for i in intervals)) for end in ("low", "expected", "high"))
        )
        if any((x.component, v) in self._shown for x in inside for v in x.inside):
            introduced = Interval(0.0, introduced.expected, introduced.high)
        error = layer.error if layer is not None else split.inside[row["onnx"]] if split is not None else None
        known = None if row.get("introduced") is None else float(row["introduced"])
        return Scored(
            row["component"],
            row["onnx"],
            " ".join("+".join(x.ops) for x in inside),
            row.get("tactic", ""),
            decode(row.get("tactic", "")).arithmetic or "?",
            float(row["rel_l2"]),
            error,
            where(float(row["rel_l2"]), error),
            known,
            introduced if inside else None,
            "" if known is None else where(known, introduced if inside else None),
            len(inside),
        )

    def _between(self, key: tuple[str, str]) -> list[PredictedLayer]:
        """The predicted layers behind the values that the engine shows, up to this one."""
        component, found, waiting = key[0], dict[str, PredictedLayer](), [key[1]]
        while waiting:
            value = waiting.pop()
            layer = self._made.get((component, value)) or self._inner.get((component, value))
            if layer is None or layer.value in found:
                continue
            found[layer.value] = layer
            waiting += [name for name in layer.reads if (component, name) not in self._shown]
        return [layer for layer in self._made.values() if layer.component == component and layer.value in found]


def where(error: float, interval: Interval | None) -> str:
    """Where a measured error lies."""
    if interval is None:
        return MISSING
    if interval.low <= error <= interval.high or (error <= NOTHING and interval.low <= NOTHING):
        return INSIDE
    return ABOVE if error > interval.high else BELOW


def summary(rows: Sequence[Scored]) -> dict[str, Any]:
    """Coverage over all layers."""
    told: dict[str, Any] = {"layers": len(rows)}
    for figure in ("error", "introduced"):
        own = [row for row in rows if getattr(row, f"{figure}_is")]
        counts = Counter(getattr(row, f"{figure}_is") for row in own)
        fp32 = [row for row in own if getattr(row, f"{figure}_is") == BELOW and row.arithmetic == "fp32"]
        found = [getattr(row, f"{figure}_interval") for row in own]
        ends = [(i.low, i.high) for i in found if i is not None]
        widths = [high / low for low, high in ends if low > NOTHING and math.isfinite(high)]
        measured = [(getattr(row, figure), i.expected) for row, i in zip(own, found, strict=True) if i and i.expected]
        ratios = [value / expected for value, expected in measured if value > NOTHING and math.isfinite(expected)]
        told[figure] = {
            "of": len(own),
            **{name: counts[name] for name in (INSIDE, BELOW, ABOVE, MISSING)},
            "as_fp32": len(fp32),
            "from_zero": sum(i is not None and i.low <= NOTHING for i in found),
            "coverage": round(counts[INSIDE] / len(own), 4) if own else None,
            "coverage_with_fp32": round((counts[INSIDE] + len(fp32)) / len(own), 4) if own else None,
            "not_above": round((counts[INSIDE] + counts[BELOW]) / len(own), 4) if own else None,
            "median_width": round(median(widths), 2) if widths else None,
            "median_measured_to_expected": round(median(ratios), 3) if ratios else None,
        }
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("prediction", type=Path)
    parser.add_argument("result", type=Path, help="what `cpdebug bisect --json` wrote, or a folder of --save")
    parser.add_argument("--backend", default="trt-fp16")
    parser.add_argument("--network", help="the result is a file of docs/gpu/data: its layers of this network")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    result = args.result / "result.json" if args.result.is_dir() else args.result
    document = json.loads(result.read_text())
    prediction = Prediction.open(args.prediction)
    if args.network:
        layers = stored(document, args.network, prediction.layers[0].component)
    else:
        layers = next(t for t in document["tests"] if t["backend"] == args.backend)["layers"]
    rows = Score(prediction, layers).rows()
    for row in rows:
        print(f"{row.value:44.44} {row.ops[:30]:30} {row.arithmetic:8}", end=" ")
        print(f"error {row.error:.2e} {_shown(row.error_interval)} {row.error_is:8}", end=" ")
        introduced = "–" if row.introduced is None else f"{row.introduced:.2e}"
        print(f"introduced {introduced} {_shown(row.introduced_interval)} {row.introduced_is}")
    told = {"model": prediction.model, "target": prediction.target, "backend": args.backend, **summary(rows)}
    print(json.dumps(told))
    if args.json:
        short = [{**asdict(row), "tactic": row.tactic[-60:]} for row in rows]
        write_text(json.dumps({"summary": told, "layers": short}, indent=1, default=str), args.json)


def stored(document: Mapping[str, Any], network: str, component: str) -> list[dict[str, Any]]:
    """The engine's layers of one network, as ``--json`` once wrote them, in rows as a bisect gives them."""
    found = document["scores"][network] if "scores" in document else document[network]
    rows = []
    for row in found["layers"]:
        if not isinstance(row, dict):  # value, arithmetic, error, its interval, introduced, its interval
            row = dict(zip(("value", "arithmetic", "error", "", "introduced"), row, strict=False))
        row = {**row, "component": component, "onnx": row["value"], "op": "", "rel_l2": row["error"]}
        rows.append({**row, "tactic": "_fused_conv_act_fp32_Accfloat" if row["arithmetic"] == "fp32" else ""})
    return rows


def _shown(interval: Interval | None) -> str:
    return "[–]" if interval is None else f"[{interval.low:.2e}, {interval.high:.2e}]"


if __name__ == "__main__":
    main()
