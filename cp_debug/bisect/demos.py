"""The known faults of ``cpdebug demo``: each is put into ``centerpoint:tiny``, with its symptom in the field."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from cp_debug.graph.operators import PRODUCTS
from cp_debug.recipes.base import Arrays, Component, Model, Sample
from cp_debug.recipes.centerpoint.model import BackboneNeckHead, CenterPoint
from cp_debug.recipes.centerpoint.recipe import BACKBONE_NECK_HEAD, ENCODER, CenterPointModel

if TYPE_CHECKING:
    from cp_debug.backends.base import Backend, Program, Session

Rewrite = Callable[["list[Program]", Path], "list[Program]"]
"""Makes the programs under test from the reference's, and a folder for new files."""


@dataclass
class Seeded:
    """A fault put into a model, ready for ``bisect``."""

    model: Model
    """Reference model; runs under both backends when the fault needs the precision under test to show."""
    where: str
    """Fault and its place, in words."""
    layers: Sequence[str] = ()
    """The names of the layers at fault, as the tables print them."""
    ops: Sequence[str] = ()
    """Every layer of these operators is at fault, instead of ``layers``."""
    test_model: Model | Rewrite | None = None
    backends: str | Sequence[Backend] = "torch,ort"

    def strikes(self, name: str, op: str) -> bool:
        """Whether the layer ``name``, made by the operator ``op``, is one of those at fault."""
        return name in self.layers or op in self.ops


@dataclass(frozen=True)
class Fault:
    """A known fault in the built-in model."""

    name: str
    summary: str
    """Fault in a few words."""
    symptom: str
    """Symptom in the field."""
    seed: Callable[[], Seeded] = field(repr=False)
    """Function that puts the fault into a fresh model."""


def changed(change: Callable[[CenterPoint], None], where: str, *layers: str) -> Seeded:
    """The fault of a model changed by ``change`` and exported anew."""
    test = CenterPointModel("tiny")
    change(test.network)
    return Seeded(CenterPointModel("tiny"), where, layers, test_model=test)


def fed_by(test: type[CenterPointModel], where: str) -> Seeded:
    """The fault of other glue around the same components."""
    model, fed = CenterPointModel("tiny"), test("tiny")
    fed.components = model.components
    return Seeded(model, where, ("input_features",), test_model=fed)


def _weight_scale(network: CenterPoint) -> None:
    network.get_parameter("pts_backbone.blocks.1.3.weight").data *= 1.02


class _Refed(CenterPointModel):
    """Feeds the pillar encoder its own output, repeated to the shape of its input."""

    def feed(self, component: Component, sample: Sample, results: Mapping[str, Arrays]) -> dict[str, np.ndarray]:
        inputs = super().feed(component, sample, results)
        if component.name == ENCODER:
            features = inputs["input_features"]
            with torch.no_grad():
                pillars = self.network.pts_voxel_encoder(torch.from_numpy(features)).numpy()
            inputs["input_features"] = np.resize(pillars, features.shape)
        return inputs


class _RawScores(CenterPointModel):
    """Decodes heatmaps as scores, as they come: the sigmoid belongs to the network."""

    def decode(self, sample: Sample, results: Mapping[str, Arrays]) -> Any:
        maps = {
            name: torch.logit(torch.from_numpy(values), eps=1e-7).numpy() if name.endswith("heatmap") else values
            for name, values in results[BACKBONE_NECK_HEAD].items()
        }
        return super().decode(sample, {**results, BACKBONE_NECK_HEAD: maps})


class _Probabilities(BackboneNeckHead):
    """Heatmaps as probabilities."""

    def forward(self, spatial_features: Tensor) -> tuple[Tensor, ...]:
        maps = self.pts_bbox_head(self.pts_neck(self.pts_backbone(spatial_features)))
        return tuple(t.sigmoid() if name.endswith("heatmap") else t for name, t in maps.items())


