"""The engines of one program for one set of shapes: as deployed, built again, and with probes."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cp_debug.backends.capabilities import BuildInfo
from cp_debug.backends.tensorrt import runner
from cp_debug.backends.tensorrt.answers import Built
from cp_debug.backends.tensorrt.client import BuildFailed, ParseFailed, RunnerClient
from cp_debug.backends.tensorrt.config import BuildConfig
from cp_debug.backends.tensorrt.engine_cache import EngineCache
from cp_debug.backends.tensorrt.inspector import (
    COMPILED,
    EngineLayer,
    changed_nodes,
    compare_engines,
    materialized,
    parse_layers,
    realised_precision,
)
from cp_debug.errors import InputError
from cp_debug.files import file_hash, key_of
from cp_debug.graph.graph import Graph
from cp_debug.graph.surgery import distinct_dimensions
from cp_debug.safe_text import flags

Profile = tuple[Sequence[int], Sequence[int], Sequence[int]]
"""Smallest, optimal and largest shape of an input."""

_NETWORK_TYPES = {"Half": "HALF", "BF16": "BF16"}
AGAIN = "-rebuilt.engine"
"""End of the file name of an engine that is built a second time."""
_LOW = {"fp16": "HALF", "bf16": "BF16", "best": "HALF"}
_WANTED = {"fp16": "Half", "bf16": "BF16", "int8": "Int8"}


@dataclass(frozen=True)
class Engine:
    """A built engine file and the report of its build."""

    path: Path
    layers: tuple[EngineLayer, ...]
    facts: Mapping[str, Any]
    """The runner's answer to ``build``, without the layers."""


@dataclass(frozen=True)
class EngineBuilder:
    """Builds engines of one graph: everything about it but shapes and probes."""

    client: RunnerClient
    config: BuildConfig
    variant: str
    graph: Graph
    """Graph that TensorRT reads: after cast surgery, where the precision comes from the graph."""
    values: tuple[str, ...]
    """The values of the program's own graph that may be probed."""
    folder: Path
    step: Mapping[str, Any]
    """Settings of every build: device, workspace, timing cache, calibration."""
    machine: Mapping[str, str] = field(default_factory=dict)
    """TensorRT's version and the GPU, on which engines depend."""
    cache: EngineCache | None = None
    build_timeout: float | None = None

    def settings(self) -> dict[str, Any]:
        """The runner's ``build`` step without files and shapes."""
        nodes = [[node.name, node.op, list(node.outputs)] for node in self.graph.nodes]
        return {**self.config.step(), **self.step, "nodes": nodes}

    def build(self, name: str, probes: Mapping[str, Any], profiles: Mapping[str, Profile]) -> Engine:
        """Build the engine of that file name, with ``probes`` for the runner, or take it from the cache.

        Raises BuildTimedOut for one that takes longer than allowed, InputError for one that TensorRT refuses.
        """
        nodes = [node.name for node in self.graph.nodes]
        key, engine = self._key(name, probes, profiles), self.folder / name
        if self.cache is None or key is None:
            facts = self._built(engine, probes, profiles)
        else:
            timings = Path(self.step["timing_cache"]) if self.step.get("timing_cache") else None
            facts = self.cache.make_once(key, engine, timings, lambda: self._built(engine, probes, profiles))
        return Engine(engine, tuple(parse_layers(facts.pop("layers"), nodes)), facts)

    def _key(self, name: str, probes: Mapping[str, Any], profiles: Mapping[str, Profile]) -> str | None:
        """Cache key of all that the engine depends on; None where that is more than can be known.

        An engine that is built to see whether building again gives the same has a key of its own.
        """
        if self.cache is None or self.step.get("calibration"):
            return None
        step = {k: v for k, v in self.step.items() if k != "timing_cache"}
        parts = {"graph": self.graph.digest, "step": {**self.config.step(), **step}, "probes": probes}
        is_rebuild = name.endswith(AGAIN)
        more = {"profiles": profiles, "machine": self.machine, "runner": file_hash(Path(runner.__file__))}
        return key_of({**parts, **more, "again": is_rebuild})

    def _built(self, engine: Path, probes: Mapping[str, Any], profiles: Mapping[str, Profile]) -> dict[str, Any]:
        readable = distinct_dimensions(self.graph, profiles, self.folder / "named.onnx")
        common = {**self.settings(), "onnx": str(readable), "profiles": profiles}
        tell = self.client.on_event
        tell({"event": "building", "level": self.step["builder_level"]})
        step = {"command": "build", "engine": str(engine), "probes": probes, **common}
        try:
            (facts,) = self.client.checked(Built, self.client.execute([step], self.build_timeout))
        except ParseFailed as error:
            raise InputError(f"{error}\n{cut_out(self.graph, error.nodes)}".rstrip()) from None
        except BuildFailed as error:
            advice = to_exclude(self.graph, calibrated=bool(self.step.get("calibration")))
            raise InputError(f"{error}\n{advice}".rstrip()) from None
        tell({"event": "built"})
        return facts


