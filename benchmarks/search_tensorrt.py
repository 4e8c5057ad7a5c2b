"""`cpdebug search` against Polygraphy's `debug precision`, on TensorRT: a CenterPoint with two FP16 overflow faults.

    CPDEBUG_TRT_PYTHON=PATH python benchmarks/search_tensorrt.py OUT --checkpoint W.pt --inputs frame.pcd.bin

Two convolutions of the backbone are multiplied by a power of two, so that their results are beyond FP16, and their only
readers are divided by it: the network is the same in FP32, bit by bit. What must stay FP32 are these four layers. Both
tools get the same ONNX file (torchscript exporter, opset 17), the same input, the same goal and a timing cache.
Polygraphy runs in the interpreter that has TensorRT; its check command runs the engine and compares its outputs, and
counts. ``OUT/search.json`` is rewritten after each tool; ``--seconds`` limits each mode of Polygraphy.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from faults.edits import Editor, rescale

from cp_debug.backends.arithmetic import FP32
from cp_debug.backends.base import Program
from cp_debug.backends.executor import Executor
from cp_debug.backends.registry import create
from cp_debug.backends.spec import parse_backends
from cp_debug.backends.tensorrt.client import RunnerClient
from cp_debug.backends.tensorrt.engine_runs import output_distance
from cp_debug.files import write_text
from cp_debug.graph.graph import Graph, Node
from cp_debug.mixed_precision.goal import Goal
from cp_debug.mixed_precision.search import MixedPrecisionOptions, search
from cp_debug.programs.pipeline import Export, prepare
from cp_debug.recipes.registry import load_model

LARGEST_HALF = 65504.0
BEYOND = 4.0
"""Times the largest FP16 number that the faulty results reach."""
POLYGRAPHY = "import sys; from polygraphy.tools import main; sys.argv[0] = 'polygraphy'; sys.exit(main())"


def make_faulty(args: argparse.Namespace, folder: Path) -> tuple[Path, dict[str, np.ndarray], dict[str, float]]:
    """The faulty ONNX file, its input, and node → factor of the layers at fault."""
    model = load_model(args.model, checkpoint=args.checkpoint)
    sample = next(iter(model.samples(1, 0, args.inputs)))
    programs = prepare(model, sample, folder, how=Export("torchscript", 17))
    results: dict[str, Mapping[str, np.ndarray]] = {}
    for component, program in zip(model.components, programs, strict=True):
        feed = model.feed(component, sample, results)
        largest: dict[str, float] = {}

        def keep(name: str, tensor: Any, largest: dict[str, float] = largest) -> None:
            largest[name] = float(tensor.abs().max())

        outputs = Executor(program.graph, FP32).run(feed, keep)
        results[component.name] = {name: tensor.numpy() for name, tensor in outputs.items()}
    pairs = scalable(program)
    pairs = [pair for pair in pairs if "backbone" in pair[1].name] or pairs
    rng = np.random.default_rng(args.seed)
    first, second = sorted(rng.choice(len(pairs) // 2, size=2, replace=False) * 2)  # no layer twice
    editor, struck = Editor(program.graph.path), {}
    for number in (first, second):
        node, reader = pairs[number]
        factor = 2.0 ** np.ceil(np.log2(BEYOND * LARGEST_HALF / largest[node.outputs[0]]))
        rescale(editor, node.outputs[0], reader.outputs[0], factor)
        struck |= {node.name: factor, reader.name: 1 / factor}
    return editor.save(folder / "faulty.onnx"), feed, struck


def scalable(program: Program) -> list[tuple[Node, Node]]:
    """Convolutions whose result goes through ReLUs only into one other convolution, in execution order."""
    graph, pairs = program.graph, []
    for node in graph.nodes:
        reader = node
        while reader.op in ("Conv", "Relu") and len(readers := graph.consumers.get(reader.outputs[0], [])) == 1:
            reader = readers[0]
            if reader.op == "Conv":
                break
        if node.op == reader.op == "Conv" and node is not reader:
            pairs.append((node, reader))
    return pairs


def run_search(path: Path, feed: Path, args: argparse.Namespace) -> dict[str, Any]:
    """What `cpdebug search` finds, in how many builds and seconds."""
    model, goal = load_model(str(path)), Goal.parse(f"rel_l2<{args.limit}")
    started = time.monotonic()
    backends = [create(spec) for spec in parse_backends(f"torch,{args.backend}")]
    samples = list(model.samples(1, 0, feed))
    result = search(model, backends, goal, samples, MixedPrecisionOptions(log=args.out / "search.jsonl"))
    document = result.to_dict()
    return {"wall_seconds": time.monotonic() - started, **document}


def run_polygraphy(path: Path, work: Path, golden: Path, mode: str, args: argparse.Namespace) -> dict[str, Any]:
    """What `debug precision` answers. ``layers``: of TensorRT's network, the first ones up to which it keeps FP32."""
    work.mkdir()
    python = os.environ.get("CPDEBUG_TRT_PYTHON", sys.executable)
    checks, cache = work / "checks.jsonl", str(work / "timing.cache")
    # Polygraphy's interpreter may have an environment of its own, which must not reach this one.
    own = ["env", "-u", "PYTHONHOME", "-u", "LD_LIBRARY_PATH", f"PYTHONPATH={environment()['PYTHONPATH']}"]
    check = [*own, sys.executable, str(Path(__file__).resolve()), "--check", str(golden), str(checks), str(args.limit)]
    command = [python, "-c", POLYGRAPHY, "debug", "precision", str(path), "--fp16", "--mode", mode,
               "--load-timing-cache", cache, "--save-timing-cache", cache, "--check", *check]  # fmt: skip
    started, stopped = time.monotonic(), False
    log = args.out / f"polygraphy-{mode}.log"
    with log.open("w") as stream:
        said_to: dict[str, Any] = {"stdout": stream, "stderr": subprocess.STDOUT}
        process = subprocess.Popen(command, cwd=work, env=environment(), start_new_session=True, **said_to)
        try:
            process.wait(args.seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # its check command, too
            process.wait()
            stopped = True
    said = log.read_text(errors="replace")
    answer = re.search(r"try running the first (\d+) layer", said)
    tried = [int(n) for n in re.findall(r"Selecting first (\d+) layer", said)]
    return {
        "wall_seconds": time.monotonic() - started,
        "builds": len(tried),
        "tried": tried,
        "checks": [json.loads(line) for line in checks.read_text().splitlines()] if checks.is_file() else [],
        "layers": int(answer[1]) if answer else None,
        "gave_up": "Could not find a configuration" in said,
        "stopped_at_limit": stopped,
        "status": process.returncode,
    }


def check(golden: Path, checks: Path, limit: float) -> int:
    """The check command: run the engine that lies here, compare, note it; 1 when it is too far off."""
    started = time.monotonic()
    with np.load(golden) as archive:
        feeds = {name.removeprefix("in:"): archive[name] for name in archive if name.startswith("in:")}
        expected = {name.removeprefix("out:"): archive[name] for name in archive if name.startswith("out:")}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = {value: str(folder / f"input-{i}.npy") for i, value in enumerate(feeds)}
        for value, file in files.items():
            np.save(file, feeds[value])
        step = {"command": "run", "device": 0, "engine": str(Path("polygraphy_debug.engine").resolve()),
                "inputs": files, "folder": str(folder / "run"), "names": sorted(expected), "listen": False,
                "repeat": 0}  # fmt: skip
        (ran,) = RunnerClient().execute([step])
        found = {entry["name"]: np.load(entry["file"]) for entry in ran["tensors"]}
    distance = output_distance(expected, found)
    with checks.open("a") as stream:
        noted = distance if np.isfinite(distance) else "Infinity"
        stream.write(json.dumps({"rel_l2": noted, "seconds": time.monotonic() - started}) + "\n")
    return int(not distance < limit)


def environment() -> dict[str, str]:
    """This one's, with the repository importable."""
    paths = [
        *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)),
        str(Path(__file__).resolve().parents[1]),
    ]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def summary(name: str, row: Mapping[str, Any]) -> str:
    """A line for the terminal."""
    if "verdict" in row:
        found = [layer["nodes"] for layer in row["kept"]]
        return f"{name}: {row['builds']} builds, {row['wall_seconds']:.0f} s: {row['verdict']}; {found}"
    if row["tried"] and not row["checks"]:
        return f"{name}: void, its check command never ran to the end"
    answer = f"the first {row['layers']} layers" if row["layers"] is not None else "no answer"
    return (
        f"{name}: {row['builds']} builds, {row['wall_seconds']:.0f} s: {answer} of {max(row['tried'], default=0)} tried"
    )


