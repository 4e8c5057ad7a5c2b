"""Inputs that are not numeric tensors (strings, sequences, optionals, maps): they run, from files and made up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper, parser
from typer.testing import CliRunner

import cp_debug
from cp_debug.bisect.engine import Options, bisect
from cp_debug.bisect.result import TestResult
from cp_debug.cli.main import app
from cp_debug.errors import InputError
from cp_debug.graph import other_inputs, tensor_ends
from cp_debug.graph.graph import Graph
from cp_debug.graph.made_up import MadeUp

BACKENDS = ["ort-none,ort-all", "ort,emu-fp16"]
X = np.random.default_rng(0).standard_normal((3, 4, 8)).astype(np.float32)


def save(path: Path, text: str) -> Path:
    onnx.save(parser.parse_model(f'<ir_version: 10, opset_import: ["" : 18, "ai.onnx.ml" : 3]>\n{text}'), path)
    return path


def compared(path: Path, backends: str, other: Path | None = None, **inputs: Any) -> TestResult:
    if inputs:
        np.savez(path.with_name("inputs.npz"), **inputs)
    options = Options(inputs=path.with_name("inputs.npz") if inputs else None)
    return bisect(str(path), backends, test_model=other, options=options).tests[0]


def labels(path: Path, last: float, name: str = "s") -> Path:
    label = f'<keys_strings=["cat", "dog"], values_floats=[1.0, {last}], default_float=0.5>'
    body = f"a = ai.onnx.ml.LabelEncoder {label} ({name}) \n b = Mul (a, x) \n y = Tanh (b)"
    return save(path, f"g (string[N] {name}, float[N] x) => (float[N] y) {{ {body} }}")


def sequences(path: Path, factor: float) -> Path:
    body = f"i = Constant <value_int=1> () \n e = SequenceAt (s, i) \n c = Constant <value_float={factor}> ()"
    signature = "(seq(float[4,8]) s) => (float[4,8] y, seq(float[4,8]) q)"
    return save(path, f"g {signature} {{ {body} \n m = Mul (e, c) \n y = Tanh (m) \n q = SequenceInsert (s, y) }}")


def optionals(path: Path, factor: float) -> Path:
    then = "then_branch = t () => (float[4,8] r) { e = OptionalGetElement (o) r = Tanh (e) }"
    other = f"else_branch = f () => (float[4,8] r) {{ k = Constant <value_float={factor}> () r = Mul (x, k) }}"
    body = f"c = OptionalHasElement (o) \n d = If (c) <{then}, {other}> \n y = Add (d, x)"
    return save(path, f"g (optional(float[4,8]) o, float[4,8] x) => (float[4,8] y) {{ {body} }}")


def maps(path: Path, factor: float, form: str = "DictVectorizer") -> Path:
    key, how = TensorProto.STRING, {"string_vocabulary": ["a", "b", "c"]}
    if form != "DictVectorizer":
        key, how = TensorProto.INT64, {"map_form": form, "max_map": 4, "cast_to": "TO_FLOAT"}  # type: ignore[dict-item]
    kind = helper.make_map_type_proto(key, helper.make_tensor_type_proto(TensorProto.FLOAT, []))
    op = "DictVectorizer" if form == "DictVectorizer" else "CastMap"
    nodes = [helper.make_node(op, ["m"], ["v"], domain="ai.onnx.ml", **how)]
    nodes += [helper.make_node("Mul", ["v", "k"], ["u"]), helper.make_node("Tanh", ["u"], ["y"])]
    out = [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)]
    weights = [numpy_helper.from_array(np.float32(factor), "k")]
    graph = helper.make_graph(nodes, "g", [helper.make_value_info("m", kind)], out, weights)
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("ai.onnx.ml", 3)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=9), path)
    return path


NETWORKS: dict[str, tuple[Any, dict[str, Any], str]] = {
    "strings": (labels, {"s": np.array(["dog", "cat", "bird"]), "x": X[0, 0, :3]}, "a"),
    "bytes": (labels, {"s": np.array([b"dog", b"cat"]), "x": X[0, 0, :2]}, "a"),
    "sequence": (sequences, {f"s[{i}]": X[i] for i in range(3)}, "m"),
    "empty optional": (optionals, {"o.given": np.array(False), "x": X[0]}, "d"),
    "map": (maps, {"m.keys": np.array(["c", "a", "z"]), "m.values": X[0, 0, :3]}, "u"),
}


@pytest.mark.few(4)
@pytest.mark.parametrize("backends", BACKENDS)
@pytest.mark.parametrize("name", NETWORKS)
def test_inputs_from_a_file_run_and_a_fault_is_found(tmp_path: Path, name: str, backends: str) -> None:
    network, inputs, guilty = NETWORKS[name]
    good, bad = network(tmp_path / "good.onnx", 2.0), network(tmp_path / "bad.onnx", 2.5)
    assert compared(good, backends, **inputs).agrees
    found = compared(good, "ort,ort-all", bad, **inputs)
    assert [row.onnx for row in found.guilty] == [guilty]
    assert found.findings[0].cause in ("attribute", "constant-differs")


@pytest.mark.parametrize("network", [labels, sequences, optionals, maps])
def test_inputs_are_made_up(tmp_path: Path, network: Any) -> None:
    test = compared(network(tmp_path / "net.onnx", 2.0), BACKENDS[0])
    assert test.agrees
    assert any("not numeric tensors" in note for note in test.notes)


def test_made_up_strings_are_those_that_the_graph_knows(tmp_path: Path) -> None:
    made_up = MadeUp(Graph(labels(tmp_path / "net.onnx", 2.0)), {"s": [64], "x": [64]})
    sample = made_up.sample(0)
    assert set(sample["s"]) == {"cat", "dog"}
    assert sample["s"].shape == (64,)
    assert np.array_equal(sample["s"], made_up.sample(0)["s"])
    assert not np.array_equal(sample["s"], made_up.sample(1)["s"])


@pytest.mark.parametrize(
    ("form", "expected"), [("DENSE", [7, 2]), ("SPARSE", [0, 7, 0, 2]), ("DictVectorizer", [0, 2, 0])]
)
def test_maps_become_the_vectors_that_onnx_runtime_makes_of_them(
    tmp_path: Path, form: str, expected: list[float]
) -> None:
    import onnxruntime

    path = maps(tmp_path / "net.onnx", 0.1, form)
    names = form == "DictVectorizer"
    given: dict[Any, float] = {"b": 2.0, "z": 7.0} if names else {3: 2.0, 1: 7.0}
    truth = onnxruntime.InferenceSession(str(path)).run(None, {"m": given})[0]
    assert np.allclose(truth, np.tanh(0.1 * np.array([expected])))
    test = cp_debug.diagnose(path, backends=BACKENDS[0], inputs={"m": given}).tests[0]
    assert test.agrees
    row = next(row for row in test.rows if row.onnx == "y")
    assert row.stats is not None
    assert np.isclose(row.stats.max_ref, np.abs(truth).max())


def test_python_objects(tmp_path: Path) -> None:
    for network, inputs in (
        (labels, {"s": ["dog", "cat"], "x": X[0, 0, :2]}),
        (sequences, {"s": [X[0], X[1]]}),
        (optionals, {"o": None, "x": X[0]}),
        (optionals, {"o": X[1], "x": X[0]}),
    ):
        path = network(tmp_path / "net.onnx", 2.0)  # type: ignore[operator]
        assert cp_debug.diagnose(path, backends=BACKENDS[0], inputs=inputs).tests[0].agrees


def test_another_file_may_call_its_inputs_otherwise(tmp_path: Path) -> None:
    good, bad = labels(tmp_path / "good.onnx", 2.0), labels(tmp_path / "bad.onnx", 2.5, "words")
    test = compared(good, "ort,ort-all", bad, s=np.array(["dog", "cat"]), x=X[0, 0, :2])
    assert [row.onnx for row in test.guilty] == ["a"]


def test_strings_that_the_file_holds_are_read(tmp_path: Path) -> None:
    path = labels(tmp_path / "net.onnx", 2.0)
    model = onnx.load(path)
    words = helper.make_tensor("words", TensorProto.STRING, [3], [b"cat", b"dog", b"bird"])
    model.graph.initializer.append(words)
    model.graph.node.insert(0, helper.make_node("Gather", ["words", "i"], ["s"]))
    model.graph.input[0].CopyFrom(helper.make_tensor_value_info("i", TensorProto.INT64, ["N"]))
    onnx.save(model, path)
    assert compared(path, BACKENDS[0], i=np.array([2, 0]), x=X[0, 0, :2]).agrees


@pytest.mark.parametrize(
    ("name", "inputs", "message"),
    [
        ("strings", {"x": X[0, 0, :2]}, "'s' is missing"),
        ("strings", {"s": X[0, 0, :2], "x": X[0, 0, :2]}, "input 's' is strings; 's' holds float32"),
        ("strings", {"s": np.array(["a"]), "x": X[0, 0, :2]}, "N is 2 here and 1 in 's'"),
        (
            "strings",
            {"s": np.array([["a"]]), "x": X[0, 0, :1]},
            r"shape \[1, 1\]; expected s: string\[N\]",
        ),
        ("sequence", {"s": X}, r"input 's' is a sequence of float; expected its elements, 's\[0\]'"),
        ("sequence", {"s[0]": X[0], "s.length": np.int64(2)}, "s.length is 2, and 1 elements are given"),
        ("sequence", {"s[0]": X[0].astype(np.float64)}, r"'s\[0\]' is float64; expected float"),
        ("sequence", {"s[0]": X[0], "s[2]": X[1]}, r"unknown input 's\[2\]'"),
        ("empty optional", {"x": X[0]}, "expected 'o.value', or 'o.given', which is false"),
        ("map", {"m.keys": np.array(["a", "a"]), "m.values": X[0, 0, :2]}, "'m.keys' holds a key twice"),
        ("map", {"m.keys": np.array(["a"]), "m.values": X[0, 0, :2]}, r"two arrays \[N\]"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_sentence(
    tmp_path: Path, name: str, inputs: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        compared(NETWORKS[name][0](tmp_path / "net.onnx", 2.0), BACKENDS[0], **inputs)


def test_sequences_and_optionals_of_test_data_sets(tmp_path: Path) -> None:
    for network, name, proto in (
        (sequences, "s", numpy_helper.from_list([X[0], X[1]], "s")),
        (optionals, "o", numpy_helper.from_optional(X[1], "o")),
    ):
        folder = tmp_path / name / "test_data_set_0"
        folder.mkdir(parents=True)
        (folder / "input_0.pb").write_bytes(proto.SerializeToString())
        (folder / "input_1.pb").write_bytes(numpy_helper.from_array(X[0], "x").SerializeToString())
        if name == "s":
            (folder / "input_1.pb").unlink()
        path = network(tmp_path / f"{name}.onnx", 2.0)
        assert bisect(str(path), BACKENDS[0], options=Options(inputs=tmp_path / name)).tests[0].agrees


@pytest.mark.parametrize(
    "command", [["check"], ["bisect", "-b", "ort,emu-fp16"], ["capture", "-b", "ort"], ["predict"]], ids=lambda c: c[0]
)
def test_messages_name_the_file_that_was_given(tmp_path: Path, command: list[str]) -> None:
    """Not the working copy that reads numbers, nor Python's types."""
    path = save(tmp_path / "net.onnx", "g (string[2] s) => (float[2] y) { y = Sinh(s) }")
    outcome = CliRunner().invoke(app, [command[0], str(path), *command[1:], *(["-o", "o"] * (command[0] == "capture"))])
    assert isinstance(outcome.exception, InputError)
    text = str(outcome.exception)
    assert str(path) in text
    assert "numbers.onnx" not in text
    assert "<class" not in text


