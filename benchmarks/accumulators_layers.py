"""Products of real layers on a GPU's tensor cores, against their emulation, in three steps:

    python benchmarks/accumulators_layers.py operands operands.npz             # here: CenterPoint and a decoder
    python benchmarks/accumulators_layers.py probe operands.npz layers.npz     # on the GPU; torch and numpy alone
    python benchmarks/accumulators_layers.py judge operands.npz layers.npz --json FILE

Layers: every convolution of ``centerpoint:tiny``'s backbone and neck on its first sample, 64 positions with large
values, unfolded with the channels of a tap side by side; every linear layer of a decoder of two blocks, width 1024,
random weights. FP8 has scales from the largest values of a tensor, of rows, or of blocks (1×128, 128×128).
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import accumulators_probe as probe
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

SHOWN, SIZE = 64, 1024
E4M3 = torch.float8_e4m3fn


class Block(nn.Module):
    """One block of a decoder: attention and two linear layers."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.o = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.n1, self.n2 = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.n1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.o(functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(functional.gelu(self.up(self.n2(x))))


def operands(target: Path) -> None:
    """Write NAME/a and NAME/b, float16 [64, K], for every layer that has 64 rows and outputs and K of 16."""
    from cp_debug.recipes.registry import load_model

    found: dict[str, np.ndarray] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], _: Any) -> None:
            if isinstance(module, nn.Conv2d):
                columns = functional.unfold(
                    inputs[0][:1], module.kernel_size, module.dilation, module.padding, module.stride
                )[0].t()
                columns = columns.unflatten(1, (inputs[0].shape[1], -1)).transpose(1, 2).flatten(1)
                a = columns[columns.abs().sum(1).argsort(descending=True)[: 4 * SHOWN : 4]]
                b = module.weight.permute(0, 2, 3, 1).flatten(1)[:SHOWN]
            else:
                a, b = inputs[0].flatten(0, -2)[:SHOWN], module.weight[:SHOWN]
            if len(a) == len(b) == SHOWN and a.shape[1] % 16 == 0:
                found[f"{name}/a"], found[f"{name}/b"] = a.detach().half().numpy(), b.detach().half().numpy()

        return hook

    model: Any = load_model("centerpoint:tiny")
    for name, module in model.network.named_modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(keep(f"centerpoint.{name}"))
    sample, results = next(iter(model.samples(1, 0, None))), {}
    torch.manual_seed(1)
    decoder = nn.Sequential(Block(1024, 16), Block(1024, 16))
    with torch.no_grad():
        for component in model.components:
            given = model.feed(component, sample, results)
            made = component.module(*map(torch.from_numpy, given.values()))
            if isinstance(made, Tensor):
                results[component.name] = {"pillar_features": made.numpy()}
        for name, module in decoder.named_modules():
            if isinstance(module, nn.Linear):
                module.register_forward_hook(keep(f"decoder.{name}"))
        decoder(torch.randn(1, 96, 1024))
    np.savez_compressed(target, **found)


def filled(rows: Tensor) -> Tensor:
    """``rows`` [64, K] with random ones below them, [1024, K]: the product of a large layer takes a large kernel."""
    return torch.cat([rows, torch.randn(SIZE - SHOWN, rows.shape[1]) * rows.std()])


