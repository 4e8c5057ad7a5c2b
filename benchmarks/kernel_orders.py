"""Every kernel that TensorRT 8.6 has for a product, each forced in turn, and the order in which it sums.

    TRT-PYTHON benchmarks/kernel_orders.py make FOLDER [--seconds N] [CASE …]   # TensorRT 8's Python, numpy alone
    TRT-PYTHON benchmarks/kernel_orders.py run FOLDER CASE                      # the engine that was chosen, to profile
    python benchmarks/kernel_orders.py judge FOLDER [--json FILE]               # anywhere, later

``make`` builds networks of one product, FP16 in and out. The builder chooses once; then an algorithm selector takes
each kernel that it had offered, those that split the sum first. What each computes is kept in ``FOLDER/CASE.npz``, its
name in ``FOLDER/CASE.json``. Operands come from a seed. ``attention``, ``mlp`` and ``block`` are several operators,
which TensorRT hands to its compiler as one region: no kernel can be chosen there.
"""

from __future__ import annotations

import argparse
import gzip
import json
import re
import sys
import time
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

CASES: dict[str, tuple[str, tuple[int, ...]]] = {
    # kind, sizes: rows, sum, columns; batch in front for products of values
    "gemm-32-8192-64": ("gemm", (32, 8192, 64)),
    "gemm-64-4096-256": ("gemm", (64, 4096, 256)),
    "gemm-8-16384-64": ("gemm", (8, 16384, 64)),
    "gemm-48-3072-96": ("gemm", (48, 3072, 96)),
    "gemm-197-768-192": ("gemm", (197, 768, 192)),
    "qk-8-197-64": ("qk", (8, 197, 64, 197)),
    "qk-4-400-32": ("qk", (4, 400, 32, 400)),
    "pv-8-197-64": ("pv", (8, 197, 197, 64)),
    "pv-4-400-32": ("pv", (4, 400, 400, 32)),
    # channels, size, outputs, kernel
    "conv-512-7-64-3": ("conv", (512, 7, 64, 3)),
    "conv-2048-7-128-1": ("conv", (2048, 7, 128, 1)),
    "conv-384-8-48-3": ("conv", (384, 8, 48, 3)),
    # batch, tokens, channels
    "attention-8-197-64": ("attention", (8, 197, 64)),
    "attention-4-400-32": ("attention", (4, 400, 32)),
    "attention-12-64-64": ("attention", (12, 64, 64)),
    # tokens, width, hidden
    "mlp-197-192-768": ("mlp", (197, 192, 768)),
    "block-197-192-768": ("block", (197, 192, 768)),
}
SPLIT = re.compile(r"split|stream|slice", re.IGNORECASE)


def operands(case: str) -> dict[str, np.ndarray]:
    """What the network multiplies: FP16 arrays, seeded by the case's name; inputs are named a, b and c."""
    kind, sizes = CASES[case]
    rng = np.random.default_rng(zlib.crc32(case.encode()))

    def normal(*shape: int, scale: float = 1.0) -> np.ndarray:
        return (rng.standard_normal(shape) * scale).astype(np.float16)

    if kind == "gemm":
        rows, k, columns = sizes
        return {"a": normal(rows, k), "w": normal(k, columns, scale=k**-0.5)}
    if kind == "qk":
        batch, rows, k, columns = sizes
        return {"a": normal(batch, rows, k), "b": normal(batch, columns, k)}
    if kind == "pv":
        batch, rows, k, columns = sizes
        scores = rng.standard_normal((batch, rows, k)) * 1.5
        shares = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
        return {"a": shares.astype(np.float16), "b": normal(batch, k, columns)}
    if kind == "conv":
        channels, size, outputs, kernel = sizes
        scale = (channels * kernel**2) ** -0.5
        return {"a": normal(1, channels, size, size), "w": normal(outputs, channels, kernel, kernel, scale=scale)}
    if kind == "attention":
        batch, tokens, channels = sizes
        return {name: normal(batch, tokens, channels) for name in "abc"}
    tokens, width, hidden = sizes
    return {
        "a": normal(1, tokens, width),
        "w": normal(width, hidden, scale=width**-0.5),
        "v": normal(hidden, width, scale=hidden**-0.5),
    }


