"""Scales of a quantized network: the contract between calibration, checkpoints, Q/DQ graphs and backends."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cp_debug.errors import InputError
from cp_debug.files import complete_path
from cp_debug.reading import check_file, readable, typed

QMAX = 127
"""Symmetric, narrow range: ±127, so that 0 is exact and −x is as well held as x."""


@dataclass(frozen=True)
class LayerScales:
    """One convolution, transposed convolution or matrix product in INT8. A scale is ``amax / 127``."""

    input: float
    """Largest magnitude of the layer's input that is not clipped, one for the whole tensor."""
    weight: np.ndarray
    """Largest magnitude of the layer's weight for each output channel: float32 ``[C_out]``."""


@dataclass(frozen=True)
class Scales:
    """The scales of one component, by layer.

    Layers are named as their owner names them: a module by its path in the whole model (``pts_backbone.blocks.0.0``), a
    node of an ONNX file by its name.
    """

    model: str
    """SHA-256 of the weights that were calibrated, BatchNorm folded."""
    method: str
    """``max``, ``percentile``, ``mse`` or ``entropy``."""
    layers: Mapping[str, LayerScales]
    residual_adds: Mapping[str, float] = field(default_factory=dict)
    """Residual additions whose two operands share one scale: their largest magnitude."""

    def save(self, path: Path) -> None:
        """Write a calibration cache (safetensors). Raises InputError when it cannot be written."""
        from safetensors.numpy import save

        tensors = {f"{name}.input": np.array([layer.input], np.float32) for name, layer in self.layers.items()}
        tensors |= {f"{name}.weight": np.asarray(layer.weight, np.float32) for name, layer in self.layers.items()}
        tensors |= {f"{name}.add": np.array([amax], np.float32) for name, amax in self.residual_adds.items()}
        about = {"format": "cpdebug calibration cache 1", "model": self.model, "method": self.method}
        with complete_path(path) as partial:
            partial.write_bytes(save(tensors, metadata={"about": json.dumps(about)}))

    @classmethod
    def load(cls, path: Path) -> Scales:
        """Read a calibration cache.

        Raises InputError for a file that is missing, no cache, or holds other than finite numbers.
        """
        from safetensors import safe_open

        check_file(path, "calibration cache")
        with readable(path, "a calibration cache of cpdebug"), safe_open(path, framework="numpy") as file:
            about = json.loads((file.metadata() or {})["about"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, no mapping
        source = f"{path}: not a calibration cache of cpdebug"
        header: dict[str, Any] = typed(dict[str, Any], about, source)
        model: str = typed(str, header.get("model"), f"{source}: model")
        method: str = typed(str, header.get("method"), f"{source}: method")
        for name, tensor in tensors.items():
            scalar = not name.endswith(".weight")
            if tensor.dtype.kind != "f" or (scalar and tensor.size != 1) or not np.isfinite(tensor).all():
                raise InputError(f"{source}: {name!r} is {tensor.dtype}{list(tensor.shape)}; expected finite numbers")
        if missing := [n for n in tensors if n.endswith(".input") and f"{n[:-6]}.weight" not in tensors]:
            raise InputError(f"{source}: it has no scale of the weight of {missing[0][:-6]!r}")
        inputs = {name.removesuffix(".input"): float(t[0]) for name, t in tensors.items() if name.endswith(".input")}
        layers = {name: LayerScales(amax, tensors[f"{name}.weight"]) for name, amax in inputs.items()}
        residual_adds = {name.removesuffix(".add"): float(t[0]) for name, t in tensors.items() if name.endswith(".add")}
        return cls(model, method, layers, residual_adds)
