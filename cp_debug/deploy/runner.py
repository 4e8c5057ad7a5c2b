"""``deploy``: load, export, build, verify, evaluate, one after the other; finished stages are not run again."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from cp_debug.deploy.stages import Deployment
from cp_debug.deploy.verify import reasons
from cp_debug.errors import InputError
from cp_debug.files import complete_file, file_hash, hashes, key_of, make_folder
from cp_debug.graph.graph import Graph, external_files
from cp_debug.graph.surgery import weights_folder
from cp_debug.reading import read_bytes, sealed, typed, unsealed
from cp_debug.recipes.abilities import HasWeights
from cp_debug.safe_text import amount
from cp_debug.serialize import json_safe
from cp_debug.version import __version__

SCHEMA = "cpdebug.deploy/1"
FILE = "deploy.json"


@dataclass
class StageRecord:
    """Record of one finished stage of a deployment, by which a later run knows whether to repeat it."""

    name: str
    key: str
    """Hash of everything that the stage depends on: a stage with the same key and files need not run again."""
    passed: bool
    line: str
    """The outcome in one line."""
    seconds: float
    files: dict[str, str] = field(default_factory=dict)
    """Files written → their SHA-256."""
    document: dict[str, Any] = field(default_factory=dict)
    """The whole outcome, JSON-safe."""
    resumed: bool = False
    """Whether this is from an earlier run."""


class State:
    """The records of a work folder. A file that cannot be read counts as none: everything then runs again."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / FILE
        self.records: dict[str, StageRecord] = {}
        try:
            document = unsealed(read_bytes(self._path), str(self._path))
            if document.get("schema") == SCHEMA:
                self.records = typed(dict[str, StageRecord], document.get("stages"), str(self._path))
        except InputError:
            pass

    def finished(self, name: str, key: str) -> StageRecord | None:
        """The record of a stage that passed on the same input and whose files are as it left them."""
        record = self.records.get(name)
        if record is None or record.key != key or not record.passed:
            return None
        if any(file_hash(Path(path)) != digest for path, digest in record.files.items()):
            return None
        record.resumed = True
        return record

    def add(self, record: StageRecord) -> None:
        """Keep a record, on disk at once. Raises InputError when it cannot be written."""
        self.records[record.name] = record
        make_folder(self._path.parent)
        stages = {name: {**asdict(kept_record), "resumed": False} for name, kept_record in self.records.items()}
        with complete_file(self._path) as stream:
            stream.write(sealed(json_safe({"schema": SCHEMA, "stages": stages})) + "\n")


PRODUCTIVE = ("load", "quantize", "export", "build")
"""Stages whose files the later ones work on."""


class Outcome(NamedTuple):
    """Outcome of one stage of a deployment: whether it passed, in one line, and in full."""

    passed: bool
    line: str
    document: dict[str, Any]
    folder: Path | None = None
    """Folder of the files written, where there are some."""


OnStage = Callable[[str, StageRecord | None], None]


def deploy(
    deployment: Deployment, *, fresh: bool = False, on_stage: OnStage = lambda name, record: None
) -> list[StageRecord]:
    """Run the stages that the configuration asks for and return their records; ``fresh`` forgets earlier runs.

    ``on_stage`` hears of every stage twice: by its name when it begins, with its record afterwards. A failed
    verification or evaluation is recorded, not raised. Raises BackendUnavailable and InputError; the stages before stay
    done.
    """
    state = State(deployment.config.work_dir)
    records, depends = [], ""
    for name, needs, run in _stages(deployment):
        on_stage(name, None)
        key = key_of({"stage": name, "after": depends, "version": __version__, **needs})
        record = None if fresh else state.finished(name, key)
        if record is None:
            started = time.perf_counter()
            outcome = run(deployment)
            files = hashes(p for p in outcome.folder.iterdir() if p.is_file()) if outcome.folder else {}
            seconds = time.perf_counter() - started
            record = StageRecord(name, key, outcome.passed, outcome.line, seconds, files, outcome.document)
            state.add(record)
        records.append(record)
        on_stage(name, record)
        if name in PRODUCTIVE:
            depends = key_of({"key": key, "files": record.files})
    return records


