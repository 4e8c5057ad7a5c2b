"""A ``tensorrt`` module for tests: the members of one recorded version and no others, running engines on the CPU.

``tests/data/tensorrt_api.json`` holds the member names read off real bindings. What a version lacks raises
AttributeError here as it does there. An "engine" is the ONNX file and a list of fused groups (Conv + Relu): ONNX
Runtime runs it, and each group's result is rounded to the type that the flags ask for; with a calibrator convolutions
read and multiply INT8. ``FakeCuda`` is host memory.
"""

from __future__ import annotations

import ctypes
import enum
import json
import struct
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort

RECORDED = json.loads((Path(__file__).parent / "data" / "tensorrt_api.json").read_text())
VERSIONS = tuple(RECORDED)

_TYPES = {"FLOAT": np.float32, "HALF": np.float16, "BF16": ml_dtypes.bfloat16, "INT32": np.int32, "INT64": np.int64}
_ELEMENTS = {onnx.TensorProto.FLOAT: "FLOAT", onnx.TensorProto.FLOAT16: "HALF"}
_WORDS = {"FLOAT": "Float", "HALF": "Half", "INT8": "Int8", "BF16": "BF16", "INT64": "Int64", "INT32": "Int32"}
_OLD_WORDS = {
    "FLOAT": "Row major linear FP32",
    "HALF": "Channel major FP16 format where channel % 8 == 0",
    "INT32": "Row major INT32 format",
    "INT8": "Thirty-two wide channel vectorized row major INT8 format",
}
_KERNELS = {"FLOAT": "f32f32_f32f32_f32", "HALF": "f16f16_f16f16_f16", "BF16": "bf16bf16_bf16f32_f32"}


PLUGINS = "trt.plugins"
"""Domain of operators that only a plug-in's library computes; there is one, ``Clipped``."""
_PLUGIN = f'''<domain: "{PLUGINS}", opset_import: ["" : 17]> Clipped (x) => (y) {{
    z = Constant <value = float {{0.0}}> () y = Max (x, z) }}'''
SHY: set[str] = set()
"""Values that, once marked, are written and read by layers in FP32."""
REGION: set[str] = set()
"""Nodes that one region takes with all that lies between them, as TensorRT's compiler for transformers does."""
FAULTY: dict[str, float] = {}
"""Node → factor by which its result is off where a region computes it in half precision."""
CROSSED: set[str] = set()
"""Splits whose results a region takes in reverse order, whatever the precision."""
SLOWER: set[str] = set()
"""Types whose kernels are all slower than those of FP32, so that none is chosen."""
STUBBORN = False
"""Whether a region has its faults in FP32, too, when all of it is kept so."""
MENDING: set[str] = set()
"""Values that, once marked, make the faults go away."""
NAMELESS: set[str] = set()
"""Versions whose inspector tells no more than the layers' names, and those without their nodes."""
ROUNDED: set[str] = set()
"""Values that an INT8 layer puts out rounded, once marked; else as they are before their readers round them."""


