"""Result of a mixed-precision search: the set, how it is known, every trial, and the set in forms for other tools."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cp_debug.backends.base import Program
from cp_debug.backends.narrow_options import NarrowOptions, is_narrow
from cp_debug.display import Shown
from cp_debug.graph.graph import Graph, Node
from cp_debug.graph.half_precision import cast_surgery
from cp_debug.graph.narrow_qdq import insert_narrow_qdq
from cp_debug.graph.operators import CONTRACTIONS
from cp_debug.graph.qdq import remove_qdq
from cp_debug.mixed_precision.layers import CASTS, FusionGroup
from cp_debug.mixed_precision.trials import Trial
from cp_debug.programs.export import EXPORTERS
from cp_debug.quantization.narrow_layers import calibrated, check_exportable, narrow_layers, weighted_layers
from cp_debug.quantization.onnx_ptq import amax_of_programs
from cp_debug.recipes.base import Model, Sample
from cp_debug.serialize import JsonForm


def write_onnx(
    model: Model,
    samples: Sequence[Sample],
    programs: Sequence[Program],
    keep: Mapping[str, Sequence[str]],
    precision: str,
    target: Path,
) -> list[str]:
    """Write the mixed-precision graph as ``target``; with several components, one file each into that folder.

    FP16 and BF16 by casts, INT8 by leaving Q/DQ pairs out, narrow types by putting pairs in; constant scales of data
    are then calibrated on ``samples``: their largest magnitudes. Returns notes for readers. Raises InputError where a
    weight that is not kept is beyond FP16 or BF16, and as ``narrow_layers`` and ``check_exportable`` do.
    """
    several, notes = len(programs) > 1, list[str]()
    narrow = NarrowOptions.parse(precision) if is_narrow(precision) else None
    chosen, amax = dict[str, list[Node]](), dict[str, dict[str, float]]()
    if narrow is not None:
        check_exportable(narrow)
        for p in programs:
            chosen[p.name] = [n for n in weighted_layers(p.graph, narrow) if n.name not in set(keep[p.name])]
        amax = amax_of_programs(model, programs, chosen, samples) if calibrated(narrow) else {}
    (target if several else target.parent).mkdir(parents=True, exist_ok=True)
    for program in programs:
        file, kept = target / f"{program.name}.onnx" if several else target, keep[program.name]
        if precision == "int8":
            remove_qdq(program.graph, kept, file)
        elif narrow is None:
            cast_surgery(program.graph, CASTS[precision], kept, file)
        else:
            names = [node.name for node in chosen[program.name]]
            layers = narrow_layers(program.graph, narrow, amax.get(program.name, {}), names)
            insert_narrow_qdq(program.graph, layers.layers, file, precision)
            notes += [f"--onnx: {node} stays in FP32: {why}" for node, why in layers.left_out.items()]
            outside = {n.name for n in program.graph.nodes if n.op in CONTRACTIONS} - layers.layers.keys()
            count = len(outside - set(kept) - layers.left_out.keys())
            if count and narrow.family != "int4":
                products = f"{count} products of two results"
                notes.append(f"--onnx: {products} are in FP32 in the file, but in {narrow} in the search")
    return notes


@dataclass(frozen=True)
class Named:
    """The files that have the nodes by the names that are told."""

    files: dict[str, str] = field(default_factory=dict)
    """Component → file; left out where a node has no name in it, so that other tools cannot be told of it."""
    exporter: str = ""
    """``dynamo`` or ``torchscript`` where they are exports that are gone by now; such a file is called after its
    component."""
    opset: int = 0
    """Opset of these exports."""
    unrolled: bool = False
    """Whether nodes are called as If, Loop and Scan ran them: no file has these names."""

    @classmethod
    def of(cls, programs: Sequence[Program], exporter: str) -> Named:
        """Files of programs, which ``exporter`` exported where they come from modules."""
        exported = [program for program in programs if program.module is not None]
        other = next((name for name in EXPORTERS if name != exporter), "")
        notes = [note for p in exported if p.alignment is not None for note in p.alignment.notes]
        if any(note.endswith(f"{other} exported it") for note in notes):
            exporter = other
        files = {p.name: f"{p.name}.onnx" if p in exported else str(p.graph) for p in programs if _all_named(p.graph)}
        return cls(files, exporter, exported[0].graph.opsets[""]) if exported else cls(files)

    def command(self, model: str) -> str:
        """The command that writes the files; empty where they are the user's."""
        if not self.exporter:
            return ""
        return f"cpdebug export {shlex.quote(model)} -o . --exporter {self.exporter} --opset {self.opset}"


def _all_named(graph: Graph) -> bool:
    names = [node.proto.name for node in graph.nodes]
    return all(names) and len(set(names)) == len(names)


