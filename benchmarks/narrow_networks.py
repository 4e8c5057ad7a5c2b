"""Random networks for ``narrow_faults.py``, wide enough for blocks of 128, with one layer whose numbers are special.

``TUNED`` are the families that limits were chosen on, ``JUDGED`` others that were used for nothing else. A treatment
changes what one product reads, never what the network computes much: a factor in front of the product that is taken
back behind it, channels of another range, outliers, sums of one sign.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from onnx import TensorProto

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tests.nets import NetBuilder


class NarrowBuilder(NetBuilder):
    """A network whose product number ``treated`` gets ``treatment``; ``products`` are the names of all of them."""

    def __init__(self, seed: int, treated: int = -1, treatment: str = "") -> None:
        super().__init__(seed)
        self.products: list[str] = []
        self._treated, self._treatment, self._seed = treated, treatment, seed

    def linear(self, x: str, before: int, after: int) -> str:
        """x [..., before] times a weight, with a bias: [..., after]."""
        w = (self.rng.standard_normal((before, after)) / before**0.5).astype(np.float32)
        x, w, undo = self._special(x, w, -1)
        y = self.op("MatMul", x, self.weight(w))
        self.products.append(self.nodes[-1].name)
        bias = self.weight((self.rng.standard_normal(after) * 0.1).astype(np.float32))
        return self.op("Add", self._undone(y, undo), bias)

    def convolution(self, x: str, before: int, after: int, k: int = 3, transposed: bool = False) -> str:
        """x [N, before, H, W] convolved: [N, after, H, W], or twice as large where ``transposed``."""
        if transposed:
            w = (self.rng.standard_normal((before, after, 2, 2)) * (2 / before) ** 0.5).astype(np.float32)
            x, w, undo = self._special(x, w, 1)
            y = self.op("ConvTranspose", x, self.weight(w), kernel_shape=[2, 2], strides=[2, 2])
        else:
            w = (self.rng.standard_normal((after, before, k, k)) * (2 / before / k / k) ** 0.5).astype(np.float32)
            x, w, undo = self._special(x, w, 1)
            y = self.op("Conv", x, self.weight(w), kernel_shape=[k, k], pads=[k // 2] * 4)
        self.products.append(self.nodes[-1].name)
        return self._undone(y, undo)

    def norm(self, x: str, size: int) -> str:
        """LayerNormalization over the last axis."""
        scale = self.weight(self.rng.uniform(0.5, 1.5, size).astype(np.float32))
        bias = self.weight((self.rng.standard_normal(size) * 0.1).astype(np.float32))
        return self.op("LayerNormalization", x, scale, bias, axis=-1, epsilon=1e-5)

    def _special(self, x: str, w: np.ndarray, axis: int) -> tuple[str, np.ndarray, float]:
        """What the product reads, by the treatment; ``axis`` is that of the data's channels."""
        if len(self.products) != self._treated or not self._treatment:
            return x, w, 1.0
        rng = np.random.default_rng([self._seed, 7])
        kind, undo = self._treatment, 1.0
        along = 0 if axis == -1 or w.shape[2:] == (2, 2) else 1
        channels = w.shape[along]
        if kind in ("large", "small"):
            undo = float(10 ** rng.uniform(3, 4.5)) if kind == "large" else float(10 ** rng.uniform(-4.5, -3.5))
            x = self.op("Mul", x, self.weight(np.array(undo, np.float32)))
        elif kind == "edge":
            undo = float(10 ** rng.uniform(1.9, 2.3))
            x = self.op("Mul", x, self.weight(np.array(undo, np.float32)))
        elif kind in ("channels", "mixed", "hot"):
            # One block of channels of another range; every other one; a few hot channels, as language models have them.
            factors = np.exp2(rng.uniform(-1, 1, channels)).astype(np.float32)
            if kind == "channels":
                start = int(rng.choice(range(0, channels - 127, 128)))
                factors[start : start + 128] *= np.float32(10 ** rng.uniform(4.5, 5.5))
            elif kind == "mixed":
                factors[rng.permutation(channels)[: channels // 3]] *= np.float32(10 ** rng.uniform(5.3, 6))
            else:
                chosen = rng.choice(channels, max(2, channels // int(rng.integers(24, 64))), replace=False)
                factors[chosen] *= np.float32(rng.uniform(25, 100))
            shape = (-1,) if axis == -1 else (-1, 1, 1)
            x = self.op("Mul", x, self.weight(factors.reshape(shape)))
            w = w / factors.reshape([-1 if d == along else 1 for d in range(w.ndim)])
        elif kind == "groups":
            chosen = rng.random(w.shape) < rng.uniform(0.004, 0.01)
            w = np.where(chosen, w * np.float32(rng.uniform(10, 25)), w)
        elif kind == "one sign":
            x = self.op("Add", self.op("Abs", x), self.weight(np.array(rng.uniform(0.3, 1.0), np.float32)))
            w = np.abs(w)
        return x, w.astype(np.float32), undo

    def _undone(self, y: str, factor: float) -> str:
        return y if factor == 1.0 else self.op("Mul", y, self.weight(np.array(1 / factor, np.float32)))


Family = Callable[[NarrowBuilder], tuple[list[int], list[str]]]


def perceptron(net: NarrowBuilder) -> tuple[list[int], list[str]]:
    """Layers with ReLU."""
    width = int(net.rng.choice([256, 384, 512]))
    x = "x"
    for _ in range(int(net.rng.integers(3, 6))):
        x = net.op("Relu", net.linear(x, width, width))
    return [24, width], [net.linear(x, width, 40)]


def gated(net: NarrowBuilder) -> tuple[list[int], list[str]]:
    """Gated blocks with residuals."""
    width, hidden = int(net.rng.choice([256, 320])), 512
    x = "x"
    for _ in range(int(net.rng.integers(1, 4))):
        normal = net.norm(x, width)
        gate = net.op("Sigmoid", net.linear(normal, width, hidden))
        x = net.op("Add", x, net.linear(net.op("Mul", gate, net.linear(normal, width, hidden)), hidden, width))
    return [1, 20, width], [net.linear(x, width, 64)]


def decoder(net: NarrowBuilder) -> tuple[list[int], list[str]]:
    """Causal attention blocks with GELU by tanh."""
    tokens, heads, size = int(net.rng.integers(12, 24)), 4, int(net.rng.choice([256, 384]))
    mask = net.weight(np.triu(np.full((tokens, tokens), -1e4, np.float32), 1))
    split = net.weight(np.array([1, tokens, heads, size // heads]))
    whole = net.weight(np.array([1, tokens, size]))
    x = "x"
    for _ in range(int(net.rng.integers(1, 3))):
        normal = net.norm(x, size)
        q, k, v = (net.op("Reshape", net.linear(normal, size, size), split) for _ in range(3))
        q, v = (net.op("Transpose", t, perm=[0, 2, 1, 3]) for t in (q, v))
        scores = net.op("MatMul", q, net.op("Transpose", k, perm=[0, 2, 3, 1]))
        scores = net.op("Mul", scores, net.weight(np.array((size / heads) ** -0.5, np.float32)))
        mixed = net.op("MatMul", net.op("Softmax", net.op("Add", scores, mask), axis=-1), v)
        mixed = net.op("Reshape", net.op("Transpose", mixed, perm=[0, 2, 1, 3]), whole)
        x = net.op("Add", x, net.linear(mixed, size, size))
        hidden = net.linear(net.norm(x, size), size, 2 * size)
        hidden = net.op(
            "Mul", hidden, net.op("Sigmoid", net.op("Mul", hidden, net.weight(np.array(1.702, np.float32))))
        )
        x = net.op("Add", x, net.linear(hidden, 2 * size, size))
    return [1, tokens, size], [net.linear(net.norm(x, size), size, 96)]


def backbone(net: NarrowBuilder) -> tuple[list[int], list[str]]:
    """Convolutions with residuals, a transposed one, a head."""
    width, size = int(net.rng.choice([48, 64, 96])), int(net.rng.integers(6, 11))
    x = net.op("Relu", net.convolution("x", 32, width))
    for _ in range(int(net.rng.integers(1, 4))):
        y = net.convolution(net.op("Relu", net.convolution(x, width, width)), width, width)
        x = net.op("Relu", net.op("Add", x, y))
    x = net.op("Relu", net.convolution(x, width, width, transposed=True))
    return [1, 32, size, size], [net.convolution(x, width, 12, k=1)]


def mixer(net: NarrowBuilder) -> tuple[list[int], list[str]]:
    """Products over tokens and over channels in turn."""
    tokens, size = int(net.rng.choice([128, 160])), int(net.rng.choice([256, 288]))
    x = "x"
    for _ in range(int(net.rng.integers(1, 3))):
        turned = net.op("Transpose", net.norm(x, size), perm=[0, 2, 1])
        turned = net.linear(net.op("Elu", net.linear(turned, tokens, 2 * tokens)), 2 * tokens, tokens)
        x = net.op("Add", x, net.op("Transpose", turned, perm=[0, 2, 1]))
        x = net.op("Add", x, net.linear(net.op("Softplus", net.linear(net.norm(x, size), size, size)), size, size))
    pooled = net.op("ReduceMean", x, axes=[1], keepdims=0)
    return [1, tokens, size], [net.linear(pooled, size, 30)]


TUNED: dict[str, Family] = {f.__name__: f for f in (perceptron, gated)}
JUDGED: dict[str, Family] = {f.__name__: f for f in (decoder, backbone, mixer)}


def build(path: Path, family: Family, seed: int, treatment: str = "", only: str = "") -> tuple[Path, str]:
    """Write a random network; also returns the name of the product that was treated (a random one without treatment).

    ``only``: operator that the product must be.
    """
    plain = NarrowBuilder(seed)
    family(plain)
    kinds = {node.name: node.op_type for node in plain.nodes}
    places = [i for i, name in enumerate(plain.products) if not only or kinds[name] == only]
    if not places:
        raise ValueError(f"{family.__name__} has no {only}")
    place = int(np.random.default_rng([seed, 3]).choice(places))
    net = NarrowBuilder(seed, place, treatment)
    shape, outputs = family(net)
    return net.save(path, {"x": (TensorProto.FLOAT, shape)}, outputs), net.products[place]
