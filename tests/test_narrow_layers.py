"""Layers that a narrow format can hold: channels, blocks, opsets."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from nets import NetBuilder, read_node

from cp_debug.backends.narrow_options import NarrowOptions
from cp_debug.graph.graph import Graph
from cp_debug.quantization import narrow_layers
from cp_debug.quantization.narrow_layers import weighted_layers


@pytest.mark.parametrize(
    ("precision", "opset"), [("fp8", 19), ("fp8:block", 21), ("int4", 21), ("mxfp8", 21), ("mxfp4", 23), ("nvfp4", 23)]
)
def test_the_oldest_opset_that_can_say_a_precision(precision: str, opset: int) -> None:
    assert narrow_layers.opset_of(NarrowOptions.parse(precision)) == opset


def test_input_channels_of_a_layer(tmp_path: Path) -> None:
    weight, matrix = torch.zeros(6, 4, 1, 1), torch.zeros(6, 4)
    assert narrow_layers._channels(read_node(tmp_path, "Conv", ["x", "w"]), weight) == 4
    assert narrow_layers._channels(read_node(tmp_path, "ConvTranspose", ["x", "w"], group=2), weight) == 3
    assert narrow_layers._channels(read_node(tmp_path, "MatMul", ["x", "w"]), matrix) == 6
    assert narrow_layers._channels(read_node(tmp_path, "Gemm", ["x", "w"]), matrix) == 6
    assert narrow_layers._channels(read_node(tmp_path, "Gemm", ["x", "w"], transB=1), matrix) == 4


def test_layers_that_a_format_cannot_hold(tmp_path: Path) -> None:
    grouped = read_node(tmp_path, "ConvTranspose", ["x", "w"], group=2)
    by_channel = NarrowOptions.parse("fp8:channel")
    assert by_channel.granularity == "channel"
    assert "grouped ConvTranspose" in narrow_layers._unsuited(grouped, torch.zeros(6, 4, 1, 1), by_channel)
    plain = read_node(tmp_path, "ConvTranspose", ["x", "w"])
    assert not narrow_layers._unsuited(plain, torch.zeros(6, 4, 1, 1), by_channel)
    assert not narrow_layers._unsuited(grouped, torch.zeros(6, 4, 1, 1), NarrowOptions.parse("fp8"))
    assert narrow_layers._unsuited(plain, torch.zeros(6), by_channel) == "its weight is not a matrix"
    conv, blocks = read_node(tmp_path, "Conv", ["x", "w"], group=2), NarrowOptions.parse("mxfp8")
    assert narrow_layers._unsuited(conv, torch.zeros(6, 48, 1, 1), blocks).endswith(
        "48 channels are not a multiple of a block of 32"
    )
    assert not narrow_layers._unsuited(conv, torch.zeros(6, 64, 1, 1), blocks)
    assert not narrow_layers._unsuited(conv, torch.zeros(6, 32, 1, 1), blocks)
    assert not narrow_layers._unsuited(conv, torch.zeros(6, 20, 1, 1), blocks)


def test_a_block_has_the_number_of_its_first_element() -> None:
    spread = torch.tensor([[1.0, 1, 2, 2, 3]])
    assert narrow_layers._first_of_blocks(spread, 1, 2).tolist() == [[1, 2, 3]]


@pytest.mark.parametrize(("family", "taken"), [("int4", ["MatMul"]), ("fp8", ["Conv", "MatMul"])])
def test_int4_takes_matrices_and_other_types_convolutions_too(tmp_path: Path, family: str, taken: list[str]) -> None:
    net = NetBuilder()
    net.op("MatMul", net.conv("x", 2, 2), net.weight(np.ones((4, 3), np.float32)), name="y")
    graph = Graph(net.save(tmp_path / "n.onnx", {"x": (1, [1, 2, 4, 4])}, ["y"]))
    options: Any = SimpleNamespace(family=family)
    assert [node.op for node in weighted_layers(graph, options)] == taken
