"""The text of ``repro.py``: one file that needs the runtime at fault and numpy."""

from __future__ import annotations

from collections.abc import Mapping
from string import Template
from typing import Any

from cp_debug.backends.base import Backend
from cp_debug.backends.openvino_backend import OpenVinoBackend
from cp_debug.backends.ort_backend import OrtBackend
from cp_debug.backends.ort_options import LEVELS

_SCRIPT = Template('''\
"""$title

Needs $needs. Exit status: 1 while the fault is there, 0 when it is gone.
"""

$imports
from pathlib import Path

import numpy as np
$libraries
HERE = Path(__file__).resolve().parent
LIMITS = $limits
"""Output: the largest relative L2 error that its precision explains."""


def load_data():
    """One set of inputs; also the data loader of `polygraphy run`."""
    with np.load(HERE / "inputs.npz") as inputs:
        yield dict(inputs)

$run

def main():
    print($versions)
    outputs = run(next(load_data()))
    faults = 0
    with np.load(HERE / "expected.npz") as expected:
        for name, limit in LIMITS.items():
            shown = ascii(name)[1:-1].replace("##[", "## [")  # which logs of GitHub take for a command
            actual, exact = (np.asarray(a, dtype=np.float64) for a in (outputs[name], expected[name]))
            if actual.shape != exact.shape:
                print(f"output {shown}: shape {list(actual.shape)}, expected {list(exact.shape)}: FAULT")
                faults += 1
                continue
            finite = np.isfinite(actual) & np.isfinite(exact)
            same = (actual == exact) | (np.isnan(actual) & np.isnan(exact))
            born = np.count_nonzero(~finite & ~same)
            difference = np.where(finite, actual - np.where(finite, exact, 0.0), 0.0)
            scale = np.linalg.norm(np.where(finite, exact, 0.0)) or 1.0
            error = np.linalg.norm(difference) / scale
            fault = error > limit or born > 0
            faults += fault
            print(
                f"output {shown}: max |error| {np.abs(difference).max(initial=0.0):.6g}, relative L2 {error:.3g} "
                f"(explained by its precision: {limit:.3g}), NaN or Inf {born}: {'FAULT' if fault else 'ok'}"
            )
            if difference.size:
                worst = np.unravel_index(np.argmax(np.abs(difference)), difference.shape)
                place = [int(i) for i in worst]
                print(f"  worst at {place}: {actual[worst]:.9g}, expected {exact[worst]:.9g}")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
''')

_ONNXRUNTIME = """
def run(inputs):
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.{level}
    options.intra_op_num_threads = {threads}
    options.use_deterministic_compute = True
    options.log_severity_level = 4  # what fails is raised
    os.chdir(HERE)  # the folder's own path may hold bytes that are no text
    session = ort.InferenceSession(
        "model.onnx", options, providers={providers}, disabled_optimizers={disabled}
    )
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, inputs)))
"""

_OPENVINO = """
def run(inputs):
    core = openvino.Core()
    compiled = core.compile_model(core.read_model(str(HERE / "model.onnx")), "CPU", {properties})
    results = compiled({{port: inputs[name] for port in compiled.inputs for name in port.names if name in inputs}})
    return {{name: results[port] for port in compiled.outputs for name in port.names}}
"""

_EMULATED = '''
def run(inputs):
    """The emulation: no hardware of that precision is at work here."""
    backend = create(BackendSpec.parse({spec!r}), {options})
    session = backend.open(Program("model", Graph(HERE / "model.onnx")))
    return session.run(inputs)
'''

_TENSORRT = '''
BUILD = {build}


def run(inputs):
    """Build the engine and run it; trt_runner.py does both."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        engine, feeds = str(folder / "model.engine"), {{}}
        for i, (value, array) in enumerate(inputs.items()):
            feeds[value] = str(folder / f"input-{{i}}.npy")
            np.save(feeds[value], array)
        build = dict(BUILD, command="build", onnx=str(HERE / "model.onnx"), engine=engine)
        run = {{"command": "run", "engine": engine, "inputs": feeds, "folder": name, "names": sorted(LIMITS)}}
        result = trt_runner.execute({{"steps": [build, run]}}, lambda event: None)
        if "error" in result:
            sys.exit(result["error"]["message"])
        return {{t["name"]: np.load(t["file"]) for t in result["results"][1]["tensors"]}}
'''


def repro(title: str, backend: Backend, limits: Mapping[str, float], build: Mapping[str, Any] | None) -> str:
    """The script. ``build`` is the runner's step that builds the engine, for TensorRT."""
    modules = ["sys"]
    if build is not None:
        needs, libraries = "numpy and tensorrt", "import tensorrt\nimport trt_runner\n"
        modules.append("tempfile")
        versions = '"tensorrt", tensorrt.__version__'
        run = _TENSORRT.format(build=repr(dict(build)))
    elif isinstance(backend, OrtBackend):
        needs, libraries = "numpy and onnxruntime", "import onnxruntime as ort\n"
        modules.insert(0, "os")
        versions = '"onnxruntime", ort.__version__'
        run = _ONNXRUNTIME.format(
            level=LEVELS[backend.level],
            threads=backend.runtime.threads,
            providers=list(backend.runtime.providers),
            disabled=list(backend.disabled_optimizers) or None,
        )
    elif isinstance(backend, OpenVinoBackend):
        needs, libraries, versions = "numpy and openvino", "import openvino\n", '"openvino", openvino.get_version()'
        run = _OPENVINO.format(properties=backend.properties)
    else:
        emulated = backend.spec.family == "emu"
        needs = "cpdebug, which emulates the backend" if emulated else f"cpdebug and its plug-in {backend.spec.family}"
        libraries = (
            "from cp_debug.backends.base import Program\nfrom cp_debug.backends.registry import create\n"
            "from cp_debug.backends.spec import BackendSpec\nfrom cp_debug.graph.graph import Graph\n"
        )
        versions = f'"{"emulated" if emulated else "backend"}:", {str(backend.spec)!r}'
        run = _EMULATED.format(spec=str(backend.spec), options=_emulation(backend) if emulated else "")
    imports = "\n".join(f"import {module}" for module in modules)
    within = "{" + ", ".join(f"{name!r}: {limit:.6g}" for name, limit in limits.items()) + "}"
    return _SCRIPT.substitute(
        title=title, needs=needs, imports=imports, libraries=libraries, limits=within, versions=versions, run=run
    )


def _emulation(backend: Any) -> str:
    options = {"overrides": dict(backend.overrides), "tile": backend.arithmetic.tile}
    return ", ".join(f"{name}={value!r}" for name, value in options.items() if value)