def _missing_sigmoid() -> Seeded:
    model = _RawScores("tiny")
    model.components = tuple(
        replace(c, module=_Probabilities(model.network).eval()) if c.name == BACKBONE_NECK_HEAD else c
        for c in model.components
    )
    where = "the exported heads end in logits; the reference's heatmaps are probabilities"
    return Seeded(model, where, ops=("Sigmoid",), test_model=_RawScores("tiny"))


_CHAIN = tuple(
    (f"pts_backbone.blocks.{c}", f"pts_backbone.blocks.{n}")
    for c, n in (("1.0", "1.1"), ("1.3", "1.4"), ("1.6", "1.7"), ("2.0", "2.1"))
)
"""Convolution and BatchNorm of successive layers of the backbone, each read by the next one …"""
_ALSO = {"pts_backbone.blocks.1.7": "pts_neck.deblocks.1.0"}
"""BatchNorm that ends a block of the backbone → convolution of the neck that reads it."""


def _rescaled(scales: Sequence[float], where: str, layer: str) -> Seeded:
    """The fault of a model whose inner values are multiplied by ``scales``, layer after layer.

    Its function is the same: with powers of two bit for bit in FP32. Both backends run it; FP16 cannot.
    """
    model = CenterPointModel("tiny")
    before = 1.0
    for (convolution, norm), after in zip(_CHAIN, scales, strict=False):
        _parameter(model.network, convolution, "weight").div_(before)
        for name in ("weight", "bias"):
            _parameter(model.network, norm, name).mul_(after)
        if norm in _ALSO:
            _parameter(model.network, _ALSO[norm], "weight").div_(after)
        before = after
    return Seeded(model, where, (layer,), backends="torch,emu-fp16")


def _in_tf32() -> Seeded:
    from cp_debug.backends.emulated import EmulatedBackend
    from cp_debug.backends.registry import create
    from cp_debug.backends.spec import BackendSpec

    class ClaimsFP32(EmulatedBackend):
        def open(self, program: Program) -> Session:
            self.overrides = {node.name: "tf32" for node in program.graph.nodes if node.op in PRODUCTS}
            return super().open(program)

    backends = [create(BackendSpec.parse("torch")), ClaimsFP32(BackendSpec.parse("emu-fp32"))]
    where = "TF32 in every convolution and matrix product"
    return Seeded(CenterPointModel("tiny"), where, ops=[*PRODUCTS], backends=backends)


def _parameter(network: CenterPoint, path: str, name: str) -> Tensor:
    module: nn.Module = network.get_submodule(path)
    return module.get_parameter(name).data


_ALL = (
    Fault("tf32", "TF32 is on, which is the default of several libraries", "differences of 1e-3, up to 2.4",
          _in_tf32),
    Fault("weight-scale", "one convolution's weights are 2 % too large", "slightly worse scores, nothing broken",
          lambda: changed(_weight_scale, "weights of blocks.1.3 (BatchNorm: .1.4) × 1.02", "pts_backbone.blocks.1.4")),
    Fault("features-reshaped", "the pillar encoder is fed its own output, reshaped", "a maximum difference near 100",
          lambda: fed_by(_Refed, "input_features are pillar features of the right shape")),
    Fault("missing-sigmoid", "the sigmoid of the heatmaps was left out", "zero detections, or thousands",
          _missing_sigmoid),
    Fault("fp16-overflow", "activations beyond 65504 in a network that is right in FP32", "NaN boxes, only in FP16",
          lambda: _rescaled((2.0**13, 2.0**6, 1.0), "pts_backbone.blocks.1.1 × 8192, undone by the next two layers",
                            "pts_backbone.blocks.1.1")),
    Fault("fp16-underflow", "activations that vanish in FP16", "weak objects disappear, only in FP16",
          lambda: _rescaled((2.0**-10, 2.0**-18, 2.0**-8, 1.0),
                            "pts_backbone.blocks.1.4 ÷ 262144, compensated before and after",
                            "pts_backbone.blocks.1.4")),
)  # fmt: skip
DEMOS: dict[str, Fault] = {fault.name: fault for fault in _ALL}