def arguments(
    keep: Mapping[str, Sequence[str]], precision: str, named: Named, *, weak: bool = True
) -> dict[str, dict[str, str]]:
    """Component → tool → command line that keeps these nodes in FP32; components with nothing to keep are left out.

    ``weak``: TensorRT may be told precisions of layers, as up to version 10; from 11 on the file alone says them.
    """
    commands: dict[str, dict[str, str]] = {}
    for component, nodes in keep.items():
        if not nodes or component not in named.files:
            continue
        excluded = shlex.join(f"^{re.escape(node)}$" for node in nodes)
        file = shlex.quote(named.files[component])
        mode = precision.partition(":")[0]
        quantization = f"python -m modelopt.onnx.quantization --onnx_path {file} "
        if precision == "int8":
            commands[component] = {"modelopt": f"{quantization}--nodes_to_exclude {excluded}"}
        elif is_narrow(precision) and mode in ("fp8", "int4"):
            commands[component] = {"modelopt": f"{quantization}--quantize_mode {mode} --nodes_to_exclude {excluded}"}
        elif precision in CASTS:
            flag = CASTS[precision]
            listed = ",".join(f"{node}:fp32" for node in nodes)
            layers = shlex.join(f"{node}:float32" for node in nodes)
            of_layers = {
                "polygraphy": f"polygraphy run {file} --trt --{flag} --precision-constraints obey "
                f"--layer-precisions {layers}",
                "trtexec": f"trtexec --onnx={file} --{flag} --precisionConstraints=obey "
                + shlex.join([f"--layerPrecisions={listed}", f"--layerOutputTypes={listed}"]),
            }
            commands[component] = (of_layers if weak else {}) | {
                "autocast": f"python -m modelopt.onnx.autocast --onnx_path {file} --low_precision_type {flag} "
                f"--keep_io_types --nodes_to_exclude {excluded}",
            }
    return commands


def deploy_fragment(keep: Mapping[str, Sequence[str]], precision: str, named: Named = Named()) -> str:
    """The part of a configuration of ``cpdebug deploy`` (YAML) that keeps the nodes; empty where it has no such key."""
    if precision not in CASTS or not any(keep.values()) or named.unrolled:
        return ""
    where = {component: f"{component}/" if len(keep) > 1 else "" for component in keep}
    listed = "".join(
        f"  - {json.dumps(where[component] + node, ensure_ascii=False)}\n"
        for component, nodes in keep.items()
        for node in nodes
    )  # JSON strings are YAML
    export = f"export:\n  exporter: {named.exporter}\n  opset: {named.opset}\n" if named.exporter else ""
    return f"{export}tensorrt:\n  precision: {CASTS[precision]}\n  keep_fp32:\n{listed}"


SCHEMA = "cpdebug.search/2"


@dataclass(frozen=True)
class KeptLayer(JsonForm):
    """A layer of the set."""

    fusion_group: FusionGroup = field(metadata={"inline": True})
    ops: tuple[str, ...]
    introduced: float | None
    """Error that it introduces by itself in the low precision, emulated: relative L2, infinite where it overflows."""
    share: float | None
    """Part that it makes of the divergence with nothing kept but what is not finite by itself, emulated; None where
    nobody asked."""
    without: dict[str, float]
    """The figures of the set without this layer, where that was tried on the backend."""


@dataclass(frozen=True, repr=False)
class MixedPrecisionResult(JsonForm, Shown):
    """Layers to keep in higher precision: the smallest set that was tried and holds."""

    model: str
    reference: str
    backend: str
    emulated: bool
    """Whether the backend is an emulation itself."""
    precision: str
    goal: str
    layers: int
    """Number of layers that could be kept."""
    reached: bool
    kept: list[KeptLayer]
    """The best set that was verified on the backend: the smallest that reaches the goal, else the one that comes
    closest."""
    minimal: bool
    """Whether leaving out any single layer of it was tried on the backend and misses the goal."""
    best: Trial
    """Trial of the best set."""
    baseline: Trial
    """Trial of the empty set."""
    trials: list[Trial]
    """Trials of this search and, before them, of its log."""
    keep: dict[str, list[str]]
    """Component → nodes that its runtime must be told to keep: the layers', and what moves numbers between them."""
    named: Named = field(default_factory=Named)
    """The files in which the nodes have these names."""
    weak: bool = True
    """Whether TensorRT may be told precisions of layers: not of 11, if the backend is one."""
    stopped: str = ""
    """Reason why the search ended early."""
    builds: int = 0
    """Number of engines or sessions made for this search, those of its log not counted."""
    passes: float = 0.0
    """Work of the emulator, prediction included, in passes over all samples."""
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)

    @property
    def pareto(self) -> list[Trial]:
        """The trials on the backend that no other beats in both, layers kept and error; fewest layers first."""
        front: list[Trial] = []
        on_backend = [t for t in self.trials if not t.emulated and not t.error]
        for trial in sorted(on_backend, key=lambda t: (t.layers, t.measured.figures["rel_l2"])):
            if not front or trial.measured.figures["rel_l2"] < front[-1].measured.figures["rel_l2"]:
                front.append(trial)
        return front

    @property
    def arguments(self) -> dict[str, dict[str, str]]:
        """Component → tool → command line that keeps the set."""
        return arguments(self.keep, self.precision, self.named, weak=self.weak)

    @property
    def verdict(self) -> str:
        """The outcome in a sentence."""
        count = f"{len(self.kept)} of {self.layers} layers"
        if not self.reached:
            excess = f"the closest was {_figures(self.best)} with {count} kept"
            return f"{self.goal} was not reached: {excess}" + (f" ({self.stopped})" if self.stopped else "")
        if not self.kept:
            return f"{self.goal} holds with nothing kept"
        least = "none of them can be left out" if self.minimal else f"some may not be needed: {self.stopped}"
        return f"{self.goal} holds with {count} kept; {least}"

    def derived(self) -> dict[str, Any]:
        """The schema, the outcome, the best trials, and the set in the forms that other tools take."""
        return {
            "schema": SCHEMA,
            "verdict": self.verdict,
            "arguments": self.arguments,
            "deploy": deploy_fragment(self.keep, self.precision, self.named),
            "pareto": self.pareto,
        }


def _figures(trial: Trial) -> str:
    figures = trial.measured.figures
    return ", ".join(f"{k} {v:.3g}" for k, v in figures.items()) or trial.error