def main() -> None:
    if sys.argv[1:2] == ["--check"]:
        sys.exit(check(Path(sys.argv[2]), Path(sys.argv[3]), float(sys.argv[4])))
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path, help="folder for search.json, logs and the faulty model's trials")
    parser.add_argument("--model", default="centerpoint:nus-pillar02")
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--inputs", type=Path)
    parser.add_argument("--backend", default="trt-fp16")
    parser.add_argument("--limit", type=float, default=2e-2, help="relative L2 of the worst output")
    parser.add_argument("--seed", type=int, default=0, help="of the layers at fault")
    parser.add_argument("--seconds", type=float, default=200.0, help="limit of each mode of Polygraphy")
    parser.add_argument("--modes", default="bisect,linear", help="of Polygraphy; empty: leave it out")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    args.out = args.out.resolve()
    with tempfile.TemporaryDirectory(prefix="search-") as name:
        folder = Path(name)
        path, feed, struck = make_faulty(args, folder)
        inputs, golden = folder / "feed.npz", folder / "golden.npz"
        np.savez(inputs, **feed)
        outputs = {k: v.numpy() for k, v in Executor(Graph(path)).run(feed).items()}
        archive = {f"in:{k}": v for k, v in feed.items()} | {f"out:{k}": v for k, v in outputs.items()}
        np.savez(golden, **archive)
        document: dict[str, Any] = {"model": args.model, "faults": struck, "limit": args.limit, "seed": args.seed}
        print(f"faults: {struck}", flush=True)
        for tool in ("cpdebug", *filter(None, args.modes.split(","))):
            if tool == "cpdebug":
                document[tool] = run_search(path, inputs, args)
                told = {node for layer in document[tool]["kept"] for node in layer["nodes"]}
                document[tool]["found_all"] = told.issuperset(struck)
                document[tool]["layers_too_many"] = len(document[tool]["kept"]) - len(struck)
            else:
                document[tool] = run_polygraphy(path, folder / tool, golden, tool, args)
            write_text(json.dumps(document, indent=1), args.out / "search.json")
            print(summary(tool, document[tool]), flush=True)


if __name__ == "__main__":
    main()
