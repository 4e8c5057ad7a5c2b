"""ONNX Runtime under fixed settings: it makes every session, reports what that says, and knows its optimizers."""

from __future__ import annotations

import os
import re
import sys
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cp_debug.backends.spec import BackendSpec
from cp_debug.doing import doing
from cp_debug.errors import BackendUnavailable, InputError
from cp_debug.graph.graph import Graph
from cp_debug.graph.onnx_runtime import SEVERITIES, session_options, severity, told
from cp_debug.optional import install, require
from cp_debug.safe_text import in_utf8, redirected

if TYPE_CHECKING:
    import onnxruntime


LEVELS = {
    "none": "ORT_DISABLE_ALL",
    "basic": "ORT_ENABLE_BASIC",
    "extended": "ORT_ENABLE_EXTENDED",
    "layout": "ORT_ENABLE_LAYOUT",
    "all": "ORT_ENABLE_ALL",
}
"""Optimization levels; each does what those before it do, and more."""

CUDA_ONLY = {
    "tf32": "a CPU has no TF32",
    "fp16": "on a CPU ONNX Runtime keeps activations in FP32, so its result would not be FP16",
    "trt": "TensorRT runs on CUDA only",
}
"""Variant → why a CPU cannot run it."""

_CUDA = {
    # HEURISTIC and EXHAUSTIVE may choose another algorithm on another run.
    "cudnn_conv_algo_search": "DEFAULT",
    "use_tf32": "0",  # the library's default is on
    "tunable_op_enable": "0",
    "prefer_nhwc": "0",
}

_OPTIONS = ("use_deterministic_compute", "intra_op_num_threads", "inter_op_num_threads", "log_severity_level")
_CONFIG = {"session.intra_op.allow_spinning": "0", "session.set_denormal_as_zero": "0"}


