"""An ONNX graph as the debugger reads it: nodes, values, dataflow; the weights stay on disk until asked for."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence, Set
from copy import copy, deepcopy
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
import onnx
from onnx import external_data_helper

from cp_debug.doing import doing
from cp_debug.errors import InputError
from cp_debug.graph.onnx_file import read_model, reads
from cp_debug.graph.onnx_tensors import array_of, external_data
from cp_debug.graph.operators import operator_of

_NAMELESS = {"", "?", "-1", "none", "null", "unk", "unknown", "dynamic", "any"}
"""Placeholders that stand for the name of a free axis; two such axes have nothing to do with each other."""


QUANTIZING = ("uantizeLinear", "QLinear", "QGemm", "MatMulNBits", "Integer", "DynamicQuantize", "BlockQuantized")
"""Parts of the names of operators that quantize, compute with levels, or make floats of levels."""


@dataclass(frozen=True, eq=False)
class Node:
    """One ONNX node, equal to itself alone.

    ``op`` carries the domain unless it means the same as ONNX's own: ``com.microsoft.FusedConv``.
    """

    index: int
    name: str
    op: str
    inputs: tuple[str, ...]
    """Names of the values read; absent optional inputs are left out, captured outer values of subgraphs included."""
    outputs: tuple[str, ...]
    proto: onnx.NodeProto

    @classmethod
    def of(cls, index: int, proto: onnx.NodeProto) -> Node:
        """A node from its protobuf, at place ``index`` of its graph; a nameless one is called ``{op_type}_{index}``."""
        return cls(
            index=index,
            name=proto.name or f"{proto.op_type}_{index}",
            op=operator_of(proto),
            inputs=tuple(dict.fromkeys(reads(proto))),
            outputs=tuple(o for o in proto.output if o),
            proto=proto,
        )

    def attribute(self, name: str, default: Any = None) -> Any:
        """The value of an attribute, as ``onnx.helper`` gives it, or ``default`` where the node has none."""
        return next((onnx.helper.get_attribute_value(a) for a in self.proto.attribute if a.name == name), default)

    def schema(self, opsets: Mapping[str, int]) -> onnx.defs.OpSchema | None:
        """ONNX's definition of the operator in opsets by domain; None for one that it does not define."""
        domain = "" if self.proto.domain == "ai.onnx" else self.proto.domain
        try:
            return onnx.defs.get_schema(self.proto.op_type, opsets.get(domain, 1), domain)
        except onnx.defs.SchemaError:
            return None

    def changed(
        self, inputs: Sequence[str] | None = None, outputs: Sequence[str] | None = None, index: int | None = None
    ) -> Node:
        """A copy under the same name, which may be changed: with other ``inputs`` and ``outputs``, at another place."""
        proto = deepcopy(self.proto)
        proto.input[:] = self.proto.input if inputs is None else inputs
        proto.output[:] = self.proto.output if outputs is None else outputs
        return replace(Node.of(self.index if index is None else index, proto), name=self.name)


_CONTAINERS = {"sequence_type": "a sequence", "optional_type": "an optional", "map_type": "a map"}


@dataclass(frozen=True)
class ValueInfo:
    """Name, numpy dtype and shape of a graph input or output; a dimension is an int, a symbol or None.

    ``dtype`` is None for what is not a tensor (a sequence, a map) or carries no type.
    """

    name: str
    dtype: np.dtype | None
    shape: tuple[int | str | None, ...] | None
    container: str | None = None
    """Kind of a value that is no tensor: ``a sequence``, ``an optional``, ``a map``."""
    kind: onnx.TypeProto | None = field(default=None, compare=False)
    """The ONNX type of a value that is no tensor of numbers."""

    def __str__(self) -> str:
        text = self.container or ("string" if self.kind is not None else self.dtype or "no tensor")
        sizes = "" if self.shape is None else f"[{', '.join('?' if d is None else str(d) for d in self.shape)}]"
        return f"{self.name}: {text}{sizes}"


def fits_shape(actual: Sequence[int], declared: Sequence[int | str | None] | None) -> bool:
    """Whether an array may have this shape, as far as a graph says: fixed dimensions are equal, others are free."""
    if declared is None:
        return True
    sizes = zip(declared, actual, strict=False)
    return len(actual) == len(declared) and all(not isinstance(size, int) or size == real for size, real in sizes)


_READ: WeakValueDictionary[tuple[object, ...], Graph] = WeakValueDictionary()
"""Graphs of files that somebody holds, by path, name and what the file system says of the file."""


