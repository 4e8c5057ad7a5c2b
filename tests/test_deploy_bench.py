"""Latency tables and engine folders."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from nets import read_node, second_like
from test_cli import run
from test_trt_runner import install, save_net

from cp_debug.backends.base import Program
from cp_debug.backends.capabilities import BuildInfo
from cp_debug.backends.registry import create
from cp_debug.backends.spec import BackendSpec
from cp_debug.backends.tensorrt.backend import PrebuiltBackend
from cp_debug.deploy.bench import Latency, timer_of
from cp_debug.deploy.engines import MANIFEST, BuiltEngine, build_engines, check_engines
from cp_debug.errors import InputError
from cp_debug.files import file_hash
from cp_debug.graph.graph import Graph

NETS = """
import torch
def build():
    return torch.nn.Linear(4, 3), torch.ones(2, 4)
"""


@pytest.mark.parametrize(
    ("model", "batch"), [("nets.py:build", 1), pytest.param("centerpoint:tiny", 2, marks=pytest.mark.slow)]
)
def test_bench_times_every_part_of_every_backend(
    model: str, batch: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nets.py").write_text(NETS)
    target = tmp_path / "bench.json"
    code, text = run("bench", model, "-b", "torch,ort", "-n", 2, "--warmup", 0, "--batch", batch, "--json", target)
    assert code == 0
    assert "whole" in text
    found = json.loads(target.read_text())
    assert found["batch"] == batch
    for backend in found["backends"]:
        parts = backend["latency_ms"]
        whole = parts.pop("whole")
        assert list(parts)[-1] == "decode"
        assert sum(each["mean"] for each in parts.values()) == pytest.approx(whole["mean"])
        assert all(0 < each["p50"] <= each["p95"] <= each["p99"] for each in parts.values())
        assert backend["memory_mib"] >= 0


def test_latencies_are_told_in_milliseconds() -> None:
    figures = Latency("net", [k / 1000 for k in range(101)]).figures()
    assert figures == pytest.approx({"mean": 50, "p50": 50, "p95": 95, "p99": 99})


def test_bench_of_nothing_is_refused() -> None:
    code, text = run("bench", "-b", " ,")
    assert code == 2
    assert "--backends: ' ,' names none" in text


def test_a_session_in_another_process_is_asked_for_its_time() -> None:
    runs: list[int] = []

    class Elsewhere:
        def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
            runs.append(1)
            return {"y": inputs["x"]}

        def timings(self, inputs: Mapping[str, np.ndarray], repeats: int) -> list[float]:
            return [9.0, 0.5, 0.25][:repeats]

    timer = timer_of(Elsewhere(), 3)  # type: ignore[arg-type]
    inputs = {"x": np.ones(2)}
    assert [timer(inputs)[1] for _ in range(3)] == [9.0, 0.5, 0.25]  # the first is the one that warms up
    assert len(runs) == 1


VERSIONS = {"tensorrt": "10.9", "gpu": "GPU", "compute_capability": "9.0", "cuda_driver": "12"}


class FakeBackend:
    spec = "trt-fp16"

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def open(self, program: Program) -> Any:
        path = self._folder / "built"
        path.write_bytes(program.name.encode())
        plain = SimpleNamespace(path=path, facts={"seconds": 1.5})
        return SimpleNamespace(plain=plain, build_info=BuildInfo(realised_precision={"Half": 1.0}), close=lambda: None)

    def versions(self) -> dict[str, str]:
        return VERSIONS


@pytest.fixture
def built(tmp_path: Path) -> tuple[Path, list[Program]]:
    graph = Graph(second_like(tmp_path / "net.onnx"))
    programs = [Program("a", graph), Program("b", graph)]
    folder = tmp_path / "engines"
    build_engines(programs, FakeBackend(tmp_path), folder, {"b": "other.engine"})
    return folder, programs


def test_a_sound_folder_is_accepted(built: tuple[Path, list[Program]]) -> None:
    folder, programs = built
    found = check_engines(folder, programs, VERSIONS)
    assert {name: path.name for name, path in found.items()} == {"a": "a.engine", "b": "other.engine"}
    assert not [p for p in folder.iterdir() if p.name.endswith(".partial")]


def test_unsound_folders_are_refused(built: tuple[Path, list[Program]], tmp_path: Path) -> None:
    folder, programs = built
    with pytest.raises(InputError, match=r"tensorrt is '10.9'; here it is '8.6'"):
        check_engines(folder, programs, {**VERSIONS, "tensorrt": "8.6"})
    with pytest.raises(InputError, match=r"gpu is 'GPU'; here it is 'other'"):
        check_engines(folder, programs, {**VERSIONS, "gpu": "other"})
    other = Graph(second_like(tmp_path / "other.onnx", depth=3))
    with pytest.raises(InputError, match="built from another graph"):
        check_engines(folder, [Program("a", other)], VERSIONS)
    (folder / "other.engine").write_bytes(b"x")
    with pytest.raises(InputError, match=r"other.engine: changed since it was built"):
        check_engines(folder, programs, VERSIONS)
    (folder / "other.engine").unlink()
    with pytest.raises(InputError, match="there is no engine of b"):
        check_engines(folder, programs, VERSIONS)
    with pytest.raises(InputError, match="there is no engine of c"):
        check_engines(folder, [Program("c", other)], VERSIONS)
    (folder / MANIFEST).unlink()
    with pytest.raises(InputError, match=f"{MANIFEST}: not the manifest"):
        check_engines(folder, programs, VERSIONS)


def test_a_build_that_fails_leaves_the_folder_as_it_was(built: tuple[Path, list[Program]], tmp_path: Path) -> None:
    class FailsAtTheSecond(FakeBackend):
        def open(self, program: Program) -> SimpleNamespace:
            if program.name == "b":
                raise InputError("TensorRT cannot build it")
            return super().open(program)

    folder, programs = built
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    for target in (folder, tmp_path / "new"):
        with pytest.raises(InputError, match="TensorRT cannot build it"):
            build_engines(programs, FailsAtTheSecond(tmp_path), target)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {"engines"}


def test_engine_files_run_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CPDEBUG_TRT_PYTHON", raising=False)
    install("10.3.0", monkeypatch)
    program = Program("net", Graph(save_net(tmp_path, "1,3,8,8")))
    builder = create(BackendSpec.parse("trt-fp16"))
    folder = tmp_path / "engines"
    build_engines([program], builder, folder)
    x = {"x": np.random.default_rng(0).standard_normal((1, 3, 8, 8)).astype(np.float32)}
    session = PrebuiltBackend(builder, check_engines(folder, [program], builder.versions())).open(program)
    fresh = builder.open(program)
    np.testing.assert_array_equal(session.run(x)["y"], fresh.run(x)["y"])
    assert len(session.timings(x, 4)) == 4
    assert session.settings["engine"].endswith("net.engine")
    session.close()
    fresh.close()


def test_a_part_takes_the_time_that_it_ran(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([10.0, 12.5])
    monkeypatch.setattr("cp_debug.deploy.bench.time.perf_counter", lambda: next(clock))
    session: Any = SimpleNamespace(run=lambda inputs: {"y": inputs["x"] + 1})
    assert timer_of(session, 1)({"x": 1}) == ({"y": 2}, 2.5)  # type: ignore[dict-item,comparison-overlap]


@pytest.mark.parametrize(
    ("shares", "says"), [({"fp16": 0.8, "fp32": 0.2}, "fp16 80%, fp32 20%"), ({}, "types unknown")]
)
def test_types_of_an_engine_in_words(shares: dict[str, float], says: str) -> None:
    assert BuiltEngine("net", "net.engine", "", "", 1.0, shares).types == says


def engine_manifest(folder: Path, program: Any, **changes: Any) -> Path:
    """A folder with an engine of ``program`` and its manifest."""
    folder.mkdir()
    (folder / "net.engine").write_bytes(b"engine")
    entry = {"component": "net", "file": "net.engine", "sha256": file_hash(folder / "net.engine"), "seconds": 1.0}
    entry |= {"onnx_sha256": program.graph.digest, "realised_precision": {"fp16": 1.0}}
    machine = {"tensorrt": "10.3", "gpu": "A", "compute_capability": "9.0"}
    document = {"backend": "trt-fp16@cuda:0", **machine, "engines": [entry | changes]}
    (folder / "engines.json").write_text(json.dumps(document), encoding="utf-8")
    return folder


def test_engines_are_those_of_this_machine_and_these_graphs(tmp_path: Path) -> None:
    read_node(tmp_path, "MatMul", ["x", "w"])
    program: Any = SimpleNamespace(name="net", graph=Graph(tmp_path / "g.onnx"))
    here = {"tensorrt": "10.3", "gpu": "A", "compute_capability": "9.0"}
    folder = engine_manifest(tmp_path / "good", program)
    assert check_engines(folder, [program], here, "trt-fp16") == {"net": folder / "net.engine"}
    assert check_engines(folder, [program], here) == {"net": folder / "net.engine"}
    refused = [
        (folder, here, "trt-int8", r"these are engines of trt-fp16@cuda:0; expected those of trt-int8"),
        (folder, here | {"gpu": "B"}, "", r"gpu is 'A'; here it is 'B'"),
        (folder, here | {"compute_capability": "8.0"}, "", r"compute_capability is '9.0'; here it is '8.0'"),
        (engine_manifest(tmp_path / "b", program, sha256="0"), here, "", "changed since it was built"),
        (engine_manifest(tmp_path / "c", program, onnx_sha256="0"), here, "", "built from another graph than"),
        (engine_manifest(tmp_path / "d", program, component="other"), here, "", "there is no engine of net"),
        (engine_manifest(tmp_path / "e", program, file="gone.engine"), here, "", "there is no engine of net"),
        (tmp_path, here, "", "not the manifest of `cpdebug build`"),
    ]
    for where, versions, backend, says in refused:
        with pytest.raises(InputError, match=says):
            check_engines(where, [program], versions, backend)
