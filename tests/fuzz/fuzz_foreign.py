"""Cases from other hands: any operator of any domain, control flow and functions, tensors that other programs dumped,
saved torch programs, plug-ins of other distributions, signals at any moment, and commands with many options at once."""

from __future__ import annotations

import base64
import io
import json
import os
import random
import shutil
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from fuzz_arguments import BASES, _commands, _kind, _place, _value, _writes
from fuzz_base import NUMBERS, SPECIAL, TEXTS, Case, damage, json_bytes, mutated
from fuzz_files import npy, odd_place
from fuzz_onnx import commands
from fuzz_world import World
from onnx import TensorProto, helper, numpy_helper

MICROSOFT = [
    "FusedConv",
    "FusedMatMul",
    "FusedGemm",
    "BiasGelu",
    "FastGelu",
    "Gelu",
    "QuickGelu",
    "LayerNormalization",
    "SkipLayerNormalization",
    "SimplifiedLayerNormalization",
    "Attention",
    "MultiHeadAttention",
    "GroupQueryAttention",
    "MatMulNBits",
    "QLinearAdd",
    "QLinearMul",
    "QLinearSigmoid",
    "QLinearConcat",
    "QLinearGlobalAveragePool",
    "QLinearSoftmax",
    "DynamicQuantizeMatMul",
    "MatMulIntegerToFloat",
    "QuantizeLinear",
    "DequantizeLinear",
    "EmbedLayerNormalization",
    "NhwcMaxPool",
    "Inverse",
    "Pad",
    "Trilu",
    "Unique",
    "Tokenizer",
    "CDist",
    "TransposeMatMul",
    "NGramRepeatBlock",
    "BeamSearch",
    "GreedySearch",
    "Sampling",
    "WhisperBeamSearch",
    "RotaryEmbedding",
    "MoE",
    "QAttention",
]
DTYPES = (1, 2, 3, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 19, 21, 22, 23)
SHAPES = ((1, 3, 8, 8), (1, 4), (4,), (), (0,), (2, 0, 3), (1, 1, 1, 1, 1, 2), (1, 3, 8), (3, 3), (1,) * 20)


def operators(rng: random.Random, world: World, folder: Path) -> Case:
    """A graph of one to three nodes: any operator of any domain, with attributes and inputs of any type and shape."""
    weights: list[TensorProto] = []
    nodes: list[onnx.NodeProto] = []
    shape = rng.choice(SHAPES[:6])
    usual = rng.random() < 0.85
    names = ["x"]
    schemas = [s for s in onnx.defs.get_all_schemas() if "preview" not in s.domain]
    for index in range(rng.choice((1, 1, 1, 2, 3))):
        if rng.random() < 0.2:
            op, domain, allowed = rng.choice(MICROSOFT), "com.microsoft", [set[str]()] * rng.choice((1, 2, 3, 5))
            attributes: dict[str, Any] = {}
        else:
            schema = rng.choice(schemas)
            op, domain = schema.name, schema.domain
            least = rng.randint(schema.min_input, max(schema.min_input, min(schema.max_input, 5)))
            kinds = [set(i.types) for i in schema.inputs][:least]
            allowed = kinds + kinds[-1:] * (least - len(kinds))
            attributes = {
                name: made
                for name, attribute in schema.attributes.items()
                if (attribute.required or rng.random() < 0.2) and (made := _attribute(attribute, rng)) is not None
            }
        read = []
        for place, types in enumerate(allowed):
            if place == 0 and usual and (not types or "tensor(float)" in types):
                read.append(names[-1])
            elif rng.random() < 0.9:
                weights.append(_constant(f"w{index}_{place}", rng, types, shape if usual else None))
                read.append(weights[-1].name)
            else:
                read.append(rng.choice([*names, *names, ""]))
        made = [f"v{index}_{k}" for k in range(rng.choice((1, 1, 1, 2)))]
        node = helper.make_node(op, read, made, name=f"n{index}", domain=domain)
        for name, value in attributes.items():
            node.attribute.append(value if isinstance(value, onnx.AttributeProto) else _made(name, value))
        nodes.append(node)
        names += made
    inputs = [helper.make_tensor_value_info("x", 1 if usual else rng.choice(DTYPES), shape)]
    outputs = [onnx.ValueInfoProto(name=n) for n in nodes[-1].output]
    if rng.random() < 0.1:
        outputs = [helper.make_tensor_value_info(n, rng.choice(DTYPES), rng.choice(SHAPES)) for n in nodes[-1].output]
    graph = helper.make_graph(nodes, "net", inputs, outputs, weights)
    opsets = {"": rng.choice((21, 21, 21, 21, 23, 18, 13, 11, 7)), "com.microsoft": 1, "ai.onnx.ml": 3}
    opsets |= {n.domain: 1 for n in nodes if n.domain not in opsets}
    imports = [helper.make_opsetid(domain, version) for domain, version in opsets.items()]
    model = helper.make_model(graph, opset_imports=imports, ir_version=10)
    (folder / "bad.onnx").write_bytes(model.SerializeToString())
    for name in ("net.onnx", "x.npz"):
        shutil.copyfile(world.files / name, folder / name)
    told, writes = commands(rng, "bad.onnx", fed=False)
    if rng.random() < 0.15:
        told, writes = [["predict", "bad.onnx", "--precision", rng.choice(("fp16", "bf16", "tf32"))]], []
    return Case("operators", told, writes)


