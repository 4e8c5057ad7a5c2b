"""Predicted from the input alone: what an emulated run says that each layer introduces ÷ what it introduced elsewhere.

    cpdebug bisect MODEL -b torch,emu-int8 --save SAVED       # here, without the other backend
    cpdebug bisect MODEL -b torch,trt-int8 --json real.json   # there
    python benchmarks/predicted_from_input.py SAVED real.json [--json FILE]

Both runs start from the same input; the emulated one has never seen the other's tensors. A layer is what the other run
could tell apart: the nodes between two values that it shows, with a product among them, that are computed in the
precision of its backend.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cp_debug.backends.arithmetic import FP32
from cp_debug.backends.determinism import deterministic
from cp_debug.backends.executor import Executor
from cp_debug.files import write_text
from cp_debug.graph.graph import Graph
from cp_debug.graph.operators import PRODUCTS
from cp_debug.probes.capture import Capture

WITHIN = (0.8, 1.25)


def compared(saved: Path, backend: str, rows: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """A row for each layer of ``rows`` whose error its precision dominates; ``rows`` are those of the other run."""
    capture = Capture.open(saved / "sample-0" / backend)
    for component in dict.fromkeys(row["component"] for row in rows):
        own = [row for row in rows if row["component"] == component]
        graph = Graph(saved / f"{component}.onnx")
        exact = Executor(graph, FP32)
        shown = {row["onnx"] for row in own} | {value.name for value in graph.inputs}
        for row in own:
            if row["onnx"] not in graph.producer or not row["introduced"]:
                continue
            nodes, starts = graph.segment([row["onnx"]], shown)
            if not any(node.op in PRODUCTS for node in nodes):
                continue
            given = {name: np.array(capture.load(name, component=component)) for name in starts}
            real = exact.run_nodes(nodes, given, [row["onnx"]])[row["onnx"]].double()
            found = torch.from_numpy(np.array(capture.load(row["onnx"], component=component))).double()
            predicted = float((found - real).norm() / real.norm())
            yield {
                "layer": row["name"],
                "ops": "+".join(node.op for node in nodes),
                "tactic": row["tactic"],
                "predicted": predicted,
                "introduced": row["introduced"],
                "ratio": predicted / row["introduced"],
            }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("saved", type=Path, help="of `cpdebug bisect … --save`, with the emulated backend")
    parser.add_argument("real", type=Path, help="of `cpdebug bisect … --json`, with the real one")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    (emulated,) = json.loads((args.saved / "result.json").read_text())["tests"]
    (real,) = json.loads(args.real.read_text())["tests"]
    with deterministic(), torch.no_grad():
        layers = list(compared(args.saved, emulated["backend"], real["layers"]))
    for layer in layers:
        print(
            "{layer:44.44} {ops:40.40} predicted {predicted:.3e} introduced {introduced:.3e} {ratio:.3f}".format(
                **layer
            )
        )
    within = sum(WITHIN[0] <= layer["ratio"] <= WITHIN[1] for layer in layers)
    summary = {"emulated": emulated["backend"], "real": real["backend"], "layers": len(layers), "within": within}
    print(json.dumps(summary))
    if args.json:
        write_text(json.dumps({**summary, "rows": layers}, indent=1), args.json)


if __name__ == "__main__":
    main()