def define(trt: Any, network: Any, case: str, given: dict[str, np.ndarray]) -> None:
    """Define the case's network; its one output is y."""
    kind, sizes = CASES[case]
    none, transpose = trt.MatrixOperation.NONE, trt.MatrixOperation.TRANSPOSE
    product, plus, minus = (getattr(trt.ElementWiseOperation, name) for name in ("PROD", "SUM", "SUB"))
    inputs = {n: network.add_input(n, trt.float16, x.shape) for n, x in given.items() if n in "abc"}

    def constant(array: Any, rank: int = 0) -> Any:
        array = np.asarray(array, np.float16)
        array = np.ascontiguousarray(array.reshape((1,) * (rank - array.ndim) + array.shape))
        given[f"constant{len(given)}"] = array  # kept alive until the build is over
        return network.add_constant(array.shape, trt.Weights(array)).get_output(0)

    def matmul(a: Any, b: Any, how: Any = none) -> Any:
        return network.add_matrix_multiply(a, none, b, how).get_output(0)

    def elementwise(a: Any, b: Any, how: Any) -> Any:
        return network.add_elementwise(a, b, how).get_output(0)

    def normalized(a: Any) -> Any:
        mean = network.add_reduce(a, trt.ReduceOperation.AVG, 1 << 2, True).get_output(0)
        centred = elementwise(a, mean, minus)
        squares = elementwise(centred, centred, product)
        variance = network.add_reduce(squares, trt.ReduceOperation.AVG, 1 << 2, True).get_output(0)
        deviation = network.add_unary(elementwise(variance, constant(1e-3, 3), plus), trt.UnaryOperation.SQRT)
        return elementwise(centred, deviation.get_output(0), trt.ElementWiseOperation.DIV)

    a = inputs["a"]
    if kind == "gemm":
        y = matmul(a, constant(given["w"]))
    elif kind == "qk":
        y = matmul(a, inputs["b"], transpose)
    elif kind == "pv":
        y = matmul(a, inputs["b"])
    elif kind == "conv":
        weight = np.ascontiguousarray(given["w"])
        layer = network.add_convolution_nd(a, weight.shape[0], weight.shape[2:], trt.Weights(weight))
        layer.padding_nd = (sizes[3] // 2,) * 2
        y = layer.get_output(0)
    elif kind == "attention":
        scores = elementwise(matmul(a, inputs["b"], transpose), constant(sizes[2] ** -0.5, 3), product)
        softmax = network.add_softmax(scores)
        softmax.axes = 1 << 2
        y = matmul(softmax.get_output(0), inputs["c"])
    else:
        x = normalized(a) if kind == "block" else a
        hidden = matmul(x, constant(given["w"], 3))
        inner = elementwise(hidden, constant(0.70710678, 3), product)
        share = elementwise(network.add_unary(inner, trt.UnaryOperation.ERF).get_output(0), constant(1, 3), plus)
        gelu = elementwise(elementwise(hidden, share, product), constant(0.5, 3), product)
        y = matmul(gelu, constant(given["v"], 3))
        y = elementwise(a, y, plus) if kind == "block" else y
    y.name = "y"
    network.mark_output(y)
    y.dtype = trt.float16


class Maker:
    """Builds and runs the engines of one case."""

    def __init__(self, folder: Path, case: str) -> None:
        import tensorrt

        sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "cp_debug/backends/tensorrt"))
        import runner  # type: ignore[import-not-found]

        self.trt, self.runner, self.folder, self.case = tensorrt, runner, folder, case
        self.lines: list[str] = []
        self.names: dict[int, str] = {}
        self.logger = self._logger()
        self.cache = b""

    def _logger(self) -> Any:
        maker = self

        class Log(self.trt.ILogger):  # type: ignore[name-defined]
            def __init__(self) -> None:
                maker.trt.ILogger.__init__(self)

            def log(self, severity: Any, message: str) -> None:
                maker.lines.append(message)
                named = re.search(r"Tactic Name: (\S+).*? Tactic: (0x[0-9a-fA-F]+)", message)
                if named:
                    maker.names[int(named.group(2), 16)] = named.group(1)

        return Log()

    def engine(self, wanted: tuple[int, int] | None = None) -> tuple[bytes, list[dict[str, Any]], list[Any]]:
        """(engine, kernels offered, layers as the inspector tells them); with one kernel alone for the product."""
        trt, offered, maker = self.trt, [], self

        class Selector(trt.IAlgorithmSelector):  # type: ignore[name-defined]
            def __init__(self) -> None:
                trt.IAlgorithmSelector.__init__(self)

            def select_algorithms(self, context: Any, choices: Any) -> list[int]:
                try:
                    variants = [c.algorithm_variant for c in choices]
                    keys = [(v.implementation, v.tactic & (1 << 64) - 1) for v in variants]
                    for key, choice in zip(keys, choices):  # noqa: B905 - Python 3.9
                        types = [str(choice.get_algorithm_io_info(i).dtype) for i in range(context.num_inputs)]
                        row = {"layer": context.name, "kernel": key, "ms": choice.timing_msec, "types": types}
                        offered.append(row)
                    picked = [i for i, key in enumerate(keys) if key == wanted]
                    return picked or list(range(len(choices)))
                except Exception as error:  # must not travel through TensorRT
                    maker.lines.append(f"selector: {error!r}")
                    return list(range(len(choices)))

            def report_algorithms(self, contexts: Any, choices: Any) -> None:
                pass

        builder = trt.Builder(self.logger)
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.EXPLICIT_BATCH))
        given = operands(self.case)
        define(trt, network, self.case, given)
        config = builder.create_builder_config()
        config.set_flag(trt.BuilderFlag.FP16)
        config.clear_flag(trt.BuilderFlag.TF32)
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
        selector = Selector()
        if CASES[self.case][0] not in ("attention", "mlp", "block"):
            config.algorithm_selector = selector
        cache = config.create_timing_cache(self.cache)
        config.set_timing_cache(cache, True)
        plan = builder.build_serialized_network(network, config)
        if plan is None:
            raise RuntimeError("no engine")
        self.cache = bytes(config.get_timing_cache().serialize())
        data = bytes(plan)
        engine = trt.Runtime(self.logger).deserialize_cuda_engine(data)
        layers = json.loads(engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON))
        return (
            data,
            offered,
            [
                {k: x.get(k) for k in ("Name", "LayerType", "TacticName", "TacticValue")} if isinstance(x, dict) else x
                for x in layers["Layers"]
            ],
        )

    def run(self, plan: bytes) -> np.ndarray:
        """The engine's output on the case's operands."""
        cuda = self.runner.Cuda()
        try:
            engine = self.trt.Runtime(self.logger).deserialize_cuda_engine(plan)
            context = engine.create_execution_context()
            given = operands(self.case)
            for name in (engine.get_tensor_name(i) for i in range(engine.num_io_tensors)):
                if name == "y":
                    shape = tuple(context.get_tensor_shape(name))
                    out = cuda.allocate(2 * int(np.prod(shape)))
                context.set_tensor_address(name, out if name == "y" else cuda.upload(np.ascontiguousarray(given[name])))
            if not context.execute_async_v3(cuda.stream):
                raise RuntimeError("not run")
            cuda.synchronize()
            return cuda.download(out, shape, np.float16)
        finally:
            cuda.close()

    def make(self, deadline: float) -> None:
        """All kernels until the time is up; the files are written after each."""
        plan, offered, layers = self.engine()
        (self.folder / f"{self.case}.plan").write_bytes(plan)
        arrays = {"chosen": self.run(plan)}
        told: dict[str, Any] = {"case": self.case, "layers": layers, "offered": offered, "kernels": {}}
        self.write(arrays, told)
        keys = list(dict.fromkeys(o["kernel"] for o in offered if o["kernel"][1] in self.names))
        keys.sort(key=lambda key: not SPLIT.search(self.names[key[1]]))
        for key in keys:
            if time.monotonic() > deadline:
                told["left"] = len(keys) - len(told["kernels"])
                break
            label = f"{key[0]:x}-{key[1]:x}"
            row: dict[str, Any] = {"name": self.names.get(key[1], "")}
            told["kernels"][label] = row
            try:
                plan, _, row["layers"] = self.engine(key)
                arrays[label] = self.run(plan)
            except Exception as error:
                row["failed"] = str(error)
            self.write(arrays, told)
        self.write(arrays, told)

    def write(self, arrays: dict[str, Any], told: dict[str, Any]) -> None:
        np.savez_compressed(self.folder / f"{self.case}.npz", **arrays)
        (self.folder / f"{self.case}.json").write_text(json.dumps(told))
        kept = [line for line in self.lines if re.search("Tactic|Runner|layers|selector", line)]
        with gzip.open(self.folder / f"{self.case}.log.gz", "wt") as stream:
            stream.write("\n".join(line[:400] for line in kept[:20000]))


