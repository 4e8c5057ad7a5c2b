"""``README.md`` of a bundle: the fault, the command that shows it, the measurements."""

from __future__ import annotations

import platform
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import onnx

from cp_debug.bisect.finding import UNKNOWN
from cp_debug.bisect.replayed import Replay
from cp_debug.reports.bundle.case import Accused, Case
from cp_debug.reports.bundle.verify import Measured
from cp_debug.reports.numbers import number, shape_of, share
from cp_debug.safe_text import code_span, markdown

FILES = {
    "model.onnx": "what the backend runs",
    "reference.onnx": "what it should compute: the same piece of the reference's graph",
    "inputs.npz": "the inputs, by name",
    "expected.npz": "the expected outputs, by name, computed by the {oracle} oracle",
    "expected.json": "the same for `polygraphy run`",
    "repro.py": "runs the model and compares",
    "trt_runner.py": "builds and runs TensorRT engines; used by repro.py",
}


def readme(
    accused: Accused,
    case: Case,
    measured: Measured,
    *,
    emulated: bool,
    runtime: Mapping[str, str],
    files: Sequence[str],
    printed: str,
    polygraphy: str,
    history: Sequence[str],
) -> str:
    """The page as Markdown.

    ``runtime``: versions of the packages that run the model here; ``printed``: output of repro.py in a fresh process;
    ``history``: steps that made the case as small as it is.
    """
    row = accused.row
    compared = accused.test.backend.spec if row.side == "reference" else "the reference"
    worst = max(measured.values(), key=lambda o: (o.fails, o.strength))
    lines = [
        f"# {markdown(title(accused, case))}",
        "",
        f"Judged by the {accused.oracle.upper()} oracle: {markdown(worst.judgement.why)}.",
        "",
    ]
    for finding in (f for f in accused.test.findings if row.name in f.layers and f.cause != UNKNOWN):
        fix = f" Fix: {markdown(finding.fix)}." if finding.fix else ""
        lines += [f"**Cause**: {markdown(finding.says)}.{fix}", ""]
    if case.reference is not case.program:
        lines += [
            "**The program differs from the reference's.** `model.onnx` is the piece that the backend ran, "
            "`reference.onnx` the piece that should have run; the fault is the difference, not the runtime.",
            "",
        ]
    if emulated:
        lines += [
            f"**This is an emulation.** {markdown(accused.backend.spec)} rounds as such hardware would; no such "
            "hardware ran. `repro.py` repeats the emulation and needs cpdebug.",
            "",
        ]
    lines += ["## See it", "", "```", "python repro.py", "```", ""]
    lines += ["In a fresh process it printed (exit status 1: the fault is there):", ""]
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", printed)), default=0))
    lines += [fence, printed.strip(), fence, ""]
    if polygraphy:
        lines += ["The same with Polygraphy:", "", "```", polygraphy, "```", ""]
    lines += ["## What fails", "", *_table(("output", "shape", "introduced", "expected", "excess", "verdict"), [
        (code_span(name), shape_of(o.exact), *_figures(o.replay), o.judgement.verdict)
        for name, o in measured.items()
    ])]  # fmt: skip
    lines += ["", "Relative L2 norms; *expected* is what the declared precision must introduce.", ""]
    nodes = [(code_span(n.name), markdown(n.op_type), markdown(_attributes(n))) for n in case.program.model.graph.node]
    lines += _table(("node", "operator", "attributes"), nodes)
    lines += ["", "## Where it comes from", "", *_table(("", ""), [
        ("model", markdown(accused.model)),
        ("layer", f"{code_span(row.name)} ({markdown(row.op)}), value {code_span(row.onnx)} of component "
                  f"{code_span(row.component)}"),
        ("backends", markdown(f"{accused.backend.spec}, found in a comparison with {compared}")),
        ("divergence there", f"max {number(row.stats.max_abs)}, relative L2 {number(row.stats.rel_l2)}"),
        ("introduced, expected, excess", ", ".join(_figures(row.replay))),
        ("why", markdown(row.why or row.verdict)),
        ("share of the final divergence", "–" if row.share is None else share(row.share)),
    ])]  # fmt: skip
    lines += ["", "## Inputs", "", *_table(("input", "type", "shape", "not zero", "origin"), [
        (code_span(n), str(a.dtype), shape_of(a), str(np.count_nonzero(a)), _origin(case, n))
        for n, a in case.inputs.items()
    ])]  # fmt: skip
    lines += ["", *(f"- {step}" for step in (*history, *case.notes)), ""]
    versions_by_run = {"found with": accused.backend.versions, "repeated with": runtime}
    lines += ["## Environment", "", *_table(("", ""), [
        *((kind, markdown(", ".join(f"{k} {v}" for k, v in own.items()))) for kind, own in versions_by_run.items()),
        ("here", f"Python {platform.python_version()}, numpy {np.__version__}, {platform.platform()}"),
        ("settings", markdown(_settings(accused.backend.settings))),
    ])]  # fmt: skip
    lines += ["", "## Files", "", *_table(("", ""), [
        (f"`{name}`", FILES[name].format(oracle=accused.oracle.upper())) for name in files if name in FILES
    ])]  # fmt: skip
    return "\n".join(lines) + "\n"


def title(accused: Accused, case: Case) -> str:
    """One line for the issue tracker."""
    operators = " + ".join(node.op_type for node in case.program.model.graph.node)
    return f"{operators} gives a wrong result on {accused.backend.spec} (layer {accused.row.name})"


def polygraphy_command(arguments: Iterable[str], atol: Mapping[str, float]) -> str:
    """The command line. ``atol``: output → absolute tolerance; where it fails, some element differs by more."""
    limits = [f"{limit:.6g}" if len(atol) == 1 else f"{name}:{limit:.6g}" for name, limit in atol.items()]
    command = ["polygraphy", "run", "model.onnx", *arguments, "--data-loader-script", "repro.py:load_data"]
    return shlex.join([*command, "--load-outputs", "expected.json", "--rtol", "0", "--atol", *limits])


def _origin(case: Case, name: str) -> str:
    made = "computed in FP32 from captured values" if name in case.computed else "captured"
    return f"{made}, then cut, set to zero or rounded" if name in case.changed else made


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a table; the cells' text is Markdown already, but for bars."""
    cells = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(re.sub(r"(?<!\\)\|", r"\\|", c) for c in row) + " |" for row in cells]


def _figures(replay: Replay | None) -> list[str]:
    return [number(getattr(replay, key, None)) for key in ("introduced", "expected", "excess")]


def _attributes(node: onnx.NodeProto) -> str:
    texts = []
    for attribute in node.attribute:
        value = onnx.helper.get_attribute_value(attribute)
        text = value.decode(errors="replace") if isinstance(value, bytes) else str(value)
        texts.append(f"{attribute.name} {text if len(text) < 60 else '…'}")
    return ", ".join(texts)


def _settings(settings: Mapping[str, object]) -> str:
    short = {name: value for name, value in settings.items() if isinstance(value, str | int | float | bool)}
    return ", ".join(f"{name} {value}" for name, value in short.items())
