"""OpenVINO: public reports of wrong results, rebuilt small, each with a twin in which OpenVINO is right.

python benchmarks/openvino_reports.py                          # what the installed version computes: named or not
python benchmarks/openvino_reports.py softplus relu-nan        # these alone

Where a report is mended in the installed version, an older one shows it:

pip install --no-deps --target old openvino==2025.2.0 && PYTHONPATH=old python benchmarks/openvino_reports.py

Healthy networks are those of other benchmarks: ``healthy.py --backends openvino``, ``compiled.py healthy --backends
openvino``. Errors of OpenVINO's functions: ``operator_errors.py --openvino``.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx

from cp_debug import diagnose
from cp_debug.bisect.result import TestResult

Inputs = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Report:
    """One report: a network in ONNX's text syntax, its inputs, and what makes the twin of both."""

    thread: int
    """Number of the issue of openvinotoolkit/openvino."""
    text: str
    guilty: tuple[str, ...]
    """Values that may be accused: those of the operators that are wrong."""
    twin: tuple[str, str] = ("", "")
    """A part of the text, and what stands there in the twin."""
    inputs: Callable[[np.random.Generator], Inputs] = lambda rng: {"x": _normal(rng, 8, 16)}
    twin_inputs: Callable[[np.random.Generator], Inputs] | None = None
    opset: int = 17
    last: str = ""
    """The last version that shows it, as far as tried; empty: 2026.4, the newest."""

    def write(self, folder: Path, *, twin: bool) -> tuple[Path, Path]:
        """The model and its inputs."""
        text = self.text.replace(*self.twin) if twin and self.twin[0] else self.text
        opset = 18 if twin and "axes" in self.twin[1] else self.opset
        model = onnx.parser.parse_model(f'<ir_version: 9, opset_import: ["": {opset}]> net {text}')
        rng = np.random.default_rng(1)
        for value in model.graph.value_info:  # weights, declared without their numbers
            shape = [axis.dim_value for axis in value.type.tensor_type.shape.dim]
            weight = (rng.standard_normal(shape) / np.sqrt(shape[0])).astype(np.float32)
            model.graph.initializer.append(onnx.numpy_helper.from_array(weight, value.name))
        del model.graph.value_info[:]
        onnx.save(model, folder / "net.onnx")
        make = self.twin_inputs if twin and self.twin_inputs else self.inputs
        np.savez(folder / "net.npz", **make(rng))
        return folder / "net.onnx", folder / "net.npz"


def _normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


def _with_zeros(rng: np.random.Generator) -> Inputs:
    x = np.abs(_normal(rng, 8, 16)) + 0.1
    x[2] = 0
    return {"x": x}


def _without_zeros(rng: np.random.Generator) -> Inputs:
    return {"x": np.abs(_normal(rng, 8, 16)) + 0.1}


def _image(rng: np.random.Generator) -> Inputs:
    return {"x": _normal(rng, 1, 3, 12, 12)}


_LINEAR = "<float[16,16] w, float[16,4] v{}>"
_REDUCED = (
    "(float[8,16] x) => (float[8,4] y) " + _LINEAR.format("") + " {{ a = MatMul (x, w) b = Abs (a) "
    "c = {0} <axes = [1], keepdims = 1> (b) d = Div (a, c) y = MatMul (d, v) }}"
)
_RATIO = (
    "(float[8,16] x) => (float[8,16] y) <float[16] w> {{ a = Mul (x, w) b = Div (a, x) c = {0} (b) y = Add (c, w) }}"
)


def _reduced(op: str) -> Report:
    old, new = f"c = {op} <axes = [1], keepdims = 1> (b)", f"c = {op} <keepdims = 1> (b, axes)"
    constant = "axes = Constant <value = int64[1] {1}> () "
    return Report(38238, _REDUCED.format(op), ("c",), (old, constant + new), opset=13)


_INT8 = (
    "q = QuantizeLinear ({0}, xs, z) d = DequantizeLinear (q, xs, z) "
    "wq = QuantizeLinear (w, ws, z) wd = DequantizeLinear (wq, ws, z) c = Conv (d, wd) y = Relu (c) }}"
)

