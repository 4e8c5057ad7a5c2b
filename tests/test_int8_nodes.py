"""Every quantized module is found again in the exported graph, whoever exported it, with and without BatchNorm."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from nets import NetBuilder
from stress import OUTPUTS, make_stress
from torch import nn

from cp_debug.backends.executor import Executor
from cp_debug.bisect.engine import bisect
from cp_debug.errors import InputError
from cp_debug.graph.graph import Graph
from cp_debug.graph.qdq import insert_qdq, weight_axis
from cp_debug.graph.scales import LayerScales, Scales
from cp_debug.programs.align import align
from cp_debug.programs.export import EXPORTERS, export
from cp_debug.quantization.quantized_programs import scales_by_node

KINDS = list(itertools.product(EXPORTERS, (True, False)))


def of_modules(module: nn.Module) -> Scales:
    """Every convolution and linear layer outside of the attention, whose ``forward`` nobody calls."""
    kinds = nn.Conv2d | nn.ConvTranspose2d | nn.Linear
    layers = {}
    for index, (path, part) in enumerate(module.named_modules()):
        if isinstance(part, kinds) and "attention" not in path:
            channels = part.out_features if isinstance(part, nn.Linear) else part.out_channels
            layers[path] = LayerScales(float(index + 1), np.arange(1, channels + 1, dtype=np.float32))
    return Scales("model", "max", layers)


@pytest.mark.few(1)
@pytest.mark.parametrize(("exporter", "folded"), KINDS)
def test_every_module_has_its_nodes(tmp_path: Path, exporter: str, folded: bool) -> None:
    module, image = make_stress()
    path = tmp_path / "s.onnx"
    export(module, (image,), path, input_names=["x"], output_names=OUTPUTS, exporter=exporter, folded=folded)
    graph = Graph(path)
    alignment = align(graph, module, (image,))
    scales = of_modules(module)
    found = scales_by_node(scales, alignment, graph)
    by_input = {layer.input: path for path, layer in scales.layers.items()}
    paths = [by_input[layer.input] for layer in found.layers.values()]
    assert {*paths, "zeros.0"} == set(scales.layers)  # dynamo makes one node of zeros.0 and its equal zeros.1
    assert paths.count("shared") == 3
    nodes = {node.name: node for node in graph.nodes}
    weights = [nodes[name].proto.input[1] for name in found.layers]
    fixed, _ = graph.segment([w for w in weights if w in graph.producer], ())
    constants = Executor(graph).run_nodes(fixed, {}, weights)
    for name, path in zip(found.layers, paths, strict=True):
        node, part = nodes[name], module.get_submodule(path)
        weight = constants[node.proto.input[1]].numpy()
        own = part.weight.detach().numpy()
        own = own.T if isinstance(part, nn.Linear) and weight_axis(node, 2) == 1 else own
        rest = tuple(d for d in range(own.ndim) if d != weight_axis(node, own.ndim))
        # a folded BatchNorm scales each output channel, and nothing else
        ratio = np.abs(weight).max(rest, keepdims=True) / np.maximum(np.abs(own).max(rest, keepdims=True), 1e-30)
        np.testing.assert_allclose(np.abs(weight), np.abs(own) * ratio, rtol=1e-4, atol=1e-6)
    assert Graph(insert_qdq(graph, found.layers, tmp_path / "int8.onnx")).precision == "int8"


def test_layers_that_no_node_computes_are_named(tmp_path: Path) -> None:
    module, image = make_stress()
    path = export(module, (image,), tmp_path / "s.onnx", input_names=["x"], output_names=OUTPUTS)
    graph = Graph(path)
    alignment = align(graph, module, (image,))
    layer = LayerScales(1.0, np.ones(8, np.float32))
    with pytest.raises(InputError, match=r"computes norm, nowhere, nowhere/add"):
        scales_by_node(Scales("m", "max", {"norm": layer, "nowhere": layer}, {"nowhere/add": 1.0}), alignment, graph)
    found = scales_by_node(Scales("m", "max", {}, {"/add": 1.0}), alignment, graph)
    assert [node.op for node in graph.nodes if node.name in found.residual_adds] == ["Add"]


def test_the_record_of_a_quantized_file_says_int8(tmp_path: Path) -> None:
    net = NetBuilder()
    y = net.op("MatMul", "x", net.weight(net.rng.standard_normal((16, 16)).astype(np.float32)), name="m")
    path = net.save(tmp_path / "net.onnx", {"x": (1, [4, 16])}, [y])
    graph = Graph(path)
    layer = LayerScales(0.1, np.full(16, 0.1, np.float32))
    quantized = insert_qdq(graph, {"node_m": layer}, tmp_path / "int8.onnx")
    result = bisect(str(path), "ort,ort", test_model=quantized)
    assert [record.computes_in for record in (result.reference, result.tests[0].backend)] == ["fp32", "int8"]
