"""Sums that tensor cores keep, from what a GPU gave: ``python benchmarks/accumulators.py PROBE_FOLDER --json FILE``.

``accumulators_probe.py`` runs on the GPU and needs torch and numpy alone; this reads its folder on any machine, tells
width, rounding, order and promotion from the chosen operands, and compares whole products with their emulation. Prints
the tables of ``docs/gpu/accumulators.md``.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import accumulators_probe as probe
import numpy as np
import torch

from cp_debug.backends.running_sums import HOPPER_BF16, HOPPER_FP8, HOPPER_FP16, HOPPER_TF32, RunningSum

RAW = 6
"""Rows and columns of products whose bits the JSON holds."""
PARTS = (1, 2, 4, 8, 16, 32)
"""Equal parts of K that small products are tried to be summed in, each by itself, then added in FP32."""
TOP = {"e4m3": 16, "e5m2": 22, "fp16": 28}
SUMS = {"e4m3": HOPPER_FP8, "e5m2": HOPPER_FP8, "fp16": HOPPER_FP16, "bf16": HOPPER_BF16, "tf32": HOPPER_TF32}


def model(kind: str, mode: str) -> RunningSum:
    """The sum by which a product of ``kind`` is emulated; promoted after 128 products without fast accumulation."""
    narrow = kind in ("e4m3", "e5m2")
    return replace(SUMS[kind], promote=128) if narrow and "fast" not in mode else SUMS[kind]


def widths(record: dict[str, Any], values: np.ndarray) -> dict[str, Any]:
    """Width and rounding, from the chosen operands of one kind and mode."""
    top = TOP.get(record["kind"], 40)
    aligned: dict[str, list[int]] = {"beside": [], "later": []}
    unnormalized, fractions, counts = [], defaultdict(set), []
    for one, value in zip(record["probes"], values, strict=True):
        left = float(value) / 2.0 ** (top - one["distance"])
        if one["probe"] == "cancel" and left == 1.0:
            together = one["place"] < 4 and one["last"] == one["place"] + 1
            if together or one["last"] == record["length"] - 1:
                aligned["beside" if together else "later"].append(one["distance"])
        if one["probe"] == "unnormalized" and left == 1.0:
            unnormalized.append(one["distance"] - 2)
        if one["probe"] == "add" and one["place"] == 1 and one["signs"] == [1.0, 1.0]:
            fractions[one["distance"]].add((one["factor"], (float(value) - 2.0**top) / 2.0 ** (top - one["distance"])))
        if one["probe"] == "several" and one["place"] == 1 and one["count"] == 2:
            counts.append((one["distance"], left - 2.0 ** one["distance"]))
    width = max(aligned["beside"])
    last = dict(fractions.get(width, ()))
    signs = {
        tuple(one["signs"]): float(value) / 2.0**top
        for one, value in zip(record["probes"], values, strict=True)
        if one["probe"] == "add" and one["place"] == 1 and one["distance"] == 4 and one["factor"] == 1.0
    }
    return {
        "aligned_bits": width,
        "kept_bits": max(aligned["later"]),
        "aligned_by_exponents_before_normalization": max(unnormalized) == width,
        "of_1.75_steps_is_left": last.get(1.75),
        "two_halves_below_the_width": next((kept for d, kept in counts if d == width + 1), None),
        "signs": {str(k): v for k, v in signs.items()},
    }


def order(pairs: np.ndarray, counts: np.ndarray, length: int) -> dict[str, Any]:
    """Products of an instruction, of a promoted part, and whether the sum goes from front to back: from what is left of
    equal terms beside a large one at ``pairs[:, 0]`` and its negative at ``pairs[:, 1]``."""
    first = pairs[:, 0] == 0
    place, lost = pairs[first, 1], length - counts[first, 0]
    order_ = np.argsort(place)
    place, lost = place[order_], lost[order_]
    block = int(lost[place < 8].min()) if (place < 8).any() and lost[place < 8].min() > 0 else None
    if block is None:
        return {}
    chained = bool((lost == block * (place // block + 1)).all())
    found: dict[str, Any] = {"products_per_instruction": block, "front_to_back": chained}
    if not chained:
        for every in (64, 128, 256, 512):
            inside = place < every
            apart = 2 * every - (place[~inside] % every) // block * block
            if (lost[inside] == block * (place[inside] // block + 1)).all() and (lost[~inside] == apart).all():
                found |= {"promoted_every": every, "front_to_back": True}
    return found


def products(recipes: list[dict[str, Any]], values: dict[str, np.ndarray]) -> Iterator[dict[str, Any]]:
    """Whole products against their emulation: share of bit-identical elements, residual, error against FP64."""
    for record in recipes:
        if record["what"] != "random" or "sha256" not in record:
            continue
        types = probe.KINDS[record["kind"]][:2]
        a, b = (
            probe.narrowed(probe.random_operand(record["seed"] + i, probe.SHOWN, record["length"], record["spread"]), t)
            for i, t in enumerate(types)
        )
        digest = hashlib.sha256(b"".join(o.view(torch.uint8).numpy().tobytes() for o in (a, b))).hexdigest()
        if digest != record["sha256"]:
            raise SystemExit(f"{record['name']}: the operands are not those of the GPU")
        a, b = a.float(), b.float().t().contiguous()
        exact, best = (a.double() @ b.double()).numpy(), {"identical": -1.0}
        for parts in PARTS if record["size"] < 2048 else (1,):
            step = record["length"] // parts
            sums = (
                model(record["kind"], record["mode"]).matmul(a[:, k : k + step], b[k : k + step])
                for k in range(0, record["length"], step)
            )
            emulated = next(sums)
            for one in sums:
                emulated = emulated + one
            if record["mode"].startswith(("row", "block")):
                emulated = emulated.bfloat16().float()
            found = compared(values[record["name"]], emulated.numpy(), exact) | {"parts": parts}
            best = max(best, found, key=lambda f: f["identical"])
            if best["identical"] == 1:
                break
        yield {k: record[k] for k in ("kind", "mode", "length", "size", "spread")} | best


def compared(measured: np.ndarray, emulated: np.ndarray, exact: np.ndarray) -> dict[str, float]:
    """Share of equal elements, what the emulation leaves of the error, and the error itself; all of one shape."""
    error, left = np.linalg.norm(measured - exact), np.linalg.norm(measured.astype(np.float64) - emulated)
    return {
        "identical": float((measured == emulated).mean()),
        "residual": float(left / error) if error else 0.0,
        "error": float(error / (np.linalg.norm(exact) or 1.0)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    about = json.loads((arguments.folder / "probe.json").read_text())
    with np.load(arguments.folder / "results.npz") as file:
        values = dict(file)
    recipes = about.pop("recipes")
    result: dict[str, Any] = {"about": about, "chosen": {}, "order": {}, "kernels": {}, "not_run": {}}
    for record in recipes:
        name = record["name"]
        if "error" in record:
            result["not_run"][name] = record["error"].splitlines()[0]
        elif record["what"] == "chosen":
            result["chosen"][f"{record['kind']} {record['mode']}"] = widths(record, values[name])
        elif record["what"] == "order":
            found = order(values[f"{name}/pairs"], values[f"{name}/counts"], record["length"])
            result["order"][name.removeprefix("order-")] = found
        elif record["what"] == "kernels":
            result["kernels"][name.removeprefix("kernels-")] = [k[:120] for k in record["kernels"]]
    result["products"] = list(products(recipes, values))
    result["raw"] = {
        r["name"]: values[r["name"]][:RAW, :RAW].view(np.uint32).tolist()
        for r in recipes
        if r["what"] == "random"
        and "sha256" in r
        and r["size"] == 2048
        and r["spread"] == "normal"
        and r["length"] in (64, 512, 4096, 16384)
    }
    for key, figures in result["chosen"].items():
        print(key, figures)
    whole = [p for p in result["products"] if p["size"] == 2048]
    print(
        f"{len(whole)} products of 2048 x 2048: identical {min(p['identical'] for p in whole):.4f} … "
        f"{max(p['identical'] for p in whole):.4f}, residual at most {max(p['residual'] for p in whole):.4f}"
    )
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