def scales(a: Tensor, b: Tensor, by: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scales of a [M, K] and b [N, K] by ``tensor``, ``rows`` or ``block``: spread over the operands, and as
    ``torch._scaled_mm`` wants them."""
    if by == "block":
        fine = a.unflatten(1, (-1, 128)).abs().amax(2) / 448
        coarse = b.unflatten(1, (-1, 128)).unflatten(0, (-1, 128)).abs().amax((1, 3)) / 448
        fine, coarse = (torch.where(s > 0, s, 1.0) for s in (fine, coarse))
        spread = coarse.repeat_interleave(128, 0).repeat_interleave(128, 1)
        return fine.repeat_interleave(128, 1), spread, fine.t().contiguous().t(), coarse.t()
    if by == "rows":
        left, right = (x.abs().amax(1, keepdim=True) / 448 for x in (a, b))
        return left, right, left, right.t().contiguous()
    left, right = a[:SHOWN].abs().max() / 448, b[:SHOWN].abs().max() / 448
    return left, right, left, right


def cases(k: int) -> list[tuple[str, str, str]]:
    """(kind, mode, scales) of every product of a layer with ``k`` terms."""
    fp8 = [("e4m3", mode, by) for mode in ("fast", "precise") for by in ("tensor", "rows")]
    fp8 += [("e4m3", "precise", "block")] if k % 128 == 0 else []
    return fp8 + [(kind, "plain", "") for kind in ("fp16", "bf16", "tf32")]


def inputs(file: Any, name: str) -> tuple[Tensor, Tensor]:
    """Operands of a layer with random rows below them, float32 [1024, K]."""
    torch.manual_seed(0)
    a, b = (filled(torch.from_numpy(file[f"{name}/{side}"].astype(np.float32))) for side in "ab")
    return a, b


def measure(source: Path, target: Path) -> None:
    """Write LAYER|KIND|MODE|SCALES, float32 [64, 64]. Runs on the GPU."""
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    found = {}
    with np.load(source) as file:
        for name in sorted({key[:-2] for key in file.files}):
            a, b = inputs(file, name)
            for kind, mode, by in cases(a.shape[1]):
                if kind == "e4m3":
                    left, right, *given = scales(a, b, by)
                    codes = [(x / s).clamp(-448, 448).to(E4M3).cuda() for x, s in ((a, left), (b, right))]
                    product = torch._scaled_mm(
                        codes[0],
                        codes[1].t(),
                        *(s.cuda() for s in given),
                        out_dtype=torch.float32 if by == "tensor" else torch.bfloat16,
                        use_fast_accum=mode == "fast",
                    ).float()
                else:
                    types = probe.KINDS[kind][:2]
                    codes = [probe.narrowed(x.numpy(), t).cuda() for x, t in zip((a, b), types, strict=True)]
                    product = probe.multiply(kind, mode, *codes)
                found[f"{name}|{kind}|{mode}|{by}"] = product[:SHOWN, :SHOWN].cpu().numpy()
    np.savez_compressed(target, **found)


def judged(source: Path, results: Path) -> list[dict[str, Any]]:
    """Every product against its emulation: ``accumulators.compared``."""
    import accumulators

    from cp_debug.backends.scaling import CODECS

    figures = []
    with np.load(source) as file, np.load(results) as measured:
        for key in measured.files:
            name, kind, mode, by = key.split("|")
            a, b = inputs(file, name)
            rule = accumulators.model(kind, mode)
            if kind != "e4m3":
                pair = [
                    probe.narrowed(x.numpy(), t).float()[:SHOWN]
                    for x, t in zip((a, b), probe.KINDS[kind][:2], strict=True)
                ]
                value, exact = rule.matmul(pair[0], pair[1].t().contiguous()), pair[0].double() @ pair[1].double().t()
            else:
                left, right, *_ = scales(a, b, by)
                codes = [CODECS["e4m3"](x / s)[:SHOWN] for x, s in ((a, left), (b, right))]
                left, right = (s.expand_as(x)[:SHOWN] for s, x in ((left, a), (right, b)))
                exact = (codes[0] * left).double() @ (codes[1] * right).double().t()
                step = 128 if by == "block" else a.shape[1]
                value = torch.zeros(SHOWN, SHOWN)
                for k in range(0, a.shape[1], step):
                    part = rule if by != "block" else replace(rule, promote=None)
                    codes_k = codes[0][:, k : k + step], codes[1][:, k : k + step].t().contiguous()
                    value = value + part.matmul(*codes_k) * (left[:, k, None] * right[:, k])
                value = value if by == "tensor" else value.bfloat16().float()
            figures.append(
                {"layer": name, "kind": kind, "mode": mode, "scales": by, "length": a.shape[1]}
                | accumulators.compared(measured[key], value.numpy(), exact.numpy())
            )
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("step", choices=("operands", "probe", "judge"))
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.step == "operands":
        operands(arguments.files[0])
    elif arguments.step == "probe":
        measure(*arguments.files)
    else:
        figures = judged(*arguments.files)
        for one in figures:
            print({k: v if isinstance(v, str) else float(f"{v:.5g}") for k, v in one.items()})
        if arguments.json:
            arguments.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
