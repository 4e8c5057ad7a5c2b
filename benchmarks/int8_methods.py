"""What each way to choose scales leaves of a model's outputs: SQNR in dB, all in INT8 and with layers left in FP32.

    python benchmarks/int8_methods.py [--model centerpoint:tiny] [--skip-layers pts_voxel_encoder] [--samples 100]
        [--json FILE]

From the root mean square of the outputs' relative errors, on 10 samples that nothing was calibrated on; of a component
that others read the outputs do not count.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path

from cp_debug.quantization.histogram import METHODS
from cp_debug.quantization.models import output_sqnr, quantize_model
from cp_debug.quantization.open_quantized import calibration_samples, modules_of
from cp_debug.recipes.registry import load_model

HELD_OUT, FIRST = 10, 3000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="centerpoint:tiny")
    parser.add_argument("--skip-layers", default="pts_voxel_encoder")
    parser.add_argument("--samples", type=int, default=100)
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    model = load_model(options.model)
    calibrated_on = list(calibration_samples(model, None, options.samples))
    held_out = list(model.samples(HELD_OUT, FIRST, None))
    last = model.components[-1].name
    rows = []
    for method in options.methods:
        for skipped in ((), (options.skip_layers,)):
            started = time.process_time()
            modules = modules_of(quantize_model(model, calibrated_on, method=method, skip_layers=skipped))
            seconds = time.process_time() - started
            found = output_sqnr(model, modules, held_out)
            errors = [10 ** (-value / 10) for name, value in found.items() if name.startswith(f"{last}/")]
            said = f"without {skipped[0]}" if skipped else "all"
            sqnr = -10 * math.log10(sum(errors) / len(errors))
            print(f"{method}, {said}: {sqnr:.1f} dB, {seconds:.0f} s", flush=True)
            rows.append({"method": method, "skipped": list(skipped), "sqnr_db": sqnr, "outputs_db": dict(found)})
            rows[-1]["cpu_seconds"] = seconds
    if options.json:
        document = {
            "command": " ".join(["python", *sys.argv]),
            "model": options.model,
            "held_out": HELD_OUT,
            "rows": rows,
        }
        options.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
