"""Where a builder's time goes: seconds by kind of kernel, layer by layer, under several settings.

    TRT-PYTHON benchmarks/build_times.py NET.onnx OUT.json [--shape images:1x3x320x320] [--level N] [--threads N]
        [--tactic-sources=-JIT_CONVOLUTIONS] [--seconds S] [--timings FILE --every S]

Runs in TensorRT's interpreter (Python 3.8, its package and numpy): FP16 without TF32. What lies between two lines of
the verbose log is counted for the kernel that the first one names. ``OUT.json`` is rewritten every few seconds, so that
a build that ends at ``--seconds``, or is killed, has told what it knows. ``--timings`` asks whether what was timed can
be had before a build ends: the timing cache is written while the builder works.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import threading
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "cp_debug" / "backends" / "tensorrt"))

import runner

RUNNER = re.compile(r"Timing Runner: (.+) \((\w+)")
PAUSE = 3.0
"""Seconds between two states that are written."""


class Watch(runner.Job):
    """Times the log."""

    def __init__(self) -> None:
        self.began = self.last = time.monotonic()
        self.kind, self.layer = "before the first kernel", ""
        self.by_kind: dict[str, list[float]] = {}
        self.by_layer: dict[str, float] = {}
        self.counted = self.left = 0
        self.slowest: list[tuple[float, str]] = []
        self.said: list[str] = []
        super().__init__(lambda event: None)

    def log(self, level: str, text: str) -> None:
        now = time.monotonic()
        spent, self.last = now - self.last, now
        row = self.by_kind.setdefault(self.kind, [0.0, 0])
        row[0] += spent
        if self.layer:
            self.by_layer[self.layer] = self.by_layer.get(self.layer, 0.0) + spent
        if spent > 1.0:
            self.slowest.append((round(spent, 2), f"{self.kind} {self.layer[:80]}: {text[:160]}"))
        if level in ("ERROR", "INTERNAL_ERROR", "WARNING"):
            self.said.append(f"{level}: {text[:300]}")
        left = re.match(r"After .*: (\d+) layers?\s*$", text)
        if left is not None:
            self.left = int(left.group(1))
        found = RUNNER.search(text)
        if found is not None:
            self.layer, self.kind = found.group(1), found.group(2)
            self.counted += 1
            self.by_kind.setdefault(self.kind, [0.0, 0])[1] += 1
        elif "Engine generation completed" in text or "Chosen Runner" in text:
            self.kind, self.layer = "between kernels", ""

    def state(self) -> dict[str, Any]:
        """What is known now; seconds of processor time beside those of the clock."""
        used = os.times()
        layers = [name for name in self.by_layer if not name.startswith("Optimizer Reformat")]
        return {
            "seconds": round(time.monotonic() - self.began, 1),
            "processor_seconds": [round(used.user, 1), round(used.system, 1)],
            "layers": [len(layers), self.left],
            "kernels": self.counted,
            "by_kind": {k: [round(s, 1), n] for k, (s, n) in sorted(self.by_kind.items(), key=lambda i: -i[1][0])},
            "slowest": sorted(self.slowest, reverse=True)[:20],
        }


def build(args: argparse.Namespace) -> None:
    watch = Watch()
    trt = watch.trt
    document: dict[str, Any] = {
        "network": args.network.name,
        "settings": {k: getattr(args, k) for k in ("shape", "level", "threads", "tactic_sources", "seconds")},
        "lazy": os.environ.get("CUDA_MODULE_LOADING", ""),
        "tensorrt": trt.__version__,
        "history": [],
        "done": False,
    }
    builder = trt.Builder(watch.logger)
    explicit = getattr(trt.NetworkDefinitionCreationFlag, "EXPLICIT_BATCH", None)  # always so from TensorRT 11 on
    network = builder.create_network(0 if explicit is None else 1 << int(explicit))
    runner._parse(watch, network, str(args.network), [])
    config = builder.create_builder_config()
    if hasattr(trt.BuilderFlag, "FP16"):
        config.set_flag(trt.BuilderFlag.FP16)
    config.clear_flag(trt.BuilderFlag.TF32)
    if args.level is not None:
        config.builder_optimization_level = args.level
    if args.threads:
        builder.max_threads = args.threads
    document["sources"] = [
        n for n, m in trt.TacticSource.__members__.items() if config.get_tactic_sources() >> int(m) & 1
    ]
    runner._choose_sources(watch, config, [c for c in args.tactic_sources.split(",") if c])
    profiles = {}
    for shape in args.shape:
        name, _, sizes = shape.partition(":")
        profiles[name] = [[int(size) for size in sizes.split("x")]] * 3
    runner._add_profile(builder, network, config, profiles)
    cache = config.create_timing_cache(args.timings.read_bytes() if args.timings and args.timings.is_file() else b"")
    document["timings"] = {"used": bool(config.set_timing_cache(cache, False)), "sizes": []}
    over = threading.Event()

    def tell() -> None:
        saved = time.monotonic()
        while not over.wait(PAUSE):
            state = watch.state()
            document.update(state)
            document["history"].append([state[key] for key in ("seconds", "layers", "kernels", "processor_seconds")])
            runner._write(args.out, json.dumps(document).encode())
            late = bool(args.seconds) and state["seconds"] > args.seconds
            if args.timings and (late or time.monotonic() - saved > args.every):
                saved = time.monotonic()
                data = bytes(config.get_timing_cache().serialize())
                runner._write(args.timings, data)
                document["timings"]["sizes"].append([state["seconds"], len(data), round(time.monotonic() - saved, 3)])
                runner._write(args.out, json.dumps(document).encode())
            if late:
                print(f"stopped after {state['seconds']} s: {state['layers']}, {state['kernels']} kernels", flush=True)
                os._exit(1)

    teller = threading.Thread(target=tell, daemon=True)
    teller.start()
    plan = builder.build_serialized_network(network, config)
    over.set()
    teller.join()
    document.update(watch.state(), done=plan is not None, errors=watch.errors, said=watch.said[:40])
    data = bytes(cache.serialize())
    document["timings"]["end"] = len(data)
    if args.timings:
        runner._write(args.timings, data)
    runner._write(args.out, json.dumps(document).encode())
    print(
        f"{args.out.name}: {document['seconds']} s, {document['kernels']} kernels, done: {document['done']}", flush=True
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("network", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--shape", action="append", default=[], help="INPUT:1x3x8x8 of a free input")
    parser.add_argument("--level", type=int)
    parser.add_argument("--threads", type=int, default=0, help="of the builder  [default: TensorRT's, one]")
    parser.add_argument("--tactic-sources", default="", help="as cpdebug takes them")
    parser.add_argument("--seconds", type=float, default=0.0, help="end after so many")
    parser.add_argument("--timings", type=Path, help="timing cache, read where it is there, written meanwhile")
    parser.add_argument("--every", type=float, default=15.0, help="seconds between two of its versions")
    build(parser.parse_args())


if __name__ == "__main__":
    main()
