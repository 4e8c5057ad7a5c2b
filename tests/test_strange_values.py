"""Graphs that draw random numbers, hold strings, sequences, optionals or maps, or give a number of results that depends
on data: nothing crashes, what can be compared is, and what cannot is named."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from nets import graph_of
from onnx import TensorProto, helper, numpy_helper, parser
from typer.testing import CliRunner

from cp_debug.backends.executor import Executor
from cp_debug.bisect.engine import Options, bisect
from cp_debug.bisect.result import SHAPE, TestResult
from cp_debug.cli.main import app
from cp_debug.errors import InputError
from cp_debug.graph.graph import Graph
from cp_debug.graph.randomness import drawing, drawing_note, refuse_random

BACKENDS = ["ort,ort-all", "ort,emu-fp16"]
X = np.random.default_rng(0).standard_normal((4, 8)).astype(np.float32)


def save(path: Path, body: str, signature: str = "(float[4,8] x) => (float[N,M] y)", **weights: object) -> Path:
    header = '<ir_version: 8, opset_import: ["" : 17, "ai.onnx.ml" : 3]>'
    model = parser.parse_model(f"{header}\nnet {signature} {{ {body} }}")
    model.graph.initializer.extend(numpy_helper.from_array(np.asarray(w), n) for n, w in weights.items())
    onnx.save(model, path)
    return path


def compared(path: Path, backends: str, other: Path | None = None, **inputs: np.ndarray) -> TestResult:
    np.savez(path.with_name("inputs.npz"), **({"x": X} | inputs))  # type: ignore[arg-type]
    options = Options(inputs=path.with_name("inputs.npz"))
    return bisect(str(path), backends, test_model=other, options=options).tests[0]


@pytest.mark.parametrize("backends", BACKENDS)
@pytest.mark.parametrize(
    "body",
    [
        "n = RandomNormalLike (x) \n z = Add (x, n) \n y = Relu (z)",
        "s = Sigmoid (x) \n n = Bernoulli (s) \n y = Mul (x, n)",
        "n, mask = Dropout (x, ratio, training) \n y = Neg (n)",
    ],
)
def test_random_numbers_are_named_and_nobody_is_guilty(tmp_path: Path, body: str, backends: str) -> None:
    weights = {"ratio": np.float32(0.5), "training": np.bool_(True)} if "ratio" in body else {}
    path = save(tmp_path / "net.onnx", body, **weights)
    test = compared(path, backends)
    assert not test.guilty
    assert any("draws random numbers" in note for note in test.notes)
    assert test.remainder is None or not test.remainder.adds_up


def test_what_random_numbers_do_is_no_defect(tmp_path: Path) -> None:
    """Two runs differ, and so do runs with probes: neither memory nor a fused kernel is at fault."""
    body = "h = Tanh (x) \n n = RandomNormal <shape = [4, 8], seed = 3.0> () \n z = Add (h, n) \n y = Relu (z)"
    test = compared(save(tmp_path / "net.onnx", body), "ort,ort-all")
    assert not test.agrees
    assert not test.findings
    assert not any("observer gap" in note for note in test.notes)
    assert any("(seed 3; each runtime has its own generator" in note for note in test.notes)
    assert str(test.remainder).endswith("draws random numbers, and the outputs depend on them")


def test_multinomial_draws_from_the_distribution(tmp_path: Path) -> None:
    body = "n = Multinomial <sample_size = 64, dtype = 7> (p) \n y = Cast <to = 1> (n)"
    path = save(tmp_path / "net.onnx", body, p=np.float32([[-np.inf, 0, np.log(3), -np.inf]]))
    drawn = Executor(Graph(path)).run({"x": X})["y"].numpy()
    assert drawn.shape == (1, 64)
    assert set(np.unique(drawn)) == {1, 2}
    assert 32 < (drawn == 2).sum() < 63


def test_a_dropout_that_is_off_draws_nothing(tmp_path: Path) -> None:
    body = "n, mask = Dropout (x, ratio, training) \n y = Neg (n)"
    for training in (False, True):
        path = save(tmp_path / "net.onnx", body, ratio=np.float32(0.5), training=np.bool_(training))
        assert [n.op for n in drawing(Graph(path))] == (["Dropout"] if training else [])


@pytest.mark.parametrize("backends", BACKENDS)
def test_another_number_of_results_is_a_finding(tmp_path: Path, backends: str) -> None:
    body = "a = Add (x, c) \n b = Greater (a, z) \n i = NonZero (b) \n r = Transpose (i) \n y = GatherND (a, r)"
    signature = "(float[4,8] x) => (float[N] y)"
    good, bad = (save(tmp_path / f"{c}.onnx", body, signature, c=np.float32(c), z=np.float32(0)) for c in (0.0, 0.3))
    test = compared(good, backends, bad)
    assert [row.onnx for row in test.guilty] == ["a"]
    assert [row.onnx for row in test.rows if row.verdict == SHAPE] == ["i", "r", "y"]


def test_another_number_of_results_is_nobodys_fault_where_the_inputs_differ_by_rounding(tmp_path: Path) -> None:
    body = "a = Mul (x, c) \n b = Greater (a, z) \n i = NonZero (b) \n r = Transpose (i) \n y = GatherND (a, r)"
    path = save(tmp_path / "net.onnx", body, "(float[4,8] x) => (float[N] y)", c=np.float32(1 / 3), z=np.float32(1))
    near = np.linspace(2.99, 3.01, 32).reshape(4, 8).astype(np.float32)
    test = compared(path, "ort,emu-bf16", x=near)
    assert not test.agrees
    assert not test.guilty
    row = next(row for row in test.rows if row.onnx == "i")
    assert row.stats.shape_mismatch
    assert row.verdict == "inherited"
    assert row.why.endswith("its own inputs lead to that")
    assert all("it comes from i (NonZero)" in row.why for row in test.rows if row.onnx in ("r", "y"))


@pytest.mark.parametrize("backends", BACKENDS)
@pytest.mark.parametrize(
    "body",
    [
        "s = SplitToSequence <axis=0> (x) \n i = Constant <value_int=2> () \n e = SequenceAt (s, i) \n y = Tanh (e)",
        "o = Optional (x) \n e = OptionalGetElement (o) \n y = Tanh (e)",
    ],
)
def test_sequences_and_optionals(tmp_path: Path, body: str, backends: str) -> None:
    test = compared(save(tmp_path / "net.onnx", body), backends)
    assert test.agrees
    assert test.compared < test.total


def test_strings(tmp_path: Path) -> None:
    signature = "(float[4,8] x) => (string[N] t, float[4,8] y)"
    encode = 'ai.onnx.ml.LabelEncoder <keys_int64s = [0, 1, 2], values_strings = ["a", "b", "c"]>'
    body = f"k = ArgMax <axis=1, keepdims=0> (x) \n t = {encode} (k) \n y = Tanh (x)"
    for backends in BACKENDS:
        test = compared(save(tmp_path / "net.onnx", body, signature), backends)
        assert test.agrees
        assert [row.onnx for row in test.outputs] == ["t.codes", "y"]


@pytest.mark.parametrize("backends", BACKENDS)
def test_strings_alone_are_compared_by_equality(tmp_path: Path, backends: str) -> None:
    """Another class is inherited from what computes it; other labels are the encoder's."""
    encode = "ai.onnx.ml.LabelEncoder <keys_int64s = [0, 1], values_strings = {labels}>"
    body = f"z = Mul (x, c) \n k = ArgMax <axis=1, keepdims=0> (z) \n b = Mod (k, two) \n t = {encode} (b)"
    signature = "(float[4,8] x) => (string[N] t)"

    def network(name: str, labels: str, factor: float) -> Path:
        weights = {"c": np.float32(factor), "two": np.int64(2)}
        return save(tmp_path / name, body.replace("{labels}", labels), signature, **weights)

    good = network("good.onnx", '["odd", "even"]', 1.0)
    assert compared(good, backends).agrees
    turned = compared(good, backends, network("turned.onnx", '["odd", "even"]', -1.0))
    assert [row.onnx for row in turned.guilty] == ["z"]
    assert not turned.agrees
    labelled = compared(good, backends, network("labelled.onnx", '["even", "odd"]', 1.0))
    assert [row.onnx for row in labelled.guilty] == ["t.codes"]


