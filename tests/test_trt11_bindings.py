"""The build path with TensorRT 11's real bindings, on a machine without a GPU: all but loading the engine runs."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from test_narrow_files import net as fp8_net
from test_regions import save_transformer
from test_trt_runner import NODES, save_net

from cp_debug.backends.narrow_options import NarrowOptions
from cp_debug.backends.tensorrt.client import BuildFailed, BuildTimedOut, ParseFailed, RunnerClient
from cp_debug.backends.tensorrt.config import decide
from cp_debug.backends.tensorrt.options import LoaderScript
from cp_debug.errors import BackendUnavailable, InputError
from cp_debug.graph.graph import Graph
from cp_debug.graph.half_precision import cast_surgery
from cp_debug.graph.narrow_qdq import insert_narrow_qdq, narrow_kinds
from cp_debug.graph.surgery import distinct_dimensions
from cp_debug.quantization.narrow_layers import narrow_layers

pytestmark = [pytest.mark.process, pytest.mark.tensorrt, pytest.mark.timeout(600)]
NO_GPU = "cudaError 35"
"""Where the build is over and the engine is loaded for its inspector."""


@pytest.fixture(scope="session")
def trt11(shared_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Python with TensorRT 11's bindings: ``CPDEBUG_TRT11``/trt11-python, or made by the shared script."""
    script = shared_folder / "trt11" / "setup.sh"
    if not script.is_file():
        pytest.skip(f"no {script}, which sets TensorRT 11's bindings up")
    folder = Path(os.environ.get("CPDEBUG_TRT11") or tmp_path_factory.mktemp("trt11"))
    if not (folder / "trt11-python").is_file():
        done = subprocess.run(["bash", str(script), str(folder)], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"TensorRT 11's bindings could not be set up: {done.stderr.strip().splitlines()[-1:]}")
    return str(folder / "trt11-python")


@pytest.fixture(scope="session")
def shared_folder() -> Path:
    """The shared material, or a skip."""
    folder = Path(os.environ.get("CPDEBUG_SHARED", Path(__file__).resolve().parents[2] / "shared")).resolve()
    if not folder.is_dir():
        pytest.skip(f"no shared material at {folder} (set CPDEBUG_SHARED)")
    return folder


def build(python: str, folder: Path, path: Path, variant: str, **changes: Any) -> tuple[Path, list[dict[str, Any]]]:
    """(the engine's file, events). What comes after the build needs a GPU, and must fail for that reason."""
    config = decide(variant, "11.4.0.106", quantized=variant == "int8")
    if config.graph_precision is not None:
        path = cast_surgery(Graph(path), config.graph_precision, changes.pop("keep", ()), folder / "typed.onnx")
    nodes = [[node.name, node.op, list(node.outputs)] for node in Graph(path).nodes]
    step = {
        "command": "build",
        "onnx": str(path),
        "engine": str(folder / "net.engine"),
        "nodes": nodes,
        **config.step(),
    }
    events: list[dict[str, Any]] = []
    client = RunnerClient(python, on_event=lambda event: events.append(dict(event)))
    with pytest.raises(InputError, match=NO_GPU):
        client.execute([{**step, "timing_cache": str(folder / "timing.cache"), **changes}])
    return folder / "net.engine", events


@pytest.mark.parametrize("variant", ["fp32", "tf32", "fp16", "bf16"])
def test_engines_of_every_precision_are_built(trt11: str, tmp_path: Path, variant: str) -> None:
    engine, events = build(trt11, tmp_path, save_net(tmp_path), variant)
    assert engine.stat().st_size > 1000
    assert (tmp_path / "timing.cache").is_file()
    phases = {event["phase"] for event in events if event["event"] == "progress"}
    assert "Building engine" in phases, "this version reports its progress"


def test_polygraphys_loader_scripts_make_the_network_and_its_configuration(trt11: str, tmp_path: Path) -> None:
    packages = Path(pytest.importorskip("polygraphy").__file__).parents[1]
    script, ran = tmp_path / "loader.py", tmp_path / "ran"
    script.write_text(f"""
import sys
sys.path.append({str(packages)!r})
from polygraphy import func
from polygraphy.backend.trt import CreateConfig, NetworkFromOnnxPath

@func.extend(NetworkFromOnnxPath({str(save_net(tmp_path))!r}))
def load_network(builder, network, parser):
    print("network of", network.num_layers)

@func.extend(CreateConfig())
def load_config(builder, network, config):
    open({str(ran)!r}, "a").write(type(config).__name__)
""")
    ends = {"inputs": ["x"], "outputs": ["y"], "backend": "trt-fp32"}
    loader = {**LoaderScript.open(script).step(), **ends}
    assert build(trt11, tmp_path, tmp_path / "net.onnx", "fp32", loader=loader)[0].stat().st_size > 1000
    assert ran.read_text() == "IBuilderConfig"


