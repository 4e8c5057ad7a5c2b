"""OpenVINO on a CPU: the model as it is compiled for the outputs, a second compilation for the values inside.

Added outputs keep OpenVINO from fusing across them. Values are shown whose showing leaves the outputs what they were;
the others lie inside a fused layer, whose operators and kernel the compiled model tells by itself.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from copy import copy
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from cp_debug.backends.base import Program, Sink
from cp_debug.backends.ort_options import processors
from cp_debug.backends.spec import BackendSpec
from cp_debug.doing import doing
from cp_debug.errors import BackendUnavailable, InputError, text_of
from cp_debug.graph.check_inputs import check_inputs
from cp_debug.optional import require
from cp_debug.probes.distance import outputs_apart
from cp_debug.serialize import json_safe

if TYPE_CHECKING:
    import openvino

_HINTS = {"fp32": "f32", "fp16": "f16", "bf16": "bf16", "int8": "f32"}
_SAME = {"fp32": 1e-5, "fp16": 2e-3, "bf16": 2e-2, "int8": 1e-5}
"""Relative L2 distance of outputs up to which a program with more outputs is the same one, rounded elsewhere."""
_MOST_COMPILED = 48
"""Programs that are compiled at most to find out which values may be shown."""
_READ_BACK = (
    "EXECUTION_MODE_HINT", "INFERENCE_PRECISION_HINT", "INFERENCE_NUM_THREADS", "NUM_STREAMS", "PERFORMANCE_HINT",
    "DYNAMIC_QUANTIZATION_GROUP_SIZE", "KV_CACHE_PRECISION", "CPU_DENORMALS_OPTIMIZATION", "RUNTIME_REQUIREMENTS",
)  # fmt: skip
_OLDEST = (2024, 0)
KNOBS = {
    "SNIPPETS_MODE": "DISABLE",
    "LP_TRANSFORMS_MODE": "NO",
    "EXECUTION_MODE_HINT": "ACCURACY",
    "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0",
    "KV_CACHE_PRECISION": "f32",
}
"""Property → the value that disables what it stands for: fused elementwise kernels, low-precision transformations, what
PERFORMANCE permits. The first two are undocumented; the compiled model's layers tell what became of them."""


class OpenVinoBackend:
    """OpenVINO's CPU plug-in: ``openvino`` (FP32), ``openvino-fp16``, ``openvino-bf16``, ``openvino-int8`` (Q/DQ).

    ``threads`` defaults to the processors available. Raises MissingPackage without openvino, BackendUnavailable for
    another device, a type that this processor lacks, and a version before 2024.0.
    """

    emulated = False
    device = "cpu"

    def __init__(self, spec: BackendSpec, *, threads: int | None = None) -> None:
        self.spec, self.precision = spec, spec.variant or "fp32"
        ov = require("openvino", "openvino")
        if tuple(map(int, re.findall(r"\d+", ov.__version__)[:2])) < _OLDEST:
            reason = f"openvino {ov.__version__} is too old; expected {_OLDEST[0]}.{_OLDEST[1]} or later"
            raise BackendUnavailable(str(spec), reason, nearest="ort-all")
        self.core: openvino.Core = ov.Core()
        if spec.device not in (None, "cpu"):
            reason = f"OpenVINO computes on the CPU here, not on {spec.device}"
            raise BackendUnavailable(str(spec), reason, nearest=spec.name)
        able = self.core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        has = [name for name in ("FP32", "FP16", "BF16", "INT8") if name in able]
        if self.precision in ("fp16", "bf16") and self.precision.upper() not in has:
            reason = f"OpenVINO computes nothing in {self.precision.upper()} on this processor, only {', '.join(has)}"
            raise BackendUnavailable(str(spec), reason, nearest=f"emu-{self.precision}")
        self.threads = threads or processors()
        self._disabled: frozenset[str] = frozenset()

    @property
    def knobs(self) -> list[str]:
        """Those of ``KNOBS`` that this version takes."""
        from openvino import Model, Shape, Type, op

        taken, value = list[str](), op.Parameter(Type.f32, Shape([1]))
        model = Model([value.output(0)], [value])
        for name, off in KNOBS.items():
            with suppress(RuntimeError):
                self.core.compile_model(model, "CPU", {name: off})
                taken.append(name)
        return taken

    def without(self, knobs: Collection[str]) -> OpenVinoBackend:
        """A copy of the backend that disables these of ``KNOBS``."""
        changed = copy(self)
        changed._disabled = frozenset(knobs)
        return changed

    def with_threads(self, count: int | None) -> OpenVinoBackend:
        """A copy of the backend with another number of threads; None: the processors available.

        OpenVINO takes no more threads than there are processors, so one fewer stands for more.
        """
        changed, most = copy(self), processors()
        changed.threads = most if count is None else count if count <= most else max(most - 1, 1)
        return changed

    def open(self, program: Program) -> OpenVinoSession:
        """A session on the program's graph.

        Raises InputError when OpenVINO refuses the model, and when nothing is quantized for INT8.
        """
        if self.precision == "int8":
            program.require_int8(self.spec)
        return OpenVinoSession(self, program)

    def versions(self) -> dict[str, str]:
        """openvino with its build, and the processor's name."""
        import openvino

        name = str(self.core.get_property("CPU", "FULL_DEVICE_NAME"))
        return {"openvino": openvino.get_version(), "device": name}

    @property
    def properties(self) -> dict[str, Any]:
        """Properties that every program is compiled with: those that can change numbers."""
        return {
            "INFERENCE_PRECISION_HINT": _HINTS[self.precision],
            "EXECUTION_MODE_HINT": "PERFORMANCE" if self.precision in ("fp16", "bf16") else "ACCURACY",
            "INFERENCE_NUM_THREADS": self.threads,
            "NUM_STREAMS": 1,
            "ENABLE_CPU_PINNING": False,
            **{name: KNOBS[name] for name in self._disabled},
        }


