"""Alignments: complete, right, verified by numbers, and stored."""

from __future__ import annotations

import copy
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from nets import NetBuilder
from onnx import TensorProto, numpy_helper
from stress import OUTPUTS, make_stress
from torch import Tensor, nn

from cp_debug.errors import InputError
from cp_debug.graph import exporter_notes
from cp_debug.graph.exporter_notes import enclosing_modules, module_values, scope_hints
from cp_debug.graph.graph import Graph, Node, data_values
from cp_debug.graph.input_values import ways
from cp_debug.probes.alignment import Alignment, Coverage, Link
from cp_debug.programs.align import align
from cp_debug.programs.export import EXPORTERS, export
from cp_debug.recipes.centerpoint.config import get_config
from cp_debug.recipes.centerpoint.model import BackboneNeckHead, build_model

KINDS = list(itertools.product(EXPORTERS, (True, False)))


def assert_complete(alignment: Alignment, graph: Graph) -> None:
    assert alignment.unmatched_values == []
    assert alignment.unmatched_modules == []
    assert [link.onnx for link in alignment.links] == graph.values
    coverage = alignment.coverage()
    assert coverage.values == coverage.values_total == len(graph.values)
    assert coverage.modules == coverage.modules_total
    for name in data_values(graph):
        link = next(link for link in alignment.links if link.onnx == name)
        assert link.kind in ("module", "function", "step", "input")
        assert link.error is not None
        assert link.error < 1e-5


