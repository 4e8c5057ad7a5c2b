"""Calibration data for TensorRT: inputs of every component, as they are in front of it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from cp_debug.programs.walk import Walk, run_module
from cp_debug.recipes.base import Model, Sample


def write_calibration_data(model: Model, samples: Iterable[Sample], folder: Path) -> Path:
    """Write ``<component>/<number>.npz`` for every component and sample, one array an input; return ``folder``.

    Components run as the model's FP32 modules on the CPU. Raises InputError as the model's samples do.
    """
    for index, sample in enumerate(samples):
        for step in Walk(model, sample):
            target = folder / step.name
            target.mkdir(parents=True, exist_ok=True)
            np.savez(target / f"{index:05d}.npz", allow_pickle=False, **step.inputs)
            if not step.last:
                step.outputs = run_module(step.component, step.inputs)
    return folder