class FakeCuda:
    """The interface of ``runner.Cuda`` on host memory."""

    stream = 7

    def __init__(self, device: int = 0) -> None:
        self.buffers: list[Any] = []

    def describe(self) -> dict[str, Any]:
        return {"name": "Fake", "compute_capability": "9.0", "memory_bytes": 1 << 30, "cuda_driver": 13000}

    def allocate(self, nbytes: int) -> int:
        self.buffers.append(ctypes.create_string_buffer(max(nbytes, 1)))
        return ctypes.addressof(self.buffers[-1])

    def upload(self, array: np.ndarray) -> int:
        pointer = self.allocate(array.nbytes)
        ctypes.memmove(pointer, array.ctypes.data, array.nbytes)
        return pointer

    def download(self, pointer: int, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        array = np.empty(shape, dtype)
        ctypes.memmove(array.ctypes.data, pointer, array.nbytes)
        return array

    def synchronize(self, stream: int | None = None) -> None:
        assert stream in (None, self.stream)

    def free(self) -> None:
        self.buffers.clear()

    close = free


class _Enum(enum.Enum):
    def __int__(self) -> int:
        return self.value


class ILogger:
    def __init__(self) -> None:
        pass


class IProgressMonitor(ILogger):
    pass


class IDebugListener(ILogger):
    pass


class IInt8EntropyCalibrator2(ILogger):
    pass


class IInt8MinMaxCalibrator(ILogger):
    pass


class ITensor:
    def __init__(self, trt: ModuleType, name: str, dtype: str, shape: tuple[int, ...]) -> None:
        self.name, self.dtype, self.shape = name, getattr(trt.DataType, dtype), shape
        self.is_shape_tensor = self.is_network_output = False
        self.allowed_formats = 1 << int(trt.TensorFormat.LINEAR)


class ILayer:
    precision = None

    def __init__(self, trt: ModuleType, node: onnx.NodeProto, outputs: list[ITensor]) -> None:
        self._trt, self._outputs, self._node, self._output_types = trt, outputs, node, {}
        self.name, self.type, self.num_outputs = node.name, trt.LayerType.CONVOLUTION, len(outputs)
        self.metadata = (
            "" if trt.__version__.startswith("8.") else f"[ONNX Layer: {node.name}]"
        )  # the parser's, from 10

    def get_output(self, index: int) -> ITensor:
        return self._outputs[index]

    def set_output_type(self, index: int, dtype: Any) -> None:
        self._output_types[index] = dtype


class INetworkDefinition:
    def __init__(self, trt: ModuleType, flags: int) -> None:
        names = trt.NetworkDefinitionCreationFlag
        self._flags = {name.name for name in names if flags & 1 << int(name)}
        self._trt, self._layers, self._inputs, self._unfused = trt, [], [], False
        self._path = ""

    num_layers = property(lambda self: len(self._layers))
    num_inputs = property(lambda self: len(self._inputs))
    num_outputs = property(lambda self: len(self._marked))
    _marked = property(lambda self: [t for layer in self._layers for t in layer._outputs if t.is_network_output])

    def get_layer(self, index: int) -> ILayer:
        return self._layers[index]

    def get_input(self, index: int) -> ITensor:
        return self._inputs[index]

    def get_output(self, index: int) -> ITensor:
        return self._marked[index]

    def get_flag(self, flag: Any) -> bool:
        return flag.name in self._flags

    def mark_output(self, tensor: ITensor) -> None:
        assert not tensor.is_network_output
        tensor.is_network_output = True

    def mark_unfused_tensors_as_debug_tensors(self) -> bool:
        self._unfused = True
        return True


class ParserError:
    def __init__(self, index: int, node: onnx.NodeProto) -> None:
        self._index, self._node = index, node

    def node(self) -> int:
        return self._index

    def desc(self) -> str:
        return f"no importer for {self._node.op_type}"

    def node_name(self) -> str:
        return self._node.name

    def node_operator(self) -> str:
        return self._node.op_type


class OnnxParser:
    def __init__(self, network: INetworkDefinition, logger: ILogger) -> None:
        self._network, self._errors = network, []

    num_errors = property(lambda self: len(self._errors))

    def get_error(self, index: int) -> ParserError:
        return self._errors[index]

    def parse_from_file(self, path: str) -> bool:
        network, trt = self._network, self._network._trt
        model = onnx.shape_inference.infer_shapes(with_plugins(onnx.load(path)))
        graph = model.graph
        types = {v.name: v.type.tensor_type for v in (*graph.value_info, *graph.input, *graph.output)}
        network._path = path
        for value in graph.input:
            shape = tuple(d.dim_value if d.HasField("dim_value") else -1 for d in types[value.name].shape.dim)
            network._inputs.append(trt.ITensor(trt, value.name, "FLOAT", shape))
        for index, node in enumerate(graph.node):
            if node.op_type == "Det":
                self._errors.append(trt.ParserError(index, node))
            whole = "INT64" if hasattr(trt.DataType, "INT64") else "INT32"
            outputs = [trt.ITensor(trt, o, _ELEMENTS.get(types[o].elem_type, whole), ()) for o in node.output]
            for tensor in outputs:
                tensor.is_network_output = tensor.name in {v.name for v in graph.output}
            network._layers.append(trt.ILayer(trt, node, outputs))
        return not self._errors


class IOptimizationProfile:
    def __init__(self) -> None:
        self._shapes = {}

    def set_shape(self, name: str, low: tuple, optimal: tuple, high: tuple) -> None:
        self._shapes[name] = (low, optimal, high)


class IHostMemory(bytes):
    nbytes = property(len)


class ITimingCache:
    def __init__(self, trt: ModuleType, data: bytes) -> None:
        self._trt, self._data = trt, data or b"timings"

    def serialize(self) -> IHostMemory:
        return self._trt.IHostMemory(self._data)


class IBuilderConfig:
    profiling_verbosity = int8_calibrator = progress_monitor = None
    builder_optimization_level = 3
    num_optimization_profiles = property(lambda self: len(self._profiles))

    def __init__(self, trt: ModuleType) -> None:
        self._trt, self._flags, self._profiles, self._cache, self._limits = trt, {trt.BuilderFlag.TF32}, [], None, {}
        self._sources = 1 << int(trt.TacticSource.JIT_CONVOLUTIONS)

    def set_flag(self, flag: Any) -> None:
        self._flags.add(flag)

    def clear_flag(self, flag: Any) -> None:
        self._flags.discard(flag)

    def get_flag(self, flag: Any) -> bool:
        return flag in self._flags

    def set_memory_pool_limit(self, pool: Any, size: int) -> None:
        self._limits[pool] = size

    def add_optimization_profile(self, profile: IOptimizationProfile) -> int:
        self._profiles.append(profile)
        return 0

    def set_calibration_profile(self, profile: IOptimizationProfile) -> bool:
        self._calibration_profile = profile
        return True

    def create_timing_cache(self, data: bytes) -> ITimingCache:
        return self._trt.ITimingCache(self._trt, data)

    def set_timing_cache(self, cache: ITimingCache, ignore_mismatch: bool) -> bool:
        if cache._data.startswith(b"timings"):
            self._cache = cache
            return True
        return False

    def get_timing_cache(self) -> ITimingCache:
        return self._cache

    def get_tactic_sources(self) -> int:
        return self._sources

    def set_tactic_sources(self, sources: int) -> bool:
        self._sources = sources
        return sources != 0


class Builder:
    def __init__(self, logger: ILogger) -> None:
        self._logger = logger

    def create_network(self, flags: int = 0) -> INetworkDefinition:
        return self._trt.INetworkDefinition(self._trt, flags)

    def create_builder_config(self) -> IBuilderConfig:
        return self._trt.IBuilderConfig(self._trt)

    def create_optimization_profile(self) -> IOptimizationProfile:
        return self._trt.IOptimizationProfile()

    def build_serialized_network(self, network: INetworkDefinition, config: IBuilderConfig) -> IHostMemory | None:
        trt, flags = self._trt, {flag.name for flag in config._flags}
        if trt.MemoryPoolType.WORKSPACE in config._limits and config._limits[trt.MemoryPoolType.WORKSPACE] < 2 << 20:
            self._logger.log(trt.ILogger.ERROR, "Error Code 2: OutOfMemory (no further information)")
            return None
        assert config._cache is not None or network._path
        if monitor := getattr(config, "progress_monitor", None):
            monitor.phase_start("Building", None, 2)
            if not monitor.step_complete("Building", 0):
                return None
            monitor.phase_finish("Building")
        scales = self._calibrate(config, network) if getattr(config, "int8_calibrator", None) is not None else {}
        weak = "STRONGLY_TYPED" not in network._flags
        low = next((word for flag, word in (("FP16", "HALF"), ("BF16", "BF16")) if flag in flags), None)
        low = None if low in SLOWER else low
        groups: list[dict[str, Any]] = []
        tensors = [t for layer in network._layers for t in layer._outputs]
        for nodes in _fuse(network._layers):
            last = nodes[-1]._outputs[0]
            pinned = any(getattr(layer, "precision", None) == trt.DataType.FLOAT for layer in nodes)
            shy = any(t.is_network_output and t.name in {last.name, *nodes[0]._node.input} & SHY for t in tensors)
            lowered = weak and low and not pinned and last.dtype == trt.DataType.FLOAT
            kernel = "FLOAT" if shy else low if lowered else last.dtype.name
            region = any(layer.name in REGION for layer in nodes)
            product = nodes[0]._node.op_type == "Conv" and not region
            inside = [t for layer in nodes[:-1] for t in layer._outputs if t.is_network_output] if region else []
            halves = [x for x in nodes if getattr(x, "precision", None) != trt.DataType.FLOAT] if weak and low else [
                x for x in nodes if x._outputs[0].dtype.name == "HALF"
            ]  # fmt: skip
            if STUBBORN and region and nodes[0] not in halves and nodes[-1] not in halves:
                halves = nodes
            faults = {x.name: FAULTY[x.name] for x in halves if region and x.name in FAULTY}
            crossed = [x.name for x in nodes if region and x.name in CROSSED and getattr(x, "precision", None) is None]
            if any(t.is_network_output and t.name in MENDING for t in tensors):
                faults, crossed = {}, []
            if region:
                pinned = getattr(nodes[-1], "precision", None) == trt.DataType.FLOAT
                lowered = weak and low and not pinned
                kernel = low if lowered else last.dtype.name
            int8 = product and bool(scales) and not pinned
            if int8:
                readers = [f._node.op_type for f in network._layers if last.name in f._node.input]
                kernel = "INT8" if set(readers) == {"Conv"} and not last.is_network_output else "FLOAT"
            groups.append(
                {
                    "Name": f"{{ForeignNode[{nodes[0].name}...{last.name}]}}"
                    if region
                    else " + ".join(layer.name for layer in nodes),
                    "region": region,
                    "shows": [t.name for t in inside],
                    "faults": faults,
                    "crossed": crossed,
                    "Metadata": "\x1f".join(layer.metadata for layer in nodes),
                    "reads": [i for layer in nodes for i in layer._node.input if i],
                    "writes": last.name,
                    "dtype": kernel,
                    "conv": product,
                    "int8": nodes[0].name if int8 else None,
                }
            )
        outputs = {t.name: t.dtype.name for layer in network._layers for t in layer._outputs if t.is_network_output}
        formats = {f.name: 1 << int(f) for f in trt.TensorFormat}
        plan = {
            "formats": {t.name: next(n for n, bit in formats.items() if bit == t.allowed_formats) for t in tensors},
            "version": trt.__version__,
            "onnx": network._path,
            "groups": groups,
            "outputs": outputs,
            "inputs": {t.name: t.shape for t in network._inputs},
            "profiles": config._profiles[0]._shapes if config._profiles else {},
            "debug": [g["writes"] for g in groups] if network._unfused else [],
            "tf32": "TF32" in flags,
            "scales": scales,
        }
        return trt.IHostMemory(json.dumps(plan).encode())

    def _calibrate(self, config: IBuilderConfig, network: INetworkDefinition) -> dict[str, float]:
        """As TensorRT does: the cache, or else batch after batch until there is none; then what came of it."""
        calibrator = config.int8_calibrator
        assert not config._profiles or config._calibration_profile is config._profiles[0]
        if (cache := calibrator.read_calibration_cache()) is None:
            shapes = {tensor.name: tensor.shape for tensor in network._inputs}
            shapes |= {
                name: optimal
                for name, (_, optimal, _) in (config._profiles[0]._shapes if config._profiles else {}).items()
            }
            ranges: dict[str, float] = {}
            while (addresses := calibrator.get_batch([*shapes])) is not None:
                pointers = (ctypes.cast(address, ctypes.POINTER(ctypes.c_float)) for address in addresses)
                feeds = {n: np.ctypeslib.as_array(p, shapes[n]) for n, p in zip(shapes, pointers, strict=True)}
                values = [o for layer in network._layers for o in layer._node.output]
                seen = feeds | dict(zip(values, _run(onnx.load(network._path), values, feeds), strict=True))
                ranges = {n: max(ranges.get(n, 0.0), float(np.abs(a).max())) for n, a in seen.items()}
            lines = [f"{n}: {struct.pack('>f', amax / 127).hex()}" for n, amax in ranges.items()]
            cache = "\n".join(["TRT-8600-MinMaxCalibration", *lines, ""]).encode()
            calibrator.write_calibration_cache(memoryview(cache))
        pairs = (line.split(": ") for line in cache.decode().splitlines()[1:])
        return {name: struct.unpack(">f", bytes.fromhex(digits))[0] for name, digits in pairs}


def _fuse(layers: list[ILayer]) -> Iterator[list[ILayer]]:
    """Conv + Relu, where nobody else sees the convolution's result."""
    reads = [i for layer in layers for i in layer._node.input]
    taken = set()
    places = [i for i, layer in enumerate(layers) if layer.name in REGION]
    region = layers[places[0] : places[-1] + 1] if places else []
    for layer in layers:
        if id(layer) in taken:
            continue
        if region and layer is region[0]:
            taken |= set(map(id, region))
            yield region
            continue
        tensor = layer._outputs[0]
        follower = next((f for f in layers if list(f._node.input) == [tensor.name] and f._node.op_type == "Relu"), None)
        alone = reads.count(tensor.name) == 1 and not tensor.is_network_output
        if layer._node.op_type == "Conv" and follower is not None and alone:
            taken.add(id(follower))
            yield [layer, follower]
        else:
            yield [layer]


class Runtime:
    def __init__(self, logger: ILogger) -> None:
        self._logger = logger

    def deserialize_cuda_engine(self, data: bytes) -> ICudaEngine | None:
        plan = json.loads(data)
        if plan["version"] != self._trt.__version__:
            self._logger.log(self._trt.ILogger.ERROR, "Version tag does not match")
            return None
        return self._trt.ICudaEngine(self._trt, plan)


class ICudaEngine:
    def __init__(self, trt: ModuleType, plan: dict[str, Any]) -> None:
        self._trt, self._plan, self._names = trt, plan, [*plan["inputs"], *plan["outputs"]]

    num_io_tensors = property(lambda self: len(self._names))

    def get_tensor_name(self, index: int) -> str:
        return self._names[index]

    def get_tensor_mode(self, name: str) -> Any:
        return self._trt.TensorIOMode.INPUT if name in self._plan["inputs"] else self._trt.TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> Any:
        return getattr(self._trt.DataType, self._plan["outputs"].get(name, "FLOAT"))

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._plan["inputs"][name])

    def get_tensor_format(self, name: str) -> Any:
        return getattr(self._trt.TensorFormat, self._plan["formats"][name])

    def get_tensor_profile_shape(self, name: str, index: int) -> list[tuple[int, ...]]:
        return self._plan["profiles"][name]

    def get_tensor_location(self, name: str) -> Any:
        return self._trt.TensorLocation.DEVICE

    def create_engine_inspector(self) -> EngineInspector:
        return self._trt.EngineInspector(self._trt, self._plan)

    def create_execution_context(self) -> IExecutionContext:
        return self._trt.IExecutionContext(self._trt, self._plan)


