"""Errors of elementary functions in FP32, measured over their input range: ONNX Runtime (MLAS, Eigen), torch, oneDNN.

Each function is computed on random numbers of every half octave of its range and compared with FP64. Printed is
how large the errors are beside the models of ``cp_debug/bisect/operator_errors.py``: root mean square and largest one,
in the half octave where each is worst. A flat map repeats one argument, so the largest must stay below 4, too. Fourier
transforms of random signals follow.

    python benchmarks/operator_errors.py                                        # measure, and compare with the models
    python benchmarks/operator_errors.py --json docs/data/operator_errors.json  # also write what was measured
    python benchmarks/operator_errors.py --cuda --json docs/gpu/data/operator_errors.json  # on a GPU instead
    python benchmarks/operator_errors.py --openvino --json docs/data/operator_errors_openvino.json
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import helper, numpy_helper
from rich.console import Console
from rich.table import Table
from torch.nn import functional

from cp_debug.backends.arithmetic import FP64
from cp_debug.backends.base import Program
from cp_debug.backends.executor import Executor
from cp_debug.backends.registry import create
from cp_debug.backends.spec import BackendSpec
from cp_debug.bisect.operator_errors import errors_of
from cp_debug.errors import InputError
from cp_debug.graph.graph import Graph

U = 2.0**-24
TINY = 2.0**-126 / U
"""The smallest normal number in roundoffs of 1: below it digits are lost, and some flush to zero."""
COLUMNS = ("low", "y", "error", "largest error", "relative error", "largest relative error")
"""The lower end of a bin; root mean squares of the exact result, of the error in u, and of the error in u |y|."""
SAMPLES = 1024
"""Numbers in each half octave."""
OCTAVES = range(-28, 15)
"""Half octaves from 2⁻¹⁴ to 2^7.5; those that are asked for large arguments go further."""
FAR = range(15, 34)

Function = Callable[[torch.Tensor], torch.Tensor]

FUNCTIONS: dict[str, dict[str, Any]] = {
    name: {} for name in (
        "Sigmoid", "Tanh", "Erf", "Exp", "Softplus", "Elu", "Selu", "Celu", "Gelu", "Mish", "HardSwish",
        "Softsign", "Sin", "Cos", "Tan", "Atan", "Sinh", "Cosh", "Asinh", "Reciprocal",
        "Sqrt", "Log", "Asin", "Acos", "Atanh", "Acosh",
    )
}  # fmt: skip
FUNCTIONS |= {
    "Gelu tanh": {"approximate": "tanh"},
    "HardSigmoid": {"alpha": 1 / 6},
    "LeakyRelu": {"alpha": 0.1},
    "ThresholdedRelu": {},
    "com.microsoft.QuickGelu": {"alpha": 1.702},
    "com.microsoft.FastGelu": {},
    "com.microsoft.Gelu": {},
    "Pow 2": {}, "Pow 3": {}, "Pow 0.5": {}, "Pow -0.5": {}, "Pow 1.7": {}, "Pow of 2.7": {},
}  # fmt: skip
DOMAIN: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "Sqrt": lambda x: x >= 0, "Log": lambda x: x > 0, "Pow 0.5": lambda x: x > 0, "Pow -0.5": lambda x: x > 0,
    "Pow 1.7": lambda x: x > 0, "Asin": lambda x: np.abs(x) <= 1, "Acos": lambda x: np.abs(x) <= 1,
    "Atanh": lambda x: np.abs(x) < 1, "Acosh": lambda x: x >= 1,
}  # fmt: skip

TORCH: dict[str, Function] = {
    "Sigmoid": torch.sigmoid, "Tanh": torch.tanh, "Erf": torch.erf, "Exp": torch.exp, "Softplus": functional.softplus,
    "Elu": functional.elu, "Selu": functional.selu, "Celu": functional.celu, "Gelu": functional.gelu,
    "Gelu tanh": lambda x: functional.gelu(x, approximate="tanh"), "Mish": functional.mish,
    "HardSwish": functional.hardswish, "HardSigmoid": functional.hardsigmoid, "Softsign": functional.softsign,
    "Sin": torch.sin, "Cos": torch.cos, "Tan": torch.tan, "Atan": torch.atan, "Sinh": torch.sinh, "Cosh": torch.cosh,
    "Asinh": torch.asinh, "Reciprocal": torch.reciprocal, "Sqrt": torch.sqrt, "Log": torch.log, "Asin": torch.asin,
    "Acos": torch.acos, "Atanh": torch.atanh, "Acosh": torch.acosh, "Pow 2": lambda x: x**2, "Pow 3": lambda x: x**3,
    "Pow 0.5": lambda x: x**0.5, "Pow -0.5": lambda x: x**-0.5, "Pow 1.7": lambda x: x**1.7,
    "Pow of 2.7": lambda x: torch.tensor(2.7) ** x,
}  # fmt: skip
ONEDNN: dict[str, Function] = {
    name: lambda x, f=TORCH[name]: f(x.to_mkldnn()).to_dense() for name in ("Sigmoid", "Tanh", "Gelu")
}


def bins(name: str) -> Iterator[tuple[float, np.ndarray]]:
    """(lower end, numbers [SAMPLES] in FP32) of every half octave in the function's range, negative ones first."""
    rng = np.random.default_rng(0)
    far = [*FAR] if name in ("Sin", "Cos", "Tan", "Reciprocal", "Sqrt", "Log") else []
    low = -60 if name in ("Log", "Sqrt", "Reciprocal", "Pow -0.5") else OCTAVES[0]
    octaves = [*range(low, OCTAVES[0]), *OCTAVES, *far]
    for sign, order in ((-1.0, reversed(octaves)), (1.0, octaves)):
        for half in order:
            x = (sign * 2.0 ** (half / 2) * rng.uniform(1, 2**0.5, SAMPLES)).astype(np.float32)
            if DOMAIN.get(name, np.isfinite)(x).all():
                yield float(sign * 2.0 ** (half / 2)), x
    if name in ("Log", "Acosh", "Acos", "Asin"):  # the neighbourhood of 1
        for power in range(-18, -1):
            x = 1 + np.sign(0.5 - (name[0] == "A" and name != "Acosh")) * 2.0**power * rng.uniform(1, 2, SAMPLES)
            yield float(x.astype(np.float32).min()), x.astype(np.float32)


