"""Two models whose names differ: what is compared with what, and that nothing compared is never a pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
from faults.edits import Editor, scale_weights
from nets import NetBuilder, residual, second_like
from onnx import helper, numpy_helper
from typer.testing import CliRunner

from cp_debug.backends.spec import BackendSpec, parse_backends
from cp_debug.bisect.engine import Options, bisect
from cp_debug.bisect.recording import compare_captures, record
from cp_debug.bisect.result import TestResult
from cp_debug.cli.main import app
from cp_debug.errors import InputError
from cp_debug.graph import pairing
from cp_debug.graph.constants import Constants
from cp_debug.graph.graph import Graph, ValueInfo, fits_shape
from cp_debug.graph.integer_values import named_levels
from cp_debug.graph.pairing import Pairing, believable
from cp_debug.probes.capture import Capture
from cp_debug.programs.pairing_numbers import run_in_ort
from cp_debug.programs.weight_differences import weight_differences
from cp_debug.recipes.registry import load_model

Change = Callable[[onnx.GraphProto], None]


def renamed(source: Path, target: Path, *, spoil: str = "", change: Change | None = None) -> Path:
    """The model with every value, weight, node and end under a name that says nothing."""
    if spoil:
        editor = Editor(source)
        scale_weights(editor, spoil, 0.05)
        source = editor.save(target)
    model = onnx.load(str(source))
    graph, names = model.graph, dict[str, str]()
    new = lambda name: names.setdefault(name, f"v{len(names)}") if name else ""  # noqa: E731
    for value in (*graph.initializer, *graph.input, *graph.output):
        value.name = new(value.name)
    for index, node in enumerate(graph.node):
        node.input[:], node.output[:] = map(new, node.input), map(new, node.output)
        node.name = f"n{index}"
    del graph.value_info[:]
    if change is not None:
        change(graph)
    onnx.save(model, str(target))
    return target


def run(reference: Path, test: Path, **options: object) -> TestResult:
    (found,) = bisect(str(reference), "ort,ort", test_model=test, options=Options(**options)).tests  # type: ignore[arg-type]
    return found


@pytest.mark.parametrize("build", [second_like, residual])
def test_the_same_network_under_other_names_is_paired_whole(tmp_path: Path, build: Callable[[Path], Path]) -> None:
    net = build(tmp_path / "net.onnx")
    test = run(net, renamed(net, tmp_path / "other.onnx"))
    assert test.agrees
    assert test.compared == test.total
    assert len(test.outputs) == 2
    assert not test.missing_outputs
    (pairing,) = test.pairing.values()
    assert not pairing["missing"]
    assert not pairing["added"]


@pytest.mark.few(1)
@pytest.mark.parametrize("value", ["conv_0", "conv_9", "conv_25"])
def test_a_fault_does_not_hide_what_lies_behind_it(tmp_path: Path, value: str) -> None:
    net = second_like(tmp_path / "net.onnx")
    test = run(net, renamed(net, tmp_path / "other.onnx", spoil=value))
    assert [row.onnx for row in test.guilty] == [value]
    assert test.compared == test.total


def test_numbers_in_names_that_went_on_are_not_believed(tmp_path: Path) -> None:
    """In another export values without names of their own have those of their successors."""

    def numbered(source: Path, target: Path) -> Path:
        model = onnx.load(str(source))
        made = [n.output[0] for n in model.graph.node if n.op_type == "Relu"][-4:]
        new = dict(zip(made, [*made[1:], "one_more"], strict=True))
        for node in model.graph.node:
            node.input[:] = [new.get(i, i) for i in node.input]
            node.output[:] = [new.get(o, o) for o in node.output]
        del model.graph.value_info[:]
        onnx.save(model, str(target))
        return target

    net = second_like(tmp_path / "net.onnx", depth=3)
    other = numbered(net, tmp_path / "other.onnx")
    healthy = run(net, other)
    assert healthy.agrees
    assert not [row.name for row in healthy.rows if row.verdict in ("guilty", "shape")]
    assert healthy.compared == healthy.total
    editor = Editor(other)
    scale_weights(editor, "heatmap", 0.05)
    faulty = run(net, editor.save(tmp_path / "faulty.onnx"))
    assert [row.name for row in faulty.guilty] == ["node_heatmap"]
    assert faulty.findings[0].cause == "weights-scaled"


def test_nodes_put_in_behind_two_layers_in_a_row_are_two_faults(tmp_path: Path) -> None:
    net = second_like(tmp_path / "net.onnx", depth=3)
    model = onnx.load(str(net))
    first = next(node for node in model.graph.node if node.op_type == "Conv")
    second = next(node for node in model.graph.node if first.output[0] in node.input)
    model.graph.initializer.append(numpy_helper.from_array(np.float32(0.1), "off"))
    spoilt = [first.output[0], second.output[0]]
    for node, value in zip((first, second), spoilt, strict=True):
        node.output[0] = f"{value}_before"
        place = [*model.graph.node].index(node) + 1
        model.graph.node.insert(place, onnx.helper.make_node("Add", [f"{value}_before", "off"], [value]))
    onnx.save(model, tmp_path / "other.onnx")
    test = run(net, tmp_path / "other.onnx")
    assert [row.onnx for row in test.guilty] == spoilt


def test_a_name_that_has_no_neighbour_in_common_is_not_believed(tmp_path: Path) -> None:
    """One layer is written otherwise, and one node less: too few for numbers in names to have gone on everywhere."""

    def norm(path: Path, wrong: bool) -> Path:
        made = NetBuilder(3)
        x, eps = made.conv("x", 4, 16, name="conv"), made.weight(np.float32(0.1))
        mean = made.op("ReduceMean", made.op("Mul", x, x, name="square"), axes=[1], name="mean")
        if wrong:
            x = made.op("Div", x, made.op("Add", made.op("Sqrt", mean, name="sqrt"), eps, name="add"), name="div")
        else:
            root = made.op("Sqrt", made.op("Add", mean, eps, name="add"), name="sqrt")
            x = made.op("Mul", x, made.op("Reciprocal", root, name="reciprocal"), name="mul")
        scale = made.weight(np.linspace(0.5, 2, 16, dtype=np.float32)[:, None, None])
        x = made.op("Mul", x, scale, name="mul" if wrong else "mul_1")
        made.conv(made.op("Relu", x), 16, 8, name="y")
        return Path(made.save(path, {"x": (1, [1, 4, 8, 8])}, ["y"]))

    test = run(norm(tmp_path / "net.onnx", False), norm(tmp_path / "other.onnx", True))
    assert [row.onnx for row in test.guilty] == ["sqrt"]
    assert test.findings[0].says == "the order is another: Sqrt follows ReduceMean (mean) instead of Add (add)"


def test_a_name_that_only_a_reader_of_another_meaning_has_in_common_is_not_believed(tmp_path: Path) -> None:
    """Dead code is dropped after it got its numbers: ``mul_4`` and the one that reads it, ``add_2``, are others."""
    for wrong in (False, True):
        made = NetBuilder(4)
        x = made.conv("x", 8, 8, name="a")
        parts = {True: x, False: made.op("Tanh", x, name="b")}

        def mixed(low: float, first: bool, number: int, parts: dict[bool, str] = parts, made: NetBuilder = made) -> str:
            share = np.linspace(low, 0.9, 8, dtype=np.float32)[:, None, None]
            one, other = (
                made.op("Mul", parts[side], made.weight(value), name=f"mul_{2 * number + place}")
                for place, (side, value) in enumerate(((first, share), (not first, 1 - share)))
            )
            return made.op("Add", one, other, name=f"add_{number}")

        if wrong:
            gate, key = mixed(0.1, True, 1), mixed(0.3, False, 2)
        else:
            key, gate = mixed(0.3, True, 0), mixed(0.1, True, 1)
        key = made.op("Relu", made.conv(key, 8, 8, name="key"), name="relu")
        gate = made.op("Sigmoid", made.conv(gate, 8, 8, name="gate"), name="sigmoid")
        product = made.op("Mul", gate, key, name="mul_6" if wrong else "mul_4")
        made.conv(made.op("Add", x, product, name="add_3" if wrong else "add_2"), 8, 8, name="y")
        made.save(tmp_path / f"{wrong}.onnx", {"x": (1, [1, 8, 8, 8])}, ["y"])
    test = run(tmp_path / "False.onnx", tmp_path / "True.onnx")
    assert [row.onnx for row in test.guilty] == ["mul_0", "mul_1"]


@pytest.mark.parametrize(
    ("fault", "guilty"), [("axis", "centred"), ("added", "masked"), ("wire", "mixed"), ("order", "act")]
)
def test_a_value_unlike_any_other_is_paired_by_what_follows_from_it(tmp_path: Path, fault: str, guilty: str) -> None:
    """A node of other inputs has no twin: the reference's tensors are tried in its place until the numbers match."""

    def net(path: Path, wrong: str) -> Path:
        made = NetBuilder(6)
        weights = [made.weight(made.rng.standard_normal((8, 8), np.float32) / 2) for _ in range(3)]
        x = made.op("MatMul", "x", weights[0], name="a")
        mean = made.op("ReduceMean", x, axes=[2 if wrong == "axis" else 1], name="mean")
        x = made.op("Sub", x, mean, name="centred")
        scores = made.op("MatMul", x, made.op("Transpose", x, perm=[0, 2, 1]), name="scores")
        mask = made.op("Not", "mask") if wrong == "added" else "mask"
        p = made.op("Where", mask, made.weight(np.float32(-3)), scores, name="masked")
        p = made.op("Softmax", p, axis=-1, name="p")
        y = made.op("MatMul", p, made.op("MatMul", x, weights[1], name="v"), name="context")
        if wrong == "order":
            y = made.op("Add", made.op("Relu", y), x, name="act")
        else:
            y = made.op("Relu", made.op("Add", y, p if wrong == "wire" else x, name="mixed"), name="act")
        made.op("Tanh", made.op("MatMul", y, weights[2], name="o"), name="y")
        return Path(made.save(path, {"x": (1, [2, 8, 8]), "mask": (9, [2, 1, 8])}, ["y"]))

    other = renamed(net(tmp_path / "wrong.onnx", fault), tmp_path / "wrong.onnx")
    assert [row.onnx for row in run(net(tmp_path / "net.onnx", ""), other).guilty] == [guilty]