class EngineInspector:
    execution_context = None

    def __init__(self, trt: ModuleType, plan: dict[str, Any]) -> None:
        self._trt, self._plan = trt, plan

    def get_engine_information(self, format: Any) -> str:
        old = self._trt.__version__.startswith("8.")
        words = _OLD_WORDS if old else _WORDS
        layers = []
        for group in self._plan["groups"]:
            reads, word = words["INT8" if group["int8"] else group["dtype"]], words[group["dtype"]]
            tf32 = group["dtype"] == "FLOAT" and self._plan["tf32"]
            types = "f32f32_tf32f32_f32" if tf32 else _KERNELS.get(group["dtype"])
            types = "i8i8_i8i32_f32" if group["int8"] else types
            tactic = f"sm80_xmma_fprop_implicit_gemm_{types}_nhwckrsc_nhwc_tilesize128x64x32_stage4"
            layers.append(
                {
                    "Name": group["Name"],
                    "LayerType": "Myelin" if group["region"] else "CaskConvolution" if group["conv"] else "PointWiseV2",
                    "Inputs": [{"Name": n, "Dimensions": [], "Format/Datatype": reads} for n in group["reads"][:1]],
                    "Outputs": [{"Name": group["writes"], "Dimensions": [], "Format/Datatype": word}],
                    "TacticName": tactic if group["conv"] else "",
                    "Metadata": group["Metadata"],
                }
            )
        if self._trt.__version__ in NAMELESS:
            layers = [f"layer {place}" for place, _ in enumerate(layers)]
        text = json.dumps({"Layers": layers, "Bindings": [*self._plan["inputs"], *self._plan["outputs"]]})
        return text.replace("\\u001f", "\x1f") if old else text  # 8.6 leaves control characters as they are


