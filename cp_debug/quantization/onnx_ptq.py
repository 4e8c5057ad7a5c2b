"""Calibrate an ONNX graph by itself: for models that come without a torch module."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch

from cp_debug.backends.executor import Executor
from cp_debug.errors import InputError
from cp_debug.graph.downstream import data_values
from cp_debug.graph.graph import Graph, Node
from cp_debug.graph.qdq import gives_floats, quantizable, weight_axis
from cp_debug.graph.scales import LayerScales, Scales
from cp_debug.programs.torch_layers import select
from cp_debug.quantization.data_ranges import DataRanges
from cp_debug.quantization.histogram import check_method, weight_amax


def calibrate_graph(
    graph: Graph, samples: Iterable[Mapping[str, np.ndarray]], method: str = "max", skip: Sequence[str] = ()
) -> Scales:
    """The scales of ``graph`` from ``samples``, its inputs by name; the keys are names of nodes.

    The graph is run in FP32, one tensor in memory at a time. Raises InputError as ``GraphCalibration`` does, and for
    no samples.
    """
    calibration, executor = GraphCalibration(graph, method, skip), Executor(graph)
    for inputs in samples:
        calibration.run(executor, inputs)
    return calibration.scales()


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
