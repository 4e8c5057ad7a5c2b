"""Settings of a bisect besides its model and backends, and its progress."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from cp_debug.backends.base import Backend, Program
from cp_debug.backends.spec import COMPILED
from cp_debug.bisect.regions.descent import BUILDS
from cp_debug.display import OnStep
from cp_debug.quantization.quantized_programs import DEFAULT_CALIBRATION, Calibration
from cp_debug.recipes.input_files import DEFAULT_READING, Reading

Rewrite = Callable[[list[Program], Path], list[Program]]
"""Makes the programs of the tests from the reference's and a folder for new files; value names should stay."""


@dataclass(frozen=True)
class Options:
    """Settings of a bisect besides its model and backends; the defaults are those of the command line."""

    checkpoint: Path | None = None
    test_checkpoint: Path | None = None
    """Checkpoint with other weights for the test backends."""
    test_train_mode: bool = False
    test_out_of_place: bool = False
    inputs: Path | None = None
    samples: int = 1
    seed: int = 0
    reading: Reading = DEFAULT_READING
    """Settings for reading ``inputs``, and sizes of made-up ones."""
    rtol: float | None = None
    atol: float | None = None
    oracle: str | None = None
    """``fp32`` or ``fp64``; None leaves it to the precisions under test."""
    oracle_device: str = "auto"
    """Device on which layers are replayed; ``auto``: the test's, where this torch can reach it."""
    cache: bool = False
    """Keep exported graphs and their alignments in the user's cache folder, and take them from there."""
    memory: int | None = None
    """Bytes of captured values that are held in memory, on each device; None leaves it to ``probes.held``."""
    replay: bool = True
    explain: bool = True
    """Try to say why a layer is guilty; needs the replay."""
    exporter: str | None = None
    """``dynamo`` or ``torchscript``; None takes one that every backend can read."""
    folded: bool = True
    calibration: Calibration = DEFAULT_CALIBRATION
    """Calibration of the quantizer, where a backend is in INT8 and the model is not."""
    max_builds: int = BUILDS
    """Further engines for the search inside guilty regions of one run; 0 leaves it at emulated hypotheses."""
    optimizer_blame: bool = False
    """Find the optimizers that are responsible for the difference of tests on optimized ONNX Runtime or inductor."""
    maps: Sequence[str] = ()
    """``REFERENCE=TEST`` each: values of two models that are to be compared; ``OUTPUT=``: one that is left out."""
    save: Path | None = None
    """Folder for the captures: ``sample-0/torch``, ``sample-0/ort`` …"""

    @property
    def differs(self) -> str:
        """What the tests run instead of the reference, a test model apart; empty where it is the same."""
        return str(
            self.test_checkpoint or self.test_train_mode * "train mode" or self.test_out_of_place * "out of place"
        )


DEFAULT_OPTIONS = Options()


def is_optimized(backend: Backend) -> bool:
    """Whether ONNX Runtime's graph optimizer works on what this backend runs."""
    return backend.spec.name in ("ort-basic", "ort-all")


def has_knobs(backend: Backend) -> bool:
    """Whether ``optimizer_blame`` can find out what in this backend makes a difference."""
    compiled = backend.spec.name.startswith(COMPILED) and "eager" not in backend.spec.options
    return compiled or is_optimized(backend) or backend.spec.family == "openvino"


class StepCounter:
    """Counts the steps of one bisect and announces each before it begins."""

    def __init__(self, on_step: OnStep, steps: int = 0) -> None:
        self._on_step, self._done = on_step, 0
        self.steps = steps
        """Steps in all, as far as they are known."""

    def tell(self, text: str) -> None:
        """Announce what is being done within the present step."""
        self._on_step(text, self._done, self.steps)

    def step(self, text: str) -> None:
        """Begin the next step."""
        self.tell(text)
        self._done += 1
