"""AWML's ``deploy_config.py``, old and new forms, as this project's configuration."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cp_debug.deploy.awml_schema import AwmlConfig, AwmlQuantization, Framework, idle_keys
from cp_debug.deploy.documents import Dialect, read_settings
from cp_debug.deploy.schema import VARIANTS, DeployConfig, home, validate
from cp_debug.errors import InputError

ALL = 1 << 31
"""Number of samples where AWML says -1."""
BACKENDS = {"pytorch": "torch", "onnx": "ort"}
_ENUMS = {
    "Backend": {"PYTORCH": "pytorch", "ONNX": "onnx", "TENSORRT": "tensorrt"},
    "ExportMode": {"ONNX": "onnx", "TRT": "trt", "BOTH": "both", "NONE": "none"},
    "PrecisionPolicy": {
        "AUTO": "auto",
        "FP16": "fp16",
        "FP32_TF32": "fp32_tf32",
        "INT8": "int8",
        "STRONGLY_TYPED": "strongly_typed",
    },
}
"""Enumerations that AWML's files import, with the values of their members."""
DIALECT = Dialect(_ENUMS, frozenset((*AwmlConfig.model_fields, *AwmlConfig.idle)))
_MMDEPLOY = ("codebase_config", "ir_config", "partition_config", "calib_config")
"""Keys that mmdeploy's configurations have, and AWML's do not."""
_OTHER_MODELS = {
    "BEVFusion's (a sparse encoder)": ("bevfusion_", "spconv_", "fuse_spconv"),
    "StreamPETR's (images and a memory)": ("extract_img_feat", "position_embedding", "pts_head_memory"),
}
"""Models of AWML by how their keys and components begin."""


def read_awml(path: Path) -> dict[str, Any] | None:
    """The file as a document of ``DeployConfig``, or None for one that is not Python.

    ``notes`` of the document are lines for people. Raises InputError that names the file and the key or line.
    """
    return awml_document(read_settings(path, DIALECT), path) if path.suffix == ".py" else None


def is_awml(settings: Any) -> bool:
    """Whether settings are AWML's, or mmdeploy's, by their keys, and not this project's."""
    ours = DeployConfig.model_fields.keys()
    theirs = {*DIALECT.keys, *_MMDEPLOY} - ours
    if not isinstance(settings, Mapping) or settings.keys() & (ours - DIALECT.keys):
        return False
    return not settings.keys().isdisjoint(theirs)


