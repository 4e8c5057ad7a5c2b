"""Run a graph on ONNX Runtime a few nodes at a time: every value is seen, and few are in memory at once."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import onnx

from cp_debug.backends.base import Sink
from cp_debug.backends.ort_options import Runtime
from cp_debug.doing import doing
from cp_debug.errors import InputError
from cp_debug.graph import onnx_runtime, surgery
from cp_debug.graph.graph import Graph, Node
from cp_debug.graph.onnx_runtime import to_numpy, to_ort
from cp_debug.probes.held import Trimmer

if TYPE_CHECKING:
    import onnxruntime

_NODES_PER_CHUNK = 8
_KEEP_SESSIONS_BELOW = 1 << 28
"""Size of weights in bytes up to which the chunks' sessions stay open for the next run; each keeps its weights."""
_TRIM_AFTER = 1 << 25


@dataclass
class _Chunk:
    """Consecutive nodes that run in one session."""

    nodes: list[Node]
    outputs: list[str]
    dies: list[str]
    """Values that no later chunk reads."""
    session: onnxruntime.InferenceSession | None = None
    limit: float | None = None
    """Seconds that a run may take, where the chunk holds a loop."""


class ChunkedGraph:
    """A graph executed as it stands, graph optimization off, chunk after chunk.

    Bit for bit the same as the whole graph in one session: with optimization off ONNX Runtime runs node by node
    anyway. (Not for FP16 graphs on a CPU, where it adds casts; run what it wrote instead.) A value lives until its
    last reader ran.
    """

    def __init__(self, runtime: Runtime, graph: Graph) -> None:
        self._runtime = runtime
        self._graph = graph
        self._chunks = _plan(graph)
        weights = sum(surgery.tensor_bytes(graph.weight(name)) for name in graph.initializers)
        self._keep = weights <= _KEEP_SESSIONS_BELOW

    def run(
        self, inputs: Mapping[str, np.ndarray], sink: Sink | None = None, probes: Collection[str] = ()
    ) -> dict[str, np.ndarray]:
        """Run the graph; return its outputs, as far as they are tensors.

        ``sink`` is given ``probes`` in execution order. Takes and returns name → array in the dtype that the graph
        declares.
        Raises InputError when a node fails.
        """
        live = to_ort(inputs)
        trimmer = Trimmer(_TRIM_AFTER)
        results: dict[str, np.ndarray] = {}
        final = [v.name for v in self._graph.outputs]
        for name in final:
            if name in self._graph.initializers:
                results[name] = self._graph.initializer(name)
            elif name in inputs:
                results[name] = inputs[name]
        for chunk in self._chunks:
            wanted = [o for o in chunk.outputs if o in probes or o in final or o not in chunk.dies]
            if wanted:
                live.update(zip(wanted, self._execute(chunk, wanted, live), strict=True))
            for name in wanted:
                if not live[name].is_tensor():
                    continue
                if sink and name in probes:
                    sink(name, to_numpy(live[name]))
                if name in final:
                    results[name] = to_numpy(live[name]).copy()
            for name in chunk.dies:
                trimmer.freed(_size(live.pop(name, None)))
        return {name: results[name] for name in final if name in results}

    def close(self) -> None:
        """Close the sessions that were kept."""
        for chunk in self._chunks:
            chunk.session = None

    def _execute(
        self, chunk: _Chunk, wanted: list[str], live: Mapping[str, onnxruntime.OrtValue]
    ) -> list[onnxruntime.OrtValue]:
        session = chunk.session
        if session is None:
            types = {name: _type_proto(value.data_type()) for name, value in live.items()}
            # Shape inference asks for sizes and axes: as inputs of the chunk they would be unknown to it.
            read = dict.fromkeys(name for node in chunk.nodes for name in node.inputs if name not in chunk.outputs)
            made = (self._graph.producer.get(name) for name in read)
            nodes = [*(node for node in made if node and node.op == "Constant"), *chunk.nodes]
            model = surgery.extract(self._graph, nodes, chunk.outputs, types)
            session = self._runtime.session(
                model.SerializeToString(), level="none", weights=surgery.weights_folder(self._graph), shown=self._graph
            )
            chunk.session = session if self._keep else None
            chunk.limit = onnx_runtime.time_limit(self._graph, chunk.nodes)
        feed = {i.name: live[i.name] for i in session.get_inputs()}
        try:
            with doing(f"ONNX Runtime ran {self._graph}"):
                return onnx_runtime.run(session, wanted, feed, chunk.limit)
        except onnx_runtime.Endless as error:
            loops = ", ".join(node.name for node in chunk.nodes if onnx_runtime.time_limit(self._graph, [node]))
            raise onnx_runtime.Endless(f"{self._graph}: node {loops}: {error}") from error
        except Exception as error:  # each status of ONNX Runtime is a class of its own, directly below Exception
            names = ", ".join(node.name for node in chunk.nodes)
            raise InputError(f"{self._graph}: ONNX Runtime failed at {names}: {onnx_runtime.told(error)}") from error


def _size(value: onnxruntime.OrtValue | None) -> int:
    return value.tensor_size_in_bytes() if value is not None and value.is_tensor() else 0


def _plan(graph: Graph) -> list[_Chunk]:
    """Consecutive nodes; a chunk ends after the node with a matrix of weights, so that big values come one by one."""
    last_reader = {name: readers[-1].index for name, readers in graph.consumers.items()}
    chunks = []
    for nodes in _group(graph):
        end = nodes[-1].index
        outputs = [o for node in nodes for o in node.outputs]
        used_values = dict.fromkeys([*outputs, *(name for node in nodes for name in node.inputs)])
        chunks.append(_Chunk(nodes, outputs, [name for name in used_values if last_reader.get(name, -1) <= end]))
    return chunks


def _group(graph: Graph) -> Iterator[list[Node]]:
    nodes: list[Node] = []
    for node in graph.nodes:
        nodes.append(node)
        heavy = any(len(graph.weight(name).dims) > 1 for name in node.inputs if name in graph.initializers)
        if heavy or len(nodes) == _NODES_PER_CHUNK:
            yield nodes
            nodes = []
    if nodes:
        yield nodes


def _type_proto(text: str) -> onnx.TypeProto:
    """ONNX Runtime's ``seq(tensor(float))`` as ONNX's type."""
    kind, _, inner = text.rstrip(")").partition("(")
    proto = onnx.TypeProto()
    if kind == "seq":
        proto.sequence_type.elem_type.CopyFrom(_type_proto(inner))
    elif kind == "optional":
        proto.optional_type.elem_type.CopyFrom(_type_proto(inner))
    else:
        proto.tensor_type.elem_type = onnx.TensorProto.DataType.Value(inner.upper())
    return proto
