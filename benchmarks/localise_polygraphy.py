"""Polygraphy's ``debug reduce`` on a case of ``localise.py``, by the recipe of its own example, at three tolerances.

The recipe: golden values of every layer from the good model, ``data to-input``, then ``debug reduce --mode=bisect`` on
the bad model, with ``polygraphy run --onnxrt`` as the check. Its answer is the layers of the model that is left over.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cp_debug.probes.graph import Graph

TOLERANCES = (1e-5, 1e-4, 1e-3)
POLYGRAPHY = (str(Path(sys.executable).with_name("polygraphy")),)


@dataclass
class Reduced:
    """One answer of ``debug reduce``. ``layers`` is empty when it found nothing to reduce."""

    model: str
    tolerance: float
    layers: list[str]
    injected: list[str]
    right: bool
    seconds: float


def debug_reduce(good: Path, bad: Path, injected: Sequence[str]) -> list[Reduced]:
    """The answers at all tolerances. ``seconds`` includes each time what prepares the golden values."""
    folder = bad.with_suffix(".polygraphy")
    folder.mkdir()
    start = time.perf_counter()
    golden, inputs, values = (folder / name for name in ("golden.json", "inputs.json", "values.json"))
    _run(folder, "run", good, "--onnxrt", "--save-inputs", inputs, "--onnx-outputs", "mark", "all",
         "--save-outputs", golden)  # fmt: skip
    _run(folder, "data", "to-input", inputs, golden, "-o", values)
    prepared = time.perf_counter() - start
    answers = []
    for tolerance in TOLERANCES:
        start, left = time.perf_counter(), folder / f"reduced-{tolerance}.onnx"
        _run(folder, "debug", "reduce", bad, "-o", left, "--mode=bisect", "--load-inputs", values,
             "--check", *POLYGRAPHY, "run", "polygraphy_debug.onnx", "--onnxrt", "--load-inputs", values,
             "--load-outputs", golden, "--rtol", tolerance, "--atol", tolerance)  # fmt: skip
        layers = _layers(left) if left.is_file() else []
        seconds = prepared + time.perf_counter() - start
        right = set(layers) == set(injected)
        answers.append(Reduced(bad.name, tolerance, layers, list(injected), right, seconds))
    return answers


def _run(folder: Path, *arguments: object) -> None:
    command = [*POLYGRAPHY, *map(str, arguments)]
    subprocess.run(command, cwd=folder, check=False, capture_output=True)


def _layers(path: Path) -> list[str]:
    """The values that a reduced model computes, by their names in the good model."""
    return list(dict.fromkeys(value.split(".")[0] for value in Graph(path).values))
