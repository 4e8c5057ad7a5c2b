"""ONNX files: damaged bytes, structures that no exporter writes, hostile names."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from fuzz_base import NUMBERS, TEXTS, Case, damage
from fuzz_world import World
from onnx import TensorProto, helper, numpy_helper

Edit = Callable[[onnx.ModelProto, random.Random], None]

HUGE = 1 << 62


def commands(rng: random.Random, model: str, *, fed: bool = True) -> tuple[list[list[str]], list[str]]:
    """One of the commands that read an ONNX file, and what it may write."""
    inputs = ["--inputs", "x.npz"] if fed and rng.random() < 0.4 else []
    pair = rng.choice(("ort,emu-tf32", "ort,emu-fp16", "emu-fp32,ort", "ort,ort-all", "ort,ort-basic"))
    choices: list[tuple[list[list[str]], list[str]]] = [
        ([["bisect", model, "-b", pair, *inputs, "--json", "out.json"]], ["out.json"]),
        (
            [["bisect", model, "-b", pair, *inputs, "--save", "out", "--csv", "out.csv", "--html", "out.html"]],
            ["out", "out.csv", "out.html"],
        ),
        ([["bisect", "net.onnx", "-b", "ort,ort-all", "--test-model", model, "--all"]], []),
        ([["check", model, *inputs]], []),
        ([["check", model, "--json"]], []),
        ([["capture", model, "-b", rng.choice(("ort", "emu-fp16")), *inputs, "-o", "out"]], ["out"]),
        ([["search", model, "-b", "ort,emu-fp16", "--goal", "rel_l2<1e-4", "--onnx", "o.onnx"]], ["o.onnx"]),
        ([["bench", model, "-b", "ort,emu-fp32", "-n", "1", "--warmup", "0"]], []),
        ([["verify", model, "-s", "ort,emu-fp16", "--samples", "1", "--junit", "o.xml"]], ["o.xml"]),
        ([["quantize", "ptq", model, "-o", "int8", "--batches", "1"]], ["int8"]),
        ([["bisect", model, "-b", "ort,ort-int8"]], []),
        ([["export", model, "-o", "out"]], ["out"]),
        ([["build", model, "-o", "out"]], ["out"]),
    ]
    if rng.random() < 0.05:
        told, writes = rng.choice(choices)
        return [["--verbose", *told[0]]], writes
    return choices[min(int(rng.expovariate(0.45)), len(choices) - 1)] if rng.random() < 0.5 else rng.choice(choices)


def onnx_bytes(rng: random.Random, world: World, folder: Path) -> Case:
    """A damaged file, or one of something else."""
    source = rng.choice(("net.onnx", "net.onnx", "big.onnx", "x.npz"))
    data = (world.files / source).read_bytes()
    (folder / "bad.onnx").write_bytes(damage(data, rng))
    _beside(world, folder, rng)
    told, writes = commands(rng, "bad.onnx")
    return Case("onnx bytes", told, writes)


def onnx_structure(rng: random.Random, world: World, folder: Path) -> Case:
    """A file that protobuf reads and that is wrong."""
    model = onnx.ModelProto()
    model.CopyFrom(world.net)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        rng.choice(EDITS)(model, rng)
    (folder / "bad.onnx").write_bytes(model.SerializeToString())
    _beside(world, folder, rng)
    told, writes = commands(rng, "bad.onnx")
    return Case("onnx structure", told, writes)


def onnx_names(rng: random.Random, world: World, folder: Path) -> Case:
    """Hostile names on a model that runs, with a fault, in every report."""
    model = onnx.ModelProto()
    model.CopyFrom(world.net)
    names = rng.sample(TEXTS, 6)
    values = {"c1": names[0], "r1": names[1], "c2": names[2], "y": names[3], "x": names[4]}
    if rng.random() < 0.6:
        values.pop("x")
    values = {old: new for old, new in values.items() if new and len(new) < 1000}
    rename(model.graph, values)
    for node, name in zip(model.graph.node, rng.sample(TEXTS, len(model.graph.node)), strict=True):
        if rng.random() < 0.6:
            node.name = name
        if rng.random() < 0.2:
            node.metadata_props.add(key="pkg.torch.onnx.name_scopes", value=f"['', '{names[5]}', 'x']")
    if rng.random() < 0.5:
        model.graph.name = model.producer_name = names[5]
    other = onnx.ModelProto()
    other.CopyFrom(model)
    weight = next(t for t in other.graph.initializer if t.name == "w2")
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * np.float32(1.2), "w2"))
    (folder / "bad.onnx").write_bytes(model.SerializeToString())
    (folder / "worse.onnx").write_bytes(other.SerializeToString())
    kind = rng.choice(("html", "markdown", "junit", "github", "csv", "onnx", "html", "markdown", "github"))
    ending = {"html": "html", "markdown": "md", "junit": "xml", "csv": "csv", "onnx": "onnx"}.get(kind)
    report = ["report", "out", "-f", kind, *(["-o", f"r.{ending}"] if ending else [])]
    bisect = ["bisect", "bad.onnx", "-b", "ort,emu-fp32", "--test-model", "worse.onnx", "--save", "out"]
    bisect += rng.choice(([], ["--csv", "o.csv"], ["--all"], ["--html", "o.html"], ["--level", "stages"]))
    last = rng.choice((report, report, report, ["bundle", "out", "-o", "case"], ["check", "bad.onnx"]))
    if rng.random() < 0.15:
        told = [["search", "bad.onnx", "-b", "ort,emu-fp16", "--goal", "rel_l2<1e-5", "--json", "o.json"]]
    elif rng.random() < 0.1:
        told = [["verify", "bad.onnx", "-s", "ort,emu-fp16", "--samples", "1", "--junit", "o.xml"]]
    else:
        told = [bisect, last]
    writes = ["out", "o.csv", "o.html", "o.json", "o.xml", "r.html", "r.md", "r.xml", "r.csv", "r.onnx", "case"]
    return Case("onnx names", told, writes, ascii=rng.random() < 0.15)


def _beside(world: World, folder: Path, rng: random.Random) -> None:
    """The files that commands read besides the broken one; the external data now and then broken, too."""
    for name in ("net.onnx", "x.npz", "big.bin"):
        shutil.copyfile(world.files / name, folder / name)
    if rng.random() < 0.1:
        (folder / "big.bin").write_bytes(damage((folder / "big.bin").read_bytes(), rng))


def rename(graph: onnx.GraphProto, names: dict[str, str]) -> None:
    """Give values other names, in subgraphs too."""
    for node in graph.node:
        for field in (node.input, node.output):
            for index, value in enumerate(field):
                field[index] = names.get(value, value)
        for attribute in node.attribute:
            if attribute.HasField("g"):
                rename(attribute.g, names)
    for info in (*graph.input, *graph.output, *graph.initializer):
        info.name = names.get(info.name, info.name)


def _some(items: Any, rng: random.Random) -> Any:
    return items[rng.randrange(len(items))] if len(items) else None


def _weight(model: onnx.ModelProto, rng: random.Random) -> TensorProto:
    return _some(model.graph.initializer, rng) or model.graph.initializer.add(name="w")


def _node(model: onnx.ModelProto, rng: random.Random) -> onnx.NodeProto:
    return _some(model.graph.node, rng) or model.graph.node.add(op_type="Relu", input=["x"], output=["q"])


def weight_dims(model: onnx.ModelProto, rng: random.Random) -> None:
    weight = _weight(model, rng)
    kind = rng.randrange(5)
    if kind == 0 and weight.dims:
        weight.dims[rng.randrange(len(weight.dims))] = rng.choice((-1, 0, 7, HUGE, 2**63 - 1, -(2**63)))
    elif kind == 1:
        weight.dims.append(rng.choice((0, 1, 2, HUGE)))
    elif kind == 2:
        del weight.dims[:]
    elif kind == 3:
        weight.dims.extend([1] * 100)
    else:
        weight.dims.extend([2**31] * 4)


def weight_type(model: onnx.ModelProto, rng: random.Random) -> None:
    _weight(model, rng).data_type = rng.choice((0, 2, 8, 9, 10, 14, 15, 16, 17, 21, 22, 23, 24, 25, 99, -1, 2**31 - 1))


def weight_data(model: onnx.ModelProto, rng: random.Random) -> None:
    weight = _weight(model, rng)
    kind = rng.randrange(5)
    if kind == 0:
        weight.raw_data = weight.raw_data[: rng.randrange(len(weight.raw_data) + 1)]
    elif kind == 1:
        weight.raw_data = weight.raw_data + b"\x00" * rng.choice((1, 4, 1000))
    elif kind == 2:
        weight.ClearField("raw_data")
        weight.float_data.extend([1.0] * rng.choice((0, 1, 5)))
    elif kind == 3:
        weight.ClearField("raw_data")
        weight.string_data.extend([b"\xff\xfe", b"x"])
    else:
        weight.raw_data = np.full(max(len(weight.raw_data) // 4, 1), np.nan, np.float32).tobytes()


def weight_external(model: onnx.ModelProto, rng: random.Random) -> None:
    weight = _weight(model, rng)
    weight.ClearField("raw_data")
    weight.data_location = TensorProto.EXTERNAL
    del weight.external_data[:]
    location = rng.choice(
        (
            "big.bin",
            "big.bin",
            "big.bin",
            "x.npz",
            "../outside/x",
            "/etc/passwd",
            "",
            ".",
            "/dev/zero",
            "no",
            "a\x00b",
            "fifo",
            "big.bin/x",
            "x" * 300,
            "x" * 5000,
            "\x1b[31m",
            "~/x",
            "%s",
            "./././big.bin",
            "../work/big.bin",
        )
    )
    if rng.random() < 0.95:
        weight.external_data.add(key="location", value=location)
    for key in ("offset", "length"):
        if rng.random() < 0.7:
            value = rng.choice(("0", "4", "-1", "-100", "abc", "", "1e3", "9" * 30, "9" * 5000, str(2**63), "٣", " 1 "))
            weight.external_data.add(key=key, value=value)
    if rng.random() < 0.2:
        weight.external_data.add(key=rng.choice(TEXTS), value=rng.choice(TEXTS))
        weight.external_data.add(key="checksum", value="\x00")


def weight_sparse(model: onnx.ModelProto, rng: random.Random) -> None:
    sparse = model.graph.sparse_initializer.add()
    sparse.values.CopyFrom(_weight(model, rng))
    sparse.dims.extend([rng.choice((-1, 0, 3, HUGE))])
    if rng.random() < 0.5:
        sparse.indices.CopyFrom(_weight(model, rng))


def names_odd(model: onnx.ModelProto, rng: random.Random) -> None:
    text = rng.choice([t for t in TEXTS if t != "\ud800"])
    node = _node(model, rng)
    kind = rng.randrange(8)
    if kind == 0:
        node.name = text
    elif kind == 1 and node.output:
        node.output[0] = text
    elif kind == 2 and node.input:
        node.input[0] = text
    elif kind == 3:
        node.op_type = text
    elif kind == 4:
        node.domain = text
    elif kind == 5:
        _weight(model, rng).name = text
    elif kind == 6:
        rename(model.graph, {rng.choice(("x", "y", "c1", "r1", "z")): text})
    else:
        node.name = "n" * rng.choice((10_000, 1_000_000))


def not_utf8(model: onnx.ModelProto, rng: random.Random) -> None:
    """Text that no encoder would write: ``conv1``, ``c1`` … with a byte that is not UTF-8."""
    old = rng.choice((b"conv1", b"relu1", b"c1", b"r1", b"Conv", b"Relu", b"w1", b"net", b"pads", b"shape", b"batch"))
    data = model.SerializeToString().replace(old, b"\xff\xfe" + old[2:])
    try:
        model.ParseFromString(data)
    except Exception:  # this protobuf refuses it itself
        model.graph.doc_string = "refused"


def dataflow(model: onnx.ModelProto, rng: random.Random) -> None:
    graph = model.graph
    kind = rng.randrange(10)
    if kind == 0:  # a cycle
        graph.node[0].input[0] = "r1"
    elif kind == 1:  # a node that reads itself
        node = _node(model, rng)
        if node.input and node.output:
            node.input[0] = node.output[0]
    elif kind == 2:  # two nodes make one value
        graph.node.add(op_type="Relu", input=["x"], output=[rng.choice(("c1", "r1", "y"))], name="twice")
    elif kind == 3:
        _node(model, rng).input[0:1] = ["nowhere"]
    elif kind == 4:
        del graph.input[:]
    elif kind == 5:
        del graph.output[:]
    elif kind == 6:
        del graph.node[rng.randrange(max(len(graph.node), 1)) :]
    elif kind == 7:
        graph.output.add(name=rng.choice(("w1", "x", "nowhere", "y", "")))
    elif kind == 8:
        graph.input.add().CopyFrom(_some(graph.input, rng) or onnx.ValueInfoProto(name="x"))
    else:
        weight = graph.initializer.add()
        weight.CopyFrom(graph.initializer[0])
        weight.name = rng.choice(("x", "c1", "y", "w1"))


def opsets(model: onnx.ModelProto, rng: random.Random) -> None:
    kind = rng.randrange(6)
    if kind == 0:
        del model.opset_import[:]
    elif kind == 1 and model.opset_import:
        model.opset_import[0].version = rng.choice((-1, 0, 1, 6, 7, 99, 2**31, 2**63 - 1))
    elif kind == 2:
        model.opset_import.add(domain=rng.choice(("com.microsoft", "nowhere", "ai.onnx", *TEXTS)), version=1)
    elif kind == 3:
        model.ir_version = rng.choice((0, 1, 3, 99, -1, 2**62))
    elif kind == 4:
        _node(model, rng).domain = rng.choice(("com.microsoft", "nowhere.custom", "ai.onnx.ml"))
    else:
        function = model.functions.add(name="f", domain="own")
        function.input.append("a")
        function.output.append("b")
        function.node.add(op_type=rng.choice(("Relu", "f")), domain=rng.choice(("", "own")), input=["a"], output=["b"])
        model.graph.node[0].op_type, model.graph.node[0].domain = "f", "own"
        if rng.random() < 0.7:
            model.opset_import.add(domain="own", version=1)


def io_types(model: onnx.ModelProto, rng: random.Random) -> None:
    info = _some([*model.graph.input, *model.graph.output], rng)
    if info is None:
        return
    tensor = info.type.tensor_type
    kind = rng.randrange(9)
    if kind == 0:
        tensor.elem_type = rng.choice((0, 2, 3, 6, 7, 8, 9, 10, 11, 14, 16, 17, 23, 99, -5))
    elif kind == 1 and tensor.shape.dim:
        tensor.shape.dim[0].dim_value = rng.choice((-1, 0, 2, 1000, 2**31, HUGE, -HUGE))
    elif kind == 2:
        tensor.shape.dim.add(dim_value=rng.choice((1, 2, HUGE)))
    elif kind == 3:
        tensor.shape.dim.add(dim_param=rng.choice(TEXTS))
    elif kind == 4:
        tensor.ClearField("shape")
    elif kind == 5:
        info.ClearField("type")
    elif kind == 6:
        info.type.sequence_type.elem_type.tensor_type.elem_type = 1
    elif kind == 7:
        del tensor.shape.dim[:]
    else:
        for dim in tensor.shape.dim:
            dim.dim_value = 100_000


def attributes(model: onnx.ModelProto, rng: random.Random) -> None:
    node = _node(model, rng)
    kind = rng.randrange(8)
    attribute = _some(node.attribute, rng)
    if kind == 0:
        node.attribute.add(name=rng.choice(("pads", "strides", "axis", *TEXTS)), i=rng.choice((-1, HUGE)), type=2)
    elif kind == 1 and attribute is not None:
        attribute.type = rng.choice((0, 1, 2, 3, 4, 5, 6, 7, 11, 13, 99))
    elif kind == 2 and attribute is not None and attribute.ints:
        attribute.ints[0] = rng.choice((-1, -100, 10**6, HUGE, 2**63 - 1))
    elif kind == 3 and attribute is not None:
        node.attribute.remove(attribute)
    elif kind == 4 and attribute is not None:
        node.attribute.add().CopyFrom(attribute)
    elif kind == 5:
        node.attribute.add(name="kernel_shape", ints=[rng.choice((0, -3, 1000, HUGE))] * 2, type=7)
    elif kind == 6:
        node.attribute.add(name="body", type=5)
    else:
        del node.input[rng.randrange(len(node.input) + 1) :]
        if rng.random() < 0.3:
            del node.output[:]


def constants(model: onnx.ModelProto, rng: random.Random) -> None:
    """Values of shapes and axes out of any range, from weights that small nodes read."""
    value = rng.choice(([0, 0, 0], [-1, -1], [HUGE], [2**31, 2**31], [10**6, 10**6, 10**3], [-5, 1]))
    kind = rng.randrange(7)
    graph = model.graph
    name = f"k{len(graph.initializer)}"
    graph.initializer.append(numpy_helper.from_array(np.array(value, np.int64), name))
    made = f"made{len(graph.node)}"
    if kind == 0:
        node = helper.make_node("Reshape", ["r1", name], [made])
    elif kind == 1:
        node = helper.make_node("Expand", ["r1", name], [made])
    elif kind == 2:
        node = helper.make_node("ConstantOfShape", [name], [made])
    elif kind == 3:
        node = helper.make_node("Tile", ["r1", name], [made])
    elif kind == 4:
        node = helper.make_node("Gather", ["r1", name], [made], axis=rng.choice((0, 1, 9)))
    elif kind == 5:
        node = helper.make_node("Slice", ["r1", name, name, name, name], [made])
    else:
        node = helper.make_node("Pad", ["r1", name], [made], mode=rng.choice(("constant", "reflect", "nothing")))
    graph.node.append(node)
    graph.output.add(name=made)


def other_kinds(model: onnx.ModelProto, rng: random.Random) -> None:
    """Outputs that are booleans, strings, sequences, integers, of no elements, or not numbers."""
    graph = model.graph
    kind = rng.randrange(10)
    made = f"other{len(graph.node)}"
    if kind == 0:
        node = helper.make_node("Greater", ["c1", "c1"], [made])
    elif kind == 1:
        node = helper.make_node("Cast", ["c1"], [made], to=8)
    elif kind == 2:
        node = helper.make_node("SequenceConstruct", ["c1", "c1"], [made])
    elif kind == 3:
        node = helper.make_node("Shape", ["c1"], [made])
    elif kind == 4:
        node = helper.make_node("NonZero", ["c1"], [made])
    elif kind == 5:
        node = helper.make_node("Cast", ["c1"], [made], to=rng.choice((2, 3, 5, 6, 7, 9, 10, 12, 13, 16, 17, 99)))
    elif kind == 6:
        node = helper.make_node("Sqrt", ["c1"], [made])
    elif kind == 7:
        graph.node.append(helper.make_node("Greater", ["c1", "r1"], ["cond"]))
        node = helper.make_node("Where", ["cond", "c1", "r1"], [made])
    elif kind == 8:
        node = helper.make_node("Optional", ["c1"], [made])
    else:
        node = helper.make_node("RandomNormal", [], [made], shape=[2, rng.choice((2, 0, 10**6))])
    graph.node.append(node)
    graph.output.add(name=made)


def subgraphs(model: onnx.ModelProto, rng: random.Random) -> None:
    """Subgraphs that nest deep, lack outputs or parameters, or loop without end."""
    graph = model.graph
    kind = rng.randrange(4)
    branch = next((a.g for n in graph.node for a in n.attribute if a.HasField("g")), None)
    if kind == 0 and branch is not None:
        del branch.output[:]
    elif kind == 1 and branch is not None:
        for _ in range(rng.choice((3, 60, 300))):
            outer = helper.make_graph([helper.make_node("If", ["flag"], ["t"])], "deep", [], list(branch.output))
            outer.node[0].attribute.add(name="then_branch", type=5).g.CopyFrom(branch)
            outer.node[0].attribute.add(name="else_branch", type=5).g.CopyFrom(branch) if rng.random() < 0.01 else None
            branch.CopyFrom(outer)
    elif kind == 2 and branch is not None:
        del branch.node[:]
    else:
        body = helper.make_graph(
            [helper.make_node("Identity", ["go"], ["on"]), helper.make_node("Relu", ["v"], ["w"])],
            "body",
            [
                helper.make_tensor_value_info("i", 7, []),
                helper.make_tensor_value_info("go", 9, []),
                helper.make_tensor_value_info("v", 1, None),
            ],
            [onnx.ValueInfoProto(name="on"), onnx.ValueInfoProto(name="w")],
        )
        times = rng.choice((0, 1, 3, 200))
        graph.initializer.append(numpy_helper.from_array(np.array(times, np.int64), "times"))
        graph.node.append(helper.make_node("Loop", ["times", "flag", "r1"], ["looped"], body=body))
        graph.output.add(name="looped")


def metadata(model: onnx.ModelProto, rng: random.Random) -> None:
    for key in ("cpdebug.exporter", "cpdebug.folded", rng.choice(TEXTS)):
        model.metadata_props.add(key=key, value=rng.choice(TEXTS))
    node = _node(model, rng)
    node.metadata_props.add(key="pkg.torch.onnx.name_scopes", value=rng.choice(("[", "['", "''''", *TEXTS)))
    node.doc_string = rng.choice(TEXTS)
    info = model.graph.value_info.add(name=rng.choice(("c1", "r1", "none")))
    info.type.tensor_type.elem_type = rng.choice((1, 8, 9, 99))
    info.type.tensor_type.shape.dim.add(
        dim_value=rng.choice([n for n in NUMBERS if isinstance(n, int) and abs(n) < HUGE])
    )


def quantized(model: onnx.ModelProto, rng: random.Random) -> None:
    """Q/DQ pairs with scales and zero points that make no sense."""
    graph = model.graph
    scale = rng.choice((0.0, -1.0, float("nan"), float("inf"), 1e-45, 0.1))
    kind = rng.choice((np.int8, np.uint8, np.float32, np.int32))
    shape = rng.choice(((), (1,), (4,), (3,), (0,)))
    graph.initializer.append(numpy_helper.from_array(np.full(shape, scale, np.float32), "qs"))
    graph.initializer.append(numpy_helper.from_array(np.zeros(shape, kind), "qz"))
    source = rng.choice(("r1", "c1", "x", "w2"))
    graph.node.append(helper.make_node("QuantizeLinear", [source, "qs", "qz"], ["q"], axis=rng.choice((0, 1, 9))))
    graph.node.append(helper.make_node("DequantizeLinear", ["q", "qs", "qz"], ["dq"]))
    graph.output.add(name="dq")


def half_precision(model: onnx.ModelProto, rng: random.Random) -> None:
    """Weights, inputs and outputs in types that numpy has not."""
    kind = rng.choice((TensorProto.BFLOAT16, TensorProto.BFLOAT16, TensorProto.FLOAT16, TensorProto.FLOAT8E4M3FN))
    dtype = helper.tensor_dtype_to_np_dtype(kind)
    for weight in model.graph.initializer:
        if weight.data_type == TensorProto.FLOAT:
            array = numpy_helper.to_array(weight).astype(dtype)
            weight.CopyFrom(helper.make_tensor(weight.name, kind, array.shape, array.tobytes(), raw=True))
    for info in [*model.graph.input, *model.graph.output, *model.graph.value_info]:
        if info.type.tensor_type.elem_type == TensorProto.FLOAT:
            info.type.tensor_type.elem_type = kind


EDITS: tuple[Edit, ...] = (
    *(weight_dims, weight_type, weight_data, weight_external, weight_external, weight_sparse, names_odd, not_utf8),
    *(dataflow, dataflow, opsets, io_types, io_types, attributes, attributes, constants, other_kinds, subgraphs),
    *(metadata, quantized, half_precision),
)