class Graph:
    """The main graph of an ONNX file, in topological order.

    Raises InputError as ``read_model`` does: for what is missing, truncated, not ONNX, or contradicts itself.
    """

    def __init__(self, path: Path | str, *, source: Graph | str | None = None, digest: str = "") -> None:
        """``source``: what messages name in place of ``path``, which is a working copy that nobody has seen.

        ``digest`` is the property of that name where it is known, which else reads all weights.
        """
        self.path = Path(path)
        self._known_digest = digest
        self._shown = str(path if source is None else source)
        try:
            self.proto = read_model(self.path)
        except InputError as error:
            raise InputError(str(error).replace(str(path), self._shown)) from None
        _free_negative_axes(self.proto)
        _texts_as_nodes(self.proto.graph)
        _sort(self.proto.graph)
        self.inputs = [_value_info(v) for v in self.proto.graph.input if v.name not in self._initializers]
        self.outputs = [_value_info(v) for v in self.proto.graph.output]
        self.nodes = [Node.of(i, n) for i, n in enumerate(self.proto.graph.node)]

    @classmethod
    def shared(cls, path: Path | str, *, source: str | None = None) -> Graph:
        """The graph of a file, which nobody changes: the one that was read already, while somebody holds it and the
        file is as it was then. Raises InputError as the class does."""
        try:
            stat = Path(path).stat()
        except OSError:
            return cls(path, source=source)  # which says what is wrong
        key = str(path), source, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns
        if (graph := _READ.get(key)) is None:
            graph = _READ[key] = cls(path, source=source)
        return graph

    def __str__(self) -> str:
        """The file as the user knows it."""
        return self._shown

    def with_nodes(self, nodes: Sequence[onnx.NodeProto], constants: Mapping[str, np.ndarray]) -> Graph:
        """The graph with other nodes, in execution order, and more ``constants``, of any shape and dtype. It has no
        file of its own: weights are read from this one's."""
        graph = copy(self)
        for name in [n for n, kind in vars(Graph).items() if isinstance(kind, cached_property)]:
            graph.__dict__.pop(name, None)
        graph.proto = onnx.ModelProto(ir_version=self.proto.ir_version, opset_import=self.proto.opset_import)
        graph.proto.functions.extend(self.proto.functions)
        for part, items in ("node", nodes), ("input", self.proto.graph.input), ("output", self.proto.graph.output):
            getattr(graph.proto.graph, part).extend(items)
        graph.nodes = [Node.of(i, n) for i, n in enumerate(graph.proto.graph.node)]
        new = {name: onnx.numpy_helper.from_array(array, name) for name, array in constants.items()}
        graph._initializers = {**self._initializers, **new}
        return graph

    def copied(self) -> onnx.ModelProto:
        """A copy of the model's protobuf, which may be changed."""
        return deepcopy(self.proto)

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
        """One weight as an array, read from the file (or its external data) now.

        Dtype and shape are those that the file declares; types that numpy lacks come as ml_dtypes has them.
        Raises KeyError for an unknown name.
        """
        return array_of(self._initializers[name], self.path)

    def weight(self, name: str) -> onnx.TensorProto:
        """One weight's protobuf as it stands in the file: its bytes, or a reference to external data.

        Raises KeyError for an unknown name.
        """
        return self._initializers[name]

    def constant(self, name: str) -> onnx.TensorProto | None:
        """The protobuf of a weight, or of a Constant node's tensor; None for what is computed, and for Constant nodes
        that hold plain numbers or texts."""
        node = self.producer.get(name)
        held = node.attribute("value") if node is not None and node.op == "Constant" else None
        return self._initializers.get(name, held)

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
        """Every value that a node computes, in execution order."""
        return list(self.producer)

    @cached_property
    def types(self) -> dict[str, onnx.TypeProto]:
        """Value → ONNX type, for inputs, outputs and values where the file or ONNX's shape inference states it."""
        return self.types_for({})

    def types_for(self, shapes: Mapping[str, Sequence[int]]) -> dict[str, onnx.TypeProto]:
        """``types`` where inputs have the given ``shapes``, which fit theirs: free axes have sizes then."""
        with doing(f"onnx inferred the shapes of {self}"):
            inferred = _infer(self.proto, shapes)
        return {
            v.name: v.type
            for v in (*inferred.value_info, *inferred.input, *inferred.output)
            if v.type.WhichOneof("value")
        }

    @cached_property
    def tensors(self) -> list[str]:
        """The values that can be probed, in execution order: all but those known to be no tensor of numbers."""
        return [v for v in self.values if v not in self.types or is_numeric(self.types[v])]

    def element_type(self, name: str) -> int:
        """The ``onnx.TensorProto`` data type of a weight, input or value; 0 for one that is not known, or no tensor."""
        if name in self._initializers:
            return self._initializers[name].data_type
        return self.types[name].tensor_type.elem_type if name in self.types else 0

    @cached_property
    def _input_names(self) -> frozenset[str]:
        return frozenset(v.name for v in self.inputs)

    @cached_property
    def element_types(self) -> set[int]:
        """The ``onnx.TensorProto`` data types of weights, inputs, outputs and values, as far as known."""
        weights = {t.data_type for t in self._initializers.values()}
        return weights | {t.tensor_type.elem_type for t in self.types.values() if t.HasField("tensor_type")}

    @cached_property
    def precision(self) -> str:
        """``int8`` for a file that quantizes, ``fp16`` or ``bf16`` for one that holds such tensors, else ``fp32``."""
        if any(mark in node.op for node in self.nodes for mark in QUANTIZING):
            return "int8"
        names = {onnx.TensorProto.FLOAT16: "fp16", onnx.TensorProto.BFLOAT16: "bf16"}
        return next((name for kind, name in names.items() if kind in self.element_types), "fp32")

    def segment(self, targets: Iterable[str], known: Collection[str]) -> tuple[list[Node], list[str]]:
        """The nodes that compute ``targets`` from ``known`` values, in order, and the known values they start from.

        Graph inputs and weights count as known. The targets are computed even where they are known themselves.
        Raises KeyError when a target is not a value of the graph.
        """
        known = known if isinstance(known, Set | Mapping) else set(known)  # no copy: a bisect asks this for each layer
        chosen: dict[int, Node] = {}
        starts: dict[str, None] = {}
        stack = [self.producer[t] for t in targets]
        while stack:
            node = stack.pop()
            if node.index in chosen:
                continue
            chosen[node.index] = node
            for name in node.inputs:
                if name in known or name in self._input_names:
                    starts[name] = None
                elif name in self.producer:
                    stack.append(self.producer[name])
        return [chosen[i] for i in sorted(chosen)], list(starts)

    @cached_property
    def digest(self) -> str:
        """SHA-256 over the file and its external data files: two captures with equal digests ran the same model."""
        if self._known_digest:
            return self._known_digest
        sha = hashlib.sha256()
        for file in [self.path, *sorted(external_files(self.proto, self.path.parent))]:
            with file.open("rb") as stream:
                while block := stream.read(1 << 22):
                    sha.update(block)
        return sha.hexdigest()


