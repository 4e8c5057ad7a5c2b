"""What FP8 and 4 bits cost a language model: its perplexity, and which of its products cost it.

    python benchmarks/language_model.py train FOLDER [--size tiny|small|large] [--seconds N | --steps N]
    python benchmarks/language_model.py judge FOLDER [--device cuda] [--json FILE]

``train``, on the text that Python's ``pydoc`` ships, writes ``model.onnx`` (a decoder of bytes with its key and value
caches as inputs and outputs), ``windows.npz`` (held-out text, in two chunks: the second reads the caches of the first)
and ``chunk.npz`` (the inputs of a second chunk, for ``cpdebug --inputs``). ``judge`` runs it in each
precision by the executor of the emulated backends, whole and with one product at a time in it. Costs are differences of
the mean log-likelihood of a byte against FP32 on the same windows, with a 95 % interval over the windows by bootstrap.
"""

from __future__ import annotations

import argparse
import json
import math
import pydoc_data.topics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

SIZES = {"tiny": (64, 2, 2), "small": (128, 4, 4), "large": (768, 14, 12)}
"""Width, blocks, heads: 0.1, 0.9 and 100 million parameters."""
RATES = {"tiny": 3e-3, "small": 1.5e-3, "large": 4e-4}
"""Learning rates."""
CHUNK = 128
"""Bytes of a chunk, and of the caches."""
HELD_OUT = 0.1
OUTLIERS, OUTLIER = 2, 50
"""How many channels ``--outliers`` makes larger, and how much."""
WARM_UP = 50
"""Steps over which the learning rate grows."""
PRECISIONS = ("bf16", "fp8", "fp8:channel", "fp8:block", "fp8:acc=fp22", "mxfp8", "nvfp4", "mxfp4", "int4", "int4:g32")
ALONE = ("fp8", "int4", "mxfp4")
"""Precisions in which each product is judged by itself, too."""


