"""Every TensorRT precision on a small convolutional net and on CenterPoint, in one go, for a machine with a GPU.

For each component and backend: does it build, how long, which kernels and types came out, what it exposes, observer gap
and rebuild floor, how far every exposed value is from ONNX Runtime's FP32. ``results.json`` is rewritten after each, so
that a run cut short leaves what it has. ``tensors.npz`` takes the small net's values on every backend, which emulation
is checked against, beside ``net.onnx`` and ``net-int8.onnx`` that they came from.

INT8 runs a Q/DQ graph (convolutions only, per-channel weights) that ONNX Runtime's quantizer calibrates on the sample.
TensorRT 8.6 was written for opset 17, the default of the TorchScript exporter.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from cp_debug.backends.base import Program
from cp_debug.backends.registry import create
from cp_debug.backends.spec import BackendSpec
from cp_debug.backends.tensorrt.engine_runs import output_distance
from cp_debug.errors import CpdebugError
from cp_debug.graph.graph import Graph
from cp_debug.programs.pipeline import Export, Key, Pipeline, prepare
from cp_debug.recipes.base import Model, Sample
from cp_debug.recipes.registry import load_model

SPECS = "trt-fp32,trt-tf32,trt-fp16,trt-int8,trt-best,trt-bf16"
LAYERS = [("Conv", 64, 3, 1), ("Conv", 128, 3, 2), ("Conv", 128, 3, 1), ("Conv", 256, 3, 2), ("Conv", 256, 3, 1)]
LAYERS += [("Conv", 128, 1, 1), ("ConvTranspose", 64, 2, 2), ("Conv", 32, 3, 1)]
"""Operator, channels out, kernel, stride: reductions of 576 to 2304, strides, 1×1, a transposed convolution."""
SIDE = 32

Values = dict[Key, np.ndarray]


def make_net(path: Path, layers: Sequence[tuple[str, int, int, int]] = LAYERS) -> Path:
    """A chain of layers, each with a ReLU, on [1, 64, 32, 32], weights from N(0, 2 ÷ reduction length)."""
    rng = np.random.default_rng(0)
    nodes, weights, value, channels = [], [], "x", 64
    for i, (op, width, kernel, stride) in enumerate(layers):
        turned = op == "ConvTranspose"
        shape = (channels, width, kernel, kernel) if turned else (width, channels, kernel, kernel)
        length = channels if turned else channels * kernel**2
        weights.append(numpy_helper.from_array(normal(rng, shape) * np.float32((2 / length) ** 0.5), f"w{i}"))
        weights.append(numpy_helper.from_array(normal(rng, (width,)) * np.float32(0.1), f"b{i}"))
        pads = [0] * 4 if turned else [kernel // 2] * 4
        conv, relu = f"/{i}/{op}_output_0", f"/{i}/Relu_output_0"
        nodes.append(
            helper.make_node(
                op,
                [value, f"w{i}", f"b{i}"],
                [conv],
                f"/{i}/{op}",
                kernel_shape=[kernel] * 2,  # TensorRT 8 asks for it where the weights go through Q/DQ
                strides=[stride] * 2,
                pads=pads,
            )
        )
        nodes.append(helper.make_node("Relu", [conv], [relu], f"/{i}/Relu"))
        value, channels = relu, width
    nodes[-1].output[0] = "y"
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 64, SIDE, SIDE])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(onnx.shape_inference.infer_shapes(model, strict_mode=True), path)
    return path


def normal(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


def quantize(program: Program, feed: Mapping[str, np.ndarray], path: Path) -> Program:
    """The program with Q/DQ nodes around its convolutions, ranges from one feed."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class One(CalibrationDataReader):
        feeds: Iterator[dict[str, np.ndarray]] = iter([dict(feed)])

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.feeds, None)

    quantize_static(
        program.graph.path,
        path,
        One(),
        quant_format=QuantFormat.QDQ,
        op_types_to_quantize=["Conv"],
        per_channel=True,
        activation_type=QuantType.QInt8,
        weight_type=QuantType.QInt8,
        extra_options={
            "ActivationSymmetric": True,
            "WeightSymmetric": True,
            "QuantizeBias": False,
            "AddQDQPairToWeight": True,  # TensorRT 8 reads no kernel that is stored in INT8
            "OpTypesToExcludeOutputQuantization": ["Conv"],
        },
    )
    return replace(program, graph=Graph(path), module=None, alignment=None)


