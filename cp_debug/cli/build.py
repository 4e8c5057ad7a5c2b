"""``cpdebug build``: a TensorRT engine for every component."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from cp_debug.cli import tensorrt
from cp_debug.cli.given import check_given, check_installed
from cp_debug.cli.saving import check_new
from cp_debug.cli.typed import once, refuse, refuse_export_folder
from cp_debug.loading import load_torch


class PrecisionPolicy(str, Enum):
    """Precisions that TensorRT may compute in."""

    auto = "auto"
    fp32 = "fp32"
    fp32_tf32 = "fp32_tf32"
    fp16 = "fp16"
    bf16 = "bf16"
    int8 = "int8"
    strongly_typed = "strongly_typed"


def build(
    model: Annotated[str, typer.Argument(help="A model, or the configuration of `cpdebug deploy`.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the engines.")],
    precision: Annotated[
        PrecisionPolicy | None, typer.Option(help="auto sets no flag: TensorRT then uses TF32.  [default: auto]")
    ] = None,
    onnx_dir: Annotated[Path | None, typer.Option(help="Folder of `cpdebug export`; default: exported now.")] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="Weights: .pt or .safetensors.")] = None,
    trt_python: tensorrt.Python = None,
    profile: tensorrt.Profiles = None,
    keep_fp32: tensorrt.KeepFp32 = None,
    workspace: tensorrt.Workspace = None,
    timing_cache: tensorrt.TimingCache = None,
    calibration_cache: tensorrt.CalibrationCache = None,
    trt_calibrator: tensorrt.CalibratorKind = None,
    trt_calib_data: tensorrt.CalibrationData = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace earlier engines in --output.")] = False,
) -> None:
    """Build TensorRT engines, one for each component. A manifest beside them is checked before one is loaded."""
    from contextlib import ExitStack
    from tempfile import TemporaryDirectory

    from cp_debug.cli.console import console, show_notes, steps
    from cp_debug.deploy.schema import SUFFIXES, VARIANTS

    profiles = once(map(tensorrt.parse_profile, profile or ()), "--profile")
    if not model.endswith(SUFFIXES):  # a configuration may name another interpreter
        check_given(model, checkpoint=checkpoint)
        refuse_export_folder(model)
        policy = precision.value if precision else "auto"
        backend_name = f"trt-{VARIANTS.get(policy, policy)}"
        _refuse_ranges(backend_name)
        check_installed(backend_name, trt_python=trt_python)
    load_torch()
    from cp_debug.backends.spec import BackendSpec
    from cp_debug.deploy.config import override
    from cp_debug.deploy.engines import MANIFEST, build_engines
    from cp_debug.deploy.stages import Deployment, configured

    check_new("--output", [output / MANIFEST], overwrite)
    with ExitStack() as stack, steps() as on_step:
        scratch = stack.enter_context(TemporaryDirectory(prefix="cpdebug-"))
        config, source = configured(model, None, Path(scratch))
        show_notes(config.notes)
        overrides = {
            "checkpoint": checkpoint,
            "tensorrt.precision": precision and precision.value,
            "tensorrt.python": trt_python,
            "tensorrt.workspace_mib": workspace,
            "tensorrt.timing_cache": timing_cache,
            "tensorrt.keep_fp32": list(tensorrt.named(keep_fp32)) if keep_fp32 else None,
        }
        config = override(config, overrides)
        refuse_export_folder(config.model or "")
        options: dict[str, Any] = {"on_event": on_step.on_event, "calibration_cache": calibration_cache}
        options |= {"profiles": profiles} if profiles else {}
        assert config.model is not None
        _refuse_ranges(config.engine_backend)
        spec = BackendSpec.parse(config.engine_backend)
        strongly_typed = config.tensorrt.precision == "strongly_typed"
        why = f"{spec} computes nothing in less than FP32 or TF32; expected --precision fp16, bf16 or int8"
        refuse(("keep_fp32",), unless=tensorrt.keeps_fp32(spec) or strongly_typed, why=why)
        options |= tensorrt.calibration_data(config.model, config.checkpoint, trt_calibrator, trt_calib_data, stack)
        deployment = Deployment(config, source, on_step, **options)
        backend = deployment.backend(config.engine_backend)  # before the export: it may be missing here
        if onnx_dir is None:
            deployment.ensure_files()
        kept_by = "--keep-fp32" if keep_fp32 else deployment.kept_by
        built = build_engines(deployment.programs(onnx_dir), backend, output, deployment.engine_files, on_step, kept_by)
    for engine in built:
        console.print(
            f"{output / engine.file}: built in {engine.seconds:.1f} s; layer inputs and outputs: {engine.types}"
        )


def _refuse_ranges(backend: str) -> None:
    """Refuse the flags about TensorRT's own calibration for a ``backend`` that has none."""
    ranges = ("calibration_cache", "trt_calibrator", "trt_calib_data")
    refuse(ranges, unless=backend in tensorrt.CALIBRATED, why=f"{backend} is built; expected --precision int8")
