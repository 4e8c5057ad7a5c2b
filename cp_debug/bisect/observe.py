"""Observation of a backend: did looking change the program, and does the backend agree with itself?

One further run answers both in the usual case: a fresh session without probes, with another thread count. When its
outputs equal the probed ones bit for bit, noise floor and observer gap are 0. Only otherwise more runs take them apart.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from cp_debug.backends.base import Tensor
from cp_debug.backends.capabilities import build_info_of, with_threads
from cp_debug.probes.distance import distance
from cp_debug.probes.held import CapturedRun
from cp_debug.probes.statistics import compare
from cp_debug.programs.pipeline import Key, Pipeline
from cp_debug.recipes.base import Arrays, Sample


@dataclass
class Observation:
    """Comparison of a second, untouched run with the probed one; relative L2 over the final outputs."""

    noise_floor: float
    """Distance of the backend from itself: run to run and over thread counts."""
    observer_gap: float
    """Distance of the run with probes from the one without."""
    runs: int = 0
    """Number of further runs that it took to know."""
    first_unsteady: str | None = None
    """The first layer where two runs of the same backend part."""
    repeats: bool = True
    """Whether runs with equal settings give equal bits; then only the thread count makes the noise."""


@contextmanager
def threads_of_torch(count: int | None) -> Iterator[None]:
    """Run the block with this many threads in torch; None changes nothing."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def observe(
    pipeline: Pipeline,
    sample: Sample,
    probed: Mapping[str, Arrays],
    capture: CapturedRun,
    shown: Callable[[Key, Tensor], tuple[Key, Tensor]] = lambda key, tensor: (key, tensor),
) -> tuple[Observation, dict[Key, float]]:
    """The backend of ``pipeline`` against itself: the observation, and the noise floor of every layer that has one.

    ``probed`` are the outputs of the run that ``capture`` holds; ``shown`` gives a value as it was captured, with the
    name under which it was.
    ``probed`` is component → output name → array. Arrays have the dtype that the graph declares.
    """
    if own_observation := _own_observation(pipeline):
        return own_observation, {}
    if pipeline.backend.emulated:  # runs the same code with probes and without, in one order of summation
        return Observation(noise_floor=0.0, observer_gap=0.0, runs=0), {}

    def run(threads: int | None, sink: Callable[[Key, Tensor], None] | None = None) -> dict[str, Arrays]:
        """Outputs of a fresh session with so many threads, None for the backend's own."""
        # Sessions of torch take the count from torch itself, those of a runtime of its own when they are made.
        backend = with_threads(pipeline.backend, threads)
        with threads_of_torch(threads), Pipeline(pipeline.model, pipeline.programs, backend) as fresh:
            return fresh.run(sample, sink)

    other_threads = torch.get_num_threads() + 1  # another split of every sum at almost the same speed
    threaded = run(other_threads)
    if gap(probed, threaded) == 0:
        return Observation(noise_floor=0.0, observer_gap=0.0, runs=1), {}
    plain = run(None)
    repeats = gap(probed, plain) == 0  # then only the thread count matters, and probes change nothing
    repeated = plain if repeats else run(None)
    run_to_run = gap(plain, repeated)
    noise = max(run_to_run, gap(plain, threaded))
    observation = Observation(noise, gap(plain, probed), runs=2 if repeats else 3, repeats=run_to_run == 0)
    if noise == 0:
        return observation, {}
    floors: dict[Key, float] = {}

    def sink(key: Key, tensor: Tensor) -> None:
        key, tensor = shown(key, tensor)
        probed_tensor = capture.load(key.value, component=key.component)
        if probed_tensor.shape != tensor.shape:  # as many elements as data decides
            floors[key] = math.inf
        elif (apart := distance(tensor, probed_tensor)).difference or apart.new_nonfinite:
            floors[key] = max(floors.get(key, 0.0), apart.relative)

    for threads in (other_threads,) if repeats else (None, other_threads):
        run(threads, sink)
        observation.runs += 1
    observation.first_unsteady = next((key.value for key in floors), None)
    return observation, floors


def _own_observation(pipeline: Pipeline) -> Observation | None:
    """The observation by sessions that build engines: building again costs more than all other runs."""
    floors, gaps = [], []
    for info in map(build_info_of, pipeline.sessions.values()):
        if info is None or info.rebuild_floor is None or info.observer_gap is None:
            return None
        floors.append(info.rebuild_floor)
        gaps.append(info.observer_gap)
    return Observation(noise_floor=max(floors), observer_gap=max(gaps), runs=2)


def gap(a: Mapping[str, Arrays], b: Mapping[str, Arrays]) -> float:
    """Relative L2 distance between the outputs of the last component; 0 only where all components' are equal.

    ``a`` and ``b``: component → output name → array, with the same names on both sides. Equal names have equal dtypes;
    other shapes are infinitely far apart.
    """
    pairs = [(a[c][n], b[c][n]) for c in a for n in a[c]]
    if all(np.array_equal(x, y, equal_nan=x.dtype.kind == "f") for x, y in pairs):
        return 0.0
    last = list(a)[-1]
    return max((compare(a[last][n], b[last][n]).rel_l2 for n in a[last]), default=math.inf) or np.finfo(np.float64).tiny
