"""Wall time of whole bisects on a GPU, and of the comparison of two tensors there; JSON out.

    python benchmarks/gpu_speed.py OUT.json [--only statistics,pillar,vit,decoder,kernels] [--rounds 5] [--no-oracle]

``pillar``: ``bisect centerpoint:nus-pillar02 -b torch@cuda,torch-tf32@cuda``; ``vit``: ViT-L (24 blocks, batch 4, 576
tokens) ``-b torch@cuda,torch-bf16@cuda``; ``decoder``: the same of 1.0 G parameters. Each from a cold process, wall
time of the whole process; then the same functions called twice in one process, the second time of which is the time
after imports, with the most device memory. Both are judged by the CPU's oracle, too (but for ``--no-oracle``):
verdicts must be the same, excesses within 1 %. ``kernels``: convolutions of nus-pillar02 in ``emu-fp16acc``'s order,
their bits against the CPU's, their time against cuDNN's in FP16. ``statistics``: ``compare`` on 1 GiB pairs against the
card's own copy, PyTorch eager, ``torch.compile``, and NumPy after copying back; CUDA events, medians.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
BISECTS = {
    "pillar": ("centerpoint:nus-pillar02", "torch@cuda,torch-tf32@cuda"),
    "vit": (f"{HERE / 'gpu_speed_models.py'}:vit_large", "torch@cuda,torch-bf16@cuda"),
    "small": (f"{HERE / 'gpu_speed_models.py'}:vit_small", "torch,emu-bf16"),
    "decoder": (f"{HERE / 'gpu_speed_models.py'}:decoder_1b", "torch@cuda,torch-bf16@cuda"),
}
GIB = 1 << 30


def kept_exports() -> set[str]:
    """Names of the kept exports."""
    from cp_debug.store import cache_folder

    return {path.name for path in cache_folder("exports").glob("*")}


def cold(model: str, backends: str, *more: str, limit: float = 300) -> dict[str, Any]:
    """One command in a process of its own: seconds, exit status, whether it found its exports kept, and its result."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        command = [sys.executable, "-m", "cp_debug", "bisect", model, "-b", backends, *more, "--json", str(out)]
        before = kept_exports()
        start = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=False)
        seconds = time.perf_counter() - start
        found: dict[str, Any] = {
            "seconds": round(seconds, 2),
            "exit": done.returncode,
            "new_exports": len(kept_exports() - before),
            "command": " ".join(command[1:]),
        }
        print(found, file=sys.stderr, flush=True)  # what is known, should this process be stopped
        if done.returncode not in (0, 1):
            found["error"] = done.stderr[-3000:]
        elif out.is_file():
            found["result"] = json.loads(out.read_text())
    return found


WARM = """
import json, sys, time, torch
from pathlib import Path
start = time.perf_counter()
import cp_debug.bisect.engine as engine
from cp_debug.bisect.options import Options
from cp_debug.recipes.registry import load_model
took = []
for _ in range(int(sys.argv[3])):
    start, steps = time.perf_counter(), []
    def step(text, done, total):
        steps.append([round(time.perf_counter() - start, 3), text])
    engine.bisect(sys.argv[1], sys.argv[2], options=Options(cache=True), on_step=step)
    took.append(round(time.perf_counter() - start, 3))
    print(took[-1], steps, file=sys.stderr, flush=True)
peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
model = load_model(sys.argv[1])
bytes_ = sum(p.numel() * 4 for c in model.components if c.module is not None for p in c.module.parameters())
found = {"seconds": took, "steps_of_the_last": steps, "peak_device_bytes": peak}
found |= {"model_bytes_fp32": bytes_, "times_model": peak / max(bytes_, 1)}
print(json.dumps(found))
"""


def warm(model: str, backends: str, rounds: int, limit: float = 300) -> dict[str, Any]:
    """The same bisect over and over in one process: the first has the device's start in it, the others have not."""
    done = subprocess.run(
        [sys.executable, "-c", WARM, model, backends, str(rounds)],
        stdout=subprocess.PIPE, text=True, timeout=limit, check=False,
    )  # fmt: skip
    if done.returncode:
        return {"error": f"exit {done.returncode}, see the console"}
    return dict(json.loads(done.stdout.splitlines()[-1]))