def test_a_node_that_is_left_out_gives_its_name_to_no_other(tmp_path: Path) -> None:
    """The later of two additions, which has the earlier one's name then, reads one value that this one reads, too."""
    for wrong in (False, True):
        made = NetBuilder(4)
        x = made.conv("x", 8, 8, name="a")
        branch = made.conv(x, 8, 8, name="b")
        x = branch if wrong else made.op("Add", x, branch, name="add")
        y = made.conv(made.op("Relu", x, name="relu"), 8, 8, name="c")
        made.conv(made.op("Add", x, y, name="add" if wrong else "add_1"), 8, 8, name="y")
        made.save(tmp_path / f"{wrong}.onnx", {"x": (1, [1, 8, 8, 8])}, ["y"])
    test = run(tmp_path / "False.onnx", tmp_path / "True.onnx")
    assert [finding.says for finding in test.findings] == ["Add is left out"]


def test_parts_of_one_value_are_told_apart_by_where_they_begin(tmp_path: Path) -> None:
    """Another exporter reads them in another order, and numbers them so."""
    for later in (False, True):
        made = NetBuilder(4)
        x, axis = made.conv("x", 8, 8, name="a"), made.weight(np.array([1]))
        ways = [(0, "Sigmoid", "gate"), (4, "Tanh", "state")]
        for number, (start, op, name) in enumerate(reversed(ways) if later else ways):
            ends = [made.weight(np.array([start + i])) for i in (0, 4)]
            made.op(op, made.op("Slice", x, *ends, axis, name=f"part_{number}"), name=name)
        made.op("Mul", "gate", "state", name="y")
        made.save(tmp_path / f"{later}.onnx", {"x": (1, [1, 8, 8, 8])}, ["y"])
    test = run(tmp_path / "False.onnx", tmp_path / "True.onnx")
    assert {row.verdict for row in test.rows} == {"ok"}
    assert test.compared == test.total


