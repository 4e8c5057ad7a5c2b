"""The zoo's runner: its scores are those of the command's JSON, on two tiny networks; its log resumes."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))
from nets import NetBuilder
from wild import run as runner
from wild.cases import all_cases
from wild.edits import Net
from wild.faults import Fault, put, write_faults
from wild.kinds import KINDS
from wild.networks import half
from wild.packaged_kinds import PACKAGED_KINDS
from wild.score import score
from wild.table import markdown
from wild.unusual_kinds import UNUSUAL_KINDS

WILD = Path(runner.__file__).parent


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network with three convolutions; the same with a fault; samples beside both."""
    folder = tmp_path_factory.mktemp("zoo")
    net = NetBuilder(3)
    first = net.op("Relu", net.conv("x", 4, 8, name="first"))
    second = net.op("Relu", net.conv(first, 8, 8, name="second"))
    net.conv(second, 8, 4, name="last")
    net.save(folder / "tiny.onnx", {"x": (1, [1, 4, 8, 8])}, ["last"])
    sample = {"x": np.random.default_rng(0).standard_normal((1, 4, 8, 8)).astype(np.float32)}
    np.savez(folder / "tiny.npz", **sample)
    whole = Net(onnx.load(folder / "tiny.onnx"))
    whole.values = whole.run(sample) | sample
    fault = put(whole, "weights-scaled", "tiny", sample, np.random.default_rng(1), folder)
    assert fault is not None
    (folder / "faults.json").write_text(json.dumps([fault.__dict__]))
    return folder


@pytest.mark.slow
def test_the_runner_logs_each_case_once(zoo: Path, tmp_path: Path) -> None:
    """A healthy network is clean, the fault is named exactly with its cause, a broken file is an error of its own; what
    is in the log is not run again."""
    (zoo / "broken.onnx").write_bytes(b"no model")
    np.savez(zoo / "broken.npz", x=np.zeros(1))
    log = tmp_path / "log.jsonl"
    command = [sys.executable, str(WILD / "run.py"), "run", "--zoo", str(zoo), "--log", str(log)]
    command += ["--only", "ort-basic|fault.*ort-none|tensors"]
    first = subprocess.run(command, capture_output=True, text=True)
    assert first.returncode == 1, first.stderr
    records = {r["network"] + r["group"]: r for r in runner.read_log(log)}
    healthy, broken, fault = records["tinyhealthy"], records["brokenhealthy"], records["tinyfault"]
    values = records["tinytensors"]
    assert (values["verdict"], values["cause"], values["backends"]) == ("exact", "right", "ort")
    assert healthy["verdict"] == "clean"
    assert healthy["layers"] == healthy["replayed"] == 6
    assert (broken["verdict"], broken["exit"]) == ("error", 2)
    assert "broken.onnx" in broken["said"]
    assert (fault["verdict"], fault["cause"], fault["beside"]) == ("exact", "right", 0)
    assert 0 < fault["once"] < fault["cpu"] < 60

    page = markdown(list(records.values()))
    assert "- No answer (exit code other than 0 and 1): **1 of 4**" in page
    assert "| `ort,ort-none` | both | 1 | 1 (100 %) | 1 (100 %) | 0 | 0 |" in page

    with log.open("a") as half_written:
        half_written.write('{"key": "heal')
    args = argparse.Namespace(zoo=zoo, log=log, only="ort-basic", half=None, limit=None, seed=None, quick=False)
    args.again, args.time_limit = False, 60.0
    assert runner.run(args) == 0
    assert len(runner.read_log(log)) == 4


def test_a_case_that_runs_too_long_is_ended(tmp_path: Path) -> None:
    """By a signal: a code above 128."""

    def spin() -> int:
        while True:
            pass

    assert runner.in_child(spin, tmp_path / "said.txt", limit=0.0)[0] > 128


def row(name: str, verdict: str = "guilty", nodes: tuple[str, ...] = ()) -> dict:
    figures = {"introduced": 1.0, "expected": 1.0, "excess": 9.0, "rel_l2": 1.0, "why": "", "skipped": None}
    return {
        "name": name,
        "onnx": name,
        "op": "Conv",
        "verdict": verdict,
        "nodes": list(nodes),
        "side": "test",
        **figures,
    }


FAULT = {"kind": "k", "values": ["b"], "nodes": ["node_b"], "right": ["scaled"], "near": ["affine"]}


