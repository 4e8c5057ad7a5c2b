"""What a search prints for other tools, followed to the letter: one set, in the names of the file that they read."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from extras import needs
from nets import NetBuilder
from test_cli import run

from cp_debug.backends.registry import create
from cp_debug.backends.spec import BackendSpec
from cp_debug.bisect.engine import bisect
from cp_debug.bisect.options import Options
from cp_debug.deploy.config import load_config
from cp_debug.deploy.engines import build_engines
from cp_debug.deploy.stages import Deployment
from cp_debug.errors import InputError
from cp_debug.mixed_precision.result import MixedPrecisionResult, Named, arguments, deploy_fragment
from cp_debug.programs.pipeline import with_kept
from cp_debug.serialize import decode

GOAL = "rel_l2<5e-3"
HEADS = (
    "polygraphy (",
    "trtexec (",
    "ModelOpt AutoCast",
    "the files with these names",
    "configuration of cpdebug deploy",
)
MODULE = """
import torch
class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = torch.nn.Linear(16, 16), torch.nn.Linear(16, 4)
    def forward(self, x):
        x = torch.relu(self.first(x)) + 1000
        return self.last(x - x.mean(-1, keepdim=True))
def build():
    torch.manual_seed(0)
    return Net().eval(), torch.randn(8, 16)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def offset(path: Path) -> Path:
    """A mean taken off behind + 1000; beside it a product that costs little."""
    net = NetBuilder()
    x = net.op("MatMul", "x", net.weight(net.rng.standard_normal((16, 16)).astype(np.float32)), name="first")
    shifted = net.op("Add", x, net.weight(np.array(1000, np.float32)), name="shift")
    centred = net.op("Sub", shifted, net.op("ReduceMean", shifted, name="mean", axes=[-1]), name="sub")
    net.op("MatMul", centred, net.weight(net.rng.standard_normal((16, 4)).astype(np.float32)), name="y")
    np.savez(path.with_suffix(".npz"), x=net.rng.standard_normal((8, 16)).astype(np.float32))
    return net.save(path, {"x": (1, [8, 16])}, ["y"])


def searched(*arguments: object) -> tuple[dict[str, str], dict[str, Any]]:
    """(Head → the lines below it, the JSON document), of the command as it is printed."""
    code, text = run("search", *arguments, "-b", "ort,emu-fp16", "--goal", GOAL, "--json", "found.json")
    assert code == 0, text
    told: dict[str, list[str]] = defaultdict(list)
    head = ""
    for line in text.splitlines():
        head = next((h for h in HEADS if line.startswith(h)), head)
        if head and not line.startswith(head):
            told[head].append(line)
    return {h: "\n".join(lines) for h, lines in told.items()}, json.loads(Path("found.json").read_text())


def names_in(told: Mapping[str, str]) -> dict[str, tuple[str, set[str]]]:
    """Tool → (file, nodes) of its printed line."""
    words = {head: shlex.split(line.splitlines()[0]) for head, line in told.items() if not line.startswith("export")}
    polygraphy, trtexec, autocast = (words[head] for head in HEADS[:3])
    listed = dict(w.split("=", 1) for w in trtexec if "=" in w)
    assert listed["--layerPrecisions"] == listed["--layerOutputTypes"]
    patterns = autocast[autocast.index("--nodes_to_exclude") + 1 :]
    file = autocast[autocast.index("--onnx_path") + 1]
    matched = {n.name for n in onnx.load(file).graph.node if any(re.match(pattern, n.name) for pattern in patterns)}
    layers = polygraphy[polygraphy.index("--layer-precisions") + 1 :]
    return {
        "polygraphy": (polygraphy[2], {layer.rpartition(":")[0] for layer in layers}),
        "trtexec": (listed["--onnx"], {n.rpartition(":")[0] for n in listed["--layerPrecisions"].split(",")}),
        "autocast": (file, matched),
    }


def test_every_tool_is_told_the_same_set_by_the_names_of_the_file(folder: Path) -> None:
    path = offset(folder / "part.onnx")
    told, document = searched("part.onnx", "--inputs", path.with_suffix(".npz"))
    wanted = set(document["keep"]["part"])
    assert "node_shift" in wanted
    assert wanted <= {node.name for node in onnx.load(path).graph.node}
    assert names_in(told) == dict.fromkeys(("polygraphy", "trtexec", "autocast"), ("part.onnx", wanted))
    assert decode(MixedPrecisionResult, document, "found").arguments == document["arguments"]


@pytest.mark.slow
@needs("modelopt")
def test_autocast_does_what_is_printed_and_it_reaches_the_goal(folder: Path) -> None:
    path = offset(folder / "part.onnx")
    told, document = searched("part.onnx", "--inputs", path.with_suffix(".npz"))
    command = shlex.split(told["ModelOpt AutoCast"])
    subprocess.run([sys.executable, *command[1:]], check=True, capture_output=True, cwd=folder)
    (mixed,) = (file for file in folder.glob("*.onnx") if file != path)
    assert "Cast" in {n.op_type for n in onnx.load(mixed).graph.node}
    options = Options(inputs=path.with_suffix(".npz"), explain=False)
    (test,) = bisect(str(path), "ort,ort", test_model=mixed, options=options).tests
    assert document["baseline"]["figures"]["rel_l2"] > 5e-3 > test.outputs[0].stats.rel_l2


