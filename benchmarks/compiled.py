"""torch.compile: healthy networks on inductor, and faults that are put into inductor: who is accused?

python benchmarks/compiled.py healthy                  # ten networks in FP32, BF16 and FP16: nobody
python benchmarks/compiled.py faults                   # faults in decompositions, lowerings, passes and kernels
python benchmarks/compiled.py faults gelu-tanh bias    # these alone
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from cp_debug.bisect.engine import bisect
from cp_debug.bisect.result import TestResult
from cp_debug.errors import CpdebugError
from cp_debug.recipes.torch_callable import TorchModel

aten = torch.ops.aten
Net = tuple[nn.Module, tuple[Tensor, ...]]


class Net2d(nn.Module):
    """Convolutions with BatchNorm, SiLU, a residual addition, pooling, resizing, concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.deep = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1, groups=4), nn.GroupNorm(4, 16), nn.GELU())
        self.pool, self.down = nn.AvgPool2d(3, 2, 1, count_include_pad=False), nn.Conv2d(16, 24, 1)
        self.head = nn.Conv2d(40, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.silu(self.norm(self.stem(x)))
        x = x + self.deep(x)
        low = torch.relu(self.down(self.pool(x)))
        up = functional.interpolate(low, size=x.shape[-2:], mode="bilinear", align_corners=False)
        return torch.sigmoid(self.head(torch.cat([x, up], 1)))


class Block(nn.Module):
    """A transformer block: LayerNorm or RMSNorm, attention by ``scaled_dot_product_attention``, gated or plain MLP."""

    def __init__(self, width: int = 32, *, causal: bool = False, gated: bool = False) -> None:
        super().__init__()
        norm = nn.RMSNorm if gated else nn.LayerNorm
        self.norm1, self.norm2, self.causal, self.gated = norm(width), norm(width), causal, gated
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(2 * width if gated else 4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, t, c = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(n, t, 3, 4, c // 4).permute(2, 0, 3, 1, 4)
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.out(y.transpose(1, 2).reshape(n, t, c))
        y = self.up(self.norm2(x))
        if self.gated:
            left, right = y.chunk(2, -1)
            return x + self.down(functional.silu(left) * right)
        return x + self.down(functional.gelu(y))


class Language(nn.Module):
    """Token and position embeddings, two gated causal blocks, logits."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(50, 32), nn.Embedding(16, 32)
        self.blocks = nn.Sequential(Block(causal=True, gated=True), Block(causal=True, gated=True))
        self.norm, self.logits = nn.LayerNorm(32), nn.Linear(32, 50)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.places(torch.arange(ids.shape[1]))
        return functional.log_softmax(self.logits(self.norm(self.blocks(x))), -1)


class Mobile(nn.Module):
    """Depthwise convolutions, hard activations, squeeze and excitation."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.deep = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.norm, self.narrow = nn.BatchNorm2d(16), nn.Conv2d(16, 8, 1)
        self.squeeze, self.excite = nn.Conv2d(16, 4, 1), nn.Conv2d(4, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.hardswish(self.norm(self.deep(functional.relu6(self.wide(x)))))
        gate = functional.hardsigmoid(self.excite(torch.relu(self.squeeze(x.mean((2, 3), keepdim=True)))))
        return functional.max_pool2d(functional.leaky_relu(self.narrow(x * gate)), 2)


class Points(nn.Module):
    """Points of a pillar: statistics, a shared linear layer, the maximum over points, sums by index."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm, self.head = nn.Linear(7, 32), nn.BatchNorm1d(32), nn.Linear(32, 3)

    def forward(self, points: Tensor, index: Tensor) -> Tensor:
        centre = points[..., :3].mean(1, keepdim=True)
        x = torch.cat([points, points[..., :3] - centre], -1)
        x = torch.relu(self.norm(self.linear(x).transpose(1, 2)).transpose(1, 2)).amax(1)
        cells = torch.zeros(8, 32, dtype=x.dtype).index_add(0, index, x)
        return torch.tanh(self.head(cells / (cells.norm(dim=-1, keepdim=True) + 1e-3)))


class Gates(nn.Module):
    """A recurrent cell written out, cumulative sums, softplus, exponentials, a comparison."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs, self.state, self.out = nn.Linear(8, 48), nn.Linear(16, 48), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(x.shape[0], 16)
        for step in range(x.shape[1]):
            a, b = self.inputs(x[:, step]).chunk(3, -1), self.state(h).chunk(3, -1)
            r, z = torch.sigmoid(a[0] + b[0]), torch.sigmoid(a[1] + b[1])
            h = (1 - z) * torch.tanh(a[2] + r * b[2]) + z * h
        y = functional.softplus(self.out(h)).cumsum(-1)
        return torch.where(y > 1, y.log(), torch.exp(-y))


def _image(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def _norms(module: nn.Module) -> nn.Module:
    """Statistics as of a trained network."""
    for part in module.modules():
        if isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.normal_(part.running_mean, 0.0, 0.3)
            nn.init.uniform_(part.running_var, 0.5, 2.0)
    return module.eval()


NETWORKS: dict[str, Callable[[], Net]] = {
    "net2d": lambda: (Net2d(), (_image(2, 3, 16, 16),)),
    "vit": lambda: (nn.Sequential(Block(), Block(), nn.Linear(32, 5)), (_image(2, 9, 32),)),
    "language": lambda: (Language(), (torch.arange(24).reshape(2, 12) * 7 % 50,)),
    "mobile": lambda: (Mobile(), (_image(2, 3, 16, 16),)),
    "points": lambda: (Points(), (_image(20, 6, 4), torch.arange(20) * 3 % 8)),
    "gates": lambda: (Gates(), (_image(3, 5, 8),)),
    "mlp": lambda: (
        nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 64), nn.ELU(), nn.LayerNorm(64), nn.Linear(64, 4)),
        (_image(8, 16),),
    ),
    "decoder": lambda: (
        nn.Sequential(
            nn.ConvTranspose2d(8, 16, 2, stride=2), nn.InstanceNorm2d(16, affine=True), nn.Mish(),
            nn.ReflectionPad2d(1), nn.Conv2d(16, 8, 3), nn.PixelShuffle(2), nn.Softmax(1),
        ),
        (_image(2, 8, 8, 8),),
    ),
    "audio": lambda: (
        nn.Sequential(
            nn.Conv1d(4, 16, 5, stride=2), nn.BatchNorm1d(16), nn.PReLU(), nn.Conv1d(16, 16, 3, dilation=2, padding=2),
            nn.GLU(1), nn.AdaptiveAvgPool1d(5), nn.Flatten(), nn.Linear(40, 6), nn.LogSoftmax(-1),
        ),
        (_image(2, 4, 64),),
    ),
    "mha": lambda: (nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), (_image(2, 7, 32),)),
}  # fmt: skip


def model_of(name: str) -> TorchModel:
    """The network as a model, with seeded weights."""
    torch.manual_seed(0)
    module, args = NETWORKS[name]()
    return TorchModel(name, _norms(module), args)


def run(name: str, backend: str) -> TestResult:
    """Eager FP32 against one compiled backend."""
    (test,) = bisect(model_of(name), f"torch,{backend}").tests
    return test


@contextmanager
def decomposition(op: Any, wrong: Callable[..., Any]) -> Iterator[None]:
    """Inductor's decomposition of an operator of ATen's, replaced."""
    from torch._inductor.decomposition import decompositions

    before = decompositions.get(op)
    decompositions[op] = wrong
    try:
        yield
    finally:
        if before is None:
            del decompositions[op]
        else:
            decompositions[op] = before


@contextmanager
def lowering(op: Any, wrong: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    """Inductor's lowering of an operator of ATen's, replaced by one made of it."""
    from torch._inductor.lowering import lowerings

    before = lowerings[op]
    lowerings[op] = wrong(before)
    try:
        yield
    finally:
        lowerings[op] = before


@contextmanager
def kernel(name: str, wrong: Callable[[Callable[..., str]], Callable[..., str]]) -> Iterator[None]:
    """The C++ that inductor writes for one function, scalar and by vectors, replaced by one made of it."""
    from torch._inductor.codegen.cpp import CppOverrides, CppVecOverrides

    before = [(c, c.__dict__[name]) for c in (CppOverrides, CppVecOverrides)]
    for owner, method in before:
        setattr(owner, name, staticmethod(wrong(method.__func__)))
    try:
        yield
    finally:
        for owner, method in before:
            setattr(owner, name, method)


@contextmanager
def graph_pass(change: Callable[[torch.fx.Node], None]) -> Iterator[None]:
    """A pass over the graph behind all of inductor's own, which changes nodes."""
    from torch._inductor import config

    def work(graph: torch.fx.Graph) -> None:
        for node in list(graph.nodes):
            if node.op == "call_function":
                change(node)

    with config.patch(post_grad_custom_post_pass=work):
        yield


def calls(op: Any, change: Callable[[torch.fx.Node], None], which: int | None = None) -> AbstractContextManager[None]:
    """A pass that changes the calls of one operator, or the one with this number."""

    def changed(node: torch.fx.Node) -> None:
        same = [n for n in node.graph.nodes if n.target is op]
        if node.target is op and (which is None or same[which] is node):
            change(node)

    return graph_pass(changed)


def _argument(place: int, value: Any) -> Callable[[torch.fx.Node], None]:
    return lambda node: node.update_arg(place, value)


def _swap(node: torch.fx.Node) -> None:
    node.args = (node.args[1], node.args[0], *node.args[2:])


def _reversed(node: torch.fx.Node) -> None:
    node.args = (list(reversed(node.args[0])), *node.args[1:])  # type: ignore[call-overload]


def _gone(node: torch.fx.Node) -> None:
    node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]


def _wrong_norm(x: Tensor, shape: Any, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    mean, deviation = x.mean(-1, keepdim=True), x.std(-1, keepdim=True)  # by n − 1
    return (x - mean) / (deviation + eps) * weight + bias, mean, 1 / deviation


def _wrong_batch_norm(x: Tensor, weight: Any, bias: Any, mean: Any, var: Any, momentum: float, eps: float) -> Any:
    axes = (None, slice(None), *[None] * (x.dim() - 2))
    y = (x - mean[axes]) / (var[axes].sqrt() + eps * 1e3) * weight[axes] + bias[axes]
    return y, x.new_empty(0), x.new_empty(0)


@dataclass(frozen=True)
class Planted:
    """A fault in inductor, and what a finding must name."""

    net: str
    put: Callable[[], AbstractContextManager[None]]
    names: tuple[str, ...]
    """Parts of names: each guilty layer has one of them, and each is in the name of a guilty layer. For tables that no
    input reaches stands the layer that reads them."""


_BATCH_NORM = aten._native_batch_norm_legit_no_training.default
_ATTENDS = "node_scaled_dot_product_attention)"
_ATTENTION = aten._scaled_dot_product_flash_attention_for_cpu.default
FAULTS: dict[str, Planted] = {
    "silu": Planted("net2d", lambda: decomposition(aten.silu.default, _hard_silu), ("silu",)),
    "gelu-tanh": Planted("vit", lambda: decomposition(aten.gelu.default, _tanh_gelu), ("gelu",)),
    "layer-norm": Planted("mlp", lambda: decomposition(aten.native_layer_norm.default, _wrong_norm), ("4",)),
    "batch-norm": Planted("points", lambda: decomposition(_BATCH_NORM, _wrong_batch_norm), ("norm",)),
    "hardswish": Planted("mobile", lambda: decomposition(aten.hardswish.default, functional.silu), ("hardswish",)),
    "elu": Planted("mlp", lambda: decomposition(aten.elu.default, _wrong_elu), ("3",)),
    "avg-pool": Planted("net2d", lambda: lowering(aten.avg_pool2d.default, _with_padding), ("pool",)),
    "tanh-kernel": Planted("points", lambda: kernel("tanh", _smaller), ("tanh",)),
    "exp-kernel": Planted("gates", lambda: kernel("exp", _smaller), ("softplus", "/exp")),
    "relu-gone": Planted("net2d", lambda: calls(aten.relu.default, _gone), ("relu",)),
    "sub-swapped": Planted("points", lambda: calls(aten.sub.Tensor, _swap, 0), ("sub",)),
    "cat-reversed": Planted("points", lambda: calls(aten.cat.default, _reversed), ("cat",)),
    "bias-lost": Planted("decoder", lambda: calls(aten.convolution.default, _argument(2, None), -1), ("4",)),
    "linear-scaled": Planted("vit", lambda: calls(aten.addmm.default, _alpha, 3), ("0.down",)),
    "reflection": Planted("decoder", lambda: decomposition(aten.reflection_pad2d.default, _replicated), ("3",)),
    "attention": Planted(
        "language", lambda: calls(_ATTENTION, _argument(4, False), 0), ("node_scaled_dot_product_attention)",)
    ),
    "cumsum": Planted("gates", lambda: lowering(aten.cumsum.default, _along_first), ("cumsum",)),
    "embedding": Planted("language", lambda: decomposition(aten.embedding.default, _next_rows), ("tokens", "/add")),
}


def _hard_silu(x: Tensor) -> Tensor:
    return x * functional.hardsigmoid(x)


def _tanh_gelu(x: Tensor, approximate: str = "none") -> Tensor:
    return 0.5 * x * (1 + torch.tanh(0.7978845608028654 * (x + 0.044715 * x**3)))


def _wrong_elu(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return torch.where(x > 0, x, x.exp() - 0.99)


def _smaller(written: Callable[..., str]) -> Callable[..., str]:
    return lambda x: f"({written(x)} * decltype({x})(0.999f))"


def _with_padding(right: Callable[..., Any]) -> Callable[..., Any]:
    return lambda x, size, step, padding, ceil, inside, divisor=None: right(x, size, step, padding, ceil, True, divisor)


def _along_first(right: Callable[..., Any]) -> Callable[..., Any]:
    return lambda x, axis, **kwargs: right(x, 0, **kwargs)


def _next_rows(weight: Tensor, index: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return weight[index ^ 1]


def _alpha(node: torch.fx.Node) -> None:
    node.update_kwarg("alpha", 1.01)


def _replicated(x: Tensor, padding: Any) -> Tensor:
    return functional.pad(x, padding, mode="replicate")


class Of(nn.Module):
    """A linear layer, a function of its result, another linear layer."""

    def __init__(self, function: Callable[[Tensor], Tensor], bias: float = 0.0) -> None:
        super().__init__()
        self.first, self.second, self.function = nn.Linear(16, 32), nn.Linear(32, 4), function
        nn.init.constant_(self.first.bias, bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.function(self.first(x)))


def _cut(x: Tensor) -> Tensor:
    return torch.floor(torch.tanh(x) * 3.7)


def _steps(x: Tensor) -> Tensor:
    for step in range(6):
        x = x + 16.0 * 2.0**step
    return x - 1008.0


def _centred(x: Tensor) -> Tensor:
    y = x * 4.0 + 2000.0
    return y - y.mean(-1, keepdim=True)


def _same(x: Tensor) -> Tensor:
    y = (x * 3.0) / 3.0
    return torch.where(y == x, y, y - 1.0)


CASTS_LEFT_OUT = "missing-casts"
REAL: dict[str, tuple[str, Callable[[Tensor], Tensor], str]] = {
    "expm1-near-0": ("torch,torch-compile", lambda x: torch.expm1(x * 1e-4) * 1e4, "expm1"),
    "elu-near-0": ("torch,torch-compile", lambda x: functional.elu(x * 1e-4) * 1e4, "elu"),
    "remainder-large": ("torch,torch-compile", lambda x: torch.remainder(x * 1e6, 0.37), "remainder"),
    "int8-overflow": ("torch,torch-compile", lambda x: (x * 300).to(torch.int8).float() / 100, "to"),
    "remainder-negative": ("torch,torch-compile", lambda x: torch.remainder(x * -1e6, 1.7), "remainder"),
    "bf16-large-sum": ("torch-bf16,torch-compile-bf16", lambda x: torch.sigmoid(x) + 100.0 - 100.0, CASTS_LEFT_OUT),
    "bf16-steps": ("torch-bf16,torch-compile-bf16", _steps, CASTS_LEFT_OUT),
    "bf16-mean": ("torch-bf16,torch-compile-bf16", _centred, CASTS_LEFT_OUT),
    "bf16-floor": ("torch-bf16,torch-compile-bf16", _cut, CASTS_LEFT_OUT),
    "bf16-equal": ("torch-bf16,torch-compile-bf16", _same, CASTS_LEFT_OUT),
    "fp16-overflow": ("torch-fp16,torch-compile-fp16", lambda x: x * 1e3 * 1e3 / 1e6, CASTS_LEFT_OUT),
    "fp16-underflow": ("torch-fp16,torch-compile-fp16", lambda x: x * 1e-4 * 1e-4 * 1e8, CASTS_LEFT_OUT),
}
"""What torch 2.13's inductor does on a CPU without any change: backends, the function, the layer or cause to name."""


def verdict(test: TestResult) -> str:
    """Guilty layers with their figures, in a line."""
    if not test.guilty:
        return "agrees" if test.agrees else f"differs, nobody guilty: {[f.says for f in test.findings]}"
    return "; ".join(
        f"{r.name} ({r.side}, excess {r.replay.excess if r.replay else 0:.3g}) {r.tactic}" for r in test.guilty
    )


def main() -> None:
    """Run what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["healthy", "real", "faults"])
    parser.add_argument("names", nargs="*")
    parser.add_argument("--backends", default="torch-compile,torch-compile-bf16,torch-compile-fp16")
    given = parser.parse_args()
    right, count = 0, 0
    if given.what == "healthy":
        for name in given.names or NETWORKS:
            for backend in given.backends.split(","):
                start = time.perf_counter()
                try:
                    test = run(name, backend)
                except CpdebugError as error:
                    count += 1
                    print(f"{name:10} {backend:20} {error}", flush=True)
                    continue
                count, right = count + 1, right + test.agrees
                gap = test.observation.observer_gap if test.observation else 0.0
                took = time.perf_counter() - start
                print(
                    f"{name:10} {backend:20} {test.compared}/{test.total} gap {gap:.1e} {took:.0f} s {verdict(test)}",
                    flush=True,
                )
    elif given.what == "real":
        for name in given.names or REAL:
            backends, function, wanted = REAL[name]
            torch.manual_seed(0)
            (test,) = bisect(TorchModel(name, Of(function).eval(), _image(64, 16)), backends).tests
            causes = [finding.cause for finding in test.findings]
            names = [row.name for row in test.guilty] or [name for f in test.findings for name in f.layers]
            exact = causes == [wanted] or (bool(names) and all(wanted in name for name in names))
            count, right = count + 1, right + exact
            print(f"{name:18} {'named' if exact else 'NOT NAMED'} {causes} {verdict(test)} {test.notes}", flush=True)
    else:
        backend = given.backends.partition(",")[0]
        for name in given.names or FAULTS:
            fault = FAULTS[name]
            try:
                with fault.put():
                    test = run(fault.net, backend)
            except CpdebugError as error:
                count += 1
                print(f"{name:18} FAILED {error}", flush=True)
                continue
            named = [row.name for row in test.guilty]
            exact = all(any(part in n for part in fault.names) for n in named) and all(
                any(part in n for n in named) for part in fault.names
            )
            count, right = count + 1, right + exact
            print(f"{name:18} {'named' if exact else 'NOT NAMED'} {verdict(test)}", flush=True)
    print(f"{right} of {count}")


if __name__ == "__main__":
    main()
