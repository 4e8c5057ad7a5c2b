"""Builds, inspects and runs TensorRT engines for cpdebug: ``python runner.py JOB_FOLDER``, wherever TensorRT is.

One file, Python 3.8, only the standard library, numpy and tensorrt: the model lives in one environment and the engine
in another. ``JOB_FOLDER/job.json`` holds ``{"steps": [{"command": "probe" | "build" | "run", ...}]}``;
``JOB_FOLDER/result.json`` takes ``{"results": [...]}`` and, if a step failed, ``"error"``. Arrays travel as ``.npy``
files, never pickled. Log and progress go to stdout, one JSON object with an ``"event"`` key a line. Enum members travel
by name: TensorRT 11 renumbered them.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import re
import sys
import threading
import time
import traceback
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:  # evaluated by no interpreter, so newer than Python 3.8
    from collections.abc import Callable, Iterable, Iterator

    Step = dict[str, Any]
    Emit = Callable[[dict[str, Any]], None]

NUMPY_TYPES = {
    "FLOAT": np.float32,
    "HALF": np.float16,
    "BF16": np.uint16,  # numpy has no bfloat16: the bits are moved as integers and handed out as float32, exactly
    "INT8": np.int8,
    "UINT8": np.uint8,
    "INT32": np.int32,
    "INT64": np.int64,
    "BOOL": np.bool_,
}


class RunnerFailure(Exception):
    """A failed step, with a message for people.

    ``kind`` is one of import, unsupported, parse, script, build, kernel, memory, engine, input, device, time, internal;
    ``nodes`` are the ONNX nodes concerned.
    """

    def __init__(self, kind: str, message: str, nodes: Iterable[str] = ()) -> None:
        super().__init__(message)
        self.kind, self.message, self.nodes = kind, message, list(nodes)

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe, for ``result.json``."""
        return {"kind": self.kind, "message": self.message, "nodes": self.nodes}


# ---------------------------------------------------------------- the device