class OpenVinoSession:
    """A model, compiled as it is and with values inside as outputs."""

    def __init__(self, backend: OpenVinoBackend, program: Program) -> None:
        self._backend, self._graph = backend, program.graph
        self._shown = program.ir or program.graph
        with words(self._shown, "cannot read it"):
            self._model = backend.core.read_model(str(program.ir or program.graph.path))
        self._plain = self._compiled(())
        self._outputs = [value.name for value in program.graph.outputs]
        named = {name for op in self._model.get_ordered_ops() for out in op.outputs() for name in out.get_names()}
        self.exposed: Collection[str] = [v for v in program.graph.tensors if v in named]
        self._looks: dict[tuple[tuple[int, ...], ...], tuple[openvino.CompiledModel, list[str]]] = {}
        self._written: set[str] = set()
        self.layers: list[tuple[tuple[str, ...], tuple[str, ...]]] = []
        """Layers of the compiled model: the graph's nodes that one computes, and its kernel."""
        self.tactics: Mapping[str, str] = self._kernels()
        self.settings: dict[str, Any] = {
            name.lower(): json_safe(str(self._plain.get_property(name)))
            for name in _READ_BACK
            if name in self._plain.get_property("SUPPORTED_PROPERTIES")
        }

    @property
    def integer_kernels(self) -> int | None:
        """Number of layers that compute in INT8; None where the program is not asked to."""
        if self._backend.precision != "int8":
            return None
        return sum(self.tactics[value].lower().endswith(("_i8", "_u8")) for value in self._written)

    def run(
        self, inputs: Mapping[str, np.ndarray], sink: Sink | None = None, probes: Collection[str] | None = None
    ) -> dict[str, np.ndarray]:
        """Run once. Without a sink the model runs as it is deployed.

        Takes and returns name → array in the dtype that the graph declares.
        Raises InputError for inputs that do not fit the graph, and when OpenVINO fails.
        """
        check_inputs(self._graph.inputs, inputs, str(self._graph))
        if sink is None:
            return self._run(self._plain, inputs, self._outputs)
        shapes = tuple(array.shape for array in inputs.values())
        if shapes not in self._looks:
            self._looks[shapes] = self._visible(inputs)
        program, values = self._looks[shapes]
        shown = [v for v in self.exposed if v in {*values, *self._outputs} and (probes is None or v in probes)]
        results = self._run(program, inputs, [*self._outputs, *shown])
        for name in shown:
            sink(name, results[name])
        return {name: results[name] for name in self._outputs}

    def close(self) -> None:
        """Free all that was compiled."""
        self._looks.clear()
        del self._plain, self._model

    def _visible(self, inputs: Mapping[str, np.ndarray]) -> tuple[openvino.CompiledModel, list[str]]:
        """The program that shows as many values as can be found by halving while the outputs stay the same; and these.

        In FP32 a value inside a fused layer is the same number when it is written. Narrower types are rounded where
        they are written and nowhere else, so only what layers write is shown.
        """
        plain, everything = self._run(self._plain, inputs, self._outputs), list(self.exposed)
        pending = [[v for v in everything if v in self._written]]
        if self._backend.precision == "fp32" and self._graph.precision != "int8":
            if (look := self._same(plain, everything, inputs)) is not None:
                return look, everything
            pending.insert(0, [v for v in everything if v not in self._written])
        shown: list[str] = []
        program = self._plain
        for _ in range(_MOST_COMPILED):
            if not pending:
                break
            group = pending.pop()
            if (look := self._same(plain, [*shown, *group], inputs)) is not None:
                program, shown = look, [*shown, *group]
            elif len(group) > 1:
                pending += [group[len(group) // 2 :], group[: len(group) // 2]]
        return program, shown

    def _same(
        self, plain: Mapping[str, np.ndarray], values: Sequence[str], inputs: Mapping[str, np.ndarray]
    ) -> openvino.CompiledModel | None:
        """The program that shows ``values``; None where the outputs do not stay what they are."""
        program = self._compiled(values)
        gap = outputs_apart(self._run(program, inputs, self._outputs), plain)
        return program if gap <= _SAME[self._backend.precision] else None

    def _compiled(self, values: Sequence[str]) -> openvino.CompiledModel:
        model = self._model
        if values:
            model = model.clone()
            model.add_outputs([v for v in values if v not in self._outputs])
        with words(self._shown, "cannot compile it"):
            return self._backend.core.compile_model(model, "CPU", self._backend.properties)

    def _run(
        self, program: openvino.CompiledModel, inputs: Mapping[str, np.ndarray], names: Sequence[str]
    ) -> dict[str, np.ndarray]:
        with words(self._shown, "failed"):
            request = program.create_infer_request()
            places = {name: i for i, port in enumerate(program.inputs) for name in port.get_names()}
            request.infer({places[name]: array for name, array in inputs.items() if name in places})
            places = {name: i for i, name in enumerate(self._outputs)}
            places |= {name: i for i, port in enumerate(program.outputs) for name in port.get_names()}
            return {name: _array(request.get_output_tensor(places[name])) for name in names}

    def _kernels(self) -> dict[str, str]:
        """ONNX value → type and kernel of the compiled model's layer that computes it; notes those that are written."""
        made = [op for op in self._model.get_ops() if op.get_type_name() != "Result"]
        named = {op.get_friendly_name(): [n for out in op.outputs() for n in out.get_names()] for op in made}
        place = {value: i for i, value in enumerate(self._graph.producer)}
        kernels: dict[str, str] = {}
        for layer in self._plain.get_runtime_model().get_ordered_ops():
            info = {key: str(value.astype(str)) for key, value in layer.get_rt_info().items()}
            origins = info.get("originalLayersNames", "").split(",")
            if values := [name for op in origins for name in named.get(op, ()) if name in place]:
                kind, kernel = info["layerType"], info.get("primitiveType", "unknown")
                kernels |= dict.fromkeys(values, kind if kernel.startswith("unknown") else f"{kind}:{kernel}")
                nodes = dict.fromkeys(self._graph.producer[value].name for value in values)
                self.layers.append((tuple(nodes), (kernels[values[0]],)))
                self._written.add(max(values, key=place.__getitem__))
        return kernels


@contextmanager
def words(shown: object, what: str) -> Iterator[None]:
    """Context in which OpenVINO works on ``shown``. Raises InputError with its own words: in one line, without the
    places in its sources that stand before them."""
    try:
        with doing(f"OpenVINO worked on {shown}"):
            yield
    except (RuntimeError, TypeError, ValueError) as error:
        place = r"(Exception from|Check '.*' failed at) \S+:\d+:|FrontEnd API failed with \w+:"
        told = " ".join(re.sub(place, "", text_of(error)).split())
        raise InputError(f"{shown}: OpenVINO {what}: {told}") from error


def _array(tensor: openvino.Tensor) -> np.ndarray:
    if tensor.element_type.get_type_name() == "string":
        return np.array(tensor.str_data, object)
    array = np.array(tensor.data)
    return array.view(ml_dtypes.bfloat16) if tensor.element_type.get_type_name() == "bf16" else array
