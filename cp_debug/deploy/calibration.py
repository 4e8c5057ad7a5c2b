"""Calibration data for TensorRT: inputs of every component, as they are in front of it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from cp_debug.programs.pipeline import run_module
from cp_debug.recipes.base import Arrays, Model, Sample


def write_calibration_data(model: Model, samples: Iterable[Sample], folder: Path) -> Path:
    """Write ``<component>/<number>.npz`` for every component and sample, one array an input; return ``folder``.

    Components run as the model's FP32 modules on the CPU. Raises InputError as the model's samples do.
    """
    for index, sample in enumerate(samples):
        results: dict[str, Arrays] = {}
        for place, component in enumerate(model.components, start=1):
            inputs = model.feed(component, sample, results)
            target = folder / component.name
            target.mkdir(parents=True, exist_ok=True)
            np.savez(target / f"{index:05d}.npz", allow_pickle=False, **inputs)
            if place < len(model.components):
                results[component.name] = run_module(component, inputs)
    return folder
