"""Public reports, rebuilt: which layer, cause and fix a tool names, and in which time.

    python benchmarks/reports/run.py write FOLDER                        # the files, for any tool
    python benchmarks/reports/run.py run --log FILE [--only TEXT]        # cpdebug, one case after the other
    python benchmarks/reports/run.py others --log FILE --polygraphy ENV  # two other tools, where they can be asked
    python benchmarks/reports/run.py table --log FILE [--write docs/reports.md]

A case is right by layer where something is accused and nothing but the layers that the fault is in; its twin is right
where nothing is accused. Causes and fixes are compared with the expression of ``case.py`` as they are told.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import reports

    __package__ = reports.__name__

from . import exported, halves, quantized, windows
from .case import Report

ALL: tuple[Report, ...] = (*windows.CASES, *exported.CASES, *quantized.CASES, *halves.CASES, *halves.DUMPS)


def asked(report: Report, folder: Path, *, twin: bool) -> dict[str, Any]:
    """What ``cp_debug.diagnose`` is asked about a case, or its twin."""
    said = "healthy" if twin else "wrong"
    if report.kind == "files":
        return {"model": folder / "right.onnx", "backends": "ort,ort", "test_model": folder / f"{said}.onnx",
                "inputs": folder / "inputs.npz"}  # fmt: skip
    if report.kind == "dump":
        return {"model": folder / "right.onnx", "backends": "ort", "test_tensors": folder / f"{said}.npz"}
    model, inputs = ("healthy.onnx", "healthy.npz") if twin else ("right.onnx", "inputs.npz")
    return {"model": folder / model, "backends": "ort,emu-fp16", "inputs": folder / inputs}


def answered(report: Report, folder: Path, *, twin: bool) -> dict[str, Any]:
    """cpdebug's answer: accused layers, the first finding as told, seconds."""
    from cp_debug import diagnose
    from cp_debug.bisect.result import SHAPE

    start = time.perf_counter()
    (test,) = diagnose(**asked(report, folder, twin=twin), progress=False).tests
    seconds = time.perf_counter() - start
    # A layer whose shape is another one is the first divergent one, and has no figures to be guilty by.
    accused = [row.name for row in test.guilty] or [r.name for r in (test.first_divergent,) if r and r.verdict == SHAPE]
    told = [f for f in test.findings if set(f.layers) & set(accused)] or test.findings
    first = told[0] if told else None
    return {
        "accused": accused,
        "costly": [] if first is None else first.layers,
        "cause": "" if first is None else f"{first.cause}: {first.headline}",
        "evidence": "" if first is None else json.dumps(first.evidence, default=str)[:400],
        "fix": "" if first is None else first.fix,
        "seconds": round(seconds, 2),
    }


def run_case(report: Report, folder: Path) -> dict[str, Any]:
    """The log's record of one case and its twin."""
    report.write(folder)
    bad = answered(report, folder, twin=False)
    twin = answered(report, folder, twin=True)
    # Where a precision is declared and does what it must, nobody is guilty: the layers that cost most are the answer.
    # So in FP16, and in dumps of runtimes whose kernels nobody knows.
    accused = set(bad["accused"] or (bad["costly"] if report.kind != "files" else ()))
    named = f"{bad['cause']} {bad['evidence']}"
    right = bool(accused) and accused <= set(report.guilty) if report.guilty else not accused
    return {
        "name": report.name,
        "kind": report.kind,
        "link": report.link,
        "layer": right,
        "cause": right and (not report.guilty or bool(re.search(report.cause, named))),
        "fix": right and (not report.guilty or bool(re.search(report.fix or report.cause, bad["fix"]))),
        "twin": not twin["accused"],
        "answer": bad,
        "twin_answer": twin,
    }


def run(reports: Iterable[Report], log: Path) -> Iterator[dict[str, Any]]:
    """Each case that is not in the log yet, with its record, which is appended."""
    done = {json.loads(line)["name"] for line in log.read_text().splitlines()} if log.exists() else set()
    for report in reports:
        if report.name in done:
            continue
        with tempfile.TemporaryDirectory(prefix="reports-") as scratch:
            try:
                record = run_case(report, Path(scratch))
            except Exception as error:
                record = {"name": report.name, "kind": report.kind, "link": report.link, "error": repr(error)[:400]}
        with log.open("a") as stream:
            stream.write(json.dumps(record) + "\n")
        yield record


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", choices=("write", "run", "others", "table"))
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--log", type=Path)
    parser.add_argument("--only", default="")
    parser.add_argument("--write", type=Path)
    parser.add_argument("--polygraphy", type=Path, help="a virtual environment that has it")
    given = parser.parse_args()
    chosen = [report for report in ALL if re.search(given.only, report.name)]
    if given.job == "write":
        for report in chosen:
            report.write(given.folder / report.name.replace(" ", "-"))
        return 0
    if given.job == "run":
        for record in run(chosen, given.log):
            marks = " ".join(f"{key} {'✓' if record.get(key) else '✗'}" for key in ("layer", "cause", "fix", "twin"))
            print(f"{record['name']:45} {marks}  {record.get('error', '')}", flush=True)
        return 0
    if given.job == "others":
        from .others import ask_others

        ask_others(chosen, given.log, given.polygraphy)
        return 0
    from .table import markdown

    text = markdown([json.loads(line) for line in given.log.read_text().splitlines()])
    given.write.write_text(text) if given.write else print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