def test_a_layer_kept_in_fp32_and_a_builder_level(trt11: str, tmp_path: Path) -> None:
    engine, _ = build(trt11, tmp_path, save_net(tmp_path), "fp16", keep=["/c2/Conv"], builder_level=1)
    assert engine.is_file()


def test_values_can_be_marked(trt11: str, tmp_path: Path) -> None:
    probes = {"method": "outputs", "tensors": {"r1": {"dtype": "", "format": ""}}}
    assert build(trt11, tmp_path, save_net(tmp_path), "fp16", probes=probes)[0].is_file()


def test_a_graph_with_quantizers_is_built(trt11: str, tmp_path: Path) -> None:
    model = onnx.parser.parse_model("""
        <ir_version: 8, opset_import: ["" : 17]>
        net (float[1,4,8,8] x) => (float[1,4,8,8] y) {
            q = QuantizeLinear (x, s, z)
            d = DequantizeLinear (q, s, z)
            wq = QuantizeLinear <axis = 0> (w, ws, wz)
            wd = DequantizeLinear <axis = 0> (wq, ws, wz)
            y = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (d, wd)
        }""")
    rng = np.random.default_rng(0)
    weights = {"s": np.float32(0.05), "z": np.int8(0), "ws": np.full(4, 0.01, "f4"), "wz": np.zeros(4, "i1")}
    weights["w"] = (rng.standard_normal((4, 4, 3, 3)) * 0.3).astype("f4")
    model.graph.initializer.extend(onnx.numpy_helper.from_array(np.asarray(a), n) for n, a in weights.items())
    for node in model.graph.node:
        node.name = f"/{node.output[0]}/{node.op_type}"
    onnx.save(model, tmp_path / "qdq.onnx")
    assert build(trt11, tmp_path, tmp_path / "qdq.onnx", "int8")[0].stat().st_size > 1000


def test_a_graph_with_fp8_quantizers_is_built(trt11: str, tmp_path: Path) -> None:
    engine, _ = build(trt11, tmp_path, fp8_net(tmp_path, onnx.TensorProto.FLOAT8E4M3FN).path, "fp32")
    assert engine.stat().st_size > 1000


def narrow_file(folder: Path, op: str, precision: str) -> Path:
    """A file with one layer in a narrow precision."""
    shape, weight = ([2, 64, 6, 6], [32, 64, 3, 3]) if op == "Conv" else ([8, 256], [256, 64])
    rng = np.random.default_rng(0)
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node(op, ["x", "w"], ["y"], "m")],
        "g",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, shape)],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)],
        [onnx.numpy_helper.from_array(rng.standard_normal(weight).astype("f4"), "w")],
    )
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)]), folder / "net.onnx")
    plain, options = Graph(folder / "net.onnx"), NarrowOptions.parse(precision)
    return insert_narrow_qdq(plain, narrow_layers(plain, options, {"m": 4.0}).layers, folder / "narrow.onnx", precision)


@pytest.mark.parametrize(
    ("op", "precision"),
    [
        *(("MatMul", "int4:sym"), ("Gemm", "int4:g64:sym"), ("MatMul", "nvfp4"), ("Gemm", "mxfp4")),
        *(("MatMul", "fp8"), ("Conv", "fp8"), ("Conv", "fp8:channel")),
    ],
)
def test_narrow_files_are_built(trt11: str, tmp_path: Path, op: str, precision: str) -> None:
    assert build(trt11, tmp_path, narrow_file(tmp_path, op, precision), "fp32")[0].stat().st_size > 1000