def _stages(deployment: Deployment) -> Iterator[tuple[str, dict[str, Any], Callable[[Deployment], Outcome]]]:
    """Stages to run, each as (name, what it depends on besides the stages before, function that runs it)."""
    config = deployment.config
    if config.tensorrt.precision == "int8" and not config.int8 and config.export.mode in ("onnx", "both"):
        raise InputError(
            f"{deployment.source}: tensorrt.precision is int8: expected a quantization section, too, which says where "
            "the scales come from"
        )
    plain = config.model_dump(mode="json")
    mode, data = config.export.mode, plain["data"]
    checkpoint = file_hash(config.checkpoint) if config.checkpoint else None
    weights = checkpoint or _own_files(config.model or "")
    yield "load", {"model": plain["model"], "weights": weights, "turned": config.export.rot_y_axis_reference}, _load
    if config.quantization and mode in ("onnx", "both"):
        calibration = plain["quantization"]
        scales = file_hash(config.quantization.checkpoint) if config.quantization.checkpoint else None
        yield "quantize", {"quantization": calibration, "scales": scales, "data": data}, _quantize
        deployment.use_quantized()
    if mode in ("onnx", "both"):
        yield "export", {"export": plain["export"], "components": plain["components"]}, _export
    files = {} if mode in ("onnx", "both") else {"onnx": hashes(deployment.onnx_dir.glob("*.onnx*"))}
    if mode in ("trt", "both"):
        yield "build", {**files, "tensorrt": plain["tensorrt"], "components": plain["components"]}, _build
    if config.verify.enabled and config.scenarios():
        yield "verify", {**files, "verify": plain["verify"], "data": data, "tensorrt": plain["tensorrt"]}, _verify
    if deployment.evaluates:
        needs = {**files, "evaluate": plain["evaluate"], "data": data, "tensorrt": plain["tensorrt"]}
        yield "evaluate", needs, _evaluate


def _own_files(model: str) -> dict[str, str] | None:
    """Hashes of an ONNX file and of its external data; None for other models."""
    if not model.endswith(".onnx"):
        return None
    graph = Graph(Path(model))
    return hashes([graph.path, *external_files(graph.proto, weights_folder(graph))])


def _load(deployment: Deployment) -> Outcome:
    model = deployment.model
    deployment.check_fit()
    modules = [component.module for component in model.components if component.module is not None]
    count = sum(p.numel() for module in modules for p in module.parameters())
    weights = model.weights if isinstance(model, HasWeights) else "its own weights"
    return Outcome(True, f"{model.name}, {count / 1e6:.2f} M parameters, {weights}", {"model": model.name})


def _quantize(deployment: Deployment) -> Outcome:
    path = deployment.quantize()
    scales = [part.scales for part in deployment.quantized.values()]
    count = sum(len(component_scales.layers) for component_scales in scales)
    return Outcome(
        True, f"{amount(count, 'layer')} in INT8, scales by {scales[0].method}", {"layers": count}, path.parent
    )


def _export(deployment: Deployment) -> Outcome:
    if deployment.takes_files:
        taken = deployment.take()
        names = ", ".join(item.program.graph.path.name for item in taken)
        document = {"components": [item.to_dict() for item in taken]}
        rewritten = sorted({item.program.graph.opsets.get("", 1) for item in taken if item.source is not None})
        how = f"rewritten in opset {rewritten[0]}, compared with the original" if rewritten else "used unchanged"
        return Outcome(True, f"{names}: {how}", document, deployment.onnx_dir)
    exported = deployment.export()
    worst = max(item.error for item in exported if item.error is not None)
    names = ", ".join(item.program.graph.path.name for item in exported)
    line = f"{names}; opset {deployment.config.export.opset}, within {worst:.1g} of the modules on two sizes"
    little = [f"{item.program.name}, {caveat}" for item in exported for caveat in item.caveats]
    line += f" ({'; '.join(little)})" if little else ""
    return Outcome(True, line, {"components": [item.to_dict() for item in exported]}, deployment.onnx_dir)


def _build(deployment: Deployment) -> Outcome:
    built = deployment.build()
    phrases = [f"{b.file} ({b.types})" for b in built]
    return Outcome(True, "; ".join(phrases), {"engines": [asdict(b) for b in built]}, deployment.engine_dir)


def _verify(deployment: Deployment) -> Outcome:
    result = deployment.verify()
    phrases = [f"{s.name} {'passed' if s.passed else 'FAILED: ' + '; '.join(reasons(s))}" for s in result.scenarios]
    document = result.to_dict()
    for scenario, document_of in zip(result.scenarios, document["scenarios"], strict=True):
        document_of["reasons"] = list(reasons(scenario))
    return Outcome(result.passed, "; ".join(phrases), document)


def _evaluate(deployment: Deployment) -> Outcome:
    result = deployment.evaluate()
    phrases = [
        f"{scores.backend.spec} mAP {scores.summary['mAP'].value:.3f} NDS {scores.summary['NDS'].value:.3f}"
        for scores in result.backends
    ]
    worse = f"; worse: {', '.join(result.worse)}" if result.worse else ""
    return Outcome(not result.worse, f"{len(result.samples)} samples: {', '.join(phrases)}{worse}", result.to_dict())
