"""The seeded faults by themselves: each spoils what it says, and nothing else."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from faults import edits
from faults.catalog import FAULTS
from faults.edits import Editor
from faults.seeding import layers
from nets import NetBuilder

from cp_debug.bisect.demos import Seeded
from cp_debug.recipes.centerpoint.recipe import BACKBONE_NECK_HEAD, ENCODER


def changes(seeded: Seeded) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Tensor of the network → what it is in the reference and in the test, where these differ."""
    ours, theirs = (model.network.state_dict() for model in (seeded.model, seeded.test_model))  # type: ignore[union-attr]
    assert ours.keys() == theirs.keys()
    return {n: (ours[n], theirs[n]) for n in ours if not torch.equal(ours[n], theirs[n])}


def test_one_convolutions_weights_are_two_percent_too_large() -> None:
    found = changes(FAULTS["weight-scale"].seed())
    ((ours, theirs),) = found.values()
    assert list(found) == ["pts_backbone.blocks.1.3.weight"]
    assert torch.allclose(theirs, ours * 1.02, rtol=1e-6)


def test_one_norm_has_torchs_epsilon() -> None:
    seeded = FAULTS["bn-eps"].seed()
    assert changes(seeded) == {}
    pairs = [
        (name, norm.eps, seeded.test_model.network.get_submodule(name).eps)  # type: ignore[union-attr]
        for name, norm in seeded.model.network.named_modules()
        if isinstance(norm, torch.nn.BatchNorm2d)
    ]
    assert [pair for pair in pairs if pair[1] != pair[2]] == [("pts_backbone.blocks.0.4", 1e-3, 1e-5)]


def test_one_norm_has_the_statistics_that_it_was_built_with() -> None:
    found = {n: theirs for n, (_, theirs) in changes(FAULTS["stale-statistics"].seed()).items()}
    assert {n.removeprefix("pts_neck.deblocks.2.1.") for n in found} >= {"running_mean", "running_var"}
    assert all(n.startswith("pts_neck.deblocks.2.1.") for n in found)
    assert bool((found["pts_neck.deblocks.2.1.running_mean"] == 0).all())
    assert bool((found["pts_neck.deblocks.2.1.running_var"] == 1).all())


def test_length_and_width_change_places() -> None:
    found = changes(FAULTS["swapped-dimensions"].seed())
    assert {n.rpartition(".")[0] for n in found} == {"pts_bbox_head.task_heads.0.dim.1"}
    for ours, theirs in found.values():
        assert torch.equal(theirs[[1, 0, 2]], ours)


def nodes(*ops: str) -> Any:
    """A program of nodes by operator; the value of each is called as it is, and its layer ``layer.NUMBER``."""
    made = [SimpleNamespace(name=f"node_{i}", op=op, outputs=(f"v{i}",)) for i, op in enumerate(ops)]
    alignment = SimpleNamespace(layer_name=lambda value: LAYERS.get(value, ""))
    graph = SimpleNamespace(nodes=made, producer={node.outputs[0]: node for node in made})
    return SimpleNamespace(name="net", graph=graph, alignment=alignment)


LAYERS = {"v1": "pts_backbone.blocks.2.1", "v2": "pts_bbox_head.shared_conv.bn"}


def test_a_lowered_backend_claims_fp32_and_computes_some_nodes_otherwise() -> None:
    program = nodes("Conv", "Relu", "BatchNormalization", "MatMul")
    assert layers(program) == {name: value for value, name in LAYERS.items()}
    chosen = {}
    for name in ("tf32", "fp16-layer", "bf16-layer"):
        backend = FAULTS[name].seed().backends[1]
        assert (backend.precision, str(backend.spec)) == ("fp32", "emu-fp32")  # type: ignore[union-attr]
        chosen[name] = backend._choose(program)  # type: ignore[union-attr]
    assert chosen["tf32"] == {"node_0": "tf32", "node_3": "tf32"}
    assert (chosen["fp16-layer"], chosen["bf16-layer"]) == ({"node_1": "fp16"}, {"node_2": "bf16"})


@pytest.mark.parametrize("name", ["features-reshaped", "features-transposed"])
def test_glue_feeds_the_encoder_something_else_of_the_same_shape(name: str) -> None:
    seeded = FAULTS[name].seed()
    sample = next(seeded.model.samples(1, 0, None))
    component = next(c for c in seeded.model.components if c.name == ENCODER)
    ours, theirs = (m.feed(component, sample, {}) for m in (seeded.model, seeded.test_model))  # type: ignore[union-attr]
    assert ours.keys() == theirs.keys()
    a, b = ours["input_features"], theirs["input_features"]
    assert a.shape == b.shape
    assert [n for n in ours if not np.array_equal(ours[n], theirs[n])] == ["input_features"]
    if name == "features-transposed":
        assert np.array_equal(b.reshape(a.shape[0], a.shape[2], a.shape[1]).transpose(0, 2, 1), a)


def test_the_head_without_sigmoid_decodes_probabilities_as_they_were() -> None:
    seeded = FAULTS["missing-sigmoid"].seed()
    modules = [
        next(c.module for c in model.components if c.name == BACKBONE_NECK_HEAD)
        for model in (seeded.model, seeded.test_model)  # type: ignore[union-attr]
    ]
    names = next(c.output_names for c in seeded.model.components if c.name == BACKBONE_NECK_HEAD)
    x = torch.zeros(1, next(modules[1].parameters()).shape[1], 32, 32)
    with torch.no_grad():
        probabilities, logits = (module(x) for module in modules)
    for name, one, other in zip(names, probabilities, logits, strict=True):
        assert torch.allclose(one, other.sigmoid() if name.endswith("heatmap") else other), name


def test_a_fault_strikes_its_layers_or_its_operators() -> None:
    seeded = Seeded(SimpleNamespace(), "where", ("a",), ("Conv",))  # type: ignore[arg-type]
    assert [seeded.strikes(*row) for row in (("a", "Relu"), ("b", "Conv"), ("b", "Relu"))] == [True, True, False]


def test_another_epsilon_leaves_the_other_attributes(tmp_path: Path) -> None:
    net = NetBuilder()
    for name in ("scale", "bias"):
        net.weight(np.ones(4, np.float32), name)
    net.op("LayerNormalization", "x", "scale", "bias", name="y", axis=-1, epsilon=1e-5)
    path = net.save(tmp_path / "n.onnx", {"x": (1, [2, 4])}, ["y"])
    editor = Editor(path)
    edits.epsilon(editor, "y", 1e-2)
    found = {a.name: a.i or a.f for a in editor.node("y").attribute}
    assert found == {"axis": -1, "epsilon": pytest.approx(1e-2)}
