"""Backend specs: ``torch``, ``ort-all@cpu``, ``emu-tf32``, ``trt-fp16@cuda:0`` … parsed without importing a runtime.

Options of ``torch-compile`` are read here, too: its compiler, its mode, and how it treats shapes and casts.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from cp_debug import plugins
from cp_debug.backends.narrow_options import FAMILIES, NarrowOptions, TorchFp8Options, Words, read_words
from cp_debug.errors import InputError
from cp_debug.safe_text import amount, did_you_mean, one_line

KNOWN = {
    "torch": "PyTorch FP32, TF32 off, deterministic",
    "torch-fp64": "PyTorch FP64",
    "torch-tf32": "PyTorch FP32 with TF32 on (CUDA only)",
    "torch-bf16": "PyTorch, module and inputs in BF16",
    "torch-fp16": "PyTorch, module and inputs in FP16",
    "torch-fp8": "PyTorch, products in FP8 with torch._scaled_mm, scales calibrated (:dynamic, :channel, :block, "
    ":fast)",
    "torch-compile": "torch.compile of the FP32 module (:aot_eager, :eager, :max-autotune, :dynamic, :casts)",
    "torch-compile-bf16": "torch.compile, module and inputs in BF16",
    "torch-compile-fp16": "torch.compile, module and inputs in FP16",
    "torch-int8": "PyTorch with fake quantization (nvidia-modelopt), FP32 between",
    "ort": "ONNX Runtime, graph optimization off (same as ort-none)",
    "ort-none": "ONNX Runtime, graph optimization off",
    "ort-basic": "ONNX Runtime, basic graph optimization",
    "ort-all": "ONNX Runtime, all graph optimizations, the library's default",
    "ort-tf32": "ONNX Runtime with TF32 on (CUDA only)",
    "ort-fp16": "ONNX Runtime, casts to FP16 inserted into the graph (CUDA only)",
    "ort-int8": "ONNX Runtime, Q/DQ pairs unchanged, FP32 between them, graph optimization off",
    "ort-int8-qlinear": "ONNX Runtime, all graph optimizations, with integer kernels where it has any",
    "ort-trt": "ONNX Runtime's TensorRT provider, TF32 on as it cannot be turned off; final outputs only",
    "openvino": "OpenVINO on the CPU, FP32, execution mode ACCURACY",
    "openvino-fp16": "OpenVINO, inference precision FP16 (a CPU with FP16 instructions)",
    "openvino-bf16": "OpenVINO, inference precision BF16 (a CPU with BF16 instructions)",
    "openvino-int8": "OpenVINO, Q/DQ pairs as integer kernels",
    "emu-fp32": "plain FP32 in the emulator: a second opinion on a graph",
    "emu-tf32": "emulated TF32: operands of conv and matmul rounded to 10 mantissa bits",
    "emu-bf16": "emulated BF16: operands and results rounded, FP32 accumulation",
    "emu-fp16": "emulated FP16: operands and results rounded, FP32 accumulation",
    "emu-fp16acc": "emulated FP16 with FP16 accumulation, as TensorRT's h16816 kernels do it",
    "emu-int8": "emulated INT8: the graph's own Q/DQ nodes, FP32 between them",
    "emu-fp8": "emulated FP8: operands of products in E4M3 (:e5m2), one scale per tensor (:channel, :block)",
    "emu-mxfp8": "emulated MXFP8: E4M3 (:e5m2) in blocks of 32 with scales in E8M0",
    "emu-mxfp4": "emulated MXFP4: E2M1 in blocks of 32 with scales in E8M0",
    "emu-nvfp4": "emulated NVFP4: E2M1 in blocks of 16 with scales in E4M3, and one for the tensor",
    "emu-int4": "emulated INT4 weights of MatMul and Gemm by groups of 128 (:g32), the rest in FP32",
    "trt-fp32": "TensorRT FP32, TF32 off",
    "trt-tf32": "TensorRT FP32 with TF32 on",
    "trt-fp16": "TensorRT FP16",
    "trt-bf16": "TensorRT BF16",
    "trt-int8": "TensorRT INT8",
    "trt-best": "TensorRT, every precision allowed",
}

COMPILED = "torch-compile"
"""Start of the names of backends that compile a module."""
_SPEC = re.compile(
    r"(?P<name>[a-z0-9]+(?:-[a-z0-9]+)*)(?P<options>(?::[a-z0-9_=-]+)*)(?:@(?P<device>cpu|cuda(?::\d+)?))?"
    r"(?P<test> \(.+\)|\.test)?"
)


@dataclass(frozen=True)
class BackendSpec:
    """One entry of ``--backends``. ``device`` is None where the spec leaves it to the backend."""

    name: str
    device: str | None = None
    test: str = ""
    """What follows for a test on the backend of its reference: `` (new.onnx)``, ``.test`` in results of earlier
    versions; empty for all others."""
    options: str = ""
    """Options of a narrow precision as they are spelled in full, from the first colon on: ``:block:acc=fp22``."""

    @property
    def family(self) -> str:
        """``torch``, ``ort``, ``openvino``, ``emu``, ``trt``, or a plug-in's name."""
        return self.name.partition("-")[0]

    @property
    def variant(self) -> str:
        """The part behind the family: ``fp16`` of ``trt-fp16``, empty for ``torch``."""
        return self.name.partition("-")[2]

    @property
    def precision(self) -> str:
        """The part behind the family with its options: ``fp8:block`` of ``emu-fp8:block@cpu``."""
        return self.variant + self.options

    def __str__(self) -> str:
        return self.name + self.options + (f"@{self.device}" if self.device else "") + self.test

    def running(self, what: str) -> BackendSpec:
        """The spec of a test on the backend of its reference. ``what`` it runs, a path or a name, ends the spec."""
        return replace(self, test=f" ({one_line(what.rpartition('/')[2])[-60:]})")

    @classmethod
    def parse(cls, text: str) -> BackendSpec:
        """Parse one spec. Which variants a plug-in's family has, it says itself.

        Raises InputError for a name that nobody knows, for a malformed one, for options that the backend does not have,
        and for a family that two distributions declare; whether a known one can run here, ``create`` says.
        """
        match = _SPEC.fullmatch(text.strip())
        if match is None:
            raise InputError(f"--backends: {text!r} is not a backend; expected NAME or NAME@cpu or NAME@cuda:N")
        spec = cls(match["name"], match["device"], match["test"] or "")
        plugin = plugins.find(plugins.BACKENDS, spec.family)
        if spec.name not in KNOWN and (plugin is None or plugin.own):
            known = [*KNOWN, *(each.name for each in plugins.others(plugins.BACKENDS))]
            name, _, device = spec.name.rpartition("-")
            hint = did_you_mean(spec.name, known) or f"; known are {', '.join(known)}"
            if name in known and device in ("cpu", "cuda", "gpu"):
                hint = f"; did you mean {name}@{device.replace('gpu', 'cuda')}?"
            raise InputError(f"--backends: no such backend {text!r}{hint}")
        if spec.family == "emu" and spec.variant in FAMILIES:
            options = NarrowOptions.parse(spec.variant + match["options"])
            return replace(spec, options=str(options).removeprefix(spec.variant))
        if spec.name == "torch-fp8":
            fp8 = TorchFp8Options.parse(spec.variant + match["options"])
            return replace(spec, options=str(fp8).removeprefix(spec.variant))
        if spec.name.startswith(COMPILED):
            return replace(spec, options=str(CompileOptions.parse(match["options"])))
        if match["options"]:
            takers = ", ".join([*(f"emu-{family}" for family in FAMILIES), COMPILED])
            raise InputError(f"--backends: {spec.name} has no options such as {match['options']!r}; {takers} have some")
        return spec


