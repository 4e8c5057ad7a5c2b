"""OpenVINO as a backend: values inside, fused layers, types, refusals, versions."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from extras import needs
from nets import graph_of
from onnx import TensorProto, helper
from stress import OUTPUTS, make_stress
from test_cli import run as command

from cp_debug.api.diagnose import diagnose
from cp_debug.backends.base import Program
from cp_debug.backends.capabilities import integer_kernels_of, kernels_of
from cp_debug.backends.openvino_backend import KNOBS, OpenVinoBackend, OpenVinoSession
from cp_debug.backends.registry import check_installed, create
from cp_debug.backends.spec import BackendSpec
from cp_debug.bisect.engine import Options, bisect
from cp_debug.errors import BackendUnavailable, InputError, MissingPackage
from cp_debug.graph.graph import Graph
from cp_debug.programs.export import export
from cp_debug.programs.openvino_ir import ir_program
from cp_debug.recipes.onnx_file import OnnxFileModel
from cp_debug.recipes.torch_callable import TorchModel
from cp_debug.reports.tables import render_optimizer_blame

pytestmark = needs("openvino")
SPEC = BackendSpec("openvino")
node = helper.make_node


@pytest.fixture(scope="module")
def stress(tmp_path_factory: pytest.TempPathFactory) -> Program:
    module, image = make_stress()
    path = tmp_path_factory.mktemp("net") / "net.onnx"
    graph = Graph(export(module, (image,), path, input_names=["x"], output_names=OUTPUTS))
    return Program("net", graph, example={"x": image.numpy()})


def values_of(backend: Any, program: Program, inputs: Any = None) -> tuple[dict[str, Any], dict[str, Any], Any]:
    session = backend.open(program)
    values: dict[str, Any] = {}
    given = program.example if inputs is None else inputs
    outputs = session.run(given, lambda name, tensor: values.update({name: np.array(tensor)}))
    return outputs, values, session


def test_values_have_the_names_and_numbers_of_the_graph(stress: Program) -> None:
    exact, expected, _ = values_of(create(BackendSpec("ort")), stress)
    outputs, values, session = values_of(create(SPEC), stress)
    assert list(outputs) == list(exact) == OUTPUTS
    assert len(values) > 40
    assert set(values) == set(session.exposed) <= set(expected)
    for name, tensor in values.items():
        np.testing.assert_allclose(tensor, expected[name], rtol=1e-4, atol=1e-5, err_msg=name)
    assert stress.example is not None
    plain = session.run(stress.example)
    for name in OUTPUTS:
        np.testing.assert_allclose(plain[name], outputs[name], rtol=1e-5, atol=1e-6)
    assert list(session.run(stress.example, values.pop, probes=())) == OUTPUTS


def test_settings_are_those_that_were_set(stress: Program) -> None:
    settings = create(SPEC, threads=1).open(stress).settings
    assert settings["execution_mode_hint"].endswith("ACCURACY")
    assert "float32" in settings["inference_precision_hint"]
    assert settings["inference_num_threads"] == "1"


def test_another_number_of_threads_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cp_debug.backends.openvino_backend.processors", lambda: 4)
    backend = create(SPEC)
    assert isinstance(backend, OpenVinoBackend)
    assert [backend.with_threads(n).threads for n in (None, 2, 5)] == [4, 2, 3]


class FaultyCore:
    """OpenVINO with a fault between ``before`` and its reader, in programs that do not put ``before`` out."""

    def __init__(self, core: Any, before: str) -> None:
        self._core, self._before, self.compiled = core, before, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._core, name)

    def compile_model(self, model: Any, *args: Any) -> Any:
        from openvino import opset13

        self.compiled += 1
        if not any(self._before in output.get_names() for output in model.outputs):
            model = model.clone()
            (value,) = (o for op in model.get_ops() for o in op.outputs() if self._before in o.get_names())
            readers = list(value.get_target_inputs())
            wrong = opset13.multiply(value, np.float32(1.01))
            for reader in readers:
                reader.replace_source_output(wrong.output(0))
        return self._core.compile_model(model, *args)


def chain(folder: Path) -> Graph:
    """Three convolutions with activations, of which OpenVINO makes three layers."""
    rng, nodes, last = np.random.default_rng(0), [], "x"
    weights = {}
    for i, act in enumerate(("Relu", "Sigmoid", "Tanh")):
        weights[f"w{i}"] = rng.standard_normal((4, 4, 3, 3)).astype(np.float32) / 6
        nodes += [node("Conv", [last, f"w{i}"], [f"c{i}"], f"conv{i}", pads=[1] * 4), node(act, [f"c{i}"], [f"a{i}"])]
        last = f"a{i}"
    return graph_of(folder, nodes, {"x": [1, 4, 8, 8]}, weights)


def test_a_fault_that_looking_mends_is_a_fused_layer_with_its_kernel(tmp_path: Path) -> None:
    graph = chain(tmp_path)
    backend = create(SPEC)
    assert isinstance(backend, OpenVinoBackend)
    core = backend.core = FaultyCore(backend.core, "c1")  # type: ignore[assignment]
    (test,) = bisect(OnnxFileModel(graph.path), [create(BackendSpec("ort")), backend]).tests
    (guilty,) = test.guilty
    assert guilty.onnx == "a1"
    assert guilty.replay is not None
    assert [name.partition("_")[0] for name in guilty.replay.nodes] == ["conv1", "Sigmoid"]
    assert guilty.tactic.startswith("Convolution")
    assert test.compared == 6, "all but the value inside"
    assert core.compiled < 20


class FaultyKnob(FaultyCore):
    """A core that is faulty unless one property is disabled, and takes no property of ``unknown``."""

    def __init__(self, core: Any, before: str, knob: str, unknown: Sequence[str] = ()) -> None:
        super().__init__(core, before)
        self._knob, self._unknown = knob, unknown

    def compile_model(self, model: Any, device: str, properties: dict[str, Any]) -> Any:
        if refused := [name for name in self._unknown if name in properties]:
            raise RuntimeError(f"Unsupported property {refused[0]}")
        named = any(self._before in out.get_names() for op in model.get_ops() for out in op.outputs())
        healthy = not named or properties.get(self._knob, "") == KNOBS.get(self._knob)
        return (self._core if healthy else super()).compile_model(model, device, properties)


def elementwise(folder: Path) -> Graph:
    """A convolution, and elementwise operators of which OpenVINO makes one kernel."""
    weights = {"w": np.random.default_rng(0).standard_normal((4, 4, 1, 1)).astype(np.float32)}
    nodes = [node("Conv", ["x", "w"], ["c"], "conv"), node("Exp", ["c"], ["e"], "exp")]
    nodes += [node("Tanh", ["e"], ["t"], "tanh"), node("Add", ["t", "c"], ["y"], "add")]
    return graph_of(folder, nodes, {"x": [1, 4, 8, 8]}, weights)


def test_knobs_name_the_property_at_fault_and_the_nodes_that_it_rewrites(tmp_path: Path) -> None:
    backend = create(SPEC)
    backend.core = FaultyKnob(backend.core, "e", "SNIPPETS_MODE", ["KV_CACHE_PRECISION"])  # type: ignore[attr-defined]
    model = OnnxFileModel(elementwise(tmp_path).path)
    (test,) = bisect(model, [create(BackendSpec("ort")), backend], options=Options(optimizer_blame=True)).tests
    found = test.optimizer_blame
    assert found is not None
    (culprit,) = found.responsible
    assert (culprit.optimizer, found.active) == ("SNIPPETS_MODE", ["SNIPPETS_MODE"])
    assert culprit.rewrites[0].operators[0].startswith("Subgraph")
    assert set(culprit.rewrites[0].original) == {"exp", "tanh", "add"}
    assert found.difference_with > 1e-3
    assert found.difference_without == 0
    assert found.fix == 'core.compile_model(model, "CPU", {"SNIPPETS_MODE": "DISABLE"})'
    told = "".join(str(line) for line in render_optimizer_blame(found))
    assert "level" not in told, "there is only one"


def test_a_fault_that_no_property_disables_is_no_property_s(tmp_path: Path) -> None:
    backend = create(SPEC)
    backend.core = FaultyKnob(backend.core, "e", "none of them")  # type: ignore[attr-defined]
    model = OnnxFileModel(elementwise(tmp_path).path)
    (test,) = bisect(model, [create(BackendSpec("ort")), backend], options=Options(optimizer_blame=True)).tests
    assert not test.agrees
    assert test.optimizer_blame is not None
    assert test.optimizer_blame.responsible == []


def test_healthy_values_inside_fused_layers_are_shown(tmp_path: Path) -> None:
    (test,) = bisect(OnnxFileModel(chain(tmp_path).path), "ort,openvino").tests
    assert (test.agrees, test.compared) == (True, 7)
    session = create(SPEC).open(Program("g", Graph(tmp_path / "g.onnx")))
    assert set(kernels_of(session)) == {"c0", "a0", "c1", "a1", "c2", "a2"}
    assert all(kernel.startswith("Convolution:") for kernel in kernels_of(session).values())


def test_a_torch_module_by_its_export() -> None:
    module, image = make_stress()
    (test,) = bisect(TorchModel("stress", module, image), "torch,openvino").tests
    assert test.agrees
    assert test.compared > 40


def typed(folder: Path) -> Program:
    info = helper.make_tensor_value_info
    nodes = [
        node("Identity", ["x"], ["i"]),
        node("Exp", ["i"], ["e"]),
        node("Cast", ["e"], ["b"], to=TensorProto.BFLOAT16),
        node("Greater", ["e", "x"], ["g"]),
        node("Shape", ["x"], ["s"]),
    ]
    kinds = {"b": TensorProto.BFLOAT16, "g": TensorProto.BOOL, "s": TensorProto.INT64, "x": TensorProto.FLOAT}
    outputs = [info(name, kind, None) for name, kind in kinds.items()]
    inputs = [info("x", TensorProto.FLOAT, ["n"]), info("unused", TensorProto.FLOAT, [2])]
    graph = helper.make_graph(nodes, "g", inputs, outputs)
    path = folder / "typed.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return Program("typed", Graph(path))


def test_outputs_have_the_declared_types_and_any_length(tmp_path: Path) -> None:
    program, session = typed(tmp_path), None
    for length in (3, 5):
        inputs = {"x": np.linspace(0.1, 1, length, dtype=np.float32), "unused": np.zeros(2, np.float32)}
        session = session or create(SPEC).open(program)
        values: dict[str, Any] = {}
        outputs = session.run(inputs, lambda name, tensor, v=values: v.update({name: tensor}))  # type: ignore[misc]
        assert [str(outputs[name].dtype) for name in "bgsx"] == ["bfloat16", "bool", "int64", "float32"]
        assert outputs["s"].tolist() == [length]
        np.testing.assert_array_equal(outputs["x"], inputs["x"])
        np.testing.assert_allclose(outputs["b"].astype(np.float32), np.exp(inputs["x"]), rtol=1e-2)
        np.testing.assert_allclose(values["e"], np.exp(inputs["x"]), rtol=1e-5)
        np.testing.assert_array_equal(values["i"], inputs["x"])


def test_what_openvino_refuses_is_told_in_its_words(tmp_path: Path) -> None:
    graph = graph_of(tmp_path, [node("Relu", ["x"], ["r"]), node("BiasGelu", ["r"], ["y"], domain="ours")], {"x": [2]})
    graph.proto.opset_import.append(helper.make_opsetid("ours", 1))
    onnx.save(graph.proto, graph.path)
    with pytest.raises(InputError) as refused:
        create(SPEC).open(Program("g", Graph(graph.path)))
    says = str(refused.value)
    assert "g.onnx: OpenVINO cannot read it: Model wasn't fully converted." in says
    assert says.endswith("No conversion rule found for operations: ours.BiasGelu")
    assert "src/" not in says


def test_a_run_that_fails_is_told(tmp_path: Path) -> None:
    nodes = [node("MatMul", ["x", "y"], ["z"])]
    program = Program("g", graph_of(tmp_path, nodes, {"x": [None, 2], "y": [None, 3]}))
    inputs = {"x": np.zeros((1, 2), np.float32), "y": np.zeros((4, 3), np.float32)}
    with pytest.raises(InputError, match=r"g\.onnx: OpenVINO failed: .*[Mm]at"):
        create(SPEC).open(program).run(inputs)


@pytest.mark.parametrize("name", ["fp16", "bf16"])
def test_a_type_that_the_processor_lacks_is_no_backend(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("openvino.Core", lambda: Capable("FP32", "INT8"))
    with pytest.raises(BackendUnavailable, match=f"nothing in {name.upper()} on this processor, only FP32, INT8") as no:
        create(BackendSpec(f"openvino-{name}"))
    assert no.value.exit_code == 3
    assert f"emu-{name}" in str(no.value)


class Capable:
    def __init__(self, *types: str) -> None:
        self._types = types

    def get_property(self, device: str, name: str) -> Sequence[str]:
        return self._types


def test_versions_and_devices_that_do_not_do(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BackendUnavailable, match="on the CPU here, not on cuda:0"):
        create(BackendSpec("openvino", "cuda:0"))
    monkeypatch.setattr("openvino.__version__", "2023.3.0-13775-ceeafaf64f3")
    with pytest.raises(BackendUnavailable, match=r"2023\.3\.0-13775-ceeafaf64f3 is too old; expected 2024\.0"):
        create(SPEC)


def test_without_the_package_one_sentence_tells_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "openvino", None)
    with pytest.raises(MissingPackage, match=r"pip install '\.\[openvino\]'") as missing:
        create(SPEC)
    assert missing.value.exit_code == 3
    found: Callable[[str], Any] = importlib.util.find_spec
    monkeypatch.setattr("cp_debug.optional.find_spec", lambda name: None if name == "openvino" else found(name))
    with pytest.raises(MissingPackage, match=r"pip install '\.\[openvino\]'"):
        check_installed([SPEC])


def test_sessions_are_of_the_protocol(stress: Program) -> None:
    session = create(SPEC).open(stress)
    assert isinstance(session, OpenVinoSession)
    session.close()


def ir_of(graph: Graph, path: Path, **options: bool) -> Path:
    import openvino

    openvino.save_model(openvino.Core().read_model(str(graph.path)), str(path), **options)
    return path


def test_an_ir_is_the_test_model_of_its_onnx_file(tmp_path: Path) -> None:
    graph = chain(tmp_path)
    exact = ir_of(graph, tmp_path / "exact.xml", compress_to_fp16=False)
    (test,) = bisect(OnnxFileModel(graph.path), "ort,openvino", test_model=exact).tests
    assert (test.agrees, test.compared) == (True, 7)
    rounded = ir_of(graph, tmp_path / "rounded.xml")
    (test,) = diagnose(graph.path, "ort,openvino", test_model=rounded, progress=False).tests
    assert [row.onnx for row in test.guilty] == ["c0", "c1", "c2"]
    assert all(row.tactic.startswith("Convolution") for row in test.guilty)
    (finding,) = test.findings
    assert "stored in FP16" in finding.headline


def quantized(graph: Graph, path: Path, *, after: str = "") -> Path:
    """An IR of the graph with quantizers as NNCF puts them in: of what convolutions read, and their weights as levels.

    ``after``: a value behind which one more stands that no node reads.
    """
    import openvino
    from openvino import opset13

    model = openvino.Core().read_model(str(graph.path))
    ends = np.float32(-4), np.float32(4 * 127 / 128)
    for operation in model.get_ordered_ops():
        if operation.get_type_name() != "Convolution":
            continue
        data = opset13.fake_quantize(operation.input_value(0), *ends, *ends, 256)
        weight = np.array(operation.input_value(1).get_node().data)
        scale = np.abs(weight).max((1, 2, 3), keepdims=True) / 63
        levels = opset13.convert(opset13.constant(np.round(weight / scale).astype(np.int8)), np.float32)
        dequantized = opset13.multiply(levels, opset13.constant(scale.astype(np.float32)))
        dequantized.set_friendly_name(f"{operation.get_friendly_name()}/fq_weights_1")
        operation.input(0).replace_source_output(data.output(0))
        operation.input(1).replace_source_output(dequantized.output(0))
    if after:
        value = next(o for op in model.get_ordered_ops() for o in op.outputs() if after in o.get_names())
        model.add_outputs([opset13.fake_quantize(value, *ends, *ends, 256).output(0)])
    openvino.save_model(model, str(path), compress_to_fp16=False)
    return path


def test_an_ir_of_nncf_is_judged_by_its_scales(tmp_path: Path) -> None:
    graph = chain(tmp_path)
    ir = quantized(graph, tmp_path / "int8.xml")
    program = ir_program(Program("g", graph), ir, tmp_path)
    pairs = [n for n in program.graph.nodes if n.op == "QuantizeLinear"]
    weights = [
        n for n in program.graph.nodes if n.op == "DequantizeLinear" and n.inputs[0] in program.graph.initializers
    ]
    assert ([n.inputs[0] for n in pairs], len(weights)) == (["x", "a0", "a1"], 3)
    assert [n.attribute("axis") for n in weights] == [0, 0, 0]
    result = bisect(OnnxFileModel(graph.path), "ort,openvino", test_model=ir)
    assert not result.tests[0].guilty, "weights of 7 bits saturate nowhere"
    assert result.tests[0].compared >= 4
    assert any("computes what its scales say" in note for note in result.tests[0].notes)


def test_what_an_ir_cannot_be(tmp_path: Path) -> None:
    graph = chain(tmp_path)
    ir = ir_of(graph, tmp_path / "net.xml")
    with pytest.raises(InputError, match=r"net\.xml is an IR of OpenVINO, .* not ort-all"):
        bisect(OnnxFileModel(graph.path), "ort,openvino,ort-all", test_model=ir)
    with pytest.raises(InputError, match=r"model: .*net\.xml is an IR of OpenVINO.*this one as test_model"):
        diagnose(str(ir), "ort,openvino", progress=False)
    (tmp_path / "broken.xml").write_text("<net><layers/></net>")
    with pytest.raises(InputError, match=r"broken\.xml: OpenVINO cannot read it: Unable to read the model"):
        bisect(OnnxFileModel(graph.path), "ort,openvino", test_model=tmp_path / "broken.xml")
    with pytest.raises(InputError, match=r"stray\.xml has the quantizer .* which has no place in .*g\.onnx"):
        bisect(
            OnnxFileModel(graph.path), "ort,openvino", test_model=quantized(graph, tmp_path / "stray.xml", after="a2")
        )
    (tmp_path / "other").mkdir()
    other = graph_of(tmp_path / "other", [node("Relu", ["x"], ["a22"])], {"x": [1, 4, 8, 8]})
    with pytest.raises(InputError, match="has no output that is called 'a2'; did you mean a22"):
        bisect(OnnxFileModel(graph.path), "ort,openvino", test_model=ir_of(other, tmp_path / "other.xml"))


def test_pairs_of_quantizers_become_integer_kernels(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    weights = {
        "w": rng.integers(-63, 64, (8, 4, 3, 3)).astype(np.int8),  # 7 bits: no sum of two products saturates anywhere
        "sx": np.float32(0.02),
        "sw": np.float32(0.01),
        "z": np.int8(0),
    }
    nodes = [
        node("QuantizeLinear", ["x", "sx", "z"], ["q"]),
        node("DequantizeLinear", ["q", "sx", "z"], ["d"]),
        node("DequantizeLinear", ["w", "sw", "z"], ["v"]),
        node("Conv", ["d", "v"], ["c"]),
        node("Relu", ["c"], ["y"]),
    ]
    graph = graph_of(tmp_path, nodes, {"x": [1, 4, 8, 8]}, weights)
    (test,) = bisect(OnnxFileModel(graph.path), "ort,openvino").tests
    assert not test.guilty
    session = create(BackendSpec("openvino-int8")).open(Program("g", graph))
    assert integer_kernels_of(session) == 1
    assert kernels_of(session)["y"].endswith(("_I8", "_i8"))


def test_whole_numbers_beyond_int32_are_told(tmp_path: Path) -> None:
    model = onnx.parser.parse_model("""
        <ir_version: 9, opset_import: ["" : 17]>
        net (int64[4] x) => (int64[4] y) <int64 k = {5000000000}, int64 d = {1000}> {
            s = Add (x, k)
            y = Div (s, d)
        }""")
    onnx.save(model, tmp_path / "net.onnx")
    np.savez(tmp_path / "x.npz", x=np.array([1, 20, 300, 4000]))
    test = diagnose(tmp_path / "net.onnx", "ort,openvino", inputs=tmp_path / "x.npz", progress=False).tests[0]
    assert [row.onnx for row in test.guilty] == ["s"]
    assert [finding.cause for finding in test.findings] == ["int32-overflow"]
    assert not any("flip" in note for note in test.notes), "what is behind is wrong, and nothing was rounded"
    assert "the constant k saturates, the result of Add wraps" in test.findings[0].headline


def test_the_command_takes_an_ir(tmp_path: Path) -> None:
    graph = chain(tmp_path)
    ir = ir_of(graph, tmp_path / "net.xml", compress_to_fp16=False)
    code, output = command("bisect", graph.path, ir, "-b", "ort,openvino")
    assert code == 0, output
    assert "openvino: agrees" in output


def test_a_bundle_needs_openvino_and_numpy_alone(tmp_path: Path) -> None:
    net = '<ir_version: 8, opset_import: ["": 17]> net (float[4] x) => (float[4] y) { z = Exp (x) y = Abs (z) }'
    onnx.save(onnx.parser.parse_model(net), tmp_path / "net.onnx")
    np.savez(tmp_path / "x.npz", x=np.array([1, np.nan, 2, 3], np.float32))
    kept = tmp_path / "kept"
    given = ["-b", "ort,openvino", "--inputs", tmp_path / "x.npz", "--save", kept]
    code, output = command("bisect", tmp_path / "net.onnx", *given)
    assert code == 1, output
    assert "Inf appears here in 1 value where NaN is right" in output
    code, output = command("bundle", kept, "-o", tmp_path / "bug")
    assert code == 0, output
    script = (tmp_path / "bug" / "repro.py").read_text()
    assert "cp_debug" not in script
    assert "Needs numpy and openvino." in script


def test_a_weight_that_an_ir_rounds_by_two_axes_is_stored_rounded(tmp_path: Path) -> None:
    import openvino
    from openvino import opset13

    graph = chain(tmp_path)
    model = openvino.Core().read_model(str(graph.path))
    (first,) = (op for op in model.get_ops() if op.get_friendly_name() == "conv0")
    weight = np.array(first.input_value(1).get_node().data)
    high = np.abs(weight).max((1, 2), keepdims=True)
    rounded = opset13.fake_quantize(first.input_value(1), -high, high, -high, high, 255)
    first.input(1).replace_source_output(rounded.output(0))
    openvino.save_model(model, str(tmp_path / "net.xml"), compress_to_fp16=False)
    program = ir_program(Program("g", graph), tmp_path / "net.xml", tmp_path)
    (conv,) = (n for n in program.graph.nodes if n.name == "conv0")
    stored = program.graph.initializer(conv.proto.input[1])
    np.testing.assert_allclose(stored, np.round(weight / high * 127) / 127 * high, atol=1e-6)
    assert 0 < np.abs(stored - weight).max() < 0.01
