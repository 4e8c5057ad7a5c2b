"""The zoo's networks as other people's tools hand them over: FP16, quantized, simplified, renamed, of another opset.

Each variant is ``PARENT.VARIANT.onnx``; ``variants.json`` says of which network and which group. ModelOpt changes ONNX
Runtime's quantizer in its own process, so it works in another one.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import multiprocessing
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from .edits import rename

Write = Callable[[Path, Path, dict[str, np.ndarray]], None]
"""Writes a variant: (parent's file, the variant's file, the parent's sample)."""

PARENTS = (
    "resnet.torchscript",
    "mobilenet.dynamo",
    "unet.torchscript",
    "vit.torchscript",
    "yolo.torchscript",
    "tagger.torchscript",
    "decoder.dynamo",
    "ppocr-cls",
    "ppocr-rec",
)
"""Networks that FP16 and quantized variants are made of."""


class _Reader:
    """What ONNX Runtime's calibrator reads: the sample, and seven that differ from it by noise."""

    def __init__(self, sample: dict[str, np.ndarray]) -> None:
        rng = np.random.default_rng(7)
        self._left = [sample]
        for _ in range(7):
            near = {n: (a + 0.1 * rng.standard_normal(a.shape)).astype(a.dtype) for n, a in sample.items()}
            self._left.append({n: near[n] if sample[n].dtype.kind == "f" else sample[n] for n in sample})

    def get_next(self) -> dict[str, np.ndarray] | None:
        return self._left.pop() if self._left else None


def _half(source: Path, target: Path, keep: bool) -> None:
    from onnxruntime.transformers.float16 import convert_float_to_float16

    onnx.save(convert_float_to_float16(onnx.load(source), keep_io_types=keep, disable_shape_infer=False), target)


def fp16(source: Path, target: Path, sample: dict[str, np.ndarray]) -> None:
    """The whole file in FP16, inputs and outputs too."""
    _half(source, target, keep=False)
    inputs = {n: a.astype(np.float16) if a.dtype == np.float32 else a for n, a in sample.items()}
    np.savez(target.with_suffix(".npz"), **inputs)


def fp16_io(source: Path, target: Path, sample: dict[str, np.ndarray]) -> None:
    """FP16 between Cast nodes."""
    _half(source, target, keep=True)


def autocast(source: Path, target: Path, sample: dict[str, np.ndarray]) -> None:
    """ModelOpt's mixed precision."""
    from modelopt.onnx.autocast import convert_to_mixed_precision

    made = convert_to_mixed_precision(str(source), "fp16", keep_io_types=True, providers=["cpu"])
    onnx.save(made, target)


def _static(source: Path, target: Path, sample: dict[str, np.ndarray], *, first: bool = False, **options: Any) -> None:
    from onnxruntime.quantization import CalibrationDataReader, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    CalibrationDataReader.register(_Reader)
    prepared = target.with_suffix(".pre.tmp")
    if first:
        quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
    quantize_static(str(prepared if first else source), str(target), _Reader(sample), **options)
    prepared.unlink(missing_ok=True)


def static(source: Path, target: Path, sample: dict[str, np.ndarray]) -> None:
    """``quantize_static`` as it comes: Q/DQ, activations in uint8 … int8 with zero points, weights by tensor."""
    _static(source, target, sample)


def static_channels(source: Path, target: Path, sample: dict[str, np.ndarray]) -> None:
    """``quant_pre_process`` and ``quantize_static`` with weights by channel and activations in uint8."""
    from onnxruntime.quantization import QuantType

    _static(source, target, sample, first=True, per_channel=True, activation_type=QuantType.QUInt8)


def static_tensorrt(source: Path, target: Path, sample: dict[str, np.ndarray]) -> None:
    """Symmetric INT8, biases in FP32: what TensorRT reads."""
    options = {"ActivationSymmetric": True, "WeightSymmetric": True, "QuantizeBias": False}
    _static(source, target, sample, first=True, per_channel=True, extra_options=options)


def qoperator(source: Path, target: Path, sample: dict[str, np.ndarray]) -> None:
    """``quantize_static`` in the operator format: QLinearConv, QLinearMatMul."""
    from onnxruntime.quantization import QuantFormat, QuantType

    _static(source, target, sample, first=True, quant_format=QuantFormat.QOperator, activation_type=QuantType.QUInt8)


def dynamic(source: Path, target: Path, sample: dict[str, np.ndarray]) -> None:
    """``quantize_dynamic``: MatMulInteger, DynamicQuantizeLSTM."""
    from onnxruntime.quantization import quantize_dynamic

    quantize_dynamic(str(source), str(target))


def modelopt(source: Path, target: Path, sample: dict[str, np.ndarray]) -> None:
    """ModelOpt's INT8 Q/DQ with FP32 between."""
    from modelopt.onnx.quantization import quantize

    options = {"calibration_eps": ["cpu"], "calibration_method": "max", "high_precision_dtype": "fp32"}
    quantize(str(source), output_path=str(target), calibration_data=sample, **options)


def four_bits(source: Path, target: Path, sample: dict[str, np.ndarray]) -> None:
    """Weights of MatMul in 4 bits, by blocks of 32: MatMulNBits."""
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    work = MatMulNBitsQuantizer(onnx.load(source), block_size=32, is_symmetric=True)
    work.process()
    onnx.save(work.model.model, target)


def simplified(source: Path, target: Path, sample: dict[str, np.ndarray]) -> None:
    """onnxslim's graph: constants folded, operators fused."""
    import onnxslim

    onnxslim.slim(str(source), str(target))


def renamed(source: Path, target: Path, sample: dict[str, np.ndarray]) -> None:
    """Every node and every value between inputs and outputs under another name."""
    rename(source, target)


def opset(source: Path, target: Path, sample: dict[str, np.ndarray]) -> None:
    """Converted to opset 21 by ``onnx.version_converter``."""
    from onnx import version_converter

    model = version_converter.convert_version(onnx.load(source), 21)
    model.ir_version = 10
    onnx.save(model, target)


def optimized(source: Path, target: Path, sample: dict[str, np.ndarray]) -> None:
    """What ONNX Runtime writes after its extended optimization: contrib operators."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(target)
    ort.InferenceSession(str(source), options, providers=["CPUExecutionProvider"])


VARIANTS: dict[str, tuple[str, Write]] = {
    "fp16": ("fp16", fp16),
    "fp16-io": ("fp16", fp16_io),
    "autocast": ("fp16", autocast),
    "static": ("int8", static),
    "static-channels": ("int8", static_channels),
    "static-tensorrt": ("int8", static_tensorrt),
    "qoperator": ("int8", qoperator),
    "dynamic": ("int8", dynamic),
    "modelopt": ("int8", modelopt),
    "four-bits": ("int8", four_bits),
    "simplified": ("again", simplified),
    "renamed": ("again", renamed),
    "opset": ("again", opset),
    "optimized": ("again", optimized),
}
ELSEWHERE = frozenset({"autocast", "modelopt"})


def write_variants(folder: Path, parents: Iterable[str] = PARENTS) -> Iterator[tuple[str, str]]:
    """Write every variant of the parents that lie in the folder; yields (name, error). A converter's failure is no
    failure of the zoo: ONNX Runtime must run the variant, else it is not kept."""
    index = folder / "variants.json"
    known: dict[str, dict[str, str]] = json.loads(index.read_text()) if index.exists() else {}
    for parent in parents:
        source = folder / f"{parent}.onnx"
        if not source.exists():
            continue
        for kind, (group, _) in VARIANTS.items():
            name = f"{parent}.{kind}"
            if name in known:
                continue
            error = _write(kind, source, folder / f"{name}.onnx")
            if not error:
                known[name] = {"group": group, "parent": parent, "kind": kind}
                if (folder / f"{name}.npz").exists():
                    known[name]["inputs"] = name
                index.write_text(json.dumps(known, indent=1))
            yield name, error


def _write(kind: str, source: Path, target: Path) -> str:
    """The error, empty where the variant is there and runs. In a process of its own: converters leave traces."""
    context = multiprocessing.get_context("spawn" if kind in ELSEWHERE else "fork")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(kind, source, target, send))
    process.start()
    send.close()
    try:
        error = receive.recv() if receive.poll(120) else "took longer than 120 s"
    except EOFError:
        error = "the converter's process died"
    process.kill()
    process.join()
    if error:
        target.unlink(missing_ok=True)
        target.with_suffix(".npz").unlink(missing_ok=True)
    return str(error)


def _work(kind: str, source: Path, target: Path, send: Any) -> None:
    import onnxruntime as ort

    logging.disable(logging.ERROR)
    sample = dict(np.load(source.with_suffix(".npz")))
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            VARIANTS[kind][1](source, target, sample)
            inputs = target.with_suffix(".npz")
            arrays = dict(np.load(inputs)) if inputs.exists() else sample
            options = ort.SessionOptions()
            options.log_severity_level = 4
            results = ort.InferenceSession(str(target), options, providers=["CPUExecutionProvider"]).run(None, arrays)
        finite = all(np.isfinite(a).all() for a in results if isinstance(a, np.ndarray) and a.dtype.kind == "f")
        send.send("" if finite else "its results are not finite")
    except Exception as error:  # the converter's or ONNX Runtime's own: told, and the variant left out
        send.send(f"{type(error).__name__}: {str(error).splitlines()[0][:160] if str(error) else ''}")