def test_sequences_are_compared_element_by_element(tmp_path: Path) -> None:
    def network(name: str, factor: float, *more: str) -> Path:
        nodes = [helper.make_node("Mul", ["x", "c"], ["z"]), helper.make_node("Tanh", ["z"], ["t"])]
        nodes.append(helper.make_node("SequenceConstruct", ["x", "t", *more], ["s"]))
        kind = helper.make_sequence_type_proto(helper.make_tensor_type_proto(TensorProto.FLOAT, None))
        inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [4, 8])]
        weights = [numpy_helper.from_array(np.float32(factor), "c")]
        net = helper.make_graph(nodes, "net", inputs, [helper.make_value_info("s", kind)], weights)
        onnx.save(helper.make_model(net, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), tmp_path / name)
        return tmp_path / name

    good = network("good.onnx", 1.0)
    for backends in (*BACKENDS, "torch,ort"):
        test = compared(good, backends)
        assert test.agrees
        assert [row.onnx for row in test.outputs] == ["s.length", "s[0]", "s[1]"]
    assert [row.onnx for row in compared(good, "ort,ort-all", network("bad.onnx", 1.5)).guilty] == ["z"]
    longer = compared(good, "ort,ort-all", network("longer.onnx", 1.0, "z"))
    assert [row.onnx for row in longer.guilty] == ["s.length"]
    assert "SequenceConstruct reads x, t, z instead of x, t" in longer.findings[0].headline
    assert not any("could be tried" in note for note in longer.notes)


