"""Nodes that stay in FP32 on emulated backends, and the advice to try it."""

from __future__ import annotations

import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
from faults import edits
from faults.edits import Editor
from nets import residual
from test_cli import run

from cp_debug.backends.base import Program
from cp_debug.backends.capabilities import kept_in_fp32
from cp_debug.backends.emulated import EmulatedBackend
from cp_debug.backends.registry import create
from cp_debug.backends.spec import BackendSpec
from cp_debug.bisect.engine import bisect
from cp_debug.errors import InputError
from cp_debug.graph.graph import Graph
from cp_debug.programs.layers import layers_of
from cp_debug.programs.pipeline import with_kept


@pytest.fixture(scope="module")
def overflowing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network whose activations between two convolutions are beyond FP16's range."""
    folder = tmp_path_factory.mktemp("nets")
    path = residual(folder / "net.onnx")
    graph = Graph(path)
    relu = [node for node in graph.nodes if node.op == "Relu"][1]
    above, below = graph.producer[relu.inputs[0]], graph.consumers[relu.outputs[0]][0]
    editor = Editor(path)
    edits.rescale(editor, above.outputs[0], below.outputs[0], 2.0**15)
    return editor.save(folder / "overflowing.onnx")


def kept(spec: str, *nodes: str) -> EmulatedBackend:
    backend = create(BackendSpec.parse(spec))
    assert isinstance(backend, EmulatedBackend)
    return backend.keeping(nodes)


def test_the_advice_for_an_overflow_removes_it(overflowing: Path) -> None:
    before = bisect(str(overflowing), "ort,emu-fp16").tests[0]
    (finding,) = [finding for finding in before.findings if finding.cause == "fp16-overflow"]
    names = finding.evidence["keep_fp32"]
    flags = [part for name in names for part in ("--keep-fp32", name)]
    told = f"keep in FP32: {shlex.join(flags)}: {finding.evidence['after']:.2g} (inf before), emulated"
    assert finding.fix == told
    assert len(names) == 3  # a convolution, its ReLU, and the convolution that makes the values small again
    after = bisect(str(overflowing), [create(BackendSpec.parse("ort")), kept("emu-fp16", *names)]).tests[0]
    assert not any(row.replay and row.replay.new_nonfinite for row in after.rows)
    assert "fp16-overflow" not in [finding.cause for finding in after.findings]
    assert all(row.within for row in after.outputs)
    assert max(row.stats.rel_l2 for row in after.outputs) == pytest.approx(finding.evidence["after"], rel=1e-3)
    code, text = run("bisect", overflowing, "-b", "ort,emu-fp16", *flags)
    assert code in (0, 1)
    assert "FP16 overflow" not in " ".join(text.split())


def test_a_kept_node_computes_in_fp32_and_the_others_do_not(tmp_path: Path) -> None:
    path = residual(tmp_path / "net.onnx")
    conv = [node for node in Graph(path).nodes if node.op == "Conv"][1]
    rows = {
        row.onnx: row
        for row in bisect(str(path), [create(BackendSpec.parse("ort")), kept("emu-bf16", conv.name)]).tests[0].rows
    }
    others = [row for row in rows.values() if row.op == "Conv" and row.onnx not in conv.outputs]
    assert rows[conv.outputs[0]].replay.introduced < 1e-6
    assert all(row.replay.introduced > 1e-3 for row in others)


@pytest.mark.slow
def test_layers_are_kept_by_their_names_in_the_tables() -> None:
    layer = "pts_backbone.blocks.0.1"
    backends = [create(BackendSpec.parse("torch")), kept("emu-bf16", layer)]
    rows = {row.name: row for row in bisect("centerpoint:tiny", backends).tests[0].rows}
    assert rows[layer].replay.introduced < 1e-6
    assert rows["pts_backbone.blocks.0.4"].replay.introduced > 1e-3


def test_a_node_is_kept_in_its_own_component(tmp_path: Path) -> None:
    """Exporters give nodes of different files one name: ``node_conv2d`` stands in every part of a detector."""
    program = Program("one", Graph(residual(tmp_path / "net.onnx")))
    programs = [program, replace(program, name="two")]
    conv, other = [node.name for node in program.graph.nodes if node.op == "Conv"][:2]

    def chosen(*names: str) -> dict[str, frozenset[str]]:
        return {name: kept_in_fp32(each) for name, each in with_kept(kept("emu-bf16", *names), programs).items()}

    assert chosen(f"two/{conv}") == {"one": frozenset(), "two": {conv}}
    assert chosen(f"one/{conv}", other) == {"one": {conv, other}, "two": {other}}
    layer = next(layer for layer in layers_of(programs) if layer.component == "two" and layer.op == "Conv")
    assert chosen(layer.name)["two"] == {conv}
    with pytest.raises(InputError, match="no layer and no ONNX node is called 'three/"):
        chosen(f"three/{conv}")


@pytest.mark.parametrize("name", ["node_conv_99", "no such name at all"])
def test_a_misspelt_node_is_refused_with_the_nearest(tmp_path: Path, name: str) -> None:
    path = residual(tmp_path / "net.onnx")
    code, text = run("bisect", path, "-b", "ort,emu-fp16", "--keep-fp32", name)
    assert code == 2
    assert re.search(rf"--keep-fp32: no layer and no ONNX node is called '{name}'; (did you mean|some are) \w+", text)
    code, again = run("capture", path, "-b", "emu-fp16", "-o", tmp_path / "out", "--keep-fp32", name)
    assert (code, again) == (code, text)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("spec", ["emu-fp32", "emu-int8"])
def test_where_it_would_change_nothing_it_is_refused(spec: str) -> None:
    with pytest.raises(InputError, match="compute in it already"):
        kept(spec, "a")