def refill(field: Any, items: Iterable[Any]) -> None:
    """Put other items, its own among them, into a repeated field of a protobuf."""
    items = list(items)
    del field[:]
    field.extend(items)


def digest_of(graphs: Iterable[Graph]) -> str:
    """SHA-256 over the files of a model's graphs, external data files included."""
    return hashlib.sha256("".join(graph.digest for graph in graphs).encode()).hexdigest()


def _sort(graph: onnx.GraphProto) -> None:
    """Put nodes behind those they read from, else in file order: runtimes accept files that break ONNX's rule."""
    nodes = list(graph.node)
    maker = {o: i for i, node in enumerate(nodes) for o in node.output if o}
    order: dict[int, None] = {}
    for first in range(len(nodes)):
        stack = [first]
        while stack:
            missing = [m for m in (maker.get(name) for name in reads(nodes[stack[-1]])) if m is not None]
            missing = [m for m in missing if m not in order and m not in stack]
            if missing:
                stack.append(missing[0])
            else:
                order[stack.pop()] = None
    if list(order) != list(range(len(nodes))):
        refill(graph.node, [nodes[i] for i in order])


def external_files(model: onnx.ModelProto, folder: Path) -> dict[Path, int]:
    """External data file → the bytes that it must have at least, for a model that lies in ``folder``.

    Raises InputError, naming the weight, for a place that cannot be.
    """
    files: dict[Path, int] = {}
    for tensor in model.graph.initializer:
        if external_data_helper.uses_external_data(tensor):
            place = external_data(tensor, folder / "model")
            files[place.file] = max(files.get(place.file, 0), place.offset + place.length)
    return files