def agreement(found: dict[str, Any], oracle: dict[str, Any]) -> dict[str, Any]:
    """Verdicts that differ between two results of one bisect, and the largest difference of an excess, with its layer.

    The difference is relative to the oracle's excess, or to 1 where that is smaller: an excess of 1 is what the format
    explains, and one of 1e-3 is the FP32 rounding of whichever device judged.
    """
    differ, worst, where, rows = [], 0.0, None, 0
    for ours, theirs in zip(found["tests"], oracle["tests"], strict=True):
        by_name = {(row["component"], row["onnx"]): row for row in theirs["layers"]}
        for row in ours["layers"]:
            other = by_name[row["component"], row["onnx"]]
            rows += 1
            if row["verdict"] != other["verdict"]:
                differ.append(row["name"])
            a, b = row["excess"], other["excess"]
            if isinstance(a, float) and isinstance(b, float) and math.isfinite(a) and math.isfinite(b):
                difference = abs(a - b) / max(abs(b), 1.0)
                if difference > worst:
                    worst, where = difference, {"layer": row["name"], "excess": a, "oracle": b}
    return {"layers": rows, "verdicts_that_differ": differ, "largest_difference_of_excess": worst, "largest_at": where}


def judged_twice(name: str) -> dict[str, Any]:
    """One of ``BISECTS`` judged by the test's own device and by the CPU, and where they differ."""
    here, there = (cold(*BISECTS[name], *more) for more in ((), ("--oracle-device", "cpu")))
    found = {"seconds": here["seconds"], "oracle_on_cpu_seconds": there["seconds"]}
    if "result" not in here or "result" not in there:
        return found | {"errors": [each["error"] for each in (here, there) if "error" in each]}
    return found | {"agreement": agreement(here["result"], there["result"])}


def bisects(name: str, rounds: int, oracle: bool) -> dict[str, Any]:
    """One of ``BISECTS``, cold, warm, and judged on the CPU."""
    model, backends = BISECTS[name]
    if not rounds:
        return {"warm": warm(model, backends, 1)}
    first = cold(model, backends)  # exports, and compiles Python's own files
    runs = [cold(model, backends) for _ in range(rounds)]
    found: dict[str, Any] = {
        "command": runs[0]["command"],
        "first_seconds": first["seconds"],
        "cold_seconds": [run["seconds"] for run in runs],
        "cold_median": statistics.median(run["seconds"] for run in runs),
        "exits": [run["exit"] for run in runs],
        "new_exports": [first["new_exports"], *(run["new_exports"] for run in runs)],
        "errors": [run["error"] for run in runs if "error" in run],
        "warm": warm(model, backends, rounds),
    }
    if not oracle:
        return found
    on_cpu = cold(model, backends, "--oracle-device", "cpu")
    found["oracle_on_cpu_seconds"] = on_cpu["seconds"]
    if "result" in runs[-1] and "result" in on_cpu:
        found["agreement"] = agreement(runs[-1]["result"], on_cpu["result"])
    return found


def timed(call: Callable[[], Any], rounds: int) -> float:
    """Median milliseconds of a call by CUDA events, after two that are not counted."""
    import torch

    for _ in range(2):
        call()
    took = []
    for _ in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        took.append(start.elapsed_time(end))
    return statistics.median(took)


def of_statistics(rounds: int) -> dict[str, Any]:
    """``compare`` on pairs of 1 GiB each, against other ways, in GB/s of what is read."""
    import torch

    from cp_debug.probes.statistics import compare

    def eager(a: torch.Tensor, b: torch.Tensor) -> Any:
        x, y = a.float(), b.float()
        d = (y - x).abs()
        finite = torch.isfinite(x).all() & torch.isfinite(y).all()
        return d.max(), d.argmax(), d.sum(), (d * d).sum(), (x * x).sum(), (y * y).sum(), (x * y).sum(), finite

    def numpy(a: torch.Tensor, b: torch.Tensor) -> Any:
        return compare(a.float().cpu().numpy(), b.float().cpu().numpy())

    found: dict[str, Any] = {"device": torch.cuda.get_device_name(), "torch": str(torch.__version__)}
    compiled = torch.compile(eager)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        count = GIB // dtype.itemsize
        a = torch.randn(count, device="cuda").to(dtype)
        b = (a.float() + 1e-3 * torch.randn(count, device="cuda")).to(dtype)
        into, of = torch.empty_like(a), {}
        of["copy"] = 2 * GIB / 1e6 / timed(lambda into=into, a=a: into.copy_(a), 3 * rounds)
        del into
        of["compare"] = 2 * GIB / 1e6 / timed(lambda a=a, b=b: compare(a, b), 3 * rounds)
        of["eager"] = 2 * GIB / 1e6 / timed(lambda a=a, b=b: eager(a, b), rounds)
        try:
            of["compiled"] = 2 * GIB / 1e6 / timed(lambda a=a, b=b: compiled(a, b), rounds)
        except Exception as error:
            of["compiled_error"] = str(error)[:300]
        start = time.perf_counter()
        numpy(a, b)
        of["host"] = 2 * GIB / 1e9 / (time.perf_counter() - start)
        of["share_of_copy"] = of["compare"] / of["copy"]
        found[str(dtype).removeprefix("torch.")] = of
        print(dtype, {k: v if isinstance(v, str) else round(v, 3) for k, v in of.items()}, flush=True)
    return found


