"""Networks with random weights that show what TensorRT makes of them: where it fuses a lot, which kernels it takes.

    python benchmarks/engine_networks.py FOLDER [NAME …]

writes ``FOLDER/NAME.onnx`` (TorchScript exporter, opset 17, which TensorRT 8.6 reads) and ``FOLDER/NAME.npz`` (one
input) for each. Seeds are fixed: the same torch gives the same files.
"""

from __future__ import annotations

import itertools
import sys
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

Made = tuple[nn.Module, dict[str, tuple[int, ...]]]
"""A module in eval mode and the shapes of its inputs."""
NETWORKS: dict[str, Callable[[], Made]] = {}


def network(make: Callable[[], Made]) -> Callable[[], Made]:
    """Register a network under its function's name."""
    NETWORKS[make.__name__] = make
    return make


class Attention(nn.Module):
    """Multi-head self-attention over [B, N, C]; ``scaled`` uses torch's fused function."""

    def __init__(self, width: int, heads: int, scaled: bool) -> None:
        super().__init__()
        self.heads, self.scaled = heads, scaled
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        if self.scaled:
            y = functional.scaled_dot_product_attention(q, k, v)
        else:
            y = ((q @ k.transpose(-2, -1)) * (c // self.heads) ** -0.5).softmax(-1) @ v
        return self.proj(y.transpose(1, 2).reshape(b, n, c))


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, width: int, heads: int, scaled: bool) -> None:
        super().__init__()
        self.n1, self.a, self.n2 = nn.LayerNorm(width), Attention(width, heads, scaled), nn.LayerNorm(width)
        self.m = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.a(self.n1(x))
        return x + self.m(self.n2(x))


class ViT(nn.Module):
    """Vision transformer with a class token."""

    def __init__(self, width: int, heads: int, blocks: int, size: int, patch: int, scaled: bool) -> None:
        super().__init__()
        self.p = nn.Conv2d(3, width, patch, patch)
        self.token = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.place = nn.Parameter(torch.randn(1, (size // patch) ** 2 + 1, width) * 0.02)
        self.b = nn.ModuleList(Block(width, heads, scaled) for _ in range(blocks))
        self.n, self.fc = nn.LayerNorm(width), nn.Linear(width, 100)

    def forward(self, x: Tensor) -> Tensor:
        x = self.p(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.place
        for block in self.b:
            x = block(x)
        return self.fc(self.n(x)[:, 0])


@network
def vit() -> Made:
    """Six blocks, width 192, 224²; attention written out."""
    return ViT(192, 3, 6, 224, 16, False), {"x": (1, 3, 224, 224)}


@network
def vit_sdpa() -> Made:
    """The same with torch's fused attention, which the exporter spells with shape arithmetic and square roots."""
    return ViT(192, 3, 6, 224, 16, True), {"x": (1, 3, 224, 224)}


class WindowBlock(nn.Module):
    """Swin block: attention in windows of 7×7, shifted or not, with a relative bias."""

    def __init__(self, width: int, heads: int, shift: int) -> None:
        super().__init__()
        self.n1, self.n2, self.shift, self.heads = nn.LayerNorm(width), nn.LayerNorm(width), shift, heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.bias = nn.Parameter(torch.randn(heads, 49, 49) * 0.02)
        self.m = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        b, h, w, c = x.shape
        y = self.n1(x)
        if self.shift:
            y = torch.roll(y, (-self.shift, -self.shift), (1, 2))
        y = y.reshape(b, h // 7, 7, w // 7, 7, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, 49, c)
        q, k, v = self.qkv(y).reshape(-1, 49, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        y = ((q * (c // self.heads) ** -0.5) @ k.transpose(-2, -1) + self.bias).softmax(-1) @ v
        y = self.proj(y.transpose(1, 2).reshape(-1, 49, c))
        y = y.reshape(b, h // 7, w // 7, 7, 7, c).permute(0, 1, 3, 2, 4, 5).reshape(b, h, w, c)
        if self.shift:
            y = torch.roll(y, (self.shift, self.shift), (1, 2))
        x = x + y
        return x + self.m(self.n2(x))


class Swin(nn.Module):
    """Two stages of two window blocks with patch merging between them."""

    def __init__(self) -> None:
        super().__init__()
        self.p, self.n0 = nn.Conv2d(3, 96, 4, 4), nn.LayerNorm(96)
        self.s1 = nn.Sequential(WindowBlock(96, 3, 0), WindowBlock(96, 3, 3))
        self.nm, self.merge = nn.LayerNorm(384), nn.Linear(384, 192, bias=False)
        self.s2 = nn.Sequential(WindowBlock(192, 6, 0), WindowBlock(192, 6, 3))
        self.n, self.fc = nn.LayerNorm(192), nn.Linear(192, 100)

    def forward(self, x: Tensor) -> Tensor:
        x = self.s1(self.n0(self.p(x).permute(0, 2, 3, 1)))
        x = torch.cat([x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]], -1)
        x = self.s2(self.merge(self.nm(x)))
        return self.fc(self.n(x).mean((1, 2)))


@network
def swin() -> Made:
    """Swin-like, 112², shifted windows, patch merging."""
    return Swin(), {"x": (1, 3, 112, 112)}


class Act(nn.Module):
    """``act(conv(x))``, BatchNorm in between; folded by the exporter."""

    def __init__(self, a: int, b: int, k: int, act: nn.Module, *, s: int = 1, g: int = 1, d: int = 1) -> None:
        super().__init__()
        self.c = nn.Conv2d(a, b, k, s, d * (k // 2), d, g, bias=False)
        self.n, self.a = nn.BatchNorm2d(b), act

    def forward(self, x: Tensor) -> Tensor:
        return self.a(self.n(self.c(x)))


class Residual(nn.Module):
    """``act(conv(act(conv(x))) + x)``; with ``after`` the activation comes before the addition."""

    def __init__(self, c: int, k: int, act: nn.Module, *, after: bool = False, g: int = 1, d: int = 1) -> None:
        super().__init__()
        self.c1, self.after = Act(c, c, k, act, g=g, d=d), after
        self.c2, self.a = Act(c, c, 3, act if after else nn.Identity()), act

    def forward(self, x: Tensor) -> Tensor:
        y = self.c2(self.c1(x))
        return x + y if self.after else self.a(x + y)


def _seq(*modules: nn.Module) -> nn.Module:
    return nn.Sequential(*modules)


@network
def residual() -> Made:
    """Residual blocks with four activations behind the addition, or before it; a 7×7 first layer of 3 channels."""
    silu, hard = nn.SiLU(), nn.Hardswish()
    net = _seq(
        Act(3, 64, 7, nn.ReLU(), s=2),
        *(Residual(64, 3, nn.ReLU()), Residual(64, 3, silu, after=True), Residual(64, 3, silu)),
        Act(64, 128, 3, nn.ReLU(), s=2),
        *(Residual(128, 3, nn.ReLU()), Residual(128, 1, hard), Residual(128, 3, nn.Sigmoid())),
        Act(128, 256, 1, nn.ReLU()),
        *(Residual(256, 3, nn.ReLU()), Residual(256, 3, nn.ReLU(), d=2)),
    )
    return net, {"x": (1, 3, 96, 96)}


class Inverted(nn.Module):
    """Inverted residual with a depthwise convolution."""

    def __init__(self, a: int, b: int, k: int, s: int, act: nn.Module) -> None:
        super().__init__()
        self.m = _seq(Act(a, 4 * a, 1, act), Act(4 * a, 4 * a, k, act, s=s, g=4 * a), Act(4 * a, b, 1, nn.Identity()))
        self.same = a == b and s == 1

    def forward(self, x: Tensor) -> Tensor:
        return x + self.m(x) if self.same else self.m(x)


@network
def mobile() -> Made:
    """Depthwise 3×3 and 5×5, grouped 3×3 in groups of 4, 8 and 32 channels; a first layer of 4 channels."""
    relu6 = nn.ReLU6()
    net = _seq(
        Act(4, 32, 3, relu6, s=2),
        *(Inverted(32, 32, 3, 1, relu6), Inverted(32, 48, 5, 2, nn.Hardswish()), Inverted(48, 48, 5, 1, nn.SiLU())),
        Act(48, 128, 1, nn.ReLU()),
        *(Residual(128, 3, nn.ReLU(), g=32), Residual(128, 3, nn.ReLU(), g=16), Residual(128, 3, nn.ReLU(), g=4)),
        Act(128, 64, 1, nn.ReLU()),
    )
    return net, {"x": (1, 4, 96, 96)}


class Products(nn.Module):
    """Matrix products by constants, and of values: QKᵀ and PV, without what a transformer puts between them."""

    def __init__(self) -> None:
        super().__init__()
        sizes = (96, 192, 384, 768, 256)
        self.l = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(sizes))
        self.c = nn.Conv2d(64, 64, 1)

    def forward(self, x: Tensor, q: Tensor, k: Tensor) -> tuple[Tensor, ...]:
        out = []
        for layer in self.l:
            x = torch.relu(layer(x))
            out.append(x)
        scores = q @ k.transpose(-2, -1)
        return (*out, scores, scores @ k, torch.relu(self.c(q)))


@network
def products() -> Made:
    """GEMMs with K of 96 to 768, batched products."""
    return Products(), {"x": (1, 128, 96), "q": (1, 64, 128, 64), "k": (1, 64, 128, 64)}


class UNet(nn.Module):
    """GroupNorm and SiLU, strided and transposed convolutions, concatenation."""

    def __init__(self) -> None:
        super().__init__()

        def block(a: int, b: int, s: int = 1) -> nn.Module:
            return _seq(nn.Conv2d(a, b, 3, s, 1), nn.GroupNorm(8, b), nn.SiLU())

        self.d0, self.d1, self.d2 = block(3, 32), block(32, 64, 2), block(64, 128, 2)
        self.u1, self.u0 = nn.ConvTranspose2d(128, 64, 2, 2), nn.ConvTranspose2d(64, 32, 2, 2)
        self.e1, self.e0, self.out = block(128, 64), block(64, 32), nn.Conv2d(32, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.d0(x)
        b = self.d1(a)
        y = self.e1(torch.cat([self.u1(self.d2(b)), b], 1))
        return self.out(self.e0(torch.cat([self.u0(y), a], 1)))


@network
def unet() -> Made:
    """U-Net with GroupNorm."""
    return UNet(), {"x": (1, 3, 64, 64)}


class Next(nn.Module):
    """ConvNeXt block: 7×7 depthwise, LayerNorm, GELU."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.d, self.n = nn.Conv2d(c, c, 7, 1, 3, groups=c), nn.LayerNorm(c)
        self.m = _seq(nn.Linear(c, 4 * c), nn.GELU(), nn.Linear(4 * c, c))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.m(self.n(self.d(x).permute(0, 2, 3, 1))).permute(0, 3, 1, 2)


@network
def convnext() -> Made:
    """ConvNeXt-like: 4×4 stride-4 stem, 7×7 depthwise convolutions. Kept aside for judging."""
    net = _seq(nn.Conv2d(3, 64, 4, 4), Next(64), Next(64), nn.Conv2d(64, 128, 2, 2), Next(128), nn.Conv2d(128, 64, 1))
    return net, {"x": (1, 3, 128, 128)}


class Csp(nn.Module):
    """YOLO's C2f: split, residual bottlenecks with SiLU, concatenation."""

    def __init__(self, a: int, b: int) -> None:
        super().__init__()
        silu = nn.SiLU()
        self.i, self.o = Act(a, b, 1, silu), Act(2 * b, b, 1, silu)
        self.m = nn.ModuleList(Residual(b // 2, 3, silu, after=True) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        y = list(self.i(x).chunk(2, 1))
        for m in self.m:
            y.append(m(y[-1]))
        return self.o(torch.cat(y, 1))


@network
def yolo() -> Made:
    """YOLOv8-like backbone, 160², SiLU. Kept aside for judging."""
    silu = nn.SiLU()
    net = _seq(
        *(Act(3, 16, 3, silu, s=2), Act(16, 32, 3, silu, s=2), Csp(32, 32), Act(32, 64, 3, silu, s=2), Csp(64, 64)),
        *(Act(64, 128, 3, silu, s=2), Csp(128, 128), nn.Conv2d(128, 64, 1)),
    )
    return net, {"x": (1, 3, 160, 160)}


@network
def regnet() -> Made:
    """RegNet-like: grouped bottlenecks with ReLU behind the addition. Kept aside for judging."""

    def stage(a: int, b: int) -> Iterator[nn.Module]:
        yield Act(a, b, 3, nn.ReLU(), s=2)
        yield from (Residual(b, 3, nn.ReLU(), g=b // 16), Residual(b, 3, nn.ReLU(), g=b // 8))

    return _seq(Act(3, 32, 3, nn.ReLU(), s=2), *stage(32, 64), *stage(64, 160)), {"x": (1, 3, 128, 128)}


@network
def resnet() -> Made:
    """ResNet-like: bottlenecks with a projected shortcut. Kept aside for judging."""

    class Bottleneck(nn.Module):
        def __init__(self, a: int, c: int, s: int) -> None:
            super().__init__()
            relu = nn.ReLU()
            self.m = _seq(Act(a, c, 1, relu), Act(c, c, 3, relu, s=s), Act(c, 4 * c, 1, nn.Identity()))
            self.short = Act(a, 4 * c, 1, nn.Identity(), s=s) if s > 1 or a != 4 * c else nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(self.m(x) + self.short(x))

    blocks = (Bottleneck(64, 32, 1), Bottleneck(128, 32, 1), Bottleneck(128, 64, 2), Bottleneck(256, 64, 1))
    return _seq(Act(3, 64, 7, nn.ReLU(), s=2), nn.MaxPool2d(3, 2, 1), *blocks), {"x": (1, 3, 128, 128)}


@network
def odd() -> Made:
    """Residual blocks with 5×5, 7×1, dilated, grouped and strided convolutions. Kept aside for judging predictions."""

    class Uneven(nn.Module):
        def __init__(self, c: int) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(c, c, (7, 1), padding=(3, 0)), nn.Conv2d(c, c, (1, 7), padding=(0, 3))
            self.act = nn.LeakyReLU(0.1)

        def forward(self, x: Tensor) -> Tensor:
            return self.act(x + self.b(self.act(self.a(x))))

    net = _seq(
        *(Act(3, 48, 5, nn.ReLU(), s=2), Residual(48, 5, nn.ReLU()), Uneven(48), Act(48, 96, 3, nn.SiLU(), s=2)),
        *(Residual(96, 3, nn.Hardswish(), d=3), Residual(96, 3, nn.ReLU(), g=6), Uneven(96)),
        *(Act(96, 192, 1, nn.ReLU(), s=2), Residual(192, 3, nn.ReLU()), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        nn.Linear(192, 40),
    )
    return net, {"x": (1, 3, 144, 144)}


class Segment(nn.Module):
    """U-Net with BatchNorm and ReLU, max pooling, bilinear resizing."""

    def __init__(self) -> None:
        super().__init__()

        def double(a: int, b: int) -> nn.Module:
            return _seq(Act(a, b, 3, nn.ReLU()), Act(b, b, 3, nn.ReLU()))

        self.d0, self.d1, self.d2, self.pool = double(3, 32), double(32, 64), double(64, 128), nn.MaxPool2d(2)
        self.u1, self.u0 = Act(128, 64, 1, nn.ReLU()), nn.ConvTranspose2d(64, 32, 2, 2)
        self.e1, self.e0, self.out = double(128, 64), double(64, 32), nn.Conv2d(32, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.d0(x)
        b = self.d1(self.pool(a))
        y = functional.interpolate(self.d2(self.pool(b)), scale_factor=2.0, mode="bilinear", align_corners=False)
        y = self.e1(torch.cat([self.u1(y), b], 1))
        return torch.sigmoid(self.out(self.e0(torch.cat([self.u0(y), a], 1))))


@network
def segment() -> Made:
    """Another U-Net, 128². Kept aside for judging predictions."""
    return Segment(), {"x": (1, 3, 128, 128)}


class Encoder(nn.Module):
    """Tokens of 16×16 pixels, two blocks, mean."""

    def __init__(self) -> None:
        super().__init__()
        self.p, self.b = nn.Conv2d(3, 128, 16, 16), _seq(Block(128, 4, False), Block(128, 4, False))
        self.n, self.fc = nn.LayerNorm(128), nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.p(x).flatten(2).transpose(1, 2)
        return self.fc(self.n(self.b(x)).mean(1))


@network
def encoder() -> Made:
    """A small transformer, 64 tokens. Kept aside for judging predictions."""
    return Encoder(), {"x": (1, 3, 128, 128)}


class Orders(nn.Module):
    """Branches for kernels' orders of summation: first layers with few channels, 16 and 24 channels, long products."""

    FIRST = ((3, 64, 7, 2), (3, 32, 3, 1), (3, 16, 3, 2), (4, 32, 3, 1), (1, 32, 5, 1))
    INNER = (
        *((16, 16, 3, 1), (16, 32, 3, 2), (16, 16, 5, 1), (16, 64, 1, 1)),
        *((24, 48, 3, 1), (8, 32, 3, 1), (40, 40, 3, 1)),
    )
    LONG = ((1024, 64), (2048, 128), (4096, 256))

    def __init__(self) -> None:
        super().__init__()
        relu = nn.ReLU()
        self.first = nn.ModuleList(_seq(Act(a, b, k, relu, s=s), nn.Conv2d(b, 8, 1)) for a, b, k, s in self.FIRST)
        self.widen = nn.ModuleList(nn.Conv2d(32, a, 1) for a, _, _, _ in self.INNER)
        self.inner = nn.ModuleList(_seq(Act(a, b, k, relu, s=s), nn.Conv2d(b, 8, 1)) for a, b, k, s in self.INNER)
        self.stem = Act(32, 32, 1, relu)
        self.long = nn.ModuleList(_seq(nn.Linear(a, b), relu, nn.Linear(b, 32)) for a, b in self.LONG)

    def forward(self, x: Tensor, z: Tensor, g: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        first = [branch(x[:, : sizes[0]]) for branch, sizes in zip(self.first, self.FIRST, strict=True)]
        z = self.stem(z)
        inner = [branch(widen(z)) for branch, widen in zip(self.inner, self.widen, strict=True)]
        long = [branch(g[..., : sizes[0]]) for branch, sizes in zip(self.long, self.LONG, strict=True)]
        scores = q @ k.transpose(-2, -1)
        return (*first, *inner, *long, scores, scores @ v)


@network
def orders() -> Made:
    """One layer a branch, each between other layers."""
    shapes = {"x": (1, 4, 96, 96), "z": (1, 32, 64, 64), "g": (1, 64, 4096)}
    return Orders(), {**shapes, **dict.fromkeys("qkv", (1, 6, 192, 32))}


class Gemms(nn.Module):
    """Matrix products by constants with ReLU between them, products of values behind each other, and last stages of
    classifiers: many channels on few pixels."""

    def __init__(self, sizes: tuple[int, ...], channels: tuple[int, ...], classes: int) -> None:
        super().__init__()
        relu = nn.ReLU()
        self.l = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(sizes))
        self.c = _seq(*(Act(a, b, 3, relu) for a, b in itertools.pairwise(channels)))
        self.fc = nn.Linear(channels[-1], classes)

    def forward(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, c: Tensor) -> tuple[Tensor, ...]:
        for layer in self.l:
            x = torch.relu(layer(x))
        scores = torch.relu(q @ k.transpose(-2, -1))
        return x, scores @ v, self.fc(self.c(c).mean((2, 3)))


@network
def gemms() -> Made:
    """GEMMs with K of 256 to 4096, batched products with K of 64 and 256, convolutions with K of 4608."""
    heads = dict.fromkeys("qkv", (1, 12, 256, 64))
    return Gemms((256, 1024, 4096, 512, 64), (512, 512, 512), 1000), {"x": (1, 512, 256), **heads, "c": (1, 512, 7, 7)}


@network
def gemms_aside() -> Made:
    """The same of other sizes. Kept aside for judging."""
    heads = dict.fromkeys("qkv", (1, 8, 384, 32))
    return Gemms((384, 768, 3072, 768, 96), (384, 384, 640), 400), {"x": (1, 640, 384), **heads, "c": (1, 384, 10, 10)}


class Attend(nn.Module):
    """Attention without a Split between convolutions: one fused region with two products of values."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.stem, self.out = Act(64, 3 * width, 1, nn.ReLU()), nn.Conv2d(width, 64, 1)

    def forward(self, x: Tensor) -> Tensor:
        b, _, h, w = x.shape
        parts = self.stem(x).flatten(2).reshape(b, 3, self.heads, -1, h * w)
        q, k, v = (parts[:, i] for i in range(3))
        p = ((q.transpose(-2, -1) @ k) * q.shape[2] ** -0.5).softmax(-1)
        return self.out((v @ p.transpose(-2, -1)).reshape(b, -1, h, w))


@network
def attend() -> Made:
    """Four heads of 64 channels over 24×24 places."""
    return Attend(256, 4), {"x": (1, 64, 24, 24)}


@network
def fpn() -> Made:
    """Backbone with a feature pyramid: lateral 1×1, both kinds of upsampling, heads. Kept aside for judging."""

    class Fpn(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            relu = nn.ReLU()
            self.s = _seq(Act(3, 32, 3, relu, s=2), Act(32, 64, 3, relu, s=2))
            self.a, self.b = _seq(Residual(64, 3, relu), Act(64, 128, 3, relu, s=2)), _seq(Residual(128, 3, relu))
            self.d = _seq(Act(128, 256, 3, relu, s=2), Residual(256, 3, relu))
            self.l = nn.ModuleList((nn.Conv2d(128, 128, 1), nn.Conv2d(256, 128, 1)))
            self.up = nn.ConvTranspose2d(128, 64, 2, 2)
            self.p, self.h = Act(128, 128, 3, relu), _seq(Act(64, 64, 3, nn.SiLU()), nn.Conv2d(64, 24, 1))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = self.b(self.a(self.s(x)))
            z = self.l[1](self.d(y))
            p = self.p(self.l[0](y) + functional.interpolate(z, scale_factor=2.0))
            return self.h(self.up(p)), z

    return Fpn(), {"x": (1, 3, 160, 160)}


def write(name: str, folder: Path) -> tuple[Path, Path]:
    """Write the network's ONNX file and an ``.npz`` with one input; returns both paths."""
    torch.manual_seed(zlib.crc32(name.encode()) if name not in ("vit", "vit_sdpa") else 0)
    module, shapes = NETWORKS[name]()
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):  # as a trained one: no channel is as the next
            nn.init.uniform_(part.weight, 0.5, 1.5)
            nn.init.normal_(part.bias, 0.0, 0.2)
            part.running_mean.normal_(0.0, 0.1)  # type: ignore[union-attr,operator]
            part.running_var.uniform_(0.2, 1.0)  # type: ignore[union-attr,operator]
    inputs = {key: torch.randn(shape) for key, shape in shapes.items()}
    path = folder / f"{name}.onnx"
    folder.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        made = module.eval()(*inputs.values())
        count = len(made) if isinstance(made, tuple) else 1
        names = [f"y{i}" for i in range(count)] if count > 1 else ["y"]
        torch.onnx.export(
            module.eval(), tuple(inputs.values()), str(path), dynamo=False, opset_version=17,
            input_names=list(inputs), output_names=names,
        )  # fmt: skip
    np.savez(path.with_suffix(".npz"), **{key: value.numpy() for key, value in inputs.items()})
    return path, path.with_suffix(".npz")


def main() -> None:
    folder, *names = sys.argv[1:] or ["networks"]
    for name in names or NETWORKS:
        path, _ = write(name, Path(folder))
        print(path, f"{path.stat().st_size >> 10} KiB")


if __name__ == "__main__":
    main()
