"""Predicted against real: what emulation says that each layer of an engine computes, against what the engine computed.

    cpdebug bisect MODEL -b torch,trt-fp16 --save SAVED
    python benchmarks/predicted.py SAVED --backend trt-fp16 [--device cuda] [--json FILE] [--crops FILE.npz]

Two questions. *On the engine's own tensors*: each fused group is emulated from the inputs that the engine handed out,
in the arithmetic that its kernel's name tells, FP16 accumulation in every order known. Where an engine has no value of
the graph between several products (heads merged into one kernel, a neck that writes into a common tensor), they are
emulated together, each in the arithmetic of its own kernel. *From the model's input alone*:
the whole network is emulated before there is an engine, and the error that each layer introduces there is divided by
the one that it introduced on the engine.

``--crops`` keeps a window of each layer's input and output with its weights, for looking for orders elsewhere.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cp_debug.backends.arithmetic import ARITHMETICS, FP16, FP16ACC, FP32, TF32_CUT, TF32_DECONV, Arithmetic
from cp_debug.backends.determinism import deterministic
from cp_debug.backends.executor import Executor
from cp_debug.backends.kernels.fp16_accumulation import with_epilogue
from cp_debug.backends.tensorrt.inspector import Tactic, decode
from cp_debug.graph.graph import Graph, Node
from cp_debug.graph.operators import PRODUCTS
from cp_debug.probes.capture import Capture
from cp_debug.programs.batchnorm_folding import fold_in_file
from cp_debug.programs.pipeline import settings_by_component

TILES = (64, 32, 128, 16, 1 << 20)
"""Channels per tile to try; the last one is more than any layer has: kernel taps outermost."""
FITS = 0.99
NETWORK = {"trt-fp16": "fp16acc", "trt-tf32": "tf32", "trt-fp32": "fp32", "trt-int8": "int8"}
WINDOW = 24
ROWS = 64
"""Rows, and columns, of a product that are kept."""


@dataclass
class Layer:
    """One fused group. Norms are relative to the exact result's."""

    component: str
    value: str
    ops: str
    shape: tuple[int, ...]
    kernel: tuple[int, ...]
    stride: int
    reduction: int
    tactic: str
    told: str | None
    """The arithmetic that the tactic's name tells."""
    introduced: float = 0.0
    fit: str = ""
    """The arithmetic (and tile) that reproduces it best."""
    order: str = ""
    """``told``: that is the one which the kernel's name tells; ``fitted``: another one was found by trying."""
    told_identical: float | None = None
    """``identical`` with the arithmetic that the name tells; None where it tells none."""
    identical: float = 0.0
    """Share of elements that are equal bit for bit."""
    residual: float = 1.0
    """‖engine − emulated‖ ÷ ‖engine − exact‖."""
    cosine: float = 0.0
    """Of the two error vectors."""
    ratio: float = 0.0
    """Norm of the emulated error ÷ that of the engine's."""
    from_input: float | None = None
    """The same ratio when the whole network was emulated from its input."""


def told_by(tactic: Tactic, dtype: str = "") -> Arithmetic:
    """The arithmetic of a kernel: by its name, or else by the type that it writes."""
    if tactic.arithmetic == "fp16acc":
        if not tactic.tile:
            return FP16ACC
        told = replace(FP16ACC, tile=tactic.tile[2], slices=tactic.slices, vector=tactic.vector)
        return replace(told, split=tactic.split, split_kernels=tactic.split_kernels)
    if tactic.arithmetic == "tf32" and "deconv" in tactic.name:
        return TF32_DECONV
    if tactic.arithmetic == "tf32" and "wo_smem" in tactic.name:
        return TF32_CUT
    return ARITHMETICS[tactic.arithmetic or {"Half": "fp16", "BF16": "bf16"}.get(dtype, "fp32")]


def label(arithmetic: Arithmetic) -> str:
    """``fp16acc/64÷2``: channels per tile, and partial sums that share it."""
    if arithmetic is TF32_DECONV:
        return "tf32, weights cut off"
    if arithmetic is TF32_CUT:
        return "tf32, cut off"
    if arithmetic.tile is None:
        return arithmetic.name
    if arithmetic.vector:
        return f"{arithmetic.name}/v{arithmetic.vector}"
    tile = "all" if arithmetic.tile > 4096 else str(arithmetic.tile)
    shared = f"÷{arithmetic.slices}" if arithmetic.slices > 1 else ""
    return f"{arithmetic.name}/{tile}{shared}" + (f" split {arithmetic.split}" if arithmetic.split > 1 else "")


