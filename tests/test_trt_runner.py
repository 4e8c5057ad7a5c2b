"""The runner and the build configuration against the recorded members of each TensorRT version."""

from __future__ import annotations

import ast
import json
import re
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from fake_tensorrt import RECORDED, VERSIONS, FakeCuda, fake_tensorrt
from states import until

from cp_debug.backends.tensorrt import runner
from cp_debug.backends.tensorrt.calibration import read_cache
from cp_debug.backends.tensorrt.config import decide
from cp_debug.errors import BackendUnavailable, InputError

VARIANTS = ("fp32", "tf32", "fp16", "bf16", "int8", "best")


def save_net(folder: Path, shape: str = "1,3,8,8") -> Path:
    """Conv + Relu, Conv, Add: two fused groups and a pointwise one."""
    model = onnx.parser.parse_model(f"""
        <ir_version: 8, opset_import: ["" : 17]>
        net (float[{shape}] x) => (float[{shape.replace(",3,", ",4,")}] y) {{
            c1 = Conv <pads: ints = [1,1,1,1]> (x, w1)
            r1 = Relu (c1)
            c2 = Conv <pads: ints = [1,1,1,1]> (r1, w2)
            y = Add (c2, r1)
        }}""")
    rng = np.random.default_rng(0)
    for name, channels in (("w1", 3), ("w2", 4)):
        array = (rng.standard_normal((4, channels, 3, 3)) * 0.2).astype(np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    for node in model.graph.node:
        node.name = f"/{node.output[0]}/{node.op_type}"
    path = folder / "net.onnx"
    onnx.save(model, path)
    return path


NODES = [["/c1/Conv", "Conv", ["c1"]], ["/r1/Relu", "Relu", ["r1"]], ["/c2/Conv", "Conv", ["c2"]]]
NODES.append(["/y/Add", "Add", ["y"]])


@pytest.fixture(params=VERSIONS)
def version(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    install(request.param, monkeypatch)
    return request.param


def install(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CPDEBUG_TRT_PYTHON", raising=False)
    monkeypatch.setitem(sys.modules, "tensorrt", fake_tensorrt(version))
    monkeypatch.setattr(runner, "Cuda", FakeCuda)


def install_counted(version: str, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """``install``, with the engine files of the builds that ran."""
    install(version, monkeypatch)
    built: list[str] = []
    real = runner.COMMANDS["build"]

    def build(job: Any, step: dict[str, Any]) -> dict[str, Any]:
        built.append(Path(step["engine"]).name)
        return real(job, step)

    monkeypatch.setitem(runner.COMMANDS, "build", build)
    return built


def build_step(folder: Path, version: str, variant: str = "fp32", **changes: Any) -> dict[str, Any]:
    config = decide(variant, version, quantized=variant == "int8", keep_fp32=changes.pop("keep_fp32", ()))
    step = {"command": "build", "engine": str(folder / "net.engine"), "nodes": NODES, **config.step()}
    return {**step, "onnx": str(folder / "net.onnx"), "timing_cache": str(folder / "timing.cache"), **changes}


def execute(*steps: dict[str, Any], **job: Any) -> dict[str, Any]:
    return json.loads(json.dumps(runner.execute({"steps": list(steps), **job}, lambda event: None)))


def test_python_38_can_read_the_runner() -> None:
    ast.parse(Path(runner.__file__).read_text(), feature_version=(3, 8))


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("strongly_typed", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_named_flag_exists_in_its_version(version: str, strongly_typed: bool, variant: str) -> None:
    major = int(version.split(".")[0])
    refused = strongly_typed and major < 10
    refused |= variant == "best" and (strongly_typed or major >= 11)
    refused |= variant == "bf16" and major < 10
    if refused:
        with pytest.raises((InputError, BackendUnavailable)):
            decide(variant, version, strongly_typed=strongly_typed, quantized=True, keep_fp32={"a"})
        return
    config = decide(variant, version, strongly_typed=strongly_typed, quantized=True, keep_fp32={"a"})
    enums, classes = RECORDED[version]["enums"], RECORDED[version]["classes"]
    assert {*config.set_flags, *config.clear_flags} <= set(enums["BuilderFlag"])
    assert set(config.network_flags) <= set(enums["NetworkDefinitionCreationFlag"])
    assert set(config.layer_precisions.values()) <= set(enums["DataType"])
    assert not config.layer_precisions or "precision" in classes["ILayer"]
    has_unfused = "mark_unfused_tensors_as_debug_tensors" in classes["INetworkDefinition"]
    assert config.unfused_debug_tensors == has_unfused
    assert ("TF32" in config.set_flags) == (variant in ("tf32", "best"))
    assert (config.regime == "strong") == (strongly_typed or major >= 11)


def test_tactic_sources_are_chosen(version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensorrt = sys.modules["tensorrt"]
    save_net(tmp_path)
    step = build_step(tmp_path, version, "fp32", tactic_sources=["+EDGE_MASK_CONVOLUTIONS", "-JIT_CONVOLUTIONS"])
    chosen: list[int] = []
    monkeypatch.setattr(tensorrt.IBuilderConfig, "set_tactic_sources", lambda self, bits: not chosen.append(bits))
    assert "error" not in execute(step)
    assert chosen == [1 << int(tensorrt.TacticSource.EDGE_MASK_CONVOLUTIONS)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("-CUTLASS", "there is no tactic source CUTLASS; TensorRT .* has .*EDGE_MASK_CONVOLUTIONS, JIT_CONVOLUTIONS"),
        ("-JIT_CONVOLUTIONS", "TensorRT refused the tactic sources -JIT_CONVOLUTIONS"),
    ],
)
def test_tactic_sources_that_cannot_be_are_refused(version: str, tmp_path: Path, change: str, message: str) -> None:
    save_net(tmp_path)
    error = execute(build_step(tmp_path, version, "fp32", tactic_sources=[change]))["error"]
    assert error["kind"] == "unsupported"
    assert re.fullmatch(message, error["message"])


def test_int8_without_scales_is_refused() -> None:
    for version in ("8.6.0", "11.4.0"):
        with pytest.raises(InputError, match="no QuantizeLinear"):
            decide("int8", version)
    assert "INT8" in decide("int8", "8.6.0", calibrated=True).set_flags


@pytest.mark.parametrize("variant", VARIANTS)
def test_builds_on_every_version(version: str, variant: str, tmp_path: Path) -> None:
    save_net(tmp_path)
    try:
        step = build_step(tmp_path, version, variant, workspace_mib=64)
    except BackendUnavailable:
        pytest.skip("not in this version")
    result = execute(step, {**step, "engine": str(tmp_path / "again.engine")})
    assert "error" not in result, result["error"]
    first, second = result["results"]
    assert first["timing_cache"] == "new"
    assert second["timing_cache"] == "used"
    assert {name for name, on in first["flags"].items() if on} == set(step["set_flags"])
    nodes = [layer["Metadata"] for layer in first["layers"]]
    assert nodes == [
        "[ONNX Layer: /c1/Conv]\x1f[ONNX Layer: /r1/Relu]",
        "[ONNX Layer: /c2/Conv]",
        "[ONNX Layer: /y/Add]",
    ]
    assert Path(step["engine"]).stat().st_size == first["bytes"]


def test_layer_precisions_are_set_on_the_layers_of_their_node(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    install("8.6.0", monkeypatch)
    save_net(tmp_path)
    step = build_step(tmp_path, "8.6.0", "fp16", keep_fp32={"/c2/Conv"})
    assert "OBEY_PRECISION_CONSTRAINTS" in step["set_flags"]
    (built,) = execute(step)["results"]
    words = {layer["Name"]: layer["Outputs"][0]["Format/Datatype"] for layer in built["layers"]}
    assert "FP32" in words["/c2/Conv"]
    assert "FP16" in words["/c1/Conv + /r1/Relu"]


def test_marked_outputs_and_what_cannot_be_marked(version: str, tmp_path: Path) -> None:
    save_net(tmp_path)
    probes = {"method": "outputs", "tensors": {"r1": {}, "y": {}, "nothing": {}}}
    (built,) = execute(build_step(tmp_path, version, probes=probes))["results"]
    assert (built["marked"], built["missing"]) == (["r1", "y"], ["nothing"])


def test_runs_and_hands_out_arrays(version: str, tmp_path: Path) -> None:
    save_net(tmp_path)
    x = np.random.default_rng(1).standard_normal((1, 3, 8, 8)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    run = {"command": "run", "engine": str(tmp_path / "net.engine"), "inputs": {"x": str(tmp_path / "x.npy")}}
    probes = {"method": "outputs", "tensors": {"r1": {}}}
    result = execute(
        build_step(tmp_path, version, probes=probes), {**run, "folder": str(tmp_path / "out"), "repeat": 2}
    )
    assert "error" not in result, result["error"]
    ran = result["results"][1]
    assert len(ran["seconds"]) == 3
    assert {entry["name"]: entry["dtype"] for entry in ran["tensors"]} == {"r1": "FLOAT", "y": "FLOAT"}
    arrays = {entry["name"]: np.load(entry["file"], allow_pickle=False) for entry in ran["tensors"]}
    assert arrays["y"].shape == (1, 4, 8, 8)
    assert (arrays["r1"] >= 0).all()


@pytest.mark.parametrize("name", ["HWC8", "HWC", "CHW4", "CHW32"])
def test_outputs_in_another_layout_come_back_linear(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    install("8.6.0", monkeypatch)
    save_net(tmp_path)
    np.save(tmp_path / "x.npy", np.random.default_rng(1).standard_normal((2, 3, 8, 5)).astype(np.float32))
    save_net(tmp_path, "2,3,8,5")
    run = {"command": "run", "engine": str(tmp_path / "net.engine"), "inputs": {"x": str(tmp_path / "x.npy")}}
    arrays = []
    for wanted in ("", name):
        probes = {"method": "outputs", "tensors": {"r1": {"format": wanted}}}
        step = build_step(tmp_path, "8.6.0", probes=probes)
        ran = execute(step, {**run, "folder": str(tmp_path / f"out{wanted}"), "names": ["r1"]})["results"][1]
        arrays.append(np.load(ran["tensors"][0]["file"]))
    np.testing.assert_array_equal(*arrays)


@pytest.mark.parametrize("version", ["10.12.0.36", "11.4.0"])
def test_debug_tensors_come_through_the_listener(version: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    install(version, monkeypatch)
    save_net(tmp_path)
    np.save(tmp_path / "x.npy", np.ones((1, 3, 8, 8), np.float32))
    run = {"command": "run", "engine": str(tmp_path / "net.engine"), "inputs": {"x": str(tmp_path / "x.npy")}}
    run |= {"folder": str(tmp_path / "out"), "listen": True, "names": ["r1", "y"]}
    probes = {"method": "unfused"}
    result = execute(build_step(tmp_path, version, probes=probes), run)
    assert [entry["name"] for entry in result["results"][1]["tensors"]] == ["r1", "y"]


def test_bf16_is_handed_out_as_float32(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    install("10.12.0.36", monkeypatch)
    save_net(tmp_path)
    np.save(tmp_path / "x.npy", np.random.default_rng(2).standard_normal((1, 3, 8, 8)).astype(np.float32))
    run = {"command": "run", "engine": str(tmp_path / "net.engine"), "inputs": {"x": str(tmp_path / "x.npy")}}
    probes = {"method": "outputs", "tensors": {"r1": {"dtype": "BF16"}}}
    step = build_step(tmp_path, "10.12.0.36", "bf16", probes=probes)
    ran = execute(step, {**run, "folder": str(tmp_path / "out"), "names": ["r1"]})["results"][1]
    (entry,) = ran["tensors"]
    array = np.load(entry["file"])
    assert (entry["dtype"], array.dtype) == ("BF16", np.float32)
    assert (array.view(np.uint32) & 0xFFFF == 0).all()
    assert array.any()


def test_dynamic_shapes_need_a_profile_and_are_checked_against_it(version: str, tmp_path: Path) -> None:
    save_net(tmp_path, "N,3,8,8")
    assert execute(build_step(tmp_path, version))["error"]["kind"] == "input"
    profiles = {"x": [[1, 3, 8, 8], [2, 3, 8, 8], [4, 3, 8, 8]]}
    np.save(tmp_path / "x.npy", np.ones((5, 3, 8, 8), np.float32))
    run = {"command": "run", "engine": str(tmp_path / "net.engine"), "inputs": {"x": str(tmp_path / "x.npy")}}
    error = execute(build_step(tmp_path, version, profiles=profiles), {**run, "folder": str(tmp_path)})["error"]
    assert "[5, 3, 8, 8], the engine was built for [1, 3, 8, 8] to [4, 3, 8, 8]" in error["message"]


@pytest.mark.parametrize("kind", ["entropy", "minmax"])
def test_the_calibrator_reads_arrays_once_and_keeps_what_it_found(version: str, kind: str, tmp_path: Path) -> None:
    save_net(tmp_path, "N,3,8,8")
    for i in range(3):
        np.savez(tmp_path / f"{i}.npz", x=np.full((1 + i, 3, 8, 8), 2.0 + i, np.float32))
    files = [str(tmp_path / f"{i}.npz") for i in range(3)]
    calibration = {"cache": str(tmp_path / "c.cache"), "data": files, "kind": kind}
    profiles = {"x": [[1, 3, 8, 8], [2, 3, 8, 8], [4, 3, 8, 8]]}
    step = build_step(tmp_path, version, profiles=profiles, calibration=calibration)
    if version.startswith("11."):
        assert "no calibrators" in execute(step)["error"]["message"]
        return
    assert "error" not in execute(step)
    assert read_cache(tmp_path / "c.cache")["x"] == np.float32(4 / 127)
    assert "error" not in execute({**step, "calibration": {**calibration, "data": []}})
    (tmp_path / "c.cache").unlink()
    np.savez(tmp_path / "1.npz", z=np.ones(3, np.float32))
    assert execute(step)["error"]["message"].endswith("1.npz: holds no array 'x'")
    np.savez(tmp_path / "1.npz", x=np.ones(3, np.float32))
    assert "shape [3]; calibration runs at [2, 3, 8, 8]" in execute(step)["error"]["message"]
    np.savez(tmp_path / "1.npz", x=np.array([None]))
    assert "allow_pickle" in execute(step)["error"]["message"]


def test_samples_are_cut_or_repeated_to_the_shape_of_calibration() -> None:
    fitted = runner._fitted("f", "x", np.arange(6).reshape(3, 2), (4, 1))
    assert fitted.tolist() == [[0], [2], [4], [0]]


def test_parser_errors_name_the_node(version: str, tmp_path: Path) -> None:
    model = onnx.load(save_net(tmp_path))
    model.graph.node.append(onnx.helper.make_node("Det", ["y"], ["d"], name="/d/Det"))
    model.graph.output[0].name = "d"
    onnx.save(model, tmp_path / "net.onnx")
    error = execute(build_step(tmp_path, version, nodes=[*NODES, ["/d/Det", "Det", ["d"]]]))["error"]
    assert error == {"kind": "parse", "message": "node /d/Det (Det): no importer for Det", "nodes": ["/d/Det"]}


def test_a_library_that_the_parser_lacks_is_told(version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """RoiAlign on TensorRT 8.6: its plug-in is in a library that the package does not bring."""

    def lacks(self: object, path: str) -> bool:
        raise RuntimeError("Unable to open library: libnvinfer_vc_plugin.so.8")

    save_net(tmp_path)
    monkeypatch.setattr(sys.modules["tensorrt"].OnnxParser, "parse_from_file", lacks)
    error = execute(build_step(tmp_path, version))["error"]
    assert (error["kind"], error["message"]) == ("parse", "Unable to open library: libnvinfer_vc_plugin.so.8")


def test_memory_versions_time_and_members_fail_in_words(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    install("10.12.0.36", monkeypatch)
    save_net(tmp_path)
    step = build_step(tmp_path, "10.12.0.36")
    assert execute({**step, "workspace_mib": 1})["error"]["kind"] == "memory"
    assert execute(step, time_limit=-1)["error"]["kind"] == "time"
    assert execute(step)["results"]
    install("11.4.0", monkeypatch)
    error = execute({"command": "run", "engine": step["engine"], "inputs": {}, "folder": str(tmp_path)})["error"]
    assert (error["kind"], "Version tag does not match" in error["message"]) == ("engine", True)
    error = execute({**step, "set_flags": ["FP16"]})["error"]
    assert (error["kind"], error["message"]) == ("unsupported", "TensorRT 11.4.0 has no BuilderFlag.FP16")
    calibration = {"cache": "none", "data": [], "kind": "entropy"}
    error = execute({**step, "network_flags": [], "calibration": calibration})["error"]
    assert (error["kind"], "no calibrators" in error["message"]) == ("unsupported", True)


@pytest.mark.parametrize(
    ("text", "kind", "nodes"),
    [
        (
            "Could not find any implementation for node /up/ConvTranspose + /up/Relu.",
            "kernel",
            ["/up/ConvTranspose + /up/Relu"],
        ),
        (
            "Could not find any implementation for node /a.0/Conv due to insufficient workspace.",
            "kernel",
            ["/a.0/Conv"],
        ),
        ("Cuda Runtime (out of memory)", "memory", []),
        ("something else", "build", []),
    ],
)
def test_why_a_build_failed(text: str, kind: str, nodes: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    install("8.6.0", monkeypatch)
    job = runner.Job(lambda event: None)
    job.log("ERROR", text)
    failure = runner._build_failure(job)
    assert (failure.kind, failure.nodes, failure.message) == (kind, nodes, text)


def test_a_build_that_is_stopped_leaves_its_timings_to_the_next(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, version: str
) -> None:
    """The builder waits until what it timed is in the file, then ends without an engine."""
    kept, read = tmp_path / "timing.cache", []
    module = sys.modules["tensorrt"]
    real = module.Builder.build_serialized_network

    def stopped(self: Any, network: Any, config: Any) -> None:
        config.get_timing_cache()._data += b" of c1"
        until(lambda: kept.is_file() and kept.read_bytes().endswith(b" of c1"))

    def resumed(self: Any, network: Any, config: Any) -> Any:
        read.append(config.get_timing_cache()._data)
        return real(self, network, config)

    save_net(tmp_path)
    monkeypatch.setattr(runner, "KEEP_EVERY", 0.01)
    monkeypatch.setattr(module.Builder, "build_serialized_network", stopped)
    assert "error" in execute(build_step(tmp_path, version))
    assert kept.read_bytes() == b"timings of c1"
    assert not any(thread.name == "timing cache" for thread in threading.enumerate())
    runner._TIMING_CACHES.clear()  # as in another process
    monkeypatch.setattr(module.Builder, "build_serialized_network", resumed)
    (built,) = execute(build_step(tmp_path, version))["results"]
    assert built["timing_cache"] == "used"
    assert read == [b"timings of c1"]


def test_a_build_goes_on_where_its_timings_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tried = threading.Event()

    def full(cache: Any, path: str) -> None:
        tried.set()
        raise OSError("no space left")

    monkeypatch.setattr(runner, "KEEP_EVERY", 0.001)
    monkeypatch.setattr(runner, "_keep_timing_cache", full)
    config = type("Config", (), {"get_timing_cache": lambda self: object()})()
    with runner._kept_meanwhile(config, object(), str(tmp_path / "timing.cache")):
        tried.wait()


def test_an_error_logged_again_with_its_place_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    install("8.6.0", monkeypatch)
    job = runner.Job(lambda event: None)
    for text in ("3: no symbol", "3: [loader.cpp::364] Error Code 3: Internal Error (no symbol)", "4: no kernel"):
        job.log("ERROR", text)
    assert job.reasons("") == "3: [loader.cpp::364] Error Code 3: Internal Error (no symbol)\n4: no kernel"
    job.errors = ["3: no symbol", "no symbol", "3: no symbol"]
    assert job.reasons("") == "3: no symbol"
    job.errors = []
    assert job.reasons("none given") == "none given"


def test_a_refused_timing_cache_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    install("8.6.0", monkeypatch)
    save_net(tmp_path)
    (tmp_path / "timing.cache").write_bytes(b"of another GPU")
    (built,) = execute(build_step(tmp_path, "8.6.0"))["results"]
    assert built["timing_cache"] == "refused"


def test_probe_tells_what_the_version_can(version: str) -> None:
    (facts,) = execute({"command": "probe"})["results"]
    classes = RECORDED[version]["classes"]
    assert facts["tensorrt"] == version
    assert facts["layer_precision"] == ("precision" in classes["ILayer"])
    assert facts["calibrator"] == ("IInt8EntropyCalibrator2" in classes)
    assert facts["progress"] == ("IProgressMonitor" in classes)


def test_without_tensorrt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    error = execute({"command": "probe"})["error"]
    assert error["kind"] == "import"
    assert "'tensorrt'" in error["message"]