def test_samples_of_other_structures_are_refused(tmp_path: Path) -> None:
    path = sequences(tmp_path / "net.onnx", 2.0)
    (tmp_path / "in").mkdir()
    for count in (2, 3):
        np.savez(tmp_path / "in" / f"{count}.npz", **{f"s[{i}]": X[i] for i in range(count)})  # type: ignore[arg-type]
    with pytest.raises(InputError, match="samples 0 and 1 differ in the length of 's', 2 and 3 elements"):
        bisect(str(path), BACKENDS[0], options=Options(inputs=tmp_path / "in", samples=2))


@pytest.mark.parametrize("network", [labels, sequences, optionals, maps])
def test_captures_of_two_runs_are_compared(tmp_path: Path, network: Any) -> None:
    path = network(tmp_path / "net.onnx", 2.0)
    for backend in ("ort", "emu-fp16"):
        arguments = ["capture", str(path), "-b", backend, "-o", str(tmp_path / backend)]
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, result.exception
    result = CliRunner().invoke(app, ["compare", str(tmp_path / "ort"), str(tmp_path / "emu-fp16")])
    assert result.exit_code == 0, (result.exception, result.output)


@pytest.mark.parametrize("network", [labels, maps])
@pytest.mark.parametrize("command", [["check"], ["predict"], ["search", "-b", "ort,emu-fp16", "--goal", "rel_l2<=0.1"]])
def test_commands_that_run_the_network_take_them(tmp_path: Path, command: list[str], network: Any) -> None:
    path = network(tmp_path / "net.onnx", 2.0)
    result = CliRunner().invoke(app, [command[0], str(path), *command[1:]])
    assert result.exit_code == 0, (result.exception, result.output)