class Cuda:
    """Memory of one CUDA device through the CUDA runtime library, without a Python package for it."""

    HOST_TO_DEVICE, DEVICE_TO_HOST = 1, 2
    OUT_OF_MEMORY = 2

    def __init__(self, device: int = 0) -> None:
        self.lib = self._load()
        self.lib.cudaGetErrorString.restype = ctypes.c_char_p
        self._call("cudaSetDevice", ctypes.c_int(device))
        self.device = device
        self.pointers: list[int] = []
        stream = ctypes.c_void_p()
        self._call("cudaStreamCreate", ctypes.byref(stream))
        self.stream = stream.value or 0

    @staticmethod
    def _load() -> ctypes.CDLL:
        names = ["libcudart.so", "libcudart.so.13", "libcudart.so.12", "libcudart.so.11.0"]
        for entry in sys.path:  # the CUDA wheels keep theirs here
            names += sorted(str(path) for path in Path(entry).glob("nvidia/*/lib/libcudart.so*"))
        for name in names:
            try:
                return ctypes.CDLL(name)
            except OSError:
                pass
        raise RunnerFailure("device", "no CUDA runtime library (libcudart.so) found; put its folder on LD_LIBRARY_PATH")

    def _call(self, name: str, *arguments: Any) -> None:
        code = getattr(self.lib, name)(*arguments)
        if code:
            kind = "memory" if code == self.OUT_OF_MEMORY else "device"
            raise RunnerFailure(kind, f"{name}: {self.lib.cudaGetErrorString(code).decode()} (CUDA error {code})")

    def _number(self, function: str, *arguments: int) -> int:
        value = ctypes.c_int()
        self._call(function, ctypes.byref(value), *arguments)
        return value.value

    def describe(self) -> dict[str, Any]:
        """Name, compute capability, memory in bytes and CUDA versions of the device."""
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        self._call("cudaMemGetInfo", ctypes.byref(free), ctypes.byref(total))
        major, minor = (self._number("cudaDeviceGetAttribute", attribute, self.device) for attribute in (75, 76))
        return {
            "name": self._name(),
            "compute_capability": f"{major}.{minor}",
            "memory_bytes": total.value,
            "memory_free_bytes": free.value,
            "cuda_runtime": self._number("cudaRuntimeGetVersion"),
            "cuda_driver": self._number("cudaDriverGetVersion"),
        }

    def _name(self) -> str:
        driver, handle, text = ctypes.CDLL("libcuda.so.1"), ctypes.c_int(), ctypes.create_string_buffer(256)
        if driver.cuDeviceGet(ctypes.byref(handle), self.device) or driver.cuDeviceGetName(text, 256, handle):
            return "unknown"
        return text.value.decode()

    def allocate(self, nbytes: int) -> int:
        """Device memory that ``close`` frees. Raises RunnerFailure of kind memory."""
        pointer = ctypes.c_void_p()
        self._call("cudaMalloc", ctypes.byref(pointer), ctypes.c_size_t(max(nbytes, 1)))
        address = pointer.value or 0
        self.pointers.append(address)
        return address

    def upload(self, array: np.ndarray) -> int:
        """Copy an array to new device memory; returns its address.

        The array must be contiguous; any shape and dtype.
        """
        pointer = self.allocate(array.nbytes)
        source = ctypes.c_void_p(array.ctypes.data)
        self._call("cudaMemcpy", ctypes.c_void_p(pointer), source, ctypes.c_size_t(array.nbytes), self.HOST_TO_DEVICE)
        return pointer

    def download(self, pointer: int, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        """Copy device memory at ``pointer`` into a new array.

        The array is contiguous, of this ``shape`` and ``dtype``.
        """
        array = np.empty(shape, dtype)
        target = ctypes.c_void_p(array.ctypes.data)
        self._call("cudaMemcpy", target, ctypes.c_void_p(pointer), ctypes.c_size_t(array.nbytes), self.DEVICE_TO_HOST)
        return array

    def synchronize(self, stream: int | None = None) -> None:
        """Wait for a CUDA stream, by default the job's own."""
        self._call("cudaStreamSynchronize", ctypes.c_void_p(self.stream if stream is None else stream))

    def free(self) -> None:
        """Give back what was allocated."""
        while self.pointers:
            self.lib.cudaFree(ctypes.c_void_p(self.pointers.pop()))

    def close(self) -> None:
        """Free all memory and the stream."""
        self.free()
        self.lib.cudaStreamDestroy(ctypes.c_void_p(self.stream))


# ---------------------------------------------------------------- the library


class Job:
    """One step's view of TensorRT: the module, its log, the clock, and objects that TensorRT does not keep alive."""

    _logger: Any = None  # TensorRT keeps the first logger of a process for good, so there is one

    def __init__(self, emit: Emit, deadline: float | None = None) -> None:
        self.trt = trt = _import_tensorrt()
        self.emit, self.deadline = emit, deadline
        self.errors: list[str] = []
        self.count_tactics, self.tactics, self.told = False, 0, 0.0
        self.layers, self.timed = 0, set()  # type: ignore[var-annotated]
        self.kept: list[Any] = []
        if not isinstance(Job._logger, trt.ILogger):
            Job._logger = _make_logger(trt)
        self.logger = Job._logger
        self.logger.job = self
        trt.init_libnvinfer_plugins(self.logger, "")

    def log(self, level: str, text: str) -> None:
        """Take one of TensorRT's log messages: keep errors, count tactics, pass the others on."""
        if level in ("ERROR", "INTERNAL_ERROR"):
            self.errors.append(text)
        if level == "VERBOSE" and self.count_tactics:
            self._count(text)
        if level != "VERBOSE":
            self.emit({"event": "log", "level": level, "text": text})

    def _count(self, text: str) -> None:
        """Progress of builders that report none: their log says how many layers fusing left, and names each kernel
        that is timed, with its layer."""
        left = re.match(r"After .*: (\d+) layers?\s*$", text)
        if left is not None:
            self.layers = int(left.group(1))
        match = re.search(r"Timing Runner: (.+?) \(", text)
        if match is None:
            return
        self.tactics += 1
        name = match.group(1)[:80]
        if not name.startswith("Optimizer Reformat"):  # between layers, not one of them
            self.timed.add(match.group(1))
        now = time.monotonic()
        if now - self.told >= 0.5:
            self.told = now
            at = {"layer": len(self.timed), "layers": self.layers}
            self.emit({"event": "progress", "phase": "timing " + name, "done": self.tactics, "steps": 0, **at})

    def out_of_time(self) -> bool:
        """Whether the job's time is up."""
        return self.deadline is not None and time.monotonic() > self.deadline

    def member(self, enum: str, name: str) -> Any:
        """The enum member, or a RunnerFailure that says what this version lacks."""
        try:
            return getattr(getattr(self.trt, enum), name)
        except AttributeError:
            raise RunnerFailure("unsupported", f"TensorRT {self.trt.__version__} has no {enum}.{name}") from None

    def reasons(self, otherwise: str) -> str:
        """Every error that TensorRT logged, once: many are logged bare, and again with the place in its source."""
        once = list(dict.fromkeys(self.errors))
        bare = {text: re.sub(r"^\d+: ", "", text) for text in once}
        longest = [text for text in once if not any(bare[text] in o and len(o) > len(text) for o in once)]
        return "\n".join(longest) or otherwise


def _import_tensorrt() -> Any:
    try:
        import tensorrt
    except ModuleNotFoundError as error:
        raise RunnerFailure("import", f"{sys.executable} has no package {error.name!r}") from None
    except ImportError as error:  # the package is there, one of its libraries is not
        raise RunnerFailure("import", f"{sys.executable} cannot import tensorrt: {error}") from None
    return tensorrt


def _make_logger(trt: Any) -> Any:
    class Log(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.job: Any = None

        def log(self, severity: Any, msg: str) -> None:
            self.job.log(_member_name(severity), msg)

    return Log()


def _make_monitor(job: Job) -> Any:
    trt = job.trt

    class Monitor(trt.IProgressMonitor):  # type: ignore[name-defined]
        """Passes progress on, and stops the build once the job's time is up."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.steps: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.steps[phase_name] = num_steps
            self._tell(phase_name, 0)

        def step_complete(self, phase_name: str, step: int) -> bool:
            self._tell(phase_name, step + 1)
            return not job.out_of_time()

        def phase_finish(self, phase_name: str) -> None:
            self._tell(phase_name, self.steps.get(phase_name, 0))

        def _tell(self, phase: str, done: int) -> None:
            job.emit({"event": "progress", "phase": phase, "done": done, "steps": self.steps.get(phase, 0)})

    return Monitor()


CALIBRATORS = {"entropy": "IInt8EntropyCalibrator2", "minmax": "IInt8MinMaxCalibrator"}


def _make_calibrator(job: Job, settings: dict[str, Any], shapes: dict[str, tuple[int, ...]], device: int) -> Any:
    """A calibrator that reads ``settings["cache"]``, or else the arrays of ``settings["data"]``, and then writes it.

    ``data`` are ``.npz`` files, one array an input; ``shapes`` are those that calibration runs at.
    """
    trt, cache = job.trt, Path(settings["cache"])
    base: Any = getattr(trt, CALIBRATORS[settings["kind"]], None)
    if base is None:
        raise RunnerFailure("unsupported", f"TensorRT {trt.__version__} has no calibrators: it takes Q/DQ graphs only")

    class Calibrator(base):
        def __init__(self) -> None:
            base.__init__(self)
            self.files = iter(settings["data"])
            self.cuda = Cuda(device)
            self.failure: RunnerFailure | None = None

        def get_batch_size(self) -> int:
            return 1

        def get_batch(self, names: list[str]) -> list[int] | None:
            self.cuda.free()
            file = next(self.files, None)
            try:
                return None if file is None else self._upload(file, names)
            except Exception as error:  # must not travel through TensorRT, which would end the process
                self.failure = error if isinstance(error, RunnerFailure) else RunnerFailure("input", f"{file}: {error}")
                return None

        def read_calibration_cache(self) -> bytes | None:
            return cache.read_bytes() if cache.is_file() else None

        def write_calibration_cache(self, data: Any) -> None:
            if self.failure is None:
                _write(cache, bytes(data))

        def _upload(self, file: str, names: list[str]) -> list[int]:
            with np.load(file, allow_pickle=False) as arrays:
                missing = [name for name in names if name not in arrays]
                if missing:
                    raise RunnerFailure("input", f"{file}: holds no array {missing[0]!r}")
                return [self.cuda.upload(_fitted(file, name, arrays[name], shapes[name])) for name in names]

    return Calibrator()


def _fitted(file: str, name: str, array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Cut, or repeated from its start, to the one shape that calibration runs at: ranges ask for no more."""
    if array.ndim != len(shape) or not array.size:
        raise RunnerFailure(
            "input", f"{file}: {name!r} has shape {list(array.shape)}; calibration runs at {list(shape)}"
        )
    for axis, size in enumerate(shape):
        array = np.take(array, np.arange(size) % array.shape[axis], axis)
    return np.asarray(array, np.float32 if array.dtype.kind == "f" else array.dtype, order="C")


# ---------------------------------------------------------------- commands


def probe(job: Job, step: Step) -> dict[str, Any]:
    """Versions, the device, and what this TensorRT can do."""
    trt = job.trt
    cuda = Cuda(step.get("device", 0))
    try:
        device = cuda.describe()
    finally:
        cuda.close()
    return {
        "tensorrt": trt.__version__,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "device": device,
        "builder_flags": sorted(trt.BuilderFlag.__members__),
        "layer_precision": hasattr(trt.ILayer, "precision"),
        "calibrator": hasattr(trt, "IInt8EntropyCalibrator2"),
        "progress": hasattr(trt, "IProgressMonitor"),
        "debug_tensors": hasattr(trt.INetworkDefinition, "mark_debug"),
        "unfused_debug_tensors": hasattr(trt.INetworkDefinition, "mark_unfused_tensors_as_debug_tensors"),
    }


def build(job: Job, step: Step) -> dict[str, Any]:
    """Parse ``onnx``, configure, build, write ``engine``; tells what was built, the inspector's layers included."""
    trt, started = job.trt, time.monotonic()
    Cuda(step.get("device", 0)).close()  # makes the device current, or says that there is none
    builder, network = _network(job, step)
    owners = _owners(network, step["nodes"])
    for layer, node in owners:
        if node and not layer.metadata:  # the parser of 8.6 writes none; the inspector hands back what is set here
            layer.metadata = f"[ONNX Layer: {node}]"
    config = _config(job, builder, network, step)
    cache, timing_cache = _configure(job, config, owners, step)
    profile = _add_profile(builder, network, config, step.get("profiles") or {})
    calibrator = _calibrate(job, network, config, profile, step)
    marked, missing = _mark(job, network, step.get("probes") or {})
    with _kept_meanwhile(config, timing_cache, step.get("timing_cache")):
        plan = builder.build_serialized_network(network, config)
    if calibrator is not None:
        calibrator.cuda.close()
        if calibrator.failure is not None:
            raise calibrator.failure
    if plan is None:
        raise _build_failure(job)
    _write(Path(step["engine"]), plan)
    if timing_cache is not None:
        _keep_timing_cache(timing_cache, step["timing_cache"])
    seconds = time.monotonic() - started
    return {
        "bytes": plan.nbytes,
        "seconds": round(seconds, 3),
        "flags": {name: bool(config.get_flag(flag)) for name, flag in trt.BuilderFlag.__members__.items()},
        "timing_cache": cache,
        "marked": marked,
        "missing": missing,
        "layers": _inspect(job, step),
    }


def run(job: Job, step: Step) -> dict[str, Any]:
    """Run ``engine`` on ``inputs`` (name → ``.npy``); outputs and debug tensors go to ``.npy`` files in ``folder``."""
    cuda = Cuda(step.get("device", 0))
    try:
        return _run(job, cuda, step)
    finally:
        cuda.close()


COMMANDS: dict[str, Callable[[Job, Step], dict[str, Any]]] = {
    "probe": probe,
    "build": build,
    "run": run,
}


# ---------------------------------------------------------------- build

_SCRIPTS: dict[str, dict[str, Any]] = {}
"""Hash of a loader script → its names. It is run once in a process, as it may register plug-ins."""

LOW_PRECISIONS = ("FP16", "BF16", "INT8", "FP8", "INT4", "FP4")


def _load_script(loader: dict[str, Any]) -> dict[str, Any]:
    path, content = loader["script"], loader["content"]
    if content not in _SCRIPTS:
        names: dict[str, Any] = {"__name__": "loader", "__file__": path}
        with _of_script(path, path):
            exec(compile(Path(path).read_bytes(), path, "exec"), names)
        _SCRIPTS[content] = names
    return _SCRIPTS[content]


def _call(loader: dict[str, Any], function: str, *arguments: Any) -> Any:
    names = _load_script(loader)
    with _of_script(loader["script"], loader["script"] + ": " + function):
        return names[function](*arguments)


@contextmanager
def _of_script(path: str, subject: str) -> Iterator[None]:
    """Context in which a script runs: beside its modules, away from our stdout. Its errors are told in a sentence."""
    sys.path.insert(0, str(Path(path).parent))
    try:
        with redirect_stdout(sys.stderr):
            yield
    except (Exception, SystemExit) as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
        words = " ".join(str(error).split())
        told = type(error).__name__ + (": " + words if words else "") + (f" (line {lines[-1]})" if lines else "")
        raise RunnerFailure("script", f"{subject} raised {told}") from None
    finally:
        sys.path.remove(str(Path(path).parent))


def _network(job: Job, step: Step) -> tuple[Any, Any]:
    """Builder and network: by ``load_network`` of the step's script, where it has one, else parsed."""
    trt, loader = job.trt, step.get("loader")
    if loader is None or "load_network" not in loader["functions"]:
        builder = trt.Builder(job.logger)
        flags = 0
        for name in step["network_flags"]:
            flags |= 1 << int(job.member("NetworkDefinitionCreationFlag", name))
        network = builder.create_network(flags)
        _parse(job, network, step["onnx"], step["nodes"])
        return builder, network
    made, subject = _call(loader, "load_network"), loader["script"] + ": load_network"
    job.kept.append(made)  # a parser among them owns the weights
    several = made if isinstance(made, (tuple, list)) else [made]
    builder, network = [*several, None][:2]
    if not (isinstance(builder, trt.Builder) and isinstance(network, trt.INetworkDefinition)):
        has = ", ".join(type(each).__name__ for each in several)
        raise RunnerFailure("script", f"{subject} returned {has}; expected (builder, network) or also a parser behind")
    if hasattr(trt.BuilderFlag, "FP16") and hasattr(network, "get_flag"):  # else there is one way of typing
        strong, asked = trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED, "STRONGLY_TYPED" in step["network_flags"]
        if network.get_flag(strong) != asked:
            how = "weakly typed network; expected it without" if asked else "strongly typed network; expected"
            raise RunnerFailure("script", f"{subject} makes a {how} --strongly-typed")
    inputs = [network.get_input(i).name for i in range(network.num_inputs)]
    outputs = [network.get_output(i).name for i in range(network.num_outputs)]
    for name in inputs:
        if name not in loader["inputs"]:
            whose = f"the ONNX file has {', '.join(loader['inputs'])}"
            raise RunnerFailure("script", f"{subject} makes a network with the input {name!r}; {whose}")
    for name in loader["outputs"]:
        if name not in outputs:
            whose = f"the ONNX file has {name!r}"
            raise RunnerFailure("script", f"{subject} makes a network with the outputs {', '.join(outputs)}; {whose}")
    return builder, network


def _config(job: Job, builder: Any, network: Any, step: Step) -> Any:
    """The configuration: by ``load_config`` of the step's script, where it has one. Precisions are the step's."""
    trt, loader = job.trt, step.get("loader")
    if loader is None or "load_config" not in loader["functions"]:
        return builder.create_builder_config()
    config, subject = _call(loader, "load_config", builder, network), loader["script"] + ": load_config"
    job.kept.append(config)
    if not isinstance(config, trt.IBuilderConfig):
        raise RunnerFailure("script", f"{subject} returned {type(config).__name__}; expected an IBuilderConfig")
    allowed = set(step["set_flags"])
    if allowed & {"INT8", "FP8", "INT4", "FP4"}:  # what has no scales runs in one of these
        allowed |= {"FP16", "BF16"}
    for name, flag in trt.BuilderFlag.__members__.items():
        if name in LOW_PRECISIONS and name not in allowed and config.get_flag(flag):
            raise RunnerFailure("script", f"{subject} sets {name}, but the backend is {loader['backend']}")
    if config.num_optimization_profiles and any(low != high for low, _, high in (step.get("profiles") or {}).values()):
        raise RunnerFailure("script", f"{subject} adds a profile, and --profile another one; expected one of the two")
    return config


def _parse(job: Job, network: Any, path: str, nodes: list[list[Any]]) -> None:
    if not Path(path).is_file():
        raise RunnerFailure("input", f"{path}: no such ONNX file")
    parser = job.trt.OnnxParser(network, job.logger)
    job.kept.append(parser)  # owns the weights until the build is over
    try:
        if parser.parse_from_file(path):  # by path, so that external data is found beside the file
            return
    except RuntimeError as refused:  # a library of plug-ins that this installation lacks, for one
        raise RunnerFailure("parse", str(refused)) from None
    names, lines = [], []
    for error in [parser.get_error(i) for i in range(parser.num_errors)]:
        index = error.node()
        name, op = nodes[index][:2] if 0 <= index < len(nodes) else ("", "")
        if hasattr(error, "node_name"):
            name, op = error.node_name() or name, error.node_operator() or op
        names += [name] if name else []
        lines.append((f"node {name} ({op})" if name else "graph") + f": {error.desc()}")
    raise RunnerFailure("parse", "\n".join(lines) or job.reasons("the parser gave no reason"), names)


def _owners(network: Any, nodes: list[list[Any]]) -> list[tuple[Any, str | None]]:
    """Pairs (layer, ONNX node name).

    The parser names a node's main layer after the node and its tensors after the node's outputs; helper layers come
    before the layer that they help.
    """
    names = {node[0] for node in nodes}
    by_output = {output: node[0] for node in nodes for output in node[2]}
    pairs: list[tuple[Any, str | None]] = []
    pending = []
    for layer in _network_layers(network):
        pending.append(layer)
        outputs = [tensor.name for tensor in _outputs(layer)]
        owner = layer.name if layer.name in names else next((by_output[o] for o in outputs if o in by_output), None)
        if owner:
            pairs += [(waiting, owner) for waiting in pending]
            pending = []
    return pairs + [(layer, None) for layer in pending]


def _network_layers(network: Any) -> list[Any]:
    return [network.get_layer(i) for i in range(network.num_layers)]


def _outputs(layer: Any) -> list[Any]:
    """The layer's output tensors; optional ones may be absent."""
    return [tensor for tensor in map(layer.get_output, range(layer.num_outputs)) if tensor is not None]


def _configure(job: Job, config: Any, owners: list[tuple[Any, Any]], step: Step) -> tuple[str, Any]:
    """Apply the step's settings to ``config``; tells what became of the timing cache, and hands it out."""
    trt = job.trt
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    for name in step["set_flags"]:
        config.set_flag(job.member("BuilderFlag", name))
    for name in step["clear_flags"]:
        config.clear_flag(job.member("BuilderFlag", name))
    if step.get("workspace_mib"):
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, int(step["workspace_mib"]) << 20)
    if hasattr(trt, "IProgressMonitor"):
        job.kept.append(_make_monitor(job))
        config.progress_monitor = job.kept[-1]
    else:
        job.count_tactics = True
    if step.get("builder_level") is not None:
        if not hasattr(config, "builder_optimization_level"):
            raise RunnerFailure("unsupported", f"TensorRT {trt.__version__} has no builder optimization level")
        config.builder_optimization_level = int(step["builder_level"])
    _choose_sources(job, config, step.get("tactic_sources") or [])
    _constrain(job, owners, step.get("layer_precisions") or {})
    return _load_timing_cache(config, step.get("timing_cache"))


def _choose_sources(job: Job, config: Any, changes: list[str]) -> None:
    """Change where kernels are taken from: ``-NAME`` leaves a source out, ``+NAME`` adds one."""
    if not changes:
        return
    sources = int(config.get_tactic_sources())
    known = job.trt.TacticSource.__members__
    for change in changes:
        name = change[1:]
        if name not in known:
            has = f"{job.trt.__version__} has {', '.join(sorted(known))}"
            raise RunnerFailure("unsupported", f"there is no tactic source {name}; TensorRT {has}")
        bit = 1 << int(known[name])
        sources = sources | bit if change[0] == "+" else sources & ~bit
    if not config.set_tactic_sources(sources):
        raise RunnerFailure("unsupported", job.reasons(f"TensorRT refused the tactic sources {','.join(changes)}"))


def _constrain(job: Job, owners: list[tuple[Any, Any]], precisions: dict[str, str]) -> None:
    """Pin the layers of the named ONNX nodes, and what they put out, to a type. Weakly typed networks only."""
    trt = job.trt
    floats = (trt.DataType.FLOAT, trt.DataType.HALF)
    for layer, node in owners:
        outputs = _outputs(layer)
        if node not in precisions or layer.type == trt.LayerType.CONSTANT:
            continue
        if all(tensor.dtype in floats and not tensor.is_shape_tensor for tensor in outputs):
            dtype = job.member("DataType", precisions[node])
            layer.precision = dtype
            for i in range(layer.num_outputs):
                layer.set_output_type(i, dtype)


def _add_profile(builder: Any, network: Any, config: Any, profiles: dict[str, Any]) -> Any:
    """Add the profile that dynamic inputs need, and return it."""
    inputs = {tensor.name: tuple(tensor.shape) for tensor in map(network.get_input, range(network.num_inputs))}
    for name in profiles:
        if name not in inputs:
            raise RunnerFailure("input", f"profile for {name!r}, but the graph's inputs are {', '.join(inputs)}")
    dynamic = [name for name, shape in inputs.items() if -1 in shape]
    if not dynamic or config.num_optimization_profiles:  # else a loader script added its own
        return None
    profile = builder.create_optimization_profile()
    for name in dynamic:
        if name not in profiles:
            raise RunnerFailure("input", f"input {name!r} has dynamic shape {list(inputs[name])}: it needs a profile")
        profile.set_shape(name, *[tuple(shape) for shape in profiles[name]])
    config.add_optimization_profile(profile)
    return profile


def _calibrate(job: Job, network: Any, config: Any, profile: Any, step: Step) -> Any:
    """Give ``config`` the calibrator that the step asks for, and return it. It runs at the profile's optimal shapes."""
    settings, profiles = step.get("calibration"), step.get("profiles") or {}
    if not settings:
        return None
    inputs = {tensor.name: tuple(tensor.shape) for tensor in map(network.get_input, range(network.num_inputs))}
    shapes = {name: tuple(profiles[name][1]) if -1 in shape else shape for name, shape in inputs.items()}
    calibrator = _make_calibrator(job, settings, shapes, step.get("device", 0))
    job.kept.append(calibrator)
    config.int8_calibrator = calibrator
    if profile is not None:
        config.set_calibration_profile(profile)
    return calibrator


KEEP_EVERY = 30.0
"""Seconds after which a build writes its timings again; writing took a millisecond."""

_TIMING_CACHES: dict[str, tuple[Any, bytes]] = {}
"""Path → the cache of the last build, and the bytes that were written of it: 8.6 cannot always read what it wrote."""


def _load_timing_cache(config: Any, path: str | None) -> tuple[str, Any]:
    """(``none`` when it is not asked for, ``new``, ``used`` or ``refused``; the cache)."""
    if not path:
        return "none", None
    data = Path(path).read_bytes() if Path(path).is_file() else b""
    cache, written = _TIMING_CACHES.get(path, (None, b""))
    if written != data:
        cache = config.create_timing_cache(data)
    if data and cache is not None and config.set_timing_cache(cache, False):
        return "used", cache
    cache = config.create_timing_cache(b"")
    config.set_timing_cache(cache, False)
    return "refused" if data else "new", cache


def _keep_timing_cache(cache: Any, path: str) -> None:
    data = bytes(cache.serialize())
    _write(Path(path), data)
    _TIMING_CACHES[path] = cache, data


@contextmanager
def _kept_meanwhile(config: Any, cache: Any, path: str | None) -> Iterator[None]:
    """Write the timing cache now and then while the block builds, so that the build after one that was stopped times
    only what is left. A full disk is no reason to stop."""
    if cache is None or path is None:
        yield
        return
    over = threading.Event()

    def keep() -> None:
        while not over.wait(KEEP_EVERY):
            try:
                _keep_timing_cache(config.get_timing_cache(), path)
            except OSError:
                return

    keeper = threading.Thread(target=keep, name="timing cache", daemon=True)
    keeper.start()
    try:
        yield
    finally:
        over.set()
        keeper.join()


def _mark(job: Job, network: Any, probes: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Mark what is to be seen; returns (names marked, names that cannot be).

    ``method``: ``outputs`` marks ``tensors`` (name → ``{"dtype": …, "format": …}``, both may be empty) as network
    outputs, ``unfused`` leaves the choice to TensorRT, which then changes no fusion.
    """
    method, wanted = probes.get("method"), probes.get("tensors") or {}
    if method == "unfused":
        if not network.mark_unfused_tensors_as_debug_tensors():
            raise RunnerFailure("build", job.reasons("TensorRT refused to mark the unfused tensors"))
        return [], []
    tensors = {tensor.name: tensor for layer in _network_layers(network) for tensor in _outputs(layer)}
    marked = []
    for name, mark in wanted.items():
        tensor = tensors.get(name)
        if tensor is None or tensor.is_shape_tensor:
            continue
        if not tensor.is_network_output:
            network.mark_output(tensor)
            if mark.get("dtype"):
                tensor.dtype = job.member("DataType", mark["dtype"])
            if mark.get("format"):
                tensor.allowed_formats = 1 << int(job.member("TensorFormat", mark["format"]))
        marked.append(name)
    return marked, [name for name in wanted if name not in marked]


def _build_failure(job: Job) -> RunnerFailure:
    if job.out_of_time():
        return RunnerFailure("time", "the build was stopped at its time limit")
    text = job.reasons("TensorRT gave no reason")
    if re.search(r"out of memory|OutOfMemory|cudaErrorMemoryAllocation", text, re.IGNORECASE):
        return RunnerFailure("memory", text)
    nodes = re.findall(r"Could not find any implementation for node (.+?)(?:\.(?=\s|$)| due to)", text)
    return RunnerFailure("kernel" if nodes else "build", text, dict.fromkeys(nodes))


def _inspect(job: Job, step: Step) -> list[dict[str, Any]]:
    """The inspector's description of the file ``engine``, layer by layer."""
    trt, engine = job.trt, _load_engine(job, step["engine"])
    inspector = engine.create_engine_inspector()
    profiles = step.get("profiles") or {}
    context = engine.create_execution_context() if profiles else None
    if context is not None:  # with dynamic shapes, formats and types are told only for shapes that are set
        for name, (_, optimal, _) in profiles.items():
            context.set_input_shape(name, tuple(optimal))
        inspector.execution_context = context
    text = inspector.get_engine_information(trt.LayerInformationFormat.JSON)
    return json.loads(text, strict=False)["Layers"]  # 8.6 leaves control characters in it


def _write(path: Path, data: Any) -> None:
    temporary = path.with_name(f"{path.name}.{os.getpid()}.part")  # two builds of a graph share its timings
    with temporary.open("wb") as stream:
        stream.write(data)
    os.replace(temporary, path)  # noqa: PTH105


# ---------------------------------------------------------------- run


def _load_engine(job: Job, path: str) -> Any:
    job.kept.append(job.trt.Runtime(job.logger))
    engine = job.kept[-1].deserialize_cuda_engine(Path(path).read_bytes())
    if engine is None:
        raise RunnerFailure("engine", f"{path}: {job.reasons('TensorRT cannot read this engine')}")
    return engine


def _run(job: Job, cuda: Cuda, step: Step) -> dict[str, Any]:
    trt = job.trt
    if step.get("loader"):
        _load_script(step["loader"])  # the engine may need plug-ins that it loads
    engine = _load_engine(job, step["engine"])
    context = engine.create_execution_context()
    if context is None:
        raise RunnerFailure("memory", job.reasons("no memory for the engine's activations"))
    names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
    inputs = [name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
    for name in inputs:
        _feed(job, cuda, engine, context, name, step)
    outputs = {}
    for name in names:
        if name in inputs:
            continue
        shape, dtype = tuple(context.get_tensor_shape(name)), _member_name(engine.get_tensor_dtype(name))
        if any(size < 0 for size in shape):
            raise RunnerFailure("unsupported", f"output {name!r} has a shape that depends on the data")
        layout = Layout(_member_name(engine.get_tensor_format(name)), shape)
        nbytes = int(np.prod(layout.memory, dtype=np.int64)) * np.dtype(_numpy_type(name, dtype)).itemsize
        outputs[name] = (cuda.allocate(nbytes), layout, dtype)
        context.set_tensor_address(name, outputs[name][0])
    written = _TensorWriter(Path(step["folder"]), step.get("names"))
    if step.get("listen"):
        _listen(job, cuda, context, written, outputs)
    seconds = []
    for _ in range(1 + step.get("repeat", 0)):
        started = time.perf_counter()
        if not context.execute_async_v3(cuda.stream):
            raise RunnerFailure("device", job.reasons("TensorRT could not run the engine"))
        cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    for name, (pointer, layout, dtype) in outputs.items():
        memory = cuda.download(pointer, layout.memory, _numpy_type(name, dtype))
        written.add(name, layout.to_linear(memory), dtype)
    return {"tensors": written.entries, "seconds": seconds}


def _feed(job: Job, cuda: Cuda, engine: Any, context: Any, name: str, step: Step) -> None:
    """Load one input, check it against the profile and the engine's type, hand it to the context."""
    files, loader = step["inputs"], step.get("loader") or {"functions": []}
    if name not in files:
        raise RunnerFailure("input", f"no value for input {name!r}")
    array = np.load(files[name], allow_pickle=False)
    low = high = tuple(engine.get_tensor_shape(name))
    if -1 in low:
        low, _, high = (tuple(shape) for shape in engine.get_tensor_profile_shape(name, 0))
    fits = len(low) == array.ndim and all(low[i] <= array.shape[i] <= high[i] for i in range(array.ndim))
    if not fits or not context.set_input_shape(name, tuple(array.shape)):
        built_for = f"the engine was built for {list(low)} to {list(high)}"
        if "load_config" in loader["functions"]:
            built_for += f" (--profile, or the profile of load_config in {loader['script']})"
        raise RunnerFailure("input", f"input {name!r} has shape {list(array.shape)}, {built_for}")
    type_name = _member_name(engine.get_tensor_dtype(name))
    if type_name == "BF16":
        raise RunnerFailure("unsupported", f"input {name!r} is BF16; keep the graph's inputs FP32")
    converted = np.asarray(array, _numpy_type(name, type_name), order="C")
    if array.dtype.kind in "iu" and not np.array_equal(converted, array):
        raise RunnerFailure("input", f"input {name!r} has values that do not fit the engine's {type_name}")
    if engine.get_tensor_location(name) == job.trt.TensorLocation.HOST:
        job.kept.append(converted)
        context.set_tensor_address(name, converted.ctypes.data)
    else:
        context.set_tensor_address(name, cuda.upload(converted))


class Layout:
    """Memory layout of a tensor (N, C, H, W) in a ``TensorFormat``: channels last, or in vectors, padded."""

    def __init__(self, name: str, shape: tuple[int, ...]) -> None:
        match = re.match(r"(HWC|CHW)(\d*)$", name) if len(shape) == 4 else None
        if name != "LINEAR" and match is None:
            raise RunnerFailure("unsupported", f"a tensor of shape {list(shape)} in TensorRT's format {name}")
        self.shape, self.memory, self.order = shape, shape, ""
        if match:
            (n, c, h, w), vector = shape, int(match.group(2) or 1)
            blocks = -(-c // vector)
            self.order = match.group(1)
            self.memory = (n, h, w, blocks * vector) if self.order == "HWC" else (n, blocks, h, w, vector)

    def to_linear(self, memory: np.ndarray) -> np.ndarray:
        """The tensor (N, C, H, W), contiguous and without padding, from an array in this layout.

        ``memory`` is [N, H, W, C padded] for HWC, [N, blocks, H, W, vector] for CHW; the dtype stays.
        """
        if self.order == "HWC":
            memory = np.moveaxis(memory, 3, 1)
        elif self.order == "CHW":
            n, blocks, h, w, vector = self.memory
            memory = np.moveaxis(memory, 4, 2).reshape(n, blocks * vector, h, w)
        return np.ascontiguousarray(memory[:, : self.shape[1]]) if self.order else memory


class _TensorWriter:
    """The tensors that a run handed out: one file each, listed in the order in which they came."""

    def __init__(self, folder: Path, names: list[str] | None) -> None:
        self.folder, self.names = folder, names
        self.entries: list[dict[str, str]] = []
        folder.mkdir(parents=True, exist_ok=True)

    def wants(self, name: str) -> bool:
        known = any(entry["name"] == name for entry in self.entries)  # repeated runs hand out the first run's
        return not known and (self.names is None or name in self.names)

    def add(self, name: str, array: np.ndarray, dtype: str) -> None:
        if not self.wants(name):
            return
        if dtype == "BF16":
            array = (array.astype(np.uint32) << 16).view(np.float32)
        path = self.folder / f"{len(self.entries):05d}.npy"
        np.save(path, array, allow_pickle=False)
        self.entries.append({"name": name, "file": str(path), "dtype": dtype})


def _listen(job: Job, cuda: Cuda, context: Any, written: _TensorWriter, outputs: dict[str, Any]) -> None:
    """Have the unfused tensors written while the engine runs. Outputs are written later, in the type they have then."""
    trt = job.trt

    class Listener(trt.IDebugListener):  # type: ignore[name-defined]
        def __init__(self) -> None:
            trt.IDebugListener.__init__(self)

        def process_debug_tensor(self, addr: Any, location: Any, type: Any, shape: Any, name: str, stream: int) -> bool:
            dtype = _member_name(type)
            try:
                if name not in outputs and written.wants(name) and dtype in NUMPY_TYPES:
                    cuda.synchronize(stream)
                    written.add(name, cuda.download(_address(addr), tuple(shape), NUMPY_TYPES[dtype]), dtype)
            except Exception as error:  # must not travel through TensorRT, which would end the process
                job.log("ERROR", f"debug tensor {name}: {error}")
                return False
            return True

    job.kept.append(Listener())
    context.set_debug_listener(job.kept[-1])
    context.unfused_tensors_debug_state = True


def _address(capsule: Any) -> int:
    """The pointer in a PyCapsule; a version that hands out the integer itself is fine too."""
    if isinstance(capsule, int):
        return capsule
    api = ctypes.pythonapi
    api.PyCapsule_GetName.restype, api.PyCapsule_GetName.argtypes = ctypes.c_char_p, [ctypes.py_object]
    api.PyCapsule_GetPointer.restype = ctypes.c_void_p
    api.PyCapsule_GetPointer.argtypes = [ctypes.py_object, ctypes.c_char_p]
    return api.PyCapsule_GetPointer(capsule, api.PyCapsule_GetName(capsule))


def _member_name(member: Any) -> str:
    return str(member).rpartition(".")[2]


def _numpy_type(name: str, dtype: str) -> Any:
    if dtype not in NUMPY_TYPES:
        raise RunnerFailure("unsupported", f"tensor {name!r} is {dtype}, which numpy cannot hold")
    return NUMPY_TYPES[dtype]


# ---------------------------------------------------------------- jobs


def execute(job: dict[str, Any], emit: Emit) -> dict[str, Any]:
    """Run a job's steps in order, up to the first that fails. Returns the content of ``result.json``."""
    results: list[dict[str, Any]] = []
    limit = job.get("time_limit")
    deadline = None if limit is None else time.monotonic() + limit
    failure, details = None, {}
    try:
        for index, step in enumerate(job["steps"]):
            emit({"event": "step", "index": index, "of": len(job["steps"]), "command": step["command"]})
            results.append(COMMANDS[step["command"]](Job(emit, deadline), step))
    except RunnerFailure as error:
        failure = error
    except MemoryError:
        failure = RunnerFailure("memory", "the host ran out of memory")
    except Exception as error:
        failure, details = (
            RunnerFailure("internal", f"{type(error).__name__}: {error}"),
            {"traceback": traceback.format_exc()},
        )
    return {"results": results, **({"error": {**failure.to_dict(), **details}} if failure else {})}


def main(folder: Path, stay: bool = False) -> int:
    """Read ``job.json`` from ``folder``, leave ``result.json`` there. To ``stay`` takes the next folder from stdin.

    Returns the process's exit status.
    """

    def emit(event: dict[str, Any]) -> None:
        print("\n" + json.dumps(event), flush=True)  # a library may have left its line open

    while True:
        result = execute(json.loads((folder / "job.json").read_text(encoding="utf-8")), emit)
        _write(folder / "result.json", json.dumps(result).encode())
        following = ""
        if stay:
            emit({"event": "done"})
            following = sys.stdin.readline().rstrip("\n")
        if not following:
            return 1 if "error" in result else 0
        folder = Path(following)


if __name__ == "__main__":
    sys.path.pop(0)  # this file's folder, whose modules must not hide others
    sys.exit(main(Path(sys.argv[1]), "--stay" in sys.argv))
