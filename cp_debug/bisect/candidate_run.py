"""One test backend on one sample: run it against the reference's capture, then replay its layers on the oracle."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch

from cp_debug.backends.arithmetic import ARITHMETICS
from cp_debug.backends.base import Program, Tensor
from cp_debug.backends.capabilities import (
    BuildsVariations,
    LooksInsideOnDemand,
    calibrates_itself,
    kernels_of,
    ranges_of_session,
)
from cp_debug.backends.emulated import EmulatedBackend
from cp_debug.backends.executor import Executor
from cp_debug.backends.tensorrt.calibration import Ranges
from cp_debug.bisect.file_quantization import FileQuantization
from cp_debug.bisect.observe import Observation, observe
from cp_debug.bisect.operator_errors import implementer
from cp_debug.bisect.options import is_optimized
from cp_debug.bisect.quantized_segment import QuantizerGrid
from cp_debug.bisect.regions.region import Region, region_of
from cp_debug.bisect.replay import Load, Replayer
from cp_debug.bisect.replayed import EXCESS, Replay
from cp_debug.bisect.result import DIVERGENT, GUILTY, OK, LayerRow
from cp_debug.bisect.verdict import is_within, judge, judged, trace_shapes, without_emulation
from cp_debug.errors import InputError
from cp_debug.graph.exporter_notes import source_lines
from cp_debug.graph.graph import Graph, from_inputs
from cp_debug.graph.half_precision import narrow_values
from cp_debug.graph.integer_values import level_kind, parent_values, rounded_values, unscaled_levels
from cp_debug.graph.narrow_qdq import narrow_precision
from cp_debug.graph.operators import MOVING
from cp_debug.graph.qdq import has_own_pairs
from cp_debug.probes.arrays import as_numpy, has_torch_type, to_device
from cp_debug.probes.distance import apart
from cp_debug.probes.held import CapturedRun, CaptureHolder
from cp_debug.probes.statistics import TensorStats, compare
from cp_debug.programs.layers import Layer, layer_name
from cp_debug.programs.pipeline import Key, Pipeline, levels_of_both, value_map, wants_int8
from cp_debug.programs.precision import PRECISIONS, Precision, coarsest
from cp_debug.programs.walk import Walk
from cp_debug.quantization.quantized_programs import with_ranges
from cp_debug.recipes.base import Arrays, Model, Sample


class CandidateRun:
    """Compares one backend's values with the reference's as they appear, then replays them."""

    __test__ = False

    def __init__(
        self,
        pipeline: Pipeline,
        reference: Pipeline,
        programs: Sequence[Program],
        layers: Sequence[Layer],
        tolerance: tuple[float, float],
        oracle: str | None,
        folder: Path,
        device: str = "cpu",
    ) -> None:
        """``programs`` are the reference's before anything was quantized: they say what a layer should compute.

        Graphs that only describe what an engine computes are written to ``folder``. Layers are replayed on ``device``.
        """
        self.pipeline = pipeline
        self.tolerance = tolerance
        self.oracle = oracle
        self.device = device
        self.reference = reference
        self.programs = {p.name: p for p in programs}
        self.layers = {Key(layer.component, layer.onnx): layer for layer in layers}
        self._names = {p.name: value_map(self.programs[p.name], p) for p in pipeline.programs}
        self._files: dict[str, FileQuantization] = {}
        """Component → the quantization of a file by its own nodes."""
        for program in pipeline.programs:
            plain, names = self.programs[program.name].graph, self._names[program.name]
            # With a backend of INT8, files of this project are known better: ``Replayer`` reads their pairs.
            by_its_nodes = pipeline.backend.precision != "int8" or not has_own_pairs(program.graph)
            if by_its_nodes and self.came_quantized(program.name):
                _prefer_own_names(names, plain, program.graph)
                names |= parent_values(plain, program.graph, names)
                names |= {v: f"{v} (test)" for v in unscaled_levels(plain, program.graph, names)}
                file_names = {name: value for value, name in names.items()}
                self._files[program.name] = FileQuantization(
                    plain, program.graph, file_names, rounds_weights=is_optimized(pipeline.backend), device=device
                )
        self._levels = levels_of_both(programs, pipeline.programs)
        self.graphs = {p.name: p.graph for p in pipeline.programs}
        """Component → graph that the backend computes; once replayed, with the calibrator's Q/DQ pairs."""
        self._ranges: dict[str, Ranges] = {}
        """Component → ranges that TensorRT's calibrator chose."""
        optimized = is_optimized(pipeline.backend)
        self._folded = {
            Key(p.name, v)
            for p in pipeline.programs
            if optimized
            for v in p.graph.producer.keys() - from_inputs(p.graph)
        }
        """Values that an optimizer computes beforehand, and may write with other axes of length 1."""
        self._folder = folder
        self._replayers: dict[str, Replayer] = {}
        self._kinds: dict[str, str] = {}
        self._seen: set[Key] = set()
        """Values that the reference shows."""

    @property
    def precision(self) -> Precision:
        """Precision by which layers are judged, unless a node is kept in FP32."""
        return PRECISIONS[self.pipeline.precision]

    def run(
        self, sample: Sample, reference: CapturedRun, writer: CaptureHolder
    ) -> tuple[dict[Key, TensorStats], dict[str, Arrays]]:
        """Run with probes; every value is compared with the reference's, and captured under the reference's name.

        Returns the statistics by layer, and component → output name → array in the dtype that the graph declares.
        """
        for name, session in self.pipeline.sessions.items():
            if isinstance(session, LooksInsideOnDemand):
                session.diverges = partial(self._diverges, name, reference)
        captured = {Key(e.component, e.name) for e in reference.entries}
        if captured != self._seen:  # the module goes another way with this sample
            self._replayers.clear()
        self._seen = captured
        stats: dict[Key, TensorStats] = {}

        def sink(key: Key, tensor: Tensor) -> None:
            is_folded = key in self._folded
            key, tensor = self._as_of_reference(key, tensor)
            if is_folded and key in captured:
                tensor = _in_shape(tensor, reference.load(key.value, component=key.component))
            writer.put(key.value, tensor, component=key.component)
            if key in self.layers and key in captured:
                if self.device != "cpu" and has_torch_type(tensor):  # the host has a kernel to load
                    tensor = to_device(tensor, self.device)
                stats[key] = compare(reference.load(key.value, component=key.component), tensor)

        return stats, self.pipeline.run(sample, sink)

    def _diverges(self, component: str, reference: CapturedRun, inputs: Arrays, outputs: Arrays) -> str:
        """Why a component's values inside are worth a look: its outputs are beyond the tolerance, or further from the
        reference's than twice what its precision makes of the whole component. Empty where they are not."""
        rtol, atol = self.tolerance
        graph, precision = self.programs[component].graph, self.precision
        found = {name: compare(reference.load(name, component=component), value) for name, value in outputs.items()}
        for name, stats in found.items():
            if not is_within(stats, rtol, atol, levels=Key(component, name) in self._levels):
                return f"{_off(name, stats)}, beyond the tolerance"
        try:
            emulated = Executor(graph, ARITHMETICS[precision.name], self.device).run(inputs)
        except (InputError, KeyError):
            return f"{_off(*max(found.items(), key=lambda item: item[1].severity))}, and it cannot be emulated"
        for name, stats in found.items():
            expected = compare(reference.load(name, component=component), emulated[name]).rel_l2
            if not stats.rel_l2 <= 2 * expected + precision.roundoff:
                return f"{_off(name, stats)}, within the tolerance, but {precision.name.upper()} makes {expected:.1e}"
        return ""

    def _module(self, component: str) -> Program | None:
        """The program of a component whose torch module both sides run."""
        other, program = (side.program(component) for side in (self.reference, self.pipeline))
        both = all(self._runs_module(component)) and program.module is other.module
        return program if both and program.alignment is not None else None

    def _runs_module(self, component: str) -> list[bool]:
        """Whether the reference and the test run the component's torch module."""
        sides = self.reference, self.pipeline
        return [s.backend.spec.family == "torch" and s.program(component).module is not None for s in sides]

    def module_side(self, component: str) -> str:
        """The side that runs the torch module while the other one runs its graph: ``reference``, ``test``, or none."""
        reference, test = self._runs_module(component)
        return "" if reference == test else "reference" if reference else "test"

    def name(self, key: Key) -> Key:
        """The reference's name of a value of this test."""
        return Key(key.component, self._names[key.component].get(key.value, key.value))

    def names(self, component: str) -> Mapping[str, str]:
        """A component's values in this test → the reference's."""
        return self._names[component]

    def replay(self, reference: CapturedRun, test: CapturedRun, stats: Mapping[Key, TensorStats]) -> dict[Key, Replay]:
        """Replay every captured layer on the oracle. ``stats`` are those of ``run``."""
        replays: dict[Key, Replay] = {}
        for component in self.programs:
            ours, theirs = loader(reference, component), loader(test, component)
            divergences = {key.value: s.finite_rel_l2 for key, s in stats.items() if key.component == component}
            replayer = self.replayer(component, test)
            for value, replay in replayer.layers(ours, theirs, divergences):
                key = Key(component, value)
                if self.graphs[component] is self.programs[component].graph:
                    replay.contradicted = _contradicted(replayer, value, replay, stats.get(key), ours, theirs)
                replays[key] = replay
            if self.device != "cpu":  # where the next run's weights have to find room
                replayer.free_memory()
        return replays

    def replay_inputs(
        self, model: Model, sample: Sample, results: Mapping[str, Arrays], reference: CapturedRun, test: CapturedRun
    ) -> dict[Key, Replay]:
        """Replays of the inputs that a test model's own glue made.

        Each is held against the input that ``model``, the reference's, would have made of the same upstream results.
        ``results``: component → output name → array, of the test. Arrays have the dtype that the graph declares.
        """
        replays = {}
        for step in Walk(model, sample, results):
            replayer = self.replayer(step.name, test)
            ours, theirs = loader(reference, step.name), loader(test, step.name)
            for value, exact in step.inputs.items():
                replays[Key(step.name, value)] = replayer.given(value, exact, ours, theirs)
        return replays

    def replayer(self, component: str, test: CapturedRun) -> Replayer:
        """The replayer of a component, made once for all samples of which the reference shows the same values."""
        if component not in self._replayers:
            assert self.oracle is not None
            sides = self.reference, self.pipeline
            graph, alignment = self.programs[component].graph, self.programs[component].alignment
            captured = [name for name in test.names(component=component) if Key(component, name) in self._seen]
            self._replayers[component] = Replayer(
                graph,
                (self._claim(component, sides[0]), self._claim(component, sides[1])),
                self.oracle,
                captured,
                self.device,
                emulated=self._emulates(graph),
                narrow=(self._narrow(component, sides[0]), self._narrow(component, sides[1])),
                quantized=(self._quantized(component, sides[0]), self._quantized(component, sides[1], test)),
                implementers=(implementer(sides[0].backend), implementer(sides[1].backend)),
                moved=self._moved(graph, component),
                suspects=[d.onnx for d in alignment.departures] if alignment is not None else (),
                module=self._module(component),
            )
        return self._replayers[component]

    def _moved(self, graph: Graph, component: str) -> FileQuantization | None:
        """The quantizers of a file that both sides run, where the test's backend may move them."""
        if component in self._files or not is_optimized(self.pipeline.backend) or graph.precision != "int8":
            return None
        return FileQuantization(graph, graph, {}, rounds_weights=True)

    def _quantized(self, component: str, side: Pipeline, capture: CapturedRun | None = None) -> FileQuantization | None:
        """The quantization of a component on one side; None where it claims none, or where nothing else is known.

        ``capture`` is the test's: it tells which of the values that an engine keeps in INT8 are shown rounded.
        """
        plain = self.programs[component]
        (program,) = (p for p in side.programs if p.name == component)
        ranges = ranges_of_session(side.sessions[component])
        if plain.graph.precision == "int8":
            return None
        if side is self.pipeline and component in self._files:
            return self._files[component]
        if not (ranges or wants_int8(side.backend)):
            return None
        names = {name: own_name for own_name, name in value_map(plain, program).items()}
        if ranges is None:
            return FileQuantization(plain.graph, program.graph, names, made_here=True, device=self.device)
        graph = with_ranges(program.graph, ranges, self._folder / f"{component}.{side.backend.spec}.onnx")
        rounded = {}
        if capture is not None:
            self.graphs[component], self._ranges[component] = graph, ranges
            load, shown = loader(capture, component), capture.names(component=component)
            kept = {n: ranges.stored[own] for n, own in names.items() if n in shown and own in ranges.stored}
            grids = {name: QuantizerGrid.symmetric(largest) for name, largest in kept.items()}
            rounded = {n: kept[n] for n, grid in grids.items() if grid.holds(torch.tensor(as_numpy(load(n))))}
        return FileQuantization(plain.graph, graph, names, made_here=True, rounded=rounded, device=self.device)

    def kind(self, component: str) -> str:
        """Precision of what a component is quantized to: ``int8``, ``int16``, or a narrower one where none is INT8."""
        if component not in self._kinds:
            self._kinds[component] = narrow_precision(self.graphs[component]) or level_kind(self.graphs[component])
        return self._kinds[component]

    @staticmethod
    def _claim(component: str, side: Pipeline) -> str:
        """Precision that one side claims for a component; FP32 where nodes are kept in it: ``_narrow`` has the rest."""
        return "fp32" if side.kept(component) else side.precision

    def _narrow(self, component: str, side: Pipeline) -> dict[str, str]:
        """Value → narrow precision, for values that one side's program holds, or computes through, in less than FP32.

        They have the reference's names.
        """
        (program,) = (p for p in side.programs if p.name == component)
        levels = rounded_values(program.graph) if program.graph.precision == "int8" else set()
        narrow = dict.fromkeys(levels, "int8") | narrow_values(program.graph)
        if kept := side.kept(component):
            low = [node for node in program.graph.nodes if node.name not in kept]
            narrow |= {name: side.backend.precision for node in low for name in node.outputs if name not in narrow}
        names = value_map(self.programs[component], program) if narrow else {}
        narrow_by_name = {names.get(v.name, v.name): narrow[v.name] for v in program.graph.inputs if v.name in narrow}
        for own_name, name in names.items():
            if own_name not in program.graph.producer:
                continue
            between, _ = program.graph.segment([own_name], names)
            precisions = {narrow[o] for node in between for o in node.outputs if o in narrow}
            if precisions:
                narrow_by_name[name] = coarsest(*precisions).name
        return narrow_by_name

    def _emulates(self, graph: Graph) -> bool:
        """Whether the backend computed ``graph`` itself as a replayer would emulate it."""
        backend = self.pipeline.backend
        return (
            type(backend) is EmulatedBackend  # what derives from it may compute something else than it claims
            and backend.arithmetic == ARITHMETICS[self.precision.name]
            and not backend.overrides
            and backend.device == "cpu"
            and any(program.graph is graph for program in self.pipeline.programs)
        )

    def _region(self, key: Key, replay: Replay | None) -> Region | None:
        """The region that a value stands for on an engine or in a compiled module, where one name would mislead."""
        session, graph = self.pipeline.sessions[key.component], self.programs[key.component].graph
        if replay is None:
            return None
        if isinstance(session, BuildsVariations):
            return region_of(replay.nodes, key.value, graph, session.layers)
        if (kernel := kernels_of(session).get(key.value)) is None:
            return None
        nodes = set(replay.nodes)
        hidden = {value for n in graph.nodes if n.name in nodes for value in n.outputs} - {key.value}
        if hidden.isdisjoint(session.exposed):  # steps of one function of torch
            return None
        region = region_of(replay.nodes, key.value, graph)
        return region and replace(region, layer=kernel)

    @property
    def implicit(self) -> bool:
        """Whether the backend chooses the scales itself: TensorRT with its own calibrator."""
        return calibrates_itself(self.pipeline.backend)

    def came_quantized(self, component: str) -> bool:
        """Whether the test's file holds the Q/DQ pairs itself: nothing here has put them in."""
        program = self.pipeline.program(component)
        is_file = program.plain is None and program.graph is not self.programs[component].graph
        return is_file and program.graph.precision == "int8"

    def quantized_names(self, row: LayerRow) -> list[str]:
        """Names of the layer that computes a value, where layers are chosen for INT8.

        A module is named by its path, an addition by the module whose code adds; without a module, or by TensorRT's own
        calibrator, the nodes are named.
        """
        program = self.pipeline.program(row.component)
        if row.component in self._ranges and row.replay is not None:
            nodes, layers = row.replay.nodes, self._ranges[row.component].layers
            return [node for node in nodes if node in layers] or [*nodes]
        if program.module is None and self.programs[row.component].alignment is None:
            return [row.name]
        names = {name: test_name for test_name, name in self._names[row.component].items()}
        name = layer_name(program, names.get(row.onnx, row.onnx))
        return [name if program.module is None else name.partition("/")[0]]

    def observe(
        self, sample: Sample, probed: Mapping[str, Arrays], test: CapturedRun
    ) -> tuple[Observation, dict[Key, float]]:
        """The backend against itself, and without probes.

        ``probed``: component → output name → array, of the run that ``test`` holds. Arrays have the dtype that the
        graph declares.
        """
        return observe(self.pipeline, sample, probed, test, self._as_of_reference)

    def _as_of_reference(self, key: Key, tensor: Tensor) -> tuple[Key, Tensor]:
        """A value of the test by the reference's name, levels as the numbers that they stand for."""
        if (file := self._files.get(key.component)) is not None:
            tensor = file.shown(key.value, tensor)
        return self.name(key), tensor

    def _floor_read(self, key: Key, floors: Mapping[Key, float]) -> float:
        """The largest noise floor of the captured values that a replayed layer reads."""
        starts = self._replayers[key.component].starts(key.value)
        return max((floors.get(Key(key.component, start), 0.0) for start in starts), default=0.0)

    def rows(
        self,
        stats: Mapping[Key, TensorStats],
        replays: Mapping[Key, Replay],
        floors: Mapping[Key, float],
        sample: int,
        asked: Collection[Key] = (),
    ) -> dict[Key, LayerRow]:
        """The judged layers of ``stats``, in execution order: side values where they are not OK, or ``asked`` for."""
        rows: dict[Key, LayerRow] = {}
        kernels = {name: kernels_of(session) for name, session in self.pipeline.sessions.items()}
        tactics = {
            self.name(Key(n, value)): tactic for n, kernel_of in kernels.items() for value, tactic in kernel_of.items()
        }
        sources = {Key(n, v): line for n, p in self.programs.items() for v, line in source_lines(p.graph).items()}
        outputs = {Key(n, info.name) for n, p in self.programs.items() for info in p.graph.outputs}
        ops = {(n, node.name): node.op for n, p in self.programs.items() for node in p.graph.nodes}
        for key, layer in self.layers.items():
            if key not in stats:
                continue
            replay, floor = replays.get(key), floors.get(key, 0.0)
            claim = PRECISIONS[(replay and replay.precision) or self.precision.name]
            kind = self.kind(key.component) if replay is not None and replay.clipped is not None else ""
            is_level = key in self._levels
            read = self._floor_read(key, floors) if floor and replay is not None else 0.0
            judgement = judge(stats[key], replay, claim, *self.tolerance, floor, read, kind=kind, levels=is_level)
            judgement = without_emulation(judgement, replay)
            if layer.kind != "data":
                judgement = judged(judgement, replay)
                if layer.op == "Constant" and judgement.verdict == DIVERGENT:
                    judgement = judgement._replace(why="it is another constant in the test")
                if judgement.verdict == OK and key not in outputs and key not in asked:
                    continue
            region = self._region(key, replay)
            if region is not None:
                is_taken = any(row.name == region.label for row in rows.values())
                layer = replace(layer, name=region.label + f" → {key.value}" * is_taken, op=region.kind or "region")
            elif replay is not None and layer.op in MOVING:
                # What moves the result of another operator behind it is not what may be off.
                made = (ops[key.component, name] for name in reversed(replay.nodes))
                layer = replace(layer, op=next((op for op in made if op not in MOVING), layer.op))
            rows[key] = LayerRow(
                **asdict(layer),
                **judgement._asdict(),
                region=region,
                stats=stats[key],
                replay=replay,
                noise_floor=floor,
                sample=sample,
                tactic="" if region and region.kernels else tactics.get(key, ""),
                source=sources.get(key, ""),
            )
        trace_shapes(self.programs, rows)
        _trace_contradictions(rows)
        return rows