def test_a_search_does_not_write_the_network_that_reads_numbers(tmp_path: Path) -> None:
    path, out = labels(tmp_path / "net.onnx", 2.0), tmp_path / "mixed.onnx"
    result = CliRunner().invoke(app, ["search", str(path), "-b", "ort,emu-fp16", "--onnx", str(out)])
    assert isinstance(result.exception, InputError)
    assert "writes no --onnx" in str(result.exception)
    assert not out.exists()


@pytest.mark.parametrize("command", [["verify"], ["bench"]])
def test_other_commands_say_that_they_take_numbers_alone(tmp_path: Path, command: list[str]) -> None:
    path = labels(tmp_path / "net.onnx", 2.0)
    result = CliRunner().invoke(app, [command[0], str(path), *command[1:]])
    assert isinstance(result.exception, InputError)
    assert "input 's' holds strings, which `bisect`, `capture`, `check`, `predict` and `search` alone can give" in str(
        result.exception
    )


def test_a_sequence_is_refused_where_only_numbers_are_taken(tmp_path: Path) -> None:
    path = sequences(tmp_path / "net.onnx", 2.0)
    result = CliRunner().invoke(app, ["quantize", "ptq", str(path), "-o", str(tmp_path / "out")])
    assert isinstance(result.exception, InputError)
    assert "input 's' holds a sequence, which" in str(result.exception)


