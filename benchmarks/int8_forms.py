"""Which ways of writing INT8 into an ONNX graph does this TensorRT read, and does it then compute what emulation says?

    CPDEBUG_TRT_PYTHON=PATH python benchmarks/int8_forms.py OUT.json [--only WORD,...] [--spec trt-int8]

Each form is a small net of its own: x → Q/DQ → the operator with a quantized weight → ReLU → Q/DQ → 3×3 convolution.
They differ in how the weight is stored, where scales stand, what they are along, the operator, the opset. A form that
kills TensorRT's process does not stop the others. For those that run: ‖engine − emu-int8‖ ÷ ‖engine − unquantized FP32‖
(target: below 1e-3), which types the layers have, and the kernels.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from cp_debug.backends.base import Program
from cp_debug.backends.registry import create
from cp_debug.backends.spec import BackendSpec
from cp_debug.errors import CpdebugError
from cp_debug.files import write_text
from cp_debug.graph.graph import Graph

CHANNELS, SIDE = 64, 32


@dataclass(frozen=True)
class Form:
    """One way to write it."""

    name: str
    op: str = "Conv"
    stored: str = "float"
    """``float``: FP32 → Q → DQ. ``int8``: INT8 → DQ."""
    axis: int | None = 0
    """Of the weight's scales; None: one for the whole weight."""
    scales: str = "initializer"
    """Where scales and zero points stand: ``initializer`` or ``Constant``."""
    opset: int = 17
    kernel_shape: bool = True
    bias: bool = True
    quantized_output: bool = True
    """Q/DQ behind the ReLU too, so that the engine need not leave INT8."""
    residual: bool = False
    """Adds the input to the result, both through Q/DQ."""


FORMS = (
    Form("float weight"),
    Form("int8 weight", stored="int8"),
    Form("float weight, opset 13", opset=13),
    Form("int8 weight, opset 13", stored="int8", opset=13),
    Form("float weight, Constant scales", scales="Constant"),
    Form("float weight, per tensor", axis=None),
    Form("int8 weight, per tensor", stored="int8", axis=None),
    Form("float weight, no kernel_shape", kernel_shape=False),
    Form("float weight, no bias", bias=False),
    Form("float weight, output not quantized", quantized_output=False),
    Form("residual", residual=True),
    Form("ConvTranspose, axis 1", op="ConvTranspose", axis=1),
    Form("ConvTranspose, axis 0", op="ConvTranspose", axis=0),
    Form("ConvTranspose, per tensor", op="ConvTranspose", axis=None),
    Form("ConvTranspose, output not quantized", op="ConvTranspose", axis=1, quantized_output=False),
    Form("MatMul, axis 1", op="MatMul", axis=1, bias=False),
    Form("MatMul, per tensor", op="MatMul", axis=None, bias=False),
    Form("Gemm, axis 0", op="Gemm", axis=0),
    Form("Gemm, per tensor", op="Gemm", axis=None),
)