class IExecutionContext:
    unfused_tensors_debug_state = False

    def __init__(self, trt: ModuleType, plan: dict[str, Any]) -> None:
        self._trt, self._plan, self._shapes, self._addresses, self._listener = trt, plan, {}, {}, None
        self._results = {}

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self._shapes[name] = shape
        return True

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        zeros = {n: np.zeros(shape, np.float32) for n, shape in self._shapes.items()}
        return self._compute(zeros)[name].shape

    def set_tensor_address(self, name: str, address: int) -> bool:
        self._addresses[name] = address
        return True

    def set_debug_listener(self, listener: IDebugListener) -> bool:
        self._listener = listener
        return True

    def execute_async_v3(self, stream: int) -> bool:
        feeds = {
            name: FakeCuda().download(self._addresses[name], shape, np.float32) for name, shape in self._shapes.items()
        }
        results = self._compute(feeds)
        for name in self._plan["debug"] if self._listener and self.unfused_tensors_debug_state else ():
            dtype = self._kernel_type(name)
            array = np.ascontiguousarray(results[name].astype(_TYPES[dtype]))
            member = getattr(self._trt.DataType, dtype)
            address = _capsule(array.ctypes.data)
            device = self._trt.TensorLocation.DEVICE
            assert self._listener.process_debug_tensor(address, device, member, array.shape, name, stream)
        for name, dtype in self._plan["outputs"].items():
            array = _lay_out(results[name].astype(_TYPES[dtype]), self._plan["formats"][name])
            ctypes.memmove(self._addresses[name], array.ctypes.data, array.nbytes)
        return True

    def _kernel_type(self, name: str) -> str:
        return next(g["dtype"] for g in self._plan["groups"] if name in (g["writes"], *g["shows"]))

    def _compute(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Every value that the engine writes, rounded to the type that its group puts out."""
        model, scales = onnx.load(self._plan["onnx"]), self._plan["scales"]
        for place, node in reversed([*enumerate(model.graph.node)]):
            if node.name in {group["int8"] for group in self._plan["groups"]}:
                _in_int8(model, place, np.float32(scales[node.input[0]]))
        for name, factor in [f for group in self._plan["groups"] for f in group["faults"].items()]:
            _spoil(model, name, factor)
        for node in model.graph.node:
            if any(node.name in group["crossed"] for group in self._plan["groups"]):
                node.output[:] = [*node.output][::-1]
        writes = [v for group in self._plan["groups"] for v in (*group["shows"], group["writes"])]
        results = dict(zip(writes, _run(model, writes, feeds), strict=True))
        for name in ROUNDED & results.keys() & scales.keys():
            results[name] = np.clip(np.round(results[name] / np.float32(scales[name])), -128, 127) * np.float32(
                scales[name]
            )
        types = {name: _TYPES.get(self._kernel_type(name), np.float32) for name in writes}
        return {name: array.astype(types[name]) for name, array in results.items()}


def with_plugins(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with what its plug-ins compute, which the file does not tell."""
    if any(node.domain == PLUGINS for node in model.graph.node):
        model.functions.append(onnx.parser.parse_function(_PLUGIN))
    return model


def _run(model: onnx.ModelProto, values: list[str], feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    """These values of a model, by ONNX Runtime."""
    model = with_plugins(model)
    known = {v.name for v in model.graph.output}
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in values if name not in known)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL  # it moves pairs over other nodes
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(values, feeds)


def _spoil(model: onnx.ModelProto, name: str, factor: float) -> None:
    """Have the node of that name give its result times ``factor``."""
    place, node = next((i, n) for i, n in enumerate(model.graph.node) if n.name == name)
    value, low = node.output[0], {v.name: v.type.tensor_type.elem_type for v in model.graph.value_info}
    kind = np.float16 if low.get(value) == onnx.TensorProto.FLOAT16 else np.float32
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(factor, kind), f"{name}.factor"))
    node.output[0] = f"{name}.right"
    spoiled = onnx.helper.make_node("Mul", [node.output[0], f"{name}.factor"], [value], f"{name}.wrong")
    model.graph.node.insert(place + 1, spoiled)


