"""Random networks for ``localise.py``: SECOND, pyramids with heads, residual networks, transformers; 10 to 200 nodes.

Weights keep activations near 1, so that no layer is trivially exact or saturated. Sizes are small: what is measured is
whether the right layer is named, which does not depend on them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from onnx import TensorProto
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tests.nets import NetBuilder

Family = Callable[[NetBuilder], tuple[list[int], list[str]]]


def build(path: Path, family: str, seed: int) -> Path:
    """Write a random network of a family; the input is called ``x``."""
    net = NetBuilder(seed)
    shape, outputs = FAMILIES[family](net)
    return net.save(path, {"x": (TensorProto.FLOAT, shape)}, outputs)


def second_net(path: Path, size: int) -> Path:
    """SECOND with its neck and six heads at full width: ``x`` [1, 64, size, size]."""
    net, x, maps, before = NetBuilder(0), "x", [], 64
    for block, (after, layers) in enumerate(((64, 3), (128, 5), (256, 5))):
        x = _cbr(net, x, before, after, stride=2)
        for _ in range(layers):
            x = _cbr(net, x, after, after)
        maps.append(_up(net, x, after, 128, 2**block))
        before = after
    shared = _cbr(net, net.op("Concat", *maps, axis=1), 384, 64)
    outputs = [net.conv(_cbr(net, shared, 64, 64), 64, 2) for _ in range(6)]
    return net.save(path, {"x": (TensorProto.FLOAT, [1, 64, size, size])}, outputs)


def torch_net(seed: int) -> tuple[nn.Module, torch.Tensor]:
    """A random torch network and its example input: convolutions with BatchNorm, or a transformer encoder layer."""
    generator = torch.Generator().manual_seed(seed)
    if seed % 20 < 10:
        layers: list[nn.Module] = []
        for before in [3] + [8] * int(torch.randint(2, 8, (), generator=generator)):
            layers += [
                nn.Conv2d(before, 8, 3, padding=1, bias=False),
                nn.BatchNorm2d(8, eps=1e-3),
                nn.ReLU(inplace=True),
            ]
        return nn.Sequential(*layers).eval(), torch.randn(1, 3, 16, 16, generator=generator)
    layer = nn.TransformerEncoderLayer(16, 2, 32, activation="gelu", batch_first=True)
    return layer.eval(), torch.randn(1, 9, 16, generator=generator)


def second(net: NetBuilder) -> tuple[list[int], list[str]]:
    """Blocks of convolution, BatchNormalization and ReLU; a neck of transposed convolutions; heads."""
    width, size = int(net.rng.choice([4, 8, 16])), int(net.rng.choice([16, 32]))
    x, channels, maps = _cbr(net, "x", width, width, stride=2), width, []
    for block in range(int(net.rng.integers(1, 4))):
        out = width * 2**block
        x, channels = _cbr(net, x, channels, out, stride=1 if block == 0 else 2), out
        for _ in range(int(net.rng.integers(0, 8))):
            x = _cbr(net, x, channels, channels)
        maps.append(_up(net, x, channels, width, 2**block) if block else _cbr(net, x, channels, width))
    neck = net.op("Concat", *maps, axis=1) if len(maps) > 1 else maps[0]
    shared = _cbr(net, neck, width * len(maps), width)
    return [1, width, size, size], _heads(net, shared, width)


def pyramid(net: NetBuilder) -> tuple[list[int], list[str]]:
    """A feature pyramid: maps of halved size, brought back by Resize and added; heads with sigmoids."""
    width, size, levels = int(net.rng.choice([4, 8, 12])), 32, int(net.rng.integers(2, 5))
    maps = [_cbr(net, "x", 3, width)]
    for _ in range(levels - 1):
        x = net.op("MaxPool", maps[-1], kernel_shape=[2, 2], strides=[2, 2])
        for _ in range(int(net.rng.integers(1, 5))):
            x = _cbr(net, x, width, width)
        maps.append(x)
    top = net.conv(maps.pop(), width, width, k=1)
    scales = net.weight(np.array([1, 1, 2, 2], np.float32))
    while maps:
        lateral = net.conv(maps.pop(), width, width, k=1)
        top = net.op("Add", lateral, net.op("Resize", top, "", scales, mode="nearest"))
        top = net.op("LeakyRelu", net.conv(top, width, width), alpha=0.1)
    return [1, 3, size, size], _heads(net, top, width)


def residual(net: NetBuilder) -> tuple[list[int], list[str]]:
    """Residual blocks, some with squeeze and excitation, and a classifier."""
    width = int(net.rng.choice([8, 16]))
    x = _cbr(net, "x", 3, width)
    for _ in range(int(net.rng.integers(1, 14))):
        y = net.conv(_cbr(net, x, width, width), width, width)
        if net.rng.random() < 0.5:
            squeezed = net.op("GlobalAveragePool", y)
            gate = net.op("Sigmoid", net.conv(net.op("Relu", net.conv(squeezed, width, 4, k=1)), 4, width, k=1))
            y = net.op("Mul", y, gate)
        x = net.op(str(net.rng.choice(["Relu", "Elu", "Softplus"])), net.op("Add", x, y))
        if net.rng.random() < 0.5:
            x = net.batch_norm(x, width)
    pooled = net.op("Flatten", net.op("AveragePool", x, kernel_shape=[4, 4], strides=[4, 4]))
    logits = net.op("Gemm", pooled, _matrix(net, width * 16, 10), _vector(net, 10))
    return [1, 3, 16, 16], [net.op("Softmax", logits, axis=-1)]


def transformer(net: NetBuilder) -> tuple[list[int], list[str]]:
    """Attention blocks with LayerNormalization (whole or in pieces) and GELU (exact or by tanh)."""
    tokens, heads, size = int(net.rng.choice([6, 17])), int(net.rng.choice([1, 2, 4])), 16
    x = net.op("Add", _linear(net, "x", 12, size), net.weight(_normal(net, 1, tokens, size)))
    for _ in range(int(net.rng.integers(1, 6))):
        x = net.op("Add", x, _attention(net, _layer_norm(net, x, size), tokens, heads, size))
        hidden = _gelu(net, _linear(net, _layer_norm(net, x, size), size, 2 * size))
        x = net.op("Add", x, _linear(net, hidden, 2 * size, size))
    pooled = net.op("ReduceMean", x, axes=[1], keepdims=0)
    return [1, tokens, 12], [net.op("Gemm", pooled, _matrix(net, size, 5), _vector(net, 5))]


FAMILIES: dict[str, Family] = {f.__name__: f for f in (second, pyramid, residual, transformer)}


def _cbr(net: NetBuilder, x: str, before: int, after: int, stride: int = 1) -> str:
    return net.op("Relu", net.batch_norm(net.conv(x, before, after, stride=stride), after))


def _up(net: NetBuilder, x: str, before: int, after: int, stride: int) -> str:
    weight = net.weight(_normal(net, before, after, stride, stride) * np.float32((2 / before) ** 0.5))
    x = net.op("ConvTranspose", x, weight, kernel_shape=[stride] * 2, strides=[stride] * 2)
    return net.op("Relu", net.batch_norm(x, after))


def _heads(net: NetBuilder, x: str, width: int) -> list[str]:
    outputs = []
    for _ in range(int(net.rng.integers(1, 6))):
        y = net.conv(_cbr(net, x, width, width), width, int(net.rng.integers(1, 4)))
        outputs.append(net.op(str(net.rng.choice(["Sigmoid", "Softplus", "Tanh"])), y) if net.rng.random() < 0.5 else y)
    return outputs


def _linear(net: NetBuilder, x: str, before: int, after: int) -> str:
    return net.op("Add", net.op("MatMul", x, _matrix(net, before, after)), _vector(net, after))


def _attention(net: NetBuilder, x: str, tokens: int, heads: int, size: int) -> str:
    split = net.weight(np.array([1, tokens, heads, size // heads], np.int64))
    queries, keys, values = (net.op("Reshape", _linear(net, x, size, size), split) for _ in range(3))
    queries, values = (net.op("Transpose", v, perm=[0, 2, 1, 3]) for v in (queries, values))
    scores = net.op("MatMul", queries, net.op("Transpose", keys, perm=[0, 2, 3, 1]))
    scores = net.op("Div", scores, net.weight(np.array((size / heads) ** 0.5, np.float32)))
    mixed = net.op("Transpose", net.op("MatMul", net.op("Softmax", scores, axis=-1), values), perm=[0, 2, 1, 3])
    return _linear(net, net.op("Reshape", mixed, net.weight(np.array([1, tokens, size], np.int64))), size, size)


def _layer_norm(net: NetBuilder, x: str, size: int) -> str:
    scale = net.weight(net.rng.uniform(0.5, 1.5, size).astype(np.float32))
    if net.rng.random() < 0.5:
        return net.op("LayerNormalization", x, scale, _vector(net, size), axis=-1, epsilon=1e-5)
    centred = net.op("Sub", x, net.op("ReduceMean", x, axes=[-1]))
    two, eps = (net.weight(np.array(v, np.float32)) for v in (2.0, 1e-5))
    variance = net.op("ReduceMean", net.op("Pow", centred, two), axes=[-1])
    normal = net.op("Div", centred, net.op("Sqrt", net.op("Add", variance, eps)))
    return net.op("Add", net.op("Mul", normal, scale), _vector(net, size))


def _gelu(net: NetBuilder, x: str) -> str:
    half, one, root = (net.weight(np.array(v, np.float32)) for v in (0.5, 1.0, 2**0.5))
    if net.rng.random() < 0.5:
        curve = net.op("Erf", net.op("Div", x, root))
    else:
        curve = net.op("Tanh", net.op("Mul", x, net.weight(np.array(0.8, np.float32))))
    return net.op("Mul", net.op("Mul", x, half), net.op("Add", curve, one))


def _normal(net: NetBuilder, *shape: int) -> np.ndarray:
    return net.rng.standard_normal(shape).astype(np.float32)


def _matrix(net: NetBuilder, before: int, after: int) -> str:
    return net.weight(_normal(net, before, after) / np.float32(before**0.5))


def _vector(net: NetBuilder, size: int) -> str:
    return net.weight(_normal(net, size) * np.float32(0.1))