class Writer:
    """Builds the graph of a form. ``quantized`` False leaves every Q/DQ out: the FP32 net that is approximated."""

    def __init__(self, form: Form, quantized: bool) -> None:
        self.form, self.quantized = form, quantized
        self.rng = np.random.default_rng(0)
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []

    def model(self) -> onnx.ModelProto:
        form = self.form
        flat = form.op in ("MatMul", "Gemm")
        shape = [SIDE, CHANNELS] if flat else [1, CHANNELS, SIDE, SIDE]
        x = self.activation("x", 3.0)
        y = self.product("first", form.op, x, form.axis)
        if form.residual:
            y = self.node("Add", [self.activation(y, 6.0), x], "sum")
        y = self.node("Relu", [y], "relu")
        if form.quantized_output:
            y = self.activation(y, 6.0)
        last, axis = (form.op, form.axis) if flat else ("Conv", None if form.axis is None else 0)
        self.product("last", last, y, axis)
        self.nodes[-1].output[0] = "y"
        graph = helper.make_graph(
            self.nodes,
            form.name,
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
            self.initializers,
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", form.opset)], ir_version=8)
        return onnx.shape_inference.infer_shapes(model, strict_mode=True)

    def product(self, name: str, op: str, x: str, axis: int | None) -> str:
        kernel = {"Conv": 3, "ConvTranspose": 2}.get(op)
        shape = (CHANNELS, CHANNELS, *([kernel] * 2 if kernel else []))
        length = CHANNELS if op == "ConvTranspose" else int(np.prod(shape[1:]))
        weight = self.rng.standard_normal(shape).astype(np.float32) * np.float32((2 / length) ** 0.5)
        inputs = [x, self.weight(f"{name}.weight", weight, axis)]
        if self.form.bias:
            bias = (self.rng.standard_normal(CHANNELS) * 0.1).astype(np.float32)
            inputs.append(self.constant(f"{name}.bias", bias))
        attributes: dict[str, Any] = {"transB": 1} if op == "Gemm" else {}
        if kernel:
            attributes |= {"kernel_shape": [kernel] * 2} if self.form.kernel_shape else {}
            attributes |= {"strides": [2, 2]} if op == "ConvTranspose" else {"pads": [1] * 4}
        return self.node(op, inputs, name, **attributes)

    def weight(self, name: str, array: np.ndarray, axis: int | None) -> str:
        others = None if axis is None else tuple(i for i in range(array.ndim) if i != axis)
        scale = (np.abs(array).max(axis=others) / 127).astype(np.float32)
        if not self.quantized:
            return self.constant(name, array)
        attributes = {} if axis is None else {"axis": axis}
        if self.form.stored == "float":
            return self.pair(self.constant(name, array), scale, attributes)
        wide = scale if axis is None else scale.reshape([-1 if i == axis else 1 for i in range(array.ndim)])
        levels = np.clip(np.round(array / wide), -127, 127).astype(np.int8)
        parameters = self.parameters(name, scale)
        return self.node("DequantizeLinear", [self.constant(name, levels), *parameters], f"{name}.DQ", **attributes)

    def activation(self, value: str, amax: float) -> str:
        return self.pair(value, np.float32(amax / 127), {}) if self.quantized else value

    def pair(self, value: str, scale: Any, attributes: dict[str, Any]) -> str:
        parameters = self.parameters(value, scale)
        levels = self.node("QuantizeLinear", [value, *parameters], f"{value}.Q", **attributes)
        return self.node("DequantizeLinear", [levels, *parameters], f"{value}.DQ", **attributes)

    def parameters(self, name: str, scale: Any) -> tuple[str, str]:
        array = np.asarray(scale, np.float32)
        zero = np.zeros(array.shape, np.int8)
        return self.parameter(f"{name}.scale", array), self.parameter(f"{name}.zero", zero)

    def parameter(self, name: str, array: np.ndarray) -> str:
        if self.form.scales == "initializer":
            return self.constant(name, array)
        return self.node("Constant", [], name, value=numpy_helper.from_array(array, name))

    def constant(self, name: str, array: np.ndarray) -> str:
        self.initializers.append(numpy_helper.from_array(array, name))
        return name

    def node(self, op: str, inputs: list[str], name: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(op, inputs, [f"{name}.out"], f"/{name}/{op}", **attributes))
        return f"{name}.out"


def write(form: Form, quantized: bool, path: Path) -> Program:
    onnx.save(Writer(form, quantized).model(), path)
    return Program("net", Graph(path))


def run(spec: str, program: Program, x: np.ndarray, **options: Any) -> tuple[np.ndarray, dict[str, Any]]:
    """The output, and the settings."""
    with closing(create(BackendSpec.parse(spec), **options).open(program)) as session:
        return session.run({"x": x})["y"].astype(np.float64), dict(session.settings)


def measure(form: Form, spec: str, limit: float) -> dict[str, Any]:
    """A row: the form, and how it went."""
    row: dict[str, Any] = asdict(form)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        program = write(form, True, Path(folder) / "int8.onnx")
        x = np.random.default_rng(1).standard_normal(program.graph.inputs[0].shape).astype(np.float32)
        try:
            actual, told = run(spec, program, x, time_limit=limit)
        except CpdebugError as error:
            return {**row, "error": str(error), "seconds": round(time.perf_counter() - started, 1)}
        emulated, _ = run("emu-int8", program, x)
        exact, _ = run("ort", write(form, False, Path(folder) / "fp32.onnx"), x)
    row["residual"] = float(np.linalg.norm(actual - emulated) / np.linalg.norm(actual - exact))
    row["error_of_int8"] = float(np.linalg.norm(actual - exact) / np.linalg.norm(exact))
    row["types"] = told["realised_precision"]
    row["layers"] = [f"{x['name']}: {x['arithmetic']} {x['tactic']}" for x in told["layers"]]
    row["seconds"] = round(time.perf_counter() - started, 1)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", default="", help="forms whose name holds one of these words")
    parser.add_argument("--spec", default="trt-int8")
    parser.add_argument("--limit", type=float, default=40.0, help="seconds for one form")
    args = parser.parse_args()
    rows = []
    for form in FORMS:
        if not any(word in form.name for word in args.only.split(",")):
            continue
        row = measure(form, args.spec, args.limit)
        rows.append(row)
        write_text(json.dumps(rows, indent=1), args.out)
        said = row["error"] if "error" in row else f"residual {row['residual']:.2e}, {row['types']}"
        print(f"{form.name}: {said} ({row['seconds']} s)", flush=True)


if __name__ == "__main__":
    main()