@dataclass(frozen=True)
class Runtime:
    """Settings that all sessions of one backend share."""

    spec: BackendSpec
    threads: int
    providers: Sequence[tuple[str, dict[str, str]]]
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Settings as an unoptimized session reports them."""

    @classmethod
    def create(cls, spec: BackendSpec, threads: int | None = None) -> Runtime:
        """The runtime for a spec, tried out with a tiny model.

        ``threads`` None: the processors available. Raises MissingPackage without onnxruntime, BackendUnavailable when
        it lacks the device.
        """
        ort = require("onnxruntime", "cpu")
        providers = list(_providers(spec))
        first = providers[0][0]
        if first not in ort.get_available_providers():
            raise _unavailable(spec, f"onnxruntime {ort.__version__} has no {first}")
        severity()  # what the environment says wrongly is no fault of the device's
        runtime = cls(spec, threads or processors(), providers)
        try:
            probe = runtime.session(_identity(), level="none")
        except InputError as error:  # its library asks for others, such as another version of TensorRT
            raise _unavailable(spec, f"onnxruntime {ort.__version__} could not start its {first}: {error}") from None
        if probe.get_providers()[0] != first:
            raise _unavailable(spec, f"onnxruntime {ort.__version__} could not start its {first}")
        return replace(runtime, settings=read_settings(probe))

    def session(
        self,
        model: bytes | Path,
        *,
        level: str,
        weights: Path | None = None,
        write: Path | None = None,
        disabled_optimizers: Sequence[str] = (),
        log: bool = False,
        shown: object = None,
    ) -> onnxruntime.InferenceSession:
        """Open a model, given as a file or as bytes with its external data in the folder ``weights``.

        ``write`` makes ONNX Runtime write the program that it will run, weights in a file beside it; ``log`` makes it
        say on the process's stderr what it does; ``shown`` is what messages name, the file itself where it is None.
        Raises InputError when ONNX Runtime refuses the model.
        """
        import onnxruntime as ort

        options = session_options(SEVERITIES["info"] if log else None)
        options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, LEVELS[level])
        options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
        options.use_deterministic_compute = True
        options.intra_op_num_threads = self.threads
        options.inter_op_num_threads = 1
        # Chunks are many small sessions: an arena and a memory pattern each would keep all their peaks.
        options.enable_cpu_mem_arena = False
        options.enable_mem_pattern = False
        for key, value in _CONFIG.items():
            options.add_session_config_entry(key, value)
        name = shown or (model if isinstance(model, Path) else "a piece of the model")
        source = str(model) if isinstance(model, Path) else model
        if isinstance(model, Path) and in_utf8(str(model)) != source:  # its bindings take no such names
            source, weights = model.read_bytes(), model.parent
        if weights is not None:
            options.add_session_config_entry(
                "session.model_external_initializers_file_folder_path", os.fsencode(weights)
            )
        if write is not None:
            options.optimized_model_filepath = str(write)
            options.add_session_config_entry(
                "session.optimized_model_external_initializers_file_name", f"{write.name}.data"
            )
            options.add_session_config_entry("session.optimized_model_external_initializers_min_size_in_bytes", "1024")
        try:
            with doing(f"ONNX Runtime opened {name}"):
                return ort.InferenceSession(
                    source,
                    options,
                    providers=list(self.providers),
                    enable_fallback=0,
                    disabled_optimizers=list(disabled_optimizers) or None,
                )
        except Exception as error:  # each status of ONNX Runtime is a class of its own, directly below Exception
            reason = told(error).replace(str(model), str(name)) if isinstance(model, Path) else told(error)
            raise InputError(f"{name}: ONNX Runtime cannot open it: {reason}") from error


def read_settings(session: onnxruntime.InferenceSession) -> dict[str, Any]:
    """The numeric settings as the session reports them, JSON-safe."""
    options = session.get_session_options()
    settings: dict[str, Any] = {"graph_optimization_level": options.graph_optimization_level.name}
    settings |= {name: getattr(options, name) for name in _OPTIONS}
    settings["execution_mode"] = options.execution_mode.name
    settings |= {key: options.get_session_config_entry(key) for key in _CONFIG}
    settings["providers"] = session.get_providers()
    settings["provider_options"] = session.get_provider_options()
    return settings


def device_of(spec: BackendSpec) -> str:
    """Device that a spec runs on. Raises BackendUnavailable for a variant that a CPU would only pretend to run."""
    device = spec.device or ("cuda:0" if spec.variant in CUDA_ONLY else "cpu")
    if device == "cpu" and spec.variant in CUDA_ONLY:
        raise BackendUnavailable(str(spec), CUDA_ONLY[spec.variant], nearest=_nearest(spec))
    return device


def _providers(spec: BackendSpec) -> Iterator[tuple[str, dict[str, str]]]:
    device = device_of(spec)
    if device != "cpu":
        index = device.partition(":")[2] or "0"
        if spec.variant == "trt":
            yield "TensorrtExecutionProvider", {"device_id": index}
        options = {"device_id": index, **_CUDA}
        if spec.variant == "tf32":  # DEFAULT falls back to kernels without it
            options |= {"use_tf32": "1", "cudnn_conv_algo_search": "HEURISTIC"}
        yield "CUDAExecutionProvider", options
    yield "CPUExecutionProvider", {}


def _unavailable(spec: BackendSpec, reason: str) -> BackendUnavailable:
    return BackendUnavailable(str(spec), reason, install=install("gpu"), nearest=_nearest(spec))


def _nearest(spec: BackendSpec) -> str:
    return {"tf32": "emu-tf32", "fp16": "emu-fp16", "trt": "ort@cuda"}.get(spec.variant) or f"{spec.name}@cpu"


def processors() -> int:
    """Number of processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _identity() -> bytes:
    """The smallest model: opening it shows whether the providers start."""
    from onnx import TensorProto, helper

    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "identity", [x], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    return bytes(model.SerializeToString())


RULE_BASED = "Level1_RuleBasedTransformer"
"""One transformer that applies all of ``RULES``; the log names only it."""
RULES = (
    "CastChainElimination",
    "CastElimination",
    "ClipQuantRewrite",
    "ConvAddFusion",
    "ConvBNFusion",
    "ConvMulFusion",
    "DivMulFusion",
    "EliminateDropout",
    "EliminateIdentity",
    "EliminateSlice",
    "ExpandElimination",
    "FuseReluClip",
    "GemmSumFusion",
    "GemmTransposeFusion",
    "LabelEncoderFusion",
    "MatMul_BatchNormalization_Fusion",
    "NoopElimination",
    "NotWhereFusion",
    "Pad_Fusion",
    "PreShapeNodeElimination",
    "ReluQuantRewrite",
    "UnsqueezeElimination",
)
"""ONNX Runtime 1.31's rewrite rules; names that a version does not know are ignored by it."""
_MODIFIED = re.compile(rb"GraphTransformer (\w+) modified: 1")


def active_optimizers(runtime: Runtime, graph: Graph, level: str, disabled: Collection[str] = ()) -> list[str]:
    """The optimizers that change ``graph`` when it is opened at ``level``, in the order in which they first do.

    ONNX Runtime's own log tells. Raises InputError when ONNX Runtime refuses the model.
    """
    sys.stderr.flush()
    with tempfile.TemporaryFile() as log, redirected(2, log):
        runtime.session(graph.path, level=level, disabled_optimizers=sorted(disabled), log=True)
        log.seek(0)
        return [name.decode() for name in dict.fromkeys(_MODIFIED.findall(log.read()))]