def graph_of(name: str, folder: Path) -> Path:
    """A model of one node that computes the function of ``x``."""
    kind, _, rest = name.partition(" ")
    domain, _, op = kind.rpartition(".")
    inputs, weights = ["x"], []
    if op == "Pow":
        inputs = ["of", "x"] if "of" in rest else ["x", "of"]
        weights = [numpy_helper.from_array(np.float32(rest.removeprefix("of ")), "of")]
    node = helper.make_node(op, inputs, ["y"], domain=domain, **FUNCTIONS[name])
    ends = (helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, ["n"]) for n in "xy")
    graph = helper.make_graph([node], "function", *([e] for e in ends), weights)
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=9), folder / "function.onnx")
    return folder / "function.onnx"


def exact(name: str, path: Path, x: np.ndarray) -> np.ndarray:
    """The function in FP64."""
    given = torch.from_numpy(x.astype(np.float64))
    if name == "com.microsoft.QuickGelu":
        return (given * torch.sigmoid(1.702 * given)).numpy()
    if name == "com.microsoft.FastGelu":
        return functional.gelu(given, approximate="tanh").numpy()
    if name in ("Gelu", "com.microsoft.Gelu"):  # x · Φ(x) by erfc, which does not cancel
        return (given * torch.special.erfc(-given / 2**0.5) / 2).numpy()
    graph = Graph(path)
    return Executor(graph, FP64).run({"x": x})[graph.outputs[0].name].numpy()


FAMILIES = {"ort": "ort", "torch": "torch", "onednn": "torch", "ort@cuda": "ort@cuda", "torch@cuda": "torch@cuda",
            "openvino": "openvino"}  # fmt: skip
"""Implementation → whose models it is compared with."""


