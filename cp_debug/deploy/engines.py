"""A folder of TensorRT engines, one a component, with a manifest that says for whom they were built."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cp_debug.backends.base import Backend, Program
from cp_debug.display import OnStep
from cp_debug.errors import InputError
from cp_debug.files import complete_folder, file_hash, write_text
from cp_debug.programs.walk import Walk, run_module
from cp_debug.reading import read_json, typed, within
from cp_debug.recipes.base import Model, Sample

if TYPE_CHECKING:
    from cp_debug.backends.capabilities import BuildInfo


MANIFEST = "engines.json"
SCHEMA = "cpdebug.engines/1"
MACHINE = ("tensorrt", "gpu", "compute_capability")
"""Facts of a machine that must be as they were when an engine was built."""


@dataclass(frozen=True)
class BuiltEngine:
    """Entry of an engine folder's manifest: one component's engine file, and the graph that it was built from."""

    component: str
    file: str
    sha256: str
    onnx_sha256: str
    """SHA-256 of the graph that it was built from."""
    seconds: float
    realised_precision: Mapping[str, float]
    """Data type → share of the layers' inputs and outputs; empty where TensorRT tells none, as for dynamic shapes."""

    @property
    def types(self) -> str:
        """The realised precision in words, such as ``fp16 80%, fp32 20%``."""
        return ", ".join(f"{t} {share:.0%}" for t, share in self.realised_precision.items()) or "types unknown"


def build_engines(
    programs: Sequence[Program],
    backend: Backend,
    folder: Path,
    files: Mapping[str, str] | None = None,
    on_step: OnStep = lambda text, done, total: None,
    kept_by: str = "--keep-fp32",
) -> list[BuiltEngine]:
    """Build ``<component>.engine`` for every program, and their manifest, which appears last.

    ``backend`` is a TensorRT backend with a profile for every dynamic input; ``files``: component → another file name;
    ``kept_by``: the option, or file and field, that names nodes to keep in FP32.
    Raises InputError where a profile is missing, a node to keep in FP32 is not there, TensorRT refuses a graph, or no
    layer of any engine runs in the precision asked for; the folder then stays as it was.
    """
    from cp_debug.programs.pipeline import check_profiles_of, check_realised, with_kept

    backends = with_kept(backend, programs, kept_by)
    check_profiles_of(backend, programs)
    built, infos = [], []
    with complete_folder(folder) as scratch:
        for place, program in enumerate(programs):
            on_step(f"building {program.name}", place, len(programs))
            session: Any = backends[program.name].open(program)
            try:
                engine = session.plain
                target = scratch / (files or {}).get(program.name, f"{program.name}.engine")
                shutil.copyfile(engine.path, target)
                info: BuildInfo = session.build_info
            finally:
                session.close()
            infos.append(info)
            seconds, realised = engine.facts["seconds"], info.realised_precision
            digest = program.graph.digest
            built.append(BuiltEngine(program.name, target.name, file_hash(target), digest, seconds, realised))
        check_realised(backend, infos)
        versions = backend.versions()
        manifest = {
            "schema": SCHEMA,
            "backend": str(backend.spec),
            **{key: versions[key] for key in MACHINE},
            "engines": [asdict(engine_entry) for engine_entry in built],
        }
        (folder / MANIFEST).unlink(missing_ok=True)  # it describes what the new ones replace
    write_text(json.dumps(manifest, indent=1) + "\n", folder / MANIFEST)
    return built


def check_engines(
    folder: Path, programs: Sequence[Program], versions: Mapping[str, str], backend: str = ""
) -> dict[str, Path]:
    """Component → its engine, each found fit for this machine and these graphs.

    ``backend`` is the name of the one that must have built them, if that matters: ``trt-fp16``. Raises InputError for
    a folder without manifest, another backend's engines, a missing component, a changed file, another graph, and an
    engine of another TensorRT version or GPU.
    """
    file = folder / MANIFEST
    source = f"{file}: not the manifest of `cpdebug build`"
    try:
        document = read_json(file, what="manifest")
    except InputError as error:
        raise InputError(f"{source} ({error})") from None
    manifest: dict[str, Any] = typed(dict[str, Any], document, source)
    built: list[BuiltEngine] = typed(list[BuiltEngine], manifest.get("engines"), source)
    engines = {entry.component: entry for entry in built}
    machine: dict[str, str] = typed(dict[str, str], {key: manifest.get(key) for key in MACHINE}, source)
    built_by: str = typed(str, manifest.get("backend"), source) if backend else ""
    if backend != built_by.partition("@")[0]:
        raise InputError(f"{file}: these are engines of {built_by}; expected those of {backend}")
    for entry in engines.values():
        within(folder, entry.file, str(file))
    for key, value in machine.items():
        if value != versions[key]:
            raise InputError(f"{file}: {key} is {value!r}; here it is {versions[key]!r}: build the engines again")
    paths = {}
    for program in programs:
        engine = engines.get(program.name)
        if engine is None or not (folder / engine.file).is_file():
            raise InputError(f"{folder}: there is no engine of {program.name}; expected one per component")
        if file_hash(folder / engine.file) != engine.sha256:
            raise InputError(f"{folder / engine.file}: changed since it was built; build it again")
        if engine.onnx_sha256 != program.graph.digest:
            raise InputError(f"{folder / engine.file}: built from another graph than {program.graph}")
        paths[program.name] = folder / engine.file
    return paths


def write_calibration_data(model: Model, samples: Iterable[Sample], folder: Path) -> Path:
    """Write ``<component>/<number>.npz`` for every component and sample, one array an input; return ``folder``.

    Components run as the model's FP32 modules on the CPU. Raises InputError as the model's samples do.
    """
    for index, sample in enumerate(samples):
        for step in Walk(model, sample):
            target = folder / step.name
            target.mkdir(parents=True, exist_ok=True)
            np.savez(target / f"{index:05d}.npz", allow_pickle=False, **step.inputs)
            if not step.last:
                step.outputs = run_module(step.component, step.inputs)
    return folder
