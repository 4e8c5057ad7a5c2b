"""``torch-fp8`` on a device against its emulation: products of random networks, and what ``bisect`` says of them.

    python benchmarks/fp8_products.py --device cuda --json FILE

Every product of networks of ``narrow_networks.py`` (linear layers, products of attention, convolutions as products) is
computed from the values that the device itself gave it: the share of bit-identical elements, and the distance from the
emulation as a share of what FP8 introduces. Then whole runs: a healthy one has no guilty layer, and sums of one sign
with fast accumulation must be told.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from narrow_networks import JUDGED, TUNED, build

from cp_debug.backends.arithmetic import ARITHMETICS, FP64
from cp_debug.backends.base import Program
from cp_debug.backends.executor import Executor
from cp_debug.backends.registry import create
from cp_debug.backends.spec import BackendSpec
from cp_debug.bisect.engine import bisect
from cp_debug.graph.graph import Graph
from cp_debug.graph.made_up import MadeUp
from cp_debug.graph.operators import PRODUCTS

OPTIONS = ("dynamic", "dynamic:fast", "channel", "channel:fast", "block", "")


def products(path: Path, spec: str) -> list[dict[str, Any]]:
    """One entry for each product of a network."""
    graph = Graph(path)
    backend: Any = create(BackendSpec.parse(spec))
    shown: dict[str, torch.Tensor] = {}
    inputs = MadeUp(graph).sample([0, 0])
    session = backend.open(Program("net", graph))
    session.run(inputs, lambda name, value: shown.update({name: torch.as_tensor(value).cpu()}))
    values = {n: torch.from_numpy(a) for n, a in inputs.items()} | shown
    found = []
    for node in graph.nodes:
        if node.op not in PRODUCTS:
            continue
        target = node.outputs[0]
        given = {n: values[n] for n in node.inputs if n in values}
        arithmetic = ARITHMETICS[backend.precision]
        emulated, exact = (
            Executor(graph, a).run_nodes([node], given, [target])[target].double() for a in (arithmetic, FP64)
        )
        ours = values[target].double()
        introduced = float((ours - exact).norm())
        found.append(
            {
                "spec": spec, "network": path.stem, "node": node.name, "op": node.op, "shape": list(ours.shape),
                "identical": float((ours == emulated).double().mean()),
                "residual": float((ours - emulated).norm()) / introduced if introduced else 0.0,
                "error": introduced / float(exact.norm()),
            }
        )  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--networks", type=int, default=3, help="of each family")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    report: dict[str, Any] = {"device": options.device, "torch": str(torch.__version__), "products": [], "runs": []}
    if options.device != "cpu":
        report["device"] = torch.cuda.get_device_name(options.device)
    with tempfile.TemporaryDirectory() as folder:
        nets = [
            build(Path(folder) / f"{name}{seed}.onnx", family, seed)[0]
            for name, family in JUDGED.items()
            for seed in range(options.networks)
        ]
        for option in OPTIONS:
            spec = "torch-fp8" + (f":{option}" if option else "") + f"@{options.device}"
            for path in nets if option else nets[:0]:
                report["products"] += products(path, spec)
            mine = [p for p in report["products"] if p["spec"] == spec]
            if mine:
                same = [p["identical"] for p in mine]
                print(
                    f"{spec}: {len(mine)} products, {sum(s == 1 for s in same)} identical, mean {np.mean(same):.4%}, "
                    f"least {min(same):.4%}, largest residual {max(p['residual'] for p in mine):.3g}"
                )
            for path in nets[:: options.networks]:
                test = bisect(str(path), f"emu-fp32,{spec}").tests[0]
                run = {"spec": spec, "network": path.stem, "guilty": [f"{r.name}: {r.why}" for r in test.guilty]}
                run["findings"] = [f"{f.cause} {f.layers}: {f.says}" for f in test.findings]
                report["runs"].append(run)
                print(run)
        path, node = build(Path(folder) / "one_sign.onnx", TUNED["perceptron"], 1, "one sign")
        for option in ("dynamic:fast", "dynamic"):
            test = bisect(str(path), f"emu-fp32,torch-fp8:{option}@{options.device}").tests[0]
            said = {"spec": option, "network": f"one sign at {node}", "guilty": [r.name for r in test.guilty]}
            said["findings"] = [f"{f.cause} {f.layers}: {f.says} | {f.fix}" for f in test.findings]
            report["runs"].append(said)
            print(said)
    if options.json:
        options.json.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
