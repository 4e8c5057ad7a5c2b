"""Faults of precision: a backend that claims FP32 and computes something else."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from faults.seeding import layers

from cp_debug.backends.base import Program, Session
from cp_debug.backends.emulated import EmulatedBackend
from cp_debug.backends.registry import create
from cp_debug.backends.spec import BackendSpec
from cp_debug.bisect.demos import Fault, Seeded
from cp_debug.graph.operators import PRODUCTS
from cp_debug.recipes.centerpoint.recipe import CenterPointModel


class LoweredBackend(EmulatedBackend):
    """Claims FP32; ``choose`` says which nodes of a program it computes in which other arithmetic."""

    def __init__(self, choose: Callable[[Program], Mapping[str, str]]) -> None:
        super().__init__(BackendSpec.parse("emu-fp32"))
        self._choose = choose

    def open(self, program: Program) -> Session:
        """Make the program ready, with the overrides chosen for it."""
        self.overrides = self._choose(program)
        return super().open(program)


def _tf32() -> Seeded:
    def choose(program: Program) -> dict[str, str]:
        return {node.name: "tf32" for node in program.graph.nodes if node.op in PRODUCTS}

    return Seeded(
        CenterPointModel("tiny"),
        "TF32 in every convolution and matrix product",
        ops=PRODUCTS,
        backends=[create(BackendSpec.parse("torch")), LoweredBackend(choose)],
    )


def _one_layer(layer: str, precision: str) -> Seeded:
    def choose(program: Program) -> dict[str, str]:
        value = layers(program).get(layer)
        return {program.graph.producer[value].name: precision} if value else {}

    return Seeded(
        CenterPointModel("tiny"),
        f"{layer} is computed in {precision.upper()}",
        (layer,),
        backends=[create(BackendSpec.parse("torch")), LoweredBackend(choose)],
    )


PRECISION = (
    Fault("tf32", "TF32 is on, which is the default of several libraries", "differences of 1e-3, up to 2.4",
          _tf32),
    Fault("fp16-layer", "one layer of an FP32 engine runs in FP16", "a difference of 1e-3 from one layer on",
          lambda: _one_layer("pts_backbone.blocks.2.1", "fp16")),
    Fault("bf16-layer", "one layer of an FP32 engine runs in BF16", "a difference of 1e-2 from one layer on",
          lambda: _one_layer("pts_bbox_head.shared_conv.bn", "bf16")),
)  # fmt: skip
