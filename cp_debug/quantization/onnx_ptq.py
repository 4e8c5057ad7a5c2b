"""Calibrate an ONNX graph by itself, and see how large the data that its layers read become."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from cp_debug.backends.base import Program
from cp_debug.backends.executor import Executor
from cp_debug.errors import InputError
from cp_debug.graph.graph import Graph, Node, data_values
from cp_debug.graph.qdq import gives_floats, quantizable, weight_axis
from cp_debug.graph.scales import LayerScales, Scales
from cp_debug.probes.arrays import Tensor, dtype_name, has_torch_type, to_device
from cp_debug.programs.torch_layers import select
from cp_debug.programs.walk import Walk, tensors_as_arrays
from cp_debug.quantization.histogram import Histogram, check_method, weight_amax
from cp_debug.recipes.base import Model, Sample

METHODS = ("max", "percentile")
"""Ways to choose a scale for types whose steps grow with the numbers: little is gained there by clipping."""


class DataRanges:
    """Ranges of what ``nodes`` of a graph read first, of additions those of both operands together, whoever runs it."""

    def __init__(self, graph: Graph, nodes: Iterable[Node]) -> None:
        self._graph = graph
        self._read = {n.name: tuple(n.proto.input) if n.op == "Add" else (n.proto.input[0],) for n in nodes}
        self._seen = {values: Histogram() for values in self._read.values()}
        self._of_value: dict[str, list[Histogram]] = {}
        for values, histogram in self._seen.items():
            for value in values:
                self._of_value.setdefault(value, []).append(histogram)
        self._shapes: dict[str, tuple[int, ...]] = {}

    @property
    def watched(self) -> set[str]:
        """The values, graph inputs included, that ``see`` must be given."""
        return set(self._of_value)

    def see(self, name: str, tensor: Tensor) -> None:
        """Count one tensor of a run, of any shape and float dtype, if it is a watched one.

        Raises InputError for NaN or Inf in it.
        """
        for histogram in self._of_value.get(name, ()):
            if not has_torch_type(tensor):
                what = f"{name!r} is {dtype_name(tensor)}, which is not calibrated; expected floats"
                raise InputError(f"{self._graph}: {what}")
            self._shapes[name] = tuple(tensor.shape)
            try:
                histogram.add(to_device(tensor, "cpu"))
            except ValueError as error:
                raise InputError(f"{self._graph}: {name!r} holds {error} during calibration") from None

    def run(self, executor: Executor, inputs: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """Outputs that ``executor`` computes of ``inputs``, of shapes and dtypes that the graph takes; all is seen."""
        for name, array in inputs.items():
            self.see(name, array)
        return executor.run(inputs, self.see, self.watched)

    def amax(self, method: str) -> dict[str, float]:
        """Node → the largest magnitude to represent, by one of ``histogram.METHODS``.

        Raises InputError when nothing was seen.
        """
        if self._read and not self._shapes:
            raise InputError(f"{self._graph}: there is no calibration data: expected at least one sample")
        return {node: self._seen[values].amax(method) for node, values in self._read.items()}


def amax_of_programs(
    model: Model,
    programs: Sequence[Program],
    nodes: Mapping[str, Iterable[Node]],
    samples: Iterable[Sample],
    method: str = "max",
) -> dict[str, dict[str, float]]:
    """Program → node → the largest magnitude of what it reads first, over ``samples`` on their way through the model.

    ``nodes``: those of each program. Raises InputError for NaN and Inf, which names the sample, and without a sample.
    """
    ranges = {p.name: DataRanges(p.graph, nodes[p.name]) for p in programs}
    executors = {p.name: Executor(p.graph) for p in programs}
    for sample in samples:
        for step in Walk(model, sample):
            seen = ranges[step.name]
            try:
                step.outputs = tensors_as_arrays(seen.run(executors[step.name], step.inputs))
            except InputError as error:
                raise InputError(f"{sample.source}: {error}") from error
    return {name: seen.amax(method) for name, seen in ranges.items()}


def names_of_layers(graph: Graph) -> dict[str, str]:
    """Node → its name in tables of layers, that of its result where it has none, for every node that is quantized."""
    data = {*data_values(graph), *(v.name for v in graph.inputs)}
    adds = [n for n in graph.nodes if n.op == "Add" and data.issuperset(n.inputs) and gives_floats(graph, n)]
    return {node.name: node.proto.name or node.outputs[0] for node in (*quantizable(graph), *adds)}


class GraphCalibration(DataRanges):
    """Collects what the layers of a graph read, whoever runs it, and gives the scales.

    The layers are all convolutions, transposed convolutions and products with a weight; of additions those of two
    activations of one shape. ``skip`` are globs over the names of nodes, or of the results of those without. Raises
    InputError for an unknown method, a glob that matches nothing, and a graph that is quantized already.
    """

    def __init__(self, graph: Graph, method: str = "max", skip: Sequence[str] = ()) -> None:
        check_method(method)
        if graph.precision == "int8":
            raise InputError(f"{graph}: this graph is quantized already; calibrate the FP32 model")
        self._method = method
        self._executor = Executor(graph, weight_cache=0)
        names = names_of_layers(graph)
        skipped = select([*names, *names.values()], skip)
        left = [n for n in graph.nodes if n.name in names and skipped.keys().isdisjoint((n.name, names[n.name]))]
        super().__init__(graph, left)
        self._nodes = left

    def scales(self) -> Scales:
        """The scales from all samples so far. Raises InputError when there was none."""
        amax, layers, residual_adds = self.amax(self._method), dict[str, LayerScales](), dict[str, float]()
        for node in self._nodes:
            if node.op == "Add":
                if len({self._shapes[name] for name in node.proto.input}) == 1:
                    residual_adds[node.name] = amax[node.name]
            elif (weight := weight_of(node, self._executor)).dim() > 1:
                of_weight = weight_amax(weight, weight_axis(node, weight.dim()), self._method)
                layers[node.name] = LayerScales(amax[node.name], of_weight.numpy())
        return Scales(self._graph.digest, self._method, layers, residual_adds)


def weight_of(node: Node, executor: Executor) -> torch.Tensor:
    """The weight of a node of ``executor``'s graph, also where constants are transposed on the way to it.

    In the shape in which the node reads it, and the dtype in which the executor's arithmetic holds values.
    """
    name = node.proto.input[1]
    nodes = executor.graph.segment([name], ())[0] if name in executor.graph.producer else []
    return executor.run_nodes(nodes, {}, [name])[name]
