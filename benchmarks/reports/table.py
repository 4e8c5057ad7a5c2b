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
        f"{count} reports of wrong numbers from public issue trackers, each rebuilt as a small network of our own that "
        "has what the report describes, and each with a healthy twin: the same network as another tool would write it, "
        "or with inputs that its precision holds. "
        f"cpdebug names {sums} of {count}; it accuses a layer of {accused} of the twins. A question takes "
        f"{seconds[len(seconds) // 2]:.1f} s (median), at most {seconds[-1]:.1f} s.",
        "",
        "*Layer*: something is accused, and nothing but the layers that the fault is in. For files in FP16 nobody is "
        "guilty of what the precision must do; there the layers count that are told to cost most. *Cause* and *fix*: "
        "what is told first matches what the report came to. *Twin*: nobody is accused there. Seconds are those of one "
        "`diagnose` in a running process.",
        "",
        "The layers were written down with the cases. Expressions for causes and fixes were widened after the first "
        "run where an answer says the same in other words, and seven cases were rebuilt then, because they asked for "
        "something else than their report: so the figures for causes are no forecast for reports that are not here.",
        "",
        "## Ask another tool",
        "",
        "```sh",
        "python benchmarks/reports/run.py write FOLDER                    # the files of every case, with truth.json",
        "python benchmarks/reports/run.py run --log LOG                   # cpdebug, one minute",
        "python benchmarks/reports/run.py others --log LOG --polygraphy ENV",
        "python benchmarks/reports/run.py table --log LOG --write docs/reports.md",
        "```",
        "",
        "A case is a folder: `right.onnx` and `inputs.npz`; `wrong.onnx` and `healthy.onnx`, or `wrong.npz` and "
        "`healthy.npz` with the values that a runtime computed; for FP16, `right.onnx` itself is the question. "
        "`truth.json` says which nodes may be named.",
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
        "## Beside other tools",
        "",
        "| tool | can be asked | names the layer | cpdebug on these | s (median) |",
        "|---|---|---|---|---|",
        *lines,
        "",
        "`debug reduce` can be asked where the wrong file has no values that the right one lacks: at a tolerance of "
        "1e-4, with 90 s a question and the start of its processes counted. What it misses here are Resizes that leave "
        "optional inputs out, at which version 0.53 ends with an error. `qdq_loss_debug` can be asked where "
        "activations pass quantizers and something is wrong, for it gives no verdict; its answer is the value with the "
        "lowest ratio of signal to noise, and what a faulty layer reads is right, too. Neither tells "
        "causes or fixes.",
        "",
    ]


def _missed(records: Sequence[Record]) -> list[str]:
    lines = []
    for record in records:
        if "error" in record:
            lines.append(f"- *{record['name']}*: {record['error']}")
        elif not (record["layer"] and record["cause"] and record["fix"] and record["twin"]):
            wrong = [key for key in ("layer", "cause", "fix", "twin") if not record[key]]
            told = record["answer"]["cause"].partition(": ")[2] or "no cause is told"
            lines.append(f"- *{record['name']}* ({', '.join(wrong)}): {told.replace('|', '∣')}")
    return [*lines, ""]
