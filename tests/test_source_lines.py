"""Source lines of layers: told where the export knows them, and never with a folder of the machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
from onnx import helper

from cp_debug.graph.exporter_notes import quotes_source, shortened, source_line

CODE = """
import torch
from torch import nn


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.parts = nn.ModuleList([nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1)])

    def forward(self, x):
        y = self.parts[0](x)
        big = torch.relu(y) * 1e6
        return self.parts[1](big)


def build():
    torch.manual_seed(0)
    return nn.Sequential(Block()).eval(), (torch.randn(1, 3, 8, 8),)
"""


@pytest.mark.slow
@pytest.mark.parametrize("exporter", ["dynamo", "torchscript"])
def test_the_report_names_the_line(exporter: str, tmp_path: Path) -> None:
    (tmp_path / "nets.py").write_text(CODE)
    command = ["bisect", "nets.py:build", "-b", "torch,emu-fp16", "--exporter", exporter]
    command += ["--save", "kept", "--html", "report.html"]
    done = subprocess.run(
        [sys.executable, "-m", "cp_debug", *command],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=os.environ | {"COLUMNS": "120"},
    )
    assert done.returncode == 1, done.stdout + done.stderr
    says = {"dynamo": "nets.py:13: big = torch.relu(y) * 1e6", "torchscript": "nets.py:11: Block.forward"}[exporter]
    assert says in done.stdout
    assert f"<dt>source</dt><dd>{says}</dd>" in (tmp_path / "report.html").read_text()
    document = json.loads((tmp_path / "kept" / "result.json").read_text())
    sources = [row["source"] for row in document["tests"][0]["layers"] if row["source"]]
    assert says in sources
    assert says in [finding["source"] for finding in document["tests"][0]["findings"]]
    assert not [line for line in sources if str(tmp_path) in line or "torch/nn" in line]


def node(**metadata: str) -> onnx.NodeProto:
    made = helper.make_node("Relu", ["x"], ["y"])
    for key, value in metadata.items():
        made.metadata_props.add(key=f"pkg.torch.onnx.{key}", value=value)
    return made


def test_the_innermost_line_that_is_not_of_torch() -> None:
    trace = (
        'File "/home/me/work/net.py", line 14, in forward\n    return self.b(x) + 1\n'
        '  File "/usr/lib/python3/site-packages/transformers/models/bert.py", line 7, in forward\n    y = self.c(x)\n'
        '  File "/usr/lib/python3/site-packages/torch/nn/modules/conv.py", line 565, in forward\n    return f(x)'
    )
    assert source_line(node(stack_trace=trace)) == "transformers/models/bert.py:7: y = self.c(x)"
    assert source_line(node(name_scopes="['']")) == ""
    of_torch = 'File "/a/site-packages/torch/nn/modules/conv.py", line 565, in forward\n    return f(x)'
    assert source_line(node(stack_trace=of_torch)) == ""
    verbose = node()
    verbose.doc_string = "/a/site-packages/torch/nn/functional.py(3): relu\n/home/me/work/net.py(8): forward\n"
    assert source_line(verbose) == "work/net.py:8"


def test_what_a_hostile_file_says_stays_one_short_line() -> None:
    line = source_line(node(stack_trace=f'File "/n.py", line 1, in f\n    {"x" * 9999}\x1b[31m'))
    assert len(line) <= 160
    assert "\x1b" not in line
    assert source_line(node(stack_trace='File "' * 1000)) == ""


def test_folders_of_a_machine_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert shortened(str(tmp_path / "models" / "deep" / "net.py")) == "models/deep/net.py"
    assert shortened("/home/me/secret/net.py") == "secret/net.py"
    assert shortened("C:\\Users\\me\\nets\\net.py") == "nets/net.py"
    assert shortened("net.py") == "net.py"


TRACE = """File "/home/me/nets/net.py", line 8, in forward
    y = self.inner(x)
File "/home/me/nets/inner.py", line 3, in forward
    return torch.relu(x)
File "/usr/lib/python3/site-packages/torch/nn/functional.py", line 99, in relu
    result = torch.relu(input)
"""


@pytest.mark.parametrize(
    ("trace", "doc", "line"),
    [
        (TRACE, "", "nets/inner.py:3: return torch.relu(x)"),
        ("", "/home/me/nets/net.py(8): forward\n/usr/lib/site-packages/torch/nn/module.py(5): call\n", "nets/net.py:8"),
        ("", "/usr/lib/site-packages/torch/nn/module.py(5): call\n/a/b/net.py(7): f\n", "b/net.py:7"),
        ("", "nothing of the kind", ""),
    ],
)
def test_the_innermost_line_of_the_network_itself(trace: str, doc: str, line: str) -> None:
    node = helper.make_node("Relu", ["x"], ["y"], doc_string=doc)
    if trace:
        node.metadata_props.add(key="pkg.torch.onnx.stack_trace", value=trace)
    assert source_line(node) == line
    assert quotes_source(node) == bool(line)
