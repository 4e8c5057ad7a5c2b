"""The emulated backends: a graph executed with every value rounded as the hardware would, on any machine."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx
import torch

from cp_debug.backends.arithmetic import ARITHMETICS, Arithmetic, overrides_of
from cp_debug.backends.base import Program, Session, Sink
from cp_debug.backends.determinism import deterministic
from cp_debug.backends.executor import Executor, unsupported
from cp_debug.backends.spec import BackendSpec
from cp_debug.errors import BackendUnavailable, InputError
from cp_debug.graph.check_inputs import check_inputs
from cp_debug.graph.graph import Graph
from cp_debug.graph.half_precision import narrow_values
from cp_debug.graph.narrow_qdq import check_narrow_types
from cp_debug.graph.tensor_ends import as_arrays
from cp_debug.probes.arrays import as_numpy


class EmulatedBackend:
    """``emu-fp32``, ``emu-tf32``, ``emu-bf16``, ``emu-fp16``, ``emu-fp16acc``, ``emu-int8`` on the CPU or on CUDA.

    ``emu-fp8``, ``emu-mxfp8``, ``emu-mxfp4``, ``emu-nvfp4`` and ``emu-int4`` encode the operands of products, with the
    options that ``NarrowOptions`` reads from the spec.
    ``emu-int8`` is for graphs with Q/DQ nodes. Every run gives the same bits. ``tile`` is the number of channels per
    tile of FP16 accumulation, where the kernel to be emulated is known. ``overrides`` computes some nodes in another
    arithmetic: node name → ``fp64 fp32 tf32 bf16 fp16 fp16acc``. Raises BackendUnavailable when the spec names a device
    that is not there.
    """

    emulated = True

    def __init__(
        self, spec: BackendSpec, *, tile: int | None = None, overrides: Mapping[str, str] = MappingProxyType({})
    ) -> None:
        self.spec = spec
        self.overrides = overrides
        self.keep_fp32: frozenset[str] = frozenset()
        self.arithmetic = ARITHMETICS[spec.precision]
        self.precision = self.arithmetic.name
        self.device = spec.device or "cpu"
        if tile is not None and self.arithmetic.tile:
            self.arithmetic = dataclasses.replace(self.arithmetic, tile=tile)
        require_device(spec, self.device, nearest=f"{spec.name}@cpu")

    def keeping(self, nodes: Collection[str]) -> EmulatedBackend:
        """A copy of the backend with these ONNX nodes in FP32.

        Raises InputError for ``emu-fp32`` and ``emu-int8``, where that changes nothing.
        """
        if self.precision in ("fp32", "int8"):
            raise InputError(f"{self.spec}: no node can be kept in FP32; all nodes compute in it already")
        other = copy.copy(self)
        other.keep_fp32 = frozenset(nodes)
        other_nodes = {node: name for node, name in self.overrides.items() if node not in self.keep_fp32}
        other.overrides = other_nodes | dict.fromkeys(nodes, "fp32")
        return other

    def open(self, program: Program) -> Session:
        """A session on the program's graph.

        Raises InputError for operators that nothing here can execute, and for ``emu-int8`` when the graph does not tell
        what is quantized.
        """
        if self.precision == "int8":
            program.require_int8(self.spec)
        overrides = {node: ARITHMETICS[name] for node, name in self.overrides.items()}
        return ExecutorSession(program.graph, self.arithmetic, self.device, overrides=overrides)

    def versions(self) -> dict[str, str]:
        """torch, which computes, and onnx, whose reference runs what has no kernel; see ``torch_versions``."""
        return torch_versions(self.device) | {"onnx": onnx.__version__}


def require_device(spec: BackendSpec, device: str, *, nearest: str) -> None:
    """Raise BackendUnavailable where torch does not see ``device``: ``cpu``, ``cuda`` or ``cuda:N``."""
    if device != "cpu" and (count := torch.cuda.device_count()) <= int(device.partition(":")[2] or 0):
        reason = f"torch {torch.__version__} sees {count} CUDA devices"
        install = None if torch.version.cuda else "pip install torch, in a build with CUDA"
        raise BackendUnavailable(str(spec), reason, install=install, nearest=nearest)


def torch_versions(device: str) -> dict[str, str]:
    """Versions of torch and, with CUDA, of its libraries; the name of the device there."""
    versions = {"torch": str(torch.__version__)}
    if torch.device(device).type != "cpu":
        versions |= {"cuda": str(torch.version.cuda), "cudnn": str(torch.backends.cudnn.version())}
        versions["device"] = torch.cuda.get_device_name(device)
    return versions


class ExecutorSession:
    """An ONNX graph that the executor runs in one arithmetic; every value is exposed.

    ``tf32`` turns on CUDA's own TF32. Nodes that the graph itself declares in FP16 or BF16 are computed so, but in
    FP64.
    """

    def __init__(
        self,
        graph: Graph,
        arithmetic: Arithmetic,
        device: str,
        *,
        tf32: bool = False,
        overrides: Mapping[str, Arithmetic] = MappingProxyType({}),
    ) -> None:
        if unknown := unsupported(graph):
            names = ", ".join(sorted({n.op for n in unknown}))
            raise InputError(f"{graph}: no implementation of {names} (first used by node {unknown[0].name!r})")
        check_narrow_types(graph)
        declared = overrides_of(graph, narrow_values(graph), arithmetic)
        self._graph, self._tf32 = graph, tf32
        self._executor = Executor(graph, arithmetic, device, overrides={**declared, **overrides})
        self.exposed: Collection[str] = graph.tensors
        with deterministic(tf32=tf32) as settings:
            self.settings: dict[str, Any] = settings | arithmetic.settings
        if overrides:
            self.settings |= {"overrides": {node: a.name for node, a in overrides.items()}}

    def run(
        self, inputs: Mapping[str, np.ndarray], sink: Sink | None = None, probes: Collection[str] | None = None
    ) -> dict[str, np.ndarray]:
        """Run once; the program is the same with and without a sink.

        Takes and returns name → array in the dtype that the graph declares.
        Raises InputError for inputs that do not fit the graph, and when a node fails.
        """
        check_inputs(self._graph.inputs, inputs, str(self._graph))
        with deterministic(tf32=self._tf32):
            outputs = self._executor.run(inputs, sink, probes)
        if self._executor.not_emulated:
            self.settings["not_emulated"] = dict(self._executor.not_emulated)
        return as_arrays(self._graph, outputs, as_numpy)

    def close(self) -> None:
        """Free the weights."""
        del self._executor