@pytest.mark.parametrize(
    ("op", "precision", "error", "message"),
    [
        ("MatMul", "int4", ParseFailed, "Failed to import initializer: w__codes"),
        ("MatMul", "fp8:e5m2", ParseFailed, "Failed to import initializer: x__zero_point"),
        ("Conv", "mxfp8", ParseFailed, "blocking dimension must be the last or second to last"),
        ("MatMul", "mxfp8", BuildFailed, "is_constant"),
        ("MatMul", "fp8:block", BuildFailed, "is_constant"),
    ],
)
def test_narrow_files_that_it_does_not_take(
    trt11: str, tmp_path: Path, op: str, precision: str, error: type[Exception], message: str
) -> None:
    """What the documents say of these precisions: the day that one is taken, they are to be changed."""
    path = narrow_file(tmp_path, op, precision)
    nodes = [[node.name, node.op, list(node.outputs)] for node in Graph(path).nodes]
    step = {"command": "build", "onnx": str(path), "engine": str(tmp_path / "e"), "nodes": nodes, "timing_cache": None}
    with pytest.raises(error, match=message):
        RunnerClient(trt11).execute([{**step, **decide("fp32", "11.4.0.106").step()}])
    if precision in ("int4", "fp8:e5m2"):
        with pytest.raises(BackendUnavailable, match="which TensorRT does not support; it supports FLOAT8E4M3FN, INT4"):
            decide("fp32", "11.4.0.106", narrow=narrow_kinds(Graph(path)))


def test_dynamic_shapes_take_a_profile(trt11: str, tmp_path: Path) -> None:
    path = save_net(tmp_path, "N,3,8,8")
    profiles = {"x": [[1, 3, 8, 8], [2, 3, 8, 8], [4, 3, 8, 8]]}
    assert build(trt11, tmp_path, path, "fp32", profiles=profiles)[0].is_file()
    config = decide("fp32", "11.4.0.106")
    step = {"command": "build", "onnx": str(path), "engine": str(tmp_path / "e"), "nodes": NODES, **config.step()}
    with pytest.raises(InputError, match="it needs a profile"):
        RunnerClient(trt11).execute([{**step, "timing_cache": None}])


def test_dimensions_of_one_name_and_two_sizes(trt11: str, tmp_path: Path) -> None:
    """Refused by TensorRT as they are; converters write ``?`` for both."""
    path = save_net(tmp_path, "1,3,Q,Q")
    shape = [1, 3, 8, 12]
    step = {"command": "build", "onnx": str(path), "engine": str(tmp_path / "e"), "nodes": NODES, "timing_cache": None}
    step |= {**decide("fp32", "11.4.0.106").step(), "profiles": {"x": [shape] * 3}}
    with pytest.raises(InputError, match="Input dimensions with this name"):
        RunnerClient(trt11).execute([step])
    named = distinct_dimensions(Graph(path), {"x": [shape]}, tmp_path / "named.onnx")
    assert build(trt11, tmp_path, named, "fp32", profiles={"x": [shape] * 3})[0].is_file()


def test_pinned_precisions_are_refused_by_a_version_that_has_none(trt11: str, tmp_path: Path) -> None:
    save_net(tmp_path)
    config = decide("fp32", "11.4.0.106")
    step = {"command": "build", "onnx": str(tmp_path / "net.onnx"), "engine": str(tmp_path / "e"), "nodes": NODES}
    flags = {"set_flags": ["FP16"], "timing_cache": None}
    with pytest.raises(BackendUnavailable, match="FP16"):
        RunnerClient(trt11).execute([{**step, **config.step(), **flags}])


def test_what_the_parser_refuses_is_named(trt11: str, tmp_path: Path) -> None:
    model = onnx.load(save_net(tmp_path))
    model.graph.node.append(onnx.helper.make_node("Det", ["y"], ["d"], name="/d/Det"))
    model.graph.output.append(onnx.helper.make_tensor_value_info("d", 1, None))
    onnx.save(model, tmp_path / "det.onnx")
    config = decide("fp32", "11.4.0.106")
    nodes = [*NODES, ["/d/Det", "Det", ["d"]]]
    step = {"command": "build", "onnx": str(tmp_path / "det.onnx"), "engine": str(tmp_path / "e"), "nodes": nodes}
    with pytest.raises(ParseFailed, match="/d/Det"):
        RunnerClient(trt11).execute([{**step, **config.step(), "timing_cache": None}])


@pytest.mark.parametrize("variant", ["fp16", "bf16"])
def test_a_transformer_is_built_with_what_stands_inside_shown(trt11: str, tmp_path: Path, variant: str) -> None:
    path = save_transformer(tmp_path)
    values = ("s0", "p0", "o0", "n1", "p1", "x1")
    probes = {"method": "outputs", "tensors": {value: {"dtype": "", "format": ""} for value in values}}
    plain, _ = build(trt11, tmp_path, path, variant)
    before = plain.stat().st_size
    kept = [node.name for node in Graph(path).nodes if node.op in ("Split", "Softmax")]
    shown, _ = build(trt11, tmp_path, path, variant, keep=kept, probes=probes)
    assert shown.stat().st_size != before


