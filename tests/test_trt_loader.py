"""Scripts of Polygraphy's that make the network or the configuration of a build, on recorded TensorRT versions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from test_engine_cache import cache_in
from test_trt_backend import X, collect
from test_trt_runner import install, install_counted, save_net
from typer.testing import CliRunner

from cp_debug.backends.base import Program
from cp_debug.backends.registry import create
from cp_debug.backends.spec import BackendSpec
from cp_debug.backends.tensorrt import runner
from cp_debug.backends.tensorrt.options import LoaderScript
from cp_debug.cli.main import app
from cp_debug.errors import InputError
from cp_debug.graph.graph import Graph

CONFIG = """
import tensorrt as trt

def load_config(builder, network):
    config = builder.create_builder_config()
    config.set_flag(trt.BuilderFlag.REFIT)
    return config
"""
NETWORK = """
import tensorrt as trt

def load_network():
    builder = trt.Builder(trt.ILogger())
    network = builder.create_network({flags})
    parser = trt.OnnxParser(network, trt.ILogger())
    parser.parse_from_file({path!r})
    {more}
    return builder, network, parser
"""
STRONG = "1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)"


@pytest.fixture(autouse=True)
def _fresh_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "_SCRIPTS", {})


def script(folder: Path, text: str) -> Path:
    (folder / "loader.py").write_text(text)
    return folder / "loader.py"


def network(path: Path, more: str = "", flags: str = "0") -> str:
    return NETWORK.format(path=str(path), more=more, flags=flags)


def opened(folder: Path, text: str, spec: str = "trt-fp32", **options: Any) -> Any:
    graph = Graph(save_net(folder))
    loader = LoaderScript.open(script(folder, text))
    return create(BackendSpec.parse(spec), loader=loader, **options).open(Program("net", graph))


@pytest.mark.few(1)
@pytest.mark.parametrize("version", ["8.6.0", "10.12.0.36", "11.4.0"])
def test_the_configuration_is_the_scripts_and_the_precision_the_backends(
    version: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    install(version, monkeypatch)
    session = opened(tmp_path, CONFIG, "trt-fp16", probes="boundaries")
    seen, _ = collect(session, {"x": X})
    assert {"r1", "y"} <= set(seen), "values inside are shown as without a script"
    flags = set(session.build_info.flags)
    assert "REFIT" in flags
    assert "TF32" not in flags
    assert ("FP16" in flags) == (version != "11.4.0")
    assert session.settings["loader"] == str(tmp_path / "loader.py")


def test_the_network_is_the_scripts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    install("8.6.0", monkeypatch)
    model = onnx.load(save_net(tmp_path))
    weight = model.graph.initializer[0]
    weight.CopyFrom(onnx.numpy_helper.from_array(2 * onnx.numpy_helper.to_array(weight), weight.name))
    onnx.save(model, tmp_path / "doubled.onnx")
    session = opened(tmp_path, network(tmp_path / "doubled.onnx"))
    seen, _ = collect(session, {"x": X})
    plain = create(BackendSpec.parse("trt-fp32")).open(Program("net", Graph(save_net(tmp_path))))
    np.testing.assert_allclose(seen["r1"], 2 * collect(plain, {"x": X})[0]["r1"], rtol=1e-6)


def test_names_that_meet_nothing_are_said_and_the_outputs_compared(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    built = install_counted("8.6.0", monkeypatch)
    monkeypatch.setattr(runner, "_owners", lambda network, nodes: [])
    unnamed = "[setattr(network.get_layer(i), 'name', f'layer {i}') for i in range(network.num_layers)]"
    session = opened(tmp_path, network(tmp_path / "net.onnx", unnamed), probes="boundaries")
    seen, outputs = collect(session, {"x": X})
    assert set(seen) == set(outputs) == {"y"}
    assert "loader.py: load_network names no layer" in session.build_info.stopped
    assert len(built) == 1, "no engine is built to show what has no name"


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def load_config(builder, network): pass", "load_config returned NoneType; expected an IBuilderConfig"),
        ("def load_network(): return 3", "load_network returned int; expected (builder, network)"),
        ("def load_network(): raise ValueError('a\\nb')", "load_network raised ValueError: a b (line 1)"),
        ("import sys\nsys.exit(3)\ndef load_network(): pass", "loader.py raised SystemExit: 3 (line 2)"),
        (CONFIG.replace("REFIT", "FP16"), "load_config sets FP16, but the backend is trt-fp32"),
        (network(Path("NET"), flags=STRONG), "makes a strongly typed network; expected --strongly-typed"),
        (network(Path("NET"), "network.get_input(0).name = 'q'"), "with the input 'q'; the ONNX file has x"),
        (
            network(Path("NET"), "network.get_output(0).name = 'q'"),
            "with the outputs q; the ONNX file has 'y'",
        ),
    ],
)
def test_a_script_that_fails_is_told_in_a_sentence(
    text: str, message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    install("10.3.0", monkeypatch)
    path = save_net(tmp_path)
    file = script(tmp_path, text.replace("NET", str(path)))
    told = CliRunner().invoke(app, ["bisect", str(path), "-b", "ort,trt-fp32", "--trt-loader", str(file), "--no-cache"])
    assert isinstance(told.exception, InputError)
    assert str(told.exception).startswith(str(file))
    assert message in str(told.exception)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def load_config(b, n) pass", r"loader\.py, line 1: not a Python script"),
        ("def load(): pass", r"neither load_network nor load_config is defined"),
    ],
)
def test_a_file_that_is_no_loader_is_refused_unrun(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        LoaderScript.open(script(tmp_path, text))


def test_types_written_into_the_file_leave_no_network_to_the_script(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    install("11.4.0", monkeypatch)
    with pytest.raises(InputError, match=r"load_network makes the network by itself.*expected load_config alone"):
        opened(tmp_path, network(tmp_path / "net.onnx", flags=STRONG), "trt-fp16")


def test_another_script_or_file_that_it_names_is_another_engine(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    built = install_counted("8.6.0", monkeypatch)
    cache = cache_in(tmp_path / "cache")
    (tmp_path / "scales.txt").write_text("1")
    named = CONFIG + f"SCALES = {str(tmp_path / 'scales.txt')!r}\n"
    for text in (CONFIG, CONFIG, CONFIG + "#\n", named):
        opened(tmp_path, text, cache=cache)
    assert len(built) == 3
    (tmp_path / "scales.txt").write_text("2")
    opened(tmp_path, named, cache=cache)
    assert len(built) == 4


def test_a_run_in_another_process_loads_the_plug_ins_of_the_script(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    install("8.6.0", monkeypatch)
    text = CONFIG + f"open({str(tmp_path / 'loaded')!r}, 'a').write('1')\n"
    session = opened(tmp_path, text, cache=cache_in(tmp_path / "cache"))
    session.run({"x": X})
    assert (tmp_path / "loaded").read_text() == "1", "once in a process"
    runner._SCRIPTS.clear()
    session.run({"x": X})
    assert (tmp_path / "loaded").read_text() == "11"
