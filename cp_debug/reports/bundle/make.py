"""Bundles made from saved results, and written.

Files come first, then the script is run in a fresh process, then the page quotes its output.
"""

from __future__ import annotations

import base64
import io
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import external_data_helper

from cp_debug.backends.base import Backend, Program
from cp_debug.backends.ort_backend import OrtBackend
from cp_debug.backends.ort_options import LEVELS
from cp_debug.backends.tensorrt import runner
from cp_debug.backends.tensorrt.backend import TensorRTBackend
from cp_debug.backends.tensorrt.client import ENVIRONMENT
from cp_debug.bisect.verdict import EXCESS, RANGE
from cp_debug.errors import InputError, system_reason
from cp_debug.files import make_folder, partial_name
from cp_debug.graph import surgery
from cp_debug.graph.graph import Graph
from cp_debug.programs.precision import PRECISIONS
from cp_debug.reports.bundle.case import Accused, Case, Cutter, Piece, declared, find_accused
from cp_debug.reports.bundle.readme import polygraphy_command, readme, title
from cp_debug.reports.bundle.redact import holds_source
from cp_debug.reports.bundle.redact import redact as redacted
from cp_debug.reports.bundle.script import repro
from cp_debug.reports.bundle.shrink import OnText, Shrinker
from cp_debug.reports.bundle.verify import Measured, Output, Verifier
from cp_debug.reports.saved import SavedResult
from cp_debug.safe_text import code_span, visible

SHRINKING = 120.0
"""Seconds for making a case smaller. A run on TensorRT is a build: of a region of many nodes there are few, or none."""


def bundle(
    saved: SavedResult,
    target: Path,
    *,
    layer: str | None = None,
    backend: str | None = None,
    redact: bool = False,
    seconds: float = SHRINKING,
    on_text: OnText = lambda text: None,
) -> str:
    """Write the bundle of a guilty layer to the folder, or ``.zip``, ``target``; returns what its repro.py printed.

    ``layer`` (torch path, node or value) and ``backend`` choose; without them it is the first guilty layer. ``on_text``
    hears what is being done. ``seconds`` limits how long it is made smaller; that it fails is verified all the same.
    Raises InputError when ``target`` is taken, when no cut around the layer fails by itself, when ``redact`` hides the
    fault, and when repro.py does not show it; BackendUnavailable when the backend at fault cannot run here.
    """
    check_free(target)
    accused = find_accused(saved, layer, backend)
    cutter, verifier = Cutter(accused), Verifier(accused)
    shrinker = Shrinker(cutter, verifier, on_text, seconds=seconds)
    failing_nodes = shrinker.find(cutter.layer())
    case = shrinker.nodes(failing_nodes)
    history = [f"{len(case.program.model.graph.node)} of the component's {len(cutter.graph.nodes)} nodes"]
    if str(verifier.backend.spec) != accused.backend.spec:
        history.append(
            f"found on {accused.backend.spec}, repeated on {verifier.backend.spec}, which runs the same graph"
        )
    if len(failing_nodes) > len(cutter.layer()):
        history.append(f"the layer alone does not fail: {len(failing_nodes)} nodes around it do")
    if redact:
        on_text("replacing weights and inputs")
        case = redacted(case, shrinker)
    elif holds_source(case):
        history.append(
            "the graphs quote source lines and paths of the module that was exported: `--redact` leaves them out"
        )
    small = shrinker.values(shrinker.shapes(case))
    small = replace(small, changed=tuple(_changes(case, small)))
    if shrinker.stopped:
        history.append(f"stopped after {seconds:.0f} s: it may not be as small as it could be")
    history += [*_changes(case, small).values(), f"{verifier.runs} runs, each verified against the oracle"]
    on_text("running repro.py")
    return _write_bundle(target, accused, small, verifier.measure(small), verifier.backend, history)


def _changes(before: Case, after: Case) -> dict[str, str]:
    """Changes that were made to the inputs, in words, by name."""
    changes = {}
    for name, array in after.inputs.items():
        old = before.inputs[name]
        if old.shape != array.shape:
            changes[name] = f"{code_span(name)}: cut from {list(old.shape)} to {list(array.shape)}"
        elif old.tobytes() != array.tobytes():
            changes[name] = f"{code_span(name)}: elements set to zero or rounded"
    return changes


