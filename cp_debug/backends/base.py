"""The contract of a backend: it opens a program and runs it, handing out the intermediate values that it can show."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from cp_debug.backends.spec import BackendSpec
from cp_debug.errors import InputError
from cp_debug.graph.control_flow import ControlFlow
from cp_debug.probes.arrays import Sink as Sink
from cp_debug.probes.arrays import Tensor as Tensor

if TYPE_CHECKING:
    import torch

    from cp_debug.graph.flatten import Branch
    from cp_debug.graph.graph import Graph
    from cp_debug.graph.pairing import Pairing
    from cp_debug.graph.scales import Scales
    from cp_debug.probes.alignment import Alignment


@dataclass(eq=False)
class Program:
    """One component as it is debugged: the graph that is deployed, and the module it was exported from, if any.

    A program is equal to itself alone, so that caches can be keyed by it.
    """

    name: str
    graph: Graph
    module: torch.nn.Module | None = None
    alignment: Alignment | None = None
    """Torch value ↔ ONNX value; set when ``module`` is."""
    scales: Scales | None = None
    """Scales by node name, if cpdebug quantized the program."""
    plain: Graph | None = None
    """The graph before cpdebug put Q/DQ pairs in, if it did: everything else has the same names in both."""
    pairing: Pairing | None = None
    """Values of a test's program by the names of the reference's; None: equal names are equal values."""
    deployed: Graph | None = None
    """The graph as it is deployed, if bodies and functions were flattened to look inside."""
    branches: Sequence[Branch] = ()
    """Decisions of the flattening: which branch each If takes, how often each loop runs."""
    flow: ControlFlow = field(default_factory=ControlFlow)
    """Control flow on all samples: what ran, and what did not."""
    ir: Path | None = None
    """OpenVINO's file of the program, which is run instead of the graph."""
    example: Mapping[str, np.ndarray] | None = None
    """Inputs by name, like those that it will be run with, where they are known when it is opened."""

    @property
    def weight_bytes(self) -> int:
        """Bytes of the module's weights and buffers in FP32; 0 where there is no module."""
        if self.module is None:
            return 0
        return sum(4 * tensor.numel() for tensor in (*self.module.parameters(), *self.module.buffers()))

    def rewritten(self, graph: Graph, **changes: Any) -> Program:
        """The program with ``graph``, whose values have the names of its own, in place of it; and other changes."""
        alignment = self.alignment and replace(self.alignment, graph_sha256=graph.digest)
        return replace(self, graph=graph, alignment=alignment, **changes)

    def require_int8(self, spec: BackendSpec) -> None:
        """Raise InputError unless the program tells what is quantized."""
        if self.graph.precision != "int8" and self.plain is None:
            raise InputError(f"{spec}: {self.graph} has no QuantizeLinear nodes; quantize the model first")


class Session(Protocol):
    """A program, ready to run on one backend. Values are named by the program's ONNX graph on every backend."""

    @property
    def settings(self) -> Mapping[str, Any]:
        """Every setting that can change numbers, as read back from the library, JSON-safe."""
        ...

    @property
    def exposed(self) -> Collection[str]:
        """The graph values that this session can hand to a sink: all, or those that survive fusion or alignment."""
        ...

    def run(
        self, inputs: Mapping[str, np.ndarray], sink: Sink | None = None, probes: Collection[str] | None = None
    ) -> dict[str, np.ndarray]:
        """Run once and return the graph's outputs: name → array in the dtype that the graph declares.

        ``sink`` is given every exposed value (outputs included) in execution order; ``probes`` narrows it. With
        ``sink=None`` the program runs untouched, as it would be deployed. Raises InputError for inputs that do not fit
        the graph.
        """
        ...

    def close(self) -> None:
        """Free what the session holds."""
        ...


class Backend(Protocol):
    """Runtime + precision + device, made from a spec by ``cp_debug.backends.registry.create``."""

    @property
    def spec(self) -> BackendSpec:
        """The spec that the backend was made from."""
        ...

    @property
    def precision(self) -> str:
        """The arithmetic that it claims to compute in: one of ``fp64 fp32 tf32 bf16 fp16 fp16acc int8``."""
        ...

    @property
    def device(self) -> str:
        """``cpu`` or ``cuda:N``."""
        ...

    @property
    def emulated(self) -> bool:
        """Whether the precision is emulated, not the hardware's."""
        ...

    def open(self, program: Program) -> Session:
        """Make the program ready. Raises BackendUnavailable or InputError."""
        ...

    def versions(self) -> dict[str, str]:
        """Library → version, with the device's name where it matters."""
        ...


@dataclass
class RunRecord:
    """Record of a backend for manifests and reports: spec, versions, device and settings."""

    spec: str
    precision: str
    device: str
    emulated: bool
    versions: dict[str, str] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    declared: list[str] = field(default_factory=list)
    """Types that the files themselves compute in, where they know others than FP32: ``fp16``, ``bf16``, ``int8``."""

    @property
    def computes_in(self) -> str:
        """The precision in words: that of the backend, and where that is FP32, what the files declare instead."""
        precision = " + ".join(self.declared) if self.declared and self.precision == "fp32" else self.precision
        return precision + (", emulated" if self.emulated else "")