def session_of(path: Path, *, cuda: bool) -> onnxruntime.InferenceSession:
    """A session on the CPU, or on CUDA without TF32. Raises what ONNX Runtime does, also where CUDA has no kernel."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    providers: list[Any] = ["CPUExecutionProvider"]
    if cuda:
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        providers = [("CUDAExecutionProvider", {"use_tf32": "0"})]
    return onnxruntime.InferenceSession(path, options, providers=providers)


def openvino_of(path: Path) -> Callable[[np.ndarray], np.ndarray]:
    """The function as OpenVINO computes it, in FP32 on the CPU."""
    session = create(BackendSpec("openvino"), threads=1).open(Program("function", Graph(path)))
    return lambda x: session.run({"x": x})["y"]


def implementations_of(name: str, path: Path, where: str) -> dict[str, Callable[[np.ndarray], np.ndarray]]:
    """Who computes a function, in FP32: those of ``cpu``, ``cuda`` or ``openvino``."""
    if where == "openvino":
        with suppress(InputError):  # functions of com.microsoft
            return {"openvino": openvino_of(path)}
        return {}
    found: dict[str, Callable[[np.ndarray], np.ndarray]] = {}
    suffix = "@cuda" if where == "cuda" else ""
    try:
        session = session_of(path, cuda=where == "cuda")
        found[f"ort{suffix}"] = lambda x: session.run(None, {"x": x})[0]
    except Exception as error:
        print(f"{name}: ONNX Runtime does not run it: {error}", file=sys.stderr)
    for kind, functions in ((f"torch{suffix}", TORCH), ("onednn", ONEDNN if where == "cpu" else {})):
        if name in functions:
            found[kind] = lambda x, f=functions[name]: f(torch.from_numpy(x).to(where)).cpu().numpy()
    return found


def measure(where: str) -> tuple[dict[str, dict[str, list[list[float]]]], Table]:
    """What was found in every bin, ``COLUMNS`` by function and implementation; and how it compares with the models."""
    found: dict[str, dict[str, list[list[float]]]] = {}
    table = Table("function", "by", "rms ÷ model", "at", "largest ÷ model", "at", box=None)
    with tempfile.TemporaryDirectory() as folder:
        for name in FUNCTIONS:
            path = graph_of(name, Path(folder))
            implementations = implementations_of(name, path, where)
            found[name] = {kind: [] for kind in implementations}
            node = Graph(path).nodes[0]
            for kind, compute in implementations.items():
                errors = errors_of(node, FAMILIES[kind])
                assert errors is not None
                worst = [(0.0, 0.0), (0.0, 0.0)]
                for low, x in bins(name):
                    y = exact(name, path, x)
                    if not (np.abs(y) < np.finfo(np.float32).max).all():
                        continue
                    error = np.abs(compute(x).astype(np.float64) - y) / U
                    given, result = (torch.from_numpy(v.astype(np.float64)) for v in (x, y))
                    ratio = error / (errors.spread(node, [given], result).numpy() + TINY)
                    here = (rms(ratio), low), (float(ratio.max()), low)
                    worst = [max(pair) for pair in zip(worst, here, strict=True)]
                    relative = error / (np.abs(y) + TINY)
                    figures = low, rms(y), rms(error), error.max(), rms(relative), relative.max()
                    found[name][kind].append([float(f"{v:.2g}") for v in figures])
                table.add_row(name, kind, *(f"{v:.3g}" for pair in worst for v in pair))
    return found, table


def transforms() -> dict[str, dict[str, float]]:
    """Relative L2 errors of Fourier transforms of random signals, in u: length → implementation → error."""
    rng, found = np.random.default_rng(0), dict[str, dict[str, float]]()
    for length in (8, 32, 33, 60, 100, 128, 512, 1000, 1024, 2048):
        x = rng.standard_normal((8, length, 1)).astype(np.float32)
        node = helper.make_node("DFT", ["x", "n"], ["y"])
        ends = (helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, None) for n in "xy")
        graph = helper.make_graph(
            [node], "transform", *([e] for e in ends), [numpy_helper.from_array(np.array(length), "n")]
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
        session = onnxruntime.InferenceSession(model.SerializeToString())
        exact = np.fft.fft(x[..., 0].astype(np.float64))
        results = {
            "ort": session.run(None, {"x": x})[0] @ np.array([1, 1j]),
            "torch": torch.fft.fft(torch.from_numpy(x[..., 0])).numpy(),
        }
        found[str(length)] = {
            kind: float(f"{np.linalg.norm(y - exact) / np.linalg.norm(exact) / U:.2g}") for kind, y in results.items()
        }
    return found


def rms(values: np.ndarray) -> float:
    """Root mean square."""
    return float(np.sqrt(np.mean(np.square(values))))


def main() -> None:
    """Measure and print where each implementation is worst."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write what was measured here")
    other = parser.add_mutually_exclusive_group()
    other.add_argument("--cuda", action="store_true", help="measure ONNX Runtime's CUDA provider and torch on a GPU")
    other.add_argument("--openvino", action="store_true", help="measure OpenVINO on the CPU")
    options = parser.parse_args()
    torch.set_num_threads(1)
    where = "cuda" if options.cuda else "openvino" if options.openvino else "cpu"
    measured, table = measure(where)
    Console(width=120).print(table)
    spectra = transforms() if where == "cpu" else {}
    for length, errors in spectra.items():
        print(f"DFT of {length}: " + ", ".join(f"{kind} {error:g} u" for kind, error in errors.items()))
    if options.json:
        versions = {"onnxruntime": onnxruntime.__version__, "torch": torch.__version__}
        if options.cuda:
            versions["gpu"] = torch.cuda.get_device_name()
        if options.openvino:
            versions |= create(BackendSpec("openvino")).versions()
        command = "python benchmarks/operator_errors.py" + f" --{where}" * (where != "cpu")
        document = {"command": command, "versions": versions, "columns": COLUMNS, "measured": measured, "dft": spectra}
        options.json.write_text(json.dumps(document, separators=(",", ":")).replace('},"', '},\n"') + "\n")


if __name__ == "__main__":
    main()
