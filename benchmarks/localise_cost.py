"""What a bisect costs, in multiples of running both backends once with every probe, on a SECOND network."""

from __future__ import annotations

import resource
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from random_graphs import second_net

from cp_debug.backends.registry import create
from cp_debug.backends.spec import BackendSpec
from cp_debug.bisect.engine import Options, bisect
from cp_debug.programs.pipeline import Pipeline, prepare
from cp_debug.recipes.base import Model
from cp_debug.recipes.onnx_file import OnnxFileModel

PAIRS = (("ort,ort-all", "fp64"), ("ort,emu-fp16", "fp32"), ("ort,emu-tf32", "fp32"))
"""Backends, and the oracle that judges them."""
ROUNDS = 5


def bisect_and_runs(model: Model, backends: str, oracle: str, folder: Path) -> list[Callable[[], Any]]:
    """The whole bisect of a model on one sample, then the run of each backend with every probe."""
    (sample,) = model.samples(1, 0, None)
    model.samples = lambda *options: iter([sample])  # type: ignore[method-assign]
    programs = prepare(model, sample, folder)

    def run(backend: str) -> None:
        with Pipeline(model, programs, create(BackendSpec.parse(backend))) as pipeline:
            pipeline.run(sample, lambda key, tensor: None)

    return [
        partial(bisect, model, backends, options=Options(oracle=oracle, cache=True)),
        *(partial(run, name) for name in backends.split(",")),
    ]


def measure_cost(size: int) -> list[dict[str, Any]]:
    """Wall and processor seconds of opening and running both backends with probes, and of a whole bisect; their ratios,
    and the peak of memory in MiB. Neither side counts loading libraries, compiling kernels and making up the sample.
    Each round takes its own ratios, against other work on the machine; their medians are told, and their extremes."""
    rows = []
    with tempfile.TemporaryDirectory(prefix="localise-") as folder:
        model = OnnxFileModel(second_net(Path(folder) / "second.onnx", size))
        for backends, oracle in PAIRS:
            whole, *runs = bisect_and_runs(model, backends, oracle, Path(folder))
            for part in (*runs, whole):
                part()
            rounds = np.array([[_seconds(part) for part in (*runs, whole)] for _ in range(ROUNDS)])
            both, bisected = rounds[:, :-1].sum(axis=1), rounds[:, -1]
            (wall, cpu), ratios = np.median(both, axis=0), bisected / both
            bisect_wall, bisect_cpu = np.median(bisected, axis=0)
            wall_ratio, cpu_ratio = np.median(ratios, axis=0)
            rows.append(
                {
                    "backends": backends,
                    "oracle": oracle,
                    "both_runs_wall_s": round(float(wall), 2),
                    "bisect_wall_s": round(float(bisect_wall), 2),
                    "wall_ratio": round(float(wall_ratio), 2),
                    "wall_ratios": [round(float(r), 2) for r in np.sort(ratios[:, 0])],
                    "both_runs_cpu_s": round(float(cpu), 2),
                    "bisect_cpu_s": round(float(bisect_cpu), 2),
                    "cpu_ratio": round(float(cpu_ratio), 2),
                    "cpu_ratios": [round(float(r), 2) for r in np.sort(ratios[:, 1])],
                    "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
                    "threads": torch.get_num_threads(),
                }
            )
    return rows


def _seconds(run: Callable[[], Any]) -> tuple[float, float]:
    """(wall, processor) seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - wall, time.process_time() - cpu