TIME_LIMIT = 600
"""Seconds for repro.py."""


def _write_bundle(
    target: Path, accused: Accused, case: Case, measured: Measured, backend: Backend, history: list[str]
) -> str:
    """Write the bundle as the folder ``target``, or as a zip archive when it is so called; returns what repro.py said.

    It appears complete or not at all. Raises InputError when ``target`` is taken, and when repro.py, run in a fresh
    process, does not show the fault.
    """
    with _complete(target) as folder:
        limits = {name: _limit(output, backend) for name, output in measured.items()}
        build = _fill(folder, case, measured, backend)
        (folder / "repro.py").write_text(repro(_plain(title(accused, case)), backend, limits, build), encoding="utf-8")
        printed = _run_script(folder, backend)
        page = readme(
            accused,
            case,
            measured,
            emulated=backend.emulated,
            runtime=backend.versions(),
            files=[f.name for f in sorted(folder.iterdir())],
            printed=printed,
            polygraphy=_polygraphy(measured, limits, backend, build),
            history=history,
        )
        (folder / "README.md").write_text(visible(page, "\n\t"), encoding="utf-8")
    return printed


def _run_script(folder: Path, backend: Backend) -> str:
    """Run repro.py in a fresh interpreter, isolated from this one's environment; returns what it printed.

    Raises InputError unless it exits with 1, its word for a fault.
    """
    command, environment = [sys.executable, "repro.py"], dict(os.environ)
    if isinstance(backend, OrtBackend):
        command.insert(1, "-I")
    elif isinstance(backend, TensorRTBackend):
        command[0] = backend.options.python or environment.get(ENVIRONMENT) or sys.executable
    else:
        environment["PYTHONPATH"] = str(Path(__file__).parents[3])
    try:
        finished = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, errors="replace", timeout=TIME_LIMIT
        )
    except subprocess.TimeoutExpired:
        raise InputError(f"repro.py did not end within {TIME_LIMIT} s; nothing was written") from None
    shutil.rmtree(folder / "__pycache__", ignore_errors=True)
    if finished.returncode != 1 or "FAULT" not in finished.stdout:
        raised = "Traceback (most recent call last)" in finished.stderr
        said = finished.stderr.strip().rpartition("\n")[2] if raised else finished.stderr
        output = (finished.stdout + said).strip()
        raise InputError(
            f"repro.py does not show the fault in a fresh process; nothing was written. It said:\n{output}"
        )
    return finished.stdout


def _fill(folder: Path, case: Case, measured: Measured, backend: Backend) -> dict[str, Any] | None:
    """Write models and arrays; returns the runner's step that builds the engine, for TensorRT."""
    for array in (*case.inputs.values(), *(o.exact for o in measured.values())):
        if np.dtype(array.dtype.str) != array.dtype:
            raise InputError(f"a value of the cut is {array.dtype}, which numpy alone cannot read; nothing was written")
    outputs = {name: output.actual for name, output in measured.items()}
    graph = _save(case.program, case.inputs, outputs, folder / "model.onnx")
    if case.reference is not case.program:
        exact = {case.outputs[name]: o.exact.astype(o.actual.dtype) for name, o in measured.items()}
        _save(case.reference, case.inputs, exact, folder / "reference.onnx")
    _save_arrays(folder / "inputs.npz", case.inputs)
    _save_arrays(folder / "expected.npz", {name: output.exact for name, output in measured.items()})
    if not backend.emulated:
        expected = {name: output.exact.astype(output.actual.dtype) for name, output in measured.items()}
        (folder / "expected.json").write_text(json.dumps(_polygraphy_results(expected)), encoding="utf-8")
    if not isinstance(backend, TensorRTBackend):
        return None
    with closing(backend.open(Program("model", graph))) as session:
        built_graph, step = session.plain_build()
        if built_graph is not graph:  # what TensorRT is given has its precision written into it
            shutil.copyfile(built_graph.path, folder / "model.onnx")
    shutil.copyfile(runner.__file__, folder / "trt_runner.py")
    return step


