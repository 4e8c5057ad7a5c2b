"""``docs/reports.md`` out of a log: each report with what was named, and sums."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import metadata
from typing import Any

Record = dict[str, Any]
KINDS = {"files": "two files", "fp16": "one file in FP16", "dump": "a file and dumped values"}


def markdown(records: Sequence[Record]) -> str:
    """The page. ``records`` are those of ``run.py``, with the answers of other tools where they were asked."""
    count = len(records)
    sums = ", ".join(
        f"{text} in {sum(bool(r.get(key)) for r in records)}"
        for key, text in (("layer", "the layer"), ("cause", "the cause"), ("fix", "the fix"))
    )
    accused = sum(not r.get("twin") for r in records)
    seconds = sorted(r["answer"]["seconds"] for r in records if "answer" in r)
    lines = [
        "# Public reports, rebuilt",
        "",
        f"{count} reports of wrong numbers from public issue trackers. Each is rebuilt as a small network that shows "
        "the reported fault, with a healthy twin: the same network as another tool would write it, or with inputs that "
        "its precision can represent. "
        f"cpdebug names {sums} of {count}; it accuses a layer of {accused} of the twins. A question takes "
        f"{seconds[len(seconds) // 2]:.1f} s (median), at most {seconds[-1]:.1f} s.",
        "",
        "- *Layer*: cpdebug accuses only layers that have the fault, and at least one. In FP16 files no layer is "
        "guilty of the rounding of FP16, and in dumps none of an error that kernels of other runtimes make as well; "
        "there the layers count that the finding names as costing most.",
        "- *Cause*, *fix*: the first finding agrees with the conclusion of the report.",
        "- *Twin*: no layer is accused.",
        "- *s*: seconds of one `diagnose` in a running process.",
        "",
        "The expected layers were written down with the cases. The patterns for causes and fixes were widened after "
        "the first run if an answer said the same in other words, and seven cases were rebuilt, because they did not "
        "ask what their report asked. What was missed was mended with the report at hand. So the figures do not "
        "predict the result for other reports.",
        "",
        "## Try another tool",
        "",
        "```sh",
        "python benchmarks/reports/run.py write FOLDER                    # the files of every case, with truth.json",
        "python benchmarks/reports/run.py run --log LOG                   # cpdebug, one minute",
        "python benchmarks/reports/run.py others --log LOG --polygraphy ENV",
        "python benchmarks/reports/run.py table --log LOG --write docs/reports.md",
        "```",
        "",
        "A case is a folder with `right.onnx` and `inputs.npz`, and either `wrong.onnx` and `healthy.onnx`, or "
        "`wrong.npz` and `healthy.npz` with the values that a runtime computed. For FP16, the question is about "
        "`right.onnx` itself. `truth.json` lists the nodes that may be named.",
        "",
        *_others(records),
        "## Every report",
        "",
        "| report | given | layer | cause | fix | twin | s |",
        "|---|---|---|---|---|---|---|",
        *map(_row, records),
        "",
        "## What is missed",
        "",
        *_missed(records),
        f"Made with ONNX Runtime {metadata.version('onnxruntime')}, onnx {metadata.version('onnx')}. "
        "`run.py table` writes this page; do not edit it.",
        "",
    ]
    return "\n".join(lines)


def _mark(value: object) -> str:
    return "✓" if value else "✗"


def _row(record: Record) -> str:
    marks = " | ".join(_mark(record.get(key)) for key in ("layer", "cause", "fix", "twin"))
    place = record["link"].removeprefix("https://github.com/")
    owner, name, _, number = place.split("/")
    seconds = f"{record['answer']['seconds']:.1f}" if "answer" in record else "–"
    given = KINDS[record["kind"]]
    return f"| {record['name']} ([{owner}/{name}#{number}]({record['link']})) | {given} | {marks} | {seconds} |"


def _others(records: Sequence[Record]) -> list[str]:
    lines = []
    for key, title in (("polygraphy", "Polygraphy's `debug reduce`"), ("qdq_loss_debug", "`qdq_loss_debug`")):
        asked = [r for r in records if key in r]
        if not asked:
            continue
        right = sum(r[key]["layer"] for r in asked)
        ours = sum(bool(r.get("layer")) for r in asked)
        seconds = sorted(r[key]["seconds"] for r in asked)
        lines.append(
            f"| {title} | {len(asked)} of {len(records)} | {right} | {ours} | {seconds[len(seconds) // 2]:.1f} |"
        )
    if not lines:
        return []
    return [
        "## Compared with other tools",
        "",
        "| tool | can be asked | names the layer | cpdebug on these | s (median) |",
        "|---|---|---|---|---|",
        *lines,
        "",
        "`debug reduce` applies if the wrong file has no values that the right one lacks. It ran with a tolerance of "
        "1e-4 and 90 s per question, including the start of its processes. It misses Resizes without optional inputs, "
        "where version 0.53 stops with an error. `qdq_loss_debug` applies if activations pass quantizers and something "
        "is wrong, because it has no verdict; its answer is the value with the lowest signal-to-noise ratio, and the "
        "input of a faulty layer also counts as right. Neither tool reports causes or fixes.",
        "",
    ]


def _missed(records: Sequence[Record]) -> list[str]:
    lines = []
    for record in records:
        if "error" in record:
            lines.append(f"- *{record['name']}*: {record['error']}")
        elif not (record["layer"] and record["cause"] and record["fix"] and record["twin"]):
            wrong = [key for key in ("layer", "cause", "fix", "twin") if not record[key]]
            told = record["answer"]["cause"].partition(": ")[2] or "no cause is named"
            lines.append(f"- *{record['name']}* ({', '.join(wrong)}): {told.replace('|', '∣')}")
    return [*(lines or ["Nothing in this run."]), ""]