def make(folder: Path, cases: list[str], seconds: float) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    for place, case in enumerate(cases):
        left = started + seconds - time.monotonic()
        try:
            Maker(folder, case).make(time.monotonic() + left / (len(cases) - place))
        except Exception as error:
            print(f"{case}: {error!r}", flush=True)
        else:
            told = json.loads((folder / f"{case}.json").read_text())
            print(f"{case}: {len(told['kernels'])} kernels, {time.monotonic() - started:.0f} s", flush=True)


def judge(folder: Path) -> Iterator[dict[str, Any]]:
    """For each kernel that ran, the chosen one first: what its name and number tell, and how much that reproduces.

    ``identical``: share of elements that are equal bit for bit; ``plain``: the same without the split.
    """
    import torch

    from cp_debug.backends.kernels.fp16_accumulation import Order, conv, matmul
    from cp_debug.backends.kernels.windows import Window
    from cp_debug.backends.tensorrt.inspector import Tactic, decode, with_split

    def computed(case: str, tactic: Tactic) -> torch.Tensor | None:
        given = {n: torch.from_numpy(x.astype(np.float32)) for n, x in operands(case).items()}
        a, b = given["a"], given.get("w", given.get("b"))
        kind = CASES[case][0]
        if b is None or tactic.arithmetic not in ("fp16acc", "fp16", "fp32"):
            return None
        if tactic.arithmetic != "fp16acc":
            if kind == "conv":
                return torch.nn.functional.conv2d(a, b, padding=b.shape[-1] // 2).half().float()
            return (a @ (b.mT if kind == "qk" else b)).half().float()
        if not tactic.tile:
            return None
        order = Order(tactic.tile[2], tactic.slices, tactic.split, tactic.split_kernels)
        if kind == "conv":
            edge = (b.shape[-1] // 2,) * 2
            window = Window(b.shape[2:], (1, 1), (1, 1), edge, edge)
            return conv(a, b, None, window, 1, order)
        return matmul(a, b.mT if kind == "qk" else b, order)

    for path in sorted(folder.glob("*.json")):
        told, arrays = json.loads(path.read_text()), np.load(path.with_suffix(".npz"))
        rows = {"chosen": {"layers": told["layers"]}, **told["kernels"]}
        for label, row in rows.items():
            layers = [x for x in row.get("layers", []) if isinstance(x, dict) and x.get("TacticName")]
            if label not in arrays or len(layers) != 1:
                continue
            tactic = decode(with_split(layers[0]["TacticName"], layers[0]["TacticValue"]))
            found = torch.from_numpy(arrays[label].astype(np.float32))
            short = {"case": told["case"], "kernel": label, "name": tactic.name, "arithmetic": tactic.arithmetic}
            emulated, plain = (computed(told["case"], t) for t in (tactic, replace(tactic, split=1)))
            if emulated is None or plain is None:
                yield short
                continue
            identical = float((emulated.reshape(-1) == found.reshape(-1)).double().mean())
            alone = float((plain.reshape(-1) == found.reshape(-1)).double().mean())
            yield {**short, "split": tactic.split, "identical": round(identical, 5), "plain": round(alone, 5)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("command", choices=("make", "run", "judge"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("cases", nargs="*", help=f"any of {', '.join(CASES)}")
    parser.add_argument("--seconds", type=float, default=300.0, help="for all cases of make, divided among them")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    cases = args.cases or list(CASES)
    if args.command == "make":
        make(args.folder, cases, args.seconds)
    elif args.command == "run":
        for case in cases:
            maker = Maker(args.folder, case)
            print(case, maker.run((args.folder / f"{case}.plan").read_bytes()).shape)
    else:
        rows = list(judge(args.folder))
        for row in rows:
            shares = (
                "not computed" if "identical" not in row else f"{row['identical']:.3%} (unsplit {row['plain']:.3%})"
            )
            print(f"{row['case']:20} {row['kernel']:28} {row['arithmetic'] or '?':8} {shares} {row['name']}")
        if args.json:
            args.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
