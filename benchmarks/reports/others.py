"""Other tools on the same files, where they can be asked at all: Polygraphy's ``debug reduce`` and ``qdq_loss_debug``.

``debug reduce`` makes the wrong file smaller while it still fails, and its answer is what is left over. It is asked
where the wrong file has no values that the right one lacks, as the recipe of Polygraphy's own example wants it:
golden values of every layer, ``data merge``, ``--mode=bisect`` and on what is left ``--mode=linear``, with
``polygraphy run --onnxrt`` as the check. ``qdq_loss_debug`` of ONNX Runtime compares what quantized files and their
float file compute; it gives ratios of signal to noise, of which the lowest is taken for its answer.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
import time
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from .case import Report

TOLERANCE = "1e-4"
"""Relative and absolute tolerance of the check: cpdebug's own defaults are 1e-4 and 1e-6."""
LIMIT = 90.0
"""Seconds that a question may take."""


def ask_others(reports: Iterable[Report], log: Path, polygraphy: Path | None) -> None:
    """Add the answers of both tools to the records of ``log``; ``polygraphy`` is a virtual environment that has it."""
    records = [json.loads(line) for line in log.read_text().splitlines()]
    by_name = {report.name: report for report in reports}
    for record in records:
        report = by_name.get(record["name"])
        if report is None or report.kind != "files":
            continue
        with tempfile.TemporaryDirectory(prefix="reports-") as scratch:
            folder = Path(scratch)
            report.write(folder)
            right, wrong = onnx.load(folder / "right.onnx"), onnx.load(folder / "wrong.onnx")
            if polygraphy and _values(wrong) <= _values(right):
                record["polygraphy"] = _judged(report, *_reduced(folder, polygraphy / "bin" / "polygraphy"))
            # It gives figures and no verdict, so it is not asked where nobody may be accused.
            if report.guilty and (renamed := _pairs_renamed(wrong)):
                read = {i for node in right.graph.node if {*node.output} & {*report.guilty} for i in node.input}
                layers, seconds = _worst(right, renamed, folder)
                if layers:
                    record["qdq_loss_debug"] = _judged(report, layers, seconds, read)
        print(record["name"], record.get("polygraphy"), record.get("qdq_loss_debug"), flush=True)
        log.write_text("".join(json.dumps(r) + "\n" for r in records))


def _values(model: onnx.ModelProto) -> set[str]:
    return {o for node in model.graph.node for o in node.output}


def _judged(report: Report, layers: list[str], seconds: float, besides: Collection[str] = ()) -> dict[str, Any]:
    """``besides``: values that may be named, too: what a layer reads, of a tool that knows activations alone."""
    right = bool(layers) and set(layers) <= {*report.guilty, *besides} if report.guilty else not layers
    return {"layers": layers, "layer": right, "seconds": round(seconds, 1)}


def _reduced(folder: Path, tool: Path) -> tuple[list[str], float]:
    """Values that the reduced model computes, and seconds; none where it found nothing to reduce, or ran too long."""
    (folder / "load.py").write_text("import numpy as np\n\ndef load_data():\n    yield dict(np.load('inputs.npz'))\n")
    start = time.perf_counter()

    def run(*arguments: str, must: bool = True) -> None:
        left = max(1.0, LIMIT - (time.perf_counter() - start))
        subprocess.run([str(tool), *arguments], cwd=folder, check=must, capture_output=True, timeout=left)

    found = "wrong.onnx"
    try:
        run("run", "right.onnx", "--onnxrt", "--data-loader-script", "load.py", "--save-inputs", "given.json",
            "--onnx-outputs", "mark", "all", "--save-outputs", "golden.json")  # fmt: skip
        run("data", "merge", "given.json", "golden.json", "-o", "values.json")
        for mode in ("bisect", "linear"):
            left = f"{mode}.onnx"
            run("debug", "reduce", found, "-o", left, f"--mode={mode}", "--load-inputs", "values.json",
                "--check", str(tool), "run", "polygraphy_debug.onnx", "--onnxrt", "--load-inputs", "values.json",
                "--load-outputs", "golden.json", "--rtol", TOLERANCE, "--atol", TOLERANCE, must=False)  # fmt: skip
            found = left if (folder / left).is_file() else found
    except (subprocess.TimeoutExpired, subprocess.CalledProcessError):
        return [], time.perf_counter() - start
    layers = [] if found == "wrong.onnx" else [n.output[0] for n in onnx.load(folder / found).graph.node]
    return layers, time.perf_counter() - start


def _pairs_renamed(model: onnx.ModelProto) -> onnx.ModelProto | None:
    """The model with the names by which ``qdq_loss_debug`` knows what a pair gives; None without pairs."""
    quantized = {n.output[0]: n.input[0] for n in model.graph.node if n.op_type == "QuantizeLinear"}
    ends = {v.name for v in model.graph.output}
    new = {
        n.output[0]: f"{quantized[n.input[0]]}_DequantizeLinear_Output"
        for n in model.graph.node
        if n.op_type == "DequantizeLinear" and n.input[0] in quantized and n.output[0] not in ends
    }
    for node in model.graph.node:
        for values in (node.input, node.output):
            values[:] = [new.get(name, name) for name in values]
    return model if new else None


def _worst(right: onnx.ModelProto, wrong: onnx.ModelProto, folder: Path) -> tuple[list[str], float]:
    """The value with the lowest ratio of signal to noise between both files, and seconds."""
    from onnxruntime.quantization import qdq_loss_debug
    from onnxruntime.quantization.calibrate import CalibrationDataReader

    class Once(CalibrationDataReader):
        def __init__(self) -> None:
            self.rest = iter([dict(np.load(folder / "inputs.npz"))])

        def get_next(self) -> Any:
            return next(self.rest, None)

    start = time.perf_counter()
    found = []
    for name, model in (("right", right), ("wrong", wrong)):
        onnx.save(onnx.shape_inference.infer_shapes(model), folder / f"{name}.typed.onnx")
        marked = folder / f"{name}.marked.onnx"
        qdq_loss_debug.modify_model_output_intermediate_tensors(folder / f"{name}.typed.onnx", marked)
        found.append(qdq_loss_debug.collect_activations(str(marked), Once()))
    matched = qdq_loss_debug.create_activation_matching(found[1], found[0])
    errors = qdq_loss_debug.compute_activation_error(matched)
    ranked = sorted((e["xmodel_err"], name) for name, e in errors.items() if "xmodel_err" in e)
    return [name for _, name in ranked[:1]], time.perf_counter() - start
