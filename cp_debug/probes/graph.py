"""An ONNX graph as the debugger reads it: nodes, values, dataflow; the weights stay on disk until asked for."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import onnx
from onnx import external_data_helper, numpy_helper

from cp_debug.errors import InputError


@dataclass(frozen=True)
class Node:
    """One ONNX node. ``op`` carries the domain unless it is ONNX's own: ``com.microsoft.FusedConv``."""

    index: int
    name: str
    op: str
    inputs: tuple[str, ...]
    """Names of the values read; absent optional inputs are left out, captured outer values of subgraphs included."""
    outputs: tuple[str, ...]
    proto: onnx.NodeProto


@dataclass(frozen=True)
class ValueInfo:
    """Name, numpy dtype and shape of a graph input or output; a dimension is an int, a symbol or None."""

    name: str
    dtype: np.dtype
    shape: tuple[int | str | None, ...] | None


class Graph:
    """The main graph of an ONNX file, in topological order.

    Raises InputError when the file is missing, truncated, not ONNX, or lacks an external data file.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.proto = _load(self.path)
        self.inputs = [_value_info(v) for v in self.proto.graph.input if v.name not in self._initializers]
        self.outputs = [_value_info(v) for v in self.proto.graph.output]
        self.nodes = [
            Node(
                index=i,
                name=n.name or f"{n.op_type}_{i}",
                op=n.op_type if n.domain in ("", "ai.onnx") else f"{n.domain}.{n.op_type}",
                inputs=tuple(dict.fromkeys(_reads(n))),
                outputs=tuple(o for o in n.output if o),
                proto=n,
            )
            for i, n in enumerate(self.proto.graph.node)
        ]

    @cached_property
    def _initializers(self) -> dict[str, onnx.TensorProto]:
        return {t.name: t for t in self.proto.graph.initializer}

    @cached_property
    def opsets(self) -> dict[str, int]:
        """Domain → version; ONNX's own domain is the empty string."""
        return {("" if o.domain == "ai.onnx" else o.domain): o.version for o in self.proto.opset_import}

    @property
    def initializers(self) -> Collection[str]:
        """Names of the weights."""
        return self._initializers.keys()

    def initializer(self, name: str) -> np.ndarray:
        """One weight, read from the file (or its external data) now. Raises KeyError for an unknown name."""
        return numpy_helper.to_array(self._initializers[name], str(self.path.parent))

    @cached_property
    def producer(self) -> dict[str, Node]:
        """Value → the node that computes it."""
        return {o: n for n in self.nodes for o in n.outputs}

    @cached_property
    def consumers(self) -> dict[str, list[Node]]:
        """Value → the nodes that read it."""
        readers: dict[str, list[Node]] = {}
        for node in self.nodes:
            for name in node.inputs:
                readers.setdefault(name, []).append(node)
        return readers

    @property
    def values(self) -> list[str]:
        """Every value that a node computes, in execution order: what can be probed."""
        return list(self.producer)

    def segment(self, targets: Iterable[str], known: Collection[str]) -> tuple[list[Node], list[str]]:
        """The nodes that compute ``targets`` from ``known`` values, in order, and the known values they start from.

        Graph inputs and weights count as known. The targets are computed even where they are known themselves.
        Raises KeyError when a target is not a value of the graph.
        """
        given = set(known) | {v.name for v in self.inputs}
        chosen: dict[int, Node] = {}
        starts: dict[str, None] = {}
        stack = [self.producer[t] for t in targets]
        while stack:
            node = stack.pop()
            if node.index in chosen:
                continue
            chosen[node.index] = node
            for name in node.inputs:
                if name in given:
                    starts[name] = None
                elif name in self.producer:
                    stack.append(self.producer[name])
        return [chosen[i] for i in sorted(chosen)], list(starts)

    @cached_property
    def digest(self) -> str:
        """SHA-256 over the file and its external data files: two captures with equal digests ran the same model."""
        sha = hashlib.sha256()
        for file in [self.path, *sorted(_external_files(self.proto, self.path.parent))]:
            with file.open("rb") as stream:
                while block := stream.read(1 << 22):
                    sha.update(block)
        return sha.hexdigest()


def _load(path: Path) -> onnx.ModelProto:
    if not path.is_file():
        raise InputError(f"{path}: no such ONNX file")
    try:
        model = onnx.load(str(path), load_external_data=False)
    except Exception as error:  # protobuf raises its own DecodeError, whose module moves between versions
        raise InputError(f"{path}: not a complete ONNX file ({error})") from None
    if not model.graph.node and not model.graph.output:
        raise InputError(f"{path}: not a complete ONNX file (it holds no graph)")
    for file in _external_files(model, path.parent):
        if not file.is_file():
            raise InputError(f"{path}: its external data file {file.name} is missing (expected at {file})")
    return model


def _external_files(model: onnx.ModelProto, folder: Path) -> set[Path]:
    return {
        folder / entry.value
        for tensor in model.graph.initializer
        if external_data_helper.uses_external_data(tensor)
        for entry in tensor.external_data
        if entry.key == "location"
    }


def _reads(node: onnx.NodeProto) -> Iterable[str]:
    yield from (name for name in node.input if name)
    for attribute in node.attribute:
        for graph in [attribute.g] if attribute.HasField("g") else attribute.graphs:
            inner = {v.name for v in graph.input} | {t.name for t in graph.initializer}
            for child in graph.node:
                yield from (name for name in _reads(child) if name not in inner)
                inner.update(child.output)


def _value_info(value: onnx.ValueInfoProto) -> ValueInfo:
    tensor = value.type.tensor_type
    shape = None
    if tensor.HasField("shape"):
        shape = tuple(
            d.dim_value if d.HasField("dim_value") else (d.dim_param or None) for d in tensor.shape.dim
        )
    return ValueInfo(value.name, np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)), shape)
