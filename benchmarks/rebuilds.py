"""Is an engine that is built again the same engine? Outputs, kernels and their ids, build by build.

    CPDEBUG_TRT_PYTHON=PATH python benchmarks/rebuilds.py OUT.json [--model net] [--spec trt-fp16] [--cold 3] [--warm 2]

``--cold`` builds time all kernels anew; ``--warm`` ones take the timings of one build, as `bisect` does. For each
component of static shapes and each pair of builds: the distance of their outputs (largest relative L2), layers whose
kernel has another name, and layers whose kernel has another id. The first engine also runs twice.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
from tensorrt_backends import make_net, reference_values

from cp_debug.backends.base import Program
from cp_debug.backends.registry import create
from cp_debug.backends.spec import BackendSpec
from cp_debug.backends.tensorrt.engine_runs import output_distance
from cp_debug.backends.tensorrt.inspector import EngineLayer, parse_layers
from cp_debug.files import write_text
from cp_debug.programs.pipeline import Export, Key, prepare
from cp_debug.recipes.registry import load_model

Ran = tuple[dict[str, np.ndarray], list[EngineLayer], float]
"""Outputs, layers, seconds of the build."""


def rebuild(program: Program, feed: Mapping[str, np.ndarray], spec: str, cold: int, warm: int) -> dict[str, Any]:
    """Build and run as often as said; every pair compared."""
    backend: Any = create(BackendSpec.parse(spec))
    with closing(backend.open(program)) as session, tempfile.TemporaryDirectory() as name:
        graph, settings = session.plain_build()
        folder = Path(name)
        inputs = {key: str(folder / f"{i}.npy") for i, key in enumerate(feed)}
        for key, path in inputs.items():
            np.save(path, feed[key])
        names = [f"cold {i}" for i in range(cold)] + [f"warm {i}" for i in range(warm)]
        steps: list[dict[str, Any]] = []
        for each in names:
            engine = str(folder / f"{each}.engine")
            cache = str(folder / "timing.cache") if each.startswith("warm") else None
            build = {"command": "build", "onnx": str(graph.path), "engine": engine, **settings, "timing_cache": cache}
            run = {"command": "run", "engine": engine, "inputs": inputs, "names": [v.name for v in graph.outputs]}
            steps += [build, {**run, "folder": str(folder / each)}]
        steps.append({**steps[1], "folder": str(folder / "again")})
        *results, again = backend.client.execute(steps)
        nodes = [node.name for node in graph.nodes]
        ran: dict[str, Ran] = {
            each: (outputs_of(ran_once), parse_layers(built["layers"], nodes), built["seconds"])
            for each, built, ran_once in zip(names, results[::2], results[1::2], strict=True)
        }
        pairs = [compare(a, b, ran) for a, b in itertools.combinations(names, 2)]
        same = output_distance(ran[names[0]][0], outputs_of(again))
    return {
        "component": program.name,
        "spec": spec,
        "build_seconds": {each: seconds for each, (_, _, seconds) in ran.items()},
        "same_engine_twice": same,
        "pairs": pairs,
    }


def outputs_of(result: Mapping[str, Any]) -> dict[str, np.ndarray]:
    return {entry["name"]: np.load(entry["file"]) for entry in result["tensors"]}


def compare(a: str, b: str, ran: Mapping[str, Ran]) -> dict[str, Any]:
    (x, first, _), (y, second, _) = ran[a], ran[b]
    others = {layer.nodes: layer for layer in second if layer.nodes}
    shared = [(layer, others[layer.nodes]) for layer in first if layer.nodes in others]
    return {
        "pair": [a, b],
        "distance": output_distance(x, y),
        "layers": len(shared),
        "fused_otherwise": sum(layer.nodes not in others for layer in first if layer.nodes),
        "other_kernel": {i.name: [i.tactic.name, j.tactic.name] for i, j in shared if i.tactic.name != j.tactic.name},
        "other_id": [i.name for i, j in shared if i.tactic.name == j.tactic.name and i.tactic_id != j.tactic_id],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", default="net")
    parser.add_argument("--spec", default="trt-fp16")
    parser.add_argument("--cold", type=int, default=3)
    parser.add_argument("--warm", type=int, default=2)
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = load_model(str(make_net(folder / "net.onnx")) if args.model == "net" else args.model)
        sample = next(iter(model.samples(1, 0, None)))
        programs = prepare(model, sample, folder, how=Export("torchscript", 17))
        reference = reference_values(model, programs, sample)
        for program in programs:
            if not all(isinstance(size, int) for v in program.graph.inputs for size in v.shape or ("",)):
                continue
            feed = {v.name: reference[Key(program.name, v.name)] for v in program.graph.inputs}
            rows.append(rebuild(program, feed, args.spec, args.cold, args.warm))
            write_text(json.dumps(rows, indent=1), args.out)
            for pair in rows[-1]["pairs"]:
                print(f"{program.name}: {json.dumps(pair)[:300]}", flush=True)


if __name__ == "__main__":
    main()