def _attribute(attribute: Any, rng: random.Random) -> Any:
    kind = str(attribute.type).rpartition(".")[2]
    numbers = (0, 1, 2, -1, 3, 7, *(n for n in NUMBERS if isinstance(n, int) and abs(n) < 1 << 63))
    some = range(rng.choice((0, 1, 2, 4, 4)))
    makers: dict[str, Any] = {
        "INT": lambda: rng.choice((0, 1, 1, 2, 3, *numbers)),
        "FLOAT": lambda: rng.choice((0.0, 1.0, 0.5, -1.0, 1e30, *SPECIAL)),
        "STRING": lambda: rng.choice(("NOTSET", "SAME_UPPER", "linear", "ij,jk->ik", "none", *rng.sample(_said(), 2))),
        "INTS": lambda: [
            rng.choice((0, 1, 1, 2, 3, 1, 1, 1, 2, 3, *numbers[:6], *rng.sample(numbers, 1))) for _ in some
        ],
        "FLOATS": lambda: [rng.choice((0.0, 1.0, -1.0, *SPECIAL)) for _ in some],
        "STRINGS": lambda: [rng.choice(("Relu", "Tanh", "a", *_said())) for _ in some],
        "TENSOR": lambda: _constant("t", rng),
        "GRAPH": lambda: _body(rng),
    }
    return makers[kind]() if kind in makers else None


def _said() -> list[str]:
    return [t for t in TEXTS if "\x00" not in t and len(t) < 400]


def _made(name: str, value: Any) -> onnx.AttributeProto:
    if isinstance(value, list) and not value:
        return helper.make_attribute(name, value, attr_type=onnx.AttributeProto.INTS)
    return helper.make_attribute(name, value)


def _constant(
    name: str, rng: random.Random, types: set[str] | None = None, shape: tuple[int, ...] | None = None
) -> TensorProto:
    """A small tensor, usually of one of ``types`` and often of ``shape``, a scalar or a vector."""
    known = {f"tensor({onnx.TensorProto.DataType.Name(n).lower()})": n for n in DTYPES}
    fitting = sorted(known[t] for t in types or () if t in known)
    element = rng.choice(fitting or (1, 1, 7, 9))
    if 1 in fitting and rng.random() < 0.7:
        element = 1
    if rng.random() < 0.05:
        element = rng.choice(DTYPES)
    if shape is None or rng.random() < 0.5:
        shape = rng.choice(((), (1,), (2,), (4,), (3, 3), *SHAPES))
    if element == 8:
        return helper.make_tensor(name, 8, shape, [b"a"] * int(np.prod(shape)))
    values = np.random.default_rng(rng.randrange(1000)).integers(0, 4, shape)
    if element in (1, 10, 11, 16) and rng.random() < 0.8:
        values = np.random.default_rng(rng.randrange(1000)).standard_normal(shape)
    return numpy_helper.from_array(np.asarray(values).astype(helper.tensor_dtype_to_np_dtype(element)), name)