def to_exclude(graph: Graph, *, calibrated: bool) -> str:
    """Advice on a failed build: which transposed convolutions to leave out of INT8; empty where that is not the cause.

    Some versions cannot build them. ``calibrated``: TensorRT's calibrator chooses what runs in INT8, Q/DQ pairs or not.
    """
    upsampling = [node for node in graph.nodes if node.op == "ConvTranspose"]
    quantized = [
        node.name
        for node in upsampling
        if any(graph.producer[i].op == "DequantizeLinear" for i in node.inputs if i in graph.producer)
    ]
    if quantized:
        return f"TensorRT 8.6 builds no ConvTranspose in INT8: leave {', '.join(quantized)} unquantized (--skip-layers)"
    if calibrated and upsampling:
        kept = flags("--keep-fp32", [node.name for node in upsampling], len(upsampling))
        return f"TensorRT 8.6 builds no ConvTranspose in INT8, and a calibrator asks for that: try {kept}"
    return ""


def cut_out(graph: Graph, names: Collection[str]) -> str:
    """The command that cuts the first of the named nodes out with its neighbours, to show or to mend; or nothing."""
    node = next((n for n in graph.nodes if n.name in names), None)
    if node is None:
        return ""
    near = [graph.producer[i] for i in node.inputs if i in graph.producer and graph.producer[i].op != "Constant"]
    near += [node, *(reader for output in node.outputs for reader in graph.consumers.get(output, ()))]
    inside = {output for n in near for output in n.outputs}
    data = {v.name for v in graph.inputs} | {v for v, n in graph.producer.items() if n.op != "Constant"}
    inputs = dict.fromkeys(i for n in near for i in n.inputs if i in data and i not in inside)
    outputs = [o for n in near for o in n.outputs if not all(r in near for r in graph.consumers.get(o, [None]))]
    arguments = f"{str(graph.path)!r}, 'part.onnx', {list(inputs)}, {list(dict.fromkeys(outputs))}, False"
    return f'to cut it out with its neighbours: python -c "import onnx.utils as u; u.extract_model({arguments})"'