def _off(name: str, stats: TensorStats) -> str:
    """``y is off by 4.1e-04 (rel. L2)``, with what is not finite on one side alone left out and told."""
    told = "" if math.isfinite(stats.rel_l2) else ", NaN and Inf left out"
    return f"{name} is off by {stats.finite_rel_l2:.1e} (rel. L2{told})"


NEARER = 16.0
"""Factor by which a result must be nearer to the reference's than to what its captured inputs make."""


def _contradicted(
    replayer: Replayer, target: str, replay: Replay, stats: TensorStats | None, reference: Load, test: Load
) -> tuple[str, ...]:
    """The captured inputs that ``target`` cannot have been computed from, those that differ the most; else empty.

    A runtime may write a buffer again once all have read it, and a dump that is taken later shows what came last.
    Whoever read the value before that has the right result, so that neither the reader nor the oracle is to be doubted.
    ``stats`` are those of the test's value against the reference's, of one graph on both sides: another graph may undo
    what was done to an input.
    """
    if stats is None or stats.shape_mismatch or stats.mismatched or replay.introduced is None:
        return ()
    beyond = replay.new_nonfinite or ((replay.excess or 0.0) > EXCESS and replay.introduced > 0)
    if not beyond or math.isinf(stats.finite_rel_l2) or stats.finite_rel_l2 * NEARER > replay.introduced:
        return ()
    nodes, starts = replayer.graph.segment([target], replayer.known)
    distances = {start: apart(test(start), reference(start)) for start in starts}
    most = max(distances.values(), default=0.0)
    if not most or replayer.reference_excess(nodes, starts, target, reference) > EXCESS:
        return ()
    return tuple(start for start, far in distances.items() if far * EXCESS >= most)