def parse_backends(text: str, *, test: object = None) -> list[BackendSpec]:
    """Parse ``--backends a,b,…``: the reference and at least one test.

    ``test``: what the tests run instead of the reference's model, so that one of them may run on the same backend; its
    spec then ends with the last part of that name, ``ort (new.onnx)``. A single backend is both reference and test.
    Raises InputError when fewer than two are named, or one twice.
    """
    specs = [BackendSpec.parse(part) for part in text.split(",") if part.strip()]
    if test and len(specs) == 1:
        specs *= 2
    if len(specs) < 2:
        raise InputError(
            f"--backends: {text!r} names {amount(len(specs), 'backend')}; expected a reference and some tests"
        )
    if test:
        specs[1:] = [spec.running(str(test)) if spec == specs[0] else spec for spec in specs[1:]]
    if len(set(specs)) < len(specs):
        raise InputError(f"--backends: {text!r} names a backend twice" + ("" if test else NOTHING_DIFFERS))
    return specs


NOTHING_DIFFERS = (
    "; both would run the same: --test-model, --test-checkpoint, --test-out-of-place or --test-train-mode "
    "give a test something else to run"
)


COMPILERS = ("inductor", "aot_eager", "eager")
MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
"""Modes of inductor, as ``torch.compile`` names them."""
_KNOWN: Words = {
    **{word: ("compiler", word) for word in COMPILERS},
    **{word: ("mode", word) for word in MODES},
    **{word: (word, True) for word in ("dynamic", "casts")},
}

INDUCTOR = ("cpp_", "triton_", "extern_kernels.")
"""Beginnings of the names of inductor's kernels."""


@dataclass(frozen=True)
class CompileOptions:
    """What stands behind the colons of ``torch-compile:aot_eager:dynamic``."""

    compiler: str = "inductor"
    """``inductor``, ``aot_eager`` (its graph and decompositions without its kernels) or ``eager`` (dynamo alone)."""
    mode: str = "default"
    dynamic: bool = False
    """Whether shapes are compiled as free from the first run on."""
    casts: bool = False
    """Whether inductor rounds between the operators of one kernel, as eager does: ``emulate_precision_casts``."""

    def __str__(self) -> str:
        """The canonical spelling, empty or from the first colon on."""
        words = [w for w, default in ((self.compiler, "inductor"), (self.mode, "default")) if w != default]
        return "".join(f":{word}" for word in [*words, *["dynamic"] * self.dynamic, *["casts"] * self.casts])

    @classmethod
    def parse(cls, text: str) -> CompileOptions:
        """Read ``:aot_eager:dynamic``. Raises InputError for options that it does not have, or not together."""
        options = cls(**read_words(text, filter(None, text.split(":")), _KNOWN, "torch-compile"))  # type: ignore[arg-type]
        if options.compiler != "inductor" and (options.mode != "default" or options.casts):
            raise InputError(f"{text!r}: modes and casts are options of inductor; remove {options.compiler}")
        return options