def _infer(model: onnx.ModelProto, shapes: Mapping[str, Sequence[int]]) -> onnx.GraphProto:
    """The graph with inferred types for inputs of ``shapes``.

    Weights of 1024 elements and more, which inference does not read, are left out.
    """
    skeleton = onnx.ModelProto(ir_version=model.ir_version, opset_import=model.opset_import, functions=model.functions)
    graph, source = skeleton.graph, model.graph
    graph.name = source.name
    for part in ("node", "input", "output", "value_info"):
        getattr(graph, part).extend(getattr(source, part))
    for value in graph.input:
        for axis, size in zip(value.type.tensor_type.shape.dim, shapes.get(value.name, ()), strict=False):
            axis.dim_value = size
    for tensor in source.initializer:
        if math.prod(tensor.dims) < 1024:
            graph.initializer.append(tensor)
        else:
            stub = graph.initializer.add(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
            stub.data_location = onnx.TensorProto.EXTERNAL
            stub.external_data.add(key="location", value="absent")
    try:
        return onnx.shape_inference.infer_shapes(skeleton).graph
    except Exception:  # an operator that ONNX cannot infer, or a contradiction in the file: what is declared is known
        return graph


def _texts_as_nodes(graph: onnx.GraphProto) -> None:
    """Make Constant nodes of the initializers that hold strings: whoever reads weights meets nothing but numbers."""
    texts = [t for t in graph.initializer if t.data_type == onnx.TensorProto.STRING]
    names = {t.name for t in texts}
    if not names:
        return
    nodes = [onnx.helper.make_node("Constant", [], [t.name], name=t.name, value=t) for t in texts]
    refill(graph.node, [*nodes, *graph.node])
    refill(graph.initializer, (t for t in graph.initializer if t.name not in names))
    refill(graph.input, (v for v in graph.input if v.name not in names))


def _value_info(value: onnx.ValueInfoProto) -> ValueInfo:
    tensor = value.type.tensor_type
    if not tensor.elem_type:
        container = _CONTAINERS.get(value.type.WhichOneof("value") or "")
        return ValueInfo(value.name, None, None, container, value.type if container else None)
    shape = None
    if tensor.HasField("shape"):
        names = [None if d.dim_param.strip().lower() in _NAMELESS else d.dim_param for d in tensor.shape.dim]
        sizes = zip(tensor.shape.dim, names, strict=True)
        shape = tuple(d.dim_value if d.HasField("dim_value") else name for d, name in sizes)
    kind = value.type if tensor.elem_type == onnx.TensorProto.STRING else None
    return ValueInfo(value.name, onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type), shape, kind=kind)


def _free_negative_axes(model: onnx.ModelProto) -> None:
    """Make free what the file says has a negative size (Paddle2ONNX: −1), as ONNX Runtime takes it."""
    graph = model.graph
    for value in (*graph.input, *graph.output, *graph.value_info):
        for dimension in value.type.tensor_type.shape.dim if value.type.HasField("tensor_type") else ():
            if dimension.HasField("dim_value") and dimension.dim_value < 0:
                dimension.ClearField("dim_value")


def is_numeric(kind: onnx.TypeProto) -> bool:
    """Whether a type is that of tensors of numbers."""
    return kind.HasField("tensor_type") and kind.tensor_type.elem_type != onnx.TensorProto.STRING


def data_values(graph: Graph) -> list[str]:
    """The values that depend on an input's elements: no constants, no arithmetic on shapes."""
    return from_inputs(graph, {"Shape", "Size"})


def from_inputs(graph: Graph, cut: Collection[str] = ()) -> list[str]:
    """Values that are reached from the graph's inputs, in execution order, stopping at operators in ``cut``."""
    return downstream(graph.nodes, (info.name for info in graph.inputs), cut)


def downstream(nodes: Iterable[Node], sources: Iterable[str], cut: Collection[str] = ()) -> list[str]:
    """Values that are computed from ``sources``, in execution order, stopping at operators in ``cut``.

    ``nodes`` stand in execution order. The sources themselves are left out unless one is computed from another.
    """
    reached = set(sources)
    values: list[str] = []
    for node in nodes:
        if node.op not in cut and not reached.isdisjoint(node.inputs):
            reached.update(node.outputs)
            values.extend(node.outputs)
    return values


def readers(graph: Graph, value: str, passes: Callable[[Node, str], bool]) -> Iterator[tuple[Node, str]]:
    """(Node, the name that it reads) of every node that reads ``value``, or results of nodes that pass it on.

    ``passes``: whether a node does so with what it reads by a name.
    """
    waiting, seen = [value], {value}
    while waiting:
        name = waiting.pop()
        for node in graph.consumers.get(name, []):
            yield node, name
            if passes(node, name):
                waiting += [result for result in node.outputs if result not in seen]
                seen.update(node.outputs)
