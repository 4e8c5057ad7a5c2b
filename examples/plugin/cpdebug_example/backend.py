"""The backend ``onnxref``: ONNX's reference implementation in numpy, FP32 on the CPU; every value is shown."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import onnx
from onnx.reference import ReferenceEvaluator

from cp_debug.backends.base import Program, Sink
from cp_debug.backends.spec import BackendSpec
from cp_debug.errors import BackendUnavailable
from cp_debug.graph.check_inputs import check_inputs


class OnnxReferenceBackend:
    """``onnxref`` and ``onnxref@cpu``. Raises BackendUnavailable for other precisions and devices."""

    precision, device, emulated = "fp32", "cpu", False

    def __init__(self, spec: BackendSpec) -> None:
        if spec.variant or spec.device not in (None, "cpu"):
            raise BackendUnavailable(str(spec), "it computes in FP32 on the CPU alone", nearest="onnxref")
        self.spec = spec

    def open(self, program: Program) -> OnnxReferenceSession:
        """Make the program ready."""
        return OnnxReferenceSession(program)

    def versions(self) -> dict[str, str]:
        """Library → version."""
        return {"onnx": onnx.__version__, "numpy": np.__version__}


class OnnxReferenceSession:
    """A graph that ONNX's reference implementation runs, node by node."""

    def __init__(self, program: Program) -> None:
        self._graph = program.graph
        self._evaluator = ReferenceEvaluator(str(program.graph.path))
        self.settings: Mapping[str, Any] = {}
        self.exposed: Collection[str] = self._graph.tensors

    def run(
        self, inputs: Mapping[str, np.ndarray], sink: Sink | None = None, probes: Collection[str] | None = None
    ) -> dict[str, np.ndarray]:
        """Run once; the program is the same with and without a sink. Raises InputError for inputs that do not fit."""
        check_inputs(self._graph.inputs, inputs, str(self._graph.path))
        values = self._evaluator.run(None, dict(inputs), intermediate=True)
        if sink is not None:
            for name in self._graph.tensors:  # in execution order
                if name in values and (probes is None or name in probes):
                    sink(name, values[name])
        return {output.name: values[output.name] for output in self._graph.outputs}

    def close(self) -> None:
        """Free the weights."""
        del self._evaluator
