"""ONNX Runtime as a backend, on the CPU or on CUDA.

Unoptimized (``ort``, ``ort-none``) or optimized (``ort-basic``, ``ort-all``); for graphs with Q/DQ pairs ``ort-int8``
(simulated) and ``ort-int8-qlinear`` (integer kernels); on CUDA ``ort-tf32``, ``ort-fp16`` (casts put into the graph)
and ``ort-trt`` (its TensorRT provider).
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx

from cp_debug.backends.base import Program, Sink
from cp_debug.backends.ort_chunks import ChunkedGraph
from cp_debug.backends.ort_optimized import OptimizedProgram, Replacement, build, replacements
from cp_debug.backends.ort_options import LEVELS, Runtime, device_of, read_settings
from cp_debug.backends.spec import BackendSpec
from cp_debug.doing import doing
from cp_debug.errors import InputError
from cp_debug.graph import onnx_runtime
from cp_debug.graph.check_inputs import check_inputs
from cp_debug.graph.graph import Graph
from cp_debug.graph.half_precision import cast_surgery
from cp_debug.graph.made_up import MadeUp
from cp_debug.graph.narrow_qdq import check_narrow_types
from cp_debug.graph.onnx_runtime import to_numpy, to_ort
from cp_debug.graph.tensor_ends import as_arrays
from cp_debug.probes.distance import outputs_apart

if TYPE_CHECKING:
    import onnxruntime

_PRECISIONS = {"tf32": "tf32", "fp16": "fp16", "trt": "tf32", "int8": "int8", "int8-qlinear": "int8"}
_HALF = {onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16}


class OrtBackend:
    """ONNX Runtime on the CPU, or on CUDA with TF32 off unless asked for.

    ``disabled_optimizers`` names graph transformers to leave out (``NchwcTransformer``); ``threads`` defaults to the
    processors available. Raises MissingPackage without onnxruntime, BackendUnavailable when it lacks the device.
    """

    emulated = False

    def __init__(
        self, spec: BackendSpec, *, disabled_optimizers: Sequence[str] = (), threads: int | None = None
    ) -> None:
        self.spec = spec
        self.device = device_of(spec)
        self.precision = _PRECISIONS.get(spec.variant, "fp32")
        self.level = "all" if spec.variant == "int8-qlinear" else spec.variant if spec.variant in LEVELS else "none"
        self.disabled_optimizers = tuple(disabled_optimizers)
        self.keep_fp32: frozenset[str] = frozenset()
        self.runtime = Runtime.create(spec, threads)

    def with_threads(self, count: int | None) -> OrtBackend:
        """A copy of the backend with another number of threads; None: the processors available."""
        changed = OrtBackend(self.spec, disabled_optimizers=self.disabled_optimizers, threads=count)
        return changed.keeping(self.keep_fp32)

    def keeping(self, nodes: Collection[str]) -> OrtBackend:
        """A copy of the backend with these nodes in FP32; for ``ort-fp16``, which puts the casts."""
        changed = copy.copy(self)
        changed.keep_fp32 = frozenset(nodes)
        return changed

    def open(self, program: Program) -> OrtSession:
        """A session on the program's graph.

        Raises InputError when ONNX Runtime refuses the model, a weight is beyond FP16, or nothing is quantized for
        INT8.
        """
        if self.precision == "int8":
            program.require_int8(self.spec)
        check_narrow_types(program.graph)
        return OrtSession(self, program.graph, program.example)

    def versions(self) -> dict[str, str]:
        """onnxruntime, and onnx, which cuts the graph."""
        import onnxruntime

        return {"onnxruntime": onnxruntime.__version__, "onnx": onnx.__version__}


class OrtSession:
    """A graph ready to run, whole (as deployed) or observed.

    Observed, it runs chunk after chunk, so that memory does not grow with the number of layers. Optimized levels, and
    graphs with FP16 on a CPU, observe the program that ONNX Runtime wrote; its outputs are compared with the whole
    program's when values are first asked for, on ``example`` or made-up inputs: ``settings["observer_gap"]`` is the
    largest relative L2 difference, 0 as far as measured, or None for a model for which no input can be made up.
    """

    def __init__(self, backend: OrtBackend, graph: Graph, example: Mapping[str, np.ndarray] | None = None) -> None:
        self._backend, self._example = backend, example
        self._whole: onnxruntime.InferenceSession | None = None
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._written: Path | None = None
        """The program that ONNX Runtime wrote; None where the graph runs as it is."""
        original_values = set(graph.values)  # casts are no layers
        if backend.precision == "fp16":
            self._folder = tempfile.TemporaryDirectory(prefix="cpdebug-ort-")
            cast = cast_surgery(graph, "fp16", backend.keep_fp32, Path(self._folder.name) / "fp16.onnx")
            graph = Graph(cast, source=graph)
        self._graph, self._time_limit = graph, onnx_runtime.time_limit(graph)
        self._observed = ChunkedGraph(backend.runtime, graph)
        self._settings: dict[str, Any] = dict(backend.runtime.settings)
        self._exposed: Collection[str] = [v for v in graph.tensors if v in original_values]
        if backend.spec.variant == "trt":
            self._exposed = [v.name for v in graph.outputs]
        elif backend.level != "none" or (backend.device == "cpu" and graph.element_types & _HALF):
            try:
                self._write_program()
            except BaseException:
                self.close()
                raise

    @property
    def settings(self) -> Mapping[str, Any]:
        """The numeric settings, JSON-safe."""
        _ = self._optimized
        return self._settings

    @property
    def exposed(self) -> Collection[str]:
        """Values that a sink is given, by their names in the graph."""
        _ = self._optimized
        return self._exposed

    @property
    def integer_kernels(self) -> int | None:
        """How many nodes of an INT8 program compute in integers; None in other precisions."""
        return self.settings.get("integer_kernels")

    def run(
        self, inputs: Mapping[str, np.ndarray], sink: Sink | None = None, probes: Collection[str] | None = None
    ) -> dict[str, np.ndarray]:
        """Run once. Without a sink the whole model runs in one session, as deployed.

        Takes and returns name → array in the dtype that the graph declares.
        Raises InputError for inputs that do not fit the graph, and when a node fails.
        """
        check_inputs(self._graph.inputs, inputs, str(self._graph))
        if sink is None:
            return self._run_whole(inputs)
        shown = set(self.exposed) if probes is None else set(probes).intersection(self.exposed)
        if self._backend.spec.variant == "trt":  # pieces of the graph would be other engines
            outputs = self._run_whole(inputs)
            for name in shown.intersection(outputs):
                sink(name, outputs[name])
            return outputs
        if self._optimized is not None:
            for name in shown.intersection(self._optimized.folded):
                sink(name, self._optimized.graph.initializer(name))
        return self._observed.run(inputs, sink, shown)

    def optimized_nodes(self) -> list[Replacement]:
        """Replacements of the nodes between visible values; empty when the graph runs as it is."""
        return replacements(self._optimized, self._graph) if self._optimized else []

    def free_memory(self) -> None:
        """Close the sessions of the chunks; the next run opens them again."""
        self._observed.close()

    def close(self) -> None:
        """Close all sessions and remove what ONNX Runtime wrote."""
        self._observed.close()
        self._whole = None
        if self._folder is not None:
            self._folder.cleanup()

    def _write_program(self) -> None:
        backend, graph = self._backend, self._graph
        self._folder = tempfile.TemporaryDirectory(prefix="cpdebug-ort-")
        self._written = Path(self._folder.name) / "program.onnx"
        self._whole = backend.runtime.session(
            graph.path,
            level=backend.level,
            write=self._written,
            disabled_optimizers=backend.disabled_optimizers,
            shown=graph,
        )

    @cached_property
    def _optimized(self) -> OptimizedProgram | None:
        """The program that ONNX Runtime wrote, ready to be observed: a run without a sink does not need that."""
        if self._written is None or self._whole is None:
            return None
        backend, graph = self._backend, self._graph
        try:
            inputs = self._example or MadeUp(graph).sample(0)
            untouched = self._run_whole(inputs)
        except onnx_runtime.Endless:
            raise
        except InputError:  # inputs that cannot be made up: names are then not verified, nor the gap measured
            inputs = None
        program = build(backend.runtime, graph, self._written, inputs)
        self._observed, self._exposed = program.observed, [*program.folded, *program.exposed]
        self._settings = read_settings(self._whole)
        self._settings["disabled_optimizers"] = list(backend.disabled_optimizers)
        if backend.precision == "int8":
            self._settings["integer_kernels"] = sum("QLinear" in n.op or "Integer" in n.op for n in program.graph.nodes)
        self._settings["observer_gap"] = None if program.outputs is None else outputs_apart(program.outputs, untouched)
        return program

    def _run_whole(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        runtime, level = self._backend.runtime, self._backend.level
        self._whole = self._whole or runtime.session(self._graph.path, level=level, shown=self._graph)
        return run_whole(self._whole, self._graph, inputs, self._time_limit)


def run_whole(
    session: onnxruntime.InferenceSession, graph: Graph, inputs: Mapping[str, np.ndarray], limit: float | None = None
) -> dict[str, np.ndarray]:
    """The outputs of ``graph``, open in ``session``; parts of those that are no tensors, as ``as_arrays`` names them.

    Takes and returns name → array in the dtype that the graph declares.
    Raises InputError when it fails, and when ``limit`` (seconds, of ``onnx_runtime.time_limit``) is over.
    """
    names = [v.name for v in graph.outputs]
    try:
        with doing(f"ONNX Runtime ran {graph}"):
            fed = to_ort(inputs)
            values = onnx_runtime.run(session, names, fed, limit)
            others = [n for n, v in zip(names, values, strict=True) if not v.is_tensor()]
            # An OrtValue gives no element of a sequence.
            parts = dict(
                zip(others, onnx_runtime.run(session, others, fed, limit, plain=True) if others else (), strict=True)
            )
    except onnx_runtime.Endless as error:
        raise onnx_runtime.Endless(f"{graph}: {error}") from error
    except Exception as error:  # each status of ONNX Runtime is a class of its own, directly below Exception
        raise InputError(f"{graph}: ONNX Runtime failed: {onnx_runtime.told(error)}") from error
    plain = {n: parts[n] if n in parts else to_numpy(v) for n, v in zip(names, values, strict=True)}
    return as_arrays(graph, plain)
