"""Networks with random weights of the sizes that are deployed: normalizations between large convolutions, transformers
with one product a projection, products of values and long sums as layers of their own.

    python benchmarks/engine_networks_sized.py FOLDER [NAME …]

writes files as ``engine_networks.py`` does. Names that end in ``_aside`` are for judging alone.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from engine_networks import NETWORKS, Act, Made, Next, _seq, network, write
from torch import Tensor, nn

OTHERS = frozenset(NETWORKS)


class Normal(nn.Module):
    """Convolution, normalization, activation."""

    def __init__(self, a: int, b: int, norm: nn.Module, act: nn.Module, k: int = 3, s: int = 1) -> None:
        super().__init__()
        self.c, self.n, self.a = nn.Conv2d(a, b, k, s, k // 2), norm, act

    def forward(self, x: Tensor) -> Tensor:
        return self.a(self.n(self.c(x)))


class Place(nn.Module):
    """Attention of one head over all places of an image, each of its four products by weights a 1×1 convolution."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.n = nn.GroupNorm(8, c)
        self.q, self.k, self.v, self.o = (nn.Conv2d(c, c, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.n(x)
        q, k, v = (part(y).flatten(2) for part in (self.q, self.k, self.v))
        p = ((q.transpose(1, 2) @ k) * x.shape[1] ** -0.5).softmax(-1)
        return x + self.o((v @ p.transpose(1, 2)).reshape(x.shape))


@network
def diffusion() -> Made:
    """U-Net of a diffusion model: GroupNorm and SiLU in front of each convolution, residuals, attention at 16²."""

    class Step(nn.Module):
        def __init__(self, a: int, b: int) -> None:
            super().__init__()
            self.m = _seq(nn.GroupNorm(8, a), nn.SiLU(), nn.Conv2d(a, b, 3, 1, 1), nn.GroupNorm(8, b), nn.SiLU())
            self.o, self.short = nn.Conv2d(b, b, 3, 1, 1), nn.Conv2d(a, b, 1) if a != b else nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            return self.short(x) + self.o(self.m(x))

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.i, self.a, self.b, self.c = nn.Conv2d(3, 64, 3, 1, 1), Step(64, 64), Step(64, 96), Step(96, 128)
            self.d1, self.d2 = nn.Conv2d(64, 64, 3, 2, 1), nn.Conv2d(96, 96, 3, 2, 1)
            self.d3, self.middle, self.u3 = nn.Conv2d(128, 128, 3, 2, 1), Place(128), nn.ConvTranspose2d(128, 128, 2, 2)
            self.e, self.u2, self.f = Step(256, 96), nn.ConvTranspose2d(96, 96, 2, 2), Step(192, 64)
            self.u1, self.g, self.o = nn.ConvTranspose2d(64, 64, 2, 2), Step(128, 64), nn.Conv2d(64, 3, 3, 1, 1)

        def forward(self, x: Tensor) -> Tensor:
            a = self.a(self.i(x))
            b = self.b(self.d1(a))
            c = self.c(self.d2(b))
            y = self.u3(self.middle(self.d3(c)))
            y = self.u2(self.e(torch.cat([y, c], 1)))
            y = self.u1(self.f(torch.cat([y, b], 1)))
            return self.o(self.g(torch.cat([y, a], 1)))

    return Net(), {"x": (1, 3, 128, 128)}


@network
def painter() -> Made:
    """Style transfer: InstanceNorm and ReLU behind each convolution, 32 to 128 channels, 192²."""

    class Residual(nn.Module):
        def __init__(self, c: int) -> None:
            super().__init__()
            self.m = _seq(Normal(c, c, nn.InstanceNorm2d(c, affine=True), nn.ReLU()), nn.Conv2d(c, c, 3, 1, 1))
            self.n = nn.InstanceNorm2d(c, affine=True)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.n(self.m(x))

    def layer(a: int, b: int, k: int = 3, s: int = 1) -> nn.Module:
        return Normal(a, b, nn.InstanceNorm2d(b, affine=True), nn.ReLU(), k, s)

    up = nn.Upsample(scale_factor=2)
    down = (layer(3, 32, 9), layer(32, 64, s=2), layer(64, 128, s=2), Residual(128), Residual(128))
    return _seq(*down, up, layer(128, 64), up, layer(64, 32), nn.Conv2d(32, 3, 9, 1, 4)), {"x": (1, 3, 192, 192)}


@network
def convnext_sized() -> Made:
    """ConvNeXt-like, 192 and 384 channels on 56² and 28²."""
    net = _seq(
        nn.Conv2d(3, 192, 4, 4), Next(192), Next(192), nn.Conv2d(192, 384, 2, 2), Next(384), nn.Conv2d(384, 64, 1)
    )
    return net, {"x": (1, 3, 224, 224)}


class Heads(nn.Module):
    """Multi-head attention with three products for queries, keys and values, so that nothing is split."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        q, k, v = (
            each.reshape(each.shape[0], -1, self.heads, each.shape[2] // self.heads).transpose(1, 2)
            for each in (self.q(x), self.k(y), self.v(y))
        )
        p = ((q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5).softmax(-1)
        return self.o((p @ v).transpose(1, 2).reshape(x.shape))


@network
def detr() -> Made:
    """DETR-like, 320²: a convolutional backbone, two encoder and two decoder layers of width 256, 50 queries."""

    class Layer(nn.Module):
        def __init__(self, decodes: bool) -> None:
            super().__init__()
            self.s, self.n1 = Heads(256, 8), nn.LayerNorm(256)
            self.c, self.n2 = (Heads(256, 8), nn.LayerNorm(256)) if decodes else (None, None)
            self.m, self.n3 = _seq(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 256)), nn.LayerNorm(256)

        def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
            x = self.n1(x + self.s(x, x))
            if memory is not None:
                x = self.n2(x + self.c(x, memory))
            return self.n3(x + self.m(x))

    class Detr(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            relu = nn.ReLU()
            self.b = _seq(
                *(Act(3, 64, 7, relu, s=2), Act(64, 64, 3, relu, s=2), Act(64, 96, 3, relu, s=2), Act(96, 96, 3, relu)),
                *(Act(96, 128, 3, relu, s=2), Act(128, 128, 3, relu), nn.Conv2d(128, 256, 1)),
            )
            self.place, self.query = nn.Parameter(torch.randn(1, 400, 256)), nn.Parameter(torch.randn(1, 50, 256))
            self.e, self.d = nn.ModuleList(Layer(False) for _ in range(2)), nn.ModuleList(Layer(True) for _ in range(2))
            self.kind, self.box = nn.Linear(256, 20), _seq(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 4))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            memory = self.b(x).flatten(2).transpose(1, 2) + self.place
            for layer in self.e:
                memory = layer(memory)
            y = self.query
            for layer in self.d:
                y = layer(y, memory)
            return self.kind(y), torch.sigmoid(self.box(y))

    return Detr(), {"x": (1, 3, 320, 320)}


class Batched(nn.Module):
    """Products of values with convolutions above and below, which hand them FP16: QKᵀ, ReLU for Softmax, PV."""

    def __init__(self, heads: int, width: int) -> None:
        super().__init__()
        self.heads, self.width = heads, width
        self.q, self.k, self.v = (Act(64, heads * width, 1, nn.ReLU()) for _ in range(3))
        self.o = nn.Conv2d(heads * width, 32, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        b, _, h, w = x.shape
        q, k, v = (part(x).reshape(b, self.heads, self.width, h * w) for part in (self.q, self.k, self.v))
        s = q.transpose(-2, -1) @ k
        return self.o((v @ torch.relu(s - 0.5).transpose(-2, -1)).reshape(b, -1, h, w)), s[:, 0, :8]


@network
def batched() -> Made:
    """12 heads of 64 over 24² places."""
    return Batched(12, 64), {"x": (1, 64, 24, 24)}


@network
def batched_aside() -> Made:
    """8 heads of 32 over 32² places."""
    return Batched(8, 32), {"x": (1, 64, 32, 32)}


class Slim(nn.Module):
    """Long sums with few results, where kernels split the sum: products, convolutions on few places."""

    def __init__(self, lengths: tuple[int, ...], width: int, channels: int) -> None:
        super().__init__()
        relu = nn.ReLU()
        self.i = nn.ModuleList(nn.Linear(width, length) for length in lengths)
        self.o = nn.ModuleList(nn.Linear(length, width) for length in lengths)
        self.c = _seq(
            Act(32, channels, 1, relu),
            Act(channels, 32, 3, relu),
            Act(32, channels, 1, relu),
            Act(channels, 64, 1, relu),
        )

    def forward(self, x: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        for wide, narrow in zip(self.i, self.o, strict=True):
            x = torch.relu(narrow(torch.relu(wide(x))))
        return x, self.c(c)


@network
def slim() -> Made:
    """K of 2048 and 8192 with 32 rows and 64 columns; 3×3 with K of 9216 on 8²."""
    return Slim((2048, 8192), 64, 1024), {"x": (1, 32, 64), "c": (1, 32, 8, 8)}


@network
def slim_aside() -> Made:
    """K of 3072 and 6144 with 48 rows and 96 columns; 3×3 with K of 6912 on 10²."""
    return Slim((3072, 6144), 96, 768), {"x": (1, 48, 96), "c": (1, 32, 10, 10)}


def main() -> None:
    folder, *names = sys.argv[1:] or ["networks"]
    for name in names or [name for name in NETWORKS if name not in OTHERS]:
        path, _ = write(name, Path(folder))
        print(path, f"{path.stat().st_size >> 10} KiB")


if __name__ == "__main__":
    main()