def _body(rng: random.Random) -> onnx.GraphProto:
    """A graph for a branch or a loop, often with another number of inputs or outputs than its node expects."""
    count = rng.choice((0, 2, 3, 3))
    names = ["i", "go", "v"][:count]
    inputs = [helper.make_tensor_value_info(n, k, None) for n, k in zip(names, (7, 9, 1), strict=False)]
    source = rng.choice((*names, "x", "x", "nothing"))
    nodes = [helper.make_node(rng.choice(("Identity", "Relu", "Not", "Neg", "Loop", "NonZero")), [source], ["b0"])]
    outputs = [onnx.ValueInfoProto(name="b0")]
    if "go" in names:
        nodes.append(helper.make_node("Identity", ["go"], ["on"]))
        outputs.insert(0, onnx.ValueInfoProto(name="on"))
    return helper.make_graph(nodes, "body", inputs, outputs[: rng.choice((0, 1, 2, 2))])


def control_flow(rng: random.Random, world: World, folder: Path) -> Case:
    """If, Loop, Scan and functions: trip counts without end, conditions of other types, calls in a circle."""
    x = helper.make_tensor_value_info("x", 1, rng.choice(([1, 4], [3, 4], ["n", 4])))
    weights = [
        numpy_helper.from_array(np.array(rng.choice((0, 1, 3, -1, 2000, 1 << 40, 1 << 62)), np.int64), "trips"),
        numpy_helper.from_array(rng.choice((np.array(True), np.array(False), np.array([True]), np.int64(1))), "yes"),
    ]
    functions = []
    kind = rng.choice(("loop", "loop", "scan", "if", "function", "nested"))
    if kind in ("loop", "nested"):
        node = _loop(rng, "v", "w")
        for depth in range(rng.choice((1, 2, 5, 20)) if kind == "nested" else 0):
            body = helper.make_graph(
                [node, helper.make_node("Identity", [f"go{depth}"], [f"on{depth}"])],
                f"outer{depth}",
                [
                    helper.make_tensor_value_info(n, k, None if n == "v" else [])
                    for n, k in ((f"i{depth}", 7), (f"go{depth}", 9), ("v", 1))
                ],
                [onnx.ValueInfoProto(name=f"on{depth}"), onnx.ValueInfoProto(name="w")],
            )
            node = helper.make_node(
                "Loop", ["trips", f"go{depth}" if depth else "", "v"], ["w"], name=f"l{depth}", body=body
            )
        nodes = [node]
        nodes[0].input[2], nodes[0].output[0] = "x", "y"
    elif kind == "scan":
        step = helper.make_graph(
            [helper.make_node("Add", ["h", "row"], ["h2"]), helper.make_node("Identity", ["h2"], ["out"])],
            "step",
            [onnx.ValueInfoProto(name=n) for n in rng.choice((("h", "row"), ("row",), ("h", "row", "more")))],
            [onnx.ValueInfoProto(name=n) for n in rng.choice((("h2", "out"), ("out",), ("h2", "out", "nothing")))],
        )
        scan = helper.make_node("Scan", ["x", "x"], ["y", "all"], name="scan", body=step)
        for name, value in (
            ("num_scan_inputs", rng.choice((1, 0, 2, -1, 1 << 40))),
            ("scan_input_axes", rng.choice(([0], [1], [9], [-9], [0, 0]))),
            ("scan_input_directions", rng.choice(([0], [1], [7], [1, 1, 1]))),
        ):
            if rng.random() < 0.8 or name == "num_scan_inputs":
                scan.attribute.append(helper.make_attribute(name, value))
        nodes = [scan]
    elif kind == "if":
        branches = {}
        for name in ("then_branch", "else_branch"):
            op, reads = rng.choice(
                (("Relu", "x"), ("Shape", "x"), ("Neg", "nothing"), ("NonZero", "x"), ("Relu", "yes"))
            )
            branch = [helper.make_node(op, [reads], [f"{name}_y"])]
            branches[name] = helper.make_graph(branch, name, [], [onnx.ValueInfoProto(name=f"{name}_y")])
        if rng.random() < 0.2:
            branches.pop("else_branch")
        nodes = [helper.make_node("If", [rng.choice(("yes", "x", "trips", ""))], ["y"], name="if", **branches)]
    else:
        names = ("F", "G", rng.choice(("H", "Relu", "\x1b[31m", "Conv")))
        domain = rng.choice(("own", "own", "", "com.microsoft"))
        for index, name in enumerate(names):
            called = rng.choice((names[(index + 1) % 3], names[index], "Tanh", "Tanh", "Nothing"))
            inner = helper.make_node(called, ["a"], ["b"], domain=domain if called in names else "")
            if rng.random() < 0.3:
                inner.attribute.add(name="alpha", ref_attr_name=rng.choice(("alpha", "nothing")), type=1)
            imports = [helper.make_opsetid("", rng.choice((17, 1, 99, -1))), helper.make_opsetid(domain or "own", 1)]
            functions.append(
                helper.make_function(domain, name, ["a"][: rng.choice((1, 1, 0))], ["b"], [inner], imports)
            )
        nodes = [helper.make_node(names[0], ["x"] * rng.choice((1, 1, 2)), ["y"], domain=domain, name="call")]
    outputs = [onnx.ValueInfoProto(name="y")]
    graph = helper.make_graph(nodes, "net", [x], outputs, weights)
    opsets = [helper.make_opsetid(d, v) for d, v in (("", rng.choice((8, 11, 13, 17, 21))), ("own", 1))]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=rng.choice((8, 9, 10)), functions=functions)
    (folder / "bad.onnx").write_bytes(model.SerializeToString())
    for name in ("net.onnx", "x.npz"):
        shutil.copyfile(world.files / name, folder / name)
    told, writes = commands(rng, "bad.onnx", fed=False)
    return Case("control flow", told, writes, environment={"CPDEBUG_LOOP_SECONDS": "2"})


