"""What the reader of ONNX files refuses, each with a sentence that names the place."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from cp_debug.errors import InputError
from cp_debug.graph.graph import Graph


def model() -> onnx.ModelProto:
    """``x`` → Conv → Relu → ``y``."""
    weight = numpy_helper.from_array(np.ones((2, 1, 1, 1), np.float32), "w")
    nodes = [helper.make_node("Conv", ["x", "w"], ["c"], name="conv"), helper.make_node("Relu", ["c"], ["y"], name="r")]
    x = helper.make_tensor_value_info("x", 1, [1, 1, 4, 4])
    y = helper.make_tensor_value_info("y", 1, [1, 2, 4, 4])
    graph = helper.make_graph(nodes, "net", [x], [y], [weight])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def external(location: str, **numbers: str) -> Callable[[onnx.ModelProto], None]:
    def edit(net: onnx.ModelProto) -> None:
        weight = net.graph.initializer[0]
        weight.ClearField("raw_data")
        weight.data_location = TensorProto.EXTERNAL
        for key, value in {"location": location, **numbers}.items():
            weight.external_data.add(key=key, value=value)

    return edit


def weight(**fields: object) -> Callable[[onnx.ModelProto], None]:
    def edit(net: onnx.ModelProto) -> None:
        for name, value in fields.items():
            if name == "dims":
                del net.graph.initializer[0].dims[:]
                net.graph.initializer[0].dims.extend(value)  # type: ignore[arg-type]
            else:
                setattr(net.graph.initializer[0], name, value)

    return edit


def edits(*steps: Callable[[onnx.GraphProto], object]) -> Callable[[onnx.ModelProto], None]:
    def edit(net: onnx.ModelProto) -> None:
        for step in steps:
            step(net.graph)

    return edit


def texts(*data: bytes) -> Callable[[onnx.ModelProto], None]:
    def edit(model: onnx.ModelProto) -> None:
        tensor = model.graph.initializer[0]
        tensor.ClearField("raw_data")
        tensor.data_type = TensorProto.STRING
        tensor.string_data.extend(data)

    return edit


CASES: dict[str, tuple[Callable[[onnx.ModelProto], object], str]] = {
    "short": (weight(raw_data=b"1234"), r"weight 'w' is FLOAT\[2, 1, 1, 1\], 8 bytes; the file has 4"),
    "negative": (weight(dims=[-2, 1, 1, 1]), r"weight 'w' has the shape \[-2"),
    "huge": (weight(dims=[1 << 62, 1, 1, 1]), "which does not fit into memory"),
    "empty-and-huge": (weight(dims=[1 << 31, 1 << 40, 0]), "which no array can have"),
    "ranks": (weight(dims=[1] * 100), "weight 'w' has the shape"),
    "type": (weight(data_type=99), "weight 'w' is of the data type 99"),
    "text": (weight(data_type=TensorProto.STRING), "weight 'w' is text"),
    "texts": (texts(b"a", b"b", b"c"), r"weight 'w' is STRING\[2, 1, 1, 1\]; the file has 3 strings"),
    "outside": (external("../x"), r"location is '\.\./x'; expected a file in the model's folder"),
    "absolute": (external("/etc/passwd"), "expected a file in the model's folder"),
    "nowhere": (external(""), "expected a file in the model's folder"),
    "offset": (external("w.bin", offset="-1"), "offset is '-1'; expected a number of bytes"),
    "words": (external("w.bin", length="abc"), "length is 'abc'; expected a number of bytes"),
    "endless": (external("w.bin", offset="9" * 5000), "offset is '9999"),
    "other length": (external("w.bin", length="4"), "length is 4; FLOAT.* takes 8 bytes"),
    "missing": (external("gone.bin"), "external data file gone.bin is missing"),
    "pipe": (external("pipe"), "is a pipe"),
    "cut": (external("w.bin", offset="4"), "cut short"),
    "cycle": (edits(lambda g: g.node[0].input.__setitem__(0, "y")), "depends on its own output through other nodes"),
    "twice": (edits(lambda g: g.node.add(op_type="Relu", input=["x"], output=["c"])), "'c' is computed twice"),
    "unmade": (edits(lambda g: g.node[1].input.__setitem__(0, "q")), "node 'r' reads 'q', which nothing computes"),
    "no outputs": (edits(lambda g: g.ClearField("output")), "the graph has no outputs"),
    "output": (edits(lambda g: g.output.add(name="q")), "nothing computes the output 'q'"),
    "long name": (edits(lambda g: setattr(g.node[0], "name", "n" * 5000)), "has 5000 characters"),
    "null": (edits(lambda g: setattr(g.node[0], "name", "a\0b")), "null byte"),
    "attribute": (edits(lambda g: g.node[0].attribute.add(name="pads", type=5)), "has no value in its field 'g'"),
    "two": (
        edits(*[lambda g: g.node[0].attribute.append(helper.make_attribute("group", 1))] * 2),
        "has the attribute 'group' twice",
    ),
    "opset": (lambda net: setattr(net.opset_import[0], "version", 999), "is in opset 999"),
    "no opset": (lambda net: net.ClearField("opset_import"), "names no opset"),
    "element": (lambda net: setattr(net.graph.input[0].type.tensor_type, "elem_type", 99), "of the data type 99"),
    "counts": (
        edits(lambda g: g.node.append(helper.make_node("Split", ["c"], ["s"], name="cut", num_outputs=1 << 40))),
        "node 'cut' says num_outputs 1099511627776, but has 1 output$",
    ),
    "inputs": (
        edits(lambda g: g.node.append(helper.make_node("DequantizeLinear", ["c"], ["s"], name="scaled"))),
        "node 'scaled' has 1 of 2 inputs$",
    ),
    "empty input": (
        edits(lambda g: g.node.append(helper.make_node("Add", ["c", ""], ["s"], name="sum"))),
        "node 'sum' has 1 of 2 inputs$",
    ),
    "too many inputs": (
        edits(lambda g: g.node.append(helper.make_node("Add", ["c", "c", "c"], ["s"], name="sum"))),
        "node 'sum' has 3 inputs; expected at most 2$",
    ),
    "too many outputs": (
        edits(lambda g: g.node.append(helper.make_node("Relu", ["c"], ["s", "t"], name="relu"))),
        "node 'relu' has 2 outputs; expected at most 1$",
    ),
    "no outputs of a node": (edits(lambda g: g.node.add(op_type="F", domain="o", input=["c"])), "has no outputs$"),
    "empty output": (
        edits(lambda g: g.node.append(helper.make_node("Dropout", ["c"], ["", "mask"], name="drop"))),
        "node 'drop' has 0 of 1 outputs$",
    ),
    "flat": (weight(dims=[2]), "node 'conv': its parameter 'w' has 1 dimension; expected 3$"),
    "too short": (
        edits(
            lambda g: g.initializer.append(numpy_helper.from_array(np.zeros((2, 0), np.float32), "none")),
            lambda g: g.node.append(helper.make_node("OneHot", ["c", "none", "none"], ["s"], name="hot")),
        ),
        "node 'hot': its parameter 'none' has 0 elements; expected 1$",
    ),
    "sparse": (edits(lambda g: g.sparse_initializer.add()), "sparse weights"),
    "an argument": (
        edits(lambda g: g.node[0].attribute.add(name="group", ref_attr_name="of", type=onnx.AttributeProto.INT)),
        "attribute 'group' of node 'conv' refers to the argument 'of' of a function, but stands in none$",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_file_that_contradicts_itself_is_refused(tmp_path: Path, case: str) -> None:
    (tmp_path / "w.bin").write_bytes(np.ones(2, np.float32).tobytes())
    os.mkfifo(tmp_path / "pipe")
    net = model()
    edit, why = CASES[case]
    edit(net)
    (tmp_path / "net.onnx").write_bytes(net.SerializeToString())
    with pytest.raises(InputError, match=why):
        Graph(tmp_path / "net.onnx")


def test_names_are_utf8(tmp_path: Path) -> None:
    data = model().SerializeToString().replace(b"conv", b"\xff\xfeab")
    (tmp_path / "net.onnx").write_bytes(data)
    with pytest.raises(InputError, match=r"not UTF-8|not a complete ONNX file"):
        Graph(tmp_path / "net.onnx")


@pytest.mark.parametrize(
    ("attribute", "fine"),
    [
        (onnx.helper.make_attribute("auto_pad", b"VAL\xffID"), False),
        (onnx.helper.make_attribute("activations", [b"Tanh", b"Si\xc3("]), False),
        (onnx.helper.make_attribute("auto_pad", "VALID"), True),
    ],
)
def test_words_of_attributes_are_utf8(tmp_path: Path, attribute: onnx.AttributeProto, *, fine: bool) -> None:
    net = model()
    net.graph.node[0].attribute.append(attribute)
    (tmp_path / "net.onnx").write_bytes(net.SerializeToString())
    if fine:
        assert Graph(tmp_path / "net.onnx").nodes
        return
    with pytest.raises(InputError, match=r"net\.onnx: holds text that is not UTF-8: '(VAL|Si)"):
        Graph(tmp_path / "net.onnx")


def test_external_data_are_read_from_their_place(tmp_path: Path) -> None:
    net = model()
    (tmp_path / "w.bin").write_bytes(b"1234" + np.array([3, 4], np.float32).tobytes() + b"5678")
    external("w.bin", offset="4", length="8")(net)
    (tmp_path / "net.onnx").write_bytes(net.SerializeToString())
    assert Graph(tmp_path / "net.onnx").initializer("w").ravel().tolist() == [3.0, 4.0]


def test_a_sound_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "net.onnx").write_bytes(model().SerializeToString())
    assert [node.op for node in Graph(tmp_path / "net.onnx").nodes] == ["Conv", "Relu"]


def with_functions(path: Path, functions: dict[str, list[onnx.NodeProto]], called: str) -> Path:
    """The network with one of ``functions``, each from ``a`` to ``b``, in the place of its Relu."""
    net = model()
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("own", 1)]
    net.opset_import.append(opsets[1])
    for name, nodes in functions.items():
        net.functions.append(helper.make_function("own", name, ["a"], ["b"], nodes, opsets))
    net.graph.node[1].CopyFrom(helper.make_node(called, ["c"], ["y"], name="r", domain="own"))
    onnx.save(net, path)
    return path


def own(called: str, source: str = "a", into: str = "b") -> onnx.NodeProto:
    return helper.make_node(called, [source], [into], domain="own")


def in_a_body(node: onnx.NodeProto) -> list[onnx.NodeProto]:
    value = helper.make_tensor_value_info(node.output[0], 1, None)
    bodies = [helper.make_graph([part], "body", [], [value]) for part in (node, node)]
    constant = helper.make_node("Constant", [], ["c"], value=helper.make_tensor("c", TensorProto.BOOL, [], [True]))
    return [constant, helper.make_node("If", ["c"], ["b"], then_branch=bodies[0], else_branch=bodies[1])]


@pytest.mark.parametrize("body", [False, True])
@pytest.mark.parametrize("calls", [["f"], ["g", "f"]])
def test_functions_that_call_themselves_are_refused(tmp_path: Path, calls: list[str], body: bool) -> None:
    called = {n: in_a_body(own(c, into="t")) if body else [own(c)] for n, c in zip(["f", "g"], calls, strict=False)}
    with pytest.raises(InputError, match=r"net.onnx: .*the function '[fg]' calls itself"):
        Graph(with_functions(tmp_path / "net.onnx", called, "f"))


@pytest.mark.parametrize("body", [False, True])
def test_functions_that_are_too_much_written_out_are_refused(tmp_path: Path, body: bool) -> None:
    """Each calls the one before it twice: 25 of them are 16 million nodes."""
    functions = {"f0": [helper.make_node("Relu", ["a"], ["b"])]}
    for n in range(1, 25):
        twice = [own(f"f{n - 1}", into="m"), own(f"f{n - 1}", "m")]
        functions[f"f{n}"] = in_a_body(own(f"f{n - 1}", into="t")) if body else twice
    with pytest.raises(InputError, match=r"net.onnx: functions, expanded where they are called, become \d+ nodes"):
        Graph(with_functions(tmp_path / "net.onnx", functions, "f24"))
    assert len(Graph(with_functions(tmp_path / "some.onnx", functions, "f4")).nodes) > 1


def test_functions_that_are_too_deep_written_out_are_refused(tmp_path: Path) -> None:
    functions = {"f0": [helper.make_node("Relu", ["a"], ["b"])]}
    functions |= {f"f{n}": [own(f"f{n - 1}")] for n in range(1, 200)}
    with pytest.raises(InputError, match="become 201 levels: 100 at most"):
        Graph(with_functions(tmp_path / "net.onnx", functions, "f199"))
    some = Graph(with_functions(tmp_path / "some.onnx", functions, "f98"))
    assert [node.op for node in some.nodes] == ["Conv", "own.f98"]


def test_a_file_is_read_once_while_its_graph_is_held_and_again_when_it_was_changed(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    onnx.save(model(), path)
    graph = Graph.shared(path)
    assert Graph.shared(path) is graph
    assert str(Graph.shared(path, source="as exported")) == "as exported"
    changed = model()
    changed.graph.node[1].name = "s"  # of the same size
    status = path.stat()
    onnx.save(changed, path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert [node.name for node in Graph.shared(path).nodes] == ["conv", "s"]
    path.unlink()
    with pytest.raises(InputError, match=r"net\.onnx"):
        Graph.shared(path)
