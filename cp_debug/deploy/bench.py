"""Latency and memory of every part of a model, backend by backend."""

from __future__ import annotations

import ctypes
import resource
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cp_debug.backends.base import Backend, Program, RunRecord, Session
from cp_debug.backends.capabilities import timer_of as own_timer
from cp_debug.display import OnStep
from cp_debug.programs.pipeline import Pipeline
from cp_debug.programs.walk import Walk
from cp_debug.recipes.base import Arrays, Model, Sample
from cp_debug.serialize import JsonForm

Timer = Callable[[Arrays], tuple[Arrays, float]]
"""Runs a component: inputs by name → outputs by name, and seconds."""
WHOLE = "whole"
"""Name of the row for a complete pass, from the sample to its decoded result."""


@dataclass
class Latency:
    """Seconds that one part took in every pass."""

    part: str
    seconds: list[float] = field(default_factory=list)

    def figures(self) -> dict[str, float]:
        """Mean and percentiles in milliseconds."""
        ms = np.array(self.seconds) * 1e3
        return {"mean": float(ms.mean()), **{f"p{q}": float(np.percentile(ms, q)) for q in (50, 95, 99)}}


@dataclass
class BackendBench(JsonForm):
    """One backend: its parts in the order in which they run, then the whole."""

    backend: RunRecord = field(metadata={"inline": True})
    parts: list[Latency]
    memory_mib: float
    """Peak as ``Memory`` measures it; engines in a process of their own are not counted."""

    def derived(self) -> dict[str, Any]:
        """The backend's spec, and mean and percentiles of each part's latency in ms."""
        return {"backend": self.backend.spec, "latency_ms": {part.part: part.figures() for part in self.parts}}


def bench(
    model: Model,
    programs: Sequence[Program],
    backends: Sequence[Backend],
    sample: Sample,
    *,
    warmup: int = 3,
    repeats: int = 20,
    on_step: OnStep = lambda text, done, total: None,
) -> list[BackendBench]:
    """Time ``repeats`` passes over one sample after ``warmup`` ones, each part by itself and all together.

    A part ends when its results are in host memory, so the device has finished. A session in another process
    (TensorRT) times the engine there instead, without the transfer between processes.
    """
    benches = []
    for place, backend in enumerate(backends):
        text, passes = f"timing {backend.spec}", warmup + repeats
        on_step(text, place * passes, len(backends) * passes)
        memory = Memory(backend.device)
        with Pipeline(model, programs, backend) as pipeline:
            timers = {name: timer_of(session, warmup + repeats) for name, session in pipeline.sessions.items()}
            for _ in range(warmup):
                _one_pass(model, timers, sample)
            timed: dict[str, Latency] = {}
            for number in range(repeats):
                on_step(text, place * passes + warmup + number, len(backends) * passes)
                seconds = _one_pass(model, timers, sample)
                seconds[WHOLE] = sum(seconds.values())
                for part, value in seconds.items():
                    timed.setdefault(part, Latency(part)).seconds.append(value)
            benches.append(BackendBench(pipeline.record(), list(timed.values()), memory.peak_mib()))
    return benches


def timer_of(session: Session, passes: int) -> Timer:
    """A function that runs a component and takes its time; it will be called ``passes`` times."""
    session_timer = own_timer(session)

    def here(inputs: Arrays) -> tuple[Arrays, float]:
        start = time.perf_counter()
        outputs = session.run(inputs)
        return outputs, time.perf_counter() - start

    if session_timer is None:
        return here
    outputs: dict[str, np.ndarray] = {}
    seconds: deque[float] = deque()

    def elsewhere(inputs: Arrays) -> tuple[Arrays, float]:
        if not outputs:  # the same in every pass
            outputs.update(session.run(inputs))
            seconds.extend(session_timer(inputs, passes))
        return outputs, seconds.popleft()  # the first passes warm up

    return elsewhere


def _one_pass(model: Model, timers: Mapping[str, Timer], sample: Sample) -> dict[str, float]:
    """Seconds of every part in one pass."""
    seconds: dict[str, float] = {}
    fresh = Sample(sample.arrays, sample.source)  # recipes keep what they made of a sample that they know
    way = Walk(model, fresh)
    for step in way:
        start = time.perf_counter()
        inputs = step.inputs
        seconds[f"before {step.name}"] = time.perf_counter() - start
        step.outputs, seconds[step.name] = timers[step.name](inputs)
    start = time.perf_counter()
    model.decode(fresh, way.results)
    seconds["decode"] = time.perf_counter() - start
    return seconds


class Memory:
    """Peak of memory from now on, beyond what is in use now."""

    def __init__(self, device: str) -> None:
        import torch

        self._cuda = device if device != "cpu" and torch.cuda.is_available() else None
        if self._cuda is not None:
            torch.cuda.init()  # nobody did where engines alone run there, and the next line asks for it
            torch.cuda.reset_peak_memory_stats(self._cuda)
        with suppress(AttributeError, OSError):
            ctypes.CDLL(None).malloc_trim(0)  # what an earlier backend freed would be used again unseen
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # the peak is what is held now
        self._before = _peak_bytes()

    def peak_mib(self) -> float:
        """The peak in MiB: what torch allocated on CUDA, else what the process took."""
        if self._cuda is not None:
            import torch

            return torch.cuda.max_memory_allocated(self._cuda) / 2**20
        return (_peak_bytes() - self._before) / 2**20


def _peak_bytes() -> int:
    """Linux counts in KiB, macOS in bytes."""
    try:
        line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
