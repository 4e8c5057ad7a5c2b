"""The engines of one program for one set of shapes: as deployed, built again, and with probes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cp_debug.backends.tensorrt.client import Client
from cp_debug.backends.tensorrt.config import BuildConfig
from cp_debug.backends.tensorrt.inspector import (
    EngineLayer,
    compare_engines,
    materialised,
    parse_layers,
    realised_precision,
)
from cp_debug.errors import InputError
from cp_debug.probes.graph import Graph

Profile = tuple[Sequence[int], Sequence[int], Sequence[int]]
"""Smallest, optimal and largest shape of an input."""

_NETWORK_TYPES = {"Half": "HALF", "BF16": "BF16"}
_WANTED = {"fp16": "Half", "bf16": "BF16", "int8": "Int8"}


@dataclass(frozen=True)
class Engine:
    """A built engine file and what its build told."""

    path: Path
    layers: tuple[EngineLayer, ...]
    facts: Mapping[str, Any]
    """The runner's answer to ``build``, without the layers."""


@dataclass(frozen=True)
class Workshop:
    """Builds engines of one graph: everything about it but shapes and probes."""

    client: Client
    config: BuildConfig
    variant: str
    graph: Graph
    """What TensorRT is given: after cast surgery, where the precision comes from the graph."""
    values: tuple[str, ...]
    """The values of the program's own graph that may be probed."""
    folder: Path
    step: Mapping[str, Any]
    """Settings of every build: device, workspace, timing and calibration caches."""

    def settings(self) -> dict[str, Any]:
        """The runner's ``build`` step without files and shapes."""
        nodes = [[node.name, node.op, list(node.outputs)] for node in self.graph.nodes]
        return {**self.config.step(), **self.step, "nodes": nodes}

    def build(self, requests: Sequence[tuple[str, Mapping[str, Any]]], profiles: Mapping[str, Profile]) -> list[Engine]:
        """Build one engine a request (file name, ``probes`` for the runner), all in one process."""
        common = {**self.settings(), "onnx": str(self.graph.path), "profiles": profiles}
        paths = [self.folder / name for name, _ in requests]
        steps = [
            {"command": "build", "engine": str(path), "probes": probes, **common}
            for path, (_, probes) in zip(paths, requests, strict=True)
        ]
        names = [node.name for node in self.graph.nodes]
        return [
            Engine(path, tuple(parse_layers(facts.pop("layers"), names)), facts)
            for path, facts in zip(paths, self.client.execute(steps), strict=True)
        ]


class EngineSet:
    """The plain engine, built at once; the rebuilt and the probed one, built when probes are first asked for.

    Raises InputError when no layer of the plain engine runs in the precision asked for.
    """

    def __init__(self, workshop: Workshop, profiles: Mapping[str, Profile], name: str, show_all: bool) -> None:
        self._workshop, self._profiles, self._name = workshop, profiles, name
        (self.plain,) = workshop.build([(f"{name}.engine", {})], profiles)
        self.realised = realised_precision(self.plain.layers)
        _check_realised(workshop, self.plain.layers, self.realised)
        self._boundaries = materialised(self.plain.layers, workshop.values)
        self.unfused = workshop.config.unfused_debug_tensors and not show_all
        """Whether TensorRT itself hands out what it did not fuse, instead of marked outputs."""
        self._marks = dict.fromkeys(workshop.values) if show_all else self._network_types()
        self.rebuilt: Engine | None = None
        self.probed: Engine | None = None
        self.gap: float | None = None
        """Relative L2 distance of the probed engine's outputs from the plain one's, once both ran on one input."""
        self.floor: float | None = None
        """The same distance of the rebuilt engine's."""

    @property
    def exposed(self) -> set[str]:
        """Values that the probed engine shows, as far as it is known: after its build, those that could be marked."""
        if self.probed is None or self.unfused:
            return set(self._marks)
        return set(self.probed.facts["marked"])

    def build_probed(self) -> tuple[Engine, Engine]:
        """The rebuilt and the probed engine."""
        if self.rebuilt is None or self.probed is None:
            probes = {"method": "unfused"} if self.unfused else {"method": "outputs", "tensors": self._marks}
            requests = [(f"{self._name}-rebuilt.engine", {}), (f"{self._name}-probed.engine", probes)]
            self.rebuilt, self.probed = self._workshop.build(requests, self._profiles)
        return self.rebuilt, self.probed

    def describe(self) -> dict[str, Any]:
        """JSON-safe: what was built, what differs between the builds, which kernels ran."""
        facts = self.plain.facts
        told: dict[str, Any] = {
            "flags": sorted(name for name, on in facts["flags"].items() if on),
            "timing_cache": facts["timing_cache"],
            "realised_precision": self.realised,
            "build_seconds": {"plain": facts["seconds"]},
            "observer_gap": self.gap,
            "rebuild_floor": self.floor,
            "layers": [layer.to_dict() for layer in self.plain.layers],
        }
        for name, engine in (("rebuilt", self.rebuilt), ("probed", self.probed)):
            if engine is not None:
                difference = compare_engines(self.plain.layers, engine.layers)
                told["build_seconds"][name] = engine.facts["seconds"]
                told[name] = {
                    "fusions_changed": list(difference.fusions),
                    "tactics_changed": list(difference.tactics),
                    "timing_cache": engine.facts["timing_cache"],
                }
        return told

    def _network_types(self) -> dict[str, str | None]:
        """What to mark, with the type to mark it as: weakly typed outputs are FP32 unless said otherwise."""
        weak = self._workshop.config.regime == "weak"
        return {name: _NETWORK_TYPES.get(dtype) if weak else None for name, dtype in self._boundaries.items()}


def _check_realised(workshop: Workshop, layers: Sequence[EngineLayer], realised: Mapping[str, float]) -> None:
    wanted = _WANTED.get(workshop.variant)
    missing = wanted is not None and realised and wanted not in realised
    if workshop.variant == "tf32":
        told = {layer.tactic.multiplies for layer in layers} - {None}
        missing = bool(told) and "tf32" not in told
    if missing:
        shares = ", ".join(f"{dtype} {share:.0%}" for dtype, share in realised.items())
        raise InputError(
            f"{workshop.graph.path}: asked for {workshop.variant}, but no layer of the built engine runs in it (layer "
            f"inputs and outputs: {shares}); the GPU's FP32 kernels were faster, or the graph has nothing to run in it"
        )
