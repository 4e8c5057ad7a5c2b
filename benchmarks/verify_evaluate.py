"""What deploy's verify and evaluate cost beyond the forward passes that they make, on ``centerpoint:tiny``.

A forward pass is what the pipeline does for one scene on one of the backends: voxelization, components, scatter and
decoding. It is timed where it happens, within the two stages, so that other work on the machine spoils both sides of
the ratio alike. All the rest is their cost: reading the files, opening sessions, the noise floor (a pass in FP64), the
interface checks, comparisons, scoring with 1000 bootstrap draws. Making the synthetic scenes, which stands for the
reading of clouds, is a row of its own.

    python benchmarks/verify_evaluate.py [--backends torch,ort,emu-fp16] [--samples 50] [--rounds 1] [--json]

Target: at most 20 % of the forward passes.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from cp_debug.deploy.interface_checks import InterfaceChecks
from cp_debug.deploy.schema import DeployConfig, EvaluateConfig, ScenarioConfig, VerifyConfig
from cp_debug.deploy.stages import Deployment
from cp_debug.programs.pipeline import Pipeline
from cp_debug.recipes.centerpoint.recipe import CenterPointModel
from cp_debug.recipes.data.open_data import SyntheticData

TARGET = 0.2
CHECKS = ("points", "input_features", "pillar_features", "spatial_features")
"""Methods of ``InterfaceChecks`` that run within a verified pass."""


class Stopwatch:
    """Adds up (wall, processor) seconds by name, and how often."""

    def __init__(self) -> None:
        self.seconds: dict[str, np.ndarray] = {}
        self.calls: dict[str, int] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.perf_counter(), time.process_time()
        yield
        spent = np.subtract((time.perf_counter(), time.process_time()), start)
        self.seconds[name] = self.seconds.get(name, 0) + spent
        self.calls[name] = self.calls.get(name, 0) + 1

    def method(self, owner: type, method: str, name: Callable[[Any], str]) -> Any:
        """A patch that times a method; ``name`` is given the object."""
        original = getattr(owner, method)

        def timed(this: Any, *args: Any, **kwargs: Any) -> Any:
            with self(name(this)):
                return original(this, *args, **kwargs)

        return patch.object(owner, method, timed)


def measure(specs: Sequence[str], samples: int, rounds: int) -> dict[str, Any]:
    """Everything that is printed."""
    reference, *tests = specs
    watch = Stopwatch()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        scenarios = [ScenarioConfig(reference=reference, test=test) for test in tests]
        config = DeployConfig(
            model="centerpoint:tiny",
            work_dir=Path(folder),
            verify=VerifyConfig(scenarios=scenarios),
            evaluate=EvaluateConfig(samples=samples, backends=list(specs)),
        )
        deployment = Deployment(config, "benchmark")
        deployment.export()
        deployment.verify(explain=False)  # libraries are loaded and kernels chosen
        known = [str(deployment.backend(spec).spec) for spec in specs]

        def kind(pipeline: Pipeline) -> str:
            return "components" if str(pipeline.backend.spec) in known else "noise floor"

        stack.enter_context(watch.method(Pipeline, "run", kind))
        stack.enter_context(watch.method(CenterPointModel, "decode", lambda model: "decoding"))
        stack.enter_context(watch.method(SyntheticData, "sample", lambda data: "making the scenes"))
        for check in CHECKS:
            stack.enter_context(watch.method(InterfaceChecks, check, lambda checks: "interface checks"))
        for _ in range(rounds):
            with watch("verify"):
                deployment.verify(explain=False)
            with watch("evaluate"):
                result = deployment.evaluate()
    spent = watch.seconds
    passes = spent["components"] + spent["decoding"] - spent["interface checks"]
    beyond = spent["verify"] + spent["evaluate"] - passes
    ratio = (beyond - spent["making the scenes"]) / passes
    return {
        "backends": known,
        "samples": len(result.samples),
        "passes": watch.calls["components"],
        "threads": torch.get_num_threads(),
        "seconds": {
            "verify": _named(spent["verify"]),
            "evaluate": _named(spent["evaluate"]),
            "of these forward passes": _named(passes),
            "making the scenes": _named(spent["making the scenes"]),
            "noise floor": _named(spent["noise floor"]),
            "interface checks": _named(spent["interface checks"]),
        },
        "scoring_wall_s": result.seconds["score"],
        "ratio": _named(ratio),
        "ratio_with_scenes": _named(beyond / passes),
        "met": bool((ratio <= TARGET).all()),
    }


def _named(pair: np.ndarray) -> dict[str, float]:
    return dict(zip(("wall", "cpu"), map(float, pair.round(4)), strict=True))


def main() -> None:
    """Measure and print a table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backends", default="torch,ort,emu-fp16", help="the first one is the reference")
    parser.add_argument("--samples", type=int, default=50, help="held-out scenes to evaluate (default 50)")
    parser.add_argument("--rounds", type=int, default=1, help="how often both stages run (default 1)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    options = parser.parse_args()
    result = measure(options.backends.split(","), options.samples, options.rounds)
    if options.json:
        print(json.dumps(result, indent=1))
        return
    title = f"{', '.join(result['backends'])}: {result['passes']} forward passes, {result['threads']} threads"
    table = Table("", "wall s", "processor s", title=title)
    for part, seconds in result["seconds"].items():
        table.add_row(part, f"{seconds['wall']:.2f}", f"{seconds['cpu']:.2f}")
    table.add_section()
    for name, key in (("beyond the passes", "ratio"), ("… with making the scenes", "ratio_with_scenes")):
        table.add_row(name, *(f"{each:.1%}" for each in result[key].values()))
    console = Console()
    console.print(table)
    console.print(f"target at most {TARGET:.0%}: {'met' if result['met'] else 'MISSED'}")


if __name__ == "__main__":
    main()