def reference_values(model: Model, programs: list[Program], sample: Sample) -> Values:
    """Every input and value of every component on ONNX Runtime, FP32."""
    values: Values = {}
    with Pipeline(model, programs, create(BackendSpec.parse("ort"))) as pipeline:
        pipeline.run(sample, lambda key, tensor: values.update({key: np.array(tensor)}))
    return values


def run_component(program: Program, feed: Mapping[str, np.ndarray], spec: str, limit: float) -> dict[str, Any]:
    """One component on one backend: all that there is to know, what it exposed under ``values``."""
    values: dict[str, np.ndarray] = {}
    started = time.perf_counter()
    backend = create(BackendSpec.parse(spec), time_limit=limit)
    session = backend.open(program)
    try:
        opened = time.perf_counter()
        session.run(feed, lambda name, tensor: values.update({name: np.array(tensor)}))
        probed = time.perf_counter()
        session.run(feed)
        seconds = {"open": opened - started, "probed_run": probed - opened, "plain_run": time.perf_counter() - probed}
        return {
            "versions": backend.versions(),
            "seconds": {name: round(value, 2) for name, value in seconds.items()},
            "settings": dict(session.settings),
            "values": values,
        }
    finally:
        session.close()


def rows_of(name: str, args: argparse.Namespace, deadline: float) -> Iterator[dict[str, Any]]:
    """A row for each component and backend; a failure is a row with its words.

    Components are fed the reference's values, so that each is judged, and fails, by itself.
    """
    model = load_model(str(make_net(args.out / "net.onnx")) if name == "net" else name)
    sample = next(iter(model.samples(1, 0, None)))
    with tempfile.TemporaryDirectory() as folder:
        programs = prepare(model, sample, Path(folder), how=Export(args.exporter, 17))
        reference = reference_values(model, programs, sample)
        shown = {f"ort|{key.value}": array for key, array in reference.items()}
        for spec, program in itertools.product(args.specs.split(","), programs):
            feed = {v.name: reference[Key(program.name, v.name)] for v in program.graph.inputs}
            row: dict[str, Any] = {"model": name, "component": program.name, "spec": spec}
            left = deadline - time.monotonic()
            try:
                if left < 20:
                    raise TimeoutError("no time left")
                if spec == "trt-int8":
                    place = args.out if name == "net" else Path(folder)
                    program = quantize(program, feed, place / f"{program.name}-int8.onnx")
                row |= run_component(program, feed, spec, left)
            except CpdebugError as error:
                yield {**row, "error": str(error)}
                continue
            except Exception:  # note it, go on with the next backend
                yield {**row, "error": traceback.format_exc()}
                continue
            values = row.pop("values")
            shown |= {f"{spec}|{value}": array for value, array in values.items()}
            expected = {value: reference.get(Key(program.name, value)) for value in values}
            row["rel_l2_to_ort"] = {
                value: output_distance({value: array}, values) for value, array in expected.items() if array is not None
            }
            yield row
        if name == "net":
            np.savez_compressed(args.out / "tensors.npz", allow_pickle=False, **shown)


def summary(row: Mapping[str, Any]) -> str:
    """Lines for the terminal."""
    head = f"{row['model']} {row['component']} {row['spec']}:"
    if "error" in row:
        return f"{head} {row['error'].strip()[-500:]}"
    told = row["settings"]
    kinds = Counter(str(layer["arithmetic"]) for layer in told["layers"] if layer["arithmetic"])
    changed = {
        name: len(told[name]["fusions_changed"] + told[name]["tactics_changed"]) for name in ("rebuilt", "probed")
    }
    distances = row["rel_l2_to_ort"].values()
    return (
        f"{head} worst {max(distances, default=0.0):.2e} over {len(distances)} values, "
        f"{len(told['layers'])} layers {dict(kinds)}, types {told['realised_precision']}, "
        f"gap {told['observer_gap']:.2e}, floor {told['rebuild_floor']:.2e}, "
        f"changed {changed}, seconds {told['build_seconds']} {row['seconds']}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path, help="folder for results.json, tensors.npz, net.onnx and net-int8.onnx")
    parser.add_argument("--models", default="net,centerpoint:tiny")
    parser.add_argument("--specs", default=SPECS)
    parser.add_argument("--exporter", default="torchscript")
    parser.add_argument("--budget", type=float, default=540.0, help="seconds after which nothing new is started")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + args.budget
    rows: list[dict[str, Any]] = []
    for name in args.models.split(","):
        for row in rows_of(name, args, deadline):
            rows.append(row)
            partial = args.out / "results.json.part"
            partial.write_text(json.dumps(rows, indent=1))
            partial.replace(args.out / "results.json")
            print(summary(row), flush=True)


if __name__ == "__main__":
    main()