def awml_document(settings: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """AWML's settings from the file ``path`` as ``read_awml`` gives them. Raises InputError as it does."""
    _check_kind(settings, path)
    return _document(validate(AwmlConfig, settings, path), path)


def _check_kind(settings: Mapping[str, Any], path: Path) -> None:
    """Raise InputError, with one sentence, for deployments of other tools, tasks and models, and what is none."""
    if not settings:
        raise InputError(f"{path}: holds no settings; expected AWML's, such as export and components")
    if "type" in _mapping(settings.get("model")):
        raise InputError(
            f"{path}: a model's configuration (model is a dictionary with a type), which says nothing about its "
            f"deployment; expected AWML's deploy_config.py, with --model mmdet3d:{path.name}"
        )
    if path.suffix == ".py" and (ours := [key for key in ("work_dir", "model") if key in settings]):
        raise InputError(f"{path}: {ours[0]} is a setting of cpdebug, which belongs in YAML, TOML or JSON")
    kind = settings.get("task_type")
    if isinstance(kind, str) and kind != "detection3d":
        raise InputError(f"{path}: a deployment of another task: task_type is {kind!r}; expected 'detection3d'")
    backend = settings.get("backend_config")
    codebase = settings.get("codebase_config")
    if any(key in settings for key in _MMDEPLOY) or "type" in _mapping(settings.get("onnx_config")):
        what, where = _mapping(codebase).get("type"), _mapping(backend).get("type")
        task = f" for {what}" if isinstance(what, str) else ""
        runtime = f" and {where}" if task and isinstance(where, str) else ""
        raise InputError(
            f"{path}: a configuration of mmdeploy{task}{runtime}, which says how mmdeploy exports; expected AWML's "
            "deploy_config.py or cpdebug's YAML, TOML or JSON (`cpdebug bisect` takes the ONNX file that mmdeploy "
            "wrote)"
        )
    if "ann_file" in _mapping(settings.get("runtime_io")):
        raise InputError(
            f"{path}: a deployment of another task: runtime_io.ann_file names annotations of images; expected "
            "runtime_io.info_file, of clouds"
        )
    if any("min_shape" in _mapping(value) for value in _mapping(settings.get("tensorrt_config")).values()):
        raise InputError(
            f"{path}: a deployment of another model: tensorrt_config holds shapes of inputs (FRNet); expected them in "
            "components.NAME.tensorrt_profile"
        )
    _check_model(settings, path)


def _check_model(settings: Mapping[str, Any], path: Path) -> None:
    """Raise InputError, with one sentence, for AWML's deployments of models whose parts only AWML can export."""
    quantization, parts = _mapping(settings.get("quantization")), _mapping(settings.get("components"))
    signs = {
        **{f"quantization.{key}": str(key) for key in quantization},
        **{f"components.{key}": str(key) for key in parts},
        **{str(key): str(key) for key in settings},
    }
    for model, marks in _OTHER_MODELS.items():
        place = next((place for place, key in signs.items() if any(key.startswith(mark) for mark in marks)), None)
        if place is not None:
            raise InputError(
                f"{path}: a deployment of another model: {place} is {model}; expected a CenterPoint with pillars "
                "(`cpdebug bisect` takes the ONNX files that AWML exported)"
            )


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _document(awml: AwmlConfig, path: Path) -> dict[str, Any]:
    engine, quantization = awml.engine, awml.quantization
    verification, mode = awml.verification, awml.export.mode
    scenarios = None if verification.scenarios is None else verification.scenarios.get(mode) or []
    variant = VARIANTS.get(engine.precision_policy, engine.precision_policy)
    backends = BACKENDS
    if quantization.enabled:
        backends, variant = {**BACKENDS, "onnx": "ort-int8"}, "int8"

    def spec(framework: str, device: str | None, *, verified: bool = False) -> str:
        devices = verification.devices if verified and verification.devices is not None else awml.devices
        if framework == "tensorrt" and device == "cpu":
            device = "cuda"  # AWML's export device, which does not hold for engines
        place = {"cuda": devices.cuda, "cpu": devices.cpu}.get(device or "", device)
        if device == "cuda" and place is None:
            raise InputError(f"{path}: devices.cuda is None, but {framework} runs on cuda; expected a device")
        name = backends.get(framework, f"trt-{variant}")
        return f"{name}@{place}" if place else name

    evaluation = awml.evaluation
    every = evaluation.num_samples == -1
    if every and evaluation.enabled and awml.runtime_io.info_file is None:
        raise InputError(f"{path}: evaluation.num_samples is -1, all, but runtime_io.info_file names no data")
    evaluated = [spec(f, b.device) for f, b in evaluation.backends.items() if b.enabled]
    for framework in (*evaluation.models, *evaluation.models_to_evaluate):
        evaluated.append(spec(framework, getattr(evaluation, f"{framework}_device") or awml.export.device))
    checkpoint, notes = _checkpoint(awml)
    if quantization.enabled and verification.enabled and "tolerance" in verification.model_fields_set:
        notes.append(
            "verification.tolerance is not used: it applies to the quantized model and its files, which the export "
            "compares; INT8 outputs are verified against FP32, each within its limit"
        )
    folders, idle = _folders(awml)
    idle = [*idle_keys(awml), *idle]
    if idle:
        notes.append(f"without effect here: {', '.join(sorted(dict.fromkeys(idle)))}")
    return {
        "model": awml.model_cfg and f"mmdet3d:{awml.model_cfg}",
        "checkpoint": checkpoint,
        "work_dir": awml.export.work_dir,
        "log_file": _log_file(awml),
        "export": {
            "mode": mode,
            "opset": awml.onnx_config.opset_version,
            "fold": awml.onnx_config.do_constant_folding,
            "simplify": awml.onnx_config.simplify,
            "onnx_dir": folders["onnx"],
        },
        "components": _components(awml),
        "tensorrt": {
            "precision": engine.precision_policy,
            "workspace_mib": engine.max_workspace_size >> 20,
            "engine_dir": folders["tensorrt"],
        },
        "quantization": _quantization(quantization) if quantization.enabled else None,
        "data": {
            "path": awml.runtime_io.info_file,
            "root": awml.data_root,
            "first": awml.runtime_io.sample_idx if awml.export.sample_idx is None else awml.export.sample_idx,
        },
        "verify": {
            "enabled": verification.enabled if awml.export.verify is None else awml.export.verify,
            "samples": verification.num_verify_samples,
            "max_abs": None if quantization.enabled else verification.tolerance,
            "scenarios": scenarios
            and [
                {
                    "reference": spec(s.ref_backend, s.ref_device, verified=True),
                    "test": spec(s.test_backend, s.test_device, verified=True),
                }
                for s in scenarios
            ],
        },
        "evaluate": {
            "enabled": evaluation.enabled,
            "samples": ALL if every else evaluation.num_samples,
            "backends": list(dict.fromkeys(evaluated)) or None,
        },
        "notes": notes,
    }


def _checkpoint(awml: AwmlConfig) -> tuple[str | None, list[str]]:
    """The weights, and what is to be said of them: where the quantized ones are not there yet, those to calibrate."""
    backend = awml.evaluation.backends.get("pytorch")
    named = (
        awml.checkpoint_path
        or awml.export.checkpoint_path
        or (backend.checkpoint if backend else None)
        or awml.evaluation.models.get("pytorch")
    )
    quantization = awml.quantization
    before = quantization.ptq.checkpoint if quantization.ptq is not None else None
    if quantization.enabled and before is not None and not (named and home(Path(named)).is_file()):
        gone = f"checkpoint_path ({named}) does not exist" if named else "no checkpoint_path is named"
        return before, [f"{gone}: quantization.ptq.checkpoint is calibrated instead"]
    return named, []


def _folders(awml: AwmlConfig) -> tuple[dict[str, str | None], list[str]]:
    """Folders of files that exist already, and the keys that name others than the ones that are written."""
    work, mode = Path(awml.export.work_dir), awml.export.mode
    written = {
        "onnx": Path(awml.export.onnx_path) if awml.export.onnx_path else work / "onnx",
        "tensorrt": work / "tensorrt",
    }
    exists = {"onnx": mode in ("trt", "none"), "tensorrt": mode in ("onnx", "none")}
    folders, idle = {"onnx": awml.export.onnx_path, "tensorrt": None}, []
    keys: dict[Framework, str] = {"onnx": "model_dir", "tensorrt": "engine_dir"}
    for framework, key in keys.items():
        backend = awml.evaluation.backends.get(framework)
        folder = getattr(backend, key, None)
        if backend is None or folder is None or not backend.enabled or Path(folder) == written[framework]:
            continue
        if exists[framework] and folders[framework] is None:
            folders[framework] = folder
        else:
            idle.append(f"evaluation.backends.{framework}.{key}")
    idle += [f"evaluation.models.{f}" for f in keys if awml.evaluation.models.get(f)]
    return folders, idle


def _log_file(awml: AwmlConfig) -> str | None:
    """The log; a name without a folder stands in the work folder."""
    name = (awml.deploy_log_path or "").strip() or awml.output_path
    if not name:
        return None
    return str(Path(awml.export.work_dir) / name if len(Path(name).parts) == 1 else name)


def _quantization(settings: AwmlQuantization) -> dict[str, Any]:
    calibration, ptq = settings.calibration, settings.ptq
    method = "max" if calibration.method == "max" else (ptq and ptq.amax_method) or calibration.amax_method
    samples = (ptq and ptq.calibrate_samples) or calibration.num_batches
    return {
        "skip_layers": settings.skipped(),
        **({"method": method} if method else {}),
        **({"samples": samples} if samples else {}),
    }


def _components(awml: AwmlConfig) -> dict[str, Any]:
    """Component's own name → its entry; profiles may stand with the component or, all together, with the backend."""
    shared_profiles = {
        name: shapes for model_input in awml.model_inputs for name, shapes in model_input.input_shapes.items()
    }
    engines = awml.tensorrt_config.components if awml.tensorrt_config is not None else {}
    documents = {}
    for key, component in (awml.components or awml.onnx_config.components).items():
        profiles = component.tensorrt_profile or shared_profiles
        engine = component.engine_file or (engines[key].engine_file if key in engines else None)
        documents[component.name or key] = {
            "onnx_file": component.onnx_file,
            "engine_file": engine,
            "inputs": component.io and [t.name for t in component.io.inputs],
            "outputs": component.io and [t.name for t in component.io.outputs],
            "dynamic_axes": component.io and component.io.dynamic_axes,
            "profile": {n: {"min": s.min_shape, "opt": s.opt_shape, "max": s.max_shape} for n, s in profiles.items()},
        }
    return documents