def test_outputs_in_another_order_are_paired_by_what_they_hold(tmp_path: Path) -> None:
    net = NetBuilder()
    for name in ("a", "b"):
        net.conv("x", 4, 4, name=name)
    path = net.save(tmp_path / "net.onnx", {"x": (1, [1, 4, 8, 8])}, ["a", "b"])

    def reverse(graph: onnx.GraphProto) -> None:
        outputs = list(reversed(graph.output))
        del graph.output[:]
        graph.output.extend(outputs)

    assert run(path, renamed(path, tmp_path / "other.onnx", change=reverse)).agrees


def test_a_model_that_gives_zeros_under_another_name_diverges(tmp_path: Path) -> None:
    path = NetBuilder()
    path.conv("x", 4, 4, name="y")
    net = path.save(tmp_path / "net.onnx", {"x": (1, [1, 4, 8, 8])}, ["y"])
    zeros = helper.make_graph(
        [helper.make_node("Mul", ["x", "zero"], ["nothing"])],
        "zeros",
        [helper.make_tensor_value_info("x", 1, [1, 4, 8, 8])],
        [helper.make_tensor_value_info("nothing", 1, [1, 4, 8, 8])],
        [numpy_helper.from_array(np.zeros((), np.float32), "zero")],
    )
    model = helper.make_model(zeros, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(model, str(tmp_path / "zeros.onnx"))
    test = run(net, tmp_path / "zeros.onnx")
    assert not test.agrees
    assert len(test.outputs) == 1


def test_text_inside_the_test_model_has_no_numbers_to_be_paired_by(tmp_path: Path) -> None:
    net = NetBuilder()
    net.op("Relu", net.conv("x", 3, 4), name="y")
    reference = net.save(tmp_path / "net.onnx", {"x": (1, [1, 3, 4, 4])}, ["y"])
    net.op("Cast", net.op("Cast", "x", name="text", to=8), name="back", to=1)
    net.nodes[-3].output[0] = net.nodes[-3].name = "kept"
    net.op("Add", net.op("ReduceMax", "back", keepdims=0), net.weight(np.zeros(1, np.float32)))
    net.op("Mul", "kept", net.weight(np.ones(1, np.float32)), name="y")
    test = run(reference, net.save(tmp_path / "other.onnx", {"x": (1, [1, 3, 4, 4])}, ["y"]))
    assert [row.onnx for row in test.outputs] == ["y"]


def other_shape(tmp_path: Path) -> tuple[Path, Path]:
    made = []
    for name, channels in (("y", 4), ("z", 3)):
        net = NetBuilder()
        net.conv("x", 4, channels, name=name)
        made.append(net.save(tmp_path / f"{name}.onnx", {"x": (1, [1, 4, 8, 8])}, [name]))
    return made[0], made[1]


def test_no_output_compared_is_bad_usage(tmp_path: Path) -> None:
    reference, test = other_shape(tmp_path)
    with pytest.raises(InputError, match=r"no output was compared: the reference has y, .* has z"):
        run(reference, test)
    assert run(reference, test, maps=["y=z"]).outputs[0].verdict == "shape"


def test_a_wrong_map_names_the_nearest(tmp_path: Path) -> None:
    reference, test = other_shape(tmp_path)
    with pytest.raises(InputError, match=r"the reference has no value 'yy'; did you mean y"):
        run(reference, test, maps=["yy=z"])
    with pytest.raises(InputError, match=r"the test has no value 'zz'; did you mean z"):
        run(reference, test, maps=["y=zz"])
    with pytest.raises(InputError, match="expected REFERENCE=TEST"):
        run(reference, test, maps=["y"])
    with pytest.raises(InputError, match="give another with --test-model"):
        bisect(str(reference), "ort,ort-basic", options=Options(maps=["y=y"]))


def test_a_map_pairs_inputs_with_inputs_and_computed_values_with_such(tmp_path: Path) -> None:
    net, other = two_matmuls(tmp_path)
    with pytest.raises(InputError, match="'x=h' pairs an input of the reference with a value that the test computes"):
        run(net, other, maps=["x=h"])
    with pytest.raises(InputError, match="'h=x' pairs an input of the test with a value that the reference computes"):
        run(net, other, maps=["h=x"])


def test_a_map_that_leaves_an_output_without_its_partner_is_a_comparison(tmp_path: Path) -> None:
    """``a`` of the test stands for ``h``, and nothing for ``a``: the other output is compared, and shares are of it."""
    net, other = two_matmuls(tmp_path)
    found = run(net, other, maps=["h=a"])
    assert found.missing_outputs == ["a"]
    assert [row.onnx for row in found.outputs] == ["b"]
    assert found.guilty


def two_matmuls(folder: Path) -> list[Path]:
    """Two files: ``h`` = x·w, ``a`` = Relu(h), ``b`` = a·v, with ``a`` and ``b`` as outputs; the weights differ."""
    files = []
    for name, seed in (("net.onnx", 0), ("other.onnx", 1)):
        net = NetBuilder(seed)
        w, v = (net.weight(net.rng.standard_normal((8, 8)).astype(np.float32)) for _ in range(2))
        net.op("MatMul", net.op("Relu", net.op("MatMul", "x", w, name="h"), name="a"), v, name="b")
        files.append(net.save(folder / name, {"x": (1, [2, 8])}, ["a", "b"]))
    return files


def test_the_verdict_says_what_was_compared(tmp_path: Path) -> None:
    net = second_like(tmp_path / "net.onnx")
    done = CliRunner().invoke(app, ["bisect", str(net), "-b", "ort,emu-fp32"], env={"COLUMNS": "300"})
    assert "2 of 2 outputs, 37 of 37 values" in " ".join(done.output.split())

    def drop(graph: onnx.GraphProto) -> None:
        del graph.output[1]

    other = renamed(net, tmp_path / "other.onnx", change=drop)
    done = CliRunner().invoke(
        app, ["bisect", str(net), "--test-model", str(other), "-b", "ort"], env={"COLUMNS": "300"}
    )
    assert "1 of 2 outputs" in done.output
    assert "without reg" in done.output


def test_one_backend_twice_needs_a_difference() -> None:
    assert [str(s) for s in parse_backends("ort,ort", test="a/new.onnx")] == ["ort", "ort (new.onnx)"]
    for text in ("ort (new.onnx)", "ort@cuda:1 (a (2).onnx)", "emu-fp8:block.test"):  # the last of earlier versions
        assert str(BackendSpec.parse(text)) == text
    assert [str(s) for s in parse_backends("ort", test="new")] == ["ort", "ort (new)"]
    with pytest.raises(InputError, match="names a backend twice; both would run the same"):
        parse_backends("ort,ort")
    with pytest.raises(InputError, match="names a backend twice"):
        parse_backends("ort,ort-all,ort-all", test="new")


@pytest.mark.parametrize("clear", [True, False])
def test_a_test_may_lack_an_input_that_its_exporter_dropped(tmp_path: Path, clear: bool) -> None:
    """Where another input may be meant, ``--map`` says it."""
    ours, theirs = NetBuilder(), NetBuilder()
    ours.op("Mul", ours.op("Relu", "x", name="r"), "gain", name="y")
    theirs.op("Relu", "input.1", name="y")
    shape = [1, 8] if clear else [2, 8]
    reference = ours.save(tmp_path / "ours.onnx", {"x": (1, [2, 8]), "gain": (1, shape)}, ["y"])
    test = theirs.save(tmp_path / "theirs.onnx", {"input.1": (1, [2, 8])}, ["y"])
    if not clear:
        with pytest.raises(InputError, match="--map REFERENCE=TEST pairs two of them"):
            run(reference, test)
    maps = [] if clear else ["x=input.1"]
    result = bisect(str(reference), "ort,ort", test_model=test, options=Options(maps=maps))
    assert "the test does not read gain" in result.tests[0].notes
    (row,) = [row for row in result.tests[0].rows if row.onnx == "y"]
    assert (row.verdict, row.replay is not None and row.replay.skipped) == ("guilty", None)
    with pytest.raises(InputError, match=r"the reference takes input.1: float32.2, 8.$"):
        run(test, reference)


def captured(path: Path, folder: Path) -> Capture:
    return record(
        load_model(str(path)),
        "ort",
        folder,
        inputs=None,
        samples=1,
        seed=0,
        exporter=None,
        folded=True,
        on_step=lambda text, done, total: None,
    )


def test_captures_of_files_with_other_stems_and_names(tmp_path: Path) -> None:
    net = second_like(tmp_path / "net.onnx")
    copy = tmp_path / "copy.onnx"
    copy.write_bytes(net.read_bytes())
    ours = captured(net, tmp_path / "ours")
    same = compare_captures(ours, captured(copy, tmp_path / "copy")).tests[0]
    assert same.agrees
    assert same.compared == 37
    theirs = captured(renamed(net, tmp_path / "other.onnx"), tmp_path / "theirs")
    with pytest.raises(InputError, match="the model differs"):
        compare_captures(ours, theirs)
    other = compare_captures(ours, theirs, force=True).tests[0]
    assert other.agrees
    assert other.compared == 37
    with pytest.raises(InputError, match="did you mean heatmap"):
        compare_captures(ours, theirs, force=True, maps=["heatmat=v1"])


@pytest.mark.parametrize(
    ("weights", "believed"),
    [
        ((0, 1, 2, 3, 4, 5), True),
        ((10, 11, 12, 13, 14, 15), True),  # trained again: nothing says that the names are others
        ((1, 0, 2, 3, 4, 5), True),  # two layers with each other's weights: a fault
        ((9, 0, 1, 2, 3, 4), False),  # one layer more at the front, and every name moved on
        ((5, 0, 1, 2, 3, 4), False),
    ],
)
def test_names_whose_weights_moved_on_are_not_believed(tmp_path: Path, weights: Sequence[int], believed: bool) -> None:
    """Six products in a row, called m0 to m5 in both graphs; ``weights`` are the seeds of the test's."""

    def row(name: str, seeds: Sequence[int]) -> Graph:
        net, value = NetBuilder(), "x"
        for i, seed in enumerate(seeds):
            weight = np.random.default_rng(seed).standard_normal((8, 8)).astype(np.float32)
            value = net.op("MatMul", value, net.weight(weight), name=f"m{i}")
        return Graph(net.save(tmp_path / f"{name}.onnx", {"x": (1, [1, 8])}, [value]))

    assert believable(row("reference", range(6)), row("test", weights)) == believed


def test_branches_alike_are_paired_by_what_a_quantizer_calls_their_levels(tmp_path: Path) -> None:
    from onnx import parser

    head = '<ir_version: 9, opset_import: ["" : 17]>\n'
    body = (
        "c = Conv <kernel_shape=[1,1]> (x, w) \n d = Conv <kernel_shape=[1,1]> (x, v) \n r = Relu (d) \n y = Add (c, r)"
    )
    sizes = "float[2,2,1,1] w, float[2,2,1,1] v"
    floats = f"g (float[1,2,4,4] x, {sizes}) => (float[1,2,4,4] y) {{ {body} }}"
    arguments = "(q, s, z, {0}, s, z, s, z)"
    levels = [f"{out} = QLinearConv {arguments.format(w)}" for out, w in (("c_quantized", "w"), ("r_quantized", "v"))]
    signature = f"(uint8[1,2,4,4] q, float s, uint8 z, {sizes.replace('float', 'uint8')}) => (uint8[N] y_quantized)"
    quantized = f"g {signature} {{ {' '.join(levels)} \n y_quantized = Add (c_quantized, r_quantized) }}"
    graphs = []
    for name, text in (("plain", floats), ("quantized", quantized)):
        onnx.save(parser.parse_model(head + text), tmp_path / f"{name}.onnx")
        graphs.append(Graph(tmp_path / f"{name}.onnx"))
    assert named_levels(*graphs) == {"c_quantized": "c", "r_quantized": "r"}
    assert named_levels(graphs[0], graphs[0]) == {}


def test_a_pairing_is_written_without_the_names_of_all_values() -> None:
    written = Pairing({"a": "b"}, {"x": "x1"}, {"y": "y1"}, missing=["c"]).to_dict()
    assert "names" not in written
    assert (written["inputs"], written["outputs"], written["missing"]) == ({"x": "x1"}, {"y": "y1"}, ["c"])


FOCUS = """<ir_version: 8, opset_import: ["": 13]>
net (float[1,3,8,8] x) => (float[1,4,4,4] y)
  <int64[1] zero = {0}, int64[1] one = {1}, int64[1] two = {2}, int64[1] rows = {2}, int64[1] cols = {3},
   int64[1] big = {999}> {
  r0 = Slice (x, zero, big, rows, two)
  phase0 = Slice (r0, zero, big, cols, two)
  r1 = Slice (x, one, big, rows, two)
  phase1 = Slice (r1, zero, big, cols, two)
  focus = Concat <axis = 1> (phase0, phase1)
  c = Conv (focus, w)
  y = Relu (c)
}"""  # fmt: skip
MERGED = """<ir_version: 8, opset_import: ["": 13]>
net (float[1,3,8,8] x) => (float[1,4,4,4] y)
  <int64[2] zero = {0, 0}, int64[2] one = {0, 1}, int64[2] two = {2, 2}, int64[2] axes = {2, 3},
   int64[2] big = {999, 999}> {
  phase0 = Slice (x, zero, big, axes, two)
  phase1 = Slice (x, one, big, axes, two)
  focus = Concat <axis = 1> (phase0, phase1)
  c = Conv (focus, w)
  y = Relu (c)
}"""  # fmt: skip


def test_merged_nodes_that_kept_the_last_name_are_judged_by_themselves(tmp_path: Path) -> None:
    """Two Slices became one, whose starts are (0, 1) for (1, 0): that Slice is guilty, not the Conv behind it."""
    weight = numpy_helper.from_array(np.random.default_rng(0).standard_normal((4, 6, 1, 1)).astype(np.float32), "w")
    files = []
    for name, text in (("focus", FOCUS), ("merged", MERGED)):
        model = onnx.parser.parse_model(text)
        for node in model.graph.node:
            node.name = node.output[0]
        model.graph.initializer.append(weight)
        files.append(tmp_path / f"{name}.onnx")
        onnx.save(model, files[-1])
    (test,) = bisect(str(files[0]), "ort,ort", test_model=files[1], options=Options()).tests
    assert [row.name for row in test.rows if row.verdict == "guilty"] == ["phase1"]


@pytest.mark.parametrize(
    ("actual", "declared", "fits"),
    [
        ((2, 3), (2, 3), True),
        ((2, 3), ("n", None), True),
        ((2, 3), ("n", 4), False),
        ((2, 3), (3, 3), False),
        ((2,), (2, 3), False),
        ((2, 3), (2,), False),
        ((2, 3), None, True),
        ((), (), True),
    ],
)
def test_shapes_fit_where_fixed_sizes_are_equal(actual: tuple[int, ...], declared: tuple[int, ...], fits: bool) -> None:
    assert fits_shape(actual, declared) is fits


def info(shape: tuple[int | str, ...] | None, dtype: object) -> ValueInfo:
    return ValueInfo("x", None if dtype is None else np.dtype(dtype), shape)  # type: ignore[call-overload]


@pytest.mark.parametrize(
    ("ours", "theirs", "alike"),
    [
        (info((2, 3), "f4"), info((2, 3), "f2"), True),
        (info((2, 3), "f4"), info((2, 3), ml_dtypes.bfloat16), True),
        (info((2, 3), "f4"), info((2, 3), "i8"), False),
        (info((2, 3), "f4"), info((2, 3), None), True),
        (info((2, 3), "f4"), info((2, 4), "f4"), False),
        (info((2, 3), "f4"), info((2, "n"), "f4"), True),
        (info((2, 3), "f4"), info((2, 3, 1), "f4"), False),
        (info((2, 3), "f4"), info(None, "f4"), True),
    ],
)
def test_inputs_that_may_be_the_same_one(ours: ValueInfo, theirs: ValueInfo, alike: bool) -> None:
    assert pairing._alike(ours, theirs) is alike
    assert pairing._alike(theirs, ours) is alike


def test_values_that_are_told_alike_are_equal_and_may_be_kept_in_sets() -> None:
    """Their ONNX types, which nobody can hash, only say how to read them."""
    kinds = [onnx.TypeProto(sequence_type=onnx.TypeProto.Sequence()), onnx.TypeProto()]
    assert len({ValueInfo("x", None, None, "a sequence", kind) for kind in kinds}) == 1


def test_what_is_known_to_onnx_runtime_alone_is_computed_by_it(tmp_path: Path) -> None:
    net = NetBuilder()
    net.op("Sub", "x", net.weight(np.float32([1, 2]), name="w"), name="y")
    graph = Graph(net.save(tmp_path / "n.onnx", {"x": (1, [2])}, ["y"]))
    (node,) = graph.nodes
    given = {"x": torch.tensor([5.0, 5.0])}
    found = run_in_ort(graph, Constants(graph), node, given, ["y"])
    assert found["y"].tolist() == [4, 3]
    assert run_in_ort(graph, Constants(graph), node, {"x": torch.zeros(3)}, ["y"]) == {}


def test_weights_are_read_once_for_their_digests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net = NetBuilder()
    net.op("Conv", "x", net.weight(np.ones((4, 3, 3, 3), np.float32), "w"), name="y")
    net.op("Conv", "y", net.weight(np.full((4, 4, 3, 3), 2, np.float32), "v"), name="z")
    ours, theirs = (Graph(net.save(tmp_path / name, {"x": (1, [1, 3, 8, 8])}, ["z"])) for name in ("a.onnx", "b.onnx"))
    read: list[tuple[int, str]] = []
    initializer = Graph.initializer
    monkeypatch.setattr(Graph, "initializer", lambda g, n: read.append((id(g), n)) or initializer(g, n))
    assert believable(ours, theirs)
    assert weight_differences(ours, theirs).compared == 2
    assert weight_differences(ours, theirs).compared == 2
    assert sorted(read) == sorted({(id(graph), name) for graph in (ours, theirs) for name in ("w", "v")})


def test_an_output_is_paired_with_the_output_though_a_value_inside_equals_it(tmp_path: Path) -> None:
    """An exporter wrote Softplus for small numbers as one branch of a Where, whose result it is everywhere."""
    ours, theirs = NetBuilder(0), NetBuilder(0)
    for net, product, end in ((ours, "product", "branch"), (theirs, "3", "4")):
        weight = net.weight(net.rng.standard_normal((8, 8)).astype(np.float32))
        net.op("Softplus", net.op("MatMul", "x", weight, name=product), name=end)
    large = ours.op("Greater", "product", ours.weight(np.float32(1e6)))
    ours.op("Where", large, "product", "branch", name="output")
    paths = [
        net.save(tmp_path / f"{end}.onnx", {"x": (1, [4, 8])}, [end]) for net, end in ((ours, "output"), (theirs, "4"))
    ]
    test = run(*paths)
    assert test.agrees
    assert not test.missing_outputs