def candidates(tactic: Tactic) -> Iterator[Arithmetic]:
    """Arithmetics to try for one product, the one that the tactic tells first."""
    told = told_by(tactic)
    orders = [(tile, slices) for slices in (1, 2) for tile in TILES if slices == 1 or tile <= 128]
    accumulated = [replace(FP16ACC, tile=tile, slices=slices) for tile, slices in orders]
    accumulated += [replace(FP16ACC, vector=vector) for vector in (8, 4)]
    if tactic.arithmetic:
        yield told
    if tactic.arithmetic in ("fp16acc", None):
        yield from (a for a in accumulated if a != told)
    yield from (a for a in (ARITHMETICS[name] for name in ("fp16", "tf32", "fp32")) if a != told)


class Bench:
    """One component of one saved backend."""

    def __init__(
        self, capture: Capture, component: str, source: Path, layers: Sequence[Mapping[str, Any]], device: str
    ) -> None:
        self.capture, self.component, self.device = capture, component, device
        self.kernels = {
            node: (decode(layer["tactic"]), next(iter(layer["outputs"].values()), ""))
            for layer in layers
            for node in layer["nodes"]
        }
        self.graph = fold_in_file(Graph(source), source.with_suffix(".folded.onnx"))
        self.known = [n for n in self.capture.names(component=component) if n in self.graph.producer]
        self.inputs = {v.name: self.load(v.name) for v in self.graph.inputs}
        self.exact = Executor(self.graph, ARITHMETICS["fp64"] if device != "cpu" else FP32, device)

    def load(self, name: str) -> np.ndarray:
        return np.array(self.capture.load(name, component=self.component))

    def groups(self) -> Iterator[tuple[str, list[Node], list[str], list[Node]]]:
        """(value, nodes, starts, products) of everything with products between two values that the engine shows."""
        for value in self.known:
            nodes, starts = self.graph.segment([value], self.known)
            if products := [n for n in nodes if n.op in PRODUCTS]:
                yield value, nodes, starts, products

    def kernel(self, node: Node) -> tuple[Tactic, str]:
        """The kernel of a node, and the type that it writes."""
        return self.kernels.get(node.name, (decode(""), ""))

    def ways(self, nodes: list[Node], products: list[Node]) -> Iterator[tuple[str, Executor]]:
        """(name, executor) of every way to emulate a group."""
        if len(products) == 1:
            for arithmetic in candidates(self.kernel(products[0])[0]):
                yield label(arithmetic), Executor(self.graph, arithmetic, self.device)
            return
        told = {n.name: told_by(*self.kernel(n)) for n in nodes if n.name in self.kernels}
        half = any(a.value is FP16.value for a in told.values())
        base = FP16 if half else FP32  # of what joins the kernels' results
        name = " + ".join(dict.fromkeys(label(told[n.name]) for n in products if n.name in told))
        yield name, Executor(self.graph, base, self.device, overrides=told)
        for tile in TILES if half else ():
            other = {n: replace(a, tile=tile, slices=1) if a.tile else a for n, a in told.items()}
            yield f"all tiles {tile}", Executor(self.graph, base, self.device, overrides=other)

    def layers(self, network: str | None) -> Iterator[tuple[Layer, list[Node], list[str]]]:
        """Every group, fitted; ``network`` is the arithmetic in which the whole network is emulated."""
        predicted = {} if network is None else self.predict(ARITHMETICS[network])
        for value, nodes, starts, products in self.groups():
            product, tactics = products[0], [self.kernel(n)[0] for n in products]
            constant = product.proto.input[1] in self.graph.initializers
            dims = tuple(self.graph.weight(product.proto.input[1]).dims) if constant else ()
            length = int(np.prod(dims[1:])) if product.op == "Conv" else next(iter(dims), 0)
            attributes = {a.name: list(a.ints) for a in product.proto.attribute}
            told = list(dict.fromkeys(t.arithmetic or "?" for t in tactics))
            layer = Layer(
                self.component, value, "+".join(n.op for n in nodes), (), dims[2:],
                (attributes.get("strides") or [1])[0], length, " | ".join(dict.fromkeys(t.name for t in tactics)),
                " + ".join(told),
            )  # fmt: skip
            given = {s: self.load(s) for s in starts}
            self.fit(layer, nodes, value, given, products)
            if value in predicted and all(s in predicted for s in starts) and told == [network]:
                own = self.norms(nodes, value, {s: predicted[s] for s in starts}, predicted[value])
                layer.from_input = own / layer.introduced if layer.introduced else None
            yield layer, nodes, starts

    def fit(self, layer: Layer, nodes: list[Node], value: str, given: Mapping[str, Any], products: list[Node]) -> None:
        """Find the arithmetic that reproduces the group best, by residual."""
        exact = self.exact.run_nodes(nodes, given, [value])[value].double()
        real = torch.from_numpy(self.load(value)).to(self.device).double()
        layer.shape, scale, error = tuple(real.shape), float(exact.norm()), real - exact
        layer.introduced = float(error.norm()) / scale
        if not error.any():
            layer.fit, layer.order, layer.identical, layer.residual = "exact", "told", 1.0, 0.0
            return
        named = all(self.kernel(n)[0].arithmetic for n in products)
        tactics = {self.kernel(n)[0].arithmetic for n in products}
        direct = any(self.kernel(n)[0].vector for n in products)
        order, biases = (nodes, {})
        if tactics == {"fp16acc"}:
            order, biases = with_epilogue(self.graph, nodes, given, bias_first=direct)
        for place, (name, executor) in enumerate(self.ways(nodes, products)):
            emulated = executor.run_nodes(order, {**given, **biases}, [value])[value].double()
            residual = float((real - emulated).norm() / error.norm())
            if named and place == 0:
                layer.told_identical = float((real == emulated).double().mean())
            if not layer.fit or residual < layer.residual:
                other = emulated - exact
                layer.fit, layer.residual = name, residual
                layer.order = "told" if named and place == 0 else "fitted"
                layer.identical = float((real == emulated).double().mean())
                layer.ratio = float(other.norm() / error.norm())
                layer.cosine = float(torch.nn.functional.cosine_similarity(other.flatten(), error.flatten(), 0))
            if layer.identical > FITS:
                return

    def predict(self, arithmetic: Arithmetic) -> dict[str, Tensor]:
        """The known values and inputs when the whole component is emulated."""
        values: dict[str, Tensor] = {k: torch.from_numpy(v) for k, v in self.inputs.items()}
        executor = Executor(self.graph, arithmetic, self.device)
        executor.run(self.inputs, lambda name, tensor: values.update({name: tensor.clone().cpu()}), self.known)
        return values

    def norms(self, nodes: list[Node], value: str, given: Mapping[str, Any], result: Tensor) -> float:
        """Relative norm of what a group introduced into ``result``."""
        exact = self.exact.run_nodes(nodes, given, [value])[value].double()
        return float((result.to(self.device).double() - exact).norm() / exact.norm())

    def crop(self, layer: Layer, nodes: list[Node], starts: list[str]) -> dict[str, np.ndarray]:
        """A window of one input and the output, around the output's largest value, without padding; FP16 weights."""
        product, *others = (n for n in nodes if n.op in PRODUCTS)
        if not others and product.op == "MatMul":
            return self.crop_product(layer, product, nodes, starts)
        if others or len(starts) != 1 or product.op not in ("Conv", "ConvTranspose"):
            return {}
        attributes = {a.name: list(a.ints) for a in product.proto.attribute}
        x, y = self.load(starts[0]), self.load(layer.value)
        place = np.unravel_index(int(np.abs(y).sum(1)[0].argmax()), y.shape[2:])
        kernel, stride, pad = layer.kernel[0], layer.stride, (attributes.get("pads") or [0])[0]
        window, transposed = min(WINDOW, y.shape[2] // 2), product.op == "ConvTranspose"
        cut_x, cut_y = [], []
        for p, size in zip(place, y.shape[2:], strict=True):
            first = int(np.clip(p - window // 2, 1, size - window - 1))
            if transposed:
                first -= first % stride
                cut_x.append(slice(first // stride, (first + window) // stride))
            else:
                cut_x.append(slice(first * stride - pad, (first + window - 1) * stride - pad + kernel))
            cut_y.append(slice(first, first + window))
        named = {"x": x[0][(slice(None), *cut_x)], "y": y[0][(slice(None), *cut_y)]}
        for key, name in zip("wb", product.proto.input[1:], strict=False):
            named[key] = self.graph.initializer(name).astype(np.float16)
        return named

    def crop_product(self, layer: Layer, product: Node, nodes: list[Node], starts: list[str]) -> dict[str, np.ndarray]:
        """Rows and columns of the first of the matrices that a MatMul multiplies, with what it gave."""
        given = {s: self.load(s) for s in starts}
        known = {**given, **{n: self.graph.initializer(n) for n in product.inputs if n in self.graph.initializers}}
        made = self.exact.run_nodes(nodes, given, [n for n in product.inputs if n not in known])
        a, b = (known[n] if n in known else made[n].cpu().numpy() for n in product.inputs)
        y = self.load(layer.value)
        if y.shape[-2:] != (a.shape[-2], b.shape[-1]):
            return {}
        a, b, y = (array.reshape(-1, *array.shape[-2:])[0] for array in (a, b, y))
        named = {"x": a[:ROWS].astype(np.float16), "w": b[:, :ROWS].astype(np.float16), "y": y[:ROWS, :ROWS]}
        added = [n for node in nodes if node.op == "Add" for n in node.inputs if n in self.graph.initializers]
        return named if not added else {**named, "b": self.graph.initializer(added[0])[..., :ROWS]}


def summary(layers: list[Layer]) -> dict[str, Any]:
    """What the README may say."""
    ratios = [layer.from_input for layer in layers if layer.from_input is not None]
    return {
        "layers": len(layers),
        "bit_identical_99": sum(layer.identical >= FITS for layer in layers),
        "bit_identical_99_as_told": sum((layer.told_identical or 0.0) >= FITS for layer in layers),
        "orders": dict(Counter(layer.order for layer in layers)),
        "fits": dict(Counter(layer.fit for layer in layers)),
        "worst_residual": max((layer.residual for layer in layers), default=None),
        "from_input_0.8_to_1.25": sum(0.8 <= r <= 1.25 for r in ratios),
        "from_input": len(ratios),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("saved", type=Path)
    parser.add_argument("--backend", default="trt-fp16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--crops", type=Path)
    args = parser.parse_args()
    result = json.loads((args.saved / "result.json").read_text())
    rows = next(test for test in result["tests"] if test["backend"] == args.backend)["layers"]
    settings = next(b["settings"] for b in result["backends"] if b["spec"] == args.backend)
    found: list[Layer] = []
    crops: dict[str, np.ndarray] = {}
    with deterministic(), torch.no_grad():
        for component in dict.fromkeys(row["component"] for row in rows):
            told = settings_by_component(settings)
            told = told.get(component) or told[""]
            layers = told.get("probed", {}).get("layers") or told["layers"]  # values are what the probed engine wrote
            source = args.saved / result["programs"][component]
            bench = Bench(Capture.open(args.saved / "sample-0" / args.backend), component, source, layers, args.device)
            for layer, nodes, starts in bench.layers(NETWORK.get(args.backend)):
                found.append(layer)
                print(
                    f"{layer.value:58.58} {layer.ops[:28]:28} K={layer.reduction:<5} {layer.told or '?':8} introduced "
                    f"{layer.introduced:.2e}  {layer.fit:11} {layer.order:6} identical {layer.identical:7.2%}  "
                    f"residual {layer.residual:.3f}  cosine {layer.cosine:.3f}  ratio {layer.ratio:.3f}  from input "
                    + (f"{layer.from_input:.3f}" if layer.from_input is not None else "–"),
                    flush=True,
                )
                if args.crops:
                    crops |= {f"{len(found) - 1}|{k}": v for k, v in bench.crop(layer, nodes, starts).items()}
    print(json.dumps(summary(found)))
    if args.json:
        args.json.write_text(json.dumps({"summary": summary(found), "layers": [asdict(x) for x in found]}, indent=1))
    if args.crops:
        np.savez_compressed(args.crops, **crops)


if __name__ == "__main__":
    main()
