"""INT8: are healthy layers explained, and bad scales found? Random networks, quantized on random inputs.

Healthy cases are calibrated on 8 inputs, that which is bisected among them, by one of the methods in turn (not entropy,
which clips too much at times: two layers in 20 networks): no layer may be guilty. In faulty ones the scale of one
layer, drawn among those that are quantized, is divided by 8 (clips), multiplied by 16 (coarse), or its weights get one
scale for all channels after they were spread over a factor of 100: exactly that layer must be guilty.

    python benchmarks/localise_int8.py              # 40 healthy and 40 faulty cases
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
from pathlib import Path

import numpy as np
import onnx
from random_graphs import FAMILIES, build
from rich.console import Console
from rich.table import Table

from cp_debug.backends.executor import Executor
from cp_debug.bisect.engine import Options, bisect
from cp_debug.bisect.result import TestResult
from cp_debug.graph.graph import Graph
from cp_debug.graph.qdq import insert_qdq, quantizable, weight_axis
from cp_debug.quantization.onnx_ptq import GraphCalibration
from cp_debug.quantization.quantized_programs import Calibration
from cp_debug.recipes.registry import load_model

METHODS = ("max", "percentile", "mse")
FAULTS = {"int8-clipped": 1 / 8, "int8-coarse": 16.0, "int8-per-tensor": 1.0}


def healthy(seed: int, folder: Path) -> tuple[str, TestResult]:
    """The family of a network, and what was found in it."""
    family, method = list(FAMILIES)[seed % len(FAMILIES)], METHODS[seed // len(FAMILIES) % len(METHODS)]
    path = build(folder / f"healthy{seed}.onnx", family, seed)
    inputs = folder / f"inputs{seed}"
    inputs.mkdir()
    for index, sample in enumerate(load_model(str(path)).samples(8, seed, None)):
        np.savez(inputs / f"{index}.npz", **sample.arrays)
    options = Options(explain=False, inputs=inputs, calibration=Calibration(method=method))
    return f"{family}, {method}", bisect(str(path), "ort,ort-int8", options=options).tests[0]


def faulty(seed: int, folder: Path) -> tuple[str, str, list[str], list[str]]:
    """(Fault, the layer that has it, guilty layers, causes found for that layer)."""
    path = build(folder / f"faulty{seed}.onnx", list(FAMILIES)[seed % len(FAMILIES)], seed)
    kind, rng = list(FAULTS)[seed // len(FAMILIES) % len(FAULTS)], np.random.default_rng(seed)
    if kind == "int8-per-tensor":
        _spread(path)
    graph = Graph(path)
    calibration, executor = GraphCalibration(graph, "mse"), Executor(graph)
    for sample in load_model(str(path)).samples(8, 0, None):
        calibration.run(executor, sample.arrays)
    scales = calibration.scales()
    wide = [name for name, layer in scales.layers.items() if len(layer.weight) > 3]
    name = str(rng.choice(wide))
    layer = scales.layers[name]
    weight = layer.weight.max(keepdims=True) if kind == "int8-per-tensor" else layer.weight
    bad = {**scales.layers, name: dataclasses.replace(layer, input=layer.input * FAULTS[kind], weight=weight)}
    test = insert_qdq(graph, bad, folder / f"int8-{seed}.onnx", scales.residual_adds)
    found = bisect(str(path), "ort,ort-int8", test_model=test).tests[0]
    guilty = {row.name: graph.producer[row.onnx].name for row in found.guilty}
    causes = [f.cause for f in found.findings if name in {guilty.get(layer) for layer in f.layers}]
    return kind, name, list(guilty.values()), causes


def _spread(path: Path) -> None:
    """Give the output channels of every layer very different sizes."""
    graph, proto = Graph(path), onnx.load(path)
    readers = {name: node for node in quantizable(graph) for name in node.proto.input[1:]}
    for weight in proto.graph.initializer:
        if node := readers.get(weight.name):
            array = onnx.numpy_helper.to_array(weight)
            shape = [1] * array.ndim
            shape[weight_axis(node, array.ndim) if weight.name == node.proto.input[1] else 0] = -1
            factors = np.geomspace(1 / 100, 1, array.shape[shape.index(-1)], dtype=np.float32)
            weight.CopyFrom(onnx.numpy_helper.from_array(array * factors.reshape(shape), weight.name))
    onnx.save(proto, path)


def main() -> None:
    """Run the cases, print what was found, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=40, help="healthy and faulty ones each")
    parser.add_argument("--seed", type=int, default=0, help="of the first case")
    parser.add_argument("--json", type=Path, help="write everything here")
    options = parser.parse_args()
    console = Console()
    figures: dict[str, list[float]] = {"excess": [], "channel_excess": [], "agreement, dB": []}
    wrong: list[str] = []
    with tempfile.TemporaryDirectory(prefix="localise-int8-") as name:
        for seed in range(options.seed, options.seed + options.cases):
            about, result = healthy(seed, Path(name))
            wrong += [f"healthy {seed} ({about}): {row.name}: {row.why}" for row in result.guilty]
            replays = [row.replay for row in result.rows if row.replay and row.replay.step is not None]
            figures["excess"] += [r.excess for r in replays if r.excess is not None]
            figures["channel_excess"] += [r.channel_excess for r in replays if r.channel_excess]
            figures["agreement, dB"] += [
                -20 * float(np.log10(max(r.deviation_from_scales or 0.0, 1e-8))) for r in replays
            ]
        silent, found = not wrong, []
        for seed in range(options.seed, options.seed + options.cases):
            kind, layer, guilty, causes = faulty(seed, Path(name))
            found.append({"seed": seed, "kind": kind, "layer": layer, "guilty": guilty, "causes": causes})
            if guilty != [layer] or kind not in causes:
                wrong.append(f"faulty {seed} ({kind} at {layer}): guilty {guilty}, causes {causes}")
    table = Table("healthy layers in INT8", "n", "least", "median", "99 %", "largest", box=None)
    for title, values in figures.items():
        table.add_row(title, str(len(values)), *(f"{v:.2f}" for v in np.percentile(values, (0, 50, 99, 100))))
    console.print(table)
    for kind in FAULTS:
        own = [f for f in found if f["kind"] == kind]
        right = sum(f["guilty"] == [f["layer"]] for f in own)
        named = sum(kind in f["causes"] for f in own)
        console.print(f"{kind}: {right} of {len(own)} exactly right, {named} named")
    console.print(f"healthy networks {'silent' if silent else 'not silent'}")
    for line in wrong:
        console.print(line, style="red")
    if options.json:
        options.json.write_text(json.dumps({"healthy": figures, "faulty": found, "wrong": wrong}))


if __name__ == "__main__":
    main()