class Noisy(nn.Module):
    """Random numbers of three kinds, in front of layers that must be found all the same."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = self.second(x + torch.rand_like(x) + torch.randn(3, 16))
        return self.third(nn.functional.dropout(x, 0.4, training=True))


def test_layers_behind_random_numbers_are_found(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module, x = Noisy().eval(), torch.randn(3, 8)
    path = export(module, (x,), tmp_path / "n.onnx", input_names=["x"], output_names=["y"])
    alignment = align(Graph(path), module, (x,))
    assert alignment.unmatched_modules == alignment.unmatched_values == []
    assert {"first", "second", "third"} <= {link.layer for link in alignment.links}


@pytest.mark.few(1)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_modules_in_half_precision_are_aligned(tmp_path: Path, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.GELU(), nn.Conv2d(8, 4, 1)]
    module, x = nn.Sequential(*layers).eval().to(dtype), torch.randn(2, 3, 12, 12).to(dtype)
    path = export(module, (x,), tmp_path / "h.onnx", input_names=["x"], output_names=["y"])
    alignment = align(Graph(path), module, (x,))
    assert alignment.unmatched_modules == alignment.unmatched_values == []
    assert {"1", "3", "5"} <= {link.layer for link in alignment.links}


@pytest.mark.few(2)
@pytest.mark.parametrize(("exporter", "folded"), KINDS)
def test_the_stress_model_is_accounted_for(tmp_path: Path, exporter: str, folded: bool) -> None:
    module, image = make_stress()
    path = export(
        module, (image,), tmp_path / "s.onnx", input_names=["x"], output_names=OUTPUTS, exporter=exporter, folded=folded
    )
    graph = Graph(path)
    alignment = align(graph, module, (image,))
    assert_complete(alignment, graph)
    assert (alignment.exporter, alignment.folded) == (exporter, folded)
    for name in (
        "shared",
        "shared@2",
        "shared@3",
        "branches.left",
        "gelu",
        "norm",
        "mlp.3",
        "pair.0",
        "pair.1",
        "/cat",
    ):
        assert alignment.onnx_for(name), name
    for output, name in (("map", "/relu"), ("zero_0", "zeros.0"), ("zero_1", "zeros.1"), ("logits", "/softmax")):
        assert alignment.layer_name(output) == name
    assert alignment.absorbed["drop"] == alignment.absorbed["identity"] == "stem.2"
    assert alignment.absorbed.get("stem.0") == ("stem.1" if folded else None)
    assert alignment.absorbed.get("up") == ("up_norm" if folded and exporter == "dynamo" else None)
    # Numbers and dataflow alone found the modules: the exporter's own record of them must say the same.
    hints = scope_hints(graph, alignment.modules)
    known = [link for link in alignment.links if link.kind == "module" and link.onnx in hints]
    assert len(known) > 15
    folded_away = {"stem.0", "stem.1"}  # TorchScript names the folded result after the convolution
    assert all(hints[k.onnx] == k.path or {hints[k.onnx], k.path} == folded_away for k in known)


@pytest.fixture(scope="module")
def centerpoint() -> nn.Module:
    return build_model(get_config("nus-pillar02"))


@pytest.mark.slow
@pytest.mark.parametrize(("exporter", "folded"), KINDS)
def test_centerpoint_is_accounted_for(tmp_path: Path, centerpoint: nn.Module, exporter: str, folded: bool) -> None:
    options = {"exporter": exporter, "folded": folded}
    encoder, points = centerpoint.pts_voxel_encoder, torch.randn(7, 20, 11)
    path = export(encoder, (points,), tmp_path / "e.onnx", input_names=["p"], output_names=["f"], **options)
    alignment = align(Graph(path), encoder, (points,), prefix="pts_voxel_encoder")
    assert_complete(alignment, Graph(path))
    assert {link.torch for link in alignment.links} >= {
        "pts_voxel_encoder.pfn_layers.0.linear",
        "pts_voxel_encoder.pfn_layers.0.norm",
        "pts_voxel_encoder.pfn_layers.0/relu",
    }

    dense, canvas = BackboneNeckHead(centerpoint).eval(), torch.randn(1, 64, 64, 64)
    names = centerpoint.config.output_names
    path = export(dense, (canvas,), tmp_path / "d.onnx", input_names=["c"], output_names=names, **options)
    alignment = align(Graph(path), dense, (canvas,))
    assert_complete(alignment, Graph(path))
    norms = {n for n, m in dense.named_modules() if isinstance(m, nn.BatchNorm2d)}
    calls = set(alignment.modules)
    assert norms < calls
    assert len(calls) == 204
    if not folded:
        assert alignment.absorbed == {}
        assert {link.torch for link in alignment.links if link.kind == "module"} == calls
        return
    # Every convolution that a BatchNorm follows became part of that BatchNorm's layer; TorchScript keeps one apart.
    assert len(alignment.absorbed) == len(norms) - (exporter == "torchscript")
    assert set(alignment.absorbed.values()) <= norms


def test_a_wrong_graph_is_accounted_for_behind_the_fault_too(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(*(nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.Tanh()) for _ in range(4)))
    image = torch.randn(1, 4, 8, 8)
    path = export(module, (image,), tmp_path / "n.onnx", input_names=["x"], output_names=["y"])
    model = onnx.load(path)
    weight = next(t for t in model.graph.initializer if t.name == "2.0.weight")
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * np.float32(1.02), weight.name))
    onnx.save(model, path)
    graph = Graph(path)
    alignment = align(graph, module, (image,))
    assert [link.torch for link in alignment.links] == ["0.0", "0.1", "1.0", "1.1", "2.0", "2.1", "3.0", "3.1"]
    assert alignment.unmatched_values == alignment.unmatched_modules == []
    assert [(d.onnx, d.torch) for d in alignment.departures] == [(graph.values[4], "2.0")]
    assert alignment.departures[0].error == pytest.approx(0.02, rel=0.5)
    assert max(link.error or 0.0 for link in alignment.links if link.torch != "2.0") < 1e-5


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.dead, self.uncalled = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        self.dead(x)
        return self.used(x)


def test_a_module_whose_result_nobody_reads_is_unused(tmp_path: Path) -> None:
    module, x = Unused().eval(), torch.randn(3, 2)
    graph = Graph(export(module, (x,), tmp_path / "n.onnx", input_names=["x"], output_names=["y"]))
    alignment = align(graph, module, (x,))
    assert_complete(alignment, graph)
    assert list(alignment.unused) == ["dead"]


def test_the_manifest_comes_back_and_belongs_to_one_graph(tmp_path: Path) -> None:
    module, x = nn.Sequential(nn.Linear(3, 4), nn.ReLU()).eval(), torch.randn(2, 3)
    first = Graph(export(module, (x,), tmp_path / "a.onnx", input_names=["x"], output_names=["y"]))
    second = Graph(export(module, (x,), tmp_path / "b.onnx", input_names=["x"], output_names=["z"]))
    alignment = align(first, module, (x,))
    manifest = tmp_path / "a.alignment.json"
    alignment.save(manifest)
    assert Alignment.load(manifest, first) == alignment
    assert json.loads(manifest.read_text())["schema"] == "cpdebug.alignment/1"
    with pytest.raises(InputError, match=r"belongs to another graph than .*b\.onnx"):
        Alignment.load(manifest, second)
    manifest.write_text(manifest.read_text()[:100])
    with pytest.raises(InputError, match="not an alignment manifest"):
        Alignment.load(manifest, first)
    other = copy.deepcopy(module)
    with torch.no_grad():
        other[0].weight += 1
    assert align(first, other, (x,)).module_sha256 != alignment.module_sha256


def test_another_number_of_inputs_is_refused(tmp_path: Path) -> None:
    module, x = nn.ReLU(), torch.randn(2, 3)
    graph = Graph(export(module.eval(), (x,), tmp_path / "a.onnx", input_names=["x"], output_names=["y"]))
    with pytest.raises(InputError, match="takes 1 inputs"):
        align(graph, module, (x, x))


def table(links: dict[str, str | None], **about: Any) -> Alignment:
    """An alignment with these ONNX values → torch values."""
    made = [Link(onnx, "module", onnx, torch) for onnx, torch in links.items()]
    return Alignment("a", "b", made, "", ["m", "n", "o"], {}, **about)


def test_calls_without_a_value_are_not_accounted_for() -> None:
    found = table({"v": "m"}, unmatched_modules=["n"], unmatched_values=["w", "u"]).coverage()
    assert (found.values, found.values_total, found.modules, found.modules_total) == (1, 3, 2, 3)


def test_no_value_is_paired_twice() -> None:
    """Two values of the test equal one torch value that two of the reference equal; one of each stands paired."""
    ours, test = table({"a": "m", "b": "m", "c": "n"}), table({"p": "m", "q": "m", "r": "m", "s": "n"})
    assert ours.twins(test, {"p": "b"}) == {"q": "a", "s": "c"}
    assert ours.twins(test, {"p": "b", "s": "x"}) == {"q": "a"}
    assert ours.twins(test, {}) == {"p": "a", "q": "b", "s": "c"}


def test_how_much_is_accounted_for_is_told_by_kind() -> None:
    told = str(Coverage(3, 4, 2, 5, {"named": 2, "computed": 1}))
    assert told == "3 of 4 values (2 named, 1 computed), 2 of 5 leaf module calls"


def test_modules_are_named_as_torchscript_nests_them() -> None:
    called = {"layers", "layers.0", "layers.0.conv", "head.1"}
    assert exporter_notes._torchscript_scope("layers.0.conv", called) == "/layers/layers.0/conv"
    assert exporter_notes._torchscript_scope("head.1", called) == "/head.1"
    assert exporter_notes._torchscript_scope("layers.0.conv", {"layers.0.conv"}) == "/conv"
    assert exporter_notes._torchscript_scope("layers.0.1", {"layers.0.1"}) == "/layers.0.1"


@pytest.mark.parametrize(
    ("text", "names"),
    [("['a', 'b.c']", ["a", "b.c"]), ("('a',)", []), ("a", []), ("[1]", ["1"]), ("[" * 5000, []), ("'a'", [])],
    ids=["list", "tuple", "name", "number", "deep", "text"],
)
def test_dynamos_scopes_are_lists_of_names(text: str, names: list[str]) -> None:
    node = onnx.helper.make_node("Relu", ["x"], ["y"])
    node.metadata_props.add(key="pkg.torch.onnx.name_scopes", value=text)
    assert exporter_notes._dynamo_scopes(Node.of(0, node)) == names


def test_modules_are_read_off_the_names_that_an_exporter_wrote(tmp_path: Path) -> None:
    assert enclosing_modules("/backbone/blocks.0/blocks.0.3/Conv") == [
        "backbone",
        "backbone.blocks.0",
        "backbone.blocks.0.3",
    ]
    scopes = "['', 'head', 'head.conv', 'aten.conv']"

    def made(text: str, outputs: tuple[str, ...] = ("y",)) -> dict[str, str]:
        net = NetBuilder()
        net.op("Relu", net.op("Neg", "x", name="mid"), name="y")
        for node in net.nodes:
            node.metadata_props.add(key="pkg.torch.onnx.name_scopes", value=text)
        return module_values(Graph(net.save(tmp_path / "n.onnx", {"x": (1, [2])}, list(outputs))))

    assert made(scopes) == {"head": "y", "head.conv": "y"}
    assert made(scopes, ("y", "mid")) == {}  # two values leave
    for strange in ("7", "not python", "{'a': 1}"):
        assert made(strange) == {}


def made(folder: Path, op: str, kind: int = TensorProto.FLOAT, **attributes: Any) -> np.ndarray:
    """What is made up first for an input of 64 elements that ``op`` reads."""
    net = NetBuilder()
    net.op(op, "x", name="y", **attributes)
    graph = Graph(net.save(folder / "n.onnx", {"x": (kind, [4, 16])}, ["y"]))
    way = ways(graph, graph.inputs[0]).ways[0]
    return np.asarray(way.make(np.random.default_rng(0), (4, 16), 99))