def _save(piece: Piece, inputs: Mapping[str, np.ndarray], outputs: Mapping[str, np.ndarray], path: Path) -> Graph:
    """Write the piece with its own weights and no others, every type and shape stated."""
    model = declared(piece.model, inputs)
    for value in model.graph.output:
        value.type.CopyFrom(surgery.tensor_type(outputs[value.name].dtype, outputs[value.name].shape))
    external_data_helper.load_external_data_for_model(model, str(surgery.weights_folder(piece.home)))
    big = sum(map(surgery.tensor_bytes, model.graph.initializer)) > surgery.INLINE_LIMIT
    if not big:
        model = onnx.shape_inference.infer_shapes(model)
    onnx.save(model, str(path), save_as_external_data=big, location=f"{path.name}.data" if big else None)
    return Graph(path)


def _save_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """``numpy.savez`` for any names: its own keyword is one that a value may have."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, array in arrays.items():
            archive.writestr(f"{name}.npy", _npy(array))


def _npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=False)
    return stream.getvalue()


def _polygraphy_results(arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The document that ``polygraphy run --load-outputs`` reads, as ``RunResults.save`` of 0.30 and newer writes it."""
    outputs = {
        name: {
            "values": {"array": base64.b64encode(_npy(array)).decode(), "polygraphy_class": "ndarray"},
            "polygraphy_class": "LazyArray",
        }
        for name, array in arrays.items()
    }
    run = {"outputs": outputs, "runtime": 0.0, "runner_name": "oracle", "polygraphy_class": "IterationResult"}
    return {"lst": [["oracle", [run]]], "polygraphy_class": "RunResults"}


def _polygraphy(
    measured: Measured, limits: Mapping[str, float], backend: Backend, build: Mapping[str, Any] | None
) -> str:
    if isinstance(backend, OrtBackend):
        providers = [name.removesuffix("ExecutionProvider").lower() for name, _ in backend.runtime.providers]
        arguments = ["--onnxrt", "--graph-optimization-level", LEVELS[backend.level], "--providers", *providers]
    elif build is not None:
        flags = [f"--{flag.lower()}" for flag in build["set_flags"] if flag in ("FP16", "BF16", "INT8", "TF32")]
        arguments = ["--trt", *flags, *(["--strongly-typed"] if "STRONGLY_TYPED" in build["network_flags"] else [])]
    else:
        return ""
    return polygraphy_command(arguments, {name: _atol(output, limits[name]) for name, output in measured.items()})


def _atol(output: Output, limit: float) -> float:
    """Bound on every element of an output whose relative L2 error is below ``limit``, if the error is even."""
    exact = output.exact.astype(np.float64)
    return limit * float(np.sqrt(np.mean(np.square(exact[np.isfinite(exact)])))) if exact.size else 0.0


def _limit(output: Output, backend: Backend) -> float:
    """The relative L2 error from which on an output is at fault."""
    replay = output.replay
    if replay is None or replay.expected is None:
        return 0.0
    by_range = RANGE * PRECISIONS[backend.precision].roundoff
    return by_range if output.fails and (replay.excess or 0.0) <= EXCESS else EXCESS * replay.expected


def _plain(text: str) -> str:
    return "".join(c for c in text if c.isprintable() and c not in '"\\')


def check_free(target: Path) -> None:
    """Raise InputError where no bundle can be written: the name is taken, or is none."""
    if target.exists() and (target.suffix == ".zip" or not target.is_dir() or any(target.iterdir())):
        raise InputError(f"{target}: exists; expected a new name or an empty folder")
    if not target.name or str(target) == "-":
        raise InputError(f"{str(target)!r}: expected the name of a new folder or .zip")


@contextmanager
def _complete(target: Path) -> Iterator[Path]:
    """A folder that becomes ``target``, zipped if that ends in ``.zip``, when the block succeeds; else it is gone."""
    zipped = target.suffix == ".zip"
    check_free(target)
    make_folder(target.parent)
    holder = partial_name(target)
    stem = target.stem.encode(errors="ignore").decode() or "bundle"  # the names in an archive are UTF-8
    folder = holder / stem if zipped else holder
    try:
        folder.mkdir(parents=True)
        yield folder
        if zipped:
            archive = shutil.make_archive(str(holder / "archive"), "zip", holder, folder.name)
            Path(archive).replace(target)
        else:
            folder.replace(target)
    except OSError as error:
        raise InputError(f"{target}: cannot be written ({system_reason(error)})") from error
    finally:
        shutil.rmtree(holder, ignore_errors=True)
