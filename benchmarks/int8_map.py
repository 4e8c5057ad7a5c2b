"""What quantized checkpoints of a model score beside FP32, on the same scenes.

    cpdebug quantize ptq centerpoint:tiny -o ptq
    python benchmarks/int8_map.py ptq/model.pt qat.pt -n 50 [--model centerpoint:tiny] [--first 0] [--json FILE]

The changes of mAP and NDS come with 95 % intervals over 1000 draws of the scenes, taken draw by draw.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

from cp_debug.detection.boxes import Floats, Predictions
from cp_debug.detection.evaluate import as_detector
from cp_debug.detection.evaluation import ConfidenceInterval, EvaluationOptions, draws_of
from cp_debug.mixed_precision.sensitivity import scored_samples
from cp_debug.programs.walk import run_module
from cp_debug.quantization.models import with_modules
from cp_debug.quantization.open_quantized import modules_of, open_quantized
from cp_debug.recipes.base import Arrays, Model, Sample
from cp_debug.recipes.registry import load_model

DRAWS = 1000


def draws(model: Model, samples: list[Sample]) -> dict[str, Floats]:
    """mAP, NDS and the rest in every draw."""
    detector = as_detector(model)
    found = []
    for sample in samples:
        results: dict[str, Arrays] = {}
        for component in model.components:
            results[component.name] = run_module(component, model.feed(component, sample, results))
        found.append(detector.decode(sample, results))
    options = EvaluationOptions(region=detector.region, draws=DRAWS)
    truths = [sample.truth for sample in samples]
    return draws_of(Predictions.gather(found), truths, detector.class_names, options)  # type: ignore[arg-type]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="+", type=Path)
    parser.add_argument("--model", default="centerpoint:tiny")
    parser.add_argument("-n", "--samples", type=int, default=50)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    model = load_model(options.model)
    source, samples = scored_samples(model, None, options.samples, options.first)
    reference = draws(model, samples)
    rows = [{"model": "FP32", **{name: float(reference[name][0]) for name in ("mAP", "NDS")}}]
    print(f"{source}: FP32 mAP {rows[0]['mAP']:.4f}, NDS {rows[0]['NDS']:.4f}")
    for path in options.checkpoints:
        started = time.perf_counter()
        opened = open_quantized(model, path)
        layers = sum(len(part.scales.layers) for part in opened.values())
        scored = draws(with_modules(model, modules_of(opened)), samples)
        changes = {name: ConfidenceInterval.of(scored[name] - reference[name]) for name in ("mAP", "NDS")}
        said = ", ".join(
            f"{n} {scored[n][0]:.4f} ({c.value:+.4f} [{c.low:+.4f}, {c.high:+.4f}])" for n, c in changes.items()
        )
        print(f"{path}: {layers} layers in INT8: {said}; {time.perf_counter() - started:.0f} s", flush=True)
        rows.append({"model": str(path), "layers": layers, **{name: list(change) for name, change in changes.items()}})
    if options.json:
        options.json.write_text(
            json.dumps({"command": " ".join(["python", *sys.argv]), "data": source, "rows": rows}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