def _in_int8(model: onnx.ModelProto, place: int, scale: np.float32) -> None:
    """Have a convolution read INT8, with weights rounded along their output channels."""
    node = model.graph.node[place]
    weight = next(t for t in model.graph.initializer if t.name == node.input[1])
    array = onnx.numpy_helper.to_array(weight)
    steps = np.abs(array).max(axis=(1, 2, 3), keepdims=True) / np.float32(127)
    names = [f"{node.name}.{part}" for part in ("weight", "scale", "zero", "levels", "read")]
    arrays = (np.round(array / steps) * steps, scale, np.int8(0))
    model.graph.initializer.extend(
        onnx.numpy_helper.from_array(np.asarray(a), n) for a, n in zip(arrays, names, strict=False)
    )
    pair = [("QuantizeLinear", node.input[0], names[3]), ("DequantizeLinear", names[3], names[4])]
    node.input[0], node.input[1] = names[4], names[0]
    for op, source, made in reversed(pair):
        model.graph.node.insert(place, onnx.helper.make_node(op, [source, *names[1:3]], [made], made))


def _lay_out(array: np.ndarray, name: str) -> np.ndarray:
    """The array in memory as TensorRT's documentation describes the format, padding filled with NaN."""
    if name == "LINEAR":
        return np.ascontiguousarray(array)
    vector = int(name[3:] or 1)
    n, c, h, w = array.shape
    padded = np.full((n, -(-c // vector) * vector, h, w), np.nan, array.dtype)
    padded[:, :c] = array
    if name.startswith("HWC"):
        return np.ascontiguousarray(padded.transpose(0, 2, 3, 1))
    return np.ascontiguousarray(padded.reshape(n, -1, vector, h, w).transpose(0, 1, 3, 4, 2))


def _capsule(address: int) -> Any:
    new = ctypes.pythonapi.PyCapsule_New
    new.restype, new.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    return new(address, None, None)


def fake_tensorrt(version: str) -> ModuleType:
    """The module of a recorded version, for ``sys.modules["tensorrt"]``."""
    recorded = RECORDED[version]
    module: Any = ModuleType("tensorrt")
    module.__spec__ = ModuleSpec("tensorrt", None)
    module.__version__ = version
    module.init_libnvinfer_plugins = lambda logger, namespace: True
    for name, members in recorded["enums"].items():
        setattr(module, name, _Enum(name, {member: value for value, member in enumerate(members)}))
    for name, members in recorded["classes"].items():
        setattr(module, name, _restricted(name, set(members), module))
    severity = _Enum("Severity", {"INTERNAL_ERROR": 0, "ERROR": 1, "WARNING": 2, "INFO": 3, "VERBOSE": 4})
    module.ILogger.ERROR = severity.ERROR
    return module


def _restricted(name: str, members: set[str], module: ModuleType) -> type:
    """The behaviour above, cut to the recorded members; a recorded member without behaviour raises when used."""
    behaviour = globals()[name]

    def check(self: Any, attribute: str, value: Any) -> None:
        if not attribute.startswith("_") and attribute not in members and name not in _SUBCLASSED:
            raise AttributeError(f"tensorrt.{name} has no {attribute}")
        object.__setattr__(self, attribute, value)

    source = {**vars(behaviour.__mro__[1]), **vars(behaviour)} if name in _SUBCLASSED else vars(behaviour)
    kept = {k: v for k, v in source.items() if (k.startswith("_") and k not in _NOT_COPIED) or k in members}
    bases = (bytes,) if name == "IHostMemory" else ()
    return type(name, bases, {**kept, "__setattr__": check, "_trt": module})


_SUBCLASSED = ("ILogger", "IProgressMonitor", "IDebugListener", "IInt8EntropyCalibrator2", "IInt8MinMaxCalibrator")
_NOT_COPIED = ("__dict__", "__weakref__")
