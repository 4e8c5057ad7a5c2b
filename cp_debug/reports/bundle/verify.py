"""Verification of a case: the backend runs the program, the oracle the reference, ``bisect``'s verdict decides."""

from __future__ import annotations

import hashlib
import math
import tempfile
from collections import ChainMap
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cp_debug.backends.base import Backend, Program
from cp_debug.backends.registry import create
from cp_debug.backends.spec import BackendSpec
from cp_debug.bisect.replay import Replayer
from cp_debug.bisect.replayed import Replay
from cp_debug.bisect.result import GUILTY, SHAPE
from cp_debug.bisect.verdict import Judgement, judge
from cp_debug.errors import InputError
from cp_debug.probes.arrays import as_numpy
from cp_debug.probes.statistics import TensorStats, compare
from cp_debug.programs.precision import PRECISIONS
from cp_debug.reports.bundle.case import Accused, Case


@dataclass(frozen=True)
class Output:
    """One output of a case."""

    actual: np.ndarray
    exact: np.ndarray
    """Value that the oracle computed."""
    stats: TensorStats
    replay: Replay | None
    judgement: Judgement

    @property
    def fails(self) -> bool:
        """Whether the backend is at fault here."""
        return self.judgement.verdict in (GUILTY, SHAPE) and self.judgement.side == "test"

    @property
    def kind(self) -> str:
        """``shape``, ``nonfinite`` (NaN or Inf on one side) or ``numbers``: the way in which it fails."""
        if self.judgement.verdict == SHAPE:
            return "shape"
        return "nonfinite" if self.replay and self.replay.new_nonfinite else "numbers"

    @property
    def finite(self) -> bool:
        """Whether the oracle's value has no NaN and no Inf."""
        return not (self.stats.nan_ref or self.stats.inf_ref)

    @property
    def strength(self) -> float:
        """Excess over the precision; infinite for NaN, Inf and wrong shapes."""
        if self.kind != "numbers":
            return math.inf
        return self.replay.excess or 0.0 if self.replay else 0.0


Measured = dict[str, Output]
"""Output by its name in the program."""


def fails(measured: Measured) -> bool:
    """Whether any output is at fault."""
    return any(output.fails for output in measured.values())


def strength(measured: Measured) -> float:
    """Strength of the worst output at fault; 0 without one."""
    return max((output.strength for output in measured.values() if output.fails), default=0.0)


class Verifier:
    """Runs cases on one backend. ``runs`` counts them."""

    def __init__(self, accused: Accused) -> None:
        self.backend = backend_of(accused)
        self._accused = accused
        self.runs = 0
        self._last: tuple[bytes, Measured] | None = None

    def measure(self, case: Case) -> Measured:
        """Run the case, unless it is the one that was run last; returns each output with its judgement.

        Raises InputError when the backend or the oracle cannot.
        """
        key = _digest(case)
        if self._last is None or self._last[0] != key:
            self._last = (key, self._run(case))
        return self._last[1]

    def _run(self, case: Case) -> Measured:
        self.runs += 1
        with tempfile.TemporaryDirectory(prefix="cpdebug-case-") as name:
            program = case.program.save(Path(name) / "program.onnx")
            reference = program
            if case.reference is not case.program:
                reference = case.reference.save(Path(name) / "reference.onnx")
            names = {reference_name: program_name for program_name, reference_name in case.outputs.items()}
            claim = self.backend.precision
            replayer = Replayer(reference, (claim, claim), self._accused.oracle, [*case.inputs, *names])
            inputs = {v.name: case.inputs[v.name] for v in reference.inputs}
            # The oracle goes first: it refuses shapes that do not fit without a word on stderr.
            exact = {name: as_numpy(tensor) for name, tensor in replayer.oracle.run(inputs).items()}
            with closing(self.backend.open(Program("case", program))) as session:
                actual = session.run(case.inputs)
            test = ChainMap(
                {reference_name: actual[program_name] for reference_name, program_name in names.items()}, inputs
            )
            replays = dict(replayer.layers(ChainMap(exact, inputs).__getitem__, test.__getitem__))
            return {
                program_name: self._judge(actual[program_name], exact[reference_name], replays.get(reference_name))
                for reference_name, program_name in names.items()
            }

    def _judge(self, actual: np.ndarray, exact: np.ndarray, replay: Replay | None) -> Output:
        test, stats = self._accused.test, compare(exact, actual)
        judgement = judge(stats, replay, PRECISIONS[self.backend.precision], test.rtol, test.atol, 0.0)
        return Output(actual, exact, stats, replay, judgement)


def _digest(case: Case) -> bytes:
    sha = hashlib.sha256()
    for piece in case.pieces:
        sha.update(piece.model.SerializeToString(deterministic=True))
    for name, array in case.inputs.items():
        sha.update(f"{name} {array.dtype} {array.shape}".encode())
        sha.update(np.ascontiguousarray(array).tobytes())
    return sha.digest()


def backend_of(accused: Accused) -> Backend:
    """The accused backend, made anew with the settings that its run recorded.

    PyTorch runs no cut of a graph: in its place stands unoptimized ONNX Runtime, which has a fault in common with it
    when the fault is in the program. Raises BackendUnavailable when it cannot run here.
    """
    spec, settings = BackendSpec.parse(accused.backend.spec), dict(accused.backend.settings)
    settings |= settings.get("components", {}).get(accused.row.component, {})
    if spec.family == "torch":
        if accused.same_program:
            raise InputError(f"{accused.row.name}: {spec} computes it; a bundle shows faults of ONNX graphs' runtimes")
        return create(BackendSpec("ort"))
    if spec.family == "ort":
        return create(spec, disabled_optimizers=settings.get("disabled_optimizers", ()))
    if spec.family == "emu":
        return create(spec, overrides=settings.get("overrides", {}), tile=settings.get("tile"))
    if spec.family == "trt":
        return create(spec, strongly_typed=settings.get("regime") == "strong")
    return create(spec)