def _loop(rng: random.Random, given: str, made: str) -> onnx.NodeProto:
    state = rng.choice((given, given, "i"))
    nodes = [
        helper.make_node(rng.choice(("Identity", "Identity", "Not")), ["go"], ["on"]),
        helper.make_node(rng.choice(("Identity", "Relu", "Tanh")), [given], ["t"]),
        helper.make_node("Identity", [state], ["s"]),
    ]
    outputs = [onnx.ValueInfoProto(name=n) for n in rng.choice((("on", "t"), ("on", "t", "s"), ("on",), ("t", "on")))]
    inputs = [
        helper.make_tensor_value_info(n, k, None if n == given else []) for n, k in (("i", 7), ("go", 9), (given, 1))
    ]
    body = helper.make_graph(nodes, "body", inputs[: rng.choice((3, 3, 3, 2))], outputs)
    names = [made, "scanned"][: max(1, len(outputs) - 1)]
    return helper.make_node("Loop", ["trips", rng.choice(("yes", "")), given], names, name="loop", body=body)


def dumps(rng: random.Random, world: World, folder: Path) -> Case:
    """``--test-tensors``: what another program dumped, damaged, lying about itself, or with names that attack."""
    shutil.copyfile(world.files / "net.onnx", folder / "net.onnx")
    shutil.copyfile(world.files / "x.npz", folder / "x.npz")
    shapes = {"c1": (1, 4, 8, 8), "r1": (1, 4, 8, 8), "c2": (1, 4, 4, 4), "y": (1, 4, 4, 4), "z": (1, 4)}
    random_numbers = np.random.default_rng(rng.randrange(100))
    tensors: dict[str, np.ndarray] = {}
    for name, shape in shapes.items():
        if rng.random() < 0.8:
            array = random_numbers.standard_normal(shape)
            if rng.random() < 0.1:
                array[...] = rng.choice((np.nan, np.inf, 1e300))
            dtype = rng.choice(("f4", "f4", "f4", "f2", "f8", "i4", "u1", "?", "c8", "M8[s]", "U3"))
            made = array.astype("f4").astype("i8").astype(dtype) if dtype in ("M8[s]", "u1") else array.astype(dtype)
            made = made.reshape(rng.choice((shape, shape, shape, (-1,), (*shape, 1), shape[::-1])))
            tensors[rng.choice((name, name, name, name, rng.choice(TEXTS)))] = made
    kind = rng.choice(("npz", "folder", "safetensors", "json", "pb"))
    path = folder / f"dump{'' if kind in ('folder', 'pb') else f'.{kind}'}"
    if kind == "npz":
        with zipfile.ZipFile(path, "w") as file:
            for name, array in tensors.items():
                for _ in range(rng.choice((1, 1, 1, 2))):
                    entry = f"{rng.choice(('', '', '', '../', '/', 'a/'))}{name}.npy".replace("\x00", "")
                    file.writestr(entry, npy(array, rng.choice((None, None, None, b"{'shape': (9" * 9))))
    elif kind == "folder":
        path.mkdir()
        for name, array in tensors.items():
            safe = name.replace("/", "_").replace("\x00", "")[:60] or "empty"
            place = path / f"{safe}.npy"
            if rng.random() < 0.1:
                odd_place(place, rng)
            else:
                data = npy(array)
                place.write_bytes(damage(data, rng) if rng.random() < 0.2 else data)
    elif kind == "safetensors":
        header: dict[str, Any] = {}
        body = b""
        for name, array in tensors.items():
            data = array.astype("f4").tobytes() if array.dtype.kind in "fiub" else bytes(16)
            header[name] = {
                "dtype": "F32",
                "shape": list(array.shape),
                "data_offsets": [len(body), len(body) + len(data)],
            }
            body += data
        document = mutated(header, rng) if rng.random() < 0.6 else header
        text = json_bytes(document, rng)
        size = rng.choice((len(text), len(text), len(text), 1 << 62, 0, len(text) + 9, (1 << 64) - 1))
        path.write_bytes(struct.pack("<Q", size) + text + body)
    elif kind == "json":
        runner = {name: _polygraphy(array) for name, array in tensors.items()}
        document = {
            "lst": [["runner", [{"outputs": {"values": runner}, "runtime": 1.0}]]],
            "polygraphy_class": "RunResults",
        }
        document = mutated(document, rng) if rng.random() < 0.7 else document
        path.write_bytes(json_bytes(document, rng))
    else:
        place = path / "test_data_set_0"
        place.mkdir(parents=True)
        for index, (name, array) in enumerate(tensors.items()):
            usable = array if array.dtype.kind in "fiub" else np.zeros(3, "f4")
            proto = numpy_helper.from_array(usable, name)
            data = proto.SerializeToString()
            number = rng.choice((index, index, index, "x", -1, 10**30))
            (place / f"output_{number}.pb").write_bytes(damage(data, rng) if rng.random() < 0.4 else data)
    if kind != "folder" and path.is_file() and rng.random() < 0.25:
        path.write_bytes(damage(path.read_bytes(), rng))
    argv = ["bisect", "net.onnx", "--test-tensors", path.name]
    argv += rng.choice(([], ["--inputs", "x.npz"], ["--tensors-layout", "nhwc"], ["-b", "emu-fp32"]))
    argv += rng.choice(
        ([], ["--tensors-precision", rng.choice(("fp16", "int8", "fp99"))], ["--html", "o.html"], ["--all"])
    )
    return Case("dumps", [argv], ["o.html"])


