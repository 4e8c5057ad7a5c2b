"""TensorRT's own calibrator, for INT8 engines of graphs without Q/DQ nodes: its input data and its scales."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cp_debug.backends.tensorrt.inspector import EngineLayer, materialized
from cp_debug.backends.tensorrt.options import TensorRTOptions
from cp_debug.errors import Damage, InputError
from cp_debug.graph.graph import Graph
from cp_debug.graph.qdq import LEVELS, quantizable
from cp_debug.reading import read_text, readable


def calibration(options: TensorRTOptions, component: str, scratch: Path) -> dict[str, Any] | None:
    """The runner's ``calibration`` of a component: its cache, and the arrays from which it is made where there is none.

    None when the options name neither. Raises InputError when there is nothing to calibrate with.
    """
    cache, data = options.calibration_cache, options.calibration_data
    if cache is None and data is None:
        return None
    files = sorted(map(str, (data / component).glob("*.npz"))) if data else []
    if cache is None:
        cache = scratch / "calibration.cache"
    elif not cache.suffix:
        cache.mkdir(parents=True, exist_ok=True)
        cache = cache / f"{component}.cache"
    if not cache.is_file() and not files:
        where = f"{data / component} holds no .npz file" if data else "--trt-calibrator is not given to make one"
        raise InputError(f"{cache}: there is no such calibration cache, and {where}")
    return {"cache": str(cache), "data": files, "kind": options.calibrator}


class Ranges(NamedTuple):
    """Values that an engine keeps in INT8, with the magnitudes that they keep."""

    layers: Mapping[str, float]
    """ONNX node that multiplies INT8 → the largest magnitude that its input keeps."""
    stored: Mapping[str, float]
    """Value that lies in memory in INT8, whoever reads it → the largest magnitude that it keeps."""


LARGEST_CACHE = 64 << 20
"""Largest size of a calibration cache, in bytes."""


def read_cache(path: Path) -> dict[str, float]:
    """Tensor → its scale, from a cache that TensorRT's calibrator wrote: one line each, a float32's bits in hex.

    Raises InputError for a file that is none.
    """
    text = read_text(path, what="calibration cache", most=LARGEST_CACHE)
    with readable(path, "a calibration cache of TensorRT"):
        first, *lines = text.splitlines()
        if not first.startswith("TRT-"):
            raise Damage(f"its first line is {first!r}")
        pairs = [line.rpartition(": ") for line in lines if line]
        return {name: struct.unpack(">f", bytes.fromhex(digits))[0] for name, _, digits in pairs}


def ranges_of(layers: Sequence[EngineLayer], graph: Graph, scales: Mapping[str, float]) -> Ranges:
    """The INT8 part of an engine of ``graph``, by the types in its inspector's ``layers`` and a cache's ``scales``."""
    reading = {node for layer in layers for node in layer.nodes if any(t.dtype == "Int8" for t in layer.inputs)}
    products = {n.name: n.proto.input[0] for n in quantizable(graph) if n.name in reading}
    stored_values = [name for name, tensor in materialized(layers, graph.values).items() if tensor.dtype == "Int8"]
    return Ranges(
        {node: LEVELS * scales[value] for node, value in products.items() if value in scales},
        {value: LEVELS * scales[value] for value in stored_values if value in scales},
    )
