"""ONNX Runtime as a backend: what it shows is what it runs."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import runtimes
from hypothesis import given, settings
from hypothesis import strategies as st
from nets import NetBuilder, marked, random_dag, residual, second_like
from onnx import helper, numpy_helper
from test_cli import run

from cp_debug.backends import ort_chunks, ort_optimized, ort_options
from cp_debug.backends.base import Program
from cp_debug.backends.ort_backend import OrtBackend, OrtSession
from cp_debug.backends.spec import BackendSpec
from cp_debug.bisect.engine import Options, bisect
from cp_debug.errors import BackendUnavailable, InputError, MissingPackage
from cp_debug.graph.graph import Graph

LEVELS = ["ort-none", "ort-basic", "ort-all"]


def open_session(path: Path, spec: str = "ort", **options: object) -> OrtSession:
    return OrtBackend(BackendSpec.parse(spec), threads=1, **options).open(Program("net", Graph(path)))


def observe(session: OrtSession, feed: dict[str, np.ndarray], probes: set[str] | None = None) -> tuple[dict, dict]:
    """(outputs, copies of what the sink was given, in order)."""
    seen: dict[str, np.ndarray] = {}
    outputs = session.run(feed, lambda name, tensor: seen.__setitem__(name, np.array(tensor)), probes)
    return outputs, seen


def image(*shape: int, seed: int = 3) -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(seed).standard_normal(shape).astype(np.float32)}


def whole_graph(path: Path, feed: dict[str, np.ndarray], level: str = "ORT_DISABLE_ALL") -> dict[str, np.ndarray]:
    """All values marked, in one session: what everybody else does."""
    graph = Graph(path)
    options = ort.SessionOptions()
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, level)
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    model = marked(graph, graph.tensors).SerializeToString()
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    names = [o.name for o in session.get_outputs()]
    return dict(zip(names, session.run(names, feed), strict=True))


def as_half(path: Path) -> Path:
    """The net in FP16 throughout, input and outputs included."""
    model = onnx.load(path)
    for tensor in model.graph.initializer:
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), tensor.name))
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT16
    half = path.with_name("half.onnx")
    onnx.save(model, str(half))
    return half


def relative(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a.astype(np.float64) - b) / np.linalg.norm(b.astype(np.float64)))


@settings(max_examples=40, deadline=None)
@given(
    recipe=st.lists(st.tuples(st.integers(0, 7), st.integers(0, 99), st.integers(0, 99)), min_size=2, max_size=14),
    seed=st.integers(0, 1000),
    size=st.integers(1, 9),
)
def test_chunks_equal_the_whole_graph_bit_for_bit(tmp_path_factory, recipe, seed, size):
    path = random_dag(tmp_path_factory.mktemp("dag") / "net.onnx", recipe, seed)
    feed = image(1, 4, 5, 5, seed=seed)
    expected = whole_graph(path, feed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ort_chunks, "_NODES_PER_CHUNK", size)
        outputs, seen = observe(open_session(path), feed)
    assert list(seen) == Graph(path).tensors
    for name, array in expected.items():
        assert (seen | outputs)[name].tobytes() == array.tobytes()


@settings(max_examples=25, deadline=None)
@given(
    recipe=st.lists(st.tuples(st.integers(0, 6), st.integers(0, 99), st.integers(0, 99)), min_size=2, max_size=14),
    seed=st.integers(0, 1000),
    spec=st.sampled_from(["ort-basic", "ort-all"]),
)
def test_observing_an_optimized_program_does_not_change_it(tmp_path_factory, recipe, seed, spec):
    path = random_dag(tmp_path_factory.mktemp("dag") / "net.onnx", recipe, seed)
    session = open_session(path, spec)
    feed = image(1, 4, 5, 5, seed=seed)
    outputs, seen = observe(session, feed)
    plain = session.run(feed)
    reference = whole_graph(path, feed)
    session.close()
    assert session.settings["observer_gap"] == 0
    assert set(seen) == set(session.exposed)
    for name, array in plain.items():
        assert outputs[name].tobytes() == array.tobytes()
    for name, array in seen.items():
        assert array.shape == reference[name].shape
        np.testing.assert_allclose(array, reference[name], rtol=0, atol=1e-4 * np.abs(reference[name]).max() + 1e-30)


TRANSPOSED = int(runtimes.VERSION >= (1, 31))
"""BatchNormalizations that go into a ConvTranspose."""


@pytest.mark.parametrize(
    ("spec", "disabled", "visible"),
    [
        ("ort-none", [], (36, 21)),
        ("ort-basic", [], (26 - TRANSPOSED, 21)),  # 10 BatchNormalizations went into their convolutions
        ("ort-all", [], (16 - TRANSPOSED, 13)),  # and activations and sums too
        ("ort-all", ["NchwcTransformer"], (16 - TRANSPOSED, 13)),
        (
            "ort-all",
            ["ConvActivationFusion", "ConvAddActivationFusion"],
            (16 - TRANSPOSED, 13),
        ),  # the NCHWc kernels still fuse
    ],
)
def test_every_value_that_the_program_computes_is_shown_under_its_name(tmp_path, spec, disabled, visible):
    for net, shape, count in zip((second_like, residual), ((1, 16, 32, 32), (3, 16, 16, 16)), visible, strict=True):
        path = net(tmp_path / f"{net.__name__}.onnx")
        session = open_session(path, spec, disabled_optimizers=disabled)
        feed = image(*shape)
        outputs, seen = observe(session, feed)
        plain = session.run(feed)
        session.close()
        reference = whole_graph(path, feed)
        assert all(outputs[name].tobytes() == array.tobytes() for name, array in plain.items())
        assert max(relative(array, reference[name]) for name, array in seen.items()) < 1e-5
        assert len(seen) == count
        assert list(seen) == list(session.exposed)


def test_a_wrongly_guessed_name_is_not_shown(tmp_path, monkeypatch):
    def swapped(optimized, original):
        guesses = guess(optimized, original)
        first, second = list(guesses)[:2]
        return guesses | {first: guesses[second], second: guesses[first]}

    path = second_like(tmp_path / "net.onnx")
    session = open_session(path, "ort-all")
    honest = set(session.exposed)
    session.close()
    guess = ort_optimized._guess_names
    if not session._optimized.renamed:
        pytest.skip("this processor has no NCHWc kernels: nothing is guessed")
    monkeypatch.setattr(ort_optimized, "_guess_names", swapped)
    session = open_session(path, "ort-all")
    assert len(session.exposed) == len(honest) - 2
    assert len(session._optimized.unverified) == 2
    session.close()


def test_naive_marking_does_change_the_program_and_this_does_not(tmp_path):
    """DESIGN: marking deletes what is under test. BatchNormalization folding is the optimization here."""
    path = second_like(tmp_path / "net.onnx")
    feed = image(1, 16, 32, 32)
    session = open_session(path, "ort-all")
    plain = session.run(feed)
    naive = whole_graph(path, feed, "ORT_ENABLE_ALL")
    outputs, _ = observe(session, feed)
    assert np.abs(naive["heatmap"] - plain["heatmap"]).max() > 0
    assert np.abs(outputs["heatmap"] - plain["heatmap"]).max() == 0
    assert session.settings["observer_gap"] == 0
    session.close()


@pytest.mark.parametrize("spec", LEVELS)
def test_half_precision_graphs_are_observed_without_a_gap(tmp_path, spec):
    """A CPU keeps FP16 values in FP32 between operators; marking them would round them."""
    path = as_half(second_like(tmp_path / "net.onnx"))
    session = open_session(path, spec)
    feed = {"x": image(1, 16, 32, 32)["x"].astype(np.float16)}
    outputs, seen = observe(session, feed)
    plain = session.run(feed)
    assert session.settings["observer_gap"] == 0
    assert outputs["heatmap"].dtype == np.float16
    assert outputs["heatmap"].tobytes() == plain["heatmap"].tobytes()
    assert len(seen) > 10
    assert whole_graph(path, feed)["heatmap"].tobytes() != plain["heatmap"].tobytes()
    session.close()


def test_sums_of_unknown_sizes_are_read_in_nchwc(tmp_path):
    """ONNX Runtime adds maps of unknown size with five axes, between two Reshape nodes."""
    net = NetBuilder()
    left, right = (net.batch_norm(net.op("Relu", net.conv("x", 16, 16)), 16) for _ in range(2))
    net.conv(net.op("Add", left, right, name="total"), 16, 16, name="y")
    path = net.save(tmp_path / "net.onnx", {"x": (1, [1, 16, "h", "w"])}, ["y"])
    session = open_session(path, "ort-all")
    feed = image(1, 16, 12, 8)
    outputs, seen = observe(session, feed)
    _, exact = observe(open_session(path), feed)
    assert outputs["y"].tobytes() == session.run(feed)["y"].tobytes()
    np.testing.assert_allclose(seen["total"], exact["total"], rtol=1e-4, atol=1e-5)
    session.close()


@pytest.mark.parametrize("spec", LEVELS)
def test_half_precision_constants_are_opened(tmp_path, spec):
    """ONNX Runtime makes initializers of Constant nodes, which a CPU casts to FP32: there is no value left to read."""
    net = NetBuilder()
    half = numpy_helper.from_array(np.full((1, 4, 1, 1), 1.5, np.float16))
    net.op("Mul", net.op("Relu", net.conv("x", 4, 4)), net.op("Constant", value=half), name="y")
    model = onnx.load(net.save(tmp_path / "net.onnx", {"x": (10, [1, 4, 8, 8])}, ["y"]))
    for tensor in model.graph.initializer:
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), tensor.name))
    del model.graph.value_info[:]
    onnx.save(model, tmp_path / "half.onnx")
    session = open_session(tmp_path / "half.onnx", spec)
    feed = {"x": image(1, 4, 8, 8)["x"].astype(np.float16)}
    outputs, _ = observe(session, feed)
    assert outputs["y"].tobytes() == session.run(feed)["y"].tobytes()
    assert session.settings["observer_gap"] == 0
    session.close()


def test_quantized_graphs_run_as_they_are(tmp_path):
    net = NetBuilder()
    scale, zero = net.weight(np.array(0.05, np.float32)), net.weight(np.array(0, np.int8))
    q = net.op("QuantizeLinear", "x", scale, zero)
    y = net.op("Relu", net.conv(net.op("DequantizeLinear", q, scale, zero), 4, 8))
    net.op("DequantizeLinear", net.op("QuantizeLinear", y, scale, zero), scale, zero, name="y")
    path = net.save(tmp_path / "q.onnx", {"x": (1, [1, 4, 8, 8])}, ["y"])
    assert Graph(path).precision == "int8"
    outputs, seen = observe(open_session(path), image(1, 4, 8, 8))
    assert seen[q].dtype == np.int8
    assert outputs["y"].tobytes() == whole_graph(path, image(1, 4, 8, 8))["y"].tobytes()


def test_replacements_tell_which_original_nodes_an_optimized_node_stands_for(tmp_path):
    session = open_session(second_like(tmp_path / "net.onnx"), "ort-all", disabled_optimizers=["NchwcTransformer"])
    found = {r.value: r for r in session.optimized_nodes()}
    fused = found["relu_5"]
    assert fused.operators == ("com.microsoft.FusedConv",)
    assert fused.original == ("node_conv_3", "node_batchnormalization_4", "node_relu_5")
    covered = [name for r in found.values() for name in r.original]
    assert sorted(covered) == sorted(n.name for n in session._graph.nodes)
    assert session.settings["disabled_optimizers"] == ["NchwcTransformer"]
    session.close()
    assert open_session(session._graph.path).optimized_nodes() == []


def test_disabled_optimizers_change_what_runs(tmp_path):
    path = second_like(tmp_path / "net.onnx")
    operators = {
        op
        for r in open_session(path, "ort-all", disabled_optimizers=["NchwcTransformer"]).optimized_nodes()
        for op in r.operators
    }
    assert not any("nchwc" in op for op in operators)


def test_probes_narrow_what_the_sink_is_given(tmp_path):
    session = open_session(residual(tmp_path / "net.onnx"))
    _, seen = observe(session, image(2, 16, 16, 16), {"relu_6", "add_5", "unknown"})
    assert list(seen) == ["add_5", "relu_6"]


def test_memory_does_not_grow_with_depth(tmp_path, monkeypatch):
    """Count the values alive at once instead of bytes: a chain needs two, however long."""
    net = NetBuilder()
    x = "x"
    for _ in range(40):
        x = net.conv(net.op("Relu", x), 4, 4)
    path = net.save(tmp_path / "deep.onnx", {"x": (1, [1, 4, 8, 8])}, [x])
    alive = []
    original = ort_chunks.ChunkedGraph._execute

    def count(self, chunk, wanted, live):
        alive.append(len(live))
        return original(self, chunk, wanted, live)

    monkeypatch.setattr(ort_chunks.ChunkedGraph, "_execute", count)
    _, seen = observe(open_session(path), image(1, 4, 8, 8))
    assert len(seen) == 80
    assert max(alive) <= 2


def test_sequences_pass_from_chunk_to_chunk_unseen(tmp_path, monkeypatch):
    monkeypatch.setattr(ort_chunks, "_NODES_PER_CHUNK", 1)
    net = NetBuilder()
    parts = net.op("SplitToSequence", "x", name="parts", axis=1)
    net.op("SequenceAt", parts, net.weight(np.array(1)), name="y")
    session = open_session(net.save(tmp_path / "seq.onnx", {"x": (1, [1, 4, 5, 5])}, ["y"]))
    outputs, seen = observe(session, image(1, 4, 5, 5))
    assert list(seen) == ["y"]
    assert np.array_equal(outputs["y"], image(1, 4, 5, 5)["x"][:, 1:2])


def test_bfloat16_values_are_handed_out_bit_for_bit(tmp_path):
    import ml_dtypes

    net = NetBuilder()
    net.op("Cast", net.op("Cast", "x", name="narrow", to=onnx.TensorProto.BFLOAT16), name="y", to=1)
    session = open_session(net.save(tmp_path / "b.onnx", {"x": (1, [4])}, ["y"]))
    outputs, seen = observe(session, image(4))
    assert seen["narrow"].dtype == ml_dtypes.bfloat16
    assert np.array_equal(seen["narrow"].astype(np.float32), outputs["y"])


def test_outputs_that_are_inputs_or_weights_are_returned(tmp_path):
    net = NetBuilder()
    net.weight(np.arange(3, dtype=np.float32), "table")
    net.op("Relu", "x", name="y")
    path = net.save(tmp_path / "net.onnx", {"x": (1, [4])}, ["y", "x", "table"])
    for spec in LEVELS:
        session = open_session(path, spec)
        outputs, _ = observe(session, image(4))
        assert list(outputs) == ["y", "x", "table"]
        assert np.array_equal(outputs["x"], image(4)["x"])
        assert np.array_equal(outputs["table"], [0, 1, 2])
        session.close()


def test_external_data_is_found_and_nothing_is_left_in_the_callers_folder(tmp_path):
    plain = second_like(tmp_path / "plain.onnx")
    folder = tmp_path / "model"
    folder.mkdir()
    path = folder / "net.onnx"
    onnx.save(onnx.load(plain), str(path), save_as_external_data=True, location="net.data", size_threshold=64)
    before = sorted(folder.iterdir())
    for spec in LEVELS:
        session = open_session(path, spec)
        outputs, _ = observe(session, image(1, 16, 32, 32))
        again = open_session(plain, spec).run(image(1, 16, 32, 32))
        assert outputs["heatmap"].tobytes() == again["heatmap"].tobytes()
        temporary = Path(session._folder.name) if session._folder else None
        session.close()
        assert temporary is None or not temporary.exists()
    assert sorted(folder.iterdir()) == before


@pytest.mark.parametrize("spec", LEVELS)
def test_settings_are_read_back_and_json_safe(tmp_path, spec):
    backend = OrtBackend(BackendSpec.parse(spec), threads=2)
    session = backend.open(Program("net", Graph(residual(tmp_path / "net.onnx"))))
    level = {"ort-none": "ORT_DISABLE_ALL", "ort-basic": "ORT_ENABLE_BASIC", "ort-all": "ORT_ENABLE_ALL"}[spec]
    assert session.settings["graph_optimization_level"] == level
    assert session.settings["use_deterministic_compute"] is True
    assert session.settings["intra_op_num_threads"] == 2
    assert session.settings["providers"] == ["CPUExecutionProvider"]
    json.dumps(session.settings)
    assert backend.versions()["onnxruntime"] == ort.__version__
    session.close()


@pytest.mark.parametrize(
    ("feed", "message"),
    [
        ({"y": np.zeros((1, 16, 16, 16), np.float32)}, r"unknown input 'y'; expected x: float32\[batch, 16, 16, 16\]"),
        ({}, "missing input 'x'"),
        (
            {"x": np.zeros((1, 16, 16, 16))},
            r"input 'x' is float64; .*; \.astype\('float32'\) makes it so",
        ),
        ({"x": np.zeros((1, 16, 8, 16), np.float32)}, r"input 'x' has shape \[1, 16, 8, 16\]; expected"),
        ({"x": np.zeros((16, 16, 16), np.float32)}, r"input 'x' has shape \[16, 16, 16\]"),
    ],
)
@pytest.mark.parametrize("observed", [False, True])
def test_inputs_that_do_not_fit_are_named(tmp_path, feed, message, observed):
    session = open_session(residual(tmp_path / "net.onnx"))
    with pytest.raises(InputError, match=message):
        session.run(feed, (lambda name, tensor: None) if observed else None)


def test_a_node_that_fails_is_named(tmp_path):
    net = NetBuilder()
    net.op("Gather", net.weight(np.zeros((3, 2), np.float32)), "i", name="y")
    path = net.save(tmp_path / "net.onnx", {"i": (7, [1])}, ["y"])
    session = open_session(path)
    with pytest.raises(InputError, match="failed at node_y"):
        session.run({"i": np.array([7])}, lambda name, tensor: None)
    with pytest.raises(InputError, match=r"net\.onnx: ONNX Runtime failed"):
        session.run({"i": np.array([7])})


def test_a_model_that_random_inputs_do_not_fit_still_opens(tmp_path):
    """Its index is out of range for 0 and 1, so no gap can be measured; own inputs work."""
    net = NetBuilder()
    net.op(
        "Gather", net.weight(np.arange(4, dtype=np.float32)), net.op("Sub", "i", net.weight(np.array([90]))), name="y"
    )
    session = open_session(net.save(tmp_path / "net.onnx", {"i": (7, [1])}, ["y"]), "ort-all")
    assert session.settings["observer_gap"] is None
    assert observe(session, {"i": np.array([92])})[0]["y"] == 2
    session.close()


def test_a_model_that_onnx_runtime_refuses_is_named(tmp_path):
    graph = helper.make_graph(
        [helper.make_node("Imaginary", ["x"], ["y"], domain="nowhere")],
        "g",
        [helper.make_tensor_value_info("x", 1, [1])],
        [onnx.ValueInfoProto(name="y")],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("nowhere", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=9), str(tmp_path / "net.onnx"))
    with pytest.raises(InputError, match=r"net\.onnx: ONNX Runtime cannot open it.*Imaginary"):
        open_session(tmp_path / "net.onnx", "ort-all")


@pytest.mark.skipif("CUDAExecutionProvider" in ort.get_available_providers(), reason="this onnxruntime has CUDA")
@pytest.mark.parametrize("spec", ["ort@cuda", "ort-all@cuda:1"])
def test_cuda_without_its_provider_is_unavailable(spec):
    with pytest.raises(BackendUnavailable, match="no CUDAExecutionProvider") as caught:
        OrtBackend(BackendSpec.parse(spec))
    assert caught.value.install
    assert caught.value.install.startswith("pip install '.[gpu]' in ")
    assert caught.value.nearest == spec.partition("@")[0] + "@cpu"
    assert caught.value.exit_code == 3


@pytest.mark.parametrize(
    ("spec", "nearest"), [("ort-tf32", "emu-tf32"), ("ort-fp16", "emu-fp16"), ("ort-trt", "ort@cuda")]
)
def test_what_a_cpu_would_only_pretend_is_refused(spec, nearest):
    with pytest.raises(BackendUnavailable, match=r"CPU|CUDA only") as caught:
        OrtBackend(BackendSpec.parse(f"{spec}@cpu"))
    assert caught.value.nearest == nearest


@pytest.mark.parametrize(("spec", "tf32"), [("ort@cuda", "0"), ("ort-fp16", "0"), ("ort-trt", "0"), ("ort-tf32", "1")])
def test_tf32_is_off_on_cuda_unless_asked_for(spec, tf32):
    given = dict(ort_options._providers(BackendSpec.parse(spec)))
    assert given["CUDAExecutionProvider"]["use_tf32"] == tf32


def test_a_provider_that_does_not_start_is_unavailable(monkeypatch):
    def refuse(*arguments, **options):
        raise RuntimeError("libnvinfer.so.10: cannot open shared object file")

    monkeypatch.setattr(ort, "get_available_providers", lambda: ["TensorrtExecutionProvider"])
    monkeypatch.setattr(ort, "InferenceSession", refuse)
    with pytest.raises(
        BackendUnavailable, match=r"could not start its TensorrtExecutionProvider.*libnvinfer"
    ) as caught:
        OrtBackend(BackendSpec.parse("ort-trt"))
    assert caught.value.exit_code == 3


@pytest.mark.gpu
@pytest.mark.skipif("CUDAExecutionProvider" not in ort.get_available_providers(), reason="needs ONNX Runtime with CUDA")
@pytest.mark.parametrize(
    ("spec", "low", "high"), [("ort@cuda", 0, 1e-5), ("ort-tf32", 1e-5, 1e-2), ("ort-fp16", 1e-4, 1e-2)]
)
def test_cuda_precisions_are_what_they_claim(spec, low, high, tmp_path):
    net = NetBuilder()
    net.op("MatMul", net.op("Relu", net.conv("x", 128, 128)), "x", name="y")  # a product has no search to fall back
    path = net.save(tmp_path / "net.onnx", {"x": (1, [1, 128, 64, 64])}, ["y"])
    feed = image(1, 128, 64, 64)
    _, reference = observe(open_session(path), feed)
    outputs, seen = observe(open_session(path, spec), feed)
    assert seen.keys() == reference.keys()
    assert low < max(relative(a, seen[name]) for name, a in reference.items()) < high
    whole = open_session(path, spec).run(feed)
    assert all(np.array_equal(whole[name], array) for name, array in outputs.items())


def test_without_onnxruntime_the_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingPackage, match=r"onnxruntime.*pip install '\.\[cpu\]'"):
        OrtBackend(BackendSpec.parse("ort"))


@pytest.mark.parametrize(
    "arguments",
    [
        ("quantize", "ptq", "-o", "made"),
        ("quantize", "sensitivity"),
        ("bisect", "-b", "torch,torch-int8"),
    ],
    ids=lambda each: " ".join(each[:2]),
)
def test_without_modelopt_nothing_is_calibrated(
    arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "modelopt", None)
    run_once = "cp_debug.quantization.calibration.CalibrationManager.run"
    monkeypatch.setattr(run_once, lambda *given, **more: pytest.fail("it was calibrated"))
    code, said = run(*arguments)
    assert (code, "modelopt" in said) == (3, True)
    assert not list(tmp_path.iterdir())


def test_an_input_without_axes_stays_one():
    from cp_debug.graph.onnx_runtime import to_ort

    assert to_ort({"rate": np.array(16000)})["rate"].numpy().shape == ()


def test_sizes_from_a_node_far_in_front_are_constants(tmp_path: Path) -> None:
    """The weights of a convolution end a chunk; shape inference of the next one has to know the sizes all the same."""
    b = NetBuilder()
    sizes = numpy_helper.from_array(np.array([1, 2, 6, 6]))
    size = b.op("Constant", name="size", value=sizes)
    c = b.op("Conv", "x", b.weight(np.ones((2, 3, 1, 1), np.float32), "w"), name="c")
    b.op("Resize", b.op("Relu", c), "", "", size, name="r", mode="nearest", nearest_mode="floor")
    b.save(tmp_path / "net.onnx", {"x": (1, [1, 3, 3, 3])}, ["r"])
    _, seen = observe(open_session(tmp_path / "net.onnx"), {"x": np.ones((1, 3, 3, 3), np.float32)})
    np.testing.assert_array_equal(seen["r"], np.full((1, 2, 6, 6), 3, np.float32))


def test_a_folder_whose_name_is_no_text(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"net\xff")
    folder.mkdir()
    b = NetBuilder()
    b.save(folder / "net.onnx", {"x": (1, [1, 4])}, [b.op("Relu", "x")])
    _, seen = observe(open_session(folder / "net.onnx"), {"x": np.float32([[-1, 2, -3, 4]])})
    assert [value.tolist() for value in seen.values()] == [[[0, 2, 0, 4]]]


def test_a_constant_that_the_optimizer_holds_with_more_axes_is_no_fault(tmp_path: Path) -> None:
    """ONNX Runtime moves a Transpose behind the Mul, and a factor of shape [1] becomes [1, 1, 1, 1]."""
    made = NetBuilder()
    grid = made.weight(np.float32(0.0055), "scale"), made.weight(np.uint8(0), "zero")
    stored = made.op("QuantizeLinear", made.weight(np.float32([0.7]), "factor"), *grid, name="stored")
    turned = made.op("Transpose", "x", perm=[0, 2, 3, 1])
    scaled = made.op("Mul", made.op("DequantizeLinear", stored, *grid, name="back"), turned)
    made.op("Transpose", scaled, perm=[0, 3, 1, 2], name="out")
    net = made.save(tmp_path / "net.onnx", {"x": (1, [1, 2, 4, 4])}, ["out"])
    np.savez(tmp_path / "x.npz", x=np.random.default_rng(0).standard_normal((1, 2, 4, 4)).astype(np.float32))
    test = bisect(str(net), "ort-none,ort-all", options=Options(inputs=tmp_path / "x.npz")).tests[0]
    assert test.agrees
    assert {row.verdict for row in test.rows} == {"ok"}


@pytest.mark.parametrize("level", ["ort", "ort-all"])
def test_a_session_runs_again_after_its_memory_is_freed(tmp_path: Path, level: str) -> None:
    path, feed = second_like(tmp_path / "net.onnx", depth=1, size=16), image(1, 16, 16, 16)
    session = open_session(path, level)
    before = observe(session, feed)[1]
    session.free_memory()
    assert not any(chunk.session for chunk in session._observed._chunks)
    after = observe(session, feed)[1]
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[name], after[name]) for name in before)
