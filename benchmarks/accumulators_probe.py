"""Probes of the sums that a GPU's tensor cores keep: ``python accumulators_probe.py FOLDER``, with torch and numpy.

Every product goes through torch: ``torch._scaled_mm`` for FP8, ``torch.mm`` for FP16, BF16 and TF32. Results come back
as FP32 in ``FOLDER/results.npz``, each under a name whose recipe ``probe.json`` holds; operands are powers of two or
made by numpy from a seed, so that ``accumulators.py`` makes them again on a CPU.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import torch

SHOWN = 64
"""Rows and columns of a product that are kept; the rest of the operands only makes the kernel a large one."""
LENGTHS = (16, 32, 48, 64, 96, 128, 160, 192, 256, 384, 512, 1024, 2048, 4096, 8192, 16384)
KINDS: dict[str, tuple[str, str, int, int, int, int]] = {
    # name: dtypes of both operands, exponents of their smallest and largest power of two
    "e4m3": ("float8_e4m3fn", "float8_e4m3fn", -9, 8, -9, 8),
    "e5m2": ("float8_e5m2", "float8_e4m3fn", -16, 15, -9, 8),
    "fp16": ("float16", "float16", -24, 15, -24, 15),
    "bf16": ("bfloat16", "bfloat16", -40, 40, -40, 40),
    "tf32": ("float32", "float32", -40, 40, -40, 40),
}


def modes(kind: str) -> tuple[str, ...]:
    """Ways to ask for a product of ``kind``: with and without fast accumulation, scales of a tensor, row or block."""
    return (
        ("fast", "precise", "row-fast", "row-precise", "block")
        if kind == "e4m3"
        else (("fast", "precise") if kind == "e5m2" else ("plain",))
    )


def multiply(kind: str, mode: str, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a [M, K] times b [N, K] transposed, both in their narrow dtype on CUDA, as float32 [M, N]; all scales are 1."""
    if kind not in ("e4m3", "e5m2"):
        if kind == "tf32":
            return torch.mm(a, b.t())
        return torch.mm(a, b.t(), out_dtype=torch.float32)
    m, k, n = a.shape[0], a.shape[1], b.shape[0]
    one = torch.ones((), device=a.device)
    scales, out = (one, one), torch.float32
    if mode.startswith("row"):
        scales, out = (torch.ones(m, 1, device=a.device), torch.ones(1, n, device=a.device)), torch.bfloat16
    if mode == "block":
        scales = (torch.ones(k // 128, m, device=a.device).t(), torch.ones(n // 128, k // 128, device=a.device).t())
        out = torch.bfloat16
    return torch._scaled_mm(a, b.t(), *scales, out_dtype=out, use_fast_accum="fast" in mode).float()


def random_operand(seed: int, rows: int, length: int, spread: str) -> np.ndarray:
    """Float32 [rows, length] from numpy's PCG64: ``normal``, ``relu``, or ``wide`` with exponents over 12 octaves."""
    rng = np.random.default_rng(seed)
    values = rng.standard_normal((rows, length), dtype=np.float32)
    if spread == "relu":
        values = np.maximum(values, 0)
    if spread == "wide":
        values = np.ldexp(
            np.sign(values) * (1 + rng.integers(0, 8, values.shape) / 8), rng.integers(-6, 7, values.shape)
        )
    return values.astype(np.float32)


def narrowed(values: np.ndarray, dtype: str) -> torch.Tensor:
    """``values`` [rows, length] rounded on the CPU to torch's ``dtype``; float32 to TF32's 10 mantissa bits."""
    if dtype == "float32":
        bits = (values.view(np.int32) + 0x1000) & ~0x1FFF
        return torch.from_numpy(bits.view(np.float32))
    return torch.from_numpy(values).to(getattr(torch, dtype))


def split(exponent: int, kind: str) -> tuple[float, float] | None:
    """Two powers of two that ``kind`` holds, whose product is 2 ** exponent; None where there are none."""
    _, _, low_a, high_a, low_b, high_b = KINDS[kind]
    first = min(max(exponent // 2, low_a, exponent - high_b), high_a, exponent - low_b)
    if not (low_a <= first <= high_a and low_b <= exponent - first <= high_b):
        return None
    return 2.0**first, 2.0 ** (exponent - first)


Terms = list[tuple[int, float, float]]


def chosen(kind: str, length: int) -> list[dict[str, Any]]:
    """Probes of a sum of ``length`` products: each a list of (place, a, b), all other products 0."""
    top = {"e4m3": 16, "e5m2": 22, "fp16": 28}.get(kind, 40)
    places = [p for p in (1, 2, 3, 4, 7, 8, 15, 16, 31, 32, 63, 64, 96, 127, 128, 255, 256) if p < length - 1]
    big = split(top, kind)
    assert big is not None
    probes: list[dict[str, Any]] = []

    def add(name: str, terms: Terms, **recipe: Any) -> None:
        probes.append({"probe": name, "terms": terms, **recipe})

    for d in range(33):
        small = split(top - d, kind)
        if small is None:
            continue
        for place in places:  # survives the small one beside the big one, which is taken away at the end?
            for last in sorted({place + 1, length - 1}):
                terms: Terms = [(0, *big), (place, *small), (last, -big[0], big[1])]
                add("cancel", terms, distance=d, place=place, last=last)
        for place in (1, 32, 64, 128):
            if place + 4 > length:
                continue
            for factor in (1.0, 1.25, 1.5, 1.75):  # without cancellation: what is left of the small one
                for sign in (1.0, -1.0):
                    for other in (1.0, -1.0):
                        terms = [(0, sign * big[0], big[1]), (place, other * factor * small[0], small[1])]
                        add("add", terms, distance=d, place=place, factor=factor, signs=[sign, other])
            for count in (2, 3, 4):
                terms = [(0, *big), *((place + i, *small) for i in range(count))]
                add("several", terms, distance=d, place=place, count=count)
        # a product of 3.0625 before normalization: by which exponent are the others aligned?
        terms = [(0, 1.75 * big[0] / 2, 1.75 * big[1] / 2), (1, *small), (2, -1.75 * big[0] / 2, 1.75 * big[1] / 2)]
        add("unnormalized", terms, distance=d)
    return probes


def run_chosen(kind: str, mode: str, length: int, size: int = 128) -> tuple[list[dict[str, Any]], np.ndarray]:
    """Recipes of the probes, and their results, float32 [probes]."""
    probes = chosen(kind, length)
    results = np.zeros(len(probes), np.float32)
    first, second = KINDS[kind][:2]
    for start in range(0, len(probes), size):
        part = probes[start : start + size]
        a, b = np.zeros((size, length), np.float32), np.zeros((size, length), np.float32)
        for row, probe in enumerate(part):
            for place, left, right in probe["terms"]:
                a[row, place], b[row, place] = left, right
        product = multiply(kind, mode, narrowed(a, first).cuda(), narrowed(b, second).cuda())
        results[start : start + len(part)] = product.diagonal()[: len(part)].cpu().numpy()
    return probes, results


def run_order(kind: str, mode: str, length: int, rows: int, columns: int, seed: int) -> dict[str, np.ndarray]:
    """Sums of equal small terms with a big one at place i and its negative at j: what is left counts the terms that the
    sum met while neither was in it (FPRev's probe of the summation tree). Pairs [rows, 2], counts float32 [rows, 2]."""
    rng = np.random.default_rng(seed)
    big, small, factor = {"e4m3": (256.0, 2.0**-7, 16.0), "e5m2": (2.0**12, 2.0**-6, 16.0)}.get(
        kind, (2.0**14, 2.0**-20, 1.0) if kind == "fp16" else (2.0**40, 1.0, 1.0)
    )
    pairs = np.sort(np.stack([rng.permutation(length)[:2] for _ in range(rows)]), 1)
    fixed = min(rows // 2, length - 1)  # pairs with place 0 first: they alone tell most of a tree
    steps = np.unique(np.linspace(1, length - 1, fixed).astype(int))
    pairs[: len(steps), 0], pairs[: len(steps), 1] = 0, steps
    a = np.full((rows, length), small, np.float32)
    a[np.arange(rows), pairs[:, 0]] = big
    a[np.arange(rows), pairs[:, 1]] = -big
    b = np.full((columns, length), factor, np.float32)
    first, second = KINDS[kind][:2]
    product = multiply(kind, mode, narrowed(a, first).cuda(), narrowed(b, second).cuda())
    return {"pairs": pairs.astype(np.int32), "counts": (product[:, [0, -1]] / (small * factor)).cpu().numpy()}


def run_random(kind: str, mode: str, length: int, size: int, spread: str, seed: int) -> tuple[np.ndarray, str]:
    """Results [SHOWN, SHOWN] of a product of [size, length] operands, and a hash of the shown operands' bits."""
    first, second = KINDS[kind][:2]
    shown = [narrowed(random_operand(seed + side, SHOWN, length, spread), d) for side, d in ((0, first), (1, second))]
    operands = []
    for operand in shown:
        rest = torch.randn(size - SHOWN, length, device="cuda").to(operand.dtype)
        operands.append(torch.cat([operand.cuda(), rest]).contiguous())
    product = multiply(kind, mode, *operands)
    if not torch.equal(product, multiply(kind, mode, *operands)):
        raise RuntimeError("two runs differ")
    digest = hashlib.sha256(b"".join(o.view(torch.uint8).numpy().tobytes() for o in shown)).hexdigest()
    return product[:SHOWN, :SHOWN].cpu().numpy(), digest


def kernels(kind: str, mode: str, length: int, size: int) -> list[str]:
    """Names of the CUDA kernels that compute one product."""
    from torch.profiler import ProfilerActivity, profile

    first, second = KINDS[kind][:2]
    a, b = (torch.zeros(size, length, device="cuda").to(getattr(torch, d)) for d in (first, second))
    multiply(kind, mode, a, b)
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        multiply(kind, mode, a, b)
        torch.cuda.synchronize()
    names = [e.key for e in trace.key_averages()]
    return [n for n in names if any(w in n.lower() for w in ("gemm", "nvjet", "cutlass", "splitk", "reduce", "xmma"))]


def main() -> None:
    folder = Path(sys.argv[1])
    budget = float(sys.argv[2]) if len(sys.argv) > 2 else 100.0
    began = time.time()
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    arrays: dict[str, np.ndarray] = {}
    recipes: list[dict[str, Any]] = []
    about = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "numpy": np.__version__,
        "command": " ".join(sys.argv),
    }

    def save() -> None:
        np.savez_compressed(folder / "results.npz", **arrays)
        (folder / "probe.json").write_text(json.dumps(about | {"seconds": time.time() - began, "recipes": recipes}))

    def attempt(what: str, kind: str, mode: str, **recipe: Any) -> None:
        if time.time() - began > budget:
            return
        name = f"{what}-{kind}-{mode}-" + "-".join(f"{v}" for v in recipe.values())
        record: dict[str, Any] = {"name": name, "what": what, "kind": kind, "mode": mode, **recipe}
        try:
            if what == "chosen":
                record["probes"], arrays[name] = run_chosen(kind, mode, recipe["length"])
            elif what == "order":
                found = run_order(kind, mode, **recipe)
                arrays.update({f"{name}/{k}": v for k, v in found.items()})
            elif what == "kernels":
                record["kernels"] = kernels(kind, mode, **recipe)
            else:
                arrays[name], record["sha256"] = run_random(kind, mode, **recipe)
        except Exception as error:
            record["error"] = traceback.format_exception_only(error)[0].strip()[:300]
        recipes.append(record)

    ways = [(kind, mode) for kind in KINDS for mode in modes(kind)]
    for kind, mode in ways:
        attempt("chosen", kind, mode, length=256)
    print("chosen", time.time() - began, flush=True)
    for length, size in ((128, 128), (1024, 1024), (4096, 2048), (16384, 2048)):
        for kind, mode in ways:
            attempt("order", kind, mode, length=length, rows=size, columns=size, seed=length)
    print("order", time.time() - began, flush=True)
    save()
    for length in LENGTHS:
        for kind, mode in ways:
            attempt("random", kind, mode, length=length, size=2048, spread="normal", seed=7 * length)
    for length in (16, 32, 64, 128, 512, 4096):
        for spread in ("wide", "relu"):
            for kind, mode in ways:
                attempt("random", kind, mode, length=length, size=2048, spread=spread, seed=7 * length + 3)
    print("random", time.time() - began, flush=True)
    save()
    for length, size in ((4096, 256), (16384, 256), (1024, 128)):  # few tiles: K may be split
        for kind, mode in ways:
            attempt("random", kind, mode, length=length, size=size, spread="normal", seed=7 * length)
            attempt("order", kind, mode, length=length, rows=size, columns=size, seed=length)
    for length, size in ((64, 2048), (512, 2048), (4096, 2048), (16384, 2048), (4096, 256), (16384, 256)):
        for kind, mode in ways:
            attempt("kernels", kind, mode, length=length, size=size)
    save()
    errors = [f"{r['name']}: {r['error']}" for r in recipes if "error" in r]
    print(len(recipes), "recipes,", len(errors), "errors", time.time() - began, *errors[::9][:30], sep="\n")


if __name__ == "__main__":
    main()
