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
from cp_debug.bisect.pipeline import Pipeline, prepare
from cp_debug.recipes.onnx_file import OnnxFileModel

PAIRS = (("ort,ort-all", "fp64"), ("ort,emu-fp16", "fp32"), ("ort,emu-tf32", "fp32"))
"""Backends, and the oracle that judges them."""
ROUNDS = 3


def measure_cost(size: int) -> list[dict[str, Any]]:
    """Wall and processor seconds of opening and running both backends with probes, and of a whole bisect; their ratios,
    and the peak of memory in MiB. Rounds are interleaved and the best of each is kept, against other work on the
    machine; the ratio of processor times is the steadier one."""
    rows = []
    with tempfile.TemporaryDirectory(prefix="localise-") as folder:
        model = OnnxFileModel(second_net(Path(folder) / "second.onnx", size))
        (sample,) = model.samples(1, 0, None)
        programs = prepare(model, sample, Path(folder))

        def run(backend: str) -> None:
            with Pipeline(model, programs, create(BackendSpec.parse(backend))) as pipeline:
                pipeline.run(sample, lambda key, tensor: None)

        for backends, oracle in PAIRS:
            runs = [partial(run, name) for name in backends.split(",")]
            whole = partial(bisect, model, backends, options=Options(oracle=oracle))
            for part in runs:  # libraries are loaded and kernels chosen
                part()
            rounds = np.array([[_seconds(part) for part in (*runs, whole)] for _ in range(ROUNDS)])
            *single, (bisect_wall, bisect_cpu) = rounds.min(axis=0)
            wall, cpu = np.sum(single, axis=0)
            rows.append(
                {
                    "backends": backends,
                    "oracle": oracle,
                    "both_runs_wall_s": round(float(wall), 2),
                    "bisect_wall_s": round(float(bisect_wall), 2),
                    "wall_ratio": round(float(bisect_wall / wall), 2),
                    "cpu_ratio": round(float(bisect_cpu / cpu), 2),
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
