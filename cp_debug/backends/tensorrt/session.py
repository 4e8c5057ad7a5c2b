"""A program on TensorRT: engines built for the shapes that come, run in the runner's process, values handed out."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from statistics import median
from types import MappingProxyType
from typing import Any

import numpy as np

from cp_debug.backends.base import Program, Sink
from cp_debug.backends.capabilities import INTERRUPTED, BuildInfo
from cp_debug.backends.tensorrt.calibration import Ranges, calibration, ranges_of, read_cache
from cp_debug.backends.tensorrt.client import BuildTimedOut, RunnerClient
from cp_debug.backends.tensorrt.config import decide
from cp_debug.backends.tensorrt.engine_runs import RUNS, EngineRuns, output_distance
from cp_debug.backends.tensorrt.engines import Engine, EngineBuilder, EngineSet, Profile
from cp_debug.backends.tensorrt.inspector import EngineLayer
from cp_debug.backends.tensorrt.options import TensorRTOptions
from cp_debug.errors import InputError, Terminated
from cp_debug.graph.check_inputs import check_inputs
from cp_debug.graph.graph import Graph, data_values
from cp_debug.graph.half_precision import cast_surgery
from cp_debug.graph.narrow_qdq import narrow_kinds

HEALTHY = "nothing diverges, so no engine was built to show values inside (`cpdebug bisect --probes boundaries` does)"


@cache
def _shared_folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="cpdebug-timing-")


class EngineSession:
    """A graph on TensorRT.

    A static graph is built when the session opens. A dynamic one without a profile is built for the shapes of the first
    run, and again for every other shape that comes: exact, and slow where shapes vary, so give a profile then.
    Without a sink the plain engine runs, as it would be deployed. When a sink is first given, it is built again, and
    once more with probes, and all three run on that input: ``settings`` then tells how far looking changed the outputs,
    and how far building again does.
    """

    def __init__(
        self,
        client: RunnerClient,
        program: Program,
        variant: str,
        version: str,
        options: TensorRTOptions,
        machine: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        """``machine``: what engines depend on besides the graph and its settings, for the cache."""
        self._machine = machine
        self.diverges: Callable[[Mapping[str, np.ndarray], Mapping[str, np.ndarray]], str] | None = None
        """Told inputs and outputs: why values inside are worth an engine, or empty; for ``auto`` probes."""
        self._client, self._own, self._options = client, program.graph, options
        self._runs = EngineRuns(client, program.graph, options.device, options.loader)
        self._component = program.name
        self._quantized = program.plain is not None or program.graph.precision == "int8"
        self._folder = tempfile.TemporaryDirectory(prefix="cpdebug-engine-")
        self._sets: dict[str, EngineSet] = {}
        self._trials = 0
        self._asked = variant, version
        try:
            self._builder = self._open(variant, version, options.keep_fp32)
            names = [v.name for v in self._own.inputs if not _is_static(v.shape)]
            self._profiles = {name: options.profiles[name] for name in names if name in options.profiles}
            self._per_shape = len(self._profiles) < len(names)
            if not self._per_shape:
                self._latest = self._engines({})
        except BaseException:
            self.close()
            raise

    def _open(self, variant: str, version: str, keep_fp32: Collection[str], file: str = "typed.onnx") -> EngineBuilder:
        """``file``: where the graph goes when its types must be written into it."""
        source_graph, options, folder = self._own, self._options, Path(self._folder.name)
        if variant == "int8" and self._quantized and source_graph.precision != "int8":
            # No layer of this component is quantized, and TensorRT 8 builds nothing with the INT8 flag and no scale.
            variant = "fp16" if options.fp16_fallback else "fp32"
        calibrated = None
        if variant in ("int8", "best") and not self._quantized:
            calibrated = calibration(options, self._component, folder)
        # Names that are not in this graph belong to other components.
        kept_nodes = frozenset(keep_fp32) & {node.name for node in source_graph.nodes}
        config = decide(
            variant,
            version,
            strongly_typed=options.strongly_typed,
            quantized=self._quantized,
            calibrated=calibrated is not None,
            keep_fp32=kept_nodes,
            fp16_fallback=options.fp16_fallback,
            narrow=narrow_kinds(source_graph),
        )
        graph = source_graph
        if config.graph_precision is not None:
            cast = cast_surgery(source_graph, config.graph_precision, kept_nodes, folder / file)
            graph = Graph(cast, source=source_graph)
            if options.loader is not None and "load_network" in options.loader.functions:
                raise InputError(
                    f"{options.loader.path}: load_network makes the network by itself, but a strongly typed trt-"
                    f"{variant} has its types written into the ONNX file; expected load_config alone"
                )
        step = {
            "device": options.device,
            "workspace_mib": options.workspace_mib,
            "timing_cache": str(options.timing_cache or self._timings(version, graph)),
            "calibration": calibrated,
            "builder_level": options.builder_level,
            "tactic_sources": list(options.tactic_sources),
        }
        if options.loader is not None:
            ends = {"inputs": [v.name for v in graph.inputs], "outputs": [v.name for v in graph.outputs]}
            step["loader"] = {**options.loader.step(), **ends, "backend": f"trt-{variant}"}
        values = tuple(data_values(source_graph))
        cache, limit = options.cache, options.build_timeout
        return EngineBuilder(
            self._client, config, variant, graph, values, folder, step, dict(self._machine), cache, limit
        )

    def _timings(self, version: str, graph: Graph) -> Path:
        if cache := self._options.cache:
            return cache.timing_cache({**self._machine, "graph": graph.digest})
        # One file for all builds of this process: the probed engine must find the plain one's tactics.
        return Path(_shared_folder().name) / f"tensorrt-{version}.cache"

    @property
    def plain(self) -> Engine:
        """The engine as it is deployed. Raises InputError before the first run of a dynamic graph without a profile."""
        if not self._sets:
            names = [v.name for v in self._own.inputs if not _is_static(v.shape)]
            raise InputError(f"{self._own.path}: the inputs {', '.join(names)} are dynamic; give each a profile")
        return self._latest.plain

    @property
    def exposed(self) -> Collection[str]:
        """Values that the engine writes to memory; before a dynamic graph's first run, every value of the graph."""
        if not self._sets:
            return self._own.tensors
        return self._latest.exposed | {v.name for v in self._own.outputs}

    @property
    def tactics(self) -> Mapping[str, str]:
        """Value → name of the kernel that wrote it for the sink; known after a run with one."""
        engine = (self._latest.probed or self._latest.plain) if self._sets else None
        outputs = {node.name: node.outputs for node in self._own.nodes}
        return {
            value: layer.tactic.name
            for layer in (engine.layers if engine else ())
            for node in layer.nodes  # a reformat may stand between the layer and its value
            for value in outputs.get(node, ())  # casts that were put in are no nodes of the program
            if layer.tactic.name
        }

    @property
    def ranges(self) -> Ranges | None:
        """INT8 ranges of the engine last used, by TensorRT's own calibrator; None where it was not asked."""
        calibrated = self._builder.step["calibration"]
        if calibrated is None or not self._sets:
            return None
        return ranges_of(self._latest.plain.layers, self._builder.graph, read_cache(Path(calibrated["cache"])))

    @property
    def settings(self) -> Mapping[str, Any]:
        """Regime and flags as read back, caches, and all fields of ``build_info``."""
        config = self._builder.config
        session_settings = {
            "regime": config.regime,
            "network_flags": list(config.network_flags),
            "probes": self._options.probes,
        }
        if self._options.loader is not None:
            session_settings["loader"] = str(self._options.loader.path)
        return {**session_settings, **(self.build_info.to_settings() if self.build_info else {})}

    @property
    def build_info(self) -> BuildInfo | None:
        """Facts about the engine last used; None before the first run of a dynamic graph without a profile."""
        return self._latest.build_info() if self._sets else None

    def run(
        self, inputs: Mapping[str, np.ndarray], sink: Sink | None = None, probes: Collection[str] | None = None
    ) -> dict[str, np.ndarray]:
        """Run once; see ``cp_debug.backends.base.Session``. FP16 values come as float16, BF16 ones as float32.

        Raises InputError for inputs that do not fit the graph or the profile, and for a failed build.
        """
        check_inputs(self._own.inputs, inputs, str(self._own.path))
        engines = self._latest = self._engines(inputs)
        if sink is None:
            return self._runs.once(engines.plain.path, inputs)
        with tempfile.TemporaryDirectory(dir=self._folder.name) as name:
            folder = Path(name)
            wanted = engines.exposed if probes is None else engines.exposed.intersection(probes)
            written = self._show(engines, inputs, folder, wanted)
            outputs = self._runs.outputs(written)
            wanted = {*wanted, *(v.name for v in self._own.outputs if probes is None or v.name in probes)}
            for value in self._own.tensors:
                if value in written and value in wanted:
                    sink(value, self._runs.load(value, written[value]))
            return outputs

    def _show(
        self, engines: EngineSet, inputs: Mapping[str, np.ndarray], folder: Path, wanted: Collection[str]
    ) -> dict[str, Path]:
        """Files of the wanted values and of the outputs, by the probed engine.

        The first time the others run, too; where the outputs differ by more than building again explains, marks that
        changed the engine are taken back.
        """
        if engines.stopped not in ("", HEALTHY):
            return self._plain_alone(engines, inputs, folder, engines.stopped)
        if self._options.probes == "auto" and (written := self._if_healthy(engines, inputs, folder)) is not None:
            return written
        try:
            with self._outputs_do():
                rebuilt, probed = engines.observed()
        except BuildTimedOut as stopped:
            return self._plain_alone(engines, inputs, folder, str(stopped))
        others = [engines.plain, rebuilt] if engines.gap is None else []
        ran, *plain = self._runs.execute([e.path for e in (probed, *others)], inputs, folder, wanted, engines.unfused)
        if plain:
            reference, rebuilt_outputs = (self._runs.outputs(run.written) for run in plain)
            engines.floor = output_distance(reference, rebuilt_outputs)
            engines.run_seconds = median(plain[0].seconds)
            engines.gap = output_distance(reference, self._runs.outputs(ran.written))
            while engines.gap > engines.floor and engines.unmark_changed():
                place = Path(tempfile.mkdtemp(dir=folder))
                (ran,) = self._runs.execute([engines.observed()[1].path], inputs, place, wanted)
                engines.gap = output_distance(reference, self._runs.outputs(ran.written))
        return ran.written

    def _plain_alone(
        self, engines: EngineSet, inputs: Mapping[str, np.ndarray], folder: Path, why: str
    ) -> dict[str, Path]:
        """Files of the plain engine's outputs; nothing inside is shown, for the reason ``why``."""
        (ran,) = self._runs.execute([engines.plain.path], inputs, folder, repeat=RUNS)
        engines.stopped, engines.gap, engines.floor = why, 0.0, 0.0
        engines.run_seconds = median(ran.seconds[1:])
        return ran.written

    def _if_healthy(self, engines: EngineSet, inputs: Mapping[str, np.ndarray], folder: Path) -> dict[str, Path] | None:
        """Files of the plain engine's outputs where no value inside need be shown; else None.

        Where marks change nothing, no third engine is built.
        """
        if engines.probed is not None:
            return None
        place = Path(tempfile.mkdtemp(dir=folder))
        (ran,) = self._runs.execute([engines.plain.path], inputs, place, repeat=RUNS)
        outputs = self._runs.outputs(ran.written)
        why = "" if self.diverges is None else self.diverges(inputs, outputs)
        if self.diverges is not None and not why:
            engines.stopped, engines.gap, engines.floor = HEALTHY, 0.0, 0.0
            engines.run_seconds = median(ran.seconds[1:])
            return ran.written
        engines.stopped, engines.gap = "", None
        self._client.on_event({"event": "compared", "text": f"{self._client.spec}: {why}"})
        try:
            with self._outputs_do():
                probed = engines.showing()
        except BuildTimedOut as stopped:
            return self._plain_alone(engines, inputs, folder, str(stopped))
        place = Path(tempfile.mkdtemp(dir=folder))
        (shown,) = self._runs.execute([probed.path], inputs, place, engines.exposed, engines.unfused)
        if output_distance(outputs, self._runs.outputs(shown.written)) > 0:
            return None  # whether marks or merely another build changed it takes one more engine to know
        engines.gap, engines.floor, engines.run_seconds = 0.0, 0.0, median(ran.seconds[1:])
        engines.rebuilt = engines.plain
        return shown.written

    @contextmanager
    def _outputs_do(self) -> Iterator[None]:
        """Let Ctrl-C stop builds as their time limit does, where the outputs are judged all the same."""
        try:
            yield
        except KeyboardInterrupt as asked:
            if isinstance(asked, Terminated) or self.diverges is None:
                raise
            self._client.on_event({"event": "stopped", "text": f"{INTERRUPTED}; Ctrl-C again ends the command"})
            raise BuildTimedOut(INTERRUPTED) from None

    @property
    def layers(self) -> Sequence[EngineLayer]:
        """The layers of the engine last used, the probed one where there is one."""
        if not self._sets:
            return ()
        return (self._latest.probed or self._latest.plain).layers

    def trial(
        self, inputs: Mapping[str, np.ndarray], value: str, keep_fp32: Collection[str]
    ) -> tuple[np.ndarray | None, float]:
        """Build one more engine with further nodes kept in FP32, and run it once; see ``BuildsVariations``.

        ``value`` is put out in the type that the engine has it in, or else in the one asked for. Raises InputError for
        a build that fails.
        """
        check_inputs(self._own.inputs, inputs, str(self._own.path))
        engines = self._latest = self._engines(inputs)
        name, (variant, version) = f"trial-{self._trials}", self._asked
        self._trials += 1
        builder = self._open(variant, version, self._options.keep_fp32 | set(keep_fp32), f"{name}.onnx")
        engine = engines.variation(builder, f"{name}.engine", value)
        with tempfile.TemporaryDirectory(dir=self._folder.name) as folder:
            plain, ran = self._runs.execute([engines.plain.path, engine.path], inputs, Path(folder), [value])
            outputs, reference = self._runs.outputs(ran.written), self._runs.outputs(plain.written)
            shown = self._runs.load(value, ran.written[value]) if value in ran.written else None
        return outputs.get(value, shown), output_distance(reference, outputs)

    def timings(self, inputs: Mapping[str, np.ndarray], repeats: int) -> list[float]:
        """Seconds of ``repeats`` runs of the plain engine after a first one, on the device, transfers left out.

        ``inputs``: name → array in the dtype and shape that the graph declares. Raises InputError for others.
        """
        check_inputs(self._own.inputs, inputs, str(self._own.path))
        engines = self._latest = self._engines(inputs)
        return self._runs.timings(engines.plain.path, inputs, repeats)

    def plain_build(self) -> tuple[Graph, dict[str, Any]]:
        """The graph that TensorRT reads, and the runner's step that builds the plain engine of it, without caches.

        For graphs of static shapes; the caller adds ``command``, ``onnx`` and ``engine``.
        """
        return self._builder.graph, {**self._builder.settings(), "timing_cache": None, "profiles": {}}

    def close(self) -> None:
        """Remove the engine files."""
        self._folder.cleanup()

    def _engines(self, inputs: Mapping[str, np.ndarray]) -> EngineSet:
        profiles: dict[str, Profile] = dict(self._profiles)
        if self._per_shape:
            profiles |= {name: (a.shape, a.shape, a.shape) for name, a in inputs.items() if name not in profiles}
        key = repr(sorted((name, tuple(shapes[1])) for name, shapes in profiles.items()))
        if key not in self._sets:
            dynamic = {v.name: profiles[v.name] for v in self._own.inputs if not _is_static(v.shape)}
            self._sets[key] = EngineSet(self._builder, dynamic, f"shapes-{len(self._sets)}", self._options.probes)
        return self._sets[key]


def _is_static(shape: tuple[int | str | None, ...] | None) -> bool:
    return shape is not None and all(isinstance(size, int) for size in shape)
