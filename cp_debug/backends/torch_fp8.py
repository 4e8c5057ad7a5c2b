"""``torch-fp8``: a graph whose products really run in FP8, by ``torch._scaled_mm``."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from cp_debug.backends.arithmetic import ARITHMETICS, FP32, Arithmetic
from cp_debug.backends.base import Program, Sink
from cp_debug.backends.determinism import deterministic
from cp_debug.backends.emulated import ExecutorSession, require_device, torch_versions
from cp_debug.backends.executor import Executor, constants_of
from cp_debug.backends.narrow_options import TorchFp8Options
from cp_debug.backends.running_sums import RunningSum
from cp_debug.backends.scaling import CODECS, FixedScaling
from cp_debug.backends.spec import BackendSpec
from cp_debug.errors import BackendUnavailable, InputError
from cp_debug.graph.graph import Graph, Node
from cp_debug.graph.operators import PRODUCTS

HOPPER = (9, 0)
"""Compute capability of the cards whose running sums were measured (docs/gpu/accumulators.md)."""


class TorchFp8Backend:
    """``torch-fp8`` on the CPU or on CUDA: products in E4M3 by ``torch._scaled_mm``, everything else in FP32.

    Matrix products, and convolutions unfolded to such. Data has one scale a tensor, calibrated in FP32 on the first
    inputs that a session is given (``:dynamic``: found in the tensor at hand), or scales of rows (``:channel``) or of
    blocks (``:block``) found at hand. ``:fast`` leaves sums in the tensor cores. Raises BackendUnavailable where the
    device or torch has no FP8.
    """

    emulated = False

    def __init__(self, spec: BackendSpec) -> None:
        self.spec, self.device = spec, spec.device or "cpu"
        self.options = TorchFp8Options.parse(spec.precision)
        require_device(spec, self.device, nearest="emu-fp8")
        if reason := unavailable(self.device):
            raise BackendUnavailable(str(spec), reason, nearest="emu-fp8")
        narrow = self.options.narrow
        if self.device != "cpu" and torch.cuda.get_device_capability(self.device) == HOPPER:
            narrow = replace(narrow, significant=14, promote=None if self.options.fast else 128)
        self.precision = str(narrow)
        cores = TensorCores(str(spec), None, 23, 32, fast=self.options.fast)
        self.arithmetic = replace(ARITHMETICS[str(self.options.narrow)], running_sum=cores)

    def open(self, program: Program) -> TorchFp8Session:
        """A session on the program's graph. Raises InputError for operators that nothing here can execute."""
        return TorchFp8Session(program.graph, self.arithmetic, self.device, calibrates=self.options.calibrates)

    def versions(self) -> dict[str, str]:
        """See ``torch_versions``."""
        return torch_versions(self.device)


class TorchFp8Session(ExecutorSession):
    """A graph with products in FP8; every value is exposed. ``settings["scales"]`` are those of the data, by node."""

    def __init__(self, graph: Graph, arithmetic: Arithmetic, device: str, *, calibrates: bool) -> None:
        super().__init__(graph, arithmetic, device)
        self._arithmetic, self._device, self._calibrates = arithmetic, device, calibrates
        self._constants = constants_of(graph)

    def run(
        self, inputs: Mapping[str, np.ndarray], sink: Sink | None = None, probes: Collection[str] | None = None
    ) -> dict[str, np.ndarray]:
        """Run once; the first run calibrates before it. Takes and returns name → array in the dtype that the graph has.

        Raises InputError for inputs that do not fit the graph, where a node fails, and for data with NaN or Inf, which
        has no scale.
        """
        if self._calibrates:
            self._calibrate(inputs)
        return super().run(inputs, sink, probes)

    def _calibrate(self, inputs: Mapping[str, np.ndarray]) -> None:
        products = [n for n in self._graph.nodes if n.op in PRODUCTS]
        read = {name: 0.0 for node in products for name in self._data(node).values()}

        def look(name: str, value: Any) -> None:
            if name in read and isinstance(value, torch.Tensor) and value.numel():
                read[name] = float(value.abs().max())

        for name, array in inputs.items():
            look(name, torch.as_tensor(np.asarray(array, np.float32)) if name in read else None)
        with deterministic():
            Executor(self._graph, FP32, self._device).run(inputs, look)
        overrides: dict[str, Arithmetic] = {}
        self.settings["scales"] = scales = {}
        for node in products:
            fixed: list[float | None] = [None, None]
            for place, name in self._data(node).items():
                if not math.isfinite(read[name]):
                    raise InputError(
                        f"{self._graph}: {name!r} holds NaN or Inf, so that node {node.name!r} has no FP8 scale"
                    )
                fixed[place] = read[name] / CODECS["e4m3"].largest or 1.0
            scaling = self._arithmetic.scaling
            assert scaling is not None
            own = FixedScaling(scaling.options, (fixed[0], fixed[1]))
            overrides[node.name] = replace(self._arithmetic, scaling=own)
            scales[node.name] = fixed
        self._executor = Executor(self._graph, self._arithmetic, self._device, overrides=overrides)
        self._calibrates = False

    def _data(self, node: Node) -> dict[int, str]:
        """Operands of a product that are no constants, by place."""
        return {i: name for i, name in enumerate(node.proto.input[:2]) if name not in self._constants}


MULTIPLE = 16
"""``torch._scaled_mm`` wants multiples of this; other lengths are filled up with zeros, which change no sum."""
FIRST_CAPABILITY = (8, 9)
"""Compute capability of the first NVIDIA cards with FP8: Ada; Hopper has 9.0."""


@dataclass(frozen=True)
class TensorCores(RunningSum):
    """Sums as the device keeps them. Operands are codes in E4M3, held in float32."""

    fast: bool = False
    """Whether sums stay in the tensor core's registers (``use_fast_accum``) instead of being promoted into FP32."""

    def matmul(self, a: Tensor, b: Tensor) -> Tensor:
        """a [M, K] times b [K, N], float32 [M, N]: scales of 1, so that scales of any granularity come behind it."""
        (rows, length), columns = a.shape, b.shape[1]
        if not rows or not length or not columns:
            return a.new_zeros(rows, columns, dtype=torch.float32)
        long, wide = -length % MULTIPLE, -columns % MULTIPLE
        left = functional.pad(a, (0, long)).to(torch.float8_e4m3fn).contiguous()
        right = functional.pad(b.t(), (0, long, 0, wide)).to(torch.float8_e4m3fn).contiguous().t()
        one = torch.ones((), device=a.device)
        product = torch._scaled_mm(
            left, right, scale_a=one, scale_b=one, out_dtype=torch.float32, use_fast_accum=self.fast
        )
        return product[:, :columns]

    @property
    def settings(self) -> dict[str, Any]:
        """The product in words, JSON-safe."""
        return {"product": "torch._scaled_mm", "use_fast_accum": self.fast, "filled_up_to_multiples_of": MULTIPLE}


def unavailable(device: str) -> str:
    """Reason why FP8 products cannot be computed on ``cpu`` or ``cuda:N``; empty where they can."""
    if device != "cpu" and (found := torch.cuda.get_device_capability(device)) < FIRST_CAPABILITY:
        name = torch.cuda.get_device_name(device)
        return f"{name} has no FP8: its compute capability is {found[0]}.{found[1]}, FP8 begins with 8.9"
    try:
        TensorCores("fp32", None, 23, 32).matmul(torch.ones(16, 16, device=device), torch.ones(16, 16, device=device))
    except (RuntimeError, NotImplementedError, ValueError) as error:
        return f"torch._scaled_mm does not run on {device}: {str(error).splitlines()[0]}"
    return ""