def _polygraphy(array: np.ndarray) -> dict[str, str]:
    stream = io.BytesIO()
    np.save(stream, array)
    return {"array": base64.b64encode(stream.getvalue()).decode(), "polygraphy_class": "ndarray"}


class _Runs:
    """Pickled, it would write outside when it is loaded."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, ("echo owned > ../outside/owned; echo owned > owned",)


def programs(rng: random.Random, world: World, folder: Path) -> Case:
    """Saved torch programs (``.pt2``, TorchScript) and checkpoints: damaged, exchanged, with pickles that run code."""
    import torch

    made = world.folder / "programs"
    if not made.exists():
        namespace: dict[str, Any] = {}
        exec(compile((world.files / "net.py").read_text(), "net.py", "exec"), namespace)
        net, example = namespace["make"]()
        made.mkdir()
        torch.export.save(torch.export.export(net, example), made / "net.pt2")
        torch.jit.trace(net, example).save(str(made / "net.ts"))
        torch.save(net.state_dict(), made / "net.pt")
    source = rng.choice(sorted(made.iterdir()))
    name = f"bad{rng.choice((source.suffix, source.suffix, '.pt2', '.ts', '.pt', '.pth', '.torchscript'))}"
    data = source.read_bytes()
    kind = rng.randrange(5)
    if kind == 0:
        data = damage(data, rng)
    elif kind == 1:
        data = data[: rng.randrange(len(data))]
    elif kind == 2:
        data = _rewritten(data, rng)
    elif kind == 3:
        stream = io.BytesIO()
        torch.save(
            {"state_dict": _Runs(), "meta": rng.choice(TEXTS)},
            stream,
            _use_new_zipfile_serialization=rng.random() < 0.5,
        )
        data = stream.getvalue()
    (folder / name).write_bytes(data)
    for file in ("net.py", "net.onnx", "x.npz"):
        shutil.copyfile(world.files / file, folder / file)
    told = rng.choice(
        (
            ["bisect", name, "-b", "torch,ort"],
            ["bisect", name, "-b", "torch,emu-fp16", "--inputs", "x.npz"],
            ["check", name],
            ["export", name, "-o", "out"],
            ["capture", name, "-b", "torch", "-o", "out"],
            ["bisect", "net.py:make", "-b", "torch,ort", "--checkpoint", name],
            ["bisect", "net.py:make", "-b", "torch,torch", "--test-checkpoint", name],
            ["quantize", "ptq", "net.py:make", "--checkpoint", name, "-o", "out"],
            ["bisect", "net.onnx", name],
        )
    )
    return Case("programs", [told], ["out"])


def _rewritten(data: bytes, rng: random.Random) -> bytes:
    """The archive with an entry changed, left out, doubled, renamed, or huge."""
    out = io.BytesIO()
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive, zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as target:
            chosen = rng.choice(archive.namelist())
            for name in archive.namelist():
                content = archive.read(name)
                if name == chosen:
                    how = rng.randrange(6)
                    if how == 0:
                        continue
                    if how == 1:
                        content = damage(content, rng)
                    elif how == 2:
                        import pickle

                        content = pickle.dumps(_Runs())
                    elif how == 3:
                        name = rng.choice((f"../{name}", f"/{name}", f"{name}\x1b[31m", name.upper()))
                    elif how == 4:
                        content = bytes(1 << 26)
                    elif name.endswith(".json"):
                        content = json_bytes(mutated(json.loads(content), rng), rng)
                target.writestr(name, content)
    except (zipfile.BadZipFile, ValueError, RecursionError):
        return damage(data, rng)
    return out.getvalue()


PLUGINS = (
    "raise RuntimeError('\\x1b[31mbroken')",
    "import nothing_of_this_name",
    "raise SystemExit(0)",
    "raise KeyboardInterrupt",
    "class Evil(BaseException): pass\nraise Evil('x' * 100000)",
    "thing = None",
    "def thing(*a, **k): raise ValueError('\\x1b]0;title\\x07' + 'line\\n' * 50)",
    "def thing(*a, **k): return None",
    "def thing(*a, **k): return 7",
    "def thing(*a, **k): return thing",
    "class thing:\n    name = '\\x1b[31m'\n    components = ()\n    def __init__(self, *a, **k): pass",
    "class thing:\n    def __getattr__(self, name): raise RuntimeError(name)\n    def __init__(self, *a, **k): pass",
    "class thing(dict):\n    def __call__(self, *a, **k): return self\nthing = thing()",
    "1/",
    "def thing(*a, **k):\n    import sys; print('\\x1b[31mred'); sys.exit(1)",
)


def plugins(rng: random.Random, world: World, folder: Path) -> Case:
    """Another distribution whose entry points raise, end the process, or give what they should not."""
    shutil.copyfile(world.files / "net.onnx", folder / "net.onnx")
    place = folder / "site"
    info = place / "evil-1.0.dist-info"
    info.mkdir(parents=True)
    (place / "evil_plugin.py").write_text(rng.choice(PLUGINS) + "\n")
    (info / "METADATA").write_text(rng.choice(("Metadata-Version: 2.1\nName: evil\nVersion: 1.0\n", "\x1b[31m", "")))
    target = rng.choice(
        ("evil_plugin:thing", "evil_plugin:thing", "evil_plugin:nothing", "nothing", "evil_plugin", "::", "")
    )
    groups = rng.sample(("cpdebug.recipes", "cpdebug.backends", "cpdebug.configs"), rng.choice((1, 3)))
    name = rng.choice(("evil", "evil", "onnx", "ort", "torch", "centerpoint", "[b]x", "\x1b[31m", "=", "a b"))
    lines = [f"[{group}]\n{name} = {target}\n" for group in groups]
    (info / "entry_points.txt").write_text("\n".join(lines))
    (folder / "deploy.evil").write_text("model: net.onnx\n")
    told = rng.choice(
        (
            ["models"],
            ["doctor"],
            ["bisect", "net.onnx", "-b", "ort,evil"],
            ["bisect", "evil:anything"],
            ["deploy", "deploy.evil"],
            ["bisect", "net.onnx", "-b", "ort,ort-all"],
        )
    )
    if told == ["models"] and rng.random() < 0.5:  # torch itself cannot be imported then
        torn = rng.choice(("no equals sign", "[console_scripts", "= x:y"))
        (info / "entry_points.txt").write_text("\n".join([*lines, torn]))
    return Case("plug-ins", [told], ["site/__pycache__"], environment={"PYTHONPATH": str(place)}, subprocess=True)


def combined(rng: random.Random, world: World, folder: Path) -> Case:
    """A command with many options at once, most with values that fit."""
    words = rng.choice(sorted(_commands()))
    _place(world, folder, words)
    argv = [*words, *BASES.get(words, [])]
    options = [
        p for p in _commands()[words].params if p.param_type_name == "option" and p.name not in ("help", "cluster")
    ]
    for option in rng.sample(options, min(len(options), rng.choice((3, 5, 8)))):
        flag = rng.choice([*option.opts, *option.secondary_opts])
        argv.append(flag)
        if not option.is_flag:
            argv.append(_value(_kind(option), rng, small=rng.random() < 0.8))
    return Case("combined", [[part.replace("\x00", "") for part in argv]], _writes(argv, words))


def signals(rng: random.Random, world: World, folder: Path) -> Case:
    """Ctrl-C or SIGTERM at any moment: an exit code of its own, nothing half-written, nothing left behind."""
    for name in ("net.onnx", "net.py", "x.npz", "other.onnx"):
        shutil.copyfile(world.files / name, folder / name)
    told = rng.choice(
        (
            ["bisect", "net.onnx", "-b", "ort,emu-fp16", "--save", "out", "--html", "o.html"],
            ["bisect", "net.py:make", "-b", "torch,ort,ort-all"],
            ["capture", "net.onnx", "-b", "ort-all", "-o", "out"],
            ["search", "net.onnx", "-b", "ort,emu-fp16", "--goal", "rel_l2<1e-5", "--onnx", "o.onnx"],
            ["quantize", "ptq", "net.py:make", "-o", "out", "--batches", "2"],
            ["export", "net.py:make", "-o", "out"],
            ["verify", "net.py:make", "-s", "torch,ort"],
            ["bisect", "centerpoint:tiny", "-b", "torch,ort"],
        )
    )
    writes = ["out", "o.html", "o.onnx"]
    return Case("signals", [list(told)], writes, signal=rng.choice((2, 15)), signal_after=rng.uniform(0.2, 3.0))