REPORTS: dict[str, Report] = {
    "reduce-l1": _reduced("ReduceL1"),
    "reduce-log-sum": _reduced("ReduceLogSum"),
    "reduce-log-sum-exp": _reduced("ReduceLogSumExp"),
    "relu-nan": Report(35649, _RATIO.format("Relu"), ("c",), inputs=_with_zeros, twin_inputs=_without_zeros),
    "exp-nan": Report(35685, _RATIO.format("Exp"), ("c",), inputs=_with_zeros, twin_inputs=_without_zeros),
    "double-division": Report(
        33564,
        "(double[3] x, double[3] z) => (double[3] y) { a = Mul (x, x) b = Div (a, z) y = Floor (b) }",
        ("b",),
        inputs=lambda rng: {"x": np.array([1.0, 2, 3]), "z": np.array([0.0, 1, 4])},
        twin_inputs=lambda rng: {"x": np.array([1.0, 2, 3]), "z": np.array([2.0, 1, 4])},
    ),
    "softplus": Report(
        23673,
        "(float[8,16] x) => (float[8,4] y) <float[16,16] w, float[16,4] v, float low = {-18.0}, float many = {1e6}> "
        "{ a = MatMul (x, w) b = Add (a, low) c = Softplus (b) d = Mul (c, many) y = MatMul (d, v) }",
        ("c",),
        ("-18.0", "3.0"),
    ),
    "max-pool-order": Report(
        20879,
        "(float[1,3,12,12] x) => (float[1,3,6,6] p, int64[1,3,6,6] i) { a = Relu (x) "
        "p, i = MaxPool <kernel_shape = [2,2], strides = [2,2], storage_order = 1> (a) }",
        ("i",),
        ("storage_order = 1", "storage_order = 0"),
        inputs=_image,
    ),
    "softsign-chain": Report(
        31252,
        "(float[n,16] x) => (float[n,4] y) <float[16,16] w, float[16,4] v> { a = MatMul (x, w) b = Relu (a) "
        "c = Sqrt (b) d = Softsign (c) e = Mul (d, a) y = MatMul (e, v) }",
        ("b", "c", "d", "e"),
        ("Softsign", "Sigmoid"),
        last="2025.2",
    ),
    "lp-normalization": Report(
        35887,
        "(float[8,16] x) => (float[8,16] y) <float[16] w> { a = Mul (x, w) "
        "b = LpNormalization <axis = -1, p = 2> (a) y = Add (b, w) }",
        ("b",),
        inputs=_with_zeros,
        twin_inputs=_without_zeros,
        last="2026.1",
    ),
    "conv-transpose-same": Report(
        31007,
        "(float[1,3,12,12] x) => (float[1,4,o,p] y) <float[3,4,3,3] w> { a = Relu (x) "
        'b = ConvTranspose <auto_pad = "SAME_UPPER"> (a, w) y = Relu (b) }',
        ("b",),
        ('auto_pad = "SAME_UPPER"', "pads = [1,1,1,1]"),
        inputs=_image,
        last="2025.2",
    ),
    "cross-entropy-weights": Report(
        20977,
        "(float[3,5] x, int64[3] t) => (float y) <float[5] w = {1.0, 0.5, 2.0, 0.25, 3.0}, float s = {2.0}> "
        '{ a = Mul (x, s) y = SoftmaxCrossEntropyLoss <reduction = "mean"> (a, t, w) }',
        ("y",),
        ("w = {1.0, 0.5, 2.0, 0.25, 3.0}", "w = {1.0, 1.0, 1.0, 1.0, 1.0}"),
        inputs=lambda rng: {"x": _normal(rng, 3, 5), "t": np.array([0, 1, 1])},
        last="2024.2",
    ),
    "int8-saturation": Report(
        25342,  # on a processor without VNNI
        "(float[1,16,12,12] x) => (float[1,16,12,12] y) <float[16,16,1,1] w, float xs = {0.03}, float ws = {0.003}, "
        "int8 z = {0}> { " + _INT8.format("x"),
        ("c", "y"),
        ("ws = {0.003}", "ws = {0.015}"),
        inputs=lambda rng: {"x": _normal(rng, 1, 16, 12, 12)},
    ),
    "int8-concat": Report(
        0,  # found here, as far as known reported by nobody
        "(float[1,16,12,12] x) => (float[1,16,12,12] y) <float[16,32,1,1] w, float xs = {0.03}, float ws = {0.015}, "
        "int8 z = {0}> { a = Relu (x) b = Tanh (x) e = Concat <axis = 1> (a, b) " + _INT8.format("e"),
        ("q", "d", "c", "y"),
        ("e = Concat <axis = 1> (a, b)", "f = Concat <axis = 1> (a, b) e = Tanh (f)"),
        inputs=lambda rng: {"x": _normal(rng, 1, 16, 12, 12)},
    ),
}


def accused(test: TestResult) -> list[str]:
    """Values of the guilty layers, or of the first whose shape is another one."""
    return [row.onnx for row in test.guilty] or [row.onnx for row in (test.first_divergent,) if row is not None]


def run(report: Report, *, twin: bool) -> TestResult:
    """ONNX Runtime against OpenVINO."""
    with tempfile.TemporaryDirectory() as folder:
        model, inputs = report.write(Path(folder), twin=twin)
        (test,) = diagnose(model, "ort,openvino", inputs=inputs, progress=False).tests
        return test


def main() -> None:
    """Run what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*")
    shown = named = healthy = 0
    names = parser.parse_args().names or [*REPORTS]
    for name in names:
        report = REPORTS[name]
        test, twin = run(report, twin=False), run(report, twin=True)
        right = bool(accused(test)) and set(accused(test)) <= set(report.guilty)
        told = "mended here" if test.agrees else f"{'named' if right else 'NOT NAMED'} {accused(test)}"
        shown, named, healthy = shown + (not test.agrees), named + right, healthy + (not accused(twin))
        causes = [f"{f.cause}: {f.headline[:100]}" for f in test.findings]
        wrong = f" TWIN ACCUSED {accused(twin)}" if accused(twin) else ""
        print(f"{name:22} #{report.thread} {told} {[row.tactic for row in test.guilty]} {causes}{wrong}", flush=True)
        version = test.backend.versions["openvino"]
    print(f"OpenVINO {version}: {shown} of {len(names)} differ, {named} named exactly; {healthy} twins accuse nobody")


if __name__ == "__main__":
    main()
