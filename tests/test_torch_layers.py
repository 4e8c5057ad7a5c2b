"""Layers of a torch module: paths, globs, output channels, quantizers."""

from __future__ import annotations

import pytest
from torch import nn

from cp_debug.errors import InputError
from cp_debug.programs.torch_layers import channels, full_path, is_quantized, matches, own_path, select, weight_axis


def test_paths_in_a_component_and_in_the_whole_model_lead_back() -> None:
    pairs = {
        ("head", "conv.0"): "head.conv.0",
        ("", "conv"): "conv",
        ("head", ""): "head",
        ("head", "/add"): "head/add",
    }
    for (prefix, own), whole in pairs.items():
        assert full_path(prefix, own) == whole
        assert own_path(prefix, whole) == own
    assert own_path("head", "headless.conv") == "less.conv"  # never asked: the prefix is a whole module's


def test_a_glob_means_a_layer_or_what_a_container_holds() -> None:
    assert matches("head.conv", "head")
    assert matches("head/add", "head")
    assert matches("head.conv.0", "*.conv")
    assert not matches("header.conv", "head")
    assert select(["a.x", "a.y", "b"], ["a", "*.y"]) == {"a.x": "a", "a.y": "*.y"}
    with pytest.raises(InputError, match=r"no layer matches 'a\.z'; the nearest names are"):
        select(["a.x", "b"], ["a.z"])


def test_output_channels_lie_along_the_axis_of_their_layer() -> None:
    for layer in (nn.Linear(3, 7), nn.Conv2d(3, 7, 2), nn.ConvTranspose2d(3, 7, 2)):
        assert channels(layer) == 7
        assert layer.weight.shape[weight_axis(layer)] == 7


def test_a_module_is_quantized_by_any_quantizer() -> None:
    TensorQuantizer = type("TensorQuantizer", (nn.Module,), {})
    plain = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    assert not is_quantized(plain)
    plain[0].add_module("input_quantizer", TensorQuantizer())
    assert is_quantized(plain)
