"""Files with one thing that should not be: text that is no UTF-8, sizes that no memory holds, narrow types.

And names of files with bytes that are no text, in every option that names one.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from fuzz_base import Case
from fuzz_onnx import commands
from fuzz_world import World
from onnx import AttributeProto, TensorProto, helper, numpy_helper

MARKED = b"MaRkEd"
NO_TEXT = (b"\xff\xfeRkEd", b"MaRk\xc3(", b"MaR\xed\xa0\x80", b"MaRkE\xf4", b"M\x00RkEd", b"\x80\x81\x82\x83\x84\x85")
SIZES = (0, 1, 3, 1000, 10**5, 10**6, 2**31 - 1, 2**31, 2**40, 2**62, 2**63 - 1)
NARROW = (
    *("FLOAT8E4M3FN", "FLOAT8E4M3FNUZ", "FLOAT8E5M2", "FLOAT8E5M2FNUZ", "FLOAT4E2M1", "FLOAT8E8M0", "INT4", "UINT4"),
    *("BFLOAT16", "FLOAT16", "INT8", "UINT8", "INT16", "UINT16", "UINT32", "UINT64", "BOOL", "COMPLEX64", "DOUBLE"),
)


def no_text(rng: random.Random, world: World, folder: Path) -> Case:
    """One text of a valid file, whatever it says, in bytes that are no UTF-8."""
    model = rng.choice((_told, _told, lambda w: w.net))(world)
    if rng.random() < 0.5:
        nodes = [node for node in model.graph.node if any(_texts(a) for a in node.attribute)]
        if nodes:
            attribute = rng.choice([a for a in rng.choice(nodes).attribute if _texts(a)])
            if attribute.type == AttributeProto.STRING:
                attribute.s = rng.choice(NO_TEXT)
            else:
                attribute.strings[rng.randrange(len(attribute.strings))] = rng.choice(NO_TEXT)
            (folder / "bad.onnx").write_bytes(model.SerializeToString())
            return _asked(rng, world, folder)
    holder, field = rng.choice(list(_fields(model)))
    if isinstance(field, tuple):
        getattr(holder, field[0])[field[1]] = MARKED.decode()
    else:
        setattr(holder, field, MARKED.decode())
    data = model.SerializeToString().replace(MARKED, rng.choice(NO_TEXT))
    (folder / "bad.onnx").write_bytes(data)
    return _asked(rng, world, folder)


def dimensions(rng: random.Random, world: World, folder: Path) -> Case:
    """Sizes of inputs, outputs and described values that no memory holds, and such as only just fit."""
    model = _copied(world.net)
    graph = model.graph
    for info in rng.sample([*graph.input, *graph.output], rng.choice((1, 1, 2))):
        dims = info.type.tensor_type.shape.dim
        for dim in rng.sample(list(dims), rng.choice((1, 1, 2, min(4, len(dims)))) if len(dims) > 1 else len(dims)):
            dim.dim_value = rng.choice(SIZES)
    (folder / "bad.onnx").write_bytes(model.SerializeToString())
    return _asked(rng, world, folder)


def narrow_weights(rng: random.Random, world: World, folder: Path) -> Case:
    """Weights, constants and inputs in a type that the operators beside them take, or not."""
    model = _copied(world.net)
    graph = model.graph
    model.opset_import[0].version = rng.choice((17, 19, 21, 23))
    model.ir_version = 10
    kind = getattr(TensorProto, rng.choice(NARROW))
    values = np.abs(np.random.default_rng(rng.randrange(9)).standard_normal(4)).astype(np.float32) + 0.5
    made = helper.make_tensor("narrow", kind, [4], values.astype(complex) if kind == TensorProto.COMPLEX64 else values)
    where = rng.randrange(7)
    if where == 0:
        weight = rng.choice(graph.initializer)
        made.name = weight.name
        weight.CopyFrom(made)
    elif where == 1:
        graph.initializer.append(made)
        graph.node.append(helper.make_node("Cast", ["narrow"], ["wide"], to=1))
        graph.node.append(helper.make_node("Add", ["p4", "wide"], ["q"]))
        graph.node.append(helper.make_node("Reshape", ["p", "shape"], ["p4"]))
        graph.node.insert(len(graph.node) - 2, graph.node.pop())
        graph.output.add(name="q").type.tensor_type.elem_type = 1
    elif where == 2:
        graph.initializer.append(made)  # that nothing reads
    elif where == 3:
        graph.node.append(helper.make_node("Constant", [], ["narrow"], value=made))
        graph.output.add(name="narrow").type.tensor_type.elem_type = kind
    elif where == 4:
        graph.initializer.append(made)
        graph.output.add(name="narrow").type.tensor_type.elem_type = kind
    elif where == 5:
        graph.input.append(helper.make_tensor_value_info("narrow", kind, [4]))
        graph.node.append(helper.make_node("Cast", ["narrow"], ["wide"], to=1))
        graph.output.add(name="wide").type.tensor_type.elem_type = 1
    else:
        graph.initializer.append(made)
        scale = numpy_helper.from_array(np.array(0.5, np.float32), "a_scale")
        graph.initializer.append(scale)
        graph.node.append(helper.make_node("DequantizeLinear", ["narrow", "a_scale"], ["wide"]))
        graph.output.add(name="wide").type.tensor_type.elem_type = 1
    (folder / "bad.onnx").write_bytes(model.SerializeToString())
    return _asked(rng, world, folder)


def odd_names(rng: random.Random, world: World, folder: Path) -> Case:
    """Files and folders whose names hold bytes that are no UTF-8, to read and to write."""
    _copy(world, folder)
    odd = rng.choice(("out\udcff", "\udced\udca0\udc80", "a\udc80b.json", "out\udcc3(.npz", "\udcff.onnx"))
    read = rng.choice(("bad\udcff.onnx", "bad.onnx"))
    (folder / read).write_bytes((world.files / "net.onnx").read_bytes())
    (folder / "x\udcff.npz").write_bytes((world.files / "x.npz").read_bytes())
    result = str(world.result)
    first, second = map(str, world.captures)
    told = rng.choice(
        (
            ["bundle", result, "-o", odd],
            ["bundle", result, "-o", odd, "--redact"],
            *(["report", result, option, odd] for option in ("--html", "--md", "--onnx", "--junit", "--csv")),
            ["bisect", read, "-b", "ort,emu-fp16", rng.choice(("--json", "--save", "--csv", "--html", "--junit")), odd],
            ["bisect", read, "-b", "ort,emu-fp16", "--inputs", "x\udcff.npz", "--save", odd],
            ["bisect", read, "-b", "ort,emu-fp16", "--keep-fp32", odd],
            ["bisect", read, "-b", odd],
            ["check", read, "--json"],
            ["check", read, "--inputs", odd],
            ["capture", read, "-b", "ort", "-o", odd],
            ["compare", first, second, "--json", odd],
            ["compare", first, odd],
            ["search", read, "-b", "ort,emu-fp16", "--goal", "rel_l2<1e-4", rng.choice(("--onnx", "--json")), odd],
            ["search", read, "-b", "ort,emu-fp16", "--goal", odd],
            ["predict", read, "--json", odd],
            ["quantize", "ptq", read, "-o", odd, "--batches", "1"],
            ["export", read, "-o", odd],
            ["verify", read, "-s", "ort,emu-fp16", "--samples", "1", "--junit", odd],
            ["bench", read, "-b", "ort", "-n", "1", "--warmup", "0", "--json", odd],
            ["diff", result, odd],
            ["deploy", odd],
            ["cache", odd],
            [odd],
        )
    )
    return Case("odd names", [told], ["*"])


def _texts(attribute: onnx.AttributeProto) -> bool:
    return attribute.type == AttributeProto.STRING or (attribute.type == AttributeProto.STRINGS and attribute.strings)


def _fields(message: Any) -> Iterator[tuple[Any, Any]]:
    """Every text of a message, as the message that holds it and its field, or field and place."""
    for field in message.DESCRIPTOR.fields:
        value = getattr(message, field.name)
        repeated = not isinstance(value, str | bytes | int | float) and not hasattr(value, "DESCRIPTOR")
        if field.message_type is not None:
            if repeated:
                for part in value:
                    yield from _fields(part)
            elif message.HasField(field.name):
                yield from _fields(value)
        elif field.type == field.TYPE_STRING:
            if repeated:
                yield from ((message, (field.name, place)) for place in range(len(value)))
            else:
                yield message, field.name


def _told(world: World) -> onnx.ModelProto:
    """``net`` with nodes behind it whose attributes are text."""
    model = _copied(world.net)
    graph = model.graph
    rng = np.random.default_rng(0)

    def weight(name: str, *shape: int) -> str:
        graph.initializer.append(numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), name))
        return name

    graph.initializer.append(numpy_helper.from_array(np.array([1, 1, 2, 2], np.float32), "sizes"))
    graph.initializer.append(numpy_helper.from_array(np.array([1, 1, 4], np.int64), "three"))
    made = [
        ("Resize", ["r1", "", "sizes"], {"mode": "linear", "coordinate_transformation_mode": "asymmetric"}),
        ("Pad", ["r1", "eight"], {"mode": "reflect"}),
        ("Einsum", ["z", weight("ew", 4, 2)], {"equation": "ij,jk->ik"}),
        ("Reshape", ["z", "three"], {}),
        ("LSTM", ["last", weight("lw", 1, 8, 4), weight("lr", 1, 8, 2)], {"hidden_size": 2, "direction": "forward"}),
        (
            "GRU",
            ["last", weight("gw", 1, 6, 4), weight("gr", 1, 6, 2)],
            {"hidden_size": 2, "activations": ["Sigmoid", "Tanh"]},
        ),
        ("MaxPool", ["r1"], {"kernel_shape": [2, 2], "auto_pad": "SAME_UPPER"}),
        ("DepthToSpace", ["r1"], {"blocksize": 2, "mode": "CRD"}),
        ("ScatterND", ["z", "places", weight("up", 1)], {"reduction": "add"}),
        ("Constant", [], {"value_string": "text"}),
        ("Constant", [], {"value_strings": ["text", "other"]}),
        ("Gelu", ["z"], {"approximate": "tanh"}),
    ]
    graph.initializer.append(numpy_helper.from_array(np.array([0, 0, 1, 1, 0, 0, 1, 1], np.int64), "eight"))
    graph.initializer.append(numpy_helper.from_array(np.array([[0, 0]], np.int64), "places"))
    for place, (operator, inputs, attributes) in enumerate(made):
        value = "last" if operator == "Reshape" else f"t{place}"
        node = graph.node.add(op_type=operator, input=inputs, output=[value], name=f"told{place}", doc_string="told")
        node.attribute.extend(helper.make_attribute(name, text) for name, text in attributes.items())
        if value != "last" and operator != "Constant":
            graph.output.add(name=value).type.tensor_type.elem_type = 1
    model.opset_import[0].version = 20
    model.metadata_props.add(key="author", value="somebody")
    return model


def _copied(model: onnx.ModelProto) -> onnx.ModelProto:
    made = onnx.ModelProto()
    made.CopyFrom(model)
    return made


def _copy(world: World, folder: Path) -> None:
    for name in ("net.onnx", "x.npz"):
        (folder / name).write_bytes((world.files / name).read_bytes())


def _asked(rng: random.Random, world: World, folder: Path) -> Case:
    _copy(world, folder)
    told, writes = commands(rng, "bad.onnx")
    return Case("hostile", told, writes)
