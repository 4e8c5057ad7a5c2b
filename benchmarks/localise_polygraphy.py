"""Polygraphy's ``debug reduce`` on a case of ``localise.py``, by the recipe of its own example, at three tolerances.

The recipe: golden values of every layer from the good model, ``data merge`` (``to-input`` in older versions), then
``debug reduce`` on the bad model, first ``--mode=bisect`` and on what is left ``--mode=linear``, with ``polygraphy run
--onnxrt`` as the check. Its answer is the layers of the model that is left over. The bad model must have no values that
the good one lacks: only faults inside a node are comparable.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cp_debug.graph.graph import Graph

TOLERANCES = (1e-5, 1e-4, 1e-3)
INSIDE = {"weight scale", "channel scale", "bias scale", "stale statistics", "epsilon", "padding"}
"""Kinds of faults that change a node and add none."""
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
    _run(folder, "data", "merge", inputs, golden, "-o", values)
    prepared = time.perf_counter() - start
    answers = []
    for tolerance in TOLERANCES:
        check = ["--check", *POLYGRAPHY, "run", "polygraphy_debug.onnx", "--onnxrt", "--load-inputs", values,
                 "--load-outputs", golden, "--rtol", tolerance, "--atol", tolerance]  # fmt: skip
        start, model = time.perf_counter(), bad
        for mode in ("bisect", "linear"):
            left = folder / f"{mode}-{tolerance}.onnx"
            reduce = ("debug", "reduce", model, "-o", left, f"--mode={mode}", "--load-inputs", values, *check)
            _run(folder, *reduce, must=False)  # it fails when the check finds nothing to complain about
            model = left if left.is_file() else model
        layers = [] if model is bad else _layers(model)
        right = set(layers) == set(injected)
        seconds = prepared + time.perf_counter() - start
        answers.append(Reduced(bad.name, tolerance, layers, list(injected), right, seconds))
    return answers


def _run(folder: Path, *arguments: object, must: bool = True) -> None:
    """Raises CalledProcessError when a command fails that must not."""
    command = [*POLYGRAPHY, *map(str, arguments)]
    subprocess.run(command, cwd=folder, check=must, capture_output=True)


def _layers(path: Path) -> list[str]:
    """The values that a reduced model computes."""
    return list(Graph(path).values)