def _trace_contradictions(rows: Mapping[Key, LayerRow]) -> None:
    """Add to the reason of every guilty row whose value another layer cannot have read which layer that is."""
    for key, reader in rows.items():
        for name in reader.replay.contradicted if reader.replay else ():
            row = rows.get(Key(key.component, name))
            if row is not None and row.verdict == GUILTY and "did not read this" not in row.why:
                row.why += f" (but {reader.name} did not read this: it has the reference's result)"


def _prefer_own_names(names: dict[str, str], plain: Graph, file: Graph) -> None:
    """Let dequantized values of a file that are called as their parent's stand for these.

    ``names``: value of the file → the parent's. Levels of two values may be the same numbers, as of x and 20·x. Only
    dequantized ones: a layer whose activation was left out gets the activation's name before it is cut off.
    """
    for value, name in list(names.items()):
        maker = file.producer.get(name) if name in plain.producer else None
        if value != name and maker is not None and maker.op == "DequantizeLinear" and names.get(name) != name:
            names[value], names[name] = f"{value} (test)", name


def loader(capture: CapturedRun, component: str) -> Load:
    """A function by which a replayer reads the values of one component."""
    return lambda name: capture.load(name, component=component)


def _in_shape(tensor: Tensor, like: Tensor) -> Tensor:
    """A tensor in the shape of another where the two differ in axes of length 1 alone."""
    ours, theirs = ([n for n in t.shape if n != 1] for t in (tensor, like))
    return tensor.reshape(tuple(like.shape)) if ours == theirs else tensor
