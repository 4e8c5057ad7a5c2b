"""The backends on recorded TensorRT versions: what is exposed, what is told, what is refused."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from test_trt_runner import install, save_net

from cp_debug.backends.base import Program
from cp_debug.backends.capabilities import BuildInfo, build_info_of
from cp_debug.backends.registry import create
from cp_debug.backends.spec import BackendSpec
from cp_debug.backends.tensorrt.calibration import read_cache
from cp_debug.backends.tensorrt.engines import to_exclude
from cp_debug.bisect.engine import Options as BisectOptions
from cp_debug.bisect.engine import bisect
from cp_debug.bisect.result import TestResult
from cp_debug.errors import BackendUnavailable, InputError
from cp_debug.graph.graph import Graph
from cp_debug.reports.tables import engine_lines

VERSIONS = ("8.6.0", "10.3.0", "10.12.0.36", "11.4.0")
X = np.random.default_rng(3).standard_normal((1, 3, 8, 8)).astype(np.float32)


def open_session(folder: Path, spec: str, shape: str = "1,3,8,8", **options: Any):
    graph = Graph(save_net(folder, shape))
    return create(BackendSpec.parse(spec), **options).open(Program("net", graph))


def collect(session, inputs: dict[str, np.ndarray], **options: Any) -> tuple[dict[str, np.ndarray], dict]:
    seen: dict[str, np.ndarray] = {}
    outputs = session.run(inputs, seen.__setitem__, **options)
    return seen, outputs


@pytest.fixture(params=VERSIONS)
def version(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    install(request.param, monkeypatch)
    return request.param


@pytest.mark.few(1)
def test_fp16_shows_what_the_engine_writes(version: str, tmp_path: Path) -> None:
    session = open_session(tmp_path, "trt-fp16")
    reference, _ = collect(
        create(BackendSpec.parse("ort")).open(Program("net", Graph(tmp_path / "net.onnx"))), {"x": X}
    )
    assert "c1" not in session.exposed, "fused away"
    seen, outputs = collect(session, {"x": X})
    assert list(seen) == ["r1", "c2", "y"]
    assert {name: str(a.dtype) for name, a in seen.items()} == {"r1": "float16", "c2": "float16", "y": "float32"}
    for name, array in seen.items():
        np.testing.assert_allclose(array, reference[name], atol=2e-2)
        assert not np.array_equal(array, reference[name])
    np.testing.assert_array_equal(outputs["y"], seen["y"])
    np.testing.assert_array_equal(session.run({"x": X})["y"], outputs["y"])
    session.close()


@pytest.mark.few(1)
def test_settings_tell_what_ran(version: str, tmp_path: Path) -> None:
    session = open_session(tmp_path, "trt-fp16")
    strong = version.startswith("11.")
    before = session.settings
    assert (before["observer_gap"], before["rebuild_floor"]) == (None, None)
    collect(session, {"x": X})
    told = json.loads(json.dumps(session.settings))
    assert told["regime"] == ("strong" if strong else "weak")
    assert ("FP16" in told["flags"]) != strong
    assert "TF32" not in told["flags"]
    assert (told["observer_gap"], told["rebuild_floor"]) == (0.0, 0.0)
    assert told["probed"] == {"fusions_changed": [], "tactics_changed": [], "timing_cache": "used"}
    assert told["realised_precision"]["Half"] > 0.5
    assert set(told["build_seconds"]) == {"plain", "rebuilt", "probed"}
    first = next(layer for layer in told["layers"] if "/c1/Conv" in layer["nodes"])
    assert first["nodes"] == ["/c1/Conv", "/r1/Relu"]
    assert first["arithmetic"] == "fp16acc"


def test_marks_that_change_the_engine_are_taken_back(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    install("8.6.0", monkeypatch)
    monkeypatch.setattr("fake_tensorrt.SHY", {"c2"})
    session = open_session(tmp_path, "trt-fp16")
    for _ in range(2):
        seen, _ = collect(session, {"x": X})
        assert list(seen) == ["r1", "y"]
    told = session.settings
    assert (told["unmarked"], told["observer_gap"], told["probed"]["tactics_changed"]) == (["c2"], 0.0, [])
    info = BuildInfo.of_settings(json.loads(json.dumps(told)))
    assert info == session.build_info
    assert info is not None
    assert {**told, **info.to_settings()} == told


def test_settings_of_other_backends_tell_of_no_engine(tmp_path: Path) -> None:
    session = create(BackendSpec.parse("ort")).open(Program("net", Graph(save_net(tmp_path, "1,3,8,8"))))
    assert BuildInfo.of_settings(session.settings) is None
    assert build_info_of(session) is None


@pytest.mark.few(1)
def test_all_probes_undo_fusions_and_it_is_told(version: str, tmp_path: Path) -> None:
    session = open_session(tmp_path, "trt-fp32", probes="all")
    seen, _ = collect(session, {"x": X})
    assert list(seen) == ["c1", "r1", "c2", "y"]
    assert session.settings["probed"]["fusions_changed"] == ["/c1/Conv + /r1/Relu"]


@pytest.mark.few(1)
def test_probes_can_be_narrowed(version: str, tmp_path: Path) -> None:
    seen, outputs = collect(open_session(tmp_path, "trt-fp32"), {"x": X}, probes={"c2"})
    assert list(seen) == ["c2"]
    assert list(outputs) == ["y"]


@pytest.mark.few(1)
def test_fp32_nodes_stay_fp32(version: str, tmp_path: Path) -> None:
    session = open_session(tmp_path, "trt-fp16", keep_fp32=frozenset({"/c2/Conv"}))
    seen, _ = collect(session, {"x": X})
    assert (seen["r1"].dtype, seen["c2"].dtype) == (np.float16, np.float32)


@pytest.mark.few(1)
def test_fp32_nodes_may_be_another_components_but_must_be_somewhere(version: str, tmp_path: Path) -> None:
    session = open_session(tmp_path, "trt-fp16", keep_fp32=frozenset({"/c2/Conv", "/head/Conv"}))
    assert collect(session, {"x": X})[0]["c2"].dtype == np.float32
    backend = create(BackendSpec.parse("trt-fp16"), keep_fp32=frozenset({"/c3/Conv"}))
    with pytest.raises(InputError, match=r"no ONNX node is called '/c3/Conv'; did you mean /c[12]/Conv"):
        bisect(str(save_net(tmp_path)), [create(BackendSpec.parse("ort")), backend])


@pytest.mark.few(1)
def test_strongly_typed_on_request(version: str, tmp_path: Path) -> None:
    if version.startswith("8."):
        with pytest.raises(InputError, match="--strongly-typed needs TensorRT 10"):
            open_session(tmp_path, "trt-fp16", strongly_typed=True)
        return
    session = open_session(tmp_path, "trt-fp16", strongly_typed=True)
    assert session.settings["regime"] == "strong"
    assert collect(session, {"x": X})[0]["c2"].dtype == np.float16


@pytest.mark.few(1)
def test_dynamic_graphs_are_built_for_what_comes(version: str, tmp_path: Path) -> None:
    session = open_session(tmp_path, "trt-fp32", "N,3,8,8")
    for batch in (1, 3, 1):
        seen, outputs = collect(session, {"x": np.repeat(X, batch, axis=0)})
        assert outputs["y"].shape == (batch, 4, 8, 8)
        assert list(seen) == ["r1", "c2", "y"]


def test_a_profile_is_one_engine_with_limits(version: str, tmp_path: Path) -> None:
    profiles = {"x": ([1, 3, 8, 8], [2, 3, 8, 8], [2, 3, 8, 8]), "of another component": ([1], [1], [1])}
    session = open_session(tmp_path, "trt-fp32", "N,3,8,8", profiles=profiles)
    assert session.run({"x": X})["y"].shape == (1, 4, 8, 8)
    with pytest.raises(InputError, match="the engine was built for"):
        session.run({"x": np.repeat(X, 3, axis=0)})


def test_precision_that_no_layer_runs_in_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    install("8.6.0", monkeypatch)
    everything = frozenset({"/c1/Conv", "/r1/Relu", "/c2/Conv", "/y/Add"})
    engine = create(BackendSpec.parse("trt-fp16"), keep_fp32=everything)
    message = r"no layer .* runs in fp16 \(layer inputs and outputs: Float 100%\)"
    with pytest.raises(InputError, match=message):  # everywhere but as the test of a bisect, which judges what it is
        bisect(str(save_net(tmp_path)), [engine, create(BackendSpec.parse("ort"))])
    assert open_session(tmp_path, "trt-tf32").settings["layers"][0]["arithmetic"] == "tf32"


@pytest.mark.parametrize(("spec", "slower"), [("trt-fp16", "HALF"), ("trt-bf16", "BF16")])
def test_an_engine_without_a_layer_in_its_precision_is_judged_as_fp32(
    spec: str, slower: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    install("10.3.0", monkeypatch)
    backends = [create(BackendSpec.parse("ort")), create(BackendSpec.parse(spec))]
    path = str(save_net(tmp_path))
    (low,) = bisect(path, backends).tests
    monkeypatch.setattr("fake_tensorrt.SLOWER", {slower})
    (found,) = bisect(path, backends).tests
    says = f"{spec}: no layer of the built engine runs in {spec[4:].upper()} (layer inputs and outputs: Float 100%)"
    assert [any(note.startswith(says) for note in test.notes) for test in (low, found)] == [False, True]
    precisions = [{row.replay.precision for row in test.rows if row.replay is not None} for test in (low, found)]
    assert precisions == [{spec[4:]}, {"fp32"}]
    assert found.agrees


@pytest.mark.few(2)
def test_refusals(version: str, tmp_path: Path) -> None:
    with pytest.raises(BackendUnavailable, match="runs on CUDA only"):
        create(BackendSpec.parse("trt-fp32@cpu"))
    with pytest.raises(InputError, match="no QuantizeLinear"):
        open_session(tmp_path, "trt-int8")
    session = open_session(tmp_path, "trt-fp32")
    with pytest.raises(InputError, match="missing input 'x'"):
        session.run({})
    graph = Graph(tmp_path / "net.onnx")
    graph.proto.graph.node.append(onnx.helper.make_node("Det", ["y"], ["d"], name="/d/Det"))
    onnx.save(graph.proto, tmp_path / "net.onnx")
    with pytest.raises(InputError, match=r"(?s)cannot parse it.*node /d/Det \(Det\)") as caught:
        create(BackendSpec.parse("trt-fp32")).open(Program("net", Graph(tmp_path / "net.onnx")))
    offered = str(caught.value).partition("python -c ")[2]
    subprocess.run([sys.executable, "-c", offered.strip('"')], check=True, cwd=tmp_path)
    part = onnx.load(tmp_path / "part.onnx")
    assert [node.op_type for node in part.graph.node] == ["Add", "Det"]
    assert [v.name for v in part.graph.input] == ["c2", "r1"]


def test_versions_name_library_and_card(version: str) -> None:
    backend = create(BackendSpec.parse("trt-best@cuda:0"))
    assert backend.versions()["tensorrt"] == version
    assert backend.versions()["gpu"] == "Fake"
    assert (backend.precision, backend.device, backend.emulated) == ("fp16", "cuda:0", False)


@pytest.mark.few(1)
def test_int8_by_the_calibrator_of_the_version(version: str, tmp_path: Path) -> None:
    data, cache = tmp_path / "data", tmp_path / "caches"
    (data / "net").mkdir(parents=True)
    options = {"calibration_data": data, "calibration_cache": cache}
    if version.startswith("11."):
        np.savez(data / "net/0.npz", x=X)
        with pytest.raises(InputError, match="from the graph only"):
            open_session(tmp_path, "trt-int8", **options)
        return
    with pytest.raises(InputError, match=r"net\.cache: there is no such calibration cache, and .*data/net holds no"):
        open_session(tmp_path, "trt-int8", **options)
    np.savez(data / "net/0.npz", x=X)
    for spec in ("trt-int8", "trt-best"):
        session = open_session(tmp_path, spec, **options)
        collect(session, {"x": X})
        assert "INT8" in session.settings["flags"]
        assert (cache / "net.cache").is_file()
    file = cache / "net.cache"
    before = file.read_bytes()
    open_session(tmp_path, "trt-int8", calibration_cache=file)
    assert file.read_bytes() == before
    assert create(BackendSpec.parse("trt-int8"), calibration_cache=file).implicit_int8


def save_three(folder: Path) -> Path:
    """Three convolutions with ReLUs, between which an engine may stay in INT8."""
    channels = (3, 16, 16, 8)
    model = onnx.parser.parse_model("""
        <ir_version: 8, opset_import: ["" : 17]>
        net (float[1,3,8,8] x) => (float[1,8,8,8] r3) {
            c1 = Conv <pads: ints = [1,1,1,1]> (x, w1)
            r1 = Relu (c1)
            c2 = Conv <pads: ints = [1,1,1,1]> (r1, w2)
            r2 = Relu (c2)
            c3 = Conv <pads: ints = [1,1,1,1]> (r2, w3)
            r3 = Relu (c3)
        }""")
    rng = np.random.default_rng(0)
    for i, (before, after) in enumerate(itertools.pairwise(channels), 1):
        weight = rng.standard_normal((after, before, 3, 3)).astype(np.float32) * np.float32((2 / 9 / before) ** 0.5)
        model.graph.initializer.append(onnx.numpy_helper.from_array(weight, f"w{i}"))
    for node in model.graph.node:
        node.name = f"/{node.output[0]}/{node.op_type}"
    onnx.save(model, folder / "net.onnx")
    return folder / "net.onnx"


def calibrated(folder: Path, samples: np.ndarray, **options: Any) -> TestResult:
    """The chain in INT8 by TensorRT's calibrator, bisected."""
    (folder / "data/net").mkdir(parents=True, exist_ok=True)
    np.savez(folder / "data/net/0.npz", x=samples)
    np.savez(folder / "inputs.npz", x=X)
    test = create(BackendSpec.parse("trt-int8"), calibration_data=folder / "data", calibrator="minmax", **options)
    chosen = BisectOptions(inputs=folder / "inputs.npz")
    return bisect(str(save_three(folder)), [create(BackendSpec.parse("ort")), test], options=chosen).tests[0]