@pytest.mark.parametrize("more", [("t",), ("t", "x", "t")])
def test_sequences_of_other_lengths_diverge_in_their_length(tmp_path: Path, more: tuple[str, ...]) -> None:
    """Elements that only one side has are not compared, and no share of a divergence hangs on them."""

    def network(name: str, *elements: str) -> Path:
        nodes = [helper.make_node("Tanh", ["x"], ["t"]), helper.make_node("SequenceConstruct", elements, ["s"])]
        if not elements:
            nodes[1] = helper.make_node("SequenceEmpty", [], ["s"])
        kind = helper.make_sequence_type_proto(helper.make_tensor_type_proto(TensorProto.FLOAT, None))
        ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [4, 8]) for name in ("x", "t")]
        net = helper.make_graph(nodes, "net", ends[:1], [ends[1], helper.make_value_info("s", kind)])
        onnx.save(helper.make_model(net, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), tmp_path / name)
        return tmp_path / name

    pair = [network("some.onnx", *more), network("empty.onnx")]
    for reference, test in (pair, pair[::-1]):
        found = compared(reference, "ort,ort", test)
        assert [row.onnx for row in found.guilty] == ["s.length"]
        assert found.guilty[0].share == pytest.approx(1)


@pytest.mark.parametrize("backends", [*BACKENDS, "torch,ort"])
@pytest.mark.parametrize("alone", [True, False])
def test_maps(tmp_path: Path, backends: str, alone: bool) -> None:
    """A map is compared by its values and by its keys, in every arithmetic."""

    def network(name: str, factor: float, labels: list[str]) -> Path:
        nodes = [
            helper.make_node("Mul", ["x", "c"], ["z"]),
            helper.make_node("Tanh", ["z"], ["y"]),
            helper.make_node("ZipMap", ["y"], ["p"], domain="ai.onnx.ml", classlabels_strings=labels),
        ]
        floats = helper.make_tensor_type_proto(TensorProto.FLOAT, [])
        maps = helper.make_sequence_type_proto(helper.make_map_type_proto(TensorProto.STRING, floats))
        outputs = [helper.make_value_info("p", maps)]
        outputs += [] if alone else [helper.make_tensor_value_info("y", TensorProto.FLOAT, [4, 8])]
        inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [4, 8])]
        opsets = [helper.make_opsetid("", 17), helper.make_opsetid("ai.onnx.ml", 3)]
        weights = [numpy_helper.from_array(np.float32(factor), "c")]
        net = helper.make_graph(nodes, "net", inputs, outputs, weights)
        onnx.save(helper.make_model(net, opset_imports=opsets, ir_version=8), tmp_path / name)
        return tmp_path / name

    good = network("good.onnx", 1.0, [*"abcdefgh"])
    test = compared(good, backends)
    assert test.agrees
    assert [row.onnx for row in test.outputs] == ["p.values", "p.keys", *([] if alone else ["y"])]
    scaled = compared(good, backends, network("scaled.onnx", 1.5, [*"abcdefgh"]))
    assert [row.onnx for row in scaled.guilty] == ["z"]
    renamed = compared(good, backends, network("renamed.onnx", 1.0, [*"abcdefhg"]))
    assert [row.onnx for row in renamed.guilty] == ["p.keys"]


def test_random_numbers_are_told_by_the_other_commands(tmp_path: Path) -> None:
    """``check`` tells them; what would compare, search or predict says that it cannot."""
    path = str(save(tmp_path / "net.onnx", "n = RandomNormalLike (x) \n z = Add (x, n) \n y = Relu (z)"))
    checked = CliRunner().invoke(app, ["check", path, "--json"])
    assert [concern["check"] for concern in json.loads(checked.stdout)] == ["random"]
    for command in (["search", path, "-b", "ort,emu-fp16"], ["verify", path], ["predict", path]):
        refused = CliRunner().invoke(app, command)
        assert isinstance(refused.exception, InputError), command
        assert "draws random numbers" in str(refused.exception)


def test_another_number_of_results_is_told_with_both_counts(tmp_path: Path) -> None:
    body = "r = Round (x) \n f = Sub (x, r) \n g = Greater (f, t) \n z = NonZero (g) \n y = Cast <to = 1> (z)"
    path = save(tmp_path / "net.onnx", body, t=np.float32(0.1))
    x = np.full((4, 8), 0.2, np.float32)
    x[0, 0] = 1.4985
    test = compared(path, "ort,emu-bf16", x=x)
    assert not test.guilty
    (note,) = [note for note in test.notes if "NonZero" in note]
    assert "has shape [2, 31], the reference [2, 32]" in note


def tensor(name: str, shape: list[int | str | None], element: int = TensorProto.FLOAT) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, element, shape)


def test_a_node_that_draws_is_told_with_its_seed(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("RandomNormalLike", ["x"], ["a"], "drawn", seed=3.0),
        helper.make_node("RandomNormalLike", ["a"], ["y"], "again"),
    ]
    graph = graph_of(tmp_path, nodes, [tensor("x", [2])])
    told = [drawing_note(node) for node in graph.nodes]
    assert told[0].startswith("drawn (RandomNormalLike) ")
    assert ["(seed 3; each runtime" in text for text in told] == [True, False]
    with pytest.raises(InputError, match=r"drawn .* differs from run to run, and no goal can be judged"):
        refuse_random([graph], "no goal can be judged")
    refuse_random([], "nothing")