@pytest.mark.slow
def test_a_modules_set_holds_in_the_export_that_is_printed_and_in_deploys_own(folder: Path) -> None:
    (folder / "net.py").write_text(MODULE)
    told, document = searched("net.py:build")
    ((component, wanted),) = document["keep"].items()
    (folder / "deploy.yaml").write_text(
        f"model: {folder / 'net.py'}:build\nwork_dir: {folder / 'work'}\n{told['configuration of cpdebug deploy']}\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "400")
        code, text = run(*shlex.split(told["the files with these names"])[1:])
    assert code == 0, text
    assert names_in(told)["trtexec"] == (f"{component}.onnx", set(wanted))
    assert set(wanted) <= {node.name for node in onnx.load(f"{component}.onnx").graph.node}
    config = load_config(folder / "deploy.yaml")
    assert config.tensorrt.keep_fp32 == wanted
    deployment = Deployment(config, "deploy.yaml", lambda *_: None)
    deployment.ensure_files()
    programs = deployment.programs()
    backend: Any = create(BackendSpec.parse("emu-fp16"))
    kept = with_kept(backend.keeping(frozenset(config.tensorrt.keep_fp32)), programs)
    assert kept[component].keep_fp32 == set(wanted)  # type: ignore[attr-defined]
    told_by = r"^deploy\.yaml: tensorrt\.keep_fp32: no layer and no ONNX node is called 'node_none'"
    with pytest.raises(InputError, match=told_by):
        build_engines(programs, backend.keeping(frozenset(["node_none"])), folder, kept_by=deployment.kept_by)
    x = torch.randn(8, 16, generator=torch.Generator().manual_seed(1)).numpy()
    np.savez(folder / "x.npz", **{programs[0].graph.inputs[0].name: x})
    file = str(programs[0].graph.path)
    (before,) = bisect(file, "ort,emu-fp16", options=Options(inputs=folder / "x.npz", explain=False)).tests
    sides = [create(BackendSpec.parse("ort")), backend.keeping(frozenset(wanted))]
    (after,) = bisect(file, sides, options=Options(inputs=folder / "x.npz", explain=False)).tests
    assert before.outputs[0].stats.rel_l2 > 5e-3 > after.outputs[0].stats.rel_l2


def test_nodes_without_a_name_of_their_own_are_told_to_no_tool(folder: Path) -> None:
    path = offset(folder / "part.onnx")
    proto = onnx.load(path)
    for node in proto.graph.node:
        node.name = ""
    onnx.save(proto, path)
    told, document = searched("part.onnx", "--inputs", path.with_suffix(".npz"))
    assert document["reached"]
    assert document["arguments"] == {}
    assert set(told) == {"configuration of cpdebug deploy"}  # which names nodes as this program does


def test_tensorrt_11_is_told_no_flags_that_it_no_longer_has() -> None:
    named = Named({"net": "net.onnx"})
    assert set(arguments({"net": ["a"]}, "fp16", named)["net"]) == {"polygraphy", "trtexec", "autocast"}
    assert set(arguments({"net": ["a"]}, "fp16", named, weak=False)["net"]) == {"autocast"}


def test_the_export_stands_in_the_configuration(folder: Path) -> None:
    fragment = deploy_fragment({"net": ["n"]}, "bf16", Named({"net": "net.onnx"}, "dynamo", 18))
    (folder / "deploy.yaml").write_text(f"model: centerpoint:tiny\nwork_dir: {folder}\n{fragment}")
    config = load_config(folder / "deploy.yaml")
    assert (config.export.exporter, config.export.opset, config.tensorrt.keep_fp32) == ("dynamo", 18, ["n"])


@pytest.mark.parametrize("target", ["trt-8.6", "trt-11"])
def test_a_prediction_names_nodes_of_the_export_that_it_prints(folder: Path, target: str) -> None:
    (folder / "net.py").write_text(MODULE)
    code, text = run("predict", "net.py:build", "--target", target, "--json", "p.json")
    assert code == 1, text
    document = json.loads((folder / "p.json").read_text())
    ((component, wanted),) = document["keep"].items()
    assert [layer["name"] for layer in document["layers"] if layer["keep"]], "a layer of the table has them"
    assert ("trtexec (" in text) == (target != "trt-11")
    head = text.splitlines().index("the files with these names:")
    code, said = run(*shlex.split(text.splitlines()[head + 1])[1:])
    assert code == 0, said
    assert set(wanted) <= {node.name for node in onnx.load(f"{component}.onnx").graph.node}