@pytest.mark.few(1)
@pytest.mark.parametrize("rounded", [set(), {"r1"}])
def test_what_the_calibrator_chose_explains_the_engine(
    rounded: set[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    install("8.6.0", monkeypatch)
    monkeypatch.setattr("fake_tensorrt.ROUNDED", rounded)
    found = calibrated(tmp_path, X)
    rows = {row.onnx: row for row in found.rows}
    assert [name for name, row in rows.items() if row.replay and row.replay.step] == ["r1", "r2", "r3"]
    assert all(
        row.replay.deviation_from_scales < 1e-5
        for row in rows.values()
        if row.replay and row.replay.deviation_from_scales is not None
    )
    assert (found.guilty, found.observation.observer_gap) == ([], 0.0)
    (note,) = found.notes  # and none about an exporter: the model is an ONNX file
    assert "every layer computes what its scales say from its own inputs, " in note


def test_a_range_that_the_calibrator_chose_too_small_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    install("8.6.0", monkeypatch)
    found = calibrated(tmp_path, X / 8)
    assert found.findings[0].cause == "int8-clipped"
    assert found.programs["net"].endswith("net.trt-int8.onnx")
    fix = found.findings[0].fix
    assert "--trt-calib-data" in fix
    assert "--keep-fp32 /c1/Conv" in fix
    kept = calibrated(tmp_path, X / 8, keep_fp32=frozenset({"/c1/Conv"}))
    assert next(row for row in kept.rows if row.onnx == "r1").replay.step is None


@pytest.mark.parametrize("text", ["", "x: 3c010a14", "TRT-8600-MinMax\nx: 3c01", "TRT-8600-MinMax\nx: lots"])
def test_a_file_that_is_no_calibration_cache_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "c.cache").write_text(text)
    with pytest.raises(InputError, match=r"c\.cache: not a calibration cache of TensorRT"):
        read_cache(tmp_path / "c.cache")


@pytest.mark.few(1)
def test_a_component_without_pairs_of_a_quantized_model_is_built_without_int8(version: str, tmp_path: Path) -> None:
    graph = Graph(save_net(tmp_path))
    for fallback, flag in ((True, "FP16"), (False, None)):
        backend = create(BackendSpec.parse("trt-int8"), fp16_fallback=fallback)
        session = backend.open(Program("net", graph, plain=graph))
        collect(session, {"x": X})
        assert "INT8" not in session.settings["flags"]
        assert flag is None or version.startswith("11.") or flag in session.settings["flags"]


def test_a_failed_build_says_what_to_leave_out_of_int8(tmp_path: Path) -> None:
    weight = onnx.numpy_helper.from_array(np.ones((2, 3, 2, 2), np.float32), "w")
    graph = onnx.helper.make_graph(
        [
            onnx.helper.make_node("QuantizeLinear", ["x", "s"], ["q"], "/q"),
            onnx.helper.make_node("DequantizeLinear", ["q", "s"], ["d"], "/d"),
            onnx.helper.make_node("ConvTranspose", ["d", "w"], ["y"], "/up/ConvTranspose"),
        ],
        "net",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1, 2, 4, 4])],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)],
        [weight, onnx.numpy_helper.from_array(np.float32(0.1), "s")],
    )
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)]), tmp_path / "up.onnx")
    assert "leave /up/ConvTranspose unquantized (--skip-layers)" in to_exclude(
        Graph(tmp_path / "up.onnx"), calibrated=False
    )
    assert to_exclude(Graph(save_net(tmp_path)), calibrated=True) == ""
    bare = onnx.helper.make_graph(
        [onnx.helper.make_node("ConvTranspose", ["x", "w"], ["y"], "/up/Conv Transpose")],
        "net", graph.input, graph.output, [weight],
    )  # fmt: skip
    onnx.save(onnx.helper.make_model(bare, opset_imports=[onnx.helper.make_opsetid("", 17)]), tmp_path / "bare.onnx")
    advice = to_exclude(Graph(tmp_path / "bare.onnx"), calibrated=True)
    assert advice.endswith("try --keep-fp32 '/up/Conv Transpose'")
    assert to_exclude(Graph(tmp_path / "bare.onnx"), calibrated=False) == ""


