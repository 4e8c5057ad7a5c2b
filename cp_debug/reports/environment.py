"""Facts about this machine: packages, devices, and settings that affect numbers."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cp_debug.backends.determinism import deterministic, read_settings
from cp_debug.errors import CpdebugError
from cp_debug.optional import install
from cp_debug.safe_text import amount

PACKAGES = {
    "torch": "",
    "onnx": "",
    "onnxscript": "",
    "onnxruntime": "cpu",
    "onnxruntime-gpu": "gpu",
    "openvino": "openvino",
    "tensorrt": "gpu",
    "polygraphy": "gpu",
    "nvidia-modelopt": "quant",
    "mmdet3d": "mmdet3d",
}
"""Distribution → the extra that brings it; empty for those that cpdebug cannot be without."""
ELSEWHERE = {
    "onnxruntime-gpu": ", on a machine with an NVIDIA GPU",
    "tensorrt": ", on a machine with an NVIDIA GPU, or CPDEBUG_TRT_PYTHON=/path/to/a/python that has it",
    "mmdet3d": ", then pip install --no-deps mmdet==3.3.0 mmdet3d==1.4.0; or CPDEBUG_MMDET3D_PYTHON=/path/to/a/python "
    "that has it",
}
"""Distribution → another way to get it."""

ADVICE = {
    "deterministic_algorithms": "torch.use_deterministic_algorithms(True)",
    "CUBLAS_WORKSPACE_CONFIG": "export CUBLAS_WORKSPACE_CONFIG=:4096:8",
}
"""Setting that is no attribute of torch → the line that makes it the safe one, outside of cpdebug."""

PROBE = 120.0
"""Seconds within which TensorRT tells what it is: its libraries are gigabytes."""
_UNSET_IS_SAFE = {"none", "ieee"}


@dataclass
class Package:
    """One distribution; ``version`` is None where it is missing."""

    name: str
    version: str | None
    hint: str = ""


@dataclass
class Setting:
    """One setting: its value in a fresh process here, and what cpdebug sets for a run."""

    name: str
    value: str
    in_a_run: str
    safe: bool
    advice: str = ""


@dataclass
class Environment:
    """Everything that ``cpdebug doctor`` shows."""

    packages: list[Package] = field(default_factory=list)
    settings: list[Setting] = field(default_factory=list)
    devices: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def examine() -> Environment:
    """Facts about this process and machine; nothing is changed."""
    environment = Environment(packages=list(_packages()), settings=[*_torch_settings(), *_other_settings()])
    _devices(environment)
    return environment


def _packages() -> Iterator[Package]:
    yield Package("python", platform.python_version())
    for name, extra in PACKAGES.items():
        try:
            yield Package(name, importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            yield Package(name, None, install(extra) + ELSEWHERE.get(name, "") if extra else "")


def _torch_settings() -> Iterator[Setting]:
    current = read_settings()
    with deterministic() as in_a_run:
        for name in (*(name for name in current if name.startswith("backends.")), *ADVICE):
            value, value_in_run = current[name], in_a_run[name]
            line = f'"{value_in_run}"' if isinstance(value_in_run, str) else value_in_run
            advice = ADVICE.get(name, f"torch.{name} = {line}")
            safe = value == value_in_run or {str(value), str(value_in_run)} <= _UNSET_IS_SAFE
            yield Setting(f"torch {name}", _word(value), _word(value_in_run), safe, "" if safe else advice)


def _other_settings() -> Iterator[Setting]:
    override = os.environ.get("NVIDIA_TF32_OVERRIDE")
    yield Setting(
        "NVIDIA_TF32_OVERRIDE", override or "unset", override or "unset", override in (None, "0"),
        "" if override in (None, "0") else "unset it: it forces TF32 in every NVIDIA library",
    )  # fmt: skip
    yield Setting(
        "ONNX Runtime CUDA use_tf32", "on (its default)", "off", False,
        'providers=[("CUDAExecutionProvider", {"use_tf32": "0"})]',
    )  # fmt: skip
    yield Setting(
        "TensorRT BuilderFlag.TF32", "on (its default)", "off, except for trt-tf32", False,
        "config.clear_flag(trt.BuilderFlag.TF32)",
    )  # fmt: skip


def int8_sums_saturate() -> bool:
    """Whether ONNX Runtime, which is there, adds products of unsigned and signed bytes in pairs of 16 bits here, as on
    processors without VNNI."""
    ort: Any = importlib.import_module("onnxruntime")
    from onnx.parser import parse_model

    head = '<ir_version: 8, opset_import: ["" : 13]>'
    model = parse_model(f"{head} product (uint8[4,4] a, int8[4,4] b) => (int32[4,4] y) {{ y = MatMulInteger (a, b) }}")
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (sums,) = session.run(None, {"a": np.full((4, 4), 255, np.uint8), "b": np.full((4, 4), 127, np.int8)})
    return bool((sums != 4 * 255 * 127).any())


def _devices(environment: Environment) -> None:
    import torch

    capability = torch.backends.cpu.get_cpu_capability()
    environment.devices.append(f"cpu: {platform.machine()}, {capability}, {amount(torch.get_num_threads(), 'thread')}")
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    environment.devices += [f"cuda:{i}: {name}" for i, name in enumerate(gpus)] or [
        "cuda: no device that torch can use"
    ]
    providers = _ort_providers()
    environment.devices.append(f"ONNX Runtime providers: {', '.join(providers) or 'none, it is not installed'}")
    if providers and int8_sums_saturate():
        environment.warnings.append(
            "INT8 in ONNX Runtime: this processor has no VNNI, so sums of unsigned data and signed weights saturate in "
            'pairs of products; quantize with reduce_range=True, or set session.x64quantprecision to "1"'
        )
    ort_cuda = "CUDAExecutionProvider" in providers
    if providers and bool(gpus) != ort_cuda:
        able, unable = ("torch", "ONNX Runtime") if gpus else ("ONNX Runtime", "torch")
        environment.warnings.append(
            f"device mismatch: {able} can use CUDA, {unable} cannot; compare on the CPU or fix it"
        )
    environment.devices.append(_tensorrt())


def _ort_providers() -> list[str]:
    try:
        onnxruntime: Any = importlib.import_module("onnxruntime")
    except ImportError:
        return []
    return list(onnxruntime.get_available_providers())


def _tensorrt() -> str:
    from cp_debug.backends.tensorrt.client import RunnerClient

    try:
        probed = RunnerClient(time_limit=PROBE).probe()
    except CpdebugError as error:
        return str(error).replace("\n", "; ")
    return f"TensorRT: {probed}"


def _word(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return "unset" if value is None else str(value)