BRANCH = """
    <ir_version: 8, opset_import: ["" : 17]>
    net (float[1,4,8,8] x, bool often) => (float[1,4,8,8] y) {
        r = Relu (x)
        i = If (often) <
            then_branch = then () => (float[1,4,8,8] a) { a = Mul (r, two) },
            else_branch = else () => (float[1,4,8,8] b) { b = Sigmoid (r) }
        >
        y = Add (i, x)
    }"""
LOOP = """
    <ir_version: 8, opset_import: ["" : 17]>
    net (float[1,4] x) => (float[1,4] y) {
        y = Loop (three, yes, x) <
            body = body (int64 i, bool on, float[1,4] v) => (bool go, float[1,4] w) {
                go = Identity (on)
                w = Mul (v, two)
            }
        >
    }"""


@pytest.mark.parametrize("text", [BRANCH, LOOP])
def test_control_flow_is_built(trt11: str, tmp_path: Path, text: str) -> None:
    model = onnx.parser.parse_model(text)
    constants = {"two": np.float32(2), "three": np.int64(3), "yes": np.bool_(True)}
    model.graph.initializer.extend(
        onnx.numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items() if name in text
    )
    for node in model.graph.node:
        node.name = f"/{node.output[0]}/{node.op_type}"
    onnx.save(model, tmp_path / "flow.onnx")
    for variant in ("fp32", "fp16"):
        assert build(trt11, tmp_path, tmp_path / "flow.onnx", variant)[0].stat().st_size > 1000


HURRIED = """
import itertools, queue, runpy, selectors, sys, threading, time
looks = itertools.count()
time.monotonic = lambda: 300.0 * next(looks)
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
"""Runs a script in which five minutes pass between two looks at the clock."""


def test_a_build_is_stopped_at_its_limit_and_says_how_far_it_was(trt11: str, tmp_path: Path) -> None:
    hurried = tmp_path / "python"
    hurried.write_text(f'#!/bin/sh\n[ "$1" = -c ] && exec {trt11} "$@"\nexec {trt11} -c \'{HURRIED}\' "$@"\n')
    hurried.chmod(0o755)
    path = save_transformer(tmp_path)
    nodes = [[node.name, node.op, list(node.outputs)] for node in Graph(path).nodes]
    step = {"command": "build", "onnx": str(path), "engine": str(tmp_path / "e"), "nodes": nodes, "timing_cache": None}
    with pytest.raises(BuildTimedOut, match=r"stopped after 1000 s \(--build-timeout\); it was at "):
        RunnerClient(str(hurried)).execute([{**step, **decide("fp32", "11.4.0.106").step()}], build_timeout=1000)
    assert not list(tmp_path.glob("e*"))


def test_shapes_beside_the_profile_are_refused_before_a_build(trt11: str, tmp_path: Path) -> None:
    path = save_net(tmp_path, "N,3,8,8")
    step = {"command": "build", "onnx": str(path), "engine": str(tmp_path / "e"), "nodes": NODES, "timing_cache": None}
    step |= {**decide("fp32", "11.4.0.106").step(), "profiles": {"x": [[4, 3, 8, 8], [2, 3, 8, 8], [1, 3, 8, 8]]}}
    with pytest.raises(InputError, match="profile"):
        RunnerClient(trt11).execute([step])


def test_a_plug_in_that_is_not_there_is_named(trt11: str, tmp_path: Path) -> None:
    model = onnx.load(save_net(tmp_path))
    node = onnx.helper.make_node("NoSuchPlugin_TRT", ["y"], ["d"], name="/d/NoSuchPlugin_TRT", domain="trt.plugins")
    model.graph.node.append(node)
    model.graph.output.append(onnx.helper.make_tensor_value_info("d", 1, None))
    model.opset_import.append(onnx.helper.make_opsetid("trt.plugins", 1))
    onnx.save(model, tmp_path / "plug.onnx")
    nodes = [*NODES, ["/d/NoSuchPlugin_TRT", "NoSuchPlugin_TRT", ["d"]]]
    step = {"command": "build", "onnx": str(tmp_path / "plug.onnx"), "engine": str(tmp_path / "e"), "nodes": nodes}
    with pytest.raises(ParseFailed, match="NoSuchPlugin_TRT"):
        RunnerClient(trt11).execute([{**step, **decide("fp32", "11.4.0.106").step(), "timing_cache": None}])