CHAIN = 13


def save_chain(folder: Path) -> Path:
    """Thirteen convolutions, each with a ReLU."""
    rng = np.random.default_rng(5)
    body, value = [], "x"
    for i in range(CHAIN):
        body += [f"c{i} = Conv <pads: ints = [1,1,1,1]> ({value}, w{i})", f"r{i} = Relu (c{i})"]
        value = f"r{i}"
    body.append(f"y = Neg ({value})")
    text = "\n".join(body)
    model = onnx.parser.parse_model(
        f'<ir_version: 8, opset_import: ["" : 17]> net (float[1,4,6,6] x) => (float[1,4,6,6] y) {{ {text} }}'
    )
    for i in range(CHAIN):
        array = (rng.standard_normal((4, 4, 3, 3)) * 0.3).astype(np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, f"w{i}"))
    for node in model.graph.node:
        node.name = f"/{node.output[0]}/{node.op_type}"
    path = folder / "net.onnx"
    onnx.save(model, path)
    return path


def wrong_weight(index: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let engines compute with another weight than the graph has."""
    load = onnx.load

    def wrong(path: Any) -> onnx.ModelProto:
        model = load(path)
        weight = model.graph.initializer[index]
        array = onnx.numpy_helper.to_array(weight)
        weight.CopyFrom(onnx.numpy_helper.from_array((array * 1.1).astype(array.dtype), weight.name))
        return model

    monkeypatch.setattr("fake_tensorrt.onnx", SimpleNamespace(**{**vars(onnx), "load": wrong}))


def test_an_engine_with_a_wrong_weight_is_guilty_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    install("8.6.0", monkeypatch)
    path = save_chain(tmp_path)
    wrong_weight(7, monkeypatch)
    engine = create(BackendSpec.parse("trt-fp16"))
    (test,) = bisect(str(path), [create(BackendSpec.parse("ort")), engine]).tests
    assert [row.onnx for row in test.guilty] == ["r7"]
    (line,) = engine_lines(test.backend)
    assert "engine: weakly typed" in line.plain
