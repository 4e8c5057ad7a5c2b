"""Small networks of the kinds that people export, with seeded weights: ``file.py:callable`` for cpdebug, too.

Every function of ``ARCHITECTURES`` returns an evaluated module and its example inputs. BatchNorm has the statistics of
a network that was trained: means and variances of what it reads, not zeros and ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

Made = tuple[nn.Module, tuple[Tensor, ...]]


class ResNet(nn.Module):
    """Basic blocks with projections, global pooling, classifier."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(3, 2, 1)
        )
        self.layers = nn.Sequential(_Basic(width, width), _Basic(width, 2 * width, 2), _Basic(2 * width, 4 * width, 2))
        self.head = nn.Linear(4 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(self.stem(x)).mean((2, 3)))


class _Basic(nn.Module):
    def __init__(self, before: int, after: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after)
        self.conv2, self.bn2 = nn.Conv2d(after, after, 3, 1, 1, bias=False), nn.BatchNorm2d(after)
        self.down: nn.Module = nn.Identity()
        if stride > 1 or before != after:
            self.down = nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(functional.relu(self.bn1(self.conv1(x)))))
        return functional.relu(y + self.down(x))


class UNet(nn.Module):
    """Two levels, bilinear and transposed upsampling, GroupNorm and LeakyReLU."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.down1, self.down2 = self._block(3, width), self._block(width, 2 * width)
        self.middle = self._block(2 * width, 4 * width)
        self.up2 = nn.ConvTranspose2d(4 * width, 2 * width, 2, 2)
        self.block2, self.block1 = self._block(4 * width, 2 * width), self._block(3 * width, width)
        self.out = nn.Conv2d(width, 2, 1)

    @staticmethod
    def _block(before: int, after: int) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(before, after, 3, 1, 1), nn.GroupNorm(4, after), nn.LeakyReLU(0.1))

    def forward(self, x: Tensor) -> Tensor:
        first = self.down1(x)
        second = self.down2(functional.max_pool2d(first, 2))
        y = self.middle(functional.avg_pool2d(second, 2))
        y = self.block2(torch.cat([self.up2(y), second], 1))
        y = functional.interpolate(y, scale_factor=2, mode="bilinear", align_corners=False)
        return torch.sigmoid(self.out(self.block1(torch.cat([y, first], 1))))


class MobileNet(nn.Module):
    """MobileNetV3: inverted residuals, depthwise convolutions, squeeze and excitation, HardSwish."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width), nn.Hardswish())
        rows = [(width, 3, nn.ReLU), (width, 5, nn.Hardswish), (24, 5, nn.Hardswish)]
        blocks, before = [], width
        for after, kernel, act in rows:
            blocks.append(_Inverted(before, after, kernel, act))
            before = after
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Sequential(nn.Linear(24, 64), nn.Hardswish(), nn.Linear(64, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(functional.adaptive_avg_pool2d(self.blocks(self.stem(x)), 1).flatten(1))


class _Inverted(nn.Module):
    def __init__(self, before: int, after: int, kernel: int, act: type[nn.Module]) -> None:
        super().__init__()
        wide, self.same = before * 3, before == after
        self.expand = nn.Sequential(nn.Conv2d(before, wide, 1, bias=False), nn.BatchNorm2d(wide, eps=1e-3), act())
        self.depth = nn.Sequential(
            nn.Conv2d(wide, wide, kernel, 1, kernel // 2, groups=wide, bias=False),
            nn.BatchNorm2d(wide, eps=1e-3),
            act(),
        )
        self.squeeze = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(wide, 8, 1), nn.ReLU(), nn.Conv2d(8, wide, 1), nn.Hardsigmoid()
        )
        self.project = nn.Sequential(nn.Conv2d(wide, after, 1, bias=False), nn.BatchNorm2d(after, eps=1e-3))

    def forward(self, x: Tensor) -> Tensor:
        y = self.depth(self.expand(x))
        y = self.project(y * self.squeeze(y))
        return x + y if self.same else y


class ViT(nn.Module):
    """Patches, class token, pre-norm encoder with exact GELU."""

    def __init__(self, width: int = 48, depth: int = 3) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, width, 8, 8)
        self.token, self.place = nn.Parameter(torch.randn(1, 1, width)), nn.Parameter(torch.randn(1, 17, width) * 0.1)
        self.blocks = nn.ModuleList(_Encoder(width, 4) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        y = self.patch(x).flatten(2).transpose(1, 2)
        y = torch.cat([self.token.expand(y.shape[0], -1, -1), y], 1) + self.place
        for block in self.blocks:
            y = block(y)
        return self.head(self.norm(y)[:, 0])


class _Encoder(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        split = self.qkv(self.norm1(x)).reshape(batch, tokens, 3, self.heads, width // self.heads)
        q, k, v = split.permute(2, 0, 3, 1, 4).unbind(0)
        scores = (q @ k.transpose(-2, -1)) / math.sqrt(width // self.heads)
        x = x + self.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, tokens, width))
        return x + self.down(functional.gelu(self.up(self.norm2(x))))


class Swin(nn.Module):
    """Shifted windows with a relative position bias and an attention mask of −100."""

    def __init__(self, width: int = 32, side: int = 8, window: int = 4) -> None:
        super().__init__()
        self.patch, self.side, self.window = nn.Conv2d(3, width, 4, 4), side, window
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.bias = nn.Parameter(torch.randn(2, window**2, window**2) * 0.3)
        self.merge, self.head = nn.Linear(4 * width, 2 * width, bias=False), nn.Linear(2 * width, 6)
        zones = torch.zeros(side, side)
        for index, rows in enumerate((slice(0, -window), slice(-window, -window // 2), slice(-window // 2, None))):
            zones[rows] += 3 * index
            zones[:, rows] += index
        split = self._windows(zones.reshape(1, side, side, 1)).squeeze(-1)
        self.register_buffer("mask", (split[:, :, None] != split[:, None]).float() * -100)

    def _windows(self, x: Tensor) -> Tensor:
        count = self.side // self.window
        x = x.reshape(1, count, self.window, count, self.window, x.shape[-1])
        return x.permute(0, 1, 3, 2, 4, 5).reshape(count**2, self.window**2, x.shape[-1])

    def _attend(self, x: Tensor) -> Tensor:
        windows, tokens, width = x.shape
        q, k, v = self.qkv(x).reshape(windows, tokens, 3, 2, width // 2).permute(2, 0, 3, 1, 4).unbind(0)
        scores = q * (width // 2) ** -0.5 @ k.transpose(-2, -1) + self.bias + self.mask[:, None]
        return self.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(windows, tokens, width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.patch(x).permute(0, 2, 3, 1)
        moved = torch.roll(self.norm1(y), (-self.window // 2, -self.window // 2), (1, 2))
        count, width = self.side // self.window, y.shape[-1]
        back = self._attend(self._windows(moved)).reshape(1, count, count, self.window, self.window, width)
        back = back.permute(0, 1, 3, 2, 4, 5).reshape(1, self.side, self.side, width)
        y = y + torch.roll(back, (self.window // 2, self.window // 2), (1, 2))
        y = y + self.down(functional.gelu(self.up(self.norm2(y))))
        y = torch.cat([y[:, 0::2, 0::2], y[:, 1::2, 0::2], y[:, 0::2, 1::2], y[:, 1::2, 1::2]], -1)
        return self.head(self.merge(y).mean((1, 2)))


class Detr(nn.Module):
    """A convolutional backbone, torch's own Transformer, queries, boxes and classes."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Conv2d(3, 16, 3, 4, 1), nn.ReLU(), nn.Conv2d(16, width, 3, 2, 1), nn.BatchNorm2d(width), nn.ReLU()
        )
        self.place = nn.Parameter(torch.randn(1, 16, width))
        self.queries = nn.Parameter(torch.randn(1, 5, width))
        layer = nn.TransformerEncoderLayer(width, 4, 64, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(width, 4, 64, batch_first=True), 2)
        self.classes, self.boxes = nn.Linear(width, 4), nn.Sequential(nn.Linear(width, 32), nn.ReLU(), nn.Linear(32, 4))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        memory = self.encoder(self.backbone(x).flatten(2).transpose(1, 2) + self.place)
        y = self.decoder(self.queries.expand(x.shape[0], -1, -1), memory)
        return self.classes(y), self.boxes(y).sigmoid()


class Tagger(nn.Module):
    """Embedding, two bidirectional LSTM layers, a head for each token."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 24)
        self.lstm = nn.LSTM(24, 20, num_layers=2, bidirectional=True, batch_first=True)
        self.head = nn.Linear(40, 7)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.lstm(self.embed(tokens))[0])


class Gru(nn.Module):
    """Convolutions over time, GRU, log-probabilities."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Sequential(nn.Conv1d(20, 32, 5, 2, 2), nn.BatchNorm1d(32), nn.ReLU())
        self.gru, self.head = nn.GRU(32, 24, batch_first=True), nn.Linear(24, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.gru(self.conv(x).transpose(1, 2))[0]).log_softmax(-1)


class WaveNet(nn.Module):
    """Causal dilated convolutions with gates, residuals and skips."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.start = nn.Conv1d(1, width, 1)
        self.filters = nn.ModuleList(nn.Conv1d(width, 2 * width, 2, dilation=2**i) for i in range(4))
        self.skips = nn.ModuleList(nn.Conv1d(width, 2 * width, 1) for _ in range(4))
        self.end = nn.Sequential(nn.ReLU(), nn.Conv1d(width, width, 1), nn.ELU(), nn.Conv1d(width, 8, 1))

    def forward(self, x: Tensor) -> Tensor:
        x, total = self.start(x), torch.zeros(())
        for index, (gates, skip) in enumerate(zip(self.filters, self.skips, strict=True)):
            f, g = gates(functional.pad(x, (2**index, 0))).chunk(2, 1)
            residual, out = skip(torch.tanh(f) * torch.sigmoid(g)).chunk(2, 1)
            x, total = x + residual, total + out
        return self.end(total)


class Decoder(nn.Module):
    """Llama: RMSNorm, rotary positions, grouped queries, a mask of finfo.min, SwiGLU."""

    def __init__(self, width: int = 48, depth: int = 2) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, width)
        self.blocks = nn.ModuleList(_Llama(width, 4, 2) for _ in range(depth))
        self.norm, self.head = _RMSNorm(width), nn.Linear(width, 64, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        y, length = self.embed(tokens), tokens.shape[1]
        mask = torch.full((length, length), torch.finfo(torch.float32).min).triu(1)
        angles = torch.outer(torch.arange(length).float(), 1e4 ** -(torch.arange(0, 12, 2).float() / 12)).repeat(1, 2)
        for block in self.blocks:
            y = block(y, mask, angles.cos(), angles.sin())
        return self.head(self.norm(y))


class _RMSNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


class _Llama(nn.Module):
    def __init__(self, width: int, heads: int, groups: int) -> None:
        super().__init__()
        self.heads, self.groups, self.size = heads, groups, width // heads
        self.norm1, self.norm2 = _RMSNorm(width), _RMSNorm(width)
        self.q, self.o = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.k, self.v = (nn.Linear(width, groups * self.size, bias=False) for _ in range(2))
        self.gate, self.up = (nn.Linear(width, 96, bias=False) for _ in range(2))
        self.down = nn.Linear(96, width, bias=False)

    @staticmethod
    def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return x * cos + torch.cat([-second, first], -1) * sin

    def forward(self, x: Tensor, mask: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        y = self.norm1(x)
        q = self._turn(self.q(y).reshape(batch, tokens, self.heads, self.size).transpose(1, 2), cos, sin)
        k = self._turn(self.k(y).reshape(batch, tokens, self.groups, self.size).transpose(1, 2), cos, sin)
        v = self.v(y).reshape(batch, tokens, self.groups, self.size).transpose(1, 2)
        k, v = (t.repeat_interleave(self.heads // self.groups, 1) for t in (k, v))
        scores = (q @ k.transpose(-2, -1) / math.sqrt(self.size) + mask).softmax(-1)
        x = x + self.o((scores @ v).transpose(1, 2).reshape(batch, tokens, width))
        y = self.norm2(x)
        return x + self.down(functional.silu(self.gate(y)) * self.up(y))


class ConvNeXt(nn.Module):
    """Depthwise 7 × 7, LayerNorm over channels, GELU, layer scale."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 4, 4)
        self.blocks = nn.ModuleList(_Next(width) for _ in range(2))
        self.down, self.head = nn.Conv2d(width, 2 * width, 2, 2), nn.Linear(2 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.down(x).mean((-2, -1)))


class _Next(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.depth, self.norm = nn.Conv2d(width, width, 7, 1, 3, groups=width), nn.LayerNorm(width, eps=1e-6)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.scale = nn.Parameter(torch.rand(width) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.depth(x).permute(0, 2, 3, 1))
        return x + (self.scale * self.down(functional.gelu(self.up(y)))).permute(0, 3, 1, 2)


class EfficientNet(nn.Module):
    """MBConv with SiLU and squeeze and excitation."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width, 1e-3), nn.SiLU())
        self.expand = nn.Sequential(nn.Conv2d(width, 64, 1, bias=False), nn.BatchNorm2d(64, 1e-3), nn.SiLU())
        self.depth = nn.Sequential(
            nn.Conv2d(64, 64, 3, 1, 1, groups=64, bias=False), nn.BatchNorm2d(64, 1e-3), nn.SiLU()
        )
        self.reduce, self.restore = nn.Conv2d(64, 4, 1), nn.Conv2d(4, 64, 1)
        self.project = nn.Sequential(nn.Conv2d(64, width, 1, bias=False), nn.BatchNorm2d(width, 1e-3))
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.depth(self.expand(x))
        gate = torch.sigmoid(self.restore(functional.silu(self.reduce(y.mean((2, 3), keepdim=True)))))
        return self.head((x + self.project(y * gate)).mean((2, 3)))


class Yolo(nn.Module):
    """CSP blocks with SiLU, spatial pyramid pooling, nearest upsampling, two scales, boxes by softmax (DFL)."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.stem, self.c1 = _cbs(3, width, 2), _cbs(width, 2 * width, 2)
        self.csp = nn.ModuleList([_cbs(width, width), _cbs(width, width), _cbs(4 * width, 2 * width, kernel=1)])
        self.c2 = _cbs(2 * width, 4 * width, 2)
        self.spp = _cbs(16 * width, 4 * width, kernel=1)
        self.neck = _cbs(6 * width, 2 * width, kernel=1)
        self.heads = nn.ModuleList(nn.Conv2d(c, 4 * 8 + 3, 1) for c in (2 * width, 4 * width))
        self.register_buffer("bins", torch.arange(8.0))

    def forward(self, x: Tensor) -> Tensor:
        y = self.c1(self.stem(x))
        first, second = y.chunk(2, 1)
        third = self.csp[0](second)
        fine = self.csp[2](torch.cat([first, second, third, third + self.csp[1](third)], 1))
        coarse, pools = self.c2(fine), []
        for _ in range(3):
            pools.append(functional.max_pool2d(pools[-1] if pools else coarse, 5, 1, 2))
        coarse = self.spp(torch.cat([coarse, *pools], 1))
        up = functional.interpolate(coarse, scale_factor=2.0, mode="nearest")
        levels = (self.neck(torch.cat([up, fine], 1)), coarse)
        maps = [head(level).flatten(2) for head, level in zip(self.heads, levels, strict=True)]
        boxes, classes = torch.cat(maps, 2).split((32, 3), 1)
        boxes = (boxes.reshape(len(x), 4, 8, -1).softmax(2) * self.bins.reshape(1, 1, 8, 1)).sum(2)
        near, far = boxes.chunk(2, 1)
        return torch.cat([(far - near) / 2, near + far, classes.sigmoid()], 1)


def _cbs(before: int, after: int, stride: int = 1, kernel: int = 3) -> nn.Sequential:
    conv = nn.Conv2d(before, after, kernel, stride, kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(after, eps=1e-3), nn.SiLU())


class Gan(nn.Module):
    """A generator: transposed convolutions, InstanceNorm, PReLU, reflection padding, pixel shuffle, Tanh."""

    def __init__(self) -> None:
        super().__init__()
        self.start, self.norm = nn.ConvTranspose2d(16, 24, 4, 2, 1), nn.InstanceNorm2d(24, affine=True)
        self.act, self.mid = nn.PReLU(24), nn.Conv2d(24, 32, 3)
        self.shuffle, self.end = nn.PixelShuffle(2), nn.Conv2d(8, 3, 5, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.norm(self.start(x)))
        y = functional.softplus(self.mid(functional.pad(y, (1, 1, 1, 1), mode="reflect")))
        return torch.tanh(self.end(self.shuffle(y)))


def _trained(module: nn.Module, inputs: tuple[Tensor, ...]) -> Made:
    """The module with BatchNorm statistics of its own activations and affine parameters other than ones and zeros."""
    norms = [m for m in module.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)]
    for m in module.modules():
        if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d | nn.GroupNorm | nn.LayerNorm | nn.InstanceNorm2d):
            nn.init.uniform_(m.weight, 0.5, 1.5)
            nn.init.normal_(m.bias, 0, 0.2)
    module.train()
    for m in norms:
        m.momentum = 0.5
    with torch.no_grad():
        for _ in range(4 if norms else 0):
            module(*(torch.cat([x, torch.randn_like(x)]) for x in inputs))
    return module.eval(), inputs


def _image(side: int, channels: int = 3) -> Tensor:
    """Smooth, as pictures are, with a little noise: [1, channels, side, side] about −1 … 1."""
    rows = torch.linspace(0, 3, side)
    waves = [torch.sin(rows[:, None] * (c + 1) + c) * torch.cos(rows[None] * (c + 2)) for c in range(channels)]
    return (torch.stack(waves) + 0.1 * torch.randn(channels, side, side))[None]


def _make(kind: Callable[[], nn.Module], *inputs: Callable[[], Tensor]) -> Callable[[], Made]:
    def make() -> Made:
        torch.manual_seed(sum(map(ord, kind.__name__)))
        return _trained(kind(), tuple(i() for i in inputs))

    return make


resnet = _make(ResNet, lambda: _image(48))
unet = _make(UNet, lambda: _image(32))
mobilenet = _make(MobileNet, lambda: _image(32))
vit = _make(ViT, lambda: _image(32))
swin = _make(Swin, lambda: _image(32))
detr = _make(Detr, lambda: _image(32))
tagger = _make(Tagger, lambda: torch.randint(0, 50, (1, 18)))
gru = _make(Gru, lambda: torch.randn(1, 20, 40))
wavenet = _make(WaveNet, lambda: torch.sin(torch.arange(96.0) / 3)[None, None] + 0.1 * torch.randn(1, 1, 96))
decoder = _make(Decoder, lambda: torch.randint(0, 64, (1, 14)))
convnext = _make(ConvNeXt, lambda: _image(32))
efficientnet = _make(EfficientNet, lambda: _image(32))
yolo = _make(Yolo, lambda: _image(64))
gan = _make(Gan, lambda: torch.randn(1, 16, 8, 8))

ARCHITECTURES: dict[str, Callable[[], Made]] = {
    "resnet": resnet,
    "unet": unet,
    "mobilenet": mobilenet,
    "vit": vit,
    "swin": swin,
    "detr": detr,
    "tagger": tagger,
    "gru": gru,
    "wavenet": wavenet,
    "decoder": decoder,
    "convnext": convnext,
    "efficientnet": efficientnet,
    "yolo": yolo,
    "gan": gan,
}