def tensor(name: str, shape: list[int | str | None], element: int = TensorProto.FLOAT) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, element, shape)


def test_types_in_words() -> None:
    strings = helper.make_tensor_type_proto(TensorProto.STRING, None)
    floats = helper.make_tensor_type_proto(TensorProto.FLOAT16, None)
    assert other_inputs._in_words(strings) == "strings"
    assert other_inputs._in_words(floats) == "a tensor of float16"
    assert other_inputs._in_words(helper.make_sequence_type_proto(strings)) == "a sequence of strings"
    assert other_inputs._in_words(helper.make_sequence_type_proto(floats)) == "a sequence of float16"
    optional = helper.make_optional_type_proto(helper.make_sequence_type_proto(floats))
    assert other_inputs._in_words(optional) == "an optional sequence of float16"
    assert other_inputs._in_words(helper.make_map_type_proto(TensorProto.INT64, floats)) == "a map"


def test_strings_and_numbers_are_not_taken_for_one_another() -> None:
    words, numbers = np.array(["a"]), np.zeros(1, np.float32)
    other_inputs._check_type("x", words, TensorProto.STRING, "t")
    other_inputs._check_type("x", np.array([b"a"]), TensorProto.STRING, "t")
    other_inputs._check_type("x", numbers, TensorProto.FLOAT, "t")
    for array, element, says in (
        (numbers, TensorProto.STRING, "t; 'x' holds float32"),
        (words, TensorProto.FLOAT, "t; 'x' is strings; expected float"),
        (numbers, TensorProto.DOUBLE, "t; 'x' is float32; expected double"),
    ):
        with pytest.raises(InputError) as error:
            other_inputs._check_type("x", array, element, "t")
        assert str(error.value) == says
    with pytest.raises(InputError, match="elements of the type 99"):
        other_inputs._dtype(99)
    assert other_inputs._keys(np.array([3, 1])) == [3, 1]
    assert other_inputs._keys(np.array([[b"a\xff", b"b"]])) == ["a\udcff", "b"]


def test_strings_that_an_input_can_take_are_those_of_its_readers(tmp_path: Path) -> None:
    encoder = helper.make_node("LabelEncoder", ["f"], ["y"], domain="ai.onnx.ml", keys_strings=["b", "a"])
    encoder.attribute.append(helper.make_attribute("values_int64s", [1, 2]))
    reshape = [helper.make_node("Flatten", ["x"], ["f"]), helper.make_node("Identity", ["w"], ["v"])]
    reshape.append(helper.make_node("Cast", ["n"], ["m"], to=TensorProto.FLOAT))
    texts = [tensor(name, [1, 2], TensorProto.STRING) for name in "xwn"]
    graph = helper.make_graph([*reshape, encoder], "g", texts, [tensor("y", [1, 2], TensorProto.INT64)])
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("ai.onnx.ml", 2)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), tmp_path / "g.onnx")
    opened = Graph(tmp_path / "g.onnx")
    assert other_inputs._known_strings(opened, "f") == ["b", "a"]
    assert other_inputs._known_strings(opened, "x") == ["b", "a"]
    assert other_inputs._known_strings(opened, "n") == ["0", "1", "2", "10", "-3", "0.5"]
    assert "Zürich" in other_inputs._known_strings(opened, "w")


def test_a_code_of_a_string_is_exact_in_fp64_and_stays() -> None:
    assert tensor_ends._code("a") == tensor_ends._code(b"a") != tensor_ends._code("b")
    codes = [tensor_ends._code(f"label {i}") for i in range(200)]
    assert len(set(codes)) == 200
    assert 1 << 46 < max(codes) < 1 << 48
    assert all(int(float(code)) == code for code in codes)