class Block(nn.Module):
    """Causal attention with caches, and a gated feed-forward part."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.n1, self.n2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor, mask: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, T, width], mask [1, 1, T, P + T], caches [B, heads, P, width ÷ heads]; the new keys and values too."""
        y = self.n1(x)
        q, k, v = (f(y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        scores = q @ torch.cat([keys, k], 2).transpose(-1, -2) * (q.shape[-1] ** -0.5) + mask
        mixed = scores.softmax(-1) @ torch.cat([values, v], 2)
        x = x + self.o(mixed.transpose(1, 2).flatten(2))
        return x + self.down(functional.gelu(self.up(self.n2(x)))), k, v


class Decoder(nn.Module):
    """Bytes in, logits of the next byte out."""

    def __init__(self, width: int, blocks: int, heads: int) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(256, width), nn.Embedding(2 * CHUNK, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(blocks))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 256, bias=False)

    def forward(self, tokens: Tensor, places: Tensor, mask: Tensor, *caches: Tensor) -> tuple[Tensor, ...]:
        """tokens [B, T] int64, places [T] int64, mask as in ``Block``, keys and values of each block in turn."""
        x, made = self.embed(tokens) + self.place(places), []
        for block, keys, values in zip(self.blocks, caches[::2], caches[1::2], strict=True):
            x, *new = block(x, mask, keys, values)
            made += new
        return self.head(self.norm(x)), *made


def text() -> np.ndarray:
    """The topics of Python's help, as bytes."""
    topics = pydoc_data.topics.topics
    return np.frombuffer("\n\n".join(topics[k] for k in sorted(topics)).encode(), np.uint8).astype(np.int64)


def enlarge(model: Decoder) -> None:
    """Some channels behind each LayerNorm times ``OUTLIER``, and the weights that read them divided by as much.

    The function stays the same. Decoders of billions of parameters have such channels by themselves (Dettmers et al.,
    LLM.int8(), 2022, section 4).
    """
    with torch.no_grad():
        for block in model.blocks:
            for norm, readers in ((block.n1, (block.q, block.k, block.v)), (block.n2, (block.up,))):
                norm.weight[:OUTLIERS] *= OUTLIER
                norm.bias[:OUTLIERS] *= OUTLIER
                for reader in readers:
                    reader.weight[:, :OUTLIERS] /= OUTLIER


def train(folder: Path, size: str, seconds: float, steps: int | None, outliers: bool) -> None:
    """Train for a time, or a number of steps; then write the graph, the held-out windows and one input."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    width, blocks, heads = SIZES[size]
    data = torch.from_numpy(text())
    held = data[int(len(data) * (1 - HELD_OUT)) :]
    data = data[: len(data) - len(held)].to(device)
    model = Decoder(width, blocks, heads).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATES[size], weight_decay=0.1)
    length, batch = 2 * CHUNK, 64 if device == "cuda" else 12
    mask = torch.full((length, length), -1e4, device=device).triu(1)[None, None]
    places = torch.arange(length, device=device)
    caches = [torch.zeros(batch, heads, 0, width // heads, device=device)] * (2 * blocks)
    start, step, loss = time.monotonic(), 0, torch.zeros(())
    while (share := step / steps if steps else (time.monotonic() - start) / seconds) < 1:
        for group in optimizer.param_groups:
            group["lr"] = group.setdefault("top", group["lr"]) * min(1, (step + 1) / WARM_UP) * (1 - share)
        at = torch.randint(len(data) - length - 1, (batch, 1), device=device) + torch.arange(length + 1, device=device)
        bytes_ = data[at]
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            logits = model(bytes_[:, :-1], places, mask, *caches)[0]
            loss = functional.cross_entropy(logits.flatten(0, 1).float(), bytes_[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
    model = model.cpu().eval()
    if outliers:
        enlarge(model)
    count = sum(p.numel() for p in model.parameters())
    seconds = round(time.monotonic() - start, 1)
    print(f"{count / 1e6:.1f} M parameters, {step} steps, last loss {loss.item():.3f}")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "about.json").write_text(
        json.dumps({"parameters": count, "steps": step, "seconds": seconds, "loss": loss.item(), "size": size})
    )
    starts = np.linspace(0, len(held) - length - 1, 64).astype(int)
    windows = np.stack([held.numpy()[s : s + length + 1] for s in starts])
    np.savez_compressed(folder / "windows.npz", windows=windows)
    names = ["tokens", "places", "mask", *(f"{n}.{i}" for i in range(blocks) for n in ("keys", "values"))]
    made = ["logits", *(f"new_{n}" for n in names[3:])]
    empty = [torch.zeros(8, heads, CHUNK, width // heads)] * (2 * blocks)
    first, second = ((torch.from_numpy(windows[:8])[:, chunk(i)], places.cpu()[chunk(i)], visible(i)) for i in (0, 1))
    torch.onnx.export(
        model, (*first, *empty), str(folder / "model.onnx"), input_names=names, output_names=made,
        dynamo=True, external_data=False, verbose=False,
    )  # fmt: skip
    with torch.no_grad():
        caches = model(*first, *empty)[1:]
    np.savez(folder / "chunk.npz", **{n: v.numpy() for n, v in zip(names, (*second, *caches), strict=True)})


def chunk(index: int) -> slice:
    """Places of the first or second chunk in a window."""
    return slice(index * CHUNK, (index + 1) * CHUNK)


def visible(index: int) -> Tensor:
    """The mask [1, 1, CHUNK, 2 × CHUNK] that is added to scores: caches count in the second chunk."""
    before, after = torch.full((CHUNK, CHUNK), 0.0 if index else -1e4), torch.full((CHUNK, CHUNK), -1e4).triu(1)
    return torch.cat([before, after], 1)[None, None]


def losses(executor: Any, windows: np.ndarray, caches: list[str], empty: Tensor, device: str) -> np.ndarray:
    """Mean negative log-likelihood of a byte in nats, of each window; the second chunk has the first's caches."""
    found = []
    for first in range(0, len(windows), 8):
        bytes_, kept, parts = torch.from_numpy(windows[first : first + 8]), dict.fromkeys(caches, empty), []
        for index in range(2):
            own = chunk(index)
            given = {"tokens": bytes_[:, own], "places": torch.arange(2 * CHUNK)[own], "mask": visible(index), **kept}
            results = executor.run({k: v.to(device) for k, v in given.items()})
            kept = {name: results[f"new_{name}"] for name in caches}
            wanted = bytes_[:, 1:][:, own].to(device)
            parts.append(functional.cross_entropy(results["logits"].float().mT, wanted, reduction="none"))
        found.append(torch.cat(parts, 1).mean(1).cpu().numpy())
    return np.concatenate(found).astype(np.float64)


def interval(differences: np.ndarray) -> tuple[float, float, float]:
    """Mean and its 95 % interval over the windows, by bootstrap."""
    rng = np.random.default_rng(0)
    means = differences[rng.integers(len(differences), size=(2000, len(differences)))].mean(1)
    return float(differences.mean()), *(float(q) for q in np.quantile(means, [0.025, 0.975]))  # type: ignore[return-value]


def judge(
    folder: Path, device: str, windows_used: int, precisions: Sequence[str], alone: Sequence[str], out: Path | None
) -> None:
    """Perplexities and costs, with intervals; ``out`` is rewritten after each precision."""
    from cp_debug.backends.arithmetic import ARITHMETICS
    from cp_debug.backends.determinism import deterministic
    from cp_debug.backends.executor import Executor
    from cp_debug.graph.graph import Graph
    from cp_debug.graph.operators import PRODUCTS

    graph = Graph(folder / "model.onnx")
    windows = np.load(folder / "windows.npz")["windows"][:windows_used]
    caches = [v.name for v in graph.inputs if v.name.startswith(("keys", "values"))]
    shape = next(v.shape for v in graph.inputs if v.name == caches[0])
    empty = torch.zeros(*map(int, shape))

    def measured(base: str, overrides: dict[str, str]) -> np.ndarray:
        chosen = {n: ARITHMETICS[a] for n, a in overrides.items()}
        with deterministic():
            return losses(Executor(graph, ARITHMETICS[base], device, overrides=chosen), windows, caches, empty, device)

    start = time.monotonic()
    exact = measured("fp32", {})
    report: dict[str, Any] = {
        "about": json.loads((folder / "about.json").read_text()), "device": device, "windows": len(windows),
        "perplexity_fp32": math.exp(exact.mean()), "whole": {}, "alone": {},
    }  # fmt: skip
    print(f"fp32: perplexity {report['perplexity_fp32']:.4f}")

    def keep() -> None:
        report["seconds"] = round(time.monotonic() - start, 1)
        if out:
            out.write_text(json.dumps(report, indent=1))

    for name in precisions:
        loss = measured(name, {})
        cost = interval(loss - exact)
        report["whole"][name] = {"perplexity": math.exp(loss.mean()), "cost": cost}
        print(f"{name}: perplexity {math.exp(loss.mean()):.4f}, cost {cost[0]:.5f} [{cost[1]:.5f}, {cost[2]:.5f}] nats")
        keep()
    products = [n.name for n in graph.nodes if n.op in PRODUCTS]
    for name in alone:
        costs = {node: interval(measured("fp32", {node: name}) - exact) for node in products}
        ranked = dict(sorted(costs.items(), key=lambda item: -item[1][0]))
        report["alone"][name] = ranked
        for node, cost in list(ranked.items())[:5]:
            print(f"{name} in {node} alone: {cost[0]:.6f} [{cost[1]:.6f}, {cost[2]:.6f}]")
        keep()
    keep()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=("train", "judge"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--steps", type=int, help="instead of seconds: the same on every machine, up to rounding")
    parser.add_argument("--outliers", action="store_true", help="a few channels 50 times as large; the same function")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--windows", type=int, default=64, help="a multiple of 8")
    names = lambda text: [n for n in text.split(",") if n]  # noqa: E731
    parser.add_argument("--precisions", type=names, default=PRECISIONS, help="of the whole network, with commas")
    parser.add_argument("--alone", type=names, default=ALONE, help="of one product at a time; '' for none")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.step == "train":
        train(options.folder, options.size, options.seconds, options.steps, options.outliers)
        return
    judge(options.folder, options.device, options.windows, options.precisions, options.alone, options.json)


if __name__ == "__main__":
    main()
