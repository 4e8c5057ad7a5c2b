"""What a bisect costs, in multiples of running both backends once with every probe, on a SECOND network."""

from __future__ import annotations

import resource
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from random_graphs import second_net

from cp_debug.backends.registry import create
from cp_debug.backends.spec import BackendSpec
from cp_debug.bisect.engine import Options, bisect
from cp_debug.bisect.pipeline import Pipeline, prepare
from cp_debug.recipes.onnx_file import OnnxFileModel

PAIRS = (("ort,ort-all", "fp64"), ("ort,emu-fp16", "fp32"), ("ort,emu-tf32", "fp32"))
"""Backends, and the oracle that judges them."""


def measure_cost(size: int) -> list[dict[str, Any]]:
    """Seconds of both backends with probes, of a bisect, their ratio, and the peak of memory in MiB."""
    rows = []
    with tempfile.TemporaryDirectory(prefix="localise-") as folder:
        path = second_net(Path(folder) / "second.onnx", size)
        model = OnnxFileModel(path)
        (sample,) = model.samples(1, 0, None)
        programs = prepare(model, sample, Path(folder))
        for backends, oracle in PAIRS:
            runs = 0.0
            for name in backends.split(","):
                with Pipeline(model, programs, create(BackendSpec.parse(name))) as pipeline:
                    probed = partial(pipeline.run, sample, lambda key, tensor: None)
                    probed()
                    runs += _seconds(probed)
            whole = _seconds(partial(bisect, model, backends, options=Options(oracle=oracle)))
            rows.append(
                {
                    "backends": backends,
                    "oracle": oracle,
                    "both_runs_s": round(runs, 2),
                    "bisect_s": round(whole, 2),
                    "ratio": round(whole / runs, 2),
                    "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
                    "threads": torch.get_num_threads(),
                }
            )
    return rows


def _seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
