"""PyTorch: the eager module where there is one, else the ONNX graph executed with torch."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cp_debug.backends.arithmetic import FP32, FP64
from cp_debug.backends.base import Program, Session, Sink
from cp_debug.backends.determinism import deterministic
from cp_debug.backends.emulated import ExecutorSession, require_device, torch_versions
from cp_debug.backends.spec import BackendSpec
from cp_debug.errors import BackendUnavailable, InputError
from cp_debug.graph.check_inputs import as_declared, check_inputs
from cp_debug.probes.arrays import as_numpy, as_torch, dtype_name, is_dense, layout_of
from cp_debug.probes.module_state import copied_to
from cp_debug.probes.trace import trace

DTYPES = {
    "fp32": torch.float32,
    "tf32": torch.float32,
    "fp64": torch.float64,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "int8": torch.float32,
}

Emit = Callable[[str, Tensor], None]
"""Takes the name of a ``TorchValue`` and its tensor, at once."""

LARGE = 1 << 29
"""Bytes of a module whose copy, on a GPU or in another precision, is there only while it runs."""


class TorchBackend:
    """PyTorch on the CPU, unless the spec names another device.

    ``torch``, ``torch-fp64``, ``torch-bf16``, ``torch-fp16``, ``torch-tf32`` and, for modules with fake quantizers,
    ``torch-int8``. Raises BackendUnavailable for CUDA where there is none, and for TF32 on a CPU.
    """

    emulated = False

    def __init__(self, spec: BackendSpec) -> None:
        self.spec = spec
        self.precision = spec.variant.removeprefix("compile").removeprefix("-") or "fp32"
        self.device = spec.device or ("cuda" if self.precision == "tf32" else "cpu")
        if self.precision == "tf32" and self.device == "cpu":
            raise BackendUnavailable(str(spec), "a CPU has no TF32", nearest="emu-tf32")
        require_device(spec, self.device, nearest="emu-tf32" if self.precision == "tf32" else f"{spec.name}@cpu")

    def open(self, program: Program) -> Session:
        """A session on the program's module, else on its graph.

        Raises BackendUnavailable for a graph in FP16, BF16 or INT8, and InputError for ``torch-int8`` when nothing is
        quantized.
        """
        if self.precision == "int8":
            program.require_int8(self.spec)
        if program.module is not None:
            return ModuleSession(program, DTYPES[self.precision], self.device, tf32=self.precision == "tf32")
        if self.precision in ("fp16", "bf16", "int8"):
            raise BackendUnavailable(
                str(self.spec),
                f"{program.graph} comes without a torch module, and the precision of a graph is in the graph",
                nearest=f"emu-{self.precision}",
            )
        arithmetic = FP64 if self.precision == "fp64" else FP32
        return ExecutorSession(program.graph, arithmetic, self.device, tf32=self.precision == "tf32")

    def versions(self) -> dict[str, str]:
        """See ``torch_versions``."""
        return torch_versions(self.device)


class ModuleSession:
    """An eager module, traced where values are asked for."""

    def __init__(self, program: Program, dtype: torch.dtype, device: str, *, tf32: bool) -> None:
        assert program.module is not None
        self._program, self._alignment = program, program.alignment
        self._dtype, self._device, self._tf32 = dtype, torch.device(device), tf32
        self._converted = device != "cpu" or dtype != torch.float32
        held = sum(t.nbytes for t in chain(program.module.parameters(), program.module.buffers()))
        self._large = self._converted and held >= LARGE
        self._module: nn.Module | None = None if self._large else self._made()
        self._names = [v.name for v in program.graph.outputs]
        # What the module returned is given at its end, by position: an equal tensor inside is no output.
        links = [k for k in program.alignment.links if k.onnx not in self._names] if program.alignment else []
        # Inside a function of torch, other devices and dtypes go other ways under the same names.
        inner = device == "cpu" and dtype == torch.float32
        self._values: dict[str, list[str]] = {}
        for link in links:
            if link.torch is not None and (inner or ":" not in link.torch):
                self._values.setdefault(link.torch, []).append(link.onnx)
        exposed_names = {*chain(*self._values.values()), *self._names}
        self.exposed: Collection[str] = tuple(name for name in program.graph.values if name in exposed_names)
        with self._settled() as settings:
            self.settings: Mapping[str, Any] = {**settings, "dtype": dtype_name(torch.empty(0, dtype=dtype))}

    def _made(self) -> nn.Module:
        """The module on the device, in the dtype: FP32 is what it is in, FP16 where it was made so."""
        module = self._program.module
        assert module is not None
        if not self._converted:
            return module
        return copied_to(module, self._device, None if self._dtype == torch.float32 else self._dtype)

    def free_memory(self) -> None:
        """Free the copy of a large module; the next run makes it again."""
        if self._large:
            self._module = None

    def run(
        self, inputs: Mapping[str, np.ndarray], sink: Sink | None = None, probes: Collection[str] | None = None
    ) -> dict[str, np.ndarray]:
        """Run the module, traced where there is a sink. BF16 outputs come as float32, which holds them exactly.

        Raises ModuleFailed when it raises in forward, InputError when inputs or outputs are not those of the graph.
        """
        if self._module is None:
            self._module = self._made()
        graph = self._program.graph
        inputs = as_declared(graph, inputs)  # a component before this one computes in the backend's precision
        check_inputs(graph.inputs, inputs, self._program.name)
        tensors = {v.name: self._input(inputs[v.name]) for v in graph.inputs}
        shown: set[str] = set()

        def give(name: str, tensor: Tensor) -> None:
            if sink is not None and name not in shown and (probes is None or name in probes):
                shown.add(name)
                sink(name, tensor)

        def translate(value: str, tensor: Tensor) -> None:
            for name in self._values.get(value, ()):
                give(name, tensor)

        with self._settled():
            results = self._forward(tensors, translate if sink else None)
        if len(results) != len(self._names):
            raise InputError(f"{self._program.name}: the module returned {len(results)} tensors for {self._names}")
        outputs = dict(zip(self._names, results, strict=True))
        for name, tensor in outputs.items():
            if not is_dense(tensor):  # though those of the first forward were
                returned = f"{name!r} as {layout_of(tensor)}"
                raise InputError(f"{self._program.name}: the module returned {returned}; expected a dense tensor")
            give(name, tensor)
        return {n: as_numpy(t.float() if t.dtype == torch.bfloat16 else t) for n, t in outputs.items()}

    def _settled(self) -> AbstractContextManager[Mapping[str, Any]]:
        """Context in which torch has this session's settings; gives them as read back."""
        return deterministic(tf32=self._tf32)

    def _forward(self, inputs: Mapping[str, Tensor], emit: Emit | None) -> Sequence[Tensor]:
        """The flattened outputs of one forward; ``emit`` is given every value of the alignment, by torch's name."""
        assert self._module is not None
        prefix = self._alignment.prefix if self._alignment else ""
        sink = None if emit is None else lambda value, tensor: emit(value.name, tensor)
        return trace(self._module, inputs, sink, prefix=prefix).tensors

    def _input(self, array: np.ndarray) -> Tensor:
        tensor = as_torch(array)
        converts = tensor.is_floating_point() and self._dtype != torch.float32
        return tensor.to(self._device, self._dtype if converts else None)

    def close(self) -> None:
        """Free the copy of the module."""
        self._module = None
