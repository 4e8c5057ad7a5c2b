"""Seven ratios that say whether a bisect became slower: most are its time over that of its own runs, or of another
tool, in turns in one run. Less is faster.

    make speed                                    # 6 minutes; exit 1 where a median is 1.2 times the committed one
    python benchmarks/speed.py --write            # measure, and write docs/data/speed.json
    python benchmarks/speed.py --only fp16 small  # some of them

``two-files``: the whole command on two plain files, over Polygraphy's two runs that compare all values (processes).
``fp32``, ``fp16``, ``int8``: SECOND at 128 × 128, ``ort,ort-all``, ``ort,emu-fp16``, and its file in INT8 by
``quantize_static`` as ``ort,ort-all``, over running both backends once with every probe. ``module``: the built-in
CenterPoint, ``torch,ort``, its exports kept, over both runs. ``small``: a network of ten nodes, over importing torch
(processes). ``growth``: two files of 4,000 nodes over two of 400, once: 10 where a node costs the same in both. The
committed figures name their machine.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

KEPT = Path(__file__).resolve().parents[1] / "docs" / "data" / "speed.json"
SLOWER = 1.2
"""Times the committed median from which a ratio counts as a regression."""
ROUNDS = 5

Sides = tuple[Callable[[], Any], list[Callable[[], Any]]]
"""What is measured, and by the sum of what it is divided."""


def of_command(folder: Path, model: Path, *more: str) -> Callable[[], None]:
    """``cpdebug bisect`` in a process of its own."""
    from whole_bisect import measure

    command = [sys.executable, "-m", "cp_debug", "bisect", str(model), *more, "--json", str(folder / "result.json")]
    return lambda: (measure(command), None)[1]


def whole_and_runs(*given: Any) -> Sides:
    """A bisect in this process, and both runs with every probe."""
    from localise_cost import bisect_and_runs

    whole, *runs = bisect_and_runs(*given)
    return whole, runs


def two_files(folder: Path) -> Sides:
    """The whole question on two files, and Polygraphy's way to compare all values."""
    from whole_bisect import make_models, measure, with_polygraphy

    reference, test = make_models(folder, 128)
    ours = of_command(folder, reference, "--test-model", str(test), "-b", "ort,ort-none@cpu")
    return ours, [lambda: measure(*with_polygraphy(folder, reference, test))]


def small(folder: Path) -> Sides:
    """Ten nodes in a cold process, and importing torch."""
    from whole_bisect import measure

    from tests.nets import NetBuilder

    net, x = NetBuilder(0), "x"
    for _ in range(5):
        x = net.op("Relu", net.conv(x, 8, 8))
    model = net.save(folder / "small.onnx", {"x": (1, [1, 8, 16, 16])}, [x])
    return of_command(folder, model, "-b", "ort,ort-all"), [lambda: measure([sys.executable, "-c", "import torch"])]


def in_process(backends: str, oracle: str, folder: Path) -> Sides:
    """A bisect of SECOND, and running both backends once."""
    from random_graphs import second_net

    from cp_debug.recipes.onnx_file import OnnxFileModel

    return whole_and_runs(OnnxFileModel(second_net(folder / "second.onnx", 128)), backends, oracle, folder)


def int8(folder: Path) -> Sides:
    """A bisect of a file with Q/DQ pairs on an optimizing runtime, and running both backends once."""
    import numpy as np
    from random_graphs import second_net
    from wild.variants import static

    from cp_debug.recipes.onnx_file import OnnxFileModel

    sample = {"x": np.random.default_rng(0).standard_normal((1, 64, 128, 128)).astype(np.float32)}
    static(second_net(folder / "second.onnx", 128), folder / "int8.onnx", sample)
    return whole_and_runs(OnnxFileModel(folder / "int8.onnx"), "ort,ort-all", "fp64", folder)


def module(folder: Path) -> Sides:
    """A bisect of torch modules against their export, and running both once."""

    from cp_debug.recipes.registry import load_model

    return whole_and_runs(load_model("centerpoint:tiny"), "torch,ort", "fp64", folder)


def growth(folder: Path) -> Sides:
    """Two files of 4,000 nodes, and of 400."""
    from scale import many_nodes

    from cp_debug.bisect.engine import bisect
    from cp_debug.recipes.onnx_file import OnnxFileModel

    def of(count: int) -> Callable[[], Any]:
        paths = folder / f"{count}.onnx", folder / f"{count}-other.onnx"
        for path, factor in zip(paths, (1.0, 1.01), strict=True):
            many_nodes(path, count, factor)
        reference, test = map(OnnxFileModel, paths)
        return lambda: bisect(reference, "ort", test_model=test)

    return of(4000), [of(400)]


RATIOS: dict[str, Callable[[Path], Sides]] = {
    "two-files": two_files,
    "fp32": partial(in_process, "ort,ort-all", "fp64"),
    "fp16": partial(in_process, "ort,emu-fp16", "fp32"),
    "int8": int8,
    "module": module,
    "small": small,
    "growth": growth,
}


def measured(names: list[str]) -> Iterator[tuple[str, list[float]]]:
    """(Name, ratio of each round in order of size). The first round of both sides, which loads and compiles, is left
    out."""
    for name in names:
        with tempfile.TemporaryDirectory(prefix="speed-") as folder:
            ours, theirs = RATIOS[name](Path(folder))
            count = 1 if name == "growth" else ROUNDS
            rounds = [_seconds(ours) / _seconds(*theirs) for _ in range(count + 1)][1:]
        yield name, sorted(round(ratio, 3) for ratio in rounds)


def _seconds(*runs: Callable[[], Any]) -> float:
    start = time.perf_counter()
    for run in runs:
        run()
    return time.perf_counter() - start


def main() -> None:
    """Measure, print a line for each ratio, exit 1 where one is slower than the committed one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[*RATIOS], choices=RATIOS)
    parser.add_argument("--write", action="store_true", help="write what was measured to docs/data/speed.json")
    options = parser.parse_args()
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # code is compiled once, as it is for users
    kept = json.loads(KEPT.read_text(encoding="utf-8")) if KEPT.is_file() else {"ratios": {}}
    print(f"{'':<12}{'median':>8}{'rounds':>16}{'committed':>12}")
    slower = []
    for name, rounds in measured(options.only):
        median, before = statistics.median(rounds), kept["ratios"].get(name, {}).get("median")
        if before is not None and median > SLOWER * before:
            slower.append(name)
        spread = f"{rounds[0]:.2f} to {rounds[-1]:.2f}"
        committed = "" if before is None else f"{before:.2f}"
        print(f"{name:<12}{median:>8.2f}{spread:>16}{committed:>12}{'  slower' * (name in slower)}", flush=True)
        if options.write:
            kept["ratios"][name] = {"median": median, "rounds": rounds}
    if options.write:
        import onnxruntime
        import torch

        kept |= {"machine": _machine(), "torch": str(torch.__version__), "onnxruntime": onnxruntime.__version__}
        kept |= {"threads": torch.get_num_threads(), "command": "python benchmarks/speed.py --write"}
        KEPT.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    sys.exit(bool(slower) and not options.write)


def _machine() -> str:
    names = [n for n in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if n.startswith("model name")]
    return names[0].partition(": ")[2] if names else platform.processor()


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    main()
