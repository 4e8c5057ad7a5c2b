"""Networks of unusual architectures: scans, splines, spectra, experts, deformable sampling, codebooks, flows.

Seeded weights, not trained. They are exported as those of ``architectures.py``; none was there while the tool was made.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

sys.path.append(str(Path(__file__).resolve().parents[1]))  # this file is also loaded by its path, outside the package
from wild.architectures import Made, _image, _make


class Ssm(nn.Module):
    """A selective state-space layer (Mamba's): causal depthwise convolution, input-dependent steps, a scan."""

    def __init__(self, width: int = 24, states: int = 6) -> None:
        super().__init__()
        self.states = states
        self.into, self.conv = nn.Linear(12, 2 * width), nn.Conv1d(width, width, 4, groups=width, padding=3)
        self.select, self.step = nn.Linear(width, 2 * states + 4), nn.Linear(4, width)
        self.log_a = nn.Parameter(torch.log(torch.arange(1.0, states + 1)).repeat(width, 1))
        self.skip, self.out = nn.Parameter(torch.rand(width)), nn.Linear(width, 8)

    def forward(self, x: Tensor) -> Tensor:
        y, gate = self.into(x).chunk(2, -1)
        y = functional.silu(self.conv(y.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2))
        b, c, low = self.select(y).split([self.states, self.states, 4], -1)
        step = functional.softplus(self.step(low))
        decay = torch.exp(step[..., None] * -torch.exp(self.log_a))
        drive = step[..., None] * b[:, :, None] * y[..., None]
        state, made = torch.zeros_like(drive[:, 0]), []
        for t in range(x.shape[1]):
            state = decay[:, t] * state + drive[:, t]
            made.append((state * c[:, t, None]).sum(-1))
        return self.out((torch.stack(made, 1) + self.skip * y) * functional.silu(gate))


class GatedConv(nn.Module):
    """Gated linear units on dilated convolutions, global layer normalization, weight normalization in the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Conv1d(1, 32, 8, 4)
        self.norms = nn.ModuleList(nn.GroupNorm(1, 32, eps=1e-8) for _ in range(3))
        self.convs = nn.ModuleList(
            nn.utils.parametrizations.weight_norm(nn.Conv1d(32, 64, 3, padding=2**i, dilation=2**i)) for i in range(3)
        )
        self.mask, self.decode = nn.Conv1d(32, 32, 1), nn.ConvTranspose1d(32, 1, 8, 4)

    def forward(self, x: Tensor) -> Tensor:
        features = y = self.encode(x)
        for norm, conv in zip(self.norms, self.convs, strict=True):
            y = y + functional.glu(conv(norm(y)), 1)
        return self.decode(features * torch.sigmoid(self.mask(y)))


class Kan(nn.Module):
    """Two Kolmogorov–Arnold layers: cubic B-splines by the recursion of Cox and de Boor, and SiLU beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([_Spline(10, 16), _Spline(16, 5)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class _Spline(nn.Module):
    def __init__(self, before: int, after: int, cells: int = 6, order: int = 3) -> None:
        super().__init__()
        self.order = order
        self.register_buffer(
            "knots", torch.linspace(-2 - order * 4 / cells, 2 + order * 4 / cells, cells + 2 * order + 1)
        )
        self.base = nn.Linear(before, after)
        self.weight = nn.Parameter(torch.randn(after, before * (cells + order)) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        y, knots = x[..., None], self.knots
        bases = ((y >= knots[:-1]) & (y < knots[1:])).to(x.dtype)
        for k in range(1, self.order + 1):
            left = (y - knots[: -k - 1]) / (knots[k:-1] - knots[: -k - 1]) * bases[..., :-1]
            right = (knots[k + 1 :] - y) / (knots[k + 1 :] - knots[1:-k]) * bases[..., 1:]
            bases = left + right
        return self.base(functional.silu(x)) + functional.linear(bases.flatten(-2), self.weight)


class DeformableAttention(nn.Module):
    """Attention that samples a map at points it learns: offsets, GridSample, softmax weights."""

    def __init__(self, width: int = 32, heads: int = 4, points: int = 4) -> None:
        super().__init__()
        self.heads, self.points = heads, points
        self.patch, self.value = nn.Conv2d(3, width, 4, 4), nn.Conv2d(width, width, 1)
        self.query = nn.Parameter(torch.randn(1, 9, width))
        self.place, self.weigh = nn.Linear(width, heads * points * 2), nn.Linear(width, heads * points)
        self.centre, self.norm, self.out = nn.Linear(width, 2), nn.LayerNorm(width), nn.Linear(width, 6)

    def forward(self, x: Tensor) -> Tensor:
        query = self.query
        values = self.value(functional.gelu(self.patch(x)))
        n, _, h, w = values.shape
        maps = values.reshape(n * self.heads, -1, h, w)
        offsets = torch.tanh(self.place(query)).reshape(1, 9, self.heads, self.points, 2) * 0.5
        grid = torch.sigmoid(self.centre(query))[:, :, None, None] * 2 - 1 + offsets
        grid = grid.permute(0, 2, 1, 3, 4).flatten(0, 1)
        sampled = functional.grid_sample(maps, grid, align_corners=False)
        weights = self.weigh(query).reshape(1, 9, self.heads, self.points).softmax(-1).permute(0, 2, 1, 3).flatten(0, 1)
        mixed = (sampled * weights[:, None]).sum(-1).reshape(1, -1, 9).transpose(1, 2)
        return self.out(self.norm(mixed + query))


class Fno(nn.Module):
    """A Fourier neural operator in one dimension, its transforms as products with cosines and sines."""

    def __init__(self, width: int = 12, modes: int = 8, length: int = 48) -> None:
        super().__init__()
        angle = 2 * math.pi / length * torch.outer(torch.arange(float(length)), torch.arange(float(modes)))
        self.register_buffer("cosines", torch.cos(angle))
        self.register_buffer("sines", torch.sin(angle))
        self.lift, self.length = nn.Conv1d(2, width, 1), length
        self.real = nn.ParameterList(torch.randn(width, width, modes) / width for _ in range(2))
        self.imaginary = nn.ParameterList(torch.randn(width, width, modes) / width for _ in range(2))
        self.locals = nn.ModuleList(nn.Conv1d(width, width, 1) for _ in range(2))
        self.down = nn.Conv1d(width, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.lift(x)
        for real, imaginary, local in zip(self.real, self.imaginary, self.locals, strict=True):
            a, b = y @ self.cosines, -(y @ self.sines)
            c = torch.einsum("bim,iom->bom", a, real) - torch.einsum("bim,iom->bom", b, imaginary)
            d = torch.einsum("bim,iom->bom", a, imaginary) + torch.einsum("bim,iom->bom", b, real)
            back = (c @ self.cosines.T - d @ self.sines.T) * (2 / self.length)
            y = functional.gelu(back + local(y))
        return self.down(y)


class FnoFft(nn.Module):
    """The same idea by torch's own transform."""

    def __init__(self, width: int = 8, modes: int = 6) -> None:
        super().__init__()
        self.modes, self.lift, self.down = modes, nn.Linear(2, width), nn.Linear(width, 1)
        self.real = nn.Parameter(torch.randn(width, width, modes) / width)
        self.imaginary = nn.Parameter(torch.randn(width, width, modes) / width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.lift(x).transpose(1, 2)
        spectrum = torch.view_as_real(torch.fft.rfft(y, dim=-1))
        a, b = spectrum[..., : self.modes, 0], spectrum[..., : self.modes, 1]
        c = torch.einsum("bim,iom->bom", a, self.real) - torch.einsum("bim,iom->bom", b, self.imaginary)
        d = torch.einsum("bim,iom->bom", a, self.imaginary) + torch.einsum("bim,iom->bom", b, self.real)
        power = torch.sqrt(c * c + d * d + 1e-6)
        return self.down(power.transpose(1, 2))


class Experts(nn.Module):
    """A mixture of experts: the two best of six for each token, their weights gathered."""

    def __init__(self, width: int = 24, experts: int = 6, hidden: int = 32) -> None:
        super().__init__()
        self.embed, self.gate = nn.Linear(10, width), nn.Linear(width, experts, bias=False)
        self.first = nn.Parameter(torch.randn(experts, width, hidden) / width**0.5)
        self.second = nn.Parameter(torch.randn(experts, hidden, width) / hidden**0.5)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 7)

    def forward(self, x: Tensor) -> Tensor:
        y = self.embed(x)
        scores, chosen = self.gate(y).softmax(-1).topk(2, -1)
        scores = scores / scores.sum(-1, keepdim=True)
        hidden = functional.gelu(torch.einsum("bnw,bnkwh->bnkh", y, self.first[chosen]), approximate="tanh")
        mixed = torch.einsum("bnkh,bnkhw->bnkw", hidden, self.second[chosen])
        return self.head(self.norm(y + (mixed * scores[..., None]).sum(2))).log_softmax(-1)


class Upsampler(nn.Module):
    """Learned upsampling: convex combinations of neighbours (RAFT's) after bicubic and pixel-shuffled branches."""

    def __init__(self) -> None:
        super().__init__()
        self.features, self.norm = nn.Conv2d(3, 24, 3, padding=1), nn.InstanceNorm2d(24, affine=True)
        self.flow, self.mask = nn.Conv2d(24, 2, 3, padding=1), nn.Conv2d(24, 9 * 4, 1)
        self.detail = nn.Conv2d(24, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = functional.relu(self.norm(self.features(x)))
        flow, (n, _, h, w) = self.flow(y), y.shape
        mask = (0.25 * self.mask(y)).reshape(n, 1, 9, 2, 2, h, w).softmax(2)
        around = functional.unfold(2 * flow, 3, padding=1).reshape(n, 2, 9, 1, 1, h, w)
        up = (mask * around).sum(2).permute(0, 1, 4, 2, 5, 3).reshape(n, 2, 2 * h, 2 * w)
        smooth = functional.interpolate(flow, scale_factor=2, mode="bicubic", align_corners=False)
        return up + smooth + functional.pixel_shuffle(self.detail(y), 2)


class LinearAttention(nn.Module):
    """Causal linear attention by cumulative sums, with rotary positions and squared ReLU."""

    def __init__(self, width: int = 32, heads: int = 4, length: int = 20) -> None:
        super().__init__()
        self.heads, half = heads, width // heads // 2
        angle = torch.outer(torch.arange(float(length)), 100 ** -(torch.arange(float(half)) / half))
        self.register_buffer("cosine", torch.cos(angle))
        self.register_buffer("sine", torch.sin(angle))
        self.embed, self.mix, self.out = nn.Embedding(40, width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.wide, self.narrow = nn.Linear(width, 3 * width), nn.Linear(3 * width, width)
        self.norm = nn.LayerNorm(width)

    def turn(self, x: Tensor) -> Tensor:
        a, b = x[..., 0::2], x[..., 1::2]
        return torch.stack([a * self.cosine - b * self.sine, a * self.sine + b * self.cosine], -1).flatten(-2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.embed(x)
        q, k, v = self.mix(self.norm(y)).reshape(*x.shape, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q, k = functional.elu(self.turn(q)) + 1, functional.elu(self.turn(k)) + 1
        sums = torch.cumsum(k[..., :, None] * v[..., None, :], 2)
        weights = (q * torch.cumsum(k, 2)).sum(-1, keepdim=True) + 1e-6
        mixed = (q[..., None, :] @ sums)[..., 0, :] / weights
        y = y + self.out(mixed.transpose(1, 2).flatten(2))
        return y + self.narrow(functional.relu(self.wide(y)) ** 2)


class Codec(nn.Module):
    """An audio codec's middle: Snake activations, residual vector quantization by nearest codes, a decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.alpha = nn.Conv1d(1, 16, 8, 4, padding=2), nn.Parameter(torch.rand(1, 16, 1) + 0.5)
        self.books = nn.ParameterList(torch.randn(32, 16) * s for s in (0.6, 0.3, 0.15))
        self.decode = nn.ConvTranspose1d(16, 1, 8, 4, padding=2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.encode(x)
        y = y + torch.sin(self.alpha * y) ** 2 / (self.alpha + 1e-9)
        left, total = y.transpose(1, 2), torch.zeros_like(y.transpose(1, 2))
        for book in self.books:
            far = (left**2).sum(-1, keepdim=True) - 2 * left @ book.T + (book**2).sum(-1)
            code = book[far.argmin(-1)]
            left, total = left - code, total + code
        return torch.tanh(self.decode(total.transpose(1, 2))), y


class Flow(nn.Module):
    """A normalizing flow: affine couplings, an invertible product, the log-determinant."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.nets = nn.ModuleList(
            nn.Sequential(nn.Linear(width // 2, 24), nn.Tanh(), nn.Linear(24, width)) for _ in range(3)
        )
        self.turns = nn.ParameterList(torch.linalg.qr(torch.randn(width, width))[0] for _ in range(3))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        total = torch.zeros_like(x[:, 0])
        for net, turn in zip(self.nets, self.turns, strict=True):
            a, b = (x @ turn).chunk(2, -1)
            scale, shift = net(a).chunk(2, -1)
            scale = 2 * torch.sigmoid(scale) - 1
            x = torch.cat([b * torch.exp(scale) + shift, a], -1)
            total = total + scale.sum(-1)
        return x, total - 0.5 * (x**2).sum(-1) - 4 * math.log(2 * math.pi)


class Radiance(nn.Module):
    """A radiance field: sines of high frequencies, a SIREN layer, transmittance by a cumulative product."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("bands", 2.0 ** torch.arange(6) * math.pi)
        self.first, self.second = nn.Linear(36, 32), nn.Linear(32, 32)
        self.density, self.colour = nn.Linear(32, 1), nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        angles = (x[..., None] * self.bands).flatten(-2)
        y = functional.relu(self.first(torch.cat([torch.sin(angles), torch.cos(angles)], -1)))
        y = torch.sin(5 * self.second(y))
        alpha = 1 - torch.exp(-functional.softplus(self.density(y)) * 0.3)
        clear = torch.exp(torch.cumsum(torch.log(1 - alpha + 1e-10), 1))
        return (clear * alpha * torch.sigmoid(self.colour(y))).sum(1)


class GraphNet(nn.Module):
    """Messages over edges: gathered nodes, a softmax over each node's edges, sums by ScatterElements."""

    def __init__(self) -> None:
        super().__init__()
        rng = torch.Generator().manual_seed(5)
        self.register_buffer("edges", torch.randint(0, 12, (2, 40), generator=rng))
        self.embed, self.message, self.score = nn.Linear(6, 16), nn.Linear(32, 16), nn.Linear(32, 1)
        self.norm, self.head = nn.BatchNorm1d(12), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = functional.leaky_relu(self.embed(x), 0.2)
        pair = torch.cat([y[:, self.edges[0]], y[:, self.edges[1]]], -1)
        weights = torch.exp(functional.leaky_relu(self.score(pair), 0.2))
        index = self.edges[1][None, :, None].expand(x.shape[0], -1, 16)
        sums = torch.zeros_like(y).scatter_add(1, index, weights * self.message(pair))
        count = torch.zeros_like(y).scatter_add(1, index, weights.expand(-1, -1, 16))
        return self.head(self.norm(sums / (count + 1e-9)))


class Sinkhorn(nn.Module):
    """Optimal matching of two sets: normalized descriptors, a dustbin, iterated log-sum-exp."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(8, 24), nn.Linear(8, 24)
        self.bin = nn.Parameter(torch.tensor(0.3))

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        a, b = functional.normalize(self.one(x), dim=-1), functional.normalize(self.two(other), dim=-1)
        scores = 5 * a @ b.transpose(1, 2)
        n, rows, columns = scores.shape
        scores = torch.cat([scores, self.bin.expand(n, rows, 1)], 2)
        scores = torch.cat([scores, self.bin.expand(n, 1, columns + 1)], 1)
        for _ in range(4):
            scores = scores - torch.logsumexp(scores, 2, keepdim=True)
            scores = scores - torch.logsumexp(scores, 1, keepdim=True)
        return scores.exp()


class Hyper(nn.Module):
    """A network that makes another's weights: modulated and demodulated convolutions (StyleGAN's), noise, blur."""

    def __init__(self) -> None:
        super().__init__()
        self.style, self.scale = nn.Linear(12, 16), nn.Linear(16, 8)
        self.start = nn.Parameter(torch.randn(1, 8, 8, 8))
        self.weight = nn.Parameter(torch.randn(10, 8, 3, 3) / 6)
        self.register_buffer("blur", torch.outer(torch.tensor([1.0, 3, 3, 1]), torch.tensor([1.0, 3, 3, 1])) / 16)
        self.colour = nn.Conv2d(10, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        style = functional.leaky_relu(self.style(x * torch.rsqrt((x**2).mean(1, keepdim=True) + 1e-8)), 0.2)
        weight = self.weight * (self.scale(style) + 1)[0][None, :, None, None]
        weight = weight * torch.rsqrt((weight**2).sum([1, 2, 3], keepdim=True) + 1e-8)
        y = functional.conv2d(self.start, weight, padding=1)
        blur = self.blur[None, None].expand(10, 1, 4, 4)
        y = functional.conv_transpose2d(y, blur, stride=2, padding=1, groups=10)
        return self.colour(functional.hardswish(y).clamp(-3, 3) * 2**0.5)


ssm = _make(Ssm, lambda: torch.randn(1, 10, 12))
gated = _make(GatedConv, lambda: torch.sin(torch.arange(160.0) / 5)[None, None] + 0.05 * torch.randn(1, 1, 160))
kan = _make(Kan, lambda: torch.randn(4, 10))
deformable = _make(DeformableAttention, lambda: _image(32))
fno = _make(Fno, lambda: torch.randn(1, 2, 48))
fft = _make(FnoFft, lambda: torch.randn(1, 32, 2))
experts = _make(Experts, lambda: torch.randn(1, 9, 10))
upsampler = _make(Upsampler, lambda: _image(12))
linear = _make(LinearAttention, lambda: torch.randint(0, 40, (1, 20)))
codec = _make(Codec, lambda: torch.sin(torch.arange(128.0) / 4)[None, None] + 0.1 * torch.randn(1, 1, 128))
flow = _make(Flow, lambda: torch.randn(6, 8))
radiance = _make(Radiance, lambda: torch.rand(5, 8, 3))
graphnet = _make(GraphNet, lambda: torch.randn(2, 12, 6))
sinkhorn = _make(Sinkhorn, lambda: torch.randn(1, 7, 8), lambda: torch.randn(1, 9, 8))
hyper = _make(Hyper, lambda: torch.randn(1, 12))

ARCHITECTURES: dict[str, Callable[[], Made]] = {
    "ssm": ssm,
    "gated": gated,
    "kan": kan,
    "deformable": deformable,
    "fno": fno,
    "fft": fft,
    "experts": experts,
    "upsampler": upsampler,
    "linear": linear,
    "codec": codec,
    "flow": flow,
    "radiance": radiance,
    "graphnet": graphnet,
    "sinkhorn": sinkhorn,
    "hyper": hyper,
}
