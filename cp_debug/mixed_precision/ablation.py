"""Ablation: single layers of a test backend compute in FP32, and what that brings back is measured.

A layer is given its exact values by computing it in FP32 from the inputs that it has in the test's own run, with its
weights as they are: what it introduced by itself is gone, what it inherited stays, and everything behind it goes on in
the test's precision. In INT8 it reads what is in front of its Q/DQ pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cp_debug.backends.base import Backend, Program
from cp_debug.mixed_precision.fusion_groups import FusionGroup
from cp_debug.mixed_precision.graph_runners import BackendRunner, EmulatedRunner, Runner
from cp_debug.mixed_precision.search import emulation_device, layers_of_test
from cp_debug.recipes.base import Model, Sample

NONE, LAYER, FIRST, ALL = "none", "layer", "first", "all"
"""Kinds of sets: no layer, one, the first few by share, all of them."""


@dataclass(frozen=True)
class AblatedSet:
    """Layers that compute in FP32 together."""

    kind: str
    groups: tuple[FusionGroup, ...]

    @property
    def names(self) -> list[str]:
        """Names of its layers, the largest share first."""
        return [f"{group.component}/{group.name}" for group in self.groups]


class Ablation:
    """Layers of one test backend that can be given their exact values.

    ``programs`` are those that the test runs. Raises InputError for a backend whose layers cannot be told apart, and
    for a model none of whose layers computes in its precision.
    """

    def __init__(self, model: Model, programs: Sequence[Program], backend: Backend) -> None:
        self._model, self._programs, self._backend = model, programs, backend
        self.precision, self.groups = layers_of_test(model, programs, backend)

    def shares(self, sample: Sample) -> list[float]:
        """Share of each of ``groups`` in what the test's precision does to the final outputs of ``sample``: emulated,
        whatever the backend, by one walk backward (``EmulatedRunner.shares``).
        """
        emulator = self._emulator([sample])
        emulator.prepare()
        of_nodes = emulator.shares(frozenset())
        return [sum(of_nodes.get((g.component, node), 0.0) for node in g.nodes) for g in self.groups]

    def sets(self, shares: Sequence[float], most: int) -> list[AblatedSet]:
        """None, each of the ``most`` layers of the largest shares, the first 2, 4, 8 … of them, and all layers."""
        order = sorted(range(len(self.groups)), key=lambda place: (-shares[place], place))
        ranked = tuple(self.groups[place] for place in order)
        most = min(most, len(ranked))
        firsts = [count for count in (*(2**k for k in range(1, most.bit_length())), most) if 1 < count < len(ranked)]
        return [
            AblatedSet(NONE, ()),
            *(AblatedSet(LAYER, (group,)) for group in ranked[:most]),
            *(AblatedSet(FIRST, ranked[:count]) for count in dict.fromkeys(firsts)),
            AblatedSet(ALL, ranked),
        ]

    def runner(self, sample: Sample, folder: Path) -> Runner:
        """Runs sets on ``sample``: on the emulator that the backend is, else on the backend, built anew for each set.

        Its ``run`` gives one result: component → output → array in the dtype that the graph declares.
        """
        if self._backend.emulated:
            return self._emulator([sample])
        return BackendRunner(self._model, self._programs, [sample], self.precision, self._backend, folder)

    def _emulator(self, samples: Sequence[Sample]) -> EmulatedRunner:
        device = emulation_device(self._backend)
        return EmulatedRunner(self._model, self._programs, samples, self.precision, device)