def convolutions() -> list[tuple[str, Any, Any]]:
    """(Name, module, input) of the convolutions of nus-pillar02 on its first sample, FP32 on the CPU.

    Of six heads, which are alike, the first.
    """
    import torch
    from torch import nn

    from cp_debug.programs.walk import Walk, run_module
    from cp_debug.recipes.registry import load_model

    model: Any = load_model("centerpoint:nus-pillar02")
    found: list[tuple[str, Any, Any]] = []
    for step in Walk(model, next(iter(model.samples(1, 0, None)))):
        module = step.component.module
        hooks = [
            part.register_forward_hook(
                lambda m, given, _, name=f"{step.component.name}.{name}": found.append((name, m, given[0].clone()))
            )
            for name, part in module.named_modules()
            if isinstance(part, (nn.Conv2d, nn.ConvTranspose2d))
            and ("task_heads." not in name or "task_heads.0." in name)
        ]
        with torch.no_grad():
            step.outputs = run_module(step.component, step.inputs)
        for hook in hooks:
            hook.remove()
    return found


def of_kernels(rounds: int) -> dict[str, Any]:
    """Convolutions of nus-pillar02 with FP16 accumulation: bits against the CPU's, milliseconds against cuDNN."""
    import torch
    from torch import nn
    from torch.nn import functional

    from cp_debug.backends.arithmetic import round_fp16
    from cp_debug.backends.kernels import fp16_accumulation as emulated
    from cp_debug.backends.kernels.windows import Window

    rows = []
    for name, module, given in convolutions():
        x, weight = round_fp16(given), round_fp16(module.weight.detach())
        pads = tuple(module.padding)
        window = Window(tuple(module.kernel_size), tuple(module.stride), tuple(module.dilation), pads, pads)
        down = isinstance(module, nn.Conv2d)
        size = module(given).shape[2:]

        def emulate(x: Any, w: Any, window: Any = window, down: bool = down, size: Any = size, m: Any = module) -> Any:
            if down:
                return emulated.conv(x, w, None, window, m.groups, emulated.Order(64))
            return emulated.conv_transpose(x, w, None, window, size, m.groups, emulated.Order(64))

        def cudnn(x: Any, w: Any, m: Any = module, down: bool = down) -> Any:
            function = functional.conv2d if down else functional.conv_transpose2d
            return function(x, w, None, m.stride, m.padding, groups=m.groups)

        on = x.cuda(), weight.cuda()
        half = [t.half().contiguous(memory_format=torch.channels_last) for t in on]
        try:
            start = time.perf_counter()
            expected = emulate(x, weight)
            seconds = time.perf_counter() - start
            equal = (emulate(*on).cpu() == expected).float().mean().item()
            ours = timed(lambda on=on, emulate=emulate: emulate(*on), rounds)
            library = timed(lambda half=half, cudnn=cudnn: cudnn(*half), 3 * rounds)
            products = expected.numel() * weight[0].numel() if down else x.numel() * weight[0].numel()
            rows.append(
                {
                    "layer": name, "shape": list(expected.shape), "weights": list(weight.shape), "equal": equal,
                    "ms": round(ours, 4), "cudnn_ms": round(library, 4), "times": round(ours / library, 2),
                    "cpu_seconds": round(seconds, 3), "tflops": round(2e-9 * products / ours, 2),
                    "cudnn_tflops": round(2e-9 * products / library, 2),
                }
            )  # fmt: skip
        except Exception:
            rows.append({"layer": name, "error": traceback.format_exc()[-1500:]})
        print(rows[-1], flush=True)
    done = [row for row in rows if "times" in row]
    return {
        "device": torch.cuda.get_device_name(), "layers": rows,
        "bit_equal_layers": sum(row["equal"] == 1 for row in done),
        "ms": sum(row["ms"] for row in done), "cudnn_ms": sum(row["cudnn_ms"] for row in done),
    }  # fmt: skip


def main() -> None:
    """Run what was asked for; the file is rewritten after every part."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", default="statistics,pillar,vit")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-oracle", action="store_true")
    parser.add_argument("--only-oracle", action="store_true")
    args = parser.parse_args()
    found: dict[str, Any] = {
        "command": "python benchmarks/gpu_speed.py " + " ".join(sys.argv[1:]),
        "cores": os.cpu_count(),
    }
    for part in args.only.split(","):
        try:
            if part == "statistics":
                found[part] = of_statistics(args.rounds)
            elif part == "kernels":
                found[part] = of_kernels(args.rounds)
            elif args.only_oracle:
                found[part] = judged_twice(part)
            else:
                found[part] = bisects(part, args.rounds, not args.no_oracle)
        except Exception:
            found[part] = {"error": traceback.format_exc()[-3000:]}
        args.out.write_text(json.dumps(found, indent=1))
        print(part, json.dumps(found[part])[:1500], flush=True)


if __name__ == "__main__":
    main()
