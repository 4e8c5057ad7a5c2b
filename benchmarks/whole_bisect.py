"""The whole ``cpdebug bisect MODEL --test-model OTHER`` against Polygraphy's way to compare all values of two models.

Both run in processes of their own, one after the other, on a SECOND-like network (nus-pillar02's dense part with random
weights) whose test copy has one weight scaled. Wall time and peak memory are ratios within one run:

    python benchmarks/whole_bisect.py [--size 256] [--rounds 2] [--json]

(Not ``bisect.py``: a script finds its own folder first, and ``random`` would import that instead of the standard
library's ``bisect``.)
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TARGET = 3.0
"""How many times less wall time, and less peak memory, cpdebug should take …"""
SAME_QUESTION = "cpdebug, without replay"
"""… to answer what Polygraphy answers: how far are all values apart? The other rows also judge and explain layers."""


def make_models(folder: Path, size: int) -> tuple[Path, Path]:
    """The network on a ``size`` × ``size`` canvas, and a copy with one convolution 2 % too strong."""
    import numpy as np
    import onnx
    import torch
    from onnx import numpy_helper

    from cp_debug.programs.export import export
    from cp_debug.recipes.centerpoint.config import get_config
    from cp_debug.recipes.centerpoint.model import BackboneNeckHead, build_model

    config = get_config("nus-pillar02")
    module = BackboneNeckHead(build_model(config)).eval()
    names = {"input_names": ["spatial_features"], "output_names": config.output_names}
    reference = export(module, (torch.zeros(1, 64, size, size),), folder / "reference.onnx", **names)
    model = onnx.load(reference)
    weight = next(t for t in model.graph.initializer if len(t.dims) == 4 and t.dims[0] == 128)
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * np.float32(1.02), weight.name))
    onnx.save(model, folder / "test.onnx")
    return reference, folder / "test.onnx"


def with_polygraphy(folder: Path, reference: Path, test: Path) -> list[list[str]]:
    """Polygraphy's commands that compare all values of two models."""
    polygraphy = [str(Path(sys.executable).with_name("polygraphy")), "run"]
    marked, saved = ["--onnxrt", "--onnx-outputs", "mark", "all"], str(folder / "outputs.json")
    return [
        [*polygraphy, str(reference), *marked, "--save-outputs", saved],
        [*polygraphy, str(test), *marked, "--load-outputs", saved],
    ]


def measure(*commands: list[str]) -> tuple[float, float]:
    """(seconds, peak MiB) of commands run one after the other. 0 and 1 are good exit codes: 1 is a divergence."""
    seconds, peak = 0.0, 0.0
    for command in commands:
        start = time.perf_counter()
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
            assert process.stdout is not None
            output = process.stdout.read()
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        seconds += time.perf_counter() - start
        peak = max(peak, usage.ru_maxrss / 1024)
        if process.returncode not in (0, 1) or "[!]" in output:
            sys.exit(f"{' '.join(command)}\n{output[-2000:]}")
    return seconds, peak


def main() -> None:
    """Run both, print the table, exit 1 when a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=256, help="canvas, cells along one side")
    parser.add_argument("--rounds", type=int, default=2, help="best of so many, interleaved")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    found: dict[str, tuple[float, float]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        reference, test = make_models(folder, args.size)
        cpdebug = [sys.executable, "-m", "cp_debug", "bisect", str(reference), "--test-model", str(test)]
        cpdebug += ["-b", "ort,ort-none@cpu"]
        ways = {
            "cpdebug": [cpdebug],
            "cpdebug, without causes": [[*cpdebug, "--no-explain"]],
            "cpdebug, without replay": [[*cpdebug, "--no-replay"]],
            "polygraphy": with_polygraphy(folder, reference, test),
        }
        for _ in range(args.rounds):
            for way, commands in ways.items():
                seconds, peak = measure(*commands)
                before = found.get(way, (seconds, peak))
                found[way] = min(before[0], seconds), min(before[1], peak)
    theirs = found["polygraphy"]
    ratios = {way: (theirs[0] / s, theirs[1] / p) for way, (s, p) in found.items()}
    if args.json:
        print(json.dumps({way: {"seconds": s, "peak_mib": p, "ratios": ratios[way]} for way, (s, p) in found.items()}))
    else:
        print(f"{'':<26}{'seconds':>10}{'peak MiB':>10}{'× faster':>10}{'× smaller':>11}")
        for way, (s, p) in found.items():
            print(f"{way:<26}{s:>10.1f}{p:>10.0f}{ratios[way][0]:>10.1f}{ratios[way][1]:>11.1f}")
    sys.exit(min(ratios[SAME_QUESTION]) < TARGET)


if __name__ == "__main__":
    main()