@pytest.mark.parametrize(
    ("rows", "cause", "verdict", "grade"),
    [
        ([row("a", "ok"), row("b")], "scaled", "exact", "right"),
        ([row("a"), row("b")], "affine", "named", "near"),
        ([row("relu_b", nodes=("node_b", "relu"))], "padding", "exact", "none"),
        ([row("b", "shape")], "unknown", "exact", "unknown"),
        ([row("b")], "padding", "exact", "wrong"),
        ([row("a")], "scaled", "missed", "none"),
        ([row("b", "inherited")], "scaled", "missed", "none"),
    ],
)
def test_scores_of_a_fault(rows: list[dict], cause: str, verdict: str, grade: str) -> None:
    """The guilty list against the faulty layer, by value or by node; the cause of that layer alone."""
    finding = {"cause": cause, "layers": ["b"], "says": ""}
    block = {"layers": rows, "findings": [finding], "agrees": False, "alignment": {"total": len(rows)}}
    found = score({"fault": FAULT}, 1, block)
    assert (found["verdict"], found["cause"]) == (verdict, grade)


def test_a_guilty_layer_of_a_healthy_network_is_an_accusation() -> None:
    """So is another shape; no JSON is an error."""
    block = {"findings": [], "agrees": False, "alignment": {"total": 2}}
    for verdict in ("guilty", "shape"):
        found = score({"fault": {}}, 1, block | {"layers": [row("a", verdict), row("b", "ok")]})
        assert (found["verdict"], found["guilty"]) == ("accused", ["a"])
    assert score({"fault": {}}, 0, block | {"layers": [row("b", "ok")]})["verdict"] == "clean"
    assert score({"fault": {}}, 70, None)["verdict"] == "error"


def test_every_kind_declares_its_causes(zoo: Path) -> None:
    """A right name at least, and no name both right and near; halves and keys of cases are stable."""
    for name, kind in (KINDS | UNUSUAL_KINDS | PACKAGED_KINDS).items():
        assert kind.right, name
        assert not kind.right & kind.near, name
    cases = list(all_cases(zoo))
    assert len({case.key for case in cases}) == len(cases)
    assert half("resnet.dynamo.fp16") == half("resnet.torchscript")
    assert {half(name) for name in ("resnet", "unet", "vit", "yolo", "gru", "magika")} == {"tuning", "held-out"}


def test_a_network_gets_so_many_faults_and_seldom_kinds_first(zoo: Path, tmp_path: Path) -> None:
    """Of two networks with two faults each, no kind is used twice; each file has its fault's result."""
    for name in ("one", "two"):
        (tmp_path / f"{name}.onnx").write_bytes((zoo / "tiny.onnx").read_bytes())
        (tmp_path / f"{name}.npz").write_bytes((zoo / "tiny.npz").read_bytes())
    assert write_faults(tmp_path, 0, ["one", "two"], each=2) == 4
    faults = json.loads((tmp_path / "faults.json").read_text())
    assert [fault["network"] for fault in faults] == ["one", "one", "two", "two"]
    assert len({fault["kind"] for fault in faults}) == 4


def faulty_run(folder: Path, kind: str, build: str) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], Fault]:
    """The values of a small network, those with a fault of a kind in it, and the fault."""
    net = NetBuilder(3)
    weight = net.weight(net.rng.standard_normal((8, 8)).astype(np.float32))
    if build == "attention":
        scores = net.op("Mul", net.op("MatMul", "x", weight), net.weight(np.float32(0.25)), name="scores")
        net.op("Add", net.op("Softmax", scores, name="shares"), scores, name="last")
    else:
        weight = net.weight(net.rng.standard_normal((8, 2, 3, 3)).astype(np.float32))
        made = net.op("Conv", "x", weight, group=4, pads=[2] * 4, dilations=[2, 2], name="dilated")
        net.op("Erf", made, name="last")
    shape = [1, 8, 8] if build == "attention" else [1, 8, 6, 6]
    net.save(folder / "net.onnx", {"x": (1, shape)}, ["last"])
    sample = {"x": np.random.default_rng(0).standard_normal(shape).astype(np.float32)}
    whole = Net(onnx.load(folder / "net.onnx"))
    whole.values = whole.run(sample) | sample
    fault = put(whole, kind, "net", sample, np.random.default_rng(1), folder)
    assert fault is not None
    return whole.values, Net(onnx.load(folder / fault.file)).run(sample), fault


@pytest.mark.parametrize(
    ("kind", "build", "value"),
    [
        ("scale-missing", "attention", "scores"),
        ("softmax-twice", "attention", "shares"),
        ("residual-dropped", "attention", "last"),
        ("block-transposed", "attention", "matmul"),
        ("dilation-dropped", "convolution", "dilated"),
        ("regrouped", "convolution", "dilated"),
        ("gelu-tanh", "convolution", "last"),
    ],
)
def test_kinds_of_faults_change_the_layer_that_they_name(tmp_path: Path, kind: str, build: str, value: str) -> None:
    """Its values differ, and those in front of it do not."""
    before, after, fault = faulty_run(tmp_path, kind, build)
    struck = fault.values[0]
    assert value in struck or value in fault.nodes[0]
    assert not np.allclose(before[struck], after[struck], rtol=1e-4)
    names = [node.output[0] for node in onnx.load(tmp_path / "net.onnx").graph.node]
    for earlier in names[: names.index(struck)]:
        assert np.array_equal(before[earlier], after[earlier])