class EngineSet:
    """The plain engine; the same built again, and those with probes, once probes are asked for.

    ``probes``: see ``Options``.
    """

    def __init__(self, builder: EngineBuilder, profiles: Mapping[str, Profile], name: str, probes: str) -> None:
        self._builder, self._profiles, self._name = builder, profiles, name
        self.plain = builder.build(f"{name}.engine", {}, profiles)
        self.types = realised_precision(self.plain.layers)
        self._show_all = probes == "all"
        self.unfused = builder.config.unfused_debug_tensors and probes in ("auto", "boundaries")
        """Whether TensorRT itself hands out what it did not fuse, instead of marked outputs."""
        self._marks: dict[str, dict[str, str]] = (
            {v: {} for v in builder.values} if self._show_all else self._boundaries()
        )
        self.rebuilt: Engine | None = None
        self.probed: Engine | None = None
        self.unmarked: list[str] = []
        """Values whose marks were taken back, as they changed the engine."""
        self.stopped = ""
        """Reason why values inside are not shown: a build was stopped or not worth it, or a script named none."""
        loader = builder.step.get("loader")
        if loader and "load_network" in loader["functions"] and not any(layer.nodes for layer in self.plain.layers):
            names_none = "load_network names no layer and no value as the ONNX file does"
            self.stopped = f"{loader['script']}: {names_none}, so only the outputs are compared"
        self.gap: float | None = None
        """Relative L2 distance of the probed engine's outputs from the plain one's, once both ran on one input."""
        self.floor: float | None = None
        """Relative L2 distance of the rebuilt engine's outputs from the plain one's."""
        self.run_seconds: float | None = None
        """Median time of the plain engine on that input, copies to and from the device left out."""

    @property
    def realised(self) -> bool:
        """Whether any layer runs in the precision asked for, or may: what a compiled one does inside, nothing tells."""
        wanted_type = _WANTED.get(self._builder.variant)
        if any(layer.kind in COMPILED for layer in self.plain.layers):
            return True
        if self._builder.variant == "tf32":
            multiplied = {layer.tactic.multiplies for layer in self.plain.layers} - {None}
            return not multiplied or "tf32" in multiplied
        return wanted_type is None or not self.types or wanted_type in self.types

    @property
    def exposed(self) -> set[str]:
        """Values that the probed engine shows, as far as it is known: after its build, those that could be marked."""
        if self.stopped:
            return set()
        if self.probed is None or self.unfused:
            return set(self._marks)
        return set(self.probed.facts["marked"])

    def observed(self) -> tuple[Engine, Engine]:
        """The plain engine built again, and the one that shows values."""
        if self.rebuilt is None:
            self.rebuilt = self._builder.build(f"{self._name}{AGAIN}", {}, self._profiles)
        return self.rebuilt, self.showing()

    def showing(self) -> Engine:
        """The engine that shows values, without another plain one."""
        if self.probed is None:
            probes = {"method": "unfused"} if self.unfused else {"method": "outputs", "tensors": self._marks}
            self.probed = self._builder.build(f"{self._name}-probed.engine", probes, self._profiles)
        return self.probed

    def variation(self, builder: EngineBuilder, file: str, value: str) -> Engine:
        """An engine of the same shapes by another builder that shows ``value``."""
        low = _LOW.get(builder.variant, "") if builder.config.regime == "weak" else ""
        mark = self._boundaries().get(value) or {"dtype": low, "format": ""}
        return builder.build(file, {"method": "outputs", "tensors": {value: mark}}, self._profiles)

    def unmark_changed(self) -> bool:
        """Build the probed engine anew with fewer marks; False where that helps no more.

        The outputs of the layers that marking changed are no longer marked, and the second time neither are their
        inputs.
        """
        if self.unfused or self._show_all or self.probed is None:
            return False
        changed = changed_nodes(self.plain.layers, self.probed.layers)
        nodes = [node for node in self._builder.graph.nodes if node.name in changed]
        written, read = {v for n in nodes for v in n.outputs}, {v for n in nodes for v in n.inputs}
        outputs = {v.name for v in self._builder.graph.outputs}
        for near in (written, read):
            if drop := [name for name in self._marks if name in near and name not in outputs]:
                self.unmarked += drop
                self._marks = {name: mark for name, mark in self._marks.items() if name not in near or name in outputs}
                self.probed = None
                self.showing()
                return True
        return False

    def build_info(self) -> BuildInfo:
        """Facts about the builds, their differences, and the kernels that ran."""
        facts, seconds, differences = self.plain.facts, {"plain": self.plain.facts["seconds"]}, {}
        for name, engine in (("rebuilt", self.rebuilt), ("probed", self.probed)):
            if engine is not None and engine is not self.plain:
                difference = compare_engines(self.plain.layers, engine.layers)
                seconds[name] = engine.facts["seconds"]
                differences[name] = {
                    "fusions_changed": list(difference.fusions),
                    "tactics_changed": list(difference.tactics),
                    "timing_cache": engine.facts["timing_cache"],
                }
                if not difference.same:
                    differences[name]["layers"] = [layer.to_dict() for layer in engine.layers]
        return BuildInfo(
            regime=self._builder.config.regime,
            flags=sorted(name for name, on in facts["flags"].items() if on),
            timing_cache=facts["timing_cache"],
            realised=self.realised,
            realised_precision=self.types,
            build_seconds=seconds,
            run_seconds=self.run_seconds,
            observer_gap=self.gap,
            rebuild_floor=self.floor,
            layers=[layer.to_dict() for layer in self.plain.layers],
            stopped=self.stopped,
            cached=bool(facts.get("cached")),
            unmarked=self.unmarked,
            **differences,
        )

    def _boundaries(self) -> dict[str, dict[str, str]]:
        """Value → the type and format as which it is marked.

        Outputs are linear, and FP32 where typing is weak, unless said otherwise, which could make TensorRT choose
        another kernel. TensorRT 8 cannot put out the result of a quantizer: its input is marked instead. Values that
        its own calibrator keeps in INT8 are marked as FP32.
        """
        builder = self._builder
        marks: dict[str, dict[str, str]] = {}
        for name, tensor in materialized(self.plain.layers, builder.values).items():
            mark = {"format": (len(tensor.shape) == 4 and tensor.tensor_format) or ""}
            if builder.config.regime == "weak":
                producer = builder.graph.producer[name]
                if tensor.dtype == "Int8":
                    if producer.op == "QuantizeLinear":
                        marks[producer.inputs[0]] = {}
                    elif builder.step["calibration"]:
                        marks[name] = {}
                    continue
                mark["dtype"] = _NETWORK_TYPES.get(tensor.dtype, "")
            marks[name] = mark
        return {name: marks[name] for name in builder.values if name in marks}
